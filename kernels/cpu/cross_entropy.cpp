// Cross-entropy of a sum of terms: rows [begin, end), one pass over the logits each way.
//
// A row is cut into tiles that stay in the first-level cache. A tile of z = sum of the terms is
// built in float32, and what follows (maximum, exponentials, gradient) works on that tile; memory
// sees each logit once. Sums run in float32 over the lanes of a tile and in float64 across tiles.
#include "cross_entropy.h"
#include "simd.h"

namespace auxkern {
namespace AUXKERN_ISA {
namespace {

constexpr int64_t TILE = 1024;  // 4 KiB of float32: two of them leave room in the smallest L1

struct alignas(64) Tile {
    float z[TILE];
};

inline int64_t padded(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

inline void pad(Tile &tile, int64_t count, float fill) {
    for (int64_t i = count; i < padded(count); ++i) tile.z[i] = fill;
}

template <class T>
const typename T::scalar *row_start(const auxkern_term &term, int64_t row) {
    return static_cast<const typename T::scalar *>(term.values) + (row / term.inner) * term.stride_outer +
           (row % term.inner) * term.stride_inner;
}

struct Plain {
    float scale;
    vf operator()(vf x) const { return x * scale; }
};

struct Capped {
    float scale, cap;
    vf operator()(vf x) const { return vtanh(x / cap) * cap * scale; }
};

// LANES values from column `column`, of which `count` exist.
template <class T>
vf load_columns(const typename T::scalar *p, int64_t stride, int64_t count) {
    if (stride == 1 && count >= LANES) return T::load(p);
    float lanes[LANES] = {};
    const int64_t n = count < LANES ? count : LANES;
    for (int64_t i = 0; i < n; ++i) lanes[i] = T::load_scalar(p + i * stride);
    return load(lanes);
}

template <bool ADD, class T, class F>
void read_values(Tile &tile, const typename T::scalar *p, int64_t stride, int64_t count, F share) {
    int64_t i = 0;
    if (stride == 1)
        for (; i + LANES <= count; i += LANES) {
            const vf x = share(T::load(p + i));
            store(tile.z + i, ADD ? load(tile.z + i) + x : x);
        }
    for (; i < count; i += LANES) {
        const vf x = share(load_columns<T>(p + i * stride, stride, count - i));
        store(tile.z + i, ADD ? load(tile.z + i) + x : x);
    }
}

template <bool ADD, class T>
void read_term(Tile &tile, const auxkern_term &term, int64_t row, int64_t column, int64_t count) {
    const auto *p = row_start<T>(term, row) + column * term.stride_column;
    if (term.softcap != 0)
        read_values<ADD, T>(tile, p, term.stride_column, count, Capped{term.scale, term.softcap});
    else
        read_values<ADD, T>(tile, p, term.stride_column, count, Plain{term.scale});
}

template <bool ADD>
void read_term(Tile &tile, const auxkern_term &term, int64_t row, int64_t column, int64_t count) {
    switch (term.dtype) {
        case AUXKERN_F32: return read_term<ADD, F32>(tile, term, row, column, count);
        case AUXKERN_F16: return read_term<ADD, F16>(tile, term, row, column, count);
        default: return read_term<ADD, BF16>(tile, term, row, column, count);
    }
}

void read_sum(Tile &tile, const auxkern_term *terms, int32_t n_terms, int64_t row, int64_t column, int64_t count) {
    read_term<false>(tile, terms[0], row, column, count);
    for (int32_t i = 1; i < n_terms; ++i) read_term<true>(tile, terms[i], row, column, count);
}

// The online softmax of a row (Milakov & Gimelshein 2018), with the target kept out of the sum so
// that 1 - p[target] does not cancel.
struct Row {
    float max = -INFINITY;
    double sum_other = 0;  // sum over v != target of exp(z - max)
    double spread = 0;     // sum over v of max - z
    float z_target = 0;
    int64_t argmax = 0;
    int64_t seen = 0;

    // A maximum of -inf would turn -inf - max into NaN.
    float reference() const { return max == -INFINITY ? 0.0f : max; }

    void raise_max(const Tile &tile, int64_t count, int64_t column) {
        vf best = splat(-INFINITY);
        for (int64_t i = 0; i < count; i += LANES) best = vmax(best, load(tile.z + i));
        const float tile_max = reduce_max(best);
        if (!(tile_max > max)) return;
        if (seen > 0) {
            spread += double(seen) * (double(tile_max) - double(max));
            sum_other *= exp(double(max) - double(tile_max));
        }
        max = tile_max;
        int64_t first = 0;
        while (tile.z[first] != tile_max) ++first;
        argmax = column + first;
    }

    void add_spread(Tile &tile, int64_t count) {
        const float m = reference();
        pad(tile, count, m);
        vf total = splat(0);
        for (int64_t i = 0; i < count; i += LANES) total += m - load(tile.z + i);
        spread += reduce_sum(total);
        pad(tile, count, -INFINITY);
    }

    // Destroys the target's entry in the tile.
    void add(Tile &tile, int64_t count, int64_t column, int64_t target, bool want_spread) {
        pad(tile, count, -INFINITY);
        raise_max(tile, count, column);
        if (want_spread) add_spread(tile, count);
        if (target >= column && target < column + count) {
            z_target = tile.z[target - column];
            tile.z[target - column] = -INFINITY;
        }
        const float m = reference();
        vf even = splat(0), odd = splat(0);
        int64_t i = 0;
        for (; i + LANES < count; i += 2 * LANES) {
            even += vexp(load(tile.z + i) - m);
            odd += vexp(load(tile.z + i + LANES) - m);
        }
        if (i < count) even += vexp(load(tile.z + i) - m);
        sum_other += reduce_sum(even + odd);
        seen += count;
    }

    double log_sum() const {
        if (max == -INFINITY) return NAN;  // no id has any probability
        if (z_target == max) return log1p(sum_other);
        return log(sum_other + exp(double(z_target) - double(max)));
    }

    double nll() const {
        const double gap = z_target == max ? 0.0 : double(max) - double(z_target);
        return gap + log_sum();
    }
};

void forward_row(const ForwardTask &task, int64_t row) {
    const int64_t y = task.target[row], V = task.V;
    const bool ignored = y == task.ignore_index;
    if (ignored || y < 0 || y >= V) {
        const float fill = ignored ? 0.0f : NAN;
        task.nll[row] = task.row_max[row] = task.log_sum[row] = fill;
        if (task.smooth) task.smooth[row] = fill;
        if (task.argmax) task.argmax[row] = -1;
        if (task.term_nll)
            for (int32_t i = 0; i < task.n_terms; ++i) task.term_nll[i * task.N + row] = fill;
        return;
    }
    Row sum, alone[AUXKERN_MAX_TERMS];
    Tile tile, share;
    for (int64_t column = 0; column < V; column += TILE) {
        const int64_t count = V - column < TILE ? V - column : TILE;
        read_sum(tile, task.terms, task.n_terms, row, column, count);
        sum.add(tile, count, column, y, task.smooth != nullptr);
        if (!task.term_nll) continue;
        for (int32_t i = 0; i < task.n_terms; ++i) {  // the values are in the cache by now
            read_term<false>(share, task.terms[i], row, column, count);
            alone[i].add(share, count, column, y, false);
        }
    }
    task.nll[row] = float(sum.nll());
    task.row_max[row] = sum.max;
    task.log_sum[row] = float(sum.log_sum());
    if (task.smooth) task.smooth[row] = float(sum.log_sum() + sum.spread / double(V));
    if (task.argmax) task.argmax[row] = sum.argmax;
    if (task.term_nll)
        for (int32_t i = 0; i < task.n_terms; ++i) task.term_nll[i * task.N + row] = float(alone[i].nll());
}

// ---- gradient --------------------------------------------------------------------------------

inline void stream(float *p, vf x) {
#if AUXKERN_LANES == 16
    _mm512_stream_ps(p, (__m512)x);
#elif AUXKERN_LANES == 8
    _mm256_stream_ps(p, (__m256)x);
#else
    store(p, x);
#endif
}

// Two vectors of 16-bit values fill what one streaming store writes.
template <class T>
inline void stream_pair(uint16_t *p, vf low, vf high) {
#if AUXKERN_LANES >= 8
    alignas(64) uint16_t lanes[2 * LANES];
    T::store(lanes, low);
    T::store(lanes + LANES, high);
    stream(reinterpret_cast<float *>(p), load(reinterpret_cast<const float *>(lanes)));
#else
    T::store(p, low);
    T::store(p + LANES, high);
#endif
}

// How many elements from p to the next address a streaming store accepts.
template <class S>
int64_t until_aligned(const S *p) {
    const uintptr_t bytes = sizeof(vf), over = reinterpret_cast<uintptr_t>(p) % bytes;
    return over == 0 ? 0 : int64_t((bytes - over) / sizeof(S));
}

template <class T>
void write_values(typename T::scalar *p, const float *z, int64_t count, float scale, bool around_cache) {
    typedef typename T::scalar S;
    constexpr int64_t STEP = int64_t(sizeof(vf) / sizeof(S));
    int64_t i = 0;
    if (around_cache) {
        const int64_t head = until_aligned(p);
        for (; i < head && i < count; ++i) T::store_scalar(p + i, z[i] * scale);
        for (; i + STEP <= count; i += STEP) {
            if constexpr (STEP == LANES) stream(p + i, load(z + i) * scale);
            else stream_pair<T>(p + i, load(z + i) * scale, load(z + i + LANES) * scale);
        }
    }
    for (; i + LANES <= count; i += LANES) T::store(p + i, load(z + i) * scale);
    for (; i < count; ++i) T::store_scalar(p + i, z[i] * scale);
}

template <class T>
void write_gradient(const BackwardTask &task, const Tile &dz, int32_t i, int64_t row, int64_t column, int64_t count) {
    const auxkern_term &term = task.terms[i];
    auto *p = static_cast<typename T::scalar *>(task.gradients[i]) + row * term.width + column;
    if (term.softcap == 0) {
        write_values<T>(p, dz.z, count, term.scale, task.stream);
        return;
    }
    Tile capped;
    const auto *x = row_start<T>(term, row) + column * term.stride_column;
    for (int64_t j = 0; j < count; j += LANES) {
        const vf u = load_columns<T>(x + j * term.stride_column, term.stride_column, count - j) / term.softcap;
        store(capped.z + j, load(dz.z + j) * vtanh_slope(u));
    }
    write_values<T>(p, capped.z, count, term.scale, task.stream);
}

void write_gradient(const BackwardTask &task, const Tile &dz, int32_t i, int64_t row, int64_t column, int64_t count) {
    switch (task.terms[i].dtype) {
        case AUXKERN_F32: return write_gradient<F32>(task, dz, i, row, column, count);
        case AUXKERN_F16: return write_gradient<F16>(task, dz, i, row, column, count);
        default: return write_gradient<BF16>(task, dz, i, row, column, count);
    }
}

void zero_columns(const BackwardTask &task, int32_t i, int64_t row, int64_t from) {
    const auxkern_term &term = task.terms[i];
    const int64_t size = term.dtype == AUXKERN_F32 ? 4 : 2;
    memset(static_cast<char *>(task.gradients[i]) + (row * term.width + from) * size, 0,
           size_t((term.width - from) * size));
}

void backward_row(const BackwardTask &task, int64_t row) {
    const float a = task.exp_coefficient[row], c = task.constant[row], at_target = task.target_gradient[row];
    const bool nothing = a == 0 && c == 0 && at_target == 0;
    for (int32_t i = 0; i < task.n_terms; ++i)
        if (task.gradients[i]) zero_columns(task, i, row, nothing ? 0 : task.V);
    if (nothing) return;

    const int64_t y = task.target[row], V = task.V;
    const float m = task.row_max[row] == -INFINITY ? 0.0f : task.row_max[row];
    Tile tile;
    for (int64_t column = 0; column < V; column += TILE) {
        const int64_t count = V - column < TILE ? V - column : TILE;
        read_sum(tile, task.terms, task.n_terms, row, column, count);
        for (int64_t i = 0; i < count; i += LANES) store(tile.z + i, a * vexp(load(tile.z + i) - m) - c);
        if (y >= column && y < column + count) tile.z[y - column] = at_target;
        for (int32_t i = 0; i < task.n_terms; ++i)
            if (task.gradients[i]) write_gradient(task, tile, i, row, column, count);
    }
}

}  // namespace

void cross_entropy_forward(const ForwardTask &task, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) forward_row(task, row);
}

void cross_entropy_backward(const BackwardTask &task, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) backward_row(task, row);
#if AUXKERN_LANES >= 8
    _mm_sfence();  // streaming stores are ordered by nothing else
#endif
}

}  // namespace AUXKERN_ISA
}  // namespace auxkern
