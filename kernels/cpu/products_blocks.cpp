// Products of rows of bytes with weights in the blocks of a GGUF file: integer sums, exact, then scaled in float32.
//
// Built without contraction of products and sums, so that an output is the same to the last bit on every
// instruction set: sum over the blocks of (float(integer sum) * row's scale) * d, and of Q4_1
// + (float(sum of the row's bytes) * row's scale) * m.
#include "integer_dots.h"
#include "product_tiles.h"

namespace auxkern {
namespace AUXKERN_ISA {
namespace {

constexpr int STEPS = AUXKERN_BLOCK / 4;  // k that a lane multiplies at once, in a block

inline vi load_integers(const char *p) {
    vi x;
    memcpy(&x, p, sizeof x);
    return x;
}

inline vf load_halves(const char *p) { return F16::load(reinterpret_cast<const uint16_t *>(p)); }

// The integers of a block, of one vector of outputs; what a row adds to their sum is its own affair.
struct Eights {
    static constexpr int VALUES = 8 * 4 * PANEL;  // bytes of a panel's block

    static void unpack(const char *at, vi (&weight)[STEPS]) {
#pragma GCC unroll 8
        for (int j = 0; j < STEPS; ++j) weight[j] = load_integers(at + 4 * PANEL * j);
    }
    static vi dot(const vi (&weight)[STEPS], const vi (&x)[STEPS], vi sum) {
#pragma GCC unroll 8
        for (int j = 0; j < STEPS; ++j) sum = add_four(sum, weight[j], x[j]);
        return sum;
    }
};

struct Fours {
    static constexpr int VALUES = 4 * 4 * PANEL;

    static void unpack(const char *at, vi (&weight)[STEPS]) {
        const vi low = vi{} + 0x0f0f0f0f;
#pragma GCC unroll 4
        for (int j = 0; j < STEPS / 2; ++j) {
            const vi both = load_integers(at + 4 * PANEL * j);
            weight[j] = both & low;
            weight[j + STEPS / 2] = (both >> 4) & low;
        }
    }
    static vi dot(const vi (&weight)[STEPS], const vi (&x)[STEPS], vi sum) {
#if defined(__AVX2__) && !defined(__AVX512VNNI__) && !defined(__AVXVNNI__)
        // Sixteen products of at most 15 * 127 stay in 16 bits.
#if AUXKERN_LANES == 16
        __m512i pairs = _mm512_setzero_si512();
#pragma GCC unroll 8
        for (int j = 0; j < STEPS; ++j)
            pairs = _mm512_add_epi16(pairs, _mm512_maddubs_epi16((__m512i)weight[j], (__m512i)x[j]));
        return sum + (vi)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#else
        __m256i pairs = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (int j = 0; j < STEPS; ++j)
            pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16((__m256i)weight[j], (__m256i)x[j]));
        return sum + (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#endif
#else
        return Eights::dot(weight, x, sum);
#endif
    }
};

// A kind of block, and what stands beside a row's bytes for each: where its integer sums start, or the sum of its
// values as the bytes have them.
struct Q8_0 : Eights {
    static constexpr bool MINIMA = false;
};

struct Q4_0 : Fours {
    static constexpr bool MINIMA = false;
};

struct Q4_1 : Fours {
    static constexpr bool MINIMA = true;
};

template <class Block>
struct Stored {
    static constexpr int64_t STEP = AUXKERN_BLOCK;  // k of a step
    static constexpr int ROWS = LANES == 16 ? 12 : LANES == 8 ? 6 : 2;
    static constexpr int64_t BYTES = Block::VALUES + (Block::MINIMA ? 4 : 2) * PANEL;

    // A block of one panel fills the registers; rows take turns with it.
    static constexpr int panels(int) { return 1; }

    template <int R, int P>
    static void tile(const ProductTask &task, const Place &place) {
        const RowLayout &layout = task.layout;
        const int64_t blocks = task.product->K / AUXKERN_BLOCK;
        const char *at = static_cast<const char *>(task.product->values) + place.panel * blocks * BYTES;
        const char *row = task.prepared + place.row * layout.bytes;
        Rows<R> x(row, layout.bytes), scales(row + layout.scales, layout.bytes), beside(row + layout.starts, layout.bytes);
        Ahead ahead = place.ahead;
        vf total[R][VECTORS];
        clear(total);
        for (int64_t block = 0; block < blocks; ++block, at += BYTES) {
            ahead.ask<(BYTES + 63) / 64>();
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) {
                vi weight[STEPS];
                Block::unpack(at + 4 * LANES * v, weight);
                const vf d = in_register(load_halves(at + Block::VALUES + 2 * LANES * v));
                const vf m = Block::MINIMA ? in_register(load_halves(at + Block::VALUES + 2 * PANEL + 2 * LANES * v)) : d;
#pragma GCC unroll 12
                for (int r = 0; r < R; ++r) {
                    vi a[STEPS];
#pragma GCC unroll 8
                    for (int j = 0; j < STEPS; ++j) a[j] = vi{} + x.template at<int32_t>(r, j);
                    const vi start = Block::MINIMA ? vi{} : vi{} + beside.template at<int32_t>(r);
                    const vf exact = __builtin_convertvector(Block::dot(weight, a, start), vf);
                    vf part = exact * scales.template at<float>(r) * d;
                    if (Block::MINIMA) part += beside.template at<float>(r) * m;
                    total[r][v] += part;
                }
            }
            x.advance(AUXKERN_BLOCK);
            scales.advance(4);
            beside.advance(4);
        }
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) store(place.sums + r * SUMS + v * LANES, total[r][v]);
    }
};

}  // namespace

void prepare_blocks(const ProductTask &task, int64_t begin, int64_t end, float *scratch) {
    prepare_i8(task, begin, end, scratch);
    const RowLayout &layout = task.layout;
    for (int64_t row = begin; row < end; ++row) {
        char *to = task.prepared + row * layout.bytes;
        const float *scales = reinterpret_cast<const float *>(to + layout.scales);
        // Until here -128 times the sum of a run's bytes, which is what Q8_0 starts from.
        int32_t *starts = reinterpret_cast<int32_t *>(to + layout.starts);
        for (int64_t run = 0; run < layout.runs; ++run) {
            if (task.product->kind == AUXKERN_PACKED_Q4_0) starts[run] /= 16;
            if (task.product->kind != AUXKERN_PACKED_Q4_1) continue;
            const float sum = float(starts[run] / -128) * scales[run];
            memcpy(starts + run, &sum, 4);
        }
    }
}

void multiply_q8_0(const ProductTask &task, int64_t begin, int64_t end, float *) { multiply<Stored<Q8_0>>(task, begin, end); }
void multiply_q4_0(const ProductTask &task, int64_t begin, int64_t end, float *) { multiply<Stored<Q4_0>>(task, begin, end); }
void multiply_q4_1(const ProductTask &task, int64_t begin, int64_t end, float *) { multiply<Stored<Q4_1>>(task, begin, end); }

}  // namespace AUXKERN_ISA
}  // namespace auxkern
