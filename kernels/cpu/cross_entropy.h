// What the dispatcher hands to the kernels of one instruction set.
#pragma once

#include "auxkern.h"

namespace auxkern {

struct ForwardTask {
    const auxkern_term *terms;
    int32_t n_terms;
    const int64_t *target;
    int64_t N, V, ignore_index;
    float *nll, *row_max, *log_sum;
    float *smooth;     // or null
    int64_t *argmax;   // or null
    float *term_nll;   // (I, N) or null
};

struct BackwardTask {
    const auxkern_term *terms;
    int32_t n_terms;
    const int64_t *target;
    int64_t N, V;
    const float *row_max, *exp_coefficient, *constant, *target_gradient;
    void *const *gradients;
    bool stream;  // the gradients are larger than the caches: write around them
};

#define AUXKERN_DECLARE_KERNELS(isa)                                             \
    namespace isa {                                                              \
    void cross_entropy_forward(const ForwardTask &, int64_t begin, int64_t end); \
    void cross_entropy_backward(const BackwardTask &, int64_t begin, int64_t end); \
    }

AUXKERN_DECLARE_KERNELS(generic)
#if defined(__x86_64__)
AUXKERN_DECLARE_KERNELS(avx2)
AUXKERN_DECLARE_KERNELS(avx512)
#endif

}  // namespace auxkern
