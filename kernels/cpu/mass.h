// Probability mass in fixed point, bit by bit as auxkern/core/mass.py makes it. As simd.h, built once per
// instruction set.
#pragma once

#include "simd.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace {

typedef uint64_t vl __attribute__((vector_size(4 * AUXKERN_LANES)));

constexpr int FRACTION_BITS = 22;
constexpr int32_t MOST_OCTAVES = 63 << FRACTION_BITS;  // from there on the mass is 0
// float32's log2(e) times 2^22: the product is rounded once, and no sum follows that could be fused with it.
constexpr float OCTAVES = 12102203.0f / 8388608.0f * float(1 << FRACTION_BITS);

// -d log2(e), d <= 0, with 22 bits of fraction, cut off.
inline vi octaves_of(vf d) {
    const vf x = -d * OCTAVES, most = splat(float(MOST_OCTAVES));
    return __builtin_convertvector(choose((vi)(x < most), x, most), vi);
}

inline vu high_product(vu a, vu b) {
#if AUXKERN_LANES == 16
    const __m512i even = _mm512_mul_epu32((__m512i)a, (__m512i)b);
    const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), _mm512_srli_epi64((__m512i)b, 32));
    return (vu)_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
#elif AUXKERN_LANES == 8
    const __m256i even = _mm256_mul_epu32((__m256i)a, (__m256i)b);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), _mm256_srli_epi64((__m256i)b, 32));
    return (vu)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
#elif defined(__SSE2__)
    const __m128i even = _mm_mul_epu32((__m128i)a, (__m128i)b);
    const __m128i odd = _mm_mul_epu32(_mm_srli_epi64((__m128i)a, 32), _mm_srli_epi64((__m128i)b, 32));
    return (vu)_mm_srli_epi64(even, 32) | ((vu)odd & vu{0, ~0u, 0, ~0u});
#else
    vu high;
    for (int i = 0; i < LANES; ++i) high[i] = uint32_t((uint64_t(a[i]) * b[i]) >> 32);
    return high;
#endif
}

// Masses of the lanes, in their order.
struct Masses {
    uint64_t lane[LANES];
};

inline int mass_shift(int64_t V) { return __builtin_clzll(uint64_t(V)) - 33; }  // 31 - the bits of V

// 2^-octaves times 2^(31 + shift), cut off; 0 for lanes that are not in the mask.
inline Masses masses_of(vi octaves, int shift, vi mask) {
    const vi power = (-octaves) >> FRACTION_BITS;
    const vu t = (vu)(-octaves) << (32 - FRACTION_BITS);
    vu factor = vu{} + 4009632u;  // 2^t on [0, 1), as in mass.py
    factor = high_product(factor, t) + 19363924u;
    factor = high_product(factor, t) + 119829402u;
    factor = high_product(factor, t) + 515749229u;
    factor = high_product(factor, t) + 1488531108u;
    factor = high_product(factor, t) + 2147483648u;
    factor &= (vu)mask;
    const vu right = (vu)(-power);
#if AUXKERN_LANES == 4
    Masses masses;
    for (int i = 0; i < LANES; ++i) masses.lane[i] = (uint64_t(factor[i]) << shift) >> right[i];
    return masses;
#else
    typedef uint32_t half __attribute__((vector_size(2 * AUXKERN_LANES)));
    half factors[2], rights[2];
    memcpy(factors, &factor, sizeof factor);
    memcpy(rights, &right, sizeof right);
    Masses masses;
    for (int h = 0; h < 2; ++h) {
        const vl wide = (__builtin_convertvector(factors[h], vl) << shift) >> __builtin_convertvector(rights[h], vl);
        memcpy(masses.lane + h * (LANES / 2), &wide, sizeof wide);
    }
    return masses;
#endif
}

}  // namespace
