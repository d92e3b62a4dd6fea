/* auxkern: the C interface of the native kernels. Plain C, no torch.
 *
 * Shapes: N rows, V vocabulary, I terms. All sizes and strides count elements, not bytes.
 * Functions return a status; nothing is written when it is not AUXKERN_OK.
 */
#ifndef AUXKERN_H
#define AUXKERN_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define AUXKERN_ABI_VERSION 1
#define AUXKERN_MAX_TERMS 8

#if defined(_WIN32)
#define AUXKERN_EXPORT __declspec(dllexport)
#else
#define AUXKERN_EXPORT __attribute__((visibility("default")))
#endif

enum auxkern_status {
    AUXKERN_OK = 0,
    AUXKERN_BAD_ARGUMENT = 1,    /* a size, count or dtype out of range, or a null pointer */
    AUXKERN_UNSUPPORTED_ISA = 2, /* the instruction set asked for is not in this CPU or build */
    AUXKERN_OUT_OF_MEMORY = 3,   /* no scratch memory, V floats per thread */
};

enum auxkern_dtype { AUXKERN_F32 = 0, AUXKERN_F16 = 1, AUXKERN_BF16 = 2 };

enum auxkern_isa {
    AUXKERN_ISA_BEST = 0,
    AUXKERN_ISA_GENERIC = 1,
    AUXKERN_ISA_AVX2 = 2,   /* with FMA and F16C */
    AUXKERN_ISA_AVX512 = 3, /* F, BW, DQ, VL */
};

/* One term: scale * softcap(values). Row n starts at
 * values + (n / inner) * stride_outer + (n % inner) * stride_inner. */
typedef struct {
    const void *values;
    int64_t width; /* ids per row, at least V */
    int64_t inner; /* at least 1 */
    int64_t stride_outer;
    int64_t stride_inner;
    int64_t stride_column;
    int32_t dtype;
    float scale;
    float softcap; /* 0: none */
} auxkern_term;

/* Runs body(context) on `threads` threads and returns when all are done: the signature of
 * GOMP_parallel, so that the caller's own OpenMP pool can be lent to the kernels. */
typedef void (*auxkern_parallel)(void (*body)(void *), void *context, unsigned threads, unsigned flags);

typedef struct {
    int32_t threads;           /* at least 1 */
    int32_t isa;               /* auxkern_isa */
    auxkern_parallel parallel; /* NULL: threads are started for the call and joined */
} auxkern_execution;

/* The gradient that a forward call makes on the way, while a row's logits are still in the cache:
 * of sum_n row_weight[n] * ((1 - label_smoothing) nll[n] + label_smoothing smooth[n] + z_loss lse[n]^2). */
typedef struct {
    const float *row_weight; /* (N,) */
    float label_smoothing;
    float z_loss;
    void *const *gradients; /* n_terms pointers to contiguous (N, width) of the term's dtype, or NULL;
                             * contiguous values may be replaced by their own gradient */
} auxkern_gradient;

AUXKERN_EXPORT int32_t auxkern_abi_version(void);

/* 1 if this CPU and build have the instruction set. */
AUXKERN_EXPORT int32_t auxkern_has_isa(int32_t isa);

/* What AUXKERN_ISA_BEST means on this CPU. */
AUXKERN_EXPORT int32_t auxkern_best_isa(void);

/* Per row: nll = lse - z[y], row_max = max z, log_sum = log sum exp(z - row_max) and, unless NULL,
 * smooth = mean (lse - z), argmax (lowest id among equals), term_nll (I, N): the target's nll
 * under each term alone. Rows with y == ignore_index get 0 (argmax -1) and are not read; rows with
 * y outside [0, V) get NaN in nll and row_max. */
AUXKERN_EXPORT int32_t auxkern_cross_entropy_forward(
    const auxkern_term *terms, int32_t n_terms,
    const int64_t *target, /* (N,) */
    int64_t N, int64_t V, int64_t ignore_index,
    float *nll,       /* (N,) */
    float *row_max,   /* (N,) */
    float *log_sum,   /* (N,) */
    float *smooth,    /* (N,) or NULL */
    int64_t *argmax,  /* (N,) or NULL */
    float *term_nll,  /* (I, N) or NULL */
    const auxkern_gradient *gradient, /* or NULL */
    const auxkern_execution *execution);

/* dz[n, v] = exp_coefficient[n] * exp(z[n, v] - row_max[n]) - constant[n], target_gradient[n] at
 * v = y, 0 for v >= V; gradients[i] = dz * scale * softcap'. Rows whose three coefficients are 0
 * are set to 0 and not read. */
AUXKERN_EXPORT int32_t auxkern_cross_entropy_backward(
    const auxkern_term *terms, int32_t n_terms,
    const int64_t *target, /* (N,) */
    int64_t N, int64_t V,
    const float *row_max,         /* (N,) */
    const float *exp_coefficient, /* (N,) */
    const float *constant,        /* (N,) */
    const float *target_gradient, /* (N,) */
    void *const *gradients, /* n_terms pointers to contiguous (N, width) of the term's dtype, or NULL */
    const auxkern_execution *execution);

#ifdef __cplusplus
}
#endif
#endif
