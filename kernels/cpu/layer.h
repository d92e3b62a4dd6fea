// What the stages of a decoder layer share, and the kernels of one instruction set that they call.
#pragma once

#include "auxkern.h"

namespace auxkern {

// A block's rows between two products, in memory that the calling thread keeps from call to call.
struct LayerRows {
    const auxkern_layer *layer;
    const auxkern_layer_call *call;
    int64_t first, count;  // of the call's B * T rows
    float *query;   // all rows, (B, T, heads, head_width): queries, and then what attention makes of them
    float *normed;  // (count, D) behind a norm
    float *qkv;     // (count, ...) queries, keys and values as their product leaves them
    float *inner;   // (count, inner)
    float *after;   // (count, D) that a norm follows

    int64_t query_width() const { return layer->heads * layer->head_width; }
    int64_t key_width() const { return layer->key_heads * layer->head_width; }
};

#define AUXKERN_DECLARE_LAYER(isa)                                                                             \
    namespace isa {                                                                                            \
    void norm_row(const auxkern_norm &, const float *x, float *y, int64_t width);                              \
    void add_normed_row(const auxkern_norm &, const float *x, const float *residual, float *y, int64_t width); \
    void split_rows(const LayerRows &, int64_t begin, int64_t end);                                            \
    }

AUXKERN_DECLARE_LAYER(generic)
#if defined(__x86_64__)
AUXKERN_DECLARE_LAYER(avx2)
AUXKERN_DECLARE_LAYER(avx512)
#endif

}  // namespace auxkern
