// What products of every kind of weight share: how rows and panels are cut into register tiles, and what
// is done with finished sums.
//
// A kind has a template `tile<R, P>` of R rows and P panels, that adds up each output over k in the same
// order whatever R and P are.
#pragma once

#include "activations.h"
#include "products.h"
#include "simd.h"

namespace auxkern {
namespace AUXKERN_ISA {
namespace {

constexpr int VECTORS = PANEL / LANES;  // of a panel
constexpr int64_t SUMS = PIECE_PANELS * PANEL;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Memory that the next piece will read, of which each tile of this one asks for its part, step by step: the
// hardware would follow a panel, but not guess the next one, and several tiles of rows would wait for it in the
// first of them only.
struct Ahead {
    const char *at;
    int64_t bytes;  // from one request to the next: part of a cache line where there are several tiles
    const char *cache;  // what else is asked for, once a step
    int64_t cache_bytes;

    template <int COUNT>
    void ask() {
#pragma GCC unroll 8
        for (int i = 0; i < COUNT; ++i) __builtin_prefetch(at + i * bytes, 0, 2);
        at += COUNT * bytes;
        __builtin_prefetch(cache, 0, 2);
        cache += cache_bytes;
    }
};

// Sums of a tile: R rows, SUMS apart.
struct Place {
    int64_t panel, row;
    float *sums;
    Ahead ahead;
};

// Runs of k of nearly equal length. A sum of many terms loses places, so those of blocks are added up.
struct Block {
    int64_t begin, end, depth;
};

struct Blocks {
    static constexpr int64_t MOST = 128;

    Blocks(int64_t K, int64_t step) : K(K) {
        const int64_t count = (K + MOST - 1) / MOST;
        depth = rounded_up((K + count - 1) / count, step);
    }

    struct Iterator {
        int64_t k, K, depth;
        Block operator*() const { return {k, smaller(k + depth, K), depth}; }
        Iterator &operator++() {
            k += depth;
            return *this;
        }
        bool operator!=(const Iterator &) const { return k < K; }
    };
    Iterator begin() const { return {0, K, depth}; }
    Iterator end() const { return {K, K, depth}; }

    int64_t K, depth;
};

// Where R rows stand, step by step. A base for every three rows and one stride are what addresses can be
// made of in one instruction each; a base of its own for every row would not leave a register for anything else.
template <int R>
struct Rows {
    Rows(const void *first, int64_t bytes_apart) : stride(bytes_apart) {
#pragma GCC unroll 4
        for (int i = 0; i < (R + 2) / 3; ++i) {
            base[i] = static_cast<const char *>(first) + 3 * i * stride;
            __asm__("" : "+r"(base[i]));  // the compiler would see through it
        }
    }
    template <class T>
    T at(int r, int step = 0) const {
        T x;
        memcpy(&x, base[r / 3] + r % 3 * stride + step * int(sizeof x), sizeof x);
        return x;
    }
    void advance(int bytes) {
#pragma GCC unroll 4
        for (int i = 0; i < (R + 2) / 3; ++i) base[i] += bytes;
    }

    const char *base[(R + 2) / 3];
    int64_t stride;
};

// A weight that all rows of a tile read, in a register; that of one row is read where it is multiplied.
template <int R>
inline vf kept(vf x) {
    return R > 1 ? in_register(x) : x;
}

template <int R, int WIDTH>
inline void clear(vf (&sum)[R][WIDTH]) {
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int j = 0; j < WIDTH; ++j) sum[r][j] = splat(0);
}

// Adds the sums of a block to those of the blocks before it, which stand in memory: registers are short.
template <int R, int WIDTH>
inline void keep(const vf (&sum)[R][WIDTH], float *to, bool first) {
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int j = 0; j < WIDTH; ++j) {
            float *at = to + r * SUMS + j * LANES;
            store(at, first ? sum[r][j] : load(at) + sum[r][j]);
        }
}

inline vf load_part(const float *from, int64_t count) {
    float lanes[LANES] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = from[i];
    return load(lanes);
}

inline void store_part(float *to, vf x, int64_t count) {
    float lanes[LANES];
    store(lanes, x);
    for (int64_t i = 0; i < count; ++i) to[i] = lanes[i];
}

// `count` of a vector's lanes exist; none where it is 0 or less.
inline vf load_some(const float *from, int64_t count) { return count >= LANES ? load(from) : load_part(from, count); }

inline void store_some(float *to, vf x, int64_t count) {
    if (count >= LANES) store(to, x);
    else store_part(to, x, count);
}

// The epilogue of one row: `panels` of it, the first of which is `panel`.
inline void finish_row(const ProductTask &task, const float *sums, int64_t row, int64_t panel, int64_t panels) {
    const auxkern_product_call &call = *task.call;
    const float *bias = task.product->bias;
    float *y = call.y + row * call.y_stride;
    const bool gates = call.epilogue == AUXKERN_GATE;
    for (int64_t p = 0; p < panels; p += gates ? 2 : 1)
        for (int v = 0; v < VECTORS; ++v) {
            const int64_t n = (gates ? (panel + p) / 2 : panel + p) * PANEL + v * LANES, count = call.columns - n;
            if (count <= 0) break;
            vf z = load(sums + p * PANEL + v * LANES);
            if (bias) z += load_some(bias + n, count);
            if (gates) {
                vf up = load(sums + (p + 1) * PANEL + v * LANES);
                if (bias) up += load_some(bias + task.product->N / 2 + n, count);
                z = activated(call.activation, z) * up;
            } else if (call.epilogue == AUXKERN_ADD) {
                z += load_some(y + n, count);
            } else if (call.activation != AUXKERN_IDENTITY) {
                z = activated(call.activation, z);
            }
            store_some(y + n, z, count);
        }
}

// A piece, and which of its tiles of rows.
struct Piece {
    int64_t number, panel, end;
    int64_t tile, tiles;

    // For the tile of `width` panels that begins with panel `at`, of so many steps.
    Ahead ahead(const ProductTask &task, int64_t at, int64_t width, int64_t steps) const {
        const int64_t bytes = panel_bytes(*task.product), panels = end - panel;
        const char *next = static_cast<const char *>(task.product->values) + end * bytes;
        // Where there is nothing else to ask for, it is what is near already.
        const char *near = reinterpret_cast<const char *>(task.call);
        Ahead result{next + (panels * tile + at - panel) * bytes / tiles, (63 + tiles) / tiles, near, 0};
        if (!task.cache) return result;
        const int64_t turn = (number * tiles + tile) * PIECE_PANELS + at - panel;
        const int64_t turns = task.pieces() * tiles * PIECE_PANELS, chunks = task.cache_end - task.cache_begin;
        const int64_t first = task.cache_begin + chunks * turn / turns;
        const int64_t last = task.cache_begin + chunks * (turn + width) / turns;
        if (first >= smaller(last, task.cache_end)) return result;
        const NextCache::Chunk chunk = task.cache->chunk(first);
        result.cache = chunk.at;
        result.cache_bytes = smaller(64, ((last - first) * chunk.bytes + steps - 1) / steps);
        return result;
    }
};

// Some rows of a piece as tiles of P panels, and of one where fewer are left.
template <class Kind, int R>
void row_tile(const ProductTask &task, int64_t row, const Piece &piece) {
    constexpr int P = Kind::panels(R);
    alignas(64) float sums[R * SUMS];
    int64_t panel = piece.panel;
    const int64_t steps = task.product->K / Kind::STEP + 1;
    auto place = [&](int64_t width) {
        return Place{panel, row, sums + (panel - piece.panel) * PANEL, piece.ahead(task, panel, width, steps)};
    };
    for (; panel + P <= piece.end; panel += P) Kind::template tile<R, P>(task, place(P));
    for (; panel < piece.end; ++panel) Kind::template tile<R, 1>(task, place(1));
    for (int r = 0; r < R; ++r) finish_row(task, sums + r * SUMS, row + r, piece.panel, piece.end - piece.panel);
}

template <class Kind, int R = Kind::ROWS>
inline void rows_tile(const ProductTask &task, int64_t rows, int64_t row, const Piece &piece) {
    if (rows == R) row_tile<Kind, R>(task, row, piece);
    else if constexpr (R > 1) rows_tile<Kind, R - 1>(task, rows, row, piece);
}

// Tiles of nearly equal numbers of rows: one row alone would wait for its own sums.
template <class Kind>
void multiply(const ProductTask &task, int64_t begin, int64_t end) {
    const int64_t groups = task.groups(), block = task.row_block(), panels = task.panels();
    for (int64_t number = begin; number < end; ++number) {
        const int64_t first = number / groups * block, rows = smaller(block, task.call->M - first);
        const int64_t panel = number % groups * PIECE_PANELS;
        Piece piece{number, panel, smaller(panel + PIECE_PANELS, panels), 0, (rows + Kind::ROWS - 1) / Kind::ROWS};
        for (; piece.tile < piece.tiles; ++piece.tile) {
            const int64_t row = rows * piece.tile / piece.tiles, after = rows * (piece.tile + 1) / piece.tiles;
            rows_tile<Kind>(task, after - row, first + row, piece);
        }
    }
}

}  // namespace
}  // namespace AUXKERN_ISA
}  // namespace auxkern
