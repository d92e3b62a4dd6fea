// The next token of rows [begin, end): one pass over the terms, the rest in the caches.
//
// A row's logits are added up into scratch memory of V floats. Filters are thresholds on them, found
// by selection, never by sorting the row. The token is the one with the largest sum of logit and
// Gumbel noise; noise is worked out in full only for the few ids that can still win.
#include "sample.h"

#include "mass.h"
#include "philox.h"
#include "terms.h"

namespace auxkern {
namespace AUXKERN_ISA {
namespace {

constexpr int64_t BLOCK = 4 * LANES;  // ids whose random bits are made at a time
constexpr int BIN_BITS = FRACTION_BITS - 6;  // bins of the mass are 1/64 octave wide
static_assert(MASS_BINS == (MOST_OCTAVES >> BIN_BITS) + 1, "the last bin is that of no mass");
// -log(-log1p(-u)) of the smallest u, 2^-33, is 22.87.
constexpr float LARGEST_NOISE = 23.0f;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

struct Candidate {
    float z;
    int32_t id;
    bool before(const Candidate &other) const { return z > other.z || (z == other.z && id < other.id); }
};

// What is kept of a row: z > threshold, or z == threshold up to an id, and d >= least.
struct Kept {
    float threshold = -INFINITY;
    int64_t last = INT64_MAX;
    float least = -INFINITY;
    const Candidate *few = nullptr;  // those that the threshold keeps, if they are few: `count` is not -1
    int64_t count = -1;
};

struct Row {
    const SampleTask &task;
    int64_t n;
    float *z;         // padded with -inf
    float *scratch;   // what follows the logits
    float max = -INFINITY;
    bool has_nan = false;

    const auxkern_sampling &sampling() const { return *task.sampling; }
    float temperature() const { return sampling().temperature[n]; }
    vf distance(int64_t v) const { return distance_of(load(z + v)); }
    template <class T>
    T distance_of(T x) const { return (x - max) / temperature(); }
    int64_t padded() const { return padded_vocabulary(task.V); }
};

void find_max(Row &row) {
    vf best = splat(-INFINITY);
    vi nan = vi{};
    for (int64_t v = 0; v < row.padded(); v += LANES) {
        const vf x = load(row.z + v);
        best = vmax(x, best);
        nan |= (vi)(x != x);
    }
    row.max = reduce_max(best);
    row.has_nan = any(nan);
}

void add_up(Row &row) {
    const SampleTask &task = row.task;
    auxkern_term terms[AUXKERN_MAX_TERMS];
    for (int32_t i = 0; i < task.n_terms; ++i) {
        terms[i] = task.terms[i];
        if (row.sampling().row_scales && row.sampling().row_scales[i]) terms[i].scale *= row.sampling().row_scales[i][row.n];
    }
    vf best = splat(-INFINITY);
    vi nan = vi{};
    for (int64_t column = 0; column < task.V; column += TILE) {
        const int64_t count = smaller(TILE, task.V - column);
        Tile tile;
        read_sum(tile, terms, task.n_terms, row.n, column, count);
        pad(tile, count, -INFINITY);
        const Ahead ahead(terms, task.n_terms, row.n, column);
        for (int64_t i = 0; i < count; i += LANES) {
            ahead.fetch(i);
            const vf x = load(tile.z + i);
            best = vmax(x, best);
            nan |= (vi)(x != x);
            store(row.z + column + i, x);
        }
    }
    for (int64_t v = task.V; v < row.padded(); ++v) row.z[v] = -INFINITY;
    row.max = reduce_max(best);
    row.has_nan = any(nan);
}

// body(id, place) for the ids of this row that exist.
template <class Body>
void each_id(const auxkern_row_ids &list, const Row &row, Body body) {
    for (int64_t k = row.n * list.width; k < (row.n + 1) * list.width; ++k)
        if (list.ids[k] >= 0 && list.ids[k] < row.task.V) body(list.ids[k], k);
}

// Counts are 0 before and after: bit 30 for an id of the prompt, the rest how often it was generated.
void penalize(Row &row) {
    constexpr int32_t IN_PROMPT = 1 << 30;
    const auxkern_sampling &s = row.sampling();
    int32_t *counts = reinterpret_cast<int32_t *>(row.scratch);
    each_id(s.prompt, row, [&](int64_t id, int64_t) { counts[id] |= IN_PROMPT; });
    each_id(s.history, row, [&](int64_t id, int64_t) { ++counts[id]; });
    const auto apply = [&](int64_t id, int64_t) {
        const int32_t seen = counts[id];
        if (seen == 0) return;  // done already
        counts[id] = 0;
        float x = row.z[id];
        if (s.repetition[row.n] != 1) x = x > 0 ? x / s.repetition[row.n] : x * s.repetition[row.n];
        const int32_t generated = seen & ~IN_PROMPT;
        if (generated) x -= s.presence[row.n] + s.frequency[row.n] * float(generated);
        row.z[id] = x;
    };
    each_id(s.prompt, row, apply);
    each_id(s.history, row, apply);
}

void adjust(Row &row) {
    const auxkern_sampling &s = row.sampling();
    each_id(s.added, row, [&](int64_t id, int64_t k) { row.z[id] += s.added_values[k]; });
    each_id(s.bias, row, [&](int64_t id, int64_t k) { row.z[id] += s.bias_values[k]; });
    if (row.task.counts) penalize(row);
    find_max(row);
}

// ---- filters -----------------------------------------------------------------------------------

// The k-th largest of x[0..count), which are reordered (Hoare 1961).
float kth_largest(float *x, int64_t count, int64_t k) {
    int64_t low = 0, high = count - 1;
    while (low < high) {
        const float pivot = x[low + (high - low) / 2];
        int64_t i = low, j = high;
        while (i <= j) {
            while (x[i] > pivot) ++i;
            while (x[j] < pivot) --j;
            if (i <= j) {
                const float t = x[i];
                x[i++] = x[j];
                x[j--] = t;
            }
        }
        if (k - 1 <= j) high = j;
        else if (k - 1 >= i) low = i;
        else break;
    }
    return x[k - 1];
}

// Appends the lanes of x that are in the mask.
inline int64_t append(float *to, int64_t count, vf x, vi mask) {
#if AUXKERN_LANES == 16
    const __mmask16 bits = _mm512_movepi32_mask((__m512i)mask);
    _mm512_mask_compressstoreu_ps(to + count, bits, (__m512)x);
    return count + __builtin_popcount(bits);
#else
    float lanes[LANES];
    int32_t wanted[LANES];
    memcpy(lanes, &x, sizeof x);
    memcpy(wanted, &mask, sizeof mask);
    for (int i = 0; i < LANES; ++i)
        if (wanted[i]) to[count++] = lanes[i];
    return count;
#endif
}

// Not above the k-th largest logit, and near it: the k-th largest of the maxima of some more than k parts.
float below_top_k(const Row &row, int64_t k, float *maxima) {
    const int64_t parts = (k + k / 4 + BLOCK - 1) / BLOCK * BLOCK, padded = row.padded();
    if (4 * parts > padded) return -INFINITY;
    for (int64_t i = 0; i < parts; i += BLOCK) {
        vf best[4];
        for (int j = 0; j < 4; ++j) best[j] = load(row.z + i + j * LANES);
        for (int64_t v = i + parts; v < padded; v += parts)
            for (int j = 0; j < 4; ++j) best[j] = vmax(load(row.z + v + j * LANES), best[j]);
        for (int j = 0; j < 4; ++j) store(maxima + i + j * LANES, best[j]);
    }
    return kth_largest(maxima, parts, k);
}

// The k-th largest logit: candidates above the k-th largest so far, thinned out when they are many.
float top_k_threshold(const Row &row, int64_t k, float *candidates) {
    const int64_t padded = row.padded();  // the compiler cannot know that storing logits leaves it alone
    const int64_t many = smaller(padded, 2 * k > LEAST_CANDIDATES ? 2 * k : LEAST_CANDIDATES);
    float threshold = nextafterf(below_top_k(row, k, candidates), -INFINITY);
    int64_t count = 0;
    for (int64_t v = 0; v < padded; v += LANES) {
        const vf x = load(row.z + v);
        const vi above = (vi)(x > threshold);
        if (!any(above)) continue;
        count = append(candidates, count, x, above);
        if (count < many || count < k) continue;
        threshold = kth_largest(candidates, count, k);
        count = k;
    }
    // Fewer than k above -inf: all that have any probability.
    return count < k ? -INFINITY : kth_largest(candidates, count, k);
}

void sift(Candidate *heap, int64_t root, int64_t count) {
    for (;;) {
        int64_t child = 2 * root + 1;
        if (child >= count) return;
        if (child + 1 < count && heap[child].before(heap[child + 1])) ++child;
        if (!heap[root].before(heap[child])) return;
        const Candidate t = heap[root];
        heap[root] = heap[child];
        heap[child] = t;
        root = child;
    }
}

// By falling z and rising id (heap sort: no more memory, and no bad case).
void sort(Candidate *x, int64_t count) {
    for (int64_t root = count / 2 - 1; root >= 0; --root) sift(x, root, count);
    for (int64_t end = count - 1; end > 0; --end) {
        const Candidate t = x[0];
        x[0] = x[end];
        x[end] = t;
        sift(x, 0, end);
    }
}

// Up to LANES candidates, in lanes.
struct Few {
    vf z = splat(-INFINITY);
    vi id = {};

    Few(const Candidate *x, int64_t count) {
        for (int i = 0; i < LANES && i < count; ++i) {
            z[i] = x[i].z;
            id[i] = x[i].id;
        }
    }
    vi exist() const { return (vi)(z > -INFINITY); }
};

// Of candidates by falling z, keeps the first until their mass is `needed` with that of `before`.
int64_t keep_first(const Row &row, Kept &kept, const Candidate *x, uint64_t before, uint64_t needed) {
    int64_t i = 0;
    for (; before < needed; ++i) {
        kept.threshold = x[i].z;
        kept.last = x[i].id;
        const vf d = splat(row.distance_of(x[i].z));
        before += masses_of(octaves_of(d), mass_shift(row.task.V), (vi)(d == d)).lane[0];
    }
    return i;
}

inline uint64_t share_of(double p, uint64_t total) {
    const double share = p * double(total);
    return share < 1 ? 1 : uint64_t(share);  // 1: the first id stays
}

// Where the fewest largest logits at or above `kept.threshold` reach the share p: the mass of bins
// finds the bin in which that is, and only its logits are sorted.
void keep_nucleus(const Row &row, double p, Kept &kept, uint64_t *mass, Candidate *candidates) {
    for (int64_t b = 0; b < MASS_BINS; ++b) mass[b] = 0;
    const int shift = mass_shift(row.task.V);
    for (int64_t v = 0; v < row.padded(); v += LANES) {
        const vi in = (vi)(load(row.z + v) >= kept.threshold);
        if (!any(in)) continue;
        const vi octaves = octaves_of(row.distance(v)), bin = octaves >> BIN_BITS;
        const vi with_mass = in & (vi)(octaves < MOST_OCTAVES);
        if (!any(with_mass)) continue;
        const Masses each = masses_of(octaves, shift, with_mass);
        int32_t bins[LANES];
        memcpy(bins, &bin, sizeof bin);
        // No branch for 0, which could not be predicted.
        for (int i = 0; i < LANES; ++i) mass[bins[i]] += each.lane[i];
    }
    uint64_t total = 0, before = 0;
    for (int64_t b = 0; b < MASS_BINS; ++b) total += mass[b];
    const uint64_t needed = share_of(p, total);
    int32_t bin = 0;
    while (before + mass[bin] < needed) before += mass[bin++];
    int64_t count = 0;
    for (int64_t v = 0; v < row.padded(); v += LANES) {
        const vf z = load(row.z + v);
        const vi in = (vi)(z >= kept.threshold) & (vi)(octaves_of(row.distance(v)) >> BIN_BITS == bin);
        if (!any(in)) continue;
        int32_t wanted[LANES];
        memcpy(wanted, &in, sizeof in);
        for (int i = 0; i < LANES; ++i)
            if (wanted[i]) candidates[count++] = {row.z[v + i], int32_t(v + i)};
    }
    sort(candidates, count);
    keep_first(row, kept, candidates, before, needed);
}

// The same where few logits are at or above the threshold: they are sorted. Returns how many are kept.
int64_t keep_nucleus_of_few(const Row &row, double p, Kept &kept, Candidate *x, int64_t count) {
    sort(x, count);
    uint64_t total = 0;
    for (int64_t first = 0; first < count; first += LANES) {
        const Few few(x + first, count - first);
        const Masses each = masses_of(octaves_of(row.distance_of(few.z)), mass_shift(row.task.V), few.exist());
        for (int i = 0; i < LANES; ++i) total += each.lane[i];
    }
    return keep_first(row, kept, x, 0, share_of(p, total));
}

inline vi ids_from(int64_t v) {
    vi lane;
    for (int i = 0; i < LANES; ++i) lane[i] = i;
    return lane + int32_t(v);
}

inline vi above_threshold(const Kept &kept, vf z, int64_t v) {
    const int32_t last = int32_t(kept.last < INT32_MAX ? kept.last : INT32_MAX);
    return (vi)(z > kept.threshold) | ((vi)(z == kept.threshold) & (vi)(ids_from(v) <= last));
}

inline vi is_kept(const Kept &kept, vf z, vf d, int64_t v) {
    return above_threshold(kept, z, v) & (vi)(d >= kept.least) & (vi)(z > -INFINITY);
}

// The logits that a threshold keeps, by rising id, if they are few; else -1.
int64_t collect(const Row &row, const Kept &kept, Candidate *to) {
    const int64_t padded = row.padded();
    int64_t count = 0;
    for (int64_t v = 0; v < padded; v += LANES) {
        const vf z = load(row.z + v);
        if (!any((vi)(z >= kept.threshold))) continue;
        const vi in = above_threshold(kept, z, v) & (vi)(z > -INFINITY);
        int32_t wanted[LANES];
        memcpy(wanted, &in, sizeof in);
        for (int i = 0; i < LANES; ++i)
            if (wanted[i]) to[count++] = {row.z[v + i], int32_t(v + i)};
        if (count > LEAST_CANDIDATES - LANES) return -1;
    }
    return count;
}

Kept filter(const Row &row) {
    const auxkern_sampling &s = row.sampling();
    Kept kept;
    kept.least = s.log_min_p[row.n];
    float *scratch = row.scratch + (row.task.counts ? row.padded() : 0), *rest = scratch + 2 * MASS_BINS;
    Candidate *candidates = reinterpret_cast<Candidate *>(rest);
    kept.few = candidates;
    if (s.top_k[row.n] < row.task.V) kept.threshold = top_k_threshold(row, s.top_k[row.n], rest);
    kept.count = collect(row, kept, candidates);
    if (s.top_p[row.n] >= 1) return kept;
    if (kept.count >= 0) {
        kept.count = keep_nucleus_of_few(row, s.top_p[row.n], kept, candidates, kept.count);
    } else {
        keep_nucleus(row, s.top_p[row.n], kept, reinterpret_cast<uint64_t *>(scratch), candidates);
        kept.count = collect(row, kept, candidates);
    }
    return kept;
}

// ---- the draw ----------------------------------------------------------------------------------

// -log(-log1p(-u)) of u = (bits + 0.5) 2^-32; above a half from 1 - u, which is then the precise one.
float gumbel(uint32_t bits) {
    constexpr float UNIT = 2.3283064365386963e-10f;  // 2^-32
    const float w = bits < 0x80000000u ? -log1pf(-(float(bits) + 0.5f) * UNIT) : -logf((float(~bits) + 0.5f) * UNIT);
    return -logf(w);
}

// Lanes that may beat `best`, given d - best within 1e-4: d + noise > best only if u < exp(d - best), as
// -log1p(-u) >= u, and the power of two below u bounds its logarithm without one.
inline vi may_win(vu bits, vf above_best) {
    const vf u = __builtin_convertvector((vi)(bits >> 1), vf);  // times 2^-31
    const vf log_u = __builtin_convertvector(((vi)u >> 23) - (127 + 31), vf) * 0.69314718f;
    return (vi)(log_u < above_best + 1e-3f);
}

// The largest sum of logit and noise so far; of equal ones that of the lowest id, in whatever order they come.
struct Race {
    const Row &row;
    // Finite, so that the largest logit's distance stays 0.
    const float inverse = row.temperature() < 1e-38f ? 1e38f : 1.0f / row.temperature();
    float best = -1e30f;
    int64_t token = -1;

    bool is_hopeless(vf z) const { return !any((vi)((z - row.max) * inverse > best - LARGEST_NOISE)); }

    void enter(vf z, vi id, vu bits) {
        // Screened with a product; who passes is worked out with the division that defines d.
        const vi candidates = may_win(bits, (z - row.max) * inverse - best) & (vi)(z > -INFINITY);
        if (!any(candidates)) return;
        float zs[LANES];
        uint32_t words[LANES];
        int32_t wins[LANES], ids[LANES];
        memcpy(zs, &z, sizeof zs);
        memcpy(words, &bits, sizeof words);
        memcpy(wins, &candidates, sizeof wins);
        memcpy(ids, &id, sizeof ids);
        for (int i = 0; i < LANES; ++i) {
            if (!wins[i]) continue;
            const float value = row.distance_of(zs[i]) + gumbel(words[i]);
            if (value > best || (value == best && ids[i] < token)) {
                best = value;
                token = ids[i];
            }
        }
    }
};

template <bool FILTERED>
int64_t draw(const Row &row, const Kept &kept) {
    const uint64_t seed = uint64_t(row.sampling().seed[row.n]), position = uint64_t(row.sampling().position[row.n]);
    Race race{row};
    for (int64_t i = 0; i < kept.count; i += LANES) {
        const Few few(kept.few + i, kept.count - i);
        const vf z = choose((vi)(row.distance_of(few.z) >= kept.least), few.z, splat(-INFINITY));
        race.enter(z, few.id, random_bits((vu)few.id, seed, position));
    }
    if (kept.count >= 0) return race.token;
    for (int64_t first = 0; first < row.padded(); first += BLOCK) {
        vf z[4];
        vf high = splat(-INFINITY);
        for (int k = 0; k < 4; ++k) {
            const int64_t v = first + k * LANES;
            z[k] = load(row.z + v);
            if (FILTERED) z[k] = choose(is_kept(kept, z[k], row.distance(v), v), z[k], splat(-INFINITY));
            high = vmax(z[k], high);
        }
        if (race.is_hopeless(high)) continue;
        vu bits[4];
        random_bits(bits, seed, position, first);
        for (int k = 0; k < 4; ++k) race.enter(z[k], ids_from(first + k * LANES), bits[k]);
    }
    return race.token;
}

int64_t largest(const Row &row) {
    int64_t v = 0;
    while (row.z[v] != row.max) ++v;
    return v;
}

// log of the token's share of what is kept.
float log_share(const Row &row, const Kept &kept, int64_t token) {
    double sum = 0;
    for (int64_t v = 0; v < row.padded(); v += BLOCK) {
        vf part = splat(0);
        for (int64_t i = v; i < v + BLOCK; i += LANES) {
            const vf d = row.distance(i);
            part += (vf)((vi)vexp(d) & is_kept(kept, load(row.z + i), d, i));
        }
        sum += reduce_sum(part);
    }
    return float(double(row.distance_of(row.z[token])) - log(sum));
}

int32_t status_of(const Row &row) {
    if (row.has_nan) return AUXKERN_ROW_NAN;
    if (row.max == -INFINITY) return AUXKERN_ROW_EMPTY;
    return row.max == INFINITY ? AUXKERN_ROW_INFINITE : AUXKERN_ROW_OK;
}

void sample_row(Row &row) {
    const SampleTask &task = row.task;
    add_up(row);
    if (task.adjusts) adjust(row);
    const int32_t status = task.status[row.n] = status_of(row);
    int64_t token = -1;
    float logprob = NAN;
    if (status == AUXKERN_ROW_OK && row.temperature() == 0) {
        token = largest(row);
        logprob = 0;
    } else if (status == AUXKERN_ROW_OK) {
        const Kept kept = task.filters ? filter(row) : Kept{};
        token = task.filters ? draw<true>(row, kept) : draw<false>(row, kept);
        if (task.logprob) logprob = log_share(row, kept, token);
    }
    task.token[row.n] = token;
    if (task.logprob) task.logprob[row.n] = logprob;
}

}  // namespace

void sample(const SampleTask &task, int64_t begin, int64_t end, float *scratch) {
    float *after = scratch + padded_vocabulary(task.V);
    if (task.counts) memset(after, 0, size_t(padded_vocabulary(task.V)) * sizeof(int32_t));
    for (int64_t n = begin; n < end; ++n) {
        Row row{task, n, scratch, after};
        sample_row(row);
    }
}

}  // namespace AUXKERN_ISA
}  // namespace auxkern
