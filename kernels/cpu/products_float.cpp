// Products in float32 with weights of float32, float16 or bfloat16, which are widened in the register.
#include "product_tiles.h"

namespace auxkern {
namespace AUXKERN_ISA {
namespace {

// What two steps of k hold of one vector of outputs, and the one step that is left of an odd K. Values are
// loaded again for the second step where keeping them would take registers that sums need.
struct Kept32 {
    typedef float scalar;
    static constexpr int STEPS = 1;  // of k in a lane
    static vf even(const float *w) { return load(w); }
    static vf odd(const float *w) { return load(w + PANEL); }
};

struct Kept16 {
    typedef uint16_t scalar;
    static constexpr int STEPS = 1;
    static vf even(const uint16_t *w) { return F16::load(w); }
    static vf odd(const uint16_t *w) { return F16::load(w + PANEL); }
};

struct KeptPairs {  // both steps in each lane
    typedef uint16_t scalar;
    static constexpr int STEPS = 2;
    static vi bits(const uint16_t *w) {
        vi both;
        memcpy(&both, w, sizeof both);
        return both;
    }
    static vf even(const uint16_t *w) { return (vf)(bits(w) << 16); }
    static vf odd(const uint16_t *w) { return (vf)(bits(w) & int32_t(0xffff0000)); }
};

template <class T>
struct Floats {
    static constexpr int64_t STEP = 2;  // k of a step
    static constexpr int ROWS = LANES == 16 ? 12 : LANES == 8 ? 6 : 3;
    static constexpr int64_t VECTOR = T::STEPS * LANES;  // values of a vector

    // So many that their sums do not wait for each other, and stay in registers.
    static constexpr int panels(int rows) {
        if (LANES == 16) return rows <= 6 ? 4 : 2;
        if (LANES == 8) return rows == 1 ? 4 : rows == 2 ? 2 : 1;
        return 1;
    }

    template <int R, int WIDTH>
    static inline void add(vf (&sum)[R][WIDTH], const vf (&weight)[WIDTH], const Rows<R> &x, int step) {
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            const vf a = splat(x.template at<float>(r, step));
#pragma GCC unroll 8
            for (int j = 0; j < WIDTH; ++j) sum[r][j] += a * weight[j];
        }
    }

    template <int R, int P>
    static void tile(const ProductTask &task, const Place &place) {
        constexpr int WIDTH = P * VECTORS;
        const int64_t K = task.product->K;
        const int64_t size = panel_bytes(*task.product) / int64_t(sizeof(typename T::scalar));
        const auto *w = static_cast<const typename T::scalar *>(task.product->values) + place.panel * size;
        Rows<R> x(task.call->x + place.row * task.call->x_stride, 4 * task.call->x_stride);
        Ahead ahead = place.ahead;
        for (const Block block : Blocks{K, 2}) {
            vf sum[R][WIDTH], weight[WIDTH];
            clear(sum);
            int64_t k = block.begin;
            for (; k + 2 <= block.end; k += 2) {
                ahead.ask<P * 2 * sizeof(typename T::scalar) / 4>();
#pragma GCC unroll 8
                for (int j = 0; j < WIDTH; ++j)
                    weight[j] = kept<R>(T::even(w + j / VECTORS * size + k * PANEL + j % VECTORS * VECTOR));
                add(sum, weight, x, 0);
#pragma GCC unroll 8
                for (int j = 0; j < WIDTH; ++j)
                    weight[j] = kept<R>(T::odd(w + j / VECTORS * size + k * PANEL + j % VECTORS * VECTOR));
                add(sum, weight, x, 1);
                x.advance(8);
            }
            if (k < block.end) {
#pragma GCC unroll 8
                for (int j = 0; j < WIDTH; ++j)
                    weight[j] = kept<R>(T::even(w + j / VECTORS * size + k * PANEL + j % VECTORS * VECTOR));
                add(sum, weight, x, 0);
            }
            keep(sum, place.sums, block.begin == 0);
        }
    }
};

}  // namespace

void multiply_f32(const ProductTask &task, int64_t begin, int64_t end, float *) { multiply<Floats<Kept32>>(task, begin, end); }
void multiply_f16(const ProductTask &task, int64_t begin, int64_t end, float *) { multiply<Floats<Kept16>>(task, begin, end); }
void multiply_bf16(const ProductTask &task, int64_t begin, int64_t end, float *) { multiply<Floats<KeptPairs>>(task, begin, end); }

}  // namespace AUXKERN_ISA
}  // namespace auxkern
