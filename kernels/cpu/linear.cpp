// Products of a few rows with a weight that stands as a linear layer keeps it, (N, K).
//
// Both operands are contiguous in k, so vectors run over k and each output is a dot product: nothing
// is packed or transposed, and half-precision weights are read once and widened on the way. An output
// is the same sum in the same order for any number of rows and threads.
#include "linear.h"

#include "simd.h"

namespace auxkern {
namespace AUXKERN_ISA {
namespace {

// ROWS * TILE accumulators, a vector for each row and one for the weight: 28 of 32 registers, or 16 of 16.
constexpr int ROWS = 3;
constexpr int TILE = LANES == 16 ? 8 : 4;
constexpr int64_t DEPTH = 640;  // most of k at a time: a widened tile and its rows fit the first-level cache

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Some of k: every part but the last is whole vectors.
struct Part {
    int64_t begin, depth;
    bool first;
};

template <class Body>
void parts_of(int64_t K, Body body) {
    const int64_t parts = (K + DEPTH - 1) / DEPTH;
    const int64_t depth = ((K + parts - 1) / parts + LANES - 1) / LANES * LANES;
    for (int64_t k = 0; k < K; k += depth) body(Part{k, smaller(depth, K - k), k == 0});
}

// A tile of weights: `count` of its TILE rows exist.
template <class T>
struct Tile {
    const typename T::scalar *at;
    int64_t stride, count;
};

template <class T>
Tile<F32> widened(const Tile<T> &tile, int64_t depth, float *to) {
    for (int64_t i = 0; i < TILE; ++i) {
        float *row = to + i * DEPTH;
        const auto *from = tile.at + i * tile.stride;
        int64_t k = 0;
        if (i < tile.count) {
            for (; k + LANES <= depth; k += LANES) store(row + k, T::load(from + k));
            for (; k < depth; ++k) row[k] = T::load_scalar(from + k);
        }
        for (; k < depth; ++k) row[k] = 0;
    }
    return {to, DEPTH, tile.count};
}

// y[r, i] = what it holds, if KEEP, or the bias, plus sum over the part of x[r, k] * weight[i, k].
template <int R, class T>
inline void multiply(const auxkern_linear &layer, const Tile<T> &tile, const Part &part, int64_t row, int64_t id) {
    const float *x = layer.x + row * layer.x_stride + part.begin;
    vf sum[R][TILE];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int i = 0; i < TILE; ++i) sum[r][i] = splat(0);
    int64_t k = 0;
    for (; k + LANES <= part.depth; k += LANES) {
        vf a[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) a[r] = load(x + r * layer.x_stride + k);
#pragma GCC unroll 8
        for (int i = 0; i < TILE; ++i) {
            const vf w = in_register(T::load(tile.at + i * tile.stride + k));
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) sum[r][i] += a[r] * w;
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        float total[TILE];
        reduce_each<TILE>(sum[r], total);
        for (int64_t left = k; left < part.depth; ++left)
            for (int i = 0; i < TILE; ++i)
                if (i < tile.count)
                    total[i] += x[r * layer.x_stride + left] * T::load_scalar(tile.at + i * tile.stride + left);
        float *y = layer.y + (row + r) * layer.y_stride + id;
        const bool add = layer.accumulate || !part.first;
        if (tile.count == TILE && !add && !layer.bias) {
            memcpy(y, total, sizeof total);
            continue;
        }
        for (int i = 0; i < tile.count; ++i) {
            float value = total[i] + (add ? y[i] : 0.0f);
            if (part.first && layer.bias) value += layer.bias[id + i];
            y[i] = value;
        }
    }
}

// Bytes that will be read next, fetched a share at a time: a tile is too short for the hardware to find
// out where the next one comes from.
struct Ahead {
    const char *at;
    int64_t bytes, done;

    void fetch(int64_t share) {
        for (int64_t end = smaller(bytes, done + share); done < end; done += 64) __builtin_prefetch(at + done, 0, 2);
    }
};

template <class T>
void multiply_rows(const auxkern_linear &layer, const Tile<T> &tile, const Part &part, int64_t row, int64_t end,
                   int64_t id, Ahead ahead) {
    const int64_t share = (ahead.bytes * ROWS / (end - row) + 127) / 64 * 64;
    for (; row + ROWS <= end; row += ROWS) {
        ahead.fetch(share);
        multiply<ROWS>(layer, tile, part, row, id);
    }
    ahead.fetch(ahead.bytes);
    static_assert(ROWS == 3, "what is left is one row or two");
    if (end - row == 2) multiply<2>(layer, tile, part, row, id);
    if (end - row == 1) multiply<1>(layer, tile, part, row, id);
}

template <class T>
void piece(const auxkern_linear &layer, int64_t row, int64_t rows, int64_t begin, int64_t end) {
    alignas(64) float scratch[TILE * DEPTH];
    const bool narrow = sizeof(typename T::scalar) < sizeof(float);
    for (int64_t id = begin; id < end; id += TILE)
        parts_of(layer.K, [&](const Part &part) {
            const auto *weight = static_cast<const typename T::scalar *>(layer.weight);
            const Tile<T> tile{weight + id * layer.weight_stride + part.begin, layer.weight_stride,
                               smaller(TILE, end - id)};
            const int64_t after = layer.weight_stride * (TILE * sizeof *weight);
            Ahead ahead{reinterpret_cast<const char *>(weight + (id + TILE) * layer.weight_stride), after, 0};
            if (!part.first || rows <= ROWS || id + 2 * TILE > layer.N) ahead.bytes = 0;
            if (tile.count < TILE || (narrow && rows > ROWS))
                multiply_rows(layer, widened(tile, part.depth, scratch), part, row, row + rows, id, ahead);
            else
                multiply_rows(layer, tile, part, row, row + rows, id, ahead);
        });
}

}  // namespace

void linear(const LinearTask &task, int64_t begin, int64_t end, float *) {
    const auxkern_linear &layer = *task.layer;
    const int64_t groups = task.groups();
    for (int64_t number = begin; number < end; ++number) {
        const int64_t row = number / groups * LINEAR_ROWS, id = number % groups * LINEAR_IDS;
        const int64_t rows = smaller(LINEAR_ROWS, layer.M - row), last = smaller(layer.N, id + LINEAR_IDS);
        if (layer.dtype == AUXKERN_F32) piece<F32>(layer, row, rows, id, last);
        else if (layer.dtype == AUXKERN_F16) piece<F16>(layer, row, rows, id, last);
        else piece<BF16>(layer, row, rows, id, last);
    }
}

}  // namespace AUXKERN_ISA
}  // namespace auxkern
