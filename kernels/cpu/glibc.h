// Before every source on Linux: the first versions of glibc's functions, which later ones keep.
//
// exp and log got a new version in glibc 2.29 (they set no errno through a wrapper), threads in 2.34 (they moved into
// libc.so). A library that is linked against a newer glibc would take these, and not load on manylinux_2_28.
#pragma once

#include <features.h>

#if defined(__GLIBC__) && defined(__x86_64__)
#define AUXKERN_FIRST_VERSION "GLIBC_2.2.5"
#elif defined(__GLIBC__) && defined(__aarch64__)
#define AUXKERN_FIRST_VERSION "GLIBC_2.17"
#endif

#if defined(AUXKERN_FIRST_VERSION)
#define AUXKERN_FIRST(function) __asm__(".symver " #function ", " #function "@" AUXKERN_FIRST_VERSION);
AUXKERN_FIRST(exp)
AUXKERN_FIRST(log)
AUXKERN_FIRST(pthread_create)
AUXKERN_FIRST(pthread_join)
AUXKERN_FIRST(pthread_key_create)
AUXKERN_FIRST(pthread_setspecific)
#endif
