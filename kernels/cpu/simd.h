// Vectors of float32 for one instruction set, and the few operations that the kernels need.
//
// Built once per instruction set with AUXKERN_ISA (a namespace) and AUXKERN_LANES defined. The
// compiler's vector types carry most of it; intrinsics appear where it would miss an instruction.
// Everything here is static: code built for AVX-512 must never be merged by the linker with the
// same function built for a plain CPU. For the same reason no C++ standard header with inline
// functions may be included by the kernels.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = AUXKERN_LANES;

typedef float vf __attribute__((vector_size(4 * AUXKERN_LANES)));
typedef int32_t vi __attribute__((vector_size(4 * AUXKERN_LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * AUXKERN_LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * AUXKERN_LANES)));

// Minus zero, which changes no number: plus zero would, -0, and be an instruction of its own.
inline vf splat(float x) { return x - vf{}; }
inline vf load(const float *p) { vf x; memcpy(&x, p, sizeof x); return x; }
inline void store(float *p, vf x) { memcpy(p, &x, sizeof x); }

// x, loaded once: compilers would rather load it again for each use, and loads are what runs out.
inline vf in_register(vf x) {
#if AUXKERN_LANES == 16
    __asm__("" : "+v"(x));
#elif AUXKERN_LANES == 8
    __asm__("" : "+x"(x));
#endif
    return x;
}

// The second operand where either is NaN, as the x86 instruction does.
inline vf vmax(vf a, vf b) {
#if AUXKERN_LANES == 16
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif AUXKERN_LANES == 8
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

inline vf choose(vi mask, vf yes, vf no) { return (vf)(((vi)yes & mask) | ((vi)no & ~mask)); }

inline bool any(vi mask) {
#if AUXKERN_LANES == 16
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif AUXKERN_LANES == 8
    return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
    int32_t lanes[LANES], found = 0;
    memcpy(lanes, &mask, sizeof mask);
    for (int i = 0; i < LANES; ++i) found |= lanes[i];
    return found != 0;
#endif
}

inline float reduce_max(vf x) {
    float lanes[LANES], best = -INFINITY;
    memcpy(lanes, &x, sizeof x);
    for (int i = 0; i < LANES; ++i) best = lanes[i] > best ? lanes[i] : best;
    return best;
}

inline double reduce_sum(vf x) {
    float lanes[LANES];
    memcpy(lanes, &x, sizeof x);
    double sum = 0;
    for (int i = 0; i < LANES; ++i) sum += lanes[i];
    return sum;
}

// to[i] = sum of the lanes of x[i], each in the same order.
template <int COUNT>
inline void reduce_each(const vf *x, float *to) {
#if AUXKERN_LANES == 16
    static_assert(COUNT == 8, "eight vectors end in eight lanes");
    __m512 four[4], two[2];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {  // halves of two vectors, then quarters of four, added
        const __m512 a = (__m512)x[2 * i], b = (__m512)x[2 * i + 1];
        four[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
        two[i] = _mm512_add_ps(_mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0x88),
                               _mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0xdd));
    const __m512 one = _mm512_add_ps(_mm512_unpacklo_ps(two[0], two[1]), _mm512_unpackhi_ps(two[0], two[1]));
    const __m512 sums = _mm512_add_ps(one, _mm512_permute_ps(one, 0x4e));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm256_storeu_ps(to, _mm512_castps512_ps256(_mm512_permutexvar_ps(order, sums)));
#elif AUXKERN_LANES == 8
    static_assert(COUNT == 4, "four vectors end in four lanes");
    const __m256 low = _mm256_hadd_ps((__m256)x[0], (__m256)x[1]), high = _mm256_hadd_ps((__m256)x[2], (__m256)x[3]);
    const __m256 both = _mm256_hadd_ps(low, high);
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)));
#else
    for (int i = 0; i < COUNT; ++i) {
        float lanes[LANES];
        memcpy(lanes, x + i, sizeof lanes);
        to[i] = 0;
        for (int j = 0; j < LANES; ++j) to[i] += lanes[j];
    }
#endif
}

// ---- float16 and bfloat16 ------------------------------------------------------------------

inline float half_to_float(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000u) << 16;
    const uint32_t exponent = (h >> 10) & 31, mantissa = h & 0x3ffu;
    uint32_t bits;
    if (exponent == 31) bits = sign | 0x7f800000u | (mantissa << 13);
    else if (exponent) bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
    else {
        const float tiny = float(mantissa) * 5.9604644775390625e-8f;  // 2^-24
        memcpy(&bits, &tiny, 4);
        bits |= sign;
    }
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

// Rounds to nearest, ties to even.
inline uint16_t float_to_half(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return uint16_t(sign | 0x7e00u);
    if (bits >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
    if (bits < 0x38800000u) {  // below 2^-14: the sum with 0.5 rounds at the half's last place
        float magnitude;
        memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        uint32_t rounded;
        memcpy(&rounded, &magnitude, 4);
        return uint16_t(sign | (rounded - 0x3f000000u));
    }
    bits += 0xc8000fffu + ((bits >> 13) & 1);
    return uint16_t(sign | (bits >> 13));
}

struct F32 {
    typedef float scalar;
    static vf load(const float *p) { return ::load(p); }
    static void store(float *p, vf x) { ::store(p, x); }
    static void store_scalar(float *p, float x) { *p = x; }
    static float load_scalar(const float *p) { return *p; }
};

// The bits of two half vectors as those of one whole vector.
template <class H>
inline vf joined(H low, H high) {
#if AUXKERN_LANES == 16
    return (vf)_mm512_inserti64x4(_mm512_castsi256_si512((__m256i)low), (__m256i)high, 1);
#elif AUXKERN_LANES == 8
    return (vf)_mm256_set_m128i((__m128i)high, (__m128i)low);
#else
    vf bits;
    memcpy(&bits, &low, sizeof low);
    memcpy(reinterpret_cast<char *>(&bits) + sizeof low, &high, sizeof high);
    return bits;
#endif
}

struct F16 {
    typedef uint16_t scalar;
    static vf load(const uint16_t *p) {
#if AUXKERN_LANES == 16
        return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif AUXKERN_LANES == 8
        return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
        float lanes[LANES];
        for (int i = 0; i < LANES; ++i) lanes[i] = half_to_float(p[i]);
        return ::load(lanes);
#endif
    }
    static vh narrow(vf x) {
#if AUXKERN_LANES == 16
        return (vh)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif AUXKERN_LANES == 8
        return (vh)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
        vh half;
        for (int i = 0; i < LANES; ++i) half[i] = float_to_half(x[i]);
        return half;
#endif
    }
    static void store(uint16_t *p, vf x) {
        const vh half = narrow(x);
        memcpy(p, &half, sizeof half);
    }
    static vf pair(vf low, vf high) { return joined(narrow(low), narrow(high)); }
    static void store_scalar(uint16_t *p, float x) { *p = float_to_half(x); }
    static float load_scalar(const uint16_t *p) { return half_to_float(*p); }
};

struct BF16 {
    typedef uint16_t scalar;
    static vf load(const uint16_t *p) {
        vh half;
        memcpy(&half, p, sizeof half);
        return (vf)(__builtin_convertvector(half, vu) << 16);
    }
    // Rounds to nearest, ties to even, into the upper half of each lane.
    static vu rounded(vf x) {
        const vu bits = (vu)x;
        const vu is_nan = (vu)(x != x);
        return ((bits + 0x7fffu + ((bits >> 16) & 1u)) & ~is_nan) | ((bits | 0x400000u) & is_nan);
    }
    static vh narrow(vf x) { return __builtin_convertvector(rounded(x) >> 16, vh); }
    static void store(uint16_t *p, vf x) {
        const vh half = narrow(x);
        memcpy(p, &half, sizeof half);
    }
    static vf pair(vf low, vf high) { return joined(narrow(low), narrow(high)); }
    static void store_scalar(uint16_t *p, float x) { *p = uint16_t(rounded(splat(x))[0] >> 16); }
    static float load_scalar(const uint16_t *p) {
        const uint32_t bits = uint32_t(*p) << 16;
        float x;
        memcpy(&x, &bits, 4);
        return x;
    }
};

// ---- exp and tanh --------------------------------------------------------------------------

// exp(x) for x <= 88, within 2 ulp, subnormal results included; exp(-inf) = 0, exp(NaN) = NaN.
inline vf vexp(vf x) {
    x = vmax(splat(-110.0f), x);           // this order keeps NaN
    const vf magic = splat(12582912.0f);   // 1.5 * 2^23: adding it rounds to an integer
    const vf shifted = x * 1.44269504088896341f + magic;
    const vf n = shifted - magic;
    const vi power = (vi)shifted - (vi)magic;
    vf r = x - n * 0.693359375f;           // ln 2 in two parts (Cody & Waite 1980)
    r = r + n * 2.12194440e-4f;
    // exp(r) = 1 + r + r^2 q(r) on |r| <= ln(2)/2, q fitted for the least relative error, 3e-9.
    vf q = splat(1.381459878757596e-3f);
    q = q * r + 8.368716575205326e-3f;
    q = q * r + 4.166838899254799e-2f;
    q = q * r + 1.666652113199234e-1f;
    q = q * r + 4.999999403953552e-1f;
    const vf p = q * (r * r) + r + 1.0f;
#if AUXKERN_LANES == 16
    (void)power;
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    const vi half = power >> 1;            // in two steps: 2^power alone would lose subnormals
    return p * (vf)((half + 127) << 23) * (vf)((power - half + 127) << 23);
#endif
}

inline vf vabs(vf x) { return (vf)((vu)x & 0x7fffffffu); }

// tanh(x), within 3 ulp: a polynomial (Cephes) near 0, the exponential elsewhere.
inline vf vtanh(vf x) {
    const vf magnitude = vabs(x), square = x * x;
    vf p = splat(-5.70498872745e-3f);
    p = p * square + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    const vf near_zero = p * square * x + x;
    const vf e = vexp(magnitude * -2.0f);
    const vf far = (1.0f - e) / (1.0f + e);
    const vf signed_far = (vf)((vu)far | ((vu)x & 0x80000000u));
    const vi small = magnitude < 0.625f;
    return (vf)(((vi)near_zero & small) | ((vi)signed_far & ~small));
}

// 1 - tanh(x)^2 without the cancellation of that difference for large |x|.
inline vf vtanh_slope(vf x) {
    const vf e = vexp(vabs(x) * -2.0f);
    const vf sum = 1.0f + e;
    return 4.0f * e / (sum * sum);
}

}  // namespace
