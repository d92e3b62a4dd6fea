// What the dispatcher hands to the kernel of a frozen linear layer of one instruction set.
#pragma once

#include "auxkern.h"

namespace auxkern {

constexpr int64_t LINEAR_ROWS = 192;  // rows of a piece of work: their inputs stay in the second-level cache
constexpr int64_t LINEAR_IDS = 32;    // outputs of a piece: whole cache lines of a row

struct LinearTask {
    const auxkern_linear *layer;

    int64_t groups() const { return (layer->N + LINEAR_IDS - 1) / LINEAR_IDS; }
    int64_t pieces() const { return groups() * ((layer->M + LINEAR_ROWS - 1) / LINEAR_ROWS); }
};

#define AUXKERN_DECLARE_LINEAR(isa) \
    namespace isa {                 \
    void linear(const LinearTask &, int64_t begin, int64_t end, float *); \
    }

AUXKERN_DECLARE_LINEAR(generic)
#if defined(__x86_64__)
AUXKERN_DECLARE_LINEAR(avx2)
AUXKERN_DECLARE_LINEAR(avx512)
#endif

}  // namespace auxkern
