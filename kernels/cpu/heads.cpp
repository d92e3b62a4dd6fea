// Cross-entropy of a sum of output heads: segments [begin, end) of the vocabulary.
//
// All three products have the same shape: a few scalars times a few vectors, added up over k. The
// vectors run over rows in the logits, where a tile lies as [id][row], so that the maximum, the
// exponential and the sum of a row need no shuffles, and weights are read as they stand.
#include "heads.h"

#include "simd.h"

namespace auxkern {
namespace AUXKERN_ISA {
namespace {

// A micro-kernel holds SCALARS * VECTORS accumulators in registers: 24 of 32, or 12 of 16.
constexpr int SCALARS = 6;
constexpr int VECTORS = LANES == 16 ? 4 : 2;
constexpr int64_t WIDTH = VECTORS * LANES;
constexpr int64_t LINE = 16;    // floats of a cache line
constexpr int64_t DEPTH = 512;  // of a sum over k; a block of vectors then fits the second-level cache

// How far above its reference a logit may lie before the reference is raised: exp(16) is far from
// overflow, and what lies that far below keeps its relative precision.
constexpr float LEEWAY = 16.0f;

// Whether a micro-kernel fetches what the next one will read: a group is too short for the hardware
// to find out where weights and their gradients come from.
enum Ahead { NOTHING, SCALARS_AHEAD, SCALARS_AND_SUMS_AHEAD };

// scalar(i, k) = at[i * step_i + k * step_k]
struct Scalars {
    const float *at;
    int64_t step_i, step_k;
    Ahead ahead;
};

// c[i * step_c + j] = sum over k of scalar(i, k) * b[k * step_b + j]; j < V * LANES, i < S; plus what
// c held if ADD.
template <int S, int V, bool ADD>
inline void multiply(const Scalars &a, const float *b, int64_t step_b, float *c, int64_t step_c, int64_t depth) {
    vf sum[S][V];
#pragma GCC unroll 8
    for (int i = 0; i < S; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) sum[i][j] = ADD ? load(c + i * step_c + j * LANES) : splat(0);
    const float *p = a.at;
    for (int64_t k = 0; k < depth; ++k, p += a.step_k, b += step_b) {
        if (a.ahead != NOTHING && k % LINE == 0)
            for (int i = 0; i < S; ++i) {
                __builtin_prefetch(p + (S + i) * a.step_i);
                if (a.ahead == SCALARS_AND_SUMS_AHEAD && k < V * LANES)
                    __builtin_prefetch(c + (S + i) * step_c + k, 1);
            }
        vf row[V];
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) row[j] = load(b + j * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < S; ++i) {
            const vf x = splat(p[i * a.step_i]);
#pragma GCC unroll 4
            for (int j = 0; j < V; ++j) sum[i][j] += x * row[j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < S; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) store(c + i * step_c + j * LANES, sum[i][j]);
}

template <int V, bool ADD>
void multiply(int64_t scalars, Scalars a, const float *b, int64_t step_b, float *c, int64_t step_c, int64_t depth) {
    for (; scalars >= SCALARS; scalars -= SCALARS) {
        multiply<SCALARS, V, ADD>(a, b, step_b, c, step_c, depth);
        a.at += SCALARS * a.step_i;
        c += SCALARS * step_c;
    }
    switch (scalars) {
        case 1: return multiply<1, V, ADD>(a, b, step_b, c, step_c, depth);
        case 2: return multiply<2, V, ADD>(a, b, step_b, c, step_c, depth);
        case 3: return multiply<3, V, ADD>(a, b, step_b, c, step_c, depth);
        case 4: return multiply<4, V, ADD>(a, b, step_b, c, step_c, depth);
        case 5: return multiply<5, V, ADD>(a, b, step_b, c, step_c, depth);
        default: return;
    }
}

template <bool ADD>
void multiply(int64_t vectors, int64_t scalars, const Scalars &a, const float *b, int64_t step_b, float *c,
              int64_t step_c, int64_t depth) {
    switch (vectors) {
        case 1: return multiply<1, ADD>(scalars, a, b, step_b, c, step_c, depth);
        case 2: return multiply<2, ADD>(scalars, a, b, step_b, c, step_c, depth);
#if AUXKERN_LANES == 16
        case 3: return multiply<3, ADD>(scalars, a, b, step_b, c, step_c, depth);
        default: return multiply<4, ADD>(scalars, a, b, step_b, c, step_c, depth);
#else
        default: return;
#endif
    }
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t vectors(int64_t columns) { return (columns + LANES - 1) / LANES; }

// Blocks of WIDTH columns, the last one narrower: body(first column, vectors).
template <class Body>
void column_blocks(int64_t columns, Body body) {
    for (int64_t j = 0; j < columns; j += WIDTH) body(j, vectors(smaller(WIDTH, columns - j)));
}

// First of the entries whose id is at least `id`.
int64_t first_entry(const auxkern_entries &entries, int64_t id) {
    int64_t low = 0, high = entries.count;
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (entries.ids[middle] < id) low = middle + 1;
        else high = middle;
    }
    return low;
}

// Calls body(number, id, row) for the entries of ids [begin, end).
template <class Body>
void entries_of(const auxkern_entries &entries, int64_t begin, int64_t end, Body body) {
    for (int64_t k = first_entry(entries, begin); k < entries.count && entries.ids[k] < end; ++k)
        body(k, entries.ids[k], entries.rows[k]);
}

template <class T>
void convert(float *to, const auxkern_head &head, int64_t begin, int64_t count) {
    for (int64_t v = 0; v < count; ++v) {
        const auto *from = static_cast<const typename T::scalar *>(head.weight) + (begin + v) * head.weight_stride;
        int64_t d = 0;
        for (; d + LANES <= head.D; d += LANES) store(to + v * head.D + d, T::load(from + d));
        for (; d < head.D; ++d) to[v * head.D + d] = T::load_scalar(from + d);
    }
}

// Some rows of a head's weight in float32: where they stand, or converted into `scratch`.
struct Weight {
    const float *at;
    int64_t stride;

    Weight(const auxkern_head &head, int64_t begin, int64_t count, float *scratch) : at(scratch), stride(head.D) {
        if (head.dtype == AUXKERN_F32) {
            at = static_cast<const float *>(head.weight) + begin * head.weight_stride;
            stride = head.weight_stride;
        } else if (head.dtype == AUXKERN_F16) {
            convert<F16>(scratch, head, begin, count);
        } else {
            convert<BF16>(scratch, head, begin, count);
        }
    }
};

// A segment's rows, in the caller's memory.
struct Segment {
    const auxkern_rows &rows;
    int64_t begin, end;  // ids
    float *max, *sum;    // (stride,)

    Segment(const auxkern_rows &rows, int64_t number, int64_t V)
        : rows(rows), begin(number * IDS), end(smaller(V, begin + IDS)), max(rows.segment_max + number * rows.stride),
          sum(rows.segment_sum + number * rows.stride) {}
};

// z (count, stride) of the ids from `begin`.
void make_logits(const HeadsForwardTask &task, int64_t begin, int64_t count, float *z, float *scratch) {
    const int64_t stride = task.rows->stride;
    for (int64_t v = 0; v < count; ++v) {
        float bias = 0;
        for (int32_t h = 0; h < task.n_heads; ++h)
            if (task.heads[h].bias) bias += task.heads[h].scale * task.heads[h].bias[begin + v];
        for (int64_t n = 0; n < stride; n += LANES) store(z + v * stride + n, splat(bias));
    }
    const float *packed = task.packed;
    for (int32_t h = 0; h < task.n_heads; ++h) {
        const auxkern_head &head = task.heads[h];
        const Weight weight(head, begin, count, scratch);
        // Parts of about the same depth: a short one would spend its time on loading sums.
        const int64_t parts = (head.D + DEPTH - 1) / DEPTH, part = (head.D + parts - 1) / parts;
        for (int64_t d = 0; d < head.D; d += part) {
            const int64_t depth = smaller(part, head.D - d);
            column_blocks(stride, [&](int64_t n, int64_t wide) {
                const float *b = packed + n * head.D + d * wide * LANES;
                const Scalars a{weight.at + d, weight.stride, 1, SCALARS_AHEAD};
                multiply<true>(wide, count, a, b, wide * LANES, z + n, stride, depth);
            });
        }
        packed += head.D * stride;
    }
    entries_of(task.rows->sparse, begin, begin + count,
               [&](int64_t k, int64_t id, int64_t row) { z[(id - begin) * stride + row] += task.rows->values[k]; });
    entries_of(task.rows->targets, begin, begin + count, [&](int64_t, int64_t id, int64_t row) {
        float &at = z[(id - begin) * stride + row];
        task.rows->z_target[row] = at;
        at = -INFINITY;
    });
}

// Raises the reference of LANES rows, and brings what the segment has made so far to it.
void raise_reference(const HeadsForwardTask &task, const Segment &segment, int64_t number, int64_t n, int64_t done,
                     vf old_max, vf new_max) {
    store(segment.max + n, new_max);
    if (done == segment.begin) return;
    const vf factor = vexp(old_max - new_max);
    store(segment.sum + n, load(segment.sum + n) * factor);
    const int64_t stride = task.rows->stride;
    for (int32_t h = 0; h < task.n_heads; ++h)
        if (float *back = task.heads[h].back) {
            back += number * task.heads[h].D * stride;
            for (int64_t d = 0; d < task.heads[h].D; ++d)
                store(back + d * stride + n, load(back + d * stride + n) * factor);
        }
    if (float *e = task.rows->e)
        for (int64_t v = segment.begin; v < done; ++v) store(e + v * stride + n, load(e + v * stride + n) * factor);
}

// z becomes exp(z - reference), and the reference and the sum of each row follow.
void exponentiate(const HeadsForwardTask &task, const Segment &segment, int64_t number, int64_t begin, int64_t count,
                  float *z) {
    const auxkern_rows &rows = *task.rows;
    for (int64_t n = 0; n < rows.stride; n += LANES) {
        vf best = splat(-INFINITY);
        for (int64_t v = 0; v < count; ++v) best = vmax(load(z + v * rows.stride + n), best);
        const vf max = load(segment.max + n);
        const vi raise = (vi)(best > max + LEEWAY) | ((vi)(max == -INFINITY) & (vi)(best > -INFINITY));
        const vf raised = (vf)(((vi)best & raise) | ((vi)max & ~raise));
        int32_t lanes[LANES], any = 0;
        memcpy(lanes, &raise, sizeof raise);
        for (int i = 0; i < LANES; ++i) any |= lanes[i];
        if (any) raise_reference(task, segment, number, n, begin, max, raised);
        // A reference of -inf would turn -inf - reference into NaN.
        const vf reference = (vf)((vi)raised & ~(vi)(raised == -INFINITY));
        vf sum = splat(0);
        for (int64_t v = 0; v < count; ++v) {
            const vf e = vexp(load(z + v * rows.stride + n) - reference);
            store(z + v * rows.stride + n, e);
            sum += e;
        }
        store(segment.sum + n, load(segment.sum + n) + sum);
    }
    if (!rows.live || !rows.e) return;
    // NaN times a coefficient of 0 is not 0.
    for (int64_t n = 0; n < rows.C; ++n)
        if (!rows.live[n])
            for (int64_t v = 0; v < count; ++v) z[v * rows.stride + n] = 0;
}

void forward_segment(const HeadsForwardTask &task, int64_t number, float *scratch) {
    const auxkern_rows &rows = *task.rows;
    const Segment segment(rows, number, task.V);
    for (int64_t n = 0; n < rows.stride; n += LANES) {
        store(segment.max + n, splat(-INFINITY));
        store(segment.sum + n, splat(0));
    }
    for (int64_t begin = segment.begin; begin < segment.end; begin += TILE_IDS) {
        const int64_t count = smaller(TILE_IDS, segment.end - begin);
        float *z = rows.e ? rows.e + begin * rows.stride : scratch;
        float *converted = rows.e ? scratch : scratch + TILE_IDS * rows.stride;
        make_logits(task, begin, count, z, converted);
        exponentiate(task, segment, number, begin, count, z);
        for (int32_t h = 0; h < task.n_heads; ++h) {
            const auxkern_head &head = task.heads[h];
            if (!head.back) continue;
            const Weight weight(head, begin, count, converted);
            float *back = head.back + number * head.D * rows.stride;
            const Scalars a{weight.at, 1, weight.stride, NOTHING};
            column_blocks(rows.stride, [&](int64_t n, int64_t wide) {
                if (begin == segment.begin)
                    multiply<false>(wide, head.D, a, z + n, rows.stride, back + n, rows.stride, count);
                else
                    multiply<true>(wide, head.D, a, z + n, rows.stride, back + n, rows.stride, count);
            });
        }
    }
}

// A head's hidden states times the segment's coefficients, in blocks of columns: [block][row][column].
void pack_scaled(const HeadsBackwardTask &task, const auxkern_head &head, int64_t number, float *packed) {
    const auxkern_rows &rows = *task.rows;
    const float *coefficient = task.gradient->coefficient + number * rows.stride;
    column_blocks(head.D, [&](int64_t d, int64_t wide) {
        const int64_t width = wide * LANES, count = smaller(width, head.D - d);
        float *to = packed + d * rows.C;
        for (int64_t n = 0; n < rows.C; ++n, to += width) {
            const float *from = head.hidden + n * head.D + d;
            const float c = coefficient[n] * head.scale;
            // A row without gradient may hold NaN, and NaN times 0 is not 0.
            for (int64_t j = 0; j < count; ++j) to[j] = c == 0 ? 0.0f : from[j] * c;
            for (int64_t j = count; j < width; ++j) to[j] = 0;
        }
    });
}

void add_targets(const HeadsBackwardTask &task, const auxkern_head &head, int64_t begin, int64_t end) {
    entries_of(task.rows->targets, begin, end, [&](int64_t, int64_t id, int64_t row) {
        const float g = task.gradient->target_gradient[row] * head.scale;
        if (g == 0) return;
        if (head.d_bias) head.d_bias[id] += g;
        if (!head.d_weight) return;
        const float *from = head.hidden + row * head.D;
        float *to = head.d_weight + id * head.D;
        for (int64_t d = 0; d < head.D; ++d) to[d] += g * from[d];
    });
}

void write_weight(const HeadsBackwardTask &task, const auxkern_head &head, int64_t begin, int64_t end,
                  const float *packed) {
    const auxkern_rows &rows = *task.rows;
    for (int64_t first = begin; first < end; first += TILE_IDS) {
        const int64_t count = smaller(TILE_IDS, end - first);
        column_blocks(head.D, [&](int64_t d, int64_t wide) {
            const Scalars a{rows.e + first * rows.stride, rows.stride, 1, SCALARS_AND_SUMS_AHEAD};
            const float *b = packed + d * rows.C;
            const int64_t width = wide * LANES, columns = smaller(width, head.D - d);
            float *to = head.d_weight + first * head.D + d;
            if (columns == width) {
                if (task.gradient->accumulate) multiply<true>(wide, count, a, b, width, to, head.D, rows.C);
                else multiply<false>(wide, count, a, b, width, to, head.D, rows.C);
                return;
            }
            // The last columns of a D that is no multiple of LANES, through memory that may be overwritten.
            float block[TILE_IDS * WIDTH];
            multiply<false>(wide, count, a, b, width, block, width, rows.C);
            for (int64_t v = 0; v < count; ++v)
                for (int64_t j = 0; j < columns; ++j) {
                    const float before = task.gradient->accumulate ? to[v * head.D + j] : 0.0f;
                    to[v * head.D + j] = before + block[v * width + j];
                }
        });
    }
}

void write_bias(const HeadsBackwardTask &task, const auxkern_head &head, int64_t number, int64_t begin, int64_t end) {
    const auxkern_rows &rows = *task.rows;
    const float *coefficient = task.gradient->coefficient + number * rows.stride;
    for (int64_t v = begin; v < end; ++v) {
        vf sum = splat(0);
        for (int64_t n = 0; n < rows.stride; n += LANES) sum += load(rows.e + v * rows.stride + n) * load(coefficient + n);
        const float before = task.gradient->accumulate ? head.d_bias[v] : 0.0f;
        head.d_bias[v] = before + head.scale * float(reduce_sum(sum));
    }
}

void backward_segment(const HeadsBackwardTask &task, int64_t number, float *scratch) {
    const auxkern_rows &rows = *task.rows;
    const int64_t begin = number * IDS, end = smaller(task.V, begin + IDS);
    for (int32_t h = 0; h < task.n_heads; ++h) {
        const auxkern_head &head = task.heads[h];
        if (head.d_weight) {
            pack_scaled(task, head, number, scratch);
            write_weight(task, head, begin, end, scratch);
        }
        if (head.d_bias) write_bias(task, head, number, begin, end);
        if (head.d_weight || head.d_bias) add_targets(task, head, begin, end);
    }
    if (!task.gradient->d_values) return;
    const float *coefficient = task.gradient->coefficient + number * rows.stride;
    entries_of(rows.sparse, begin, end, [&](int64_t k, int64_t id, int64_t row) {
        task.gradient->d_values[k] = coefficient[row] * rows.e[id * rows.stride + row];
    });
    // Entries at a row's own target; both lists rise with the id.
    int64_t k = first_entry(rows.sparse, begin);
    entries_of(rows.targets, begin, end, [&](int64_t, int64_t id, int64_t row) {
        while (k < rows.sparse.count && rows.sparse.ids[k] < id) ++k;
        for (int64_t i = k; i < rows.sparse.count && rows.sparse.ids[i] == id; ++i)
            if (rows.sparse.rows[i] == row) task.gradient->d_values[i] = task.gradient->target_gradient[row];
    });
}

}  // namespace

// Hidden states times their scale, in blocks of rows: [head][block][d][row].
void pack_hidden(const HeadsForwardTask &task, float *packed) {
    const auxkern_rows &rows = *task.rows;
    for (int32_t h = 0; h < task.n_heads; ++h) {
        const auxkern_head &head = task.heads[h];
        column_blocks(rows.stride, [&](int64_t n, int64_t wide) {
            const int64_t width = wide * LANES, count = rows.C - n < width ? rows.C - n : width;
            float *to = packed + n * head.D;
            for (int64_t d = 0; d < head.D; ++d, to += width)
                for (int64_t j = 0; j < width; ++j)
                    to[j] = j < count ? head.scale * head.hidden[(n + j) * head.D + d] : 0.0f;
        });
        packed += head.D * rows.stride;
    }
}

void heads_forward(const HeadsForwardTask &task, int64_t begin, int64_t end, float *scratch) {
    for (int64_t number = begin; number < end; ++number) forward_segment(task, number, scratch);
}

void heads_backward(const HeadsBackwardTask &task, int64_t begin, int64_t end, float *scratch) {
    for (int64_t number = begin; number < end; ++number) backward_segment(task, number, scratch);
}

}  // namespace AUXKERN_ISA
}  // namespace auxkern
