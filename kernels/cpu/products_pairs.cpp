// Products of bfloat16 numbers with float32 sums: pairs of neighbouring k at once, where the CPU can.
#include "product_tiles.h"

namespace auxkern {
namespace AUXKERN_ISA {
namespace {

// sum + both products of a pair in each lane.
inline vf add_pair(vf sum, vi weight, vi x) {
#if defined(__AVX512BF16__)
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weight, (__m512bh)x);
#else
    const vi upper = vi{} + int32_t(0xffff0000);
    sum += (vf)(x << 16) * (vf)(weight << 16);
    return sum + (vf)(x & upper) * (vf)(weight & upper);
#endif
}

inline vi load_pairs(const int32_t *p) { return (vi)load(reinterpret_cast<const float *>(p)); }

struct Pairs {
    static constexpr int64_t STEP = 2;  // k of a step
    static constexpr int ROWS = LANES == 16 ? 12 : LANES == 8 ? 6 : 2;

    static constexpr int panels(int rows) {
        if (LANES == 16) return rows <= 6 ? 4 : 2;
        if (LANES == 8) return rows == 1 ? 4 : rows == 2 ? 2 : 1;
        return 1;
    }

    template <int R, int P>
    static void tile(const ProductTask &task, const Place &place) {
        constexpr int WIDTH = P * VECTORS;
        const int64_t pairs = (task.product->K + 1) / 2;
        const int32_t *w = static_cast<const int32_t *>(task.product->values) + place.panel * pairs * PANEL;
        Rows<R> x(task.prepared + place.row * task.layout.bytes, task.layout.bytes);
        Ahead ahead = place.ahead;
        for (const Block block : Blocks{2 * pairs, 2}) {
            const int64_t begin = block.begin / 2, end = block.end / 2;
            vf sum[R][WIDTH];
            clear(sum);
            for (int64_t k = begin; k < end; ++k) {
                ahead.ask<P>();
                vi weight[WIDTH];
#pragma GCC unroll 8
                for (int j = 0; j < WIDTH; ++j)
                    weight[j] = (vi)kept<R>((vf)load_pairs(w + (j / VECTORS * pairs + k) * PANEL + j % VECTORS * LANES));
#pragma GCC unroll 12
                for (int r = 0; r < R; ++r) {
                    const vi a = vi{} + x.template at<int32_t>(r);
#pragma GCC unroll 8
                    for (int j = 0; j < WIDTH; ++j) sum[r][j] = add_pair(sum[r][j], weight[j], a);
                }
                x.advance(4);
            }
            keep(sum, place.sums, begin == 0);
        }
    }
};

}  // namespace

void prepare_pairs(const ProductTask &task, int64_t begin, int64_t end, float *) {
    const int64_t K = task.product->K;
    for (int64_t row = begin; row < end; ++row) {
        const float *x = task.call->x + row * task.call->x_stride;
        uint16_t *to = reinterpret_cast<uint16_t *>(task.prepared + row * task.layout.bytes);
        int64_t k = 0;
        for (; k + LANES <= K; k += LANES) BF16::store(to + k, load(x + k));
        for (; k < K; ++k) BF16::store_scalar(to + k, x[k]);
        if (K % 2) to[K] = 0;
    }
}

void multiply_pairs(const ProductTask &task, int64_t begin, int64_t end, float *) { multiply<Pairs>(task, begin, end); }

}  // namespace AUXKERN_ISA
}  // namespace auxkern
