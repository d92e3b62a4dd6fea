// A tile of z = sum of terms, read row by row in float32. As simd.h, built once per instruction set.
#pragma once

#include "cross_entropy.h"
#include "simd.h"

namespace auxkern {
namespace AUXKERN_ISA {
namespace {

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

struct Unscaled {
    vf operator()(vf x) const { return x; }
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
    else if (term.scale == 1)
        read_values<ADD, T>(tile, p, term.stride_column, count, Unscaled{});
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

bool is_plain(const auxkern_term &term) {
    return term.stride_column == 1 && term.scale == 1 && term.softcap == 0;
}

// The usual sum, a frozen model's logits and an auxiliary's, without a stop in between.
template <class T>
void read_pair(Tile &tile, const auxkern_term &a, const auxkern_term &b, int64_t row, int64_t column, int64_t count) {
    const auto *p = row_start<T>(a, row) + column, *q = row_start<T>(b, row) + column;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(tile.z + i, T::load(p + i) + T::load(q + i));
    if (i < count) store(tile.z + i, load_columns<T>(p + i, 1, count - i) + load_columns<T>(q + i, 1, count - i));
}

// The terms' next tile, fetched bit by bit while this one is worked on: tiles of several terms are
// read in turn, each for a page at a time, which hardware prefetchers do not follow.
struct Ahead {
    const char *next[AUXKERN_MAX_TERMS];
    int64_t size[AUXKERN_MAX_TERMS];
    int32_t n = 0;

    Ahead(const auxkern_term *terms, int32_t n_terms, int64_t row, int64_t column) {
        for (int32_t i = 0; i < n_terms; ++i) {
            const auxkern_term &term = terms[i];
            if (term.stride_column != 1) continue;
            const int64_t start = (row / term.inner) * term.stride_outer + (row % term.inner) * term.stride_inner;
            size[n] = term.dtype == AUXKERN_F32 ? 4 : 2;
            next[n] = static_cast<const char *>(term.values) + (start + column + TILE) * size[n];
            ++n;
        }
    }

    // Past the end of a tensor this does nothing.
    void fetch(int64_t i) const {
        for (int32_t k = 0; k < n; ++k) __builtin_prefetch(next[k] + i * size[k]);
    }
};

void read_sum(Tile &tile, const auxkern_term *terms, int32_t n_terms, int64_t row, int64_t column, int64_t count) {
    int32_t next = 1;
    if (n_terms >= 2 && is_plain(terms[0]) && is_plain(terms[1]) && terms[0].dtype == terms[1].dtype) {
        next = 2;
        switch (terms[0].dtype) {
            case AUXKERN_F32: read_pair<F32>(tile, terms[0], terms[1], row, column, count); break;
            case AUXKERN_F16: read_pair<F16>(tile, terms[0], terms[1], row, column, count); break;
            default: read_pair<BF16>(tile, terms[0], terms[1], row, column, count);
        }
    } else {
        read_term<false>(tile, terms[0], row, column, count);
    }
    for (; next < n_terms; ++next) read_term<true>(tile, terms[next], row, column, count);
}

}  // namespace
}  // namespace AUXKERN_ISA
}  // namespace auxkern
