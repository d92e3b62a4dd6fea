// Products of bytes with integer sums, exact, then scaled in float32.
//
// Built without contraction of products and sums, so that an output is the same to the last bit on every
// instruction set: sum over the runs of k of (float(integer sum) * row's scale) * weight's scale.
#include "integer_dots.h"
#include "product_tiles.h"

namespace auxkern {
namespace AUXKERN_ISA {
namespace {

constexpr float TINY = 0x1p-120f;  // 127 / max would overflow below; such numbers count as zeros

inline vi load_bytes(const int32_t *p) { return (vi)load(reinterpret_cast<const float *>(p)); }

struct Bytes {
    static constexpr int64_t STEP = 4;  // k of a step
    static constexpr int ROWS = LANES == 16 ? 12 : LANES == 8 ? 6 : 2;

    static constexpr int panels(int rows) {
        if (LANES == 16) return rows <= 2 ? 4 : 2;
        if (LANES == 8) return rows == 1 ? 4 : rows == 2 ? 2 : 1;
        return 1;
    }

    template <int R, int P>
    static void tile(const ProductTask &task, const Place &place) {
        constexpr int WIDTH = P * VECTORS;
        const auxkern_product &product = *task.product;
        const RowLayout &layout = task.layout;
        const int64_t fours = (product.K + 3) / 4, groups = groups_of(product), stride = layout.bytes / 4;
        const int32_t *w = static_cast<const int32_t *>(product.values) + place.panel * fours * PANEL;
        const float *w_scales = product.scales + place.panel * groups * PANEL;
        const char *row = task.prepared + place.row * layout.bytes;
        Rows<R> x(row, layout.bytes);
        const float *x_scales = reinterpret_cast<const float *>(row + layout.scales);
        const int32_t *starts = reinterpret_cast<const int32_t *>(row + layout.starts);
        Ahead ahead = place.ahead;
        for (int64_t run = 0, k = 0; run < layout.runs; ++run) {
            vi sum[R][WIDTH];
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r) {
                const vi start = vi{} + starts[r * stride + run];
#pragma GCC unroll 8
                for (int j = 0; j < WIDTH; ++j) sum[r][j] = start;
            }
            const int64_t end = smaller((run + 1) * layout.run + 3, product.K + 3) / 4;
            for (; k < end; ++k) {
                ahead.ask<P>();
                vi weight[WIDTH];
#pragma GCC unroll 8
                for (int j = 0; j < WIDTH; ++j)
                    weight[j] = (vi)kept<R>((vf)load_bytes(w + (j / VECTORS * fours + k) * PANEL + j % VECTORS * LANES));
#pragma GCC unroll 12
                for (int r = 0; r < R; ++r) {
                    const vi a = vi{} + x.template at<int32_t>(r);
#pragma GCC unroll 8
                    for (int j = 0; j < WIDTH; ++j) sum[r][j] = add_four(sum[r][j], weight[j], a);
                }
                x.advance(4);
            }
            const float *scales = w_scales + run * layout.run / product.group * PANEL;
#pragma GCC unroll 4
            for (int p = 0; p < P; ++p) __builtin_prefetch(scales + (PIECE_PANELS + p) * groups * PANEL, 0, 2);
            vf part[R][WIDTH];
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
                for (int j = 0; j < WIDTH; ++j) {
                    const vf exact = __builtin_convertvector(sum[r][j], vf) * x_scales[r * stride + run];
                    part[r][j] = exact * load(scales + j / VECTORS * groups * PANEL + j % VECTORS * LANES);
                }
            keep(part, place.sums, run == 0);
        }
    }
};

inline int32_t largest_lane(vi x) {
#if AUXKERN_LANES == 16
    return _mm512_reduce_max_epi32((__m512i)x);
#else
    int32_t most = x[0];
    for (int i = 1; i < LANES; ++i) most = x[i] > most ? x[i] : most;
    return most;
#endif
}

inline int32_t sum_of_lanes(vi x) {
#if AUXKERN_LANES == 16
    return _mm512_reduce_add_epi32((__m512i)x);
#else
    int32_t sum = 0;
    for (int i = 0; i < LANES; ++i) sum += x[i];
    return sum;
#endif
}

// The largest |x| of `count` numbers; NaN if one is not finite. As integers, the bits of NaN are the largest.
inline float largest(const float *x, int64_t count) {
    vi best = {};
    int64_t k = 0;
    for (; k + LANES <= count; k += LANES) {
        const vi bits = (vi)load(x + k) & 0x7fffffff;
        best = bits > best ? bits : best;
    }
    if (k < count) {
        const vi bits = (vi)load_part(x + k, count - k) & 0x7fffffff;
        best = bits > best ? bits : best;
    }
    int32_t most = largest_lane(best);
    if (most >= 0x7f800000) most = 0x7fc00000;
    float result;
    memcpy(&result, &most, 4);
    return result;
}

// Rounds to nearest, ties to even, a number of at most 127 and a little.
inline vi rounded(vf x) { return (vi)(x + 12582912.0f) - (vi)splat(12582912.0f); }

typedef int8_t vb __attribute__((vector_size(AUXKERN_LANES)));

inline vb narrow(vi x) {
#if AUXKERN_LANES == 16
    return (vb)_mm512_cvtepi32_epi8((__m512i)x);
#else
    return __builtin_convertvector(x, vb);
#endif
}

// Bytes of x * inverse; returns their sum.
inline int32_t quantise(const float *x, int64_t count, float inverse, int8_t *to) {
    vi sum = {};
    int64_t k = 0;
    for (; k + LANES <= count; k += LANES) {
        const vi q = rounded(load(x + k) * inverse);
        const vb bytes = narrow(q);
        memcpy(to + k, &bytes, sizeof bytes);
        sum += q;
    }
    if (k < count) {
        const vi q = rounded(load_part(x + k, count - k) * inverse);
        const vb bytes = narrow(q);
        memcpy(to + k, &bytes, size_t(count - k));
        sum += q;
    }
    return sum_of_lanes(sum);
}

}  // namespace

void prepare_i8(const ProductTask &task, int64_t begin, int64_t end, float *) {
    const int64_t K = task.product->K;
    const RowLayout &layout = task.layout;
    const int64_t shared = task.call->row_group > 0 ? task.call->row_group : K;  // k that have one scale
    for (int64_t row = begin; row < end; ++row) {
        const float *x = task.call->x + row * task.call->x_stride;
        char *to = task.prepared + row * layout.bytes;
        int8_t *values = reinterpret_cast<int8_t *>(to);
        float *scales = reinterpret_cast<float *>(to + layout.scales);
        int32_t *starts = reinterpret_cast<int32_t *>(to + layout.starts);
        float scale = 0, inverse = 0;
        for (int64_t run = 0, k = 0; run < layout.runs; ++run, k += layout.run) {
            if (k % shared == 0) {
                const float max = largest(x + k, smaller(shared, K - k));
                scale = max < TINY ? 0 : max / 127;
                inverse = max < TINY || max != max ? 0 : 127 / max;
            }
            const int64_t count = smaller(layout.run, K - k);
            scales[run] = scale;
            if (scale == scale) {
                starts[run] = -128 * quantise(x + k, count, inverse, values + k);
            } else {
                memset(values + k, 0, size_t(count));
                starts[run] = 0;
            }
        }
        for (int64_t k = K; k % 4; ++k) values[k] = 0;
    }
}

void multiply_i8(const ProductTask &task, int64_t begin, int64_t end, float *) { multiply<Bytes>(task, begin, end); }

}  // namespace AUXKERN_ISA
}  // namespace auxkern
