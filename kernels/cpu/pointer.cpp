// What of a condition stands in a text, and what that adds to logits: one more token of each text.
//
// Built without contraction: results are those of the same operations one by one.
#include <algorithm>
#include <cmath>

#include "auxkern.h"

namespace {

bool is_bad(const auxkern_coverage &c) {
    if (c.B < 0 || c.K < 0 || c.D < 0) return true;
    if (c.B == 0) return false;
    const bool lacks_weights = !c.share_weight || !c.lacking_weight || !c.written_weight || !c.marks;
    return !c.ids || !c.mask || !c.share || !c.lacking || !c.written || (c.D > 0 && lacks_weights) ||
           (c.K > 0 && (!c.condition_ids || !c.condition_mask || !c.begun || !c.stretches));
}

// Of one text: how long its longest stretch is, how long its condition, and whether it ends with that.
struct Reached {
    int64_t longest = 0, count = 0;
    bool written = false;
};

Reached stretch(const auxkern_coverage &c, int64_t b) {
    const int64_t id = c.ids[b * c.ids_stride];
    const bool is_text = c.mask[b * c.mask_stride] != 0;
    const int64_t *ids = c.condition_ids + b * c.condition_ids_stride_batch;
    const int64_t *mask = c.condition_mask + b * c.condition_mask_stride_batch;
    const int64_t *past = c.past ? c.past + b * c.K * 2 : nullptr;
    int64_t *stretches = c.stretches + b * c.K * 2;
    float *begun = c.begun + b * c.K;
    Reached reached;
    for (int64_t j = 0; j < c.K; ++j) reached.count += mask[j * c.condition_mask_stride_token] != 0;
    int64_t before = 0;  // what the text ended with at the token before, up to the condition's token before
    bool follows = false;
    for (int64_t j = 0; j < c.K; ++j) {
        const int64_t most = past ? past[2 * j] : 0, last = past ? past[2 * j + 1] : 0;
        const bool is_real = mask[j * c.condition_mask_stride_token] != 0;
        const bool equal = is_text && is_real && ids[j * c.condition_ids_stride_token] == id;
        const int64_t run = equal ? before + 1 : 0, longest = std::max(most, run);
        stretches[2 * j] = longest;
        stretches[2 * j + 1] = is_text ? run : last;
        begun[j] = follows ? 1.0f : 0.0f;
        follows = run == j + 1;
        if (follows && j + 1 == reached.count) reached.written = true;
        reached.longest = std::max(reached.longest, longest);
        before = last;
    }
    return reached;
}

bool is_bad(const auxkern_pointer &p) {
    if (p.B < 0 || p.K < 0 || p.d < 1 || !(p.spread > 0)) return true;
    if (p.B == 0) return false;
    return !p.query.at || !p.start.at || !p.follow.at || !p.closing.at || !p.lacking || !p.end ||
           (p.K > 0 && (!p.keys || !p.begun || !p.scores || (p.against.at && !p.lm_scores)));
}

// Sums that do not wait for each other, in one order whatever the instruction set.
float dot(const float *x, const float *y, int64_t width) {
    constexpr int CHAINS = 8;
    float sum[CHAINS] = {};
    int64_t i = 0;
    for (; i + CHAINS <= width; i += CHAINS)
        for (int c = 0; c < CHAINS; ++c) sum[c] += x[i + c] * y[i + c];
    for (int c = 0; i + c < width; ++c) sum[c] += x[i + c] * y[i + c];
    return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}

float of(const auxkern_of_text &each, int64_t b) { return each.at[b * each.stride]; }

}  // namespace

int32_t auxkern_pointer_step(const auxkern_pointer *pointer) {
    if (!pointer || is_bad(*pointer)) return AUXKERN_BAD_ARGUMENT;
    const auxkern_pointer &p = *pointer;
    const float root = std::sqrt(float(p.d));
    for (int64_t b = 0; b < p.B; ++b) {
        const float *query = p.query.at + b * p.query.stride, *keys = p.keys + b * p.keys_stride_batch;
        const float follow = p.spread * of(p.follow, b), against = p.against.at ? of(p.against, b) : 0;
        for (int64_t j = 0; j < p.K; ++j) {
            float score = dot(query, keys + j * p.keys_stride_token, p.d) / root;
            if (j == 0) score += of(p.start, b);
            score += follow * p.begun[b * p.K + j];
            if (p.against.at) score += against * ((p.lm_scores[b * p.K + j] - p.lm_logit) / p.spread);
            p.scores[b * p.K + j] = score;
        }
        p.end[b] = p.spread * of(p.closing, b) * p.lacking[b];
    }
    return AUXKERN_OK;
}

int32_t auxkern_coverage_step(const auxkern_coverage *coverage) {
    if (!coverage || is_bad(*coverage)) return AUXKERN_BAD_ARGUMENT;
    const auxkern_coverage &c = *coverage;
    for (int64_t b = 0; b < c.B; ++b) {
        const Reached reached = stretch(c, b);
        const float share = float(reached.longest) / float(std::max<int64_t>(reached.count, 1));
        const float lacking = (reached.count > 0 ? 1.0f : 0.0f) - share, written = reached.written ? 1.0f : 0.0f;
        c.share[b] = share, c.lacking[b] = lacking, c.written[b] = written;
        float *marks = c.marks + b * c.D;
        for (int64_t d = 0; d < c.D; ++d)
            marks[d] = share * c.share_weight[d] + lacking * c.lacking_weight[d] + written * c.written_weight[d];
    }
    return AUXKERN_OK;
}
