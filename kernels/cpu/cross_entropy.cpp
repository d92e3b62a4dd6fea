// Cross-entropy of a sum of terms: rows [begin, end), one pass over the logits each way.
//
// A row is cut into tiles that stay in the first-level cache. A tile of z = sum of the terms is
// built in float32, and what follows (maximum, exponentials, gradient) works on that tile; memory
// sees each logit once. Sums run in float32 over the lanes of a tile and in float64 across tiles.
#include "cross_entropy.h"
#include "terms.h"

namespace auxkern {
namespace AUXKERN_ISA {
namespace {

// Bytes ahead that gradients are prefetched for writing.
constexpr int64_t PREFETCH_WRITE = 1024;

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

    // Destroys the target's entry in the tile; `saved`, unless null, receives the exponentials.
    void add(Tile &tile, int64_t count, int64_t column, int64_t target, bool want_spread, float *saved,
             const Ahead *ahead) {
        pad(tile, count, -INFINITY);
        raise_max(tile, count, column);
        if (want_spread) add_spread(tile, count);
        if (target >= column && target < column + count) {
            z_target = tile.z[target - column];
            tile.z[target - column] = -INFINITY;
        }
        const float m = reference();
        vf even = splat(0), odd = splat(0);
        float *e = saved ? saved : tile.z;
        int64_t i = 0;
        for (; i + LANES < count; i += 2 * LANES) {
            if (ahead) {
                ahead->fetch(i);
                ahead->fetch(i + LANES);
            }
            const vf low = vexp(load(tile.z + i) - m), high = vexp(load(tile.z + i + LANES) - m);
            store(e + i, low);
            store(e + i + LANES, high);
            even += low;
            odd += high;
        }
        if (i < count) {
            const vf last = vexp(load(tile.z + i) - m);
            store(e + i, last);
            even += last;
        }
        sum_other += reduce_sum(even + odd);
        seen += count;
    }

    double log_sum() const {
        // No id has any probability: the sum is 0, or NaN if a logit is.
        if (max == -INFINITY) return log(sum_other);
        if (z_target == max) return log1p(sum_other);
        return log(sum_other + exp(double(z_target) - double(max)));
    }

    double nll() const {
        if (max == -INFINITY) return NAN;
        const double gap = z_target == max ? 0.0 : double(max) - double(z_target);
        return gap + log_sum();
    }
};

// ---- gradient --------------------------------------------------------------------------------

// A store that goes around the caches: a gradient larger than they are is not found there later, and
// reading its old contents in, as other stores do, would cost as much as writing it.
template <class S>
inline void stream(S *p, vf bits) {
#if AUXKERN_LANES == 16
    _mm512_stream_ps(reinterpret_cast<float *>(p), (__m512)bits);
#elif AUXKERN_LANES == 8
    _mm256_stream_ps(reinterpret_cast<float *>(p), (__m256)bits);
#else
    memcpy(p, &bits, sizeof bits);
#endif
}

// Streaming stores are ordered by nothing else.
inline void fence() {
#if AUXKERN_LANES >= 8
    _mm_sfence();
#endif
}

// How many elements from p to the next address that a streaming store accepts.
template <class S>
int64_t until_aligned(const S *p) {
    const uintptr_t over = reinterpret_cast<uintptr_t>(p) % sizeof(vf);
    return over == 0 ? 0 : int64_t((sizeof(vf) - over) / sizeof(S));
}

// What a tile's gradient is made of: dz = a e - c, and at_target at column `target` (-1: not here).
struct TileGradient {
    const float *e;
    float a, c, at_target;
    int64_t target;
};

template <class T, bool CAPPED>
void write_gradient(const GradientTask &task, const TileGradient &g, int32_t i, int64_t row, int64_t column,
                    int64_t count) {
    const auxkern_term &term = task.terms[i];
    const float scale = term.scale, a = g.a * scale, c = g.c * scale, cap = term.softcap;
    const int64_t stride = term.stride_column;
    const auto *x = row_start<T>(term, row) + column * stride;
    auto *p = static_cast<typename T::scalar *>(task.gradients[i]) + row * term.width + column;
    const auto slope = [&](int64_t j) { return vtanh_slope(load_columns<T>(x + j * stride, stride, count - j) / cap); };
    const auto at = [&](int64_t j) {
        const vf dz = load(g.e + j) * a - c;
        return CAPPED ? dz * slope(j) : dz;
    };
    // Before the loop: the gradient may replace the values it is made from.
    float at_target = g.at_target * scale;
    if (CAPPED && g.target >= 0) at_target *= slope(g.target)[0];
    const auto some = [&](int64_t from, int64_t to) {
        float lanes[LANES];
        store(lanes, at(from));
        for (int64_t k = from; k < to; ++k) T::store_scalar(p + k, lanes[k - from]);
    };
    int64_t j = 0;
    if (task.stream) {
        constexpr int64_t STEP = int64_t(sizeof(vf) / sizeof(*p));  // elements of one streaming store
        j = until_aligned(p) < count ? until_aligned(p) : count;
        for (int64_t k = 0; k < j; k += LANES) some(k, k + LANES < j ? k + LANES : j);
        for (; j + STEP <= count; j += STEP) {
            if constexpr (STEP == LANES) stream(p + j, at(j));
            else stream(p + j, T::pair(at(j), at(j + LANES)));
        }
    }
    for (; j + LANES <= count; j += LANES) {
        __builtin_prefetch(p + j + PREFETCH_WRITE / sizeof(*p), 1);
        T::store(p + j, at(j));
    }
    if (j < count) some(j, count);
    if (g.target >= 0) T::store_scalar(p + g.target, at_target);
}

template <class T>
void write_gradient(const GradientTask &task, const TileGradient &g, int32_t i, int64_t row, int64_t column,
                    int64_t count) {
    if (task.terms[i].softcap != 0) write_gradient<T, true>(task, g, i, row, column, count);
    else write_gradient<T, false>(task, g, i, row, column, count);
}

void write_gradients(const GradientTask &task, const TileGradient &g, int64_t row, int64_t column, int64_t count) {
    for (int32_t i = 0; i < task.n_terms; ++i) {
        if (!task.gradients[i]) continue;
        switch (task.terms[i].dtype) {
            case AUXKERN_F32: write_gradient<F32>(task, g, i, row, column, count); break;
            case AUXKERN_F16: write_gradient<F16>(task, g, i, row, column, count); break;
            default: write_gradient<BF16>(task, g, i, row, column, count);
        }
    }
}

inline int64_t inside(int64_t y, int64_t column, int64_t count) {
    return y >= column && y < column + count ? y - column : -1;
}

void zero_columns(const GradientTask &task, int32_t i, int64_t row, int64_t from) {
    const auxkern_term &term = task.terms[i];
    const int64_t size = term.dtype == AUXKERN_F32 ? 4 : 2;
    memset(static_cast<char *>(task.gradients[i]) + (row * term.width + from) * size, 0,
           size_t((term.width - from) * size));
}

// What one row leaves behind for its gradient, in the thread's scratch memory.
struct Saved {
    float *exponentials;  // ceil(V / TILE) * TILE
    float *tile_max;      // ceil(V / TILE): the maximum that a tile's exponentials are relative to
    explicit Saved(float *scratch, int64_t V)
        : exponentials(scratch), tile_max(scratch ? scratch + (V + TILE - 1) / TILE * TILE : nullptr) {}
};

// dz = a exp(z - m) - c, and at_target at the target.
struct Coefficients {
    float m, a, c, at_target;
};

void gradient_row(const GradientTask &task, int64_t row, int64_t y, Coefficients k) {
    const bool nothing = k.a == 0 && k.c == 0 && k.at_target == 0;
    for (int32_t i = 0; i < task.n_terms; ++i)
        if (task.gradients[i]) zero_columns(task, i, row, nothing ? 0 : task.V);
    if (nothing) return;

    const int64_t V = task.V;
    const float m = k.m == -INFINITY ? 0.0f : k.m;
    Tile tile;
    for (int64_t column = 0; column < V; column += TILE) {
        const int64_t count = V - column < TILE ? V - column : TILE;
        read_sum(tile, task.terms, task.n_terms, row, column, count);
        const Ahead ahead(task.terms, task.n_terms, row, column);
        for (int64_t i = 0; i < count; i += LANES) {
            ahead.fetch(i);
            store(tile.z + i, vexp(load(tile.z + i) - m));
        }
        write_gradients(task, {tile.z, k.a, k.c, k.at_target, inside(y, column, count)}, row, column, count);
    }
}

// The same from the exponentials that the forward pass saved, each relative to its tile's maximum.
void gradient_row(const GradientTask &task, int64_t row, int64_t y, Coefficients k, const Saved &saved) {
    for (int32_t i = 0; i < task.n_terms; ++i)
        if (task.gradients[i]) zero_columns(task, i, row, task.V);
    for (int64_t column = 0; column < task.V; column += TILE) {
        const int64_t count = task.V - column < TILE ? task.V - column : TILE;
        const float tile_max = saved.tile_max[column / TILE];
        const float a = k.a * (tile_max == -INFINITY ? 0.0f : float(exp(double(tile_max) - double(k.m))));
        const float *e = saved.exponentials + column;
        write_gradients(task, {e, a, k.c, k.at_target, inside(y, column, count)}, row, column, count);
    }
}

// With g the row's weight, s the smoothing and q the z-loss:
//     dz[v] = g (1 + 2 q lse) p[v] - g (1 - s) [v = y] - g s / V
// At the target p is exp(-nll) and p - 1 is expm1(-nll), which does not cancel.
Coefficients coefficients(const ForwardTask &task, int64_t row, const Row &sum) {
    const double weight = task.gradient->row_weight[row], smoothing = task.gradient->label_smoothing;
    const double log_sum = sum.log_sum();
    const double z_slope = 2 * double(task.gradient->z_loss) * (double(sum.max) + log_sum);
    const double total = weight * (1 + z_slope), c = weight * smoothing / double(task.V);
    const double at_target =
        weight * ((1 - smoothing) * expm1(-sum.nll()) + (smoothing + z_slope) * exp(-sum.nll())) - c;
    return {sum.max, float(total * exp(-log_sum)), float(c), float(at_target)};
}

// ---- rows -------------------------------------------------------------------------------------

void forward_row(const ForwardTask &task, int64_t row, float *scratch) {
    const int64_t y = task.target[row], V = task.V;
    const bool ignored = y == task.ignore_index;
    const bool open = y == AUXKERN_NO_TARGET && !ignored;
    if (ignored || (!open && (y < 0 || y >= V))) {
        const float fill = ignored ? 0.0f : NAN;
        task.nll[row] = task.row_max[row] = task.log_sum[row] = fill;
        if (task.smooth) task.smooth[row] = fill;
        if (task.argmax) task.argmax[row] = -1;
        if (task.term_nll)
            for (int32_t i = 0; i < task.n_terms; ++i) task.term_nll[i * task.N + row] = fill;
        if (task.gradient) gradient_row(task.write, row, y, {fill, fill, fill, fill});
        return;
    }
    Row sum, alone[AUXKERN_MAX_TERMS];
    if (open) {
        sum.z_target = -INFINITY;
        for (Row &term : alone) term.z_target = -INFINITY;
    }
    Tile tile, share;
    const Saved saved(scratch, V);
    for (int64_t column = 0; column < V; column += TILE) {
        const int64_t count = V - column < TILE ? V - column : TILE;
        read_sum(tile, task.terms, task.n_terms, row, column, count);
        const Ahead ahead(task.terms, task.n_terms, row, column);
        sum.add(tile, count, column, y, task.smooth != nullptr, scratch ? saved.exponentials + column : nullptr, &ahead);
        if (scratch) saved.tile_max[column / TILE] = sum.max;
        if (!task.term_nll) continue;
        for (int32_t i = 0; i < task.n_terms; ++i) {  // the values are in the cache by now
            read_term<false>(share, task.terms[i], row, column, count);
            alone[i].add(share, count, column, y, false, nullptr, nullptr);
        }
    }
    task.nll[row] = float(sum.nll());
    task.row_max[row] = sum.max;
    task.log_sum[row] = float(sum.log_sum());
    if (task.smooth) task.smooth[row] = float(sum.log_sum() + sum.spread / double(V));
    if (task.argmax) task.argmax[row] = sum.argmax;
    if (task.term_nll)
        for (int32_t i = 0; i < task.n_terms; ++i) task.term_nll[i * task.N + row] = float(alone[i].nll());
    if (task.gradient) gradient_row(task.write, row, y, coefficients(task, row, sum), saved);
}

void backward_row(const BackwardTask &task, int64_t row) {
    gradient_row(task.write, row, task.target[row],
                 {task.row_max[row], task.exp_coefficient[row], task.constant[row], task.target_gradient[row]});
}

}  // namespace

void cross_entropy_forward(const ForwardTask &task, int64_t begin, int64_t end, float *scratch) {
    for (int64_t row = begin; row < end; ++row) forward_row(task, row, scratch);
    if (task.gradient) fence();
}

void cross_entropy_backward(const BackwardTask &task, int64_t begin, int64_t end, float *) {
    for (int64_t row = begin; row < end; ++row) backward_row(task, row);
    fence();
}

}  // namespace AUXKERN_ISA
}  // namespace auxkern
