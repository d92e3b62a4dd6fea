// What the dispatcher hands to the attention kernel of one instruction set.
#pragma once

#include "auxkern.h"

namespace auxkern {

static inline bool is_bad_cache(int32_t dtype) { return dtype != AUXKERN_F32 && dtype != AUXKERN_BF16; }

struct AttentionTask {
    const auxkern_attention *attention;

    // A piece is one query position of the heads that share keys.
    int64_t pieces() const { return attention->B * attention->T * attention->key_heads; }
    int64_t group() const { return attention->heads / attention->key_heads; }
    int64_t padded() const { return (attention->P + 15) / 16 * 16; }
};

// Floats of scratch memory of a thread: the columns that are seen, and the weights of a group's heads.
static inline int64_t scratch_size(const AttentionTask &task) { return task.padded() * (1 + task.group()); }

#define AUXKERN_DECLARE_ATTENTION(isa) \
    namespace isa {                    \
    void attention(const AttentionTask &, int64_t begin, int64_t end, float *scratch); \
    }

AUXKERN_DECLARE_ATTENTION(generic)
#if defined(__x86_64__)
AUXKERN_DECLARE_ATTENTION(avx2)
AUXKERN_DECLARE_ATTENTION(avx512)
#endif

}  // namespace auxkern
