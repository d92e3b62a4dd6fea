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

// Sums of a tile: R rows, SUMS apart.
struct Place {
    int64_t panel, row;
    float *sums;
};

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

// Some rows of a piece as tiles of P panels, and of one where fewer are left.
template <class Kind, int R>
void row_tile(const ProductTask &task, int64_t row, int64_t begin, int64_t end) {
    constexpr int P = Kind::panels(R);
    alignas(64) float sums[R * SUMS];
    int64_t panel = begin;
    for (; panel + P <= end; panel += P) Kind::template tile<R, P>(task, {panel, row, sums + (panel - begin) * PANEL});
    for (; panel < end; ++panel) Kind::template tile<R, 1>(task, {panel, row, sums + (panel - begin) * PANEL});
    for (int r = 0; r < R; ++r) finish_row(task, sums + r * SUMS, row + r, begin, end - begin);
}

template <class Kind, int R = Kind::ROWS>
inline void rows_tile(const ProductTask &task, int64_t rows, int64_t row, int64_t begin, int64_t end) {
    if (rows == R) row_tile<Kind, R>(task, row, begin, end);
    else if constexpr (R > 1) rows_tile<Kind, R - 1>(task, rows, row, begin, end);
}

// Tiles of nearly equal numbers of rows: one row alone would wait for its own sums.
template <class Kind>
void multiply(const ProductTask &task, int64_t begin, int64_t end) {
    const int64_t groups = task.groups(), block = task.row_block(), panels = task.panels();
    for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t first = piece / groups * block, rows = smaller(block, task.call->M - first);
        const int64_t panel = piece % groups * PIECE_PANELS, last = smaller(panel + PIECE_PANELS, panels);
        const int64_t tiles = (rows + Kind::ROWS - 1) / Kind::ROWS;
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t row = rows * tile / tiles, after = rows * (tile + 1) / tiles;
            rows_tile<Kind>(task, after - row, first + row, panel, last);
        }
    }
}

}  // namespace
}  // namespace AUXKERN_ISA
}  // namespace auxkern
