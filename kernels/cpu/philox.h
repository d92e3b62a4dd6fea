// Philox4x32-10 (Salmon, Moraes, Dror & Shaw 2011), LANES counters at a time. As simd.h, built once per
// instruction set.
#pragma once

#include "simd.h"

namespace {

constexpr uint32_t PHILOX_M0 = 0xD2511F53u, PHILOX_M1 = 0xCD9E8D57u;
constexpr uint32_t PHILOX_W0 = 0x9E3779B9u, PHILOX_W1 = 0xBB67AE85u;

struct Product {
    vu high, low;
};

inline Product wide_product(vu x, uint32_t factor) {
#if AUXKERN_LANES == 16
    const __m512i m = _mm512_set1_epi32(int32_t(factor));
    const __m512i even = _mm512_mul_epu32((__m512i)x, m);
    const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)x, 32), m);
    return {(vu)_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd),
            (vu)_mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32))};
#elif AUXKERN_LANES == 8
    const __m256i m = _mm256_set1_epi32(int32_t(factor));
    const __m256i even = _mm256_mul_epu32((__m256i)x, m);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)x, 32), m);
    return {(vu)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA),
            (vu)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA)};
#else
    Product p;
    for (int i = 0; i < LANES; ++i) {
        const uint64_t wide = uint64_t(factor) * x[i];
        p.high[i] = uint32_t(wide >> 32);
        p.low[i] = uint32_t(wide);
    }
    return p;
#endif
}

// The four words of each lane's counter, in place.
inline void philox(vu c[4], uint32_t k0, uint32_t k1) {
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
        const Product a = wide_product(c[0], PHILOX_M0), b = wide_product(c[2], PHILOX_M1);
        c[0] = b.high ^ c[1] ^ k0;
        c[1] = b.low;
        c[2] = a.high ^ c[3] ^ k1;
        c[3] = a.low;
        k0 += PHILOX_W0;
        k1 += PHILOX_W1;
    }
}

// The bits of ids [first, first + 4 * LANES), in their order: id's are word id % 4 of counter
// (id / 4, 0, position). `first` is a multiple of 4 * LANES.
inline void random_bits(vu bits[4], uint64_t seed, uint64_t position, int64_t first) {
    // Lane 4 g + k works for counter first / 4 + k * (LANES / 4) + g, so that transposing each group
    // of four lanes leaves the words in the order of the ids.
    constexpr int GROUPS = LANES / 4;
    vu lane;
    for (int i = 0; i < LANES; ++i) lane[i] = uint32_t(i % 4 * GROUPS + i / 4);
    vu c[4] = {lane + uint32_t(first / 4), vu{}, vu{} + uint32_t(position), vu{} + uint32_t(position >> 32)};
    philox(c, uint32_t(seed), uint32_t(seed >> 32));
#if AUXKERN_LANES == 16
    const __m512i a = _mm512_unpacklo_epi32((__m512i)c[0], (__m512i)c[1]), b = _mm512_unpackhi_epi32((__m512i)c[0], (__m512i)c[1]);
    const __m512i d = _mm512_unpacklo_epi32((__m512i)c[2], (__m512i)c[3]), e = _mm512_unpackhi_epi32((__m512i)c[2], (__m512i)c[3]);
    bits[0] = (vu)_mm512_unpacklo_epi64(a, d);
    bits[1] = (vu)_mm512_unpackhi_epi64(a, d);
    bits[2] = (vu)_mm512_unpacklo_epi64(b, e);
    bits[3] = (vu)_mm512_unpackhi_epi64(b, e);
#elif AUXKERN_LANES == 8
    const __m256i a = _mm256_unpacklo_epi32((__m256i)c[0], (__m256i)c[1]), b = _mm256_unpackhi_epi32((__m256i)c[0], (__m256i)c[1]);
    const __m256i d = _mm256_unpacklo_epi32((__m256i)c[2], (__m256i)c[3]), e = _mm256_unpackhi_epi32((__m256i)c[2], (__m256i)c[3]);
    bits[0] = (vu)_mm256_unpacklo_epi64(a, d);
    bits[1] = (vu)_mm256_unpackhi_epi64(a, d);
    bits[2] = (vu)_mm256_unpacklo_epi64(b, e);
    bits[3] = (vu)_mm256_unpackhi_epi64(b, e);
#else
    for (int k = 0; k < 4; ++k)
        for (int word = 0; word < 4; ++word) bits[k][word] = c[word][k];
#endif
}

// The bits of any ids.
inline vu random_bits(vu ids, uint64_t seed, uint64_t position) {
    vu c[4] = {ids >> 2, vu{}, vu{} + uint32_t(position), vu{} + uint32_t(position >> 32)};
    philox(c, uint32_t(seed), uint32_t(seed >> 32));
    const vi word = (vi)(ids & 3u);
    vu bits = c[0];
    for (int k = 1; k < 4; ++k) bits = (vu)choose((vi)(word == k), (vf)c[k], (vf)bits);
    return bits;
}

}  // namespace
