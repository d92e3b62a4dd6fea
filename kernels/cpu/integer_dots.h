// Dot products of bytes in 32-bit lanes, exact on every instruction set.
#pragma once

#include "simd.h"

namespace auxkern {
namespace AUXKERN_ISA {
namespace {

// sum + the four products of an unsigned byte of `weight` and a signed one of `x` in each lane. Never
// by the instruction that adds neighbours in 16 bits, which saturates.
inline vi add_four(vi sum, vi weight, vi x) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weight, (__m512i)x);
#elif defined(__AVXVNNI__)
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)weight, (__m256i)x);
#elif AUXKERN_LANES == 16
    const __m512i w = (__m512i)weight, a = (__m512i)x;
    const __m512i even = _mm512_madd_epi16(_mm512_and_si512(w, _mm512_set1_epi16(255)),
                                           _mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8));
    const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(w, 8), _mm512_srai_epi16(a, 8));
    return sum + (vi)even + (vi)odd;
#elif AUXKERN_LANES == 8
    const __m256i w = (__m256i)weight, a = (__m256i)x;
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(255)),
                                           _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(a, 8));
    return sum + (vi)even + (vi)odd;
#else
    for (int shift = 0; shift < 32; shift += 8) sum += ((weight >> shift) & 255) * ((x << (24 - shift)) >> 24);
    return sum;
#endif
}

}  // namespace
}  // namespace AUXKERN_ISA
}  // namespace auxkern
