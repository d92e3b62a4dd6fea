// What the dispatcher hands to the sampling kernel of one instruction set.
#pragma once

#include "auxkern.h"

namespace auxkern {

struct SampleTask {
    const auxkern_term *terms;
    int32_t n_terms;
    int64_t N, V;
    const auxkern_sampling *sampling;
    int64_t *token;
    int32_t *status;
    float *logprob;  // or null
    bool adjusts;    // some row's logits change after the sum
    bool counts;     // some row has a prompt or a history
    bool filters;    // some row has a filter
};

constexpr int64_t MASS_BINS = 63 * 64 + 1;
constexpr int64_t LEAST_CANDIDATES = 1024;

static inline int64_t padded_vocabulary(int64_t V) { return (V + 63) / 64 * 64; }

// Floats of scratch memory that a thread needs: the logits; counts; candidates, their values and ids;
// the mass of each bin in 64 bits.
static inline int64_t scratch_size(const SampleTask &task) {
    const int64_t V = padded_vocabulary(task.V);
    return V + (task.counts ? V : 0) + (task.filters ? 2 * V + 2 * LEAST_CANDIDATES + 2 * MASS_BINS : 0);
}

#define AUXKERN_DECLARE_SAMPLE(isa) \
    namespace isa {                 \
    void sample(const SampleTask &, int64_t begin, int64_t end, float *scratch); \
    }

AUXKERN_DECLARE_SAMPLE(generic)
#if defined(__x86_64__)
AUXKERN_DECLARE_SAMPLE(avx2)
AUXKERN_DECLARE_SAMPLE(avx512)
#endif

}  // namespace auxkern
