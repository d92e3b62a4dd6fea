// Products in float32 with weights in the blocks of a GGUF file, which are widened in the register.
#include "product_tiles.h"

namespace auxkern {
namespace AUXKERN_ISA {
namespace {

// A widened number is rounded once, as every reader of such files rounds it: integer times scale is exact.
template <int32_t KIND>
struct Widened {
    static constexpr bool EIGHTS = KIND == AUXKERN_PACKED_Q8_0_WIDENED, MINIMA = KIND == AUXKERN_PACKED_Q4_1_WIDENED;
    static constexpr int64_t VALUES = (EIGHTS ? 32 : 16) * PANEL, BYTES = VALUES + (MINIMA ? 4 : 2) * PANEL;
    static constexpr int64_t STEP = AUXKERN_BLOCK;  // k of a step
    static constexpr int ROWS = LANES == 16 ? 12 : LANES == 8 ? 6 : 3;

    // Sums of one panel would load a number of a row for each product.
    static constexpr int panels(int rows) {
        if (LANES == 16) return rows <= 4 ? 4 : 2;
        return LANES == 8 && rows == 1 ? 2 : 1;
    }

    // Four neighbouring k of each output: bytes of which only the last bits count.
    static vi four(const char *block, int step) {
        vi x;
        memcpy(&x, block + 4 * PANEL * (EIGHTS ? step : step % 4), sizeof x);
        return !EIGHTS && step >= 4 ? x >> 4 : x;
    }
    static vf integer(vi four, int i) {
        const vi q = four >> 8 * i & (EIGHTS ? 255 : 15);
        const int32_t zero = EIGHTS ? 128 : KIND == AUXKERN_PACKED_Q4_0_WIDENED ? 8 : 0;
        return __builtin_convertvector(zero ? q - zero : q, vf);
    }
    static vf halves(const char *p) { return F16::load(reinterpret_cast<const uint16_t *>(p)); }

    template <int R, int P>
    static void tile(const ProductTask &task, const Place &place) {
        constexpr int WIDTH = P * VECTORS;
        const int64_t K = task.product->K, size = K / AUXKERN_BLOCK * BYTES;
        const char *w = static_cast<const char *>(task.product->values) + place.panel * size;
        Rows<R> x(task.call->x + place.row * task.call->x_stride, 4 * task.call->x_stride);
        Ahead ahead = place.ahead;
        // Of whole blocks: 128 k at most.
        for (const Block run : Blocks{K, AUXKERN_BLOCK}) {
            vf sum[R][WIDTH];
            clear(sum);
            for (int64_t k = run.begin; k < run.end; k += AUXKERN_BLOCK, w += BYTES) {
                ahead.ask<int(P * (BYTES + 63) / 64)>();
                vf d[WIDTH], m[WIDTH];
                auto block = [&](int j) { return w + j / VECTORS * size + j % VECTORS * 4 * LANES; };
#pragma GCC unroll 8
                for (int j = 0; j < WIDTH; ++j) {
                    const char *scales = w + j / VECTORS * size + VALUES + j % VECTORS * 2 * LANES;
                    d[j] = halves(scales);
                    m[j] = MINIMA ? halves(scales + 2 * PANEL) : splat(0);
                }
                for (int step = 0; step < AUXKERN_BLOCK / 4; ++step) {
                    vi values[WIDTH];
#pragma GCC unroll 8
                    for (int j = 0; j < WIDTH; ++j) values[j] = four(block(j), step);
#pragma GCC unroll 4
                    for (int i = 0; i < 4; ++i) {
                        vf weight[WIDTH];
#pragma GCC unroll 8
                        for (int j = 0; j < WIDTH; ++j) {
                            weight[j] = integer(values[j], i) * d[j];
                            if (MINIMA) weight[j] += m[j];
                            weight[j] = kept<R>(weight[j]);
                        }
#pragma GCC unroll 12
                        for (int r = 0; r < R; ++r) {
                            const vf a = splat(x.template at<float>(r, i));
#pragma GCC unroll 8
                            for (int j = 0; j < WIDTH; ++j) sum[r][j] += a * weight[j];
                        }
                    }
                    x.advance(16);
                }
            }
            keep(sum, place.sums, run.begin == 0);
        }
    }
};

}  // namespace

void multiply_q8_0_widened(const ProductTask &task, int64_t begin, int64_t end, float *) {
    multiply<Widened<AUXKERN_PACKED_Q8_0_WIDENED>>(task, begin, end);
}
void multiply_q4_0_widened(const ProductTask &task, int64_t begin, int64_t end, float *) {
    multiply<Widened<AUXKERN_PACKED_Q4_0_WIDENED>>(task, begin, end);
}
void multiply_q4_1_widened(const ProductTask &task, int64_t begin, int64_t end, float *) {
    multiply<Widened<AUXKERN_PACKED_Q4_1_WIDENED>>(task, begin, end);
}

}  // namespace AUXKERN_ISA
}  // namespace auxkern
