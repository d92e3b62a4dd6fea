// What the dispatcher hands to the kernels of one instruction set.
#pragma once

#include "auxkern.h"

namespace auxkern {

constexpr int64_t TILE = 1024;  // columns: 4 KiB of float32, two of them leave room in the smallest L1

// Floats of scratch memory that a thread needs for a forward call that also makes the gradient.
static inline int64_t scratch_size(int64_t V) {
    const int64_t tiles = (V + TILE - 1) / TILE;
    return tiles * TILE + tiles;
}

struct GradientTask {
    const auxkern_term *terms;
    int32_t n_terms;
    int64_t V;
    void *const *gradients;
    bool stream;  // the gradients are larger than the caches: write around them
};

struct ForwardTask {
    const auxkern_term *terms;
    int32_t n_terms;
    const int64_t *target;
    int64_t N, V, ignore_index;
    float *nll, *row_max, *log_sum;
    float *smooth;     // or null
    int64_t *argmax;   // or null
    float *term_nll;   // (I, N) or null
    const auxkern_gradient *gradient;  // or null
    GradientTask write;                // used with gradient
};

struct BackwardTask {
    const int64_t *target;
    int64_t N;
    const float *row_max, *exp_coefficient, *constant, *target_gradient;
    GradientTask write;
};

#define AUXKERN_DECLARE_KERNELS(isa)                                                             \
    namespace isa {                                                                              \
    void cross_entropy_forward(const ForwardTask &, int64_t begin, int64_t end, float *scratch);  \
    void cross_entropy_backward(const BackwardTask &, int64_t begin, int64_t end, float *scratch); \
    }

AUXKERN_DECLARE_KERNELS(generic)
#if defined(__x86_64__)
AUXKERN_DECLARE_KERNELS(avx2)
AUXKERN_DECLARE_KERNELS(avx512)
#endif

}  // namespace auxkern
