// A decoder layer: norms, products, attention and residuals as stages of one parallel region.
#include "layer.h"

#include <pthread.h>

#include <cstring>

#include "attention.h"
#include "dispatch.h"
#include "products.h"
#include "stages.h"

namespace {

using namespace auxkern;

constexpr int64_t BLOCK_ROWS = 512;  // of a region: what stands between two products stays in the caches
constexpr int MOST_STAGES = 12;
constexpr int64_t ROW_FLOATS = 4096;  // of a piece of a stage that goes by rows

// Whose value is freed when its thread ends. A destructor of a thread_local would take the C++ run-time.
const pthread_key_t freed_at_end = [] {
    pthread_key_t key{};
    pthread_key_create(&key, &std::free);
    return key;
}();

// Memory of a thread that is taken once and grows: a call of a layer is too short to ask for it anew.
struct Kept {
    char *memory = nullptr;
    size_t bytes = 0;

    char *grown(size_t wanted) {
        if (wanted > bytes) {
            std::free(memory);
            memory = static_cast<char *>(std::aligned_alloc(64, wanted));
            bytes = memory ? wanted : 0;
            pthread_setspecific(freed_at_end, memory);
        }
        return memory;
    }
};
thread_local Kept kept;

using NormRow = decltype(&generic::norm_row);
using AddNormedRow = decltype(&generic::add_normed_row);
using SplitRows = decltype(&generic::split_rows);

// One product of a block, and the rows that its first stage takes.
struct Product {
    ProductKernels kernels;
    auxkern_product_call call;
    ProductTask task;

    int64_t weights() const { return task.product->N * task.product->K; }
    bool prepares() const { return kernels.prepare != nullptr; }
    void prepare(int64_t begin, int64_t end) const {
        if (prepares()) kernels.prepare(task, begin, end, nullptr);
    }
};

struct LayerTask {
    LayerRows rows;
    NormRow norm_row;
    AddNormedRow add_normed_row;
    SplitRows split_rows;
    Kernel<AttentionTask> attend;
    auxkern_attention attention;
    Product qkv, output, up, down;
    char *prepared;  // rows of the product that comes next
    float *scratch;
    int64_t threads, scratch_floats;
    NextCache cache;
    bool has_next;  // whether `cache` is that of a layer that follows

    const float *x(int64_t m) const { return rows.call->x + (rows.first + m) * rows.layer->D; }
    float *y(int64_t m) const { return rows.call->y + (rows.first + m) * rows.layer->D; }
    float *normed(int64_t m) const { return rows.normed + m * rows.layer->D; }
    float *after(int64_t m) const { return rows.after + m * rows.layer->D; }
};

bool is_normed(const auxkern_norm &norm) { return norm.kind != AUXKERN_NORM_NONE; }

// ---- stages ---------------------------------------------------------------------------------

void enter(const LayerTask &task, int64_t begin, int64_t end, float *) {
    const auxkern_layer &layer = *task.rows.layer;
    if (is_normed(layer.attention_norm))
        for (int64_t m = begin; m < end; ++m) task.norm_row(layer.attention_norm, task.x(m), task.normed(m), layer.D);
    task.qkv.prepare(begin, end);
}

void split(const LayerTask &task, int64_t begin, int64_t end, float *) { task.split_rows(task.rows, begin, end); }

void attend(const LayerTask &task, int64_t begin, int64_t end, float *scratch) {
    const auxkern_layer &layer = *task.rows.layer;
    // The residual stream begins as what came in; products add to it.
    if (!is_normed(layer.attention_after))
        for (int64_t m = (begin + layer.key_heads - 1) / layer.key_heads; m * layer.key_heads < end; ++m)
            std::memcpy(task.y(m), task.x(m), sizeof(float) * size_t(layer.D));
    const int64_t first = task.rows.first * layer.key_heads;
    task.attend(AttentionTask{&task.attention}, first + begin, first + end, scratch);
}

void between(const LayerTask &task, int64_t begin, int64_t end, float *) {
    const auxkern_layer &layer = *task.rows.layer;
    const auxkern_norm &norm = layer.parallel ? layer.attention_norm : layer.mlp_norm;
    for (int64_t m = begin; m < end; ++m) {
        if (is_normed(layer.attention_after))
            task.add_normed_row(layer.attention_after, task.after(m), task.x(m), task.y(m), layer.D);
        if (is_normed(norm)) task.norm_row(norm, layer.parallel ? task.x(m) : task.y(m), task.normed(m), layer.D);
    }
    task.up.prepare(begin, end);
}

void leave(const LayerTask &task, int64_t begin, int64_t end, float *) {
    const auxkern_layer &layer = *task.rows.layer;
    for (int64_t m = begin; m < end; ++m)
        task.add_normed_row(layer.mlp_after, task.after(m), task.y(m), task.y(m), layer.D);
}

template <Product LayerTask::*product>
void prepare(const LayerTask &task, int64_t begin, int64_t end, float *) {
    (task.*product).prepare(begin, end);
}

template <Product LayerTask::*product>
void multiply(const LayerTask &task, int64_t begin, int64_t end, float *scratch) {
    const Product &one = task.*product;
    one.kernels.multiply(one.task, begin, end, scratch);
}

using LayerStages = Stages<LayerTask, MOST_STAGES>;

Stage<LayerTask> by_rows(Kernel<LayerTask> kernel, const LayerTask &task) {
    const int64_t share = (task.rows.count + task.threads - 1) / task.threads, few = ROW_FLOATS / task.rows.layer->D;
    return {kernel, task.rows.count, std::max<int64_t>(1, std::min(share, few))};
}

void add_projection(LayerStages &stages, const LayerTask &task) {
    if (is_normed(task.rows.layer->attention_norm) || task.qkv.prepares()) stages.add(by_rows(enter, task));
    stages.add({multiply<&LayerTask::qkv>, task.qkv.task.pieces(), 1});
    stages.add(by_rows(split, task));
}

void add_rest(LayerStages &stages, const LayerTask &task) {
    const auxkern_layer &layer = *task.rows.layer;
    constexpr int64_t MIN_PRODUCTS = 1 << 13;
    const int64_t work = layer.heads / layer.key_heads * std::max<int64_t>(1, task.attention.P) * layer.head_width;
    const int64_t pieces = task.rows.count * layer.key_heads;
    // A piece fetches keys for the next one, which should be of the same thread.
    const int64_t neighbours = std::min(2 * layer.key_heads, pieces / (8 * task.threads));
    stages.add({attend, pieces, std::max<int64_t>({1, neighbours, MIN_PRODUCTS / work})});
    if (task.output.prepares()) stages.add(by_rows(prepare<&LayerTask::output>, task));
    stages.add({multiply<&LayerTask::output>, task.output.task.pieces(), 1});
    const bool norms = is_normed(layer.attention_after) || is_normed(layer.parallel ? layer.attention_norm : layer.mlp_norm);
    if (norms || task.up.prepares()) stages.add(by_rows(between, task));
    stages.add({multiply<&LayerTask::up>, task.up.task.pieces(), 1});
    if (task.down.prepares()) stages.add(by_rows(prepare<&LayerTask::down>, task));
    stages.add({multiply<&LayerTask::down>, task.down.task.pieces(), 1});
    if (is_normed(layer.mlp_after)) stages.add(by_rows(leave, task));
}

// ---- a block of rows --------------------------------------------------------------------------

// Takes parts of one piece of memory, each aligned.
struct Parts {
    char *memory;
    size_t taken = 0;

    template <class T>
    T *take(int64_t bytes) {
        T *part = memory ? reinterpret_cast<T *>(memory + taken) : nullptr;
        taken += size_t(rounded_up(bytes, 64));
        return part;
    }
};

struct Sizes {
    const float *x;
    float *y;
    int64_t x_stride, y_stride, columns;
    int32_t epilogue, activation;
};

void set(Product &product, const auxkern_layer_product &of, const LayerRows &rows, const Sizes &sizes, char *prepared) {
    product.call = {rows.count, sizes.x, sizes.y, sizes.x_stride, sizes.y_stride, sizes.columns, of.row_group,
                    sizes.epilogue, sizes.activation};
    product.task = product_task(of.weight, product.call, prepared);
}

// The memory of a block and its products; with none, only its size.
size_t lay_out(LayerTask &task, char *memory) {
    LayerRows &rows = task.rows;
    const auxkern_layer &layer = *rows.layer;
    const int64_t widths = rows.query_width() + 2 * rows.key_width(), row = int64_t(sizeof(float)) * rows.count;
    Parts parts{memory};
    if (!rows.call->query) rows.query = parts.take<float>(int64_t(sizeof(float)) * rows.call->B * rows.call->T * rows.query_width());
    rows.normed = parts.take<float>(row * layer.D);
    rows.qkv = parts.take<float>(row * widths);
    rows.inner = parts.take<float>(row * layer.inner);
    rows.after = parts.take<float>(row * layer.D);
    int64_t bytes = 0;
    for (const auxkern_layer_product *product : {&layer.qkv, &layer.output, &layer.up, &layer.down})
        bytes = std::max(bytes, row_layout(product->weight, product->row_group).bytes);
    task.prepared = parts.take<char>(bytes * rows.count);
    task.scratch_floats = rounded_up(scratch_size(AttentionTask{&task.attention}), 16);
    task.scratch = parts.take<float>(int64_t(sizeof(float)) * task.scratch_floats * task.threads);
    return parts.taken;
}

void connect(LayerTask &task) {
    const LayerRows &rows = task.rows;
    char *prepared = task.prepared;
    const auxkern_layer &layer = *rows.layer;
    const int64_t widths = rows.query_width() + 2 * rows.key_width();
    float *y = task.y(0), *heads = rows.query + rows.first * rows.query_width();
    const float *x = is_normed(layer.attention_norm) ? rows.normed : task.x(0);
    set(task.qkv, layer.qkv, rows, {x, rows.qkv, layer.D, widths, widths, AUXKERN_STORE, AUXKERN_IDENTITY}, prepared);
    const bool after = is_normed(layer.attention_after), last = is_normed(layer.mlp_after);
    set(task.output, layer.output, rows,
        {heads, after ? rows.after : y, rows.query_width(), layer.D, layer.D, after ? AUXKERN_STORE : AUXKERN_ADD, AUXKERN_IDENTITY},
        prepared);
    const float *read = is_normed(layer.parallel ? layer.attention_norm : layer.mlp_norm) ? rows.normed
                        : layer.parallel                                                  ? task.x(0)
                                                                                          : y;
    set(task.up, layer.up, rows,
        {read, rows.inner, layer.D, layer.inner, layer.inner, layer.gated ? AUXKERN_GATE : AUXKERN_STORE, layer.activation}, prepared);
    set(task.down, layer.down, rows,
        {rows.inner, last ? rows.after : y, layer.inner, layer.D, layer.D, last ? AUXKERN_STORE : AUXKERN_ADD, AUXKERN_IDENTITY},
        prepared);
}

auxkern_attention attention_of(const auxkern_layer &layer, const auxkern_layer_call &call, float *query) {
    const int64_t W = layer.head_width, row = layer.heads * W;
    return {call.B, call.T, call.P, W, layer.heads, layer.key_heads, query, call.T * row, W, row,
            call.key, call.key_stride_batch, call.key_stride_head, call.key_stride_column,
            call.value, call.value_stride_batch, call.value_stride_head, call.value_stride_column,
            call.mask, call.mask_stride_batch, call.mask_stride_query, call.mask_stride_column, layer.scale, call.cache_dtype, query};
}

// The next layer's cache, if its memory is of the kind that can be asked for, and not more than stays in a cache.
void look_ahead(LayerTask &task, const auxkern_layer &layer, const auxkern_layer_call &call) {
    constexpr int64_t MOST_BYTES = 16 << 20;
    const int64_t W = layer.head_width, bytes = 2 * entry_bytes(call.cache_dtype) * call.B * layer.key_heads * call.P * W;
    if (call.T != 1 || call.B > NextCache::MOST_SEQUENCES || !(call.stages & AUXKERN_LAYER_ATTEND) || bytes > MOST_BYTES ||
        call.key_stride_column != W || call.value_stride_column != W)
        return;
    task.has_next = true;
    task.cache.call = &call;
    task.cache.key_heads = layer.key_heads;
    for (int64_t b = 0; b < call.B; ++b) {
        const uint8_t *mask = call.mask ? call.mask + b * call.mask_stride_batch : nullptr;
        int64_t first = 0;
        while (mask && first < call.P && !mask[first * call.mask_stride_column]) ++first;
        task.cache.first[b] = int32_t(first);
    }
}

// Every product asks for as much of it as it is of the layer.
void share_cache(LayerTask &task) {
    if (!task.has_next) return;
    int64_t all = 0, done = 0;
    for (const Product *product : {&task.qkv, &task.output, &task.up, &task.down}) all += product->weights();
    for (Product *product : {&task.qkv, &task.output, &task.up, &task.down}) {
        product->task.cache = &task.cache;
        product->task.cache_begin = task.cache.chunks() * done / all;
        done += product->weights();
        product->task.cache_end = task.cache.chunks() * done / all;
    }
}

// Rows [first, first + count) of the call through some stages, in memory that is there.
void run_block(LayerTask &task, char *memory, int64_t first, int64_t count, int64_t stages, const auxkern_execution &execution) {
    task.rows.first = first;
    task.rows.count = count;
    lay_out(task, memory);
    task.attention = attention_of(*task.rows.layer, *task.rows.call, task.rows.query);
    connect(task);
    share_cache(task);
    LayerStages all(task, task.scratch, task.scratch_floats);
    if (stages & AUXKERN_LAYER_PROJECT) add_projection(all, task);
    if (stages & AUXKERN_LAYER_ATTEND) add_rest(all, task);
    in_parallel(LayerStages::body, &all, unsigned(task.threads), execution);
}

int64_t useful_threads(const auxkern_layer &layer, const auxkern_layer_call &call, const auxkern_execution &execution) {
    constexpr int64_t MIN_PRODUCTS_PER_THREAD = 1 << 16;  // about 10 us of work, what a thread costs
    int64_t products = 0;
    if (call.stages & AUXKERN_LAYER_PROJECT) products += layer.qkv.weight.N * layer.D;
    if (call.stages & AUXKERN_LAYER_ATTEND)
        products += (layer.output.weight.K + layer.up.weight.N + layer.inner) * layer.D + 2 * layer.heads * layer.head_width * call.P;
    return std::min<int64_t>(execution.threads, call.B * call.T * products / MIN_PRODUCTS_PER_THREAD + 1);
}

bool is_bad(const auxkern_layer_product &of, int64_t N, int64_t K, int32_t turns) {
    const auxkern_product &product = of.weight;
    auxkern_product_call empty{};
    empty.row_group = of.row_group;
    empty.epilogue = product.turns == 2 ? AUXKERN_GATE : AUXKERN_STORE;
    return product.N != N || product.K != K || product.turns != turns || auxkern::is_bad(product) || auxkern::is_bad(product, empty) ||
           !product.values || (product.kind == AUXKERN_PACKED_I8 && !product.scales);
}

bool is_bad(const auxkern_norm &norm) {
    return norm.kind < AUXKERN_NORM_NONE || norm.kind > AUXKERN_NORM_LAYER || !(norm.eps >= 0);
}

bool is_bad(const auxkern_layer &layer) {
    if (layer.D < 1 || layer.inner < 1 || layer.head_width < 16 || layer.head_width % 16 != 0 || layer.key_heads < 1 ||
        layer.heads < 1 || layer.heads % layer.key_heads != 0 || !(layer.clip >= 0))
        return true;
    for (const auxkern_norm *norm : {&layer.attention_norm, &layer.attention_after, &layer.mlp_norm, &layer.mlp_after,
                                     &layer.query_norm, &layer.key_norm})
        if (is_bad(*norm)) return true;
    const int64_t queries = layer.heads * layer.head_width, keys = layer.key_heads * layer.head_width;
    const int32_t turns = layer.gated ? 2 : 1;
    return is_bad(layer.qkv, queries + 2 * keys, layer.D, 1) || is_bad(layer.output, layer.D, queries, 1) ||
           is_bad(layer.up, turns * layer.inner, layer.D, turns) || is_bad(layer.down, layer.D, layer.inner, 1) ||
           layer.activation < AUXKERN_IDENTITY || layer.activation > AUXKERN_RELU || (layer.parallel && is_normed(layer.attention_after));
}

bool is_bad(const auxkern_layer_call &call, const auxkern_layer &layer) {
    const bool projects = call.stages & AUXKERN_LAYER_PROJECT, attends = call.stages & AUXKERN_LAYER_ATTEND;
    if (call.B < 0 || call.T < 0 || call.P < call.T || call.P > INT32_MAX || call.stages < 1 || call.stages > 3 || is_bad_cache(call.cache_dtype))
        return true;
    if (call.B == 0 || call.T == 0) return false;
    return call.rotary < 0 || call.rotary % 2 != 0 || call.rotary > layer.head_width || !call.x ||
           (projects && (!call.new_key || !call.new_value || (call.rotary > 0 && (!call.cos || !call.sin)))) ||
           (attends && (!call.y || !call.key || !call.value)) || (projects != attends && !call.query);
}

// One layer; `next`, if any, is the call of the layer that follows.
int32_t forward(const auxkern_layer *layer, const auxkern_layer_call *call, const auxkern_layer *next_layer,
                const auxkern_layer_call *next, const auxkern_execution *execution) {
    if (!layer || !call || !execution || execution->threads < 1 || is_bad(*layer) || is_bad(*call, *layer))
        return AUXKERN_BAD_ARGUMENT;
    if (execution->isa != AUXKERN_ISA_BEST && !has_isa(execution->isa)) return AUXKERN_UNSUPPORTED_ISA;
    const int64_t rows = call->B * call->T, block = std::min(rows, BLOCK_ROWS);
    if (rows == 0) return AUXKERN_OK;
    const int32_t isa = resolve(execution->isa);
    LayerTask task{};
    task.rows.layer = layer;
    task.rows.call = call;
    task.rows.query = call->query;
    task.rows.count = block;
    task.norm_row = AUXKERN_PICK(NormRow, norm_row, isa);
    task.add_normed_row = AUXKERN_PICK(AddNormedRow, add_normed_row, isa);
    task.split_rows = AUXKERN_PICK(SplitRows, split_rows, isa);
    task.attend = AUXKERN_PICK(Kernel<AttentionTask>, attention, isa);
    task.attention = attention_of(*layer, *call, nullptr);
    task.threads = useful_threads(*layer, *call, *execution);
    task.qkv.kernels = product_kernels(layer->qkv.weight.kind, isa);
    task.output.kernels = product_kernels(layer->output.weight.kind, isa);
    task.up.kernels = product_kernels(layer->up.weight.kind, isa);
    task.down.kernels = product_kernels(layer->down.weight.kind, isa);
    if (next && next_layer && call->T == 1 && !is_bad(*next_layer) && !is_bad(*next, *next_layer))
        look_ahead(task, *next_layer, *next);
    char *memory = kept.grown(lay_out(task, nullptr));
    if (!memory) return AUXKERN_OUT_OF_MEMORY;
    if (block == rows) {
        run_block(task, memory, 0, rows, call->stages, *execution);
        return AUXKERN_OK;
    }
    // Attention reads what all rows before a row have written, so every block is projected first.
    for (int64_t stages : {AUXKERN_LAYER_PROJECT, AUXKERN_LAYER_ATTEND})
        if (call->stages & stages)
            for (int64_t first = 0; first < rows; first += block)
                run_block(task, memory, first, std::min(block, rows - first), stages, *execution);
    return AUXKERN_OK;
}

struct NormTask {
    const auxkern_norm *norm;
    NormRow norm_row;
    const float *x;
    float *y;
    int64_t width;
};

void norm_rows(const NormTask &task, int64_t begin, int64_t end, float *) {
    for (int64_t m = begin; m < end; ++m)
        task.norm_row(*task.norm, task.x + m * task.width, task.y + m * task.width, task.width);
}

}  // namespace

extern "C" int32_t auxkern_norm_forward(const auxkern_norm *norm, const float *x, float *y, int64_t rows, int64_t width,
                                        const auxkern_execution *execution) {
    if (!norm || !execution || execution->threads < 1 || is_bad(*norm) || !is_normed(*norm) || rows < 0 || width < 1 ||
        (rows > 0 && (!x || !y)))
        return AUXKERN_BAD_ARGUMENT;
    if (execution->isa != AUXKERN_ISA_BEST && !has_isa(execution->isa)) return AUXKERN_UNSUPPORTED_ISA;
    constexpr int64_t MIN_FLOATS_PER_THREAD = 1 << 16;  // about 10 us of work, what a thread costs
    const NormTask task{norm, AUXKERN_PICK(NormRow, norm_row, resolve(execution->isa)), x, y, width};
    const int64_t threads = std::min<int64_t>(execution->threads, rows * width / MIN_FLOATS_PER_THREAD + 1);
    return run<NormTask>(norm_rows, task, rows, std::max<int64_t>(1, ROW_FLOATS / width), 0, unsigned(threads), *execution);
}

extern "C" int32_t auxkern_layer_forward(const auxkern_layer *layer, const auxkern_layer_call *call,
                                         const auxkern_execution *execution) {
    return forward(layer, call, nullptr, nullptr, execution);
}

extern "C" int32_t auxkern_layers_forward(const auxkern_layer *const *layers, const auxkern_layer_call *calls, int64_t count,
                                          const auxkern_execution *execution) {
    if (!layers || !calls || count < 0) return AUXKERN_BAD_ARGUMENT;
    for (int64_t i = 0; i < count; ++i) {
        const bool last = i + 1 == count;
        const int32_t status =
            forward(layers[i], calls + i, last ? nullptr : layers[i + 1], last ? nullptr : calls + i + 1, execution);
        if (status != AUXKERN_OK) return status;
    }
    return AUXKERN_OK;
}
