// The C interface: checks, choice of instruction set, threads.
#include <cmath>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "attention.h"
#include "cross_entropy.h"
#include "dispatch.h"
#include "heads.h"
#include "linear.h"
#include "sample.h"

#if defined(__x86_64__)
namespace {

// Bits of CPUID leaf 7, subleaf 1, which not every compiler's __builtin_cpu_supports knows by name. The
// operating system's part, the registers, is that of AVX2 and AVX-512. Asked for once: a virtual machine
// takes microseconds to answer.
bool has_feature(int bit) {
    static std::atomic<int64_t> features{-1};
    if (features.load(std::memory_order_relaxed) < 0) {
        unsigned a = 0, b = 0, c = 0, d = 0;
        features.store(__get_cpuid_count(7, 1, &a, &b, &c, &d) ? a : 0, std::memory_order_relaxed);
    }
    return features.load(std::memory_order_relaxed) >> bit & 1;
}

bool has_avx_vnni() { return has_feature(4); }
bool has_avx512_bf16() { return has_feature(5); }

}  // namespace
#endif

namespace auxkern {

bool has_isa(int32_t isa) {
    switch (isa) {
        case AUXKERN_ISA_GENERIC: return true;
#if defined(__x86_64__)
        case AUXKERN_ISA_AVX2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
        case AUXKERN_ISA_AVX512:
            return has_isa(AUXKERN_ISA_AVX2) && __builtin_cpu_supports("avx512f") &&
                   __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512vl");
        case AUXKERN_ISA_AVX2_VNNI: return has_isa(AUXKERN_ISA_AVX2) && has_avx_vnni();
        case AUXKERN_ISA_AVX512_VNNI: return has_isa(AUXKERN_ISA_AVX512) && __builtin_cpu_supports("avx512vnni");
        case AUXKERN_ISA_AVX512_BF16: return has_isa(AUXKERN_ISA_AVX512_VNNI) && has_avx512_bf16();
#endif
        default: return false;
    }
}

int32_t best_isa() {
    for (int32_t isa : {AUXKERN_ISA_AVX512_BF16, AUXKERN_ISA_AVX512_VNNI, AUXKERN_ISA_AVX512, AUXKERN_ISA_AVX2_VNNI,
                        AUXKERN_ISA_AVX2})
        if (has_isa(isa)) return isa;
    return AUXKERN_ISA_GENERIC;
}

int32_t resolve(int32_t isa) { return isa == AUXKERN_ISA_BEST ? best_isa() : isa; }

}  // namespace auxkern

namespace {

using namespace auxkern;

using PackHidden = void (*)(const HeadsForwardTask &, float *);

int64_t logits(const ForwardTask &task) { return task.N * task.V * task.n_terms; }
int64_t logits(const SampleTask &task) { return task.N * task.V * task.n_terms; }
int64_t logits(const BackwardTask &task) { return task.N * task.write.V * task.write.n_terms; }

// Floats of scratch memory per thread.
int64_t scratch_floats(const ForwardTask &task) { return task.gradient ? scratch_size(task.V) : 0; }
int64_t scratch_floats(const BackwardTask &) { return 0; }
int64_t scratch_floats(const SampleTask &task) { return scratch_size(task); }

template <class Task>
int32_t run_rows(Kernel<Task> kernel, const Task &task, const auxkern_execution &execution) {
    constexpr int64_t MIN_LOGITS_PER_THREAD = 1 << 15;  // about 10 us of work, what a thread costs
    const int64_t useful = std::min(task.N, std::max<int64_t>(1, logits(task) / MIN_LOGITS_PER_THREAD));
    const auto threads = static_cast<unsigned>(std::min<int64_t>(execution.threads, useful));
    const int64_t grab = std::max<int64_t>(1, (1 << 14) * task.N / logits(task));
    return run(kernel, task, task.N, grab, scratch_floats(task), threads, execution);
}

template <class Task>
int32_t run_segments(Kernel<Task> kernel, const Task &task, const auxkern_execution &execution) {
    const int64_t segments = (task.V + IDS - 1) / IDS;
    const auto threads = static_cast<unsigned>(std::min<int64_t>(execution.threads, segments));
    return run(kernel, task, segments, int64_t(1), scratch_size(task), threads, execution);
}

int32_t check(const auxkern_term *terms, int32_t n_terms, int64_t N, int64_t V, const auxkern_execution *execution) {
    if (!terms || !execution || n_terms < 1 || n_terms > AUXKERN_MAX_TERMS || N < 0 || V < 1 ||
        execution->threads < 1)
        return AUXKERN_BAD_ARGUMENT;
    for (int32_t i = 0; i < n_terms; ++i)
        if ((N > 0 && !terms[i].values) || terms[i].width < V || terms[i].inner < 1 || terms[i].dtype < AUXKERN_F32 ||
            terms[i].dtype > AUXKERN_BF16)
            return AUXKERN_BAD_ARGUMENT;
    if (execution->isa != AUXKERN_ISA_BEST && !has_isa(execution->isa)) return AUXKERN_UNSUPPORTED_ISA;
    return AUXKERN_OK;
}

bool is_bad(const auxkern_entries &entries) {
    return entries.count < 0 || (entries.count > 0 && (!entries.ids || !entries.rows));
}

int32_t check(const auxkern_head *heads, int32_t n_heads, const auxkern_rows *rows, int64_t V,
              const auxkern_execution *execution) {
    if (!heads || !rows || !execution || n_heads < 1 || n_heads > AUXKERN_MAX_TERMS || V < 1 || execution->threads < 1)
        return AUXKERN_BAD_ARGUMENT;
    if (rows->C < 0 || rows->stride < rows->C || rows->stride % 16 != 0 || is_bad(rows->targets) ||
        is_bad(rows->sparse) || (rows->sparse.count > 0 && !rows->values))
        return AUXKERN_BAD_ARGUMENT;
    for (int32_t h = 0; h < n_heads; ++h)
        if (!heads[h].hidden || !heads[h].weight || heads[h].D < 1 || heads[h].weight_stride < 0 ||
            heads[h].dtype < AUXKERN_F32 || heads[h].dtype > AUXKERN_BF16)
            return AUXKERN_BAD_ARGUMENT;
    if (execution->isa != AUXKERN_ISA_BEST && !has_isa(execution->isa)) return AUXKERN_UNSUPPORTED_ISA;
    return AUXKERN_OK;
}

bool is_bad(const auxkern_linear &layer) {
    return layer.M < 0 || layer.N < 0 || layer.K < 1 || layer.x_stride < 0 || layer.weight_stride < 0 ||
           layer.y_stride < layer.N || layer.dtype < AUXKERN_F32 || layer.dtype > AUXKERN_BF16 ||
           (layer.M > 0 && layer.N > 0 && (!layer.x || !layer.weight || !layer.y));
}

bool is_bad(const auxkern_attention &a) {
    const bool empty = a.B == 0 || a.T == 0;
    return a.B < 0 || a.T < 0 || a.P < a.T || a.P > INT32_MAX || a.D < 1 || a.D % 16 != 0 || a.key_heads < 1 ||
           a.heads < 1 || a.heads % a.key_heads != 0 || is_bad_cache(a.cache_dtype) || (!empty && (!a.query || !a.key || !a.value || !a.out));
}

bool is_bad(const auxkern_row_ids &list) { return list.width < 0 || (list.width > 0 && !list.ids); }

bool is_bad(const auxkern_sampling &s) {
    return !s.temperature || !s.top_k || !s.top_p || !s.log_min_p || !s.repetition || !s.presence || !s.frequency ||
           !s.seed || !s.position || is_bad(s.prompt) || is_bad(s.history) || is_bad(s.added) || is_bad(s.bias) ||
           (s.added.width > 0 && !s.added_values) || (s.bias.width > 0 && !s.bias_values);
}

// A gradient of the size of the logits is fresh memory. In 4 KiB pages its page faults cost more
// than the kernel; asking for large ones is a hint that systems may ignore. The hint begins at the
// page that holds the start, because allocators put a header there and align the mapping.
void prefer_large_pages(void *start, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr int64_t WORTH_IT = int64_t(4) << 20;
    if (bytes < WORTH_IT) return;
    const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)), at = reinterpret_cast<uintptr_t>(start);
    const uintptr_t begin = at / page * page, end = (at + uintptr_t(bytes)) / page * page;
    madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)start;
    (void)bytes;
#endif
}

GradientTask prepare(const auxkern_term *terms, int32_t n_terms, int64_t N, int64_t V, void *const *gradients) {
    constexpr int64_t CACHE_BYTES = int64_t(16) << 20;
    int64_t bytes = 0;
    for (int32_t i = 0; gradients && i < n_terms; ++i) {
        if (!gradients[i]) continue;
        const int64_t size = N * terms[i].width * (terms[i].dtype == AUXKERN_F32 ? 4 : 2);
        prefer_large_pages(gradients[i], size);
        // In place, the values have just been read into the cache.
        if (gradients[i] != terms[i].values) bytes += size;
    }
    return {terms, n_terms, V, gradients, bytes > CACHE_BYTES};
}

}  // namespace

extern "C" {

int32_t auxkern_abi_version(void) { return AUXKERN_ABI_VERSION; }
int32_t auxkern_has_isa(int32_t isa) { return has_isa(isa) ? 1 : 0; }
int32_t auxkern_best_isa(void) { return best_isa(); }

int32_t auxkern_cross_entropy_forward(const auxkern_term *terms, int32_t n_terms, const int64_t *target, int64_t N,
                                      int64_t V, int64_t ignore_index, float *nll, float *row_max, float *log_sum,
                                      float *smooth, int64_t *argmax, float *term_nll,
                                      const auxkern_gradient *gradient, const auxkern_execution *execution) {
    const int32_t status = check(terms, n_terms, N, V, execution);
    if (status != AUXKERN_OK) return status;
    if (N == 0) return AUXKERN_OK;
    if (!target || !nll || !row_max || !log_sum) return AUXKERN_BAD_ARGUMENT;
    if (gradient && (!gradient->row_weight || !gradient->gradients)) return AUXKERN_BAD_ARGUMENT;
    const ForwardTask task{terms, n_terms, target, N, V, ignore_index, nll, row_max, log_sum, smooth, argmax, term_nll,
                           gradient, prepare(terms, n_terms, N, V, gradient ? gradient->gradients : nullptr)};
    return run_rows<ForwardTask>(AUXKERN_PICK(Kernel<ForwardTask>, cross_entropy_forward, resolve(execution->isa)), task, *execution);
}

int32_t auxkern_cross_entropy_backward(const auxkern_term *terms, int32_t n_terms, const int64_t *target, int64_t N,
                                       int64_t V, const float *row_max, const float *exp_coefficient,
                                       const float *constant, const float *target_gradient, void *const *gradients,
                                       const auxkern_execution *execution) {
    const int32_t status = check(terms, n_terms, N, V, execution);
    if (status != AUXKERN_OK) return status;
    if (N == 0) return AUXKERN_OK;
    if (!target || !row_max || !exp_coefficient || !constant || !target_gradient || !gradients)
        return AUXKERN_BAD_ARGUMENT;
    const BackwardTask task{target, N, row_max, exp_coefficient, constant, target_gradient,
                            prepare(terms, n_terms, N, V, gradients)};
    return run_rows<BackwardTask>(AUXKERN_PICK(Kernel<BackwardTask>, cross_entropy_backward, resolve(execution->isa)), task, *execution);
}

int32_t auxkern_heads_forward(const auxkern_head *heads, int32_t n_heads, const auxkern_rows *rows, int64_t V,
                              const auxkern_execution *execution) {
    const int32_t status = check(heads, n_heads, rows, V, execution);
    if (status != AUXKERN_OK) return status;
    if (rows->C == 0) return AUXKERN_OK;
    if (!rows->segment_max || !rows->segment_sum || !rows->z_target) return AUXKERN_BAD_ARGUMENT;
    const std::unique_ptr<float, decltype(&std::free)> packed(
        static_cast<float *>(std::malloc(sizeof(float) * size_t(packed_size(heads, n_heads, *rows)))), &std::free);
    if (!packed) return AUXKERN_OUT_OF_MEMORY;
    const HeadsForwardTask task{heads, n_heads, rows, V, packed.get()};
    const int32_t isa = resolve(execution->isa);
    if (rows->e) prefer_large_pages(rows->e, 4 * V * rows->stride);
    AUXKERN_PICK(PackHidden, pack_hidden, isa)(task, packed.get());
    return run_segments<HeadsForwardTask>(AUXKERN_PICK(Kernel<HeadsForwardTask>, heads_forward, isa), task, *execution);
}

int32_t auxkern_heads_backward(const auxkern_head *heads, int32_t n_heads, const auxkern_rows *rows, int64_t V,
                               const auxkern_heads_gradient *gradient, const auxkern_execution *execution) {
    const int32_t status = check(heads, n_heads, rows, V, execution);
    if (status != AUXKERN_OK) return status;
    if (rows->C == 0) return AUXKERN_OK;
    if (!rows->e || !gradient || !gradient->coefficient || !gradient->target_gradient) return AUXKERN_BAD_ARGUMENT;
    const HeadsBackwardTask task{heads, n_heads, rows, V, gradient};
    const int32_t isa = resolve(execution->isa);
    return run_segments<HeadsBackwardTask>(AUXKERN_PICK(Kernel<HeadsBackwardTask>, heads_backward, isa), task, *execution);
}

int32_t auxkern_linear_forward(const auxkern_linear *layer, const auxkern_execution *execution) {
    if (!layer || !execution || is_bad(*layer) || execution->threads < 1) return AUXKERN_BAD_ARGUMENT;
    if (execution->isa != AUXKERN_ISA_BEST && !has_isa(execution->isa)) return AUXKERN_UNSUPPORTED_ISA;
    const LinearTask task{layer};
    if (layer->M == 0 || layer->N == 0) return AUXKERN_OK;
    constexpr int64_t MIN_PRODUCTS_PER_THREAD = 1 << 16;  // about 10 us of work, what a thread costs
    const int64_t pieces = task.pieces(), useful = layer->M * layer->N * layer->K / MIN_PRODUCTS_PER_THREAD;
    const auto threads = static_cast<unsigned>(std::min<int64_t>({execution->threads, pieces, useful + 1}));
    return run(AUXKERN_PICK(Kernel<LinearTask>, linear, resolve(execution->isa)), task, pieces, int64_t(1), int64_t(0),
               threads, *execution);
}

int32_t auxkern_attention_forward(const auxkern_attention *attention, const auxkern_execution *execution) {
    if (!attention || !execution || is_bad(*attention) || execution->threads < 1) return AUXKERN_BAD_ARGUMENT;
    if (execution->isa != AUXKERN_ISA_BEST && !has_isa(execution->isa)) return AUXKERN_UNSUPPORTED_ISA;
    const AttentionTask task{attention};
    const int64_t pieces = task.pieces(), work = task.group() * attention->P * attention->D;
    if (pieces == 0) return AUXKERN_OK;
    constexpr int64_t MIN_PRODUCTS_PER_THREAD = 1 << 15, MIN_PRODUCTS = 1 << 13;
    const auto threads = static_cast<unsigned>(
        std::min<int64_t>({execution->threads, pieces, pieces * work / MIN_PRODUCTS_PER_THREAD + 1}));
    const int64_t grab = std::max<int64_t>(1, MIN_PRODUCTS / work);
    return run(AUXKERN_PICK(Kernel<AttentionTask>, attention, resolve(execution->isa)), task, pieces, grab,
               scratch_size(task), threads, *execution);
}

int32_t auxkern_sample(const auxkern_term *terms, int32_t n_terms, int64_t N, int64_t V,
                       const auxkern_sampling *sampling, int64_t *token, int32_t *row_status, float *logprob,
                       const auxkern_execution *execution) {
    const int32_t status = check(terms, n_terms, N, V, execution);
    if (status != AUXKERN_OK) return status;
    if (N == 0) return AUXKERN_OK;
    if (!sampling || !token || !row_status || V > INT32_MAX || is_bad(*sampling)) return AUXKERN_BAD_ARGUMENT;
    SampleTask task{terms, n_terms, N, V, sampling, token, row_status, logprob, false, false, false};
    task.counts = sampling->prompt.width + sampling->history.width > 0;
    task.adjusts = task.counts || sampling->added.width + sampling->bias.width > 0;
    for (int64_t n = 0; n < N; ++n)
        task.filters |= sampling->top_k[n] < V || sampling->top_p[n] < 1 || sampling->log_min_p[n] > -HUGE_VALF;
    return run_rows<SampleTask>(AUXKERN_PICK(Kernel<SampleTask>, sample, resolve(execution->isa)), task, *execution);
}

}  // extern "C"
