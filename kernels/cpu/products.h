// What the dispatcher, or a kernel with stages of its own, hands to the products with packed weights.
//
// A product has two stages, both in pieces that may run in any order and on any thread: rows are
// prepared (rounded to what the weight's kind multiplies), then panels are multiplied. Kinds of float32
// arithmetic read the rows as they are and have no first stage.
#pragma once

#include "auxkern.h"

namespace auxkern {

constexpr int64_t PANEL = 16;              // outputs that stand together
constexpr int64_t PIECE_PANELS = 4;        // panels of a piece of work: whole cache lines of a row
constexpr int64_t ROW_BYTES = 512 << 10;   // of a piece: its rows stay in the second-level cache

static inline int64_t rounded_up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

// Whether a weight stands in the blocks of a GGUF file, which are not turned into other numbers.
static inline bool is_stored(int32_t kind) { return kind >= AUXKERN_PACKED_Q8_0 && kind <= AUXKERN_PACKED_Q4_1_WIDENED; }

// Whether rows are rounded to bytes, and products are of bytes.
static inline bool is_bytes(int32_t kind) { return kind >= AUXKERN_PACKED_I8 && kind <= AUXKERN_PACKED_Q4_1; }

// Bytes of a block of AUXKERN_BLOCK values, in a file and in a panel.
static inline int64_t block_bytes(int32_t kind) {
    if (kind == AUXKERN_PACKED_Q8_0 || kind == AUXKERN_PACKED_Q8_0_WIDENED) return 34;
    return kind == AUXKERN_PACKED_Q4_0 || kind == AUXKERN_PACKED_Q4_0_WIDENED ? 18 : 20;
}

// k that one element of a panel's row holds.
static inline int64_t step_of(int32_t kind) {
    if (kind == AUXKERN_PACKED_I8) return 4;
    return kind == AUXKERN_PACKED_BF16 || kind == AUXKERN_PACKED_BF16_PAIRS ? 2 : 1;
}

// Bytes of such an element.
static inline int64_t element_bytes(int32_t kind) {
    return kind == AUXKERN_PACKED_F16 ? 2 : 4;
}

static inline int64_t panels_of(const auxkern_product &product) {
    return product.turns * ((product.N / product.turns + PANEL - 1) / PANEL);
}

static inline int64_t panel_bytes(const auxkern_product &product) {
    if (is_stored(product.kind)) return product.K / AUXKERN_BLOCK * PANEL * block_bytes(product.kind);
    return rounded_up(product.K, step_of(product.kind)) / step_of(product.kind) * PANEL * element_bytes(product.kind);
}

static inline int64_t groups_of(const auxkern_product &product) {
    return product.kind == AUXKERN_PACKED_I8 ? (product.K + product.group - 1) / product.group : 0;
}

// How a row stands when it is prepared: values, and for each run of k the scale of the row's bytes and
// -128 times their sum, which is where an integer sum starts.
struct RowLayout {
    int64_t run, runs;  // k of an integer sum; how many
    int64_t scales, starts, bytes;
};

static inline RowLayout row_layout(const auxkern_product &product, int64_t row_group) {
    RowLayout layout = {0, 0, 0, 0, 0};
    if (product.kind == AUXKERN_PACKED_BF16_PAIRS) layout.bytes = rounded_up(2 * product.K, 64);
    if (is_bytes(product.kind)) {
        layout.run = row_group > 0 && row_group < product.group ? row_group : product.group;
        layout.runs = (product.K + layout.run - 1) / layout.run;
        layout.scales = rounded_up(product.K, 64);
        layout.starts = layout.scales + 4 * layout.runs;
        layout.bytes = rounded_up(layout.starts + 4 * layout.runs, 64);
    }
    // Rows that lie a power of two apart would meet in the same few sets of the cache.
    return layout.bytes % 512 == 0 && layout.bytes ? RowLayout{layout.run, layout.runs, layout.scales, layout.starts,
                                                               layout.bytes + 64} : layout;
}

static inline int64_t entry_bytes(int32_t dtype) { return dtype == AUXKERN_F32 ? 4 : 2; }

// Keys and values that the next layer's attention reads: a run of columns for each sequence, head and of the two.
// Attention waits for memory and products for arithmetic, so every tile of a product asks for some of them.
struct NextCache {
    static constexpr int64_t CHUNKS = 8;  // of a run
    static constexpr int64_t MOST_SEQUENCES = 512;

    const auxkern_layer_call *call;
    int64_t key_heads;
    int32_t first[MOST_SEQUENCES];  // column that a sequence sees

    struct Chunk {
        const char *at;
        int64_t bytes;
    };

    int64_t chunks() const { return call->B * key_heads * 2 * CHUNKS; }
    Chunk chunk(int64_t number) const {
        const int64_t run = number / CHUNKS, head = run / 2 % key_heads, b = run / 2 / key_heads, columns = call->P - first[b];
        const void *keys = run % 2 ? call->value : call->key;
        int64_t at = run % 2 ? b * call->value_stride_batch + head * call->value_stride_head
                             : b * call->key_stride_batch + head * call->key_stride_head;
        const int64_t stride = run % 2 ? call->value_stride_column : call->key_stride_column;
        const int64_t part = number % CHUNKS, begin = columns * part / CHUNKS, end = columns * (part + 1) / CHUNKS;
        at += (first[b] + begin) * stride;
        const int64_t entry = entry_bytes(call->cache_dtype);
        return {static_cast<const char *>(keys) + at * entry, (end - begin) * stride * entry};
    }
};

struct ProductTask {
    const auxkern_product *product;
    const auxkern_product_call *call;
    char *prepared;    // M rows of layout.bytes, aligned to 64; NULL where a row has none
    RowLayout layout;
    const NextCache *cache = nullptr;  // of which this product asks for chunks [begin, end)
    int64_t cache_begin = 0, cache_end = 0;

    int64_t prepared_bytes() const { return call->M * layout.bytes; }

    int64_t row_block() const {  // rows of a piece
        const int64_t bytes = layout.bytes ? layout.bytes : 4 * product->K;
        const int64_t rows = ROW_BYTES / bytes / 12 * 12;
        return rows < 12 ? 12 : rows;
    }
    int64_t panels() const {
        const int64_t turns = call->epilogue == AUXKERN_GATE ? 2 : 1;
        return turns * ((call->columns + PANEL - 1) / PANEL);
    }
    int64_t groups() const { return (panels() + PIECE_PANELS - 1) / PIECE_PANELS; }
    int64_t pieces() const { return groups() * ((call->M + row_block() - 1) / row_block()); }
};

static inline ProductTask product_task(const auxkern_product &product, const auxkern_product_call &call, char *prepared) {
    ProductTask task;
    task.product = &product;
    task.call = &call;
    task.prepared = prepared;
    task.layout = row_layout(product, call.row_group);
    return task;
}

// The two stages: rows [begin, end) of M, pieces [begin, end). Scratch memory is not needed.
struct ProductKernels {
    void (*prepare)(const ProductTask &, int64_t begin, int64_t end, float *);  // NULL: no such stage
    void (*multiply)(const ProductTask &, int64_t begin, int64_t end, float *);
};

// The kernels of a kind of weight at an instruction set that this CPU has.
ProductKernels product_kernels(int32_t kind, int32_t isa);

// Whether a call can be made with a product; sizes and pointers.
bool is_bad(const auxkern_product &product);
bool is_bad(const auxkern_product &product, const auxkern_product_call &call);

#define AUXKERN_DECLARE_PRODUCTS(isa)                                                    \
    namespace isa {                                                                      \
    void multiply_f32(const ProductTask &, int64_t begin, int64_t end, float *);         \
    void multiply_f16(const ProductTask &, int64_t begin, int64_t end, float *);         \
    void multiply_bf16(const ProductTask &, int64_t begin, int64_t end, float *);        \
    void prepare_pairs(const ProductTask &, int64_t begin, int64_t end, float *);        \
    void multiply_pairs(const ProductTask &, int64_t begin, int64_t end, float *);       \
    void prepare_i8(const ProductTask &, int64_t begin, int64_t end, float *);           \
    void multiply_i8(const ProductTask &, int64_t begin, int64_t end, float *);          \
    void prepare_blocks(const ProductTask &, int64_t begin, int64_t end, float *);       \
    void multiply_q8_0(const ProductTask &, int64_t begin, int64_t end, float *);        \
    void multiply_q4_0(const ProductTask &, int64_t begin, int64_t end, float *);        \
    void multiply_q4_1(const ProductTask &, int64_t begin, int64_t end, float *);        \
    void multiply_q8_0_widened(const ProductTask &, int64_t begin, int64_t end, float *); \
    void multiply_q4_0_widened(const ProductTask &, int64_t begin, int64_t end, float *); \
    void multiply_q4_1_widened(const ProductTask &, int64_t begin, int64_t end, float *); \
    }

AUXKERN_DECLARE_PRODUCTS(generic)
#if defined(__x86_64__)
AUXKERN_DECLARE_PRODUCTS(avx2)
AUXKERN_DECLARE_PRODUCTS(avx2_vnni)    // of bytes only
AUXKERN_DECLARE_PRODUCTS(avx512)
AUXKERN_DECLARE_PRODUCTS(avx512_vnni)  // of bytes only
AUXKERN_DECLARE_PRODUCTS(avx512_bf16)  // of pairs only
#endif

struct PackingTask {
    const auxkern_product *product;
    const auxkern_weight_rows *weights;
    int32_t count;
    char *values;
    float *scales;
    bool *not_finite;  // one for each panel
};

// Panels [begin, end); the same bytes on every CPU.
void pack_panels(const PackingTask &, int64_t begin, int64_t end, float *scratch);
static inline int64_t scratch_size(const PackingTask &task) { return task.product->K; }

}  // namespace auxkern
