// How the C interface runs a kernel: which instruction set, on which threads.
//
// Nothing here or in the kernels takes functions of the C++ run-time (std::thread, vectors, exceptions): the
// library needs the C library alone, whatever compiler made it.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "auxkern.h"

namespace auxkern {

bool has_isa(int32_t isa);
int32_t resolve(int32_t isa);

// Runs tasks [begin, end) with scratch memory of its thread.
template <class Task>
using Kernel = void (*)(const Task &, int64_t begin, int64_t end, float *scratch);

template <class Function>
Function pick(int32_t isa, Function generic, Function avx2, Function avx512) {
    switch (isa) {
        case AUXKERN_ISA_AVX512: case AUXKERN_ISA_AVX512_VNNI: case AUXKERN_ISA_AVX512_BF16: return avx512;
        case AUXKERN_ISA_AVX2: case AUXKERN_ISA_AVX2_VNNI: return avx2;
        default: return generic;
    }
}

#if defined(__x86_64__)
#define AUXKERN_PICK(Function, name, isa) pick<Function>(isa, generic::name, avx2::name, avx512::name)
#else
#define AUXKERN_PICK(Function, name, isa) pick<Function>(isa, generic::name, nullptr, nullptr)
#endif

struct Body {
    void (*run)(void *);
    void *context;

    static void *begin(void *body) {
        const Body &here = *static_cast<Body *>(body);
        here.run(here.context);
        return nullptr;
    }
};

// Runs body(context) on at most `threads` threads, this one among them, and returns when all are done.
inline void in_parallel(void (*body)(void *), void *context, unsigned threads, const auxkern_execution &execution) {
    if (threads <= 1) return body(context);
    if (execution.parallel) return execution.parallel(body, context, threads, 0);
    Body other{body, context};
    auto *others = static_cast<pthread_t *>(std::malloc(sizeof(pthread_t) * threads));
    unsigned begun = 0;
    // Where the system gives no more threads, those there are, and this one, do the work.
    while (others && begun + 1 < threads && pthread_create(others + begun, nullptr, Body::begin, &other) == 0) ++begun;
    body(context);
    for (unsigned i = 0; i < begun; ++i) pthread_join(others[i], nullptr);
    std::free(others);
}

// Pieces of work (rows, or segments of the vocabulary) are taken from a shared counter, so that a slow
// thread does not hold up the rest. Which thread takes a piece changes nothing in it.
template <class Task>
struct Work {
    Kernel<Task> kernel;
    const Task *task;
    int64_t pieces, grab;
    std::atomic<int64_t> next{0};
    float *scratch = nullptr;  // scratch_floats for each thread, or null
    int64_t scratch_floats = 0;
    std::atomic<int64_t> threads_begun{0};

    static void body(void *context) {
        auto &work = *static_cast<Work *>(context);
        float *scratch = work.scratch;
        if (scratch) scratch += work.threads_begun.fetch_add(1, std::memory_order_relaxed) * work.scratch_floats;
        for (;;) {
            const int64_t begin = work.next.fetch_add(work.grab, std::memory_order_relaxed);
            if (begin >= work.pieces) return;
            work.kernel(*work.task, begin, std::min(begin + work.grab, work.pieces), scratch);
        }
    }
};

template <class Task>
int32_t run(Kernel<Task> kernel, const Task &task, int64_t pieces, int64_t grab, int64_t scratch_floats, unsigned threads,
            const auxkern_execution &execution) {
    Work<Task> work;
    work.kernel = kernel;
    work.task = &task;
    work.pieces = pieces;
    work.grab = grab;
    work.scratch_floats = scratch_floats;
    std::unique_ptr<float, decltype(&std::free)> scratch(nullptr, &std::free);
    if (work.scratch_floats > 0) {
        scratch.reset(static_cast<float *>(std::malloc(sizeof(float) * size_t(work.scratch_floats) * threads)));
        if (!scratch) return AUXKERN_OUT_OF_MEMORY;
        work.scratch = scratch.get();
    }
    in_parallel(Work<Task>::body, &work, threads, execution);
    return AUXKERN_OK;
}

}  // namespace auxkern
