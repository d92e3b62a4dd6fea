// What the dispatcher hands to the kernels of output heads of one instruction set.
#pragma once

#include "auxkern.h"

namespace auxkern {

constexpr int64_t PAD = 64;               // floats that a packed row may be longer than its own
constexpr int64_t IDS = AUXKERN_HEADS_IDS;  // ids of a segment, the unit of work
constexpr int64_t TILE_IDS = 128;           // ids whose logits and weights are in the cache at a time
static_assert(IDS % TILE_IDS == 0, "a segment is made of whole tiles");

struct HeadsForwardTask {
    const auxkern_head *heads;
    int32_t n_heads;
    const auxkern_rows *rows;
    int64_t V;
    const float *packed;  // what pack_hidden left
};

struct HeadsBackwardTask {
    const auxkern_head *heads;
    int32_t n_heads;
    const auxkern_rows *rows;
    int64_t V;
    const auxkern_heads_gradient *gradient;
};

// Floats of the packed hidden states of all heads.
static inline int64_t packed_size(const auxkern_head *heads, int32_t n_heads, const auxkern_rows &rows) {
    int64_t widths = 0;
    for (int32_t h = 0; h < n_heads; ++h) widths += heads[h].D;
    return widths * rows.stride;
}

// Floats of scratch memory that a thread needs for a forward call: converted weights, and logits
// where the caller keeps none.
static inline int64_t scratch_size(const HeadsForwardTask &task) {
    int64_t widest = 0;
    for (int32_t h = 0; h < task.n_heads; ++h) {
        const auxkern_head &head = task.heads[h];
        if (head.dtype != AUXKERN_F32) widest = head.D > widest ? head.D : widest;
    }
    return TILE_IDS * widest + (task.rows->e ? 0 : TILE_IDS * task.rows->stride);
}

static inline int64_t scratch_size(const HeadsBackwardTask &task) {
    int64_t widest = 0;
    for (int32_t h = 0; h < task.n_heads; ++h)
        if (task.heads[h].d_weight && task.heads[h].D > widest) widest = task.heads[h].D;
    return task.rows->C * (widest + PAD);
}

#define AUXKERN_DECLARE_HEADS(isa)                                                                \
    namespace isa {                                                                               \
    void pack_hidden(const HeadsForwardTask &, float *packed);                                    \
    void heads_forward(const HeadsForwardTask &, int64_t begin, int64_t end, float *scratch);     \
    void heads_backward(const HeadsBackwardTask &, int64_t begin, int64_t end, float *scratch);   \
    }

AUXKERN_DECLARE_HEADS(generic)
#if defined(__x86_64__)
AUXKERN_DECLARE_HEADS(avx2)
AUXKERN_DECLARE_HEADS(avx512)
#endif

}  // namespace auxkern
