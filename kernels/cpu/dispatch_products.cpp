// The C interface of products with packed weights: checks, kernels of a kind, threads.
#include "dispatch.h"
#include "products.h"

namespace auxkern {
namespace {

using Stage = void (*)(const ProductTask &, int64_t, int64_t, float *);

template <class Function>
Function of_pairs(int32_t isa, Function base, Function dots) {
    return isa == AUXKERN_ISA_AVX512_BF16 ? dots : base;
}

template <class Function>
Function of_bytes(int32_t isa, Function base, Function avx2, Function avx512) {
    if (isa == AUXKERN_ISA_AVX2_VNNI) return avx2;
    return isa == AUXKERN_ISA_AVX512_VNNI || isa == AUXKERN_ISA_AVX512_BF16 ? avx512 : base;
}

bool is_floats(int32_t kind) { return kind <= AUXKERN_PACKED_BF16 || kind >= AUXKERN_PACKED_Q8_0_WIDENED; }

// Whether rows can be given scales so that every integer sum lies in one group of the weight and one of the row.
bool shares_runs(const auxkern_product &product, int64_t row_group) {
    if (!is_bytes(product.kind) || row_group == 0 || row_group >= product.K) return row_group >= 0;
    if (is_stored(product.kind)) return row_group > 0 && row_group % AUXKERN_BLOCK == 0;
    const bool nested = row_group % product.group == 0 || product.group % row_group == 0 || product.group == product.K;
    return row_group > 0 && row_group % 4 == 0 && nested;
}

int32_t check(const auxkern_execution *execution) {
    if (!execution || execution->threads < 1) return AUXKERN_BAD_ARGUMENT;
    return execution->isa != AUXKERN_ISA_BEST && !has_isa(execution->isa) ? AUXKERN_UNSUPPORTED_ISA : AUXKERN_OK;
}

unsigned useful_threads(const auxkern_execution &execution, int64_t pieces, int64_t work, int64_t work_per_thread) {
    return static_cast<unsigned>(std::min<int64_t>({execution.threads, pieces, work / work_per_thread + 1}));
}

}  // namespace

bool is_bad(const auxkern_product &product) {
    if (product.N < 1 || product.K < 1 || product.kind < AUXKERN_PACKED_F32 || product.kind > AUXKERN_PACKED_Q4_1_WIDENED)
        return true;
    if (product.turns != 1 && (product.turns != 2 || product.N % 2 != 0)) return true;
    if (is_stored(product.kind)) return product.group != AUXKERN_BLOCK || product.K % AUXKERN_BLOCK != 0;
    if (product.kind != AUXKERN_PACKED_I8) return product.group != 0;
    return product.group < 1 || product.group > AUXKERN_MAX_GROUP || product.group > product.K ||
           (product.group % 4 != 0 && product.group != product.K);
}

bool is_bad(const auxkern_product &product, const auxkern_product_call &call) {
    const bool gates = call.epilogue == AUXKERN_GATE, empty = call.M == 0 || call.columns == 0;
    return call.M < 0 || call.columns < 0 || call.columns > product.N / product.turns || call.x_stride < 0 ||
           call.y_stride < call.columns || call.epilogue < AUXKERN_STORE || call.epilogue > AUXKERN_GATE ||
           call.activation < AUXKERN_IDENTITY || call.activation > AUXKERN_RELU || (product.turns == 2) != gates ||
           (call.epilogue == AUXKERN_ADD && call.activation != AUXKERN_IDENTITY) ||
           !shares_runs(product, call.row_group) ||
           (!empty && (!call.x || !call.y || !product.values || (product.kind == AUXKERN_PACKED_I8 && !product.scales)));
}

ProductKernels product_kernels(int32_t kind, int32_t isa) {
    isa = resolve(isa);
#if defined(__x86_64__)
#define AUXKERN_PICK_PAIRS(name) of_pairs<Stage>(isa, AUXKERN_PICK(Stage, name, isa), avx512_bf16::name)
#define AUXKERN_PICK_BYTES(name) of_bytes<Stage>(isa, AUXKERN_PICK(Stage, name, isa), avx2_vnni::name, avx512_vnni::name)
#else
#define AUXKERN_PICK_PAIRS(name) AUXKERN_PICK(Stage, name, isa)
#define AUXKERN_PICK_BYTES(name) AUXKERN_PICK(Stage, name, isa)
#endif
    switch (kind) {
        case AUXKERN_PACKED_F32: return {nullptr, AUXKERN_PICK(Stage, multiply_f32, isa)};
        case AUXKERN_PACKED_F16: return {nullptr, AUXKERN_PICK(Stage, multiply_f16, isa)};
        case AUXKERN_PACKED_BF16: return {nullptr, AUXKERN_PICK(Stage, multiply_bf16, isa)};
        case AUXKERN_PACKED_BF16_PAIRS: return {AUXKERN_PICK_PAIRS(prepare_pairs), AUXKERN_PICK_PAIRS(multiply_pairs)};
        case AUXKERN_PACKED_I8: return {AUXKERN_PICK_BYTES(prepare_i8), AUXKERN_PICK_BYTES(multiply_i8)};
        case AUXKERN_PACKED_Q8_0: return {AUXKERN_PICK_BYTES(prepare_blocks), AUXKERN_PICK_BYTES(multiply_q8_0)};
        case AUXKERN_PACKED_Q4_0: return {AUXKERN_PICK_BYTES(prepare_blocks), AUXKERN_PICK_BYTES(multiply_q4_0)};
        case AUXKERN_PACKED_Q4_1: return {AUXKERN_PICK_BYTES(prepare_blocks), AUXKERN_PICK_BYTES(multiply_q4_1)};
        case AUXKERN_PACKED_Q8_0_WIDENED: return {nullptr, AUXKERN_PICK(Stage, multiply_q8_0_widened, isa)};
        case AUXKERN_PACKED_Q4_0_WIDENED: return {nullptr, AUXKERN_PICK(Stage, multiply_q4_0_widened, isa)};
        default: return {nullptr, AUXKERN_PICK(Stage, multiply_q4_1_widened, isa)};
    }
}

}  // namespace auxkern

using namespace auxkern;

extern "C" {

int32_t auxkern_product_forward(const auxkern_product *product, const auxkern_product_call *call,
                                const auxkern_execution *execution) {
    const int32_t status = check(execution);
    if (status != AUXKERN_OK) return status;
    if (!product || !call || is_bad(*product) || is_bad(*product, *call)) return AUXKERN_BAD_ARGUMENT;
    if (call->M == 0 || call->columns == 0) return AUXKERN_OK;
    ProductTask task = product_task(*product, *call, nullptr);
    const ProductKernels kernels = product_kernels(product->kind, execution->isa);
    std::unique_ptr<char, decltype(&std::free)> prepared(nullptr, &std::free);
    if (kernels.prepare) {
        prepared.reset(static_cast<char *>(std::aligned_alloc(64, size_t(task.prepared_bytes()))));
        if (!prepared) return AUXKERN_OUT_OF_MEMORY;
        task.prepared = prepared.get();
        constexpr int64_t MIN_NUMBERS_PER_THREAD = 1 << 17;  // about 10 us of work, what a thread costs
        const unsigned threads = useful_threads(*execution, call->M, call->M * product->K, MIN_NUMBERS_PER_THREAD);
        run<ProductTask>(kernels.prepare, task, call->M, int64_t(4), int64_t(0), threads, *execution);
    }
    // About 5 us of work.
    const int64_t min_products = is_floats(product->kind) ? 1 << 19 : is_bytes(product->kind) ? 1 << 21 : 1 << 20;
    const unsigned threads =
        useful_threads(*execution, task.pieces(), call->M * task.panels() * PANEL * product->K, min_products);
    // A piece asks for the memory of the next one, which its own thread should take.
    const int64_t grab = std::max<int64_t>(1, task.pieces() / (4 * threads));
    return run<ProductTask>(kernels.multiply, task, task.pieces(), grab, int64_t(0), threads, *execution);
}

int32_t auxkern_packed_size(const auxkern_product *product, auxkern_packed_sizes *sizes) {
    if (!product || !sizes || is_bad(*product)) return AUXKERN_BAD_ARGUMENT;
    *sizes = {panels_of(*product) * panel_bytes(*product), panels_of(*product) * groups_of(*product) * PANEL};
    return AUXKERN_OK;
}

int32_t auxkern_pack(const auxkern_product *product, const auxkern_weight_rows *weights, int32_t count, void *values,
                     float *scales, const auxkern_execution *execution) {
    const int32_t status = check(execution);
    if (status != AUXKERN_OK) return status;
    if (!product || is_bad(*product) || !weights || count < 1 || !values ||
        (product->kind == AUXKERN_PACKED_I8 && !scales))
        return AUXKERN_BAD_ARGUMENT;
    int64_t rows = 0;
    for (int32_t i = 0; i < count; ++i) {
        const auxkern_weight_rows &part = weights[i];
        const bool half = product->kind == AUXKERN_PACKED_F16 || product->kind == AUXKERN_PACKED_BF16;
        const bool known = is_stored(product->kind) || (part.dtype >= AUXKERN_F32 && part.dtype <= AUXKERN_BF16);
        if (part.rows < 0 || (part.rows > 0 && !part.weight) || !known ||
            (half && part.dtype != (product->kind == AUXKERN_PACKED_F16 ? AUXKERN_F16 : AUXKERN_BF16)))
            return AUXKERN_BAD_ARGUMENT;
        rows += part.rows;
    }
    if (rows != product->N) return AUXKERN_BAD_ARGUMENT;
    const int64_t panels = panels_of(*product);
    const std::unique_ptr<bool, decltype(&std::free)> not_finite(
        static_cast<bool *>(std::malloc(size_t(panels))), &std::free);
    if (!not_finite) return AUXKERN_OUT_OF_MEMORY;
    const PackingTask task{product, weights, count, static_cast<char *>(values), scales, not_finite.get()};
    constexpr int64_t MIN_NUMBERS_PER_THREAD = 1 << 14;
    const unsigned threads = useful_threads(*execution, panels, panels * PANEL * product->K, MIN_NUMBERS_PER_THREAD);
    const int32_t ran =
        run<PackingTask>(pack_panels, task, panels, int64_t(1), scratch_size(task), threads, *execution);
    if (ran != AUXKERN_OK) return ran;
    return std::any_of(not_finite.get(), not_finite.get() + panels, [](bool bad) { return bad; }) ? AUXKERN_NOT_FINITE
                                                                                                 : AUXKERN_OK;
}

}  // extern "C"
