// Products in float32 with weights of float32, float16 or bfloat16, which are widened in the register.
#include "product_tiles.h"

namespace auxkern {
namespace AUXKERN_ISA {
namespace {

constexpr int64_t BLOCK = 256;  // of k: sums of more terms lose places, so those of blocks are added up

template <class T>
struct Floats {
    static constexpr int ROWS = LANES == 16 ? 12 : LANES == 8 ? 6 : 3;

    // So many that their sums do not wait for each other, and stay in registers.
    static constexpr int panels(int rows) {
        if (LANES == 16) return rows <= 6 ? 4 : 2;
        if (LANES == 8) return rows == 1 ? 4 : rows <= 3 ? 2 : 1;
        return 1;
    }

    template <int R, int P>
    static void tile(const ProductTask &task, const Place &place) {
        constexpr int WIDTH = P * VECTORS;
        const int64_t K = task.product->K, stride = task.call->x_stride;
        const auto *w = static_cast<const typename T::scalar *>(task.product->values) + place.panel * K * PANEL;
        const float *x = task.call->x + place.row * stride;
        vf total[R][WIDTH] = {};
        for (int64_t begin = 0; begin < K; begin += BLOCK) {
            vf sum[R][WIDTH];
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
                for (int j = 0; j < WIDTH; ++j) sum[r][j] = splat(0);
            const int64_t end = smaller(begin + BLOCK, K);
            for (int64_t k = begin; k < end; ++k) {
                vf weight[WIDTH];
#pragma GCC unroll 8
                for (int j = 0; j < WIDTH; ++j)
                    weight[j] = in_register(T::load(w + (j / VECTORS * K + k) * PANEL + j % VECTORS * LANES));
#pragma GCC unroll 12
                for (int r = 0; r < R; ++r) {
                    const vf a = splat(x[r * stride + k]);
#pragma GCC unroll 8
                    for (int j = 0; j < WIDTH; ++j) sum[r][j] += a * weight[j];
                }
            }
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
                for (int j = 0; j < WIDTH; ++j) total[r][j] += sum[r][j];
        }
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int j = 0; j < WIDTH; ++j) store(place.sums + r * SUMS + j * LANES, total[r][j]);
    }
};

}  // namespace

void multiply_f32(const ProductTask &task, int64_t begin, int64_t end, float *) { multiply<Floats<F32>>(task, begin, end); }
void multiply_f16(const ProductTask &task, int64_t begin, int64_t end, float *) { multiply<Floats<F16>>(task, begin, end); }
void multiply_bf16(const ProductTask &task, int64_t begin, int64_t end, float *) { multiply<Floats<BF16>>(task, begin, end); }

}  // namespace AUXKERN_ISA
}  // namespace auxkern
