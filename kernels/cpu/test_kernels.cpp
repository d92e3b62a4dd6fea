// The kernels against the formula in float64, for every instruction set of this CPU: random and
// hard logits, each dtype, both ways of making the gradient, outputs poisoned with NaN.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "auxkern.h"
#include "test_layer.h"

namespace {

int failures = 0;

void check(bool ok, const char *what, int isa, double got, double want) {
    if (ok) return;
    std::printf("FAIL %s (isa %d): got %.9g, want %.9g\n", what, isa, got, want);
    ++failures;
}

uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

float from_bf16(uint16_t h) {
    const uint32_t bits = uint32_t(h) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

struct Expected {
    double nll, row_max, log_sum;
    std::vector<double> p;
};

Expected softmax(const std::vector<double> &z, int64_t y) {
    double m = z[0], s = 0;
    for (double x : z) m = std::max(m, x);
    Expected e;
    for (double x : z) s += std::exp(x - m);
    for (double x : z) e.p.push_back(std::exp(x - m) / s);
    e.row_max = m;
    e.log_sum = std::log(s);
    e.nll = m - z[y] + e.log_sum;
    return e;
}

bool near(double got, double want, double tolerance) {
    return std::fabs(got - want) <= tolerance * std::max(1.0, std::fabs(want));
}

// Two terms, float32 and bfloat16, the second with a scale; V crosses a tile by one.
void random_rows(int32_t isa, int32_t threads, int64_t V) {
    constexpr int64_t N = 5;
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    std::vector<float> lm(N * V), aux(N * V);
    std::vector<uint16_t> aux_bits(N * V);
    for (float &x : lm) x = 4 * normal(random);
    for (int64_t i = 0; i < N * V; ++i) {
        aux_bits[i] = to_bf16(normal(random));
        aux[i] = from_bf16(aux_bits[i]);
    }
    const std::vector<int64_t> target = {0, V - 1, V / 2, -100, V / 3};
    const float scale = 0.5f;
    const auxkern_term terms[2] = {{lm.data(), V, N, 0, V, 1, AUXKERN_F32, 1, 0},
                                   {aux_bits.data(), V, N, 0, V, 1, AUXKERN_BF16, scale, 0}};
    const float nan = std::numeric_limits<float>::quiet_NaN();
    std::vector<float> nll(N, nan), row_max(N, nan), log_sum(N, nan), weight(N, 0.25f);
    std::vector<uint16_t> fused(N * V, 0x7fc0), apart(N * V, 0x7fc0);
    void *fused_gradients[2] = {nullptr, fused.data()}, *apart_gradients[2] = {nullptr, apart.data()};
    const auxkern_gradient request = {weight.data(), 0, 0, fused_gradients};
    const auxkern_execution execution = {threads, isa, nullptr};
    int32_t status =
        auxkern_cross_entropy_forward(terms, 2, target.data(), N, V, -100, nll.data(), row_max.data(), log_sum.data(),
                                      nullptr, nullptr, nullptr, &request, &execution);
    check(status == AUXKERN_OK, "forward status", isa, status, 0);

    std::vector<float> a(N), c(N, 0.0f), at_target(N);
    for (int64_t n = 0; n < N; ++n) {
        const bool ignored = target[n] == -100;
        a[n] = ignored ? 0 : weight[n] * std::exp(-log_sum[n]);
        at_target[n] = ignored ? 0 : weight[n] * std::expm1(-nll[n]);
    }
    status = auxkern_cross_entropy_backward(terms, 2, target.data(), N, V, row_max.data(), a.data(), c.data(),
                                            at_target.data(), apart_gradients, &execution);
    check(status == AUXKERN_OK, "backward status", isa, status, 0);

    for (int64_t n = 0; n < N; ++n) {
        const int64_t y = target[n];
        std::vector<double> z(V);
        for (int64_t v = 0; v < V; ++v) z[v] = double(lm[n * V + v]) + scale * double(aux[n * V + v]);
        const bool ignored = y == -100;
        const Expected want = softmax(z, ignored ? 0 : y);
        check(near(nll[n], ignored ? 0 : want.nll, 1e-6), "nll", isa, nll[n], want.nll);
        check(near(row_max[n] + log_sum[n], ignored ? 0 : want.row_max + want.log_sum, 1e-6), "lse", isa,
              row_max[n] + log_sum[n], want.row_max + want.log_sum);
        for (int64_t v = 0; v < V; ++v) {
            const double dz = ignored ? 0 : 0.25 * (want.p[v] - (v == y)) * scale;
            // bfloat16 keeps 8 bits: half of its last place, and float32's noise before the rounding
            check(std::fabs(from_bf16(fused[n * V + v]) - dz) <= 0.004 * std::fabs(dz) + 1e-9, "fused gradient", isa,
                  from_bf16(fused[n * V + v]), dz);
            check(std::fabs(from_bf16(apart[n * V + v]) - dz) <= 0.004 * std::fabs(dz) + 1e-9, "gradient", isa,
                  from_bf16(apart[n * V + v]), dz);
        }
    }
}

// A target of probability 0.999, a tile of -inf before it, a common offset of 1e4. What is left of
// the probability must be right to float32's relative precision: the sum of equal terms in one lane
// drifts by up to half a place per addition, 128 of them in the narrowest vectors.
void hard_row(int32_t isa) {
    constexpr int64_t V = 2500;
    constexpr double tolerance = 2e-6;
    const float infinity = std::numeric_limits<float>::infinity();
    std::vector<float> x(V, 1e4f);
    for (int64_t v = 0; v < 1100; ++v) x[v] = -infinity;
    x[2000] = 1e4f + 14.25f;
    std::vector<double> z(x.begin(), x.end());
    const int64_t y = 2000;
    const auxkern_term term = {x.data(), V, 1, 0, V, 1, AUXKERN_F32, 1, 0};
    float nll = NAN, row_max = NAN, log_sum = NAN, smooth = NAN, term_nll = NAN, weight = 1;
    int64_t argmax = -7;
    std::vector<float> gradient(V, NAN);
    void *gradients[1] = {gradient.data()};
    const auxkern_gradient request = {&weight, 0, 0, gradients};
    const auxkern_execution execution = {1, isa, nullptr};
    auxkern_cross_entropy_forward(&term, 1, &y, 1, V, -100, &nll, &row_max, &log_sum, &smooth, &argmax, &term_nll,
                                  &request, &execution);
    double rest = 0;
    for (int64_t v = 1100; v < V; ++v) rest += v == y ? 0 : std::exp(z[v] - z[y]);
    const double want = std::log1p(rest);
    check(std::fabs(nll - want) <= tolerance * want, "confident nll", isa, nll, want);
    check(std::fabs(term_nll - want) <= tolerance * want, "confident term nll", isa, term_nll, want);
    check(argmax == y, "argmax", isa, double(argmax), double(y));
    check(std::isinf(smooth), "smooth over -inf", isa, smooth, infinity);
    const double at_target = -rest / (1 + rest);
    check(std::fabs(gradient[y] - at_target) <= tolerance * -at_target, "gradient at target", isa, gradient[y], at_target);
    check(gradient[0] == 0, "gradient of -inf", isa, gradient[0], 0);
}

// Exactly as much memory as there are entries, so that an address sanitizer sees a read beyond them.
void products(int32_t isa, int32_t threads, int64_t M, int64_t K, int64_t N) {
    std::mt19937 random(3);
    std::normal_distribution<float> normal;
    std::vector<float> x(M * K), bias(N), y(M * N, NAN);
    std::vector<uint16_t> weight(N * K);
    for (float &v : x) v = normal(random);
    for (float &v : bias) v = normal(random);
    for (uint16_t &v : weight) v = to_bf16(normal(random));
    const auxkern_linear layer = {M, N, K, x.data(), weight.data(), bias.data(), y.data(), K, K, N, AUXKERN_BF16, 0};
    const auxkern_execution execution = {threads, isa, nullptr};
    check(auxkern_linear_forward(&layer, &execution) == AUXKERN_OK, "linear status", isa, 0, 0);
    for (int64_t m = 0; m < M; ++m)
        for (int64_t n = 0; n < N; ++n) {
            double want = bias[n], size = std::fabs(want);
            for (int64_t k = 0; k < K; ++k) {
                const double product = double(x[m * K + k]) * from_bf16(weight[n * K + k]);
                want += product;
                size += std::fabs(product);
            }
            check(std::fabs(y[m * N + n] - want) <= 5e-7 * size, "linear", isa, y[m * N + n], want);
        }
}

// The bytes of one row, or of a weight's row, as auxkern.h says.
std::vector<double> in_bytes(const float *x, int64_t K, int64_t group) {
    std::vector<double> result(K);
    for (int64_t begin = 0; begin < K; begin += group) {
        const int64_t end = std::min(K, begin + group);
        float max = 0;
        for (int64_t k = begin; k < end; ++k) max = std::max(max, std::fabs(x[k]));
        for (int64_t k = begin; k < end; ++k) result[k] = std::nearbyint(x[k] * (127 / max)) * double(max / 127);
    }
    return result;
}

// Memory that begins at a whole cache line and ends where it says.
struct Aligned {
    explicit Aligned(int64_t bytes) : all(new char[bytes + 64]), at(all + (-reinterpret_cast<uintptr_t>(all) & 63)) {}
    Aligned(const Aligned &) = delete;
    ~Aligned() { delete[] all; }
    char *all, *at;
};

void packed_products(int32_t isa, int32_t threads, int32_t kind, int64_t M, int64_t K, int64_t N) {
    std::mt19937 random(11);
    std::normal_distribution<float> normal;
    std::vector<float> x(M * K), weight(N * K), bias(N), y(M * N, NAN), scales;
    for (auto *values : {&x, &weight, &bias})
        for (float &v : *values) v = from_bf16(to_bf16(normal(random)));
    std::vector<uint16_t> half;
    for (float v : weight) half.push_back(to_bf16(v));
    const int64_t group = kind != AUXKERN_PACKED_I8 ? 0 : K > 64 ? 64 : K;
    auxkern_product product = {N, K, group, nullptr, nullptr, bias.data(), kind, 1};
    const auxkern_execution execution = {threads, isa, nullptr};
    auxkern_packed_sizes sizes = {};
    check(auxkern_packed_size(&product, &sizes) == AUXKERN_OK, "packed size", isa, 0, 0);
    const Aligned values(sizes.bytes);
    scales.assign(sizes.scales, NAN);
    const bool narrow = kind == AUXKERN_PACKED_BF16;
    const int64_t first = N / 2;
    const void *second = narrow ? static_cast<const void *>(half.data() + first * K) : weight.data() + first * K;
    const int32_t dtype = narrow ? AUXKERN_BF16 : AUXKERN_F32;
    const auxkern_weight_rows rows[2] = {{narrow ? static_cast<const void *>(half.data()) : weight.data(), first, K, 1, dtype},
                                         {second, N - first, K, 1, dtype}};
    check(auxkern_pack(&product, rows, 2, values.at, scales.data(), &execution) == AUXKERN_OK, "packed", isa, kind, 0);
    product.values = values.at;
    product.scales = scales.data();
    const auxkern_product_call call = {M, x.data(), y.data(), K, N, N, group, AUXKERN_STORE, AUXKERN_IDENTITY};
    check(auxkern_product_forward(&product, &call, &execution) == AUXKERN_OK, "packed product status", isa, kind, 0);
    for (int64_t m = 0; m < M; ++m) {
        const std::vector<double> row = group ? in_bytes(&x[m * K], K, group) : std::vector<double>(&x[m * K], &x[m * K] + K);
        for (int64_t n = 0; n < N; ++n) {
            const float *of = &weight[n * K];
            const std::vector<double> column = group ? in_bytes(of, K, group) : std::vector<double>(of, of + K);
            double want = bias[n], size = std::fabs(want);
            for (int64_t k = 0; k < K; ++k) {
                want += row[k] * column[k];
                size += std::fabs(row[k] * column[k]);
            }
            check(std::fabs(y[m * N + n] - want) <= 5e-7 * size, "packed product", isa, y[m * N + n], want);
        }
    }
}

// Weights in a file's blocks, of random bytes but for their scales, against what the format says that they are.
void stored_products(int32_t isa, int32_t threads, int32_t kind, bool widened, int64_t M, int64_t K, int64_t N) {
    std::mt19937 random(17);
    std::normal_distribution<float> normal;
    const int64_t bytes = kind == AUXKERN_PACKED_Q8_0 ? 34 : kind == AUXKERN_PACKED_Q4_0 ? 18 : 20, blocks = K / 32;
    std::vector<float> x(M * K), y(M * N, NAN);
    for (float &v : x) v = normal(random);
    std::vector<uint8_t> stored(N * blocks * bytes);
    for (uint8_t &byte : stored) byte = uint8_t(random());
    std::vector<double> weight(N * K);
    for (int64_t block = 0; block < N * blocks; ++block) {
        uint8_t *at = &stored[block * bytes];
        const uint8_t *values = at + bytes - (kind == AUXKERN_PACKED_Q8_0 ? 32 : 16);
        at[0] = at[2 * (kind == AUXKERN_PACKED_Q4_1)] = 0;
        at[1] = 0x30;                                   // 0.125
        if (kind == AUXKERN_PACKED_Q4_1) at[3] = 0xb4;  // -0.25
        for (int64_t k = 0; k < 32; ++k) {
            double &w = weight[block * 32 + k];
            const int four = values[k % 16] >> (k < 16 ? 0 : 4) & 15;
            w = kind == AUXKERN_PACKED_Q8_0 ? 0.125 * int8_t(values[k]) : 0.125 * (kind == AUXKERN_PACKED_Q4_0 ? four - 8 : four);
            if (kind == AUXKERN_PACKED_Q4_1) w -= 0.25;
        }
    }
    auxkern_product product = {N, K, 32, nullptr, nullptr, nullptr, kind, 1};
    if (widened) product.kind += AUXKERN_PACKED_Q8_0_WIDENED - AUXKERN_PACKED_Q8_0;
    const auxkern_execution execution = {threads, isa, nullptr};
    auxkern_packed_sizes sizes = {};
    auxkern_packed_size(&product, &sizes);
    check(sizes.bytes == (N + 15) / 16 * 16 * blocks * bytes && sizes.scales == 0, "stored size", isa, double(sizes.bytes), 0);
    const Aligned values(sizes.bytes);
    auxkern_weight_rows rows = {stored.data(), N, blocks * bytes, 0, 0};
    check(auxkern_pack(&product, &rows, 1, values.at, nullptr, &execution) == AUXKERN_OK, "stored", isa, kind, 0);
    product.values = values.at;
    const auxkern_product_call call = {M, x.data(), y.data(), K, N, N, 32, AUXKERN_STORE, AUXKERN_IDENTITY};
    check(auxkern_product_forward(&product, &call, &execution) == AUXKERN_OK, "stored product status", isa, kind, 0);
    for (int64_t m = 0; m < M; ++m) {
        const std::vector<double> row = widened ? std::vector<double>(&x[m * K], &x[m * K] + K) : in_bytes(&x[m * K], K, 32);
        for (int64_t n = 0; n < N; ++n) {
            double want = 0, size = 0;
            for (int64_t k = 0; k < K; ++k) {
                want += row[k] * weight[n * K + k];
                size += std::fabs(row[k] * weight[n * K + k]);
            }
            check(std::fabs(y[m * N + n] - want) <= 5e-7 * size, "stored product", isa, y[m * N + n], want);
        }
    }
    stored[(N * blocks - 1) * bytes + 1] = 0x7c;
    check(auxkern_pack(&product, &rows, 1, values.at, nullptr, &execution) == AUXKERN_NOT_FINITE, "infinite scale", isa, kind, 4);
    product.K = 40;
    check(auxkern_packed_size(&product, &sizes) == AUXKERN_BAD_ARGUMENT, "part of a block", isa, kind, 1);
}

// A gate's product is that of the two halves apart, which are added to what stands there.
void gated_products(int32_t isa, int32_t kind, int64_t M, int64_t K, int64_t inner) {
    std::mt19937 random(13);
    std::normal_distribution<float> normal;
    std::vector<float> x(M * K), weight(2 * inner * K), bias(2 * inner), y[2], scales[2];
    for (auto *values : {&x, &weight, &bias})
        for (float &v : *values) v = normal(random);
    const auxkern_execution execution = {1, isa, nullptr};
    const int64_t group = kind == AUXKERN_PACKED_I8 ? 4 : 0;
    for (int32_t turns : {1, 2}) {
        auxkern_product product = {2 * inner, K, group, nullptr, nullptr, bias.data(), kind, turns};
        auxkern_packed_sizes sizes = {};
        auxkern_packed_size(&product, &sizes);
        const Aligned values(sizes.bytes);
        scales[turns - 1].assign(sizes.scales, NAN);
        const auxkern_weight_rows rows = {weight.data(), 2 * inner, K, 1, AUXKERN_F32};
        auxkern_pack(&product, &rows, 1, values.at, scales[turns - 1].data(), &execution);
        product.values = values.at;
        product.scales = scales[turns - 1].data();
        const int64_t columns = 2 * inner / turns;
        y[turns - 1].assign(M * columns, turns == 2 ? NAN : 0.5f);
        const auxkern_product_call call = {M, x.data(), y[turns - 1].data(), K, columns, columns, 0,
                                           turns == 2 ? AUXKERN_GATE : AUXKERN_ADD, AUXKERN_IDENTITY};
        check(auxkern_product_forward(&product, &call, &execution) == AUXKERN_OK, "gated product status", isa, kind, 0);
    }
    for (int64_t m = 0; m < M; ++m)
        for (int64_t n = 0; n < inner; ++n) {
            const double gate = y[0][m * 2 * inner + n] - 0.5, up = y[0][m * 2 * inner + inner + n] - 0.5;
            // What 0.5 took from the places of either.
            check(std::fabs(y[1][m * inner + n] - gate * up) <= 3e-7 * (1 + std::fabs(gate)) * (1 + std::fabs(up)), "gate", isa,
                  y[1][m * inner + n], gate * up);
        }
}

void attends(int32_t isa, int32_t threads, int64_t T, int64_t P, int64_t D) {
    constexpr int64_t B = 2, heads = 4, key_heads = 2;
    std::mt19937 random(5);
    std::normal_distribution<float> normal;
    std::vector<float> query(B * heads * T * D), key(B * key_heads * P * D), value(key.size()), out(query.size(), NAN);
    std::vector<uint8_t> mask(B * T * P);
    for (auto *values : {&query, &key, &value})
        for (float &v : *values) v = normal(random);
    for (uint8_t &seen : mask) seen = random() % 3 != 0;
    for (int64_t row = 0; row < B * T; ++row) mask[row * P] = 1;
    const int64_t strides = P * D;
    const auxkern_attention attention = {B, T, P, D, heads, key_heads, query.data(), heads * T * D, T * D, D,
                                         key.data(), key_heads * strides, strides, D,
                                         value.data(), key_heads * strides, strides, D,
                                         mask.data(), T * P, P, 1, 0.25f, AUXKERN_F32, out.data()};
    const auxkern_execution execution = {threads, isa, nullptr};
    check(auxkern_attention_forward(&attention, &execution) == AUXKERN_OK, "attention status", isa, 0, 0);
    for (int64_t b = 0; b < B; ++b)
        for (int64_t h = 0; h < heads; ++h)
            for (int64_t t = 0; t < T; ++t) {
                std::vector<double> z, want(D, 0.0);
                std::vector<int64_t> columns;
                const float *q = query.data() + ((b * heads + h) * T + t) * D;
                const int64_t first = (b * key_heads + h / (heads / key_heads)) * P;
                for (int64_t p = 0; p < P; ++p) {
                    if (!mask[(b * T + t) * P + p]) continue;
                    double sum = 0;
                    for (int64_t d = 0; d < D; ++d) sum += double(q[d]) * key[(first + p) * D + d];
                    z.push_back(0.25 * sum);
                    columns.push_back(p);
                }
                const Expected weights = softmax(z, 0);
                for (size_t i = 0; i < columns.size(); ++i)
                    for (int64_t d = 0; d < D; ++d) want[d] += weights.p[i] * value[(first + columns[i]) * D + d];
                for (int64_t d = 0; d < D; ++d) {
                    const float got = out[((b * T + t) * heads + h) * D + d];
                    check(near(got, want[d], 2e-6), "attention", isa, got, want[d]);
                }
            }
}

void refused_products() {
    const float x[32] = {};
    float y[32];
    const auxkern_execution execution = {1, AUXKERN_ISA_BEST, nullptr};
    auxkern_linear layer = {1, 1, 4, x, x, nullptr, y, 4, 4, 1, AUXKERN_F32, 0};
    check(auxkern_linear_forward(&layer, &execution) == AUXKERN_OK, "accepted", 0, 0, 0);
    layer.weight_stride = layer.x_stride = 0;
    check(auxkern_linear_forward(&layer, &execution) == AUXKERN_OK, "rows that are all one", 0, 0, 0);
    layer.y_stride = 0;
    check(auxkern_linear_forward(&layer, &execution) == AUXKERN_BAD_ARGUMENT, "results that overlap", 0, 0, 1);
    layer.y_stride = 1;
    layer.K = 0;
    check(auxkern_linear_forward(&layer, &execution) == AUXKERN_BAD_ARGUMENT, "K of 0", 0, 0, 1);
    auxkern_attention attention = {1, 1, 1, 16, 2, 1, x, 32, 16, 16, x, 16, 16, 16, x, 16, 16, 16, nullptr, 0, 0, 0, 1,
                                   AUXKERN_F32, y};
    check(auxkern_attention_forward(&attention, &execution) == AUXKERN_OK, "accepted", 0, 0, 0);
    attention.D = 8;
    check(auxkern_attention_forward(&attention, &execution) == AUXKERN_BAD_ARGUMENT, "D of 8", 0, 0, 1);
    attention.D = 16;
    attention.key_heads = 3;
    check(auxkern_attention_forward(&attention, &execution) == AUXKERN_BAD_ARGUMENT, "heads that do not divide", 0, 0, 1);
    attention.key_heads = 1;
    attention.cache_dtype = AUXKERN_F16;
    check(auxkern_attention_forward(&attention, &execution) == AUXKERN_BAD_ARGUMENT, "a cache of float16", 0, 0, 1);
}

void refused_packing() {
    float x[32] = {}, y[32], scales[32];
    alignas(64) char values[16 * 32];
    const auxkern_execution execution = {1, AUXKERN_ISA_BEST, nullptr};
    auxkern_product product = {2, 8, 4, values, scales, nullptr, AUXKERN_PACKED_I8, 1};
    auxkern_weight_rows rows = {x, 2, 8, 1, AUXKERN_F32};
    auxkern_packed_sizes sizes;
    auto pack = [&] { return auxkern_pack(&product, &rows, 1, values, scales, &execution); };
    check(auxkern_packed_size(&product, &sizes) == AUXKERN_OK && sizes.bytes == 128 && sizes.scales == 32, "sizes", 0,
          double(sizes.bytes), 128);
    check(pack() == AUXKERN_OK, "packed", 0, 0, 0);
    auxkern_product_call call = {1, x, y, 8, 2, 2, 4, AUXKERN_STORE, AUXKERN_IDENTITY};
    auto forward = [&] { return auxkern_product_forward(&product, &call, &execution); };
    check(forward() == AUXKERN_OK, "accepted", 0, 0, 0);
    call.columns = 3;
    check(forward() == AUXKERN_BAD_ARGUMENT, "columns beyond N", 0, 0, 1);
    call.columns = 2;
    call.y_stride = 1;
    check(forward() == AUXKERN_BAD_ARGUMENT, "results that overlap", 0, 0, 1);
    call.y_stride = 2;
    call.row_group = 6;
    check(forward() == AUXKERN_BAD_ARGUMENT, "row group of 6", 0, 0, 1);
    call.row_group = 4;
    call.epilogue = AUXKERN_GATE;
    check(forward() == AUXKERN_BAD_ARGUMENT, "a gate without turns", 0, 0, 1);
    x[5] = NAN;
    check(pack() == AUXKERN_NOT_FINITE, "NaN", 0, 0, 4);
    rows.rows = 1;
    check(pack() == AUXKERN_BAD_ARGUMENT, "rows that are missing", 0, 0, 1);
    product.group = 6;
    check(auxkern_packed_size(&product, &sizes) == AUXKERN_BAD_ARGUMENT, "group of 6", 0, 0, 1);
}

// The text 7 8 8 9 against the condition 8 9 and one of padding; a second text without a condition.
void covers() {
    const int64_t text[4] = {7, 8, 8, 9}, condition[6] = {8, 9, 9, 7, 8, 9}, mask[6] = {1, 1, 0, 0, 0, 0};
    const int64_t real = 1;
    const float weights[3] = {2, 3, 5};
    const float shares[4] = {0, 0.5f, 0.5f, 1}, begun[4] = {0, 1, 1, 0}, written[4] = {0, 0, 0, 1};
    int64_t past[12], stretches[12];
    float results[6], begun_of[6], marks[2];
    auxkern_coverage call = {2, 3, 1, text, 0, &real, 0, condition, 3, 1, mask, 3, 1, nullptr, weights, weights + 1,
                             weights + 2, results, results + 2, results + 4, begun_of, marks, stretches};
    for (int t = 0; t < 4; ++t) {
        call.ids = text + t;
        check(auxkern_coverage_step(&call) == AUXKERN_OK, "coverage", 0, t, 0);
        const float mark = 2 * shares[t] + 3 * (1 - shares[t]) + 5 * written[t];
        check(call.share[0] == shares[t] && call.lacking[0] == 1 - shares[t], "share", t, call.share[0], shares[t]);
        check(call.written[0] == written[t], "written", t, call.written[0], written[t]);
        check(begun_of[0] == 0 && begun_of[1] == begun[t], "begun", t, begun_of[1], begun[t]);
        check(marks[0] == mark, "marks", t, marks[0], mark);
        check(call.share[1] == 0 && call.lacking[1] == 0 && marks[1] == 0, "no condition", t, marks[1], 0);
        std::copy(stretches, stretches + 12, past);
        call.past = past;
    }
    check(stretches[0] == 1 && stretches[1] == 0 && stretches[2] == 2 && stretches[3] == 2, "stretches", 0, 0, 0);
    call.K = -1;
    check(auxkern_coverage_step(&call) == AUXKERN_BAD_ARGUMENT, "K of -1", 0, 0, 1);
    call.K = 3, call.ids = nullptr;
    check(auxkern_coverage_step(&call) == AUXKERN_BAD_ARGUMENT, "no ids", 0, 0, 1);
    call.B = 0;
    check(auxkern_coverage_step(&call) == AUXKERN_OK, "no texts", 0, 0, 0);
}

void points() {
    constexpr int64_t B = 3, K = 2, d = 11, ROW = d + 4;  // a row's numbers stand one behind the other
    std::mt19937 random(13);
    std::normal_distribution<float> normal;
    std::vector<float> rows(B * ROW), keys(B * (K + 1) * d), begun(B * K), lacking(B), lm(B * K), scores(B * K, NAN), end(B, NAN);
    for (auto *values : {&rows, &keys, &begun, &lacking, &lm})
        for (float &v : *values) v = normal(random);
    const float *row = rows.data();
    auxkern_pointer call = {B, K, d, {row, ROW}, {row + d, ROW}, {row + d + 1, ROW}, {row + d + 2, ROW}, {row + d + 3, ROW},
                            keys.data(), (K + 1) * d, d, begun.data(), lacking.data(), lm.data(), 10, 10, scores.data(), end.data()};
    for (const bool reads : {true, false}) {
        if (!reads) call.against.at = call.lm_scores = nullptr;
        check(auxkern_pointer_step(&call) == AUXKERN_OK, "pointer status", 0, 0, 0);
        for (int64_t b = 0; b < B; ++b) {
            const float *of = row + b * ROW;
            for (int64_t j = 0; j < K; ++j) {
                double want = 0;
                for (int64_t i = 0; i < d; ++i) want += double(of[i]) * keys[size_t((b * (K + 1) + j) * d + i)];
                want = want / std::sqrt(double(d)) + (j == 0 ? of[d] : 0) + 10.0 * of[d + 1] * begun[size_t(b * K + j)];
                if (reads) want += of[d + 3] * (double(lm[size_t(b * K + j)]) - 10) / 10;
                check(near(scores[size_t(b * K + j)], want, 2e-6), "pointer", 0, scores[size_t(b * K + j)], want);
            }
            const double want = 10.0 * of[d + 2] * lacking[size_t(b)];
            check(near(end[size_t(b)], want, 2e-6), "pointer's end", 0, end[size_t(b)], want);
        }
    }
    call.d = 0;
    check(auxkern_pointer_step(&call) == AUXKERN_BAD_ARGUMENT, "d of 0", 0, 0, 1);
    call.d = d, call.keys = nullptr;
    check(auxkern_pointer_step(&call) == AUXKERN_BAD_ARGUMENT, "no keys", 0, 0, 1);
}

void refusals() {
    const float x[2] = {0, 0};
    const int64_t y = 0;
    float row[3];
    const auxkern_execution execution = {1, AUXKERN_ISA_BEST, nullptr};
    auxkern_term term = {x, 2, 1, 0, 2, 1, AUXKERN_F32, 1, 0};
    auto forward = [&](const auxkern_term &t, int64_t V, const auxkern_execution &e) {
        return auxkern_cross_entropy_forward(&t, 1, &y, 1, V, -100, row, row + 1, row + 2, nullptr, nullptr, nullptr,
                                             nullptr, &e);
    };
    check(forward(term, 2, execution) == AUXKERN_OK, "accepted", 0, 0, 0);
    check(forward(term, 3, execution) == AUXKERN_BAD_ARGUMENT, "V beyond the width", 0, 0, 1);
    check(forward(term, 0, execution) == AUXKERN_BAD_ARGUMENT, "V of 0", 0, 0, 1);
    check(forward(term, 2, {0, AUXKERN_ISA_BEST, nullptr}) == AUXKERN_BAD_ARGUMENT, "no threads", 0, 0, 1);
    check(forward(term, 2, {1, 99, nullptr}) == AUXKERN_UNSUPPORTED_ISA, "unknown isa", 0, 0, 2);
    term.dtype = 17;
    check(forward(term, 2, execution) == AUXKERN_BAD_ARGUMENT, "unknown dtype", 0, 0, 1);
}

}  // namespace

int main() {
    check(auxkern_abi_version() == AUXKERN_ABI_VERSION, "ABI version", 0, auxkern_abi_version(), AUXKERN_ABI_VERSION);
    int tested = 0;
    for (int32_t isa : {AUXKERN_ISA_GENERIC, AUXKERN_ISA_AVX2, AUXKERN_ISA_AVX512, AUXKERN_ISA_AVX2_VNNI,
                        AUXKERN_ISA_AVX512_VNNI, AUXKERN_ISA_AVX512_BF16}) {
        if (!auxkern_has_isa(isa)) continue;
        ++tested;
        for (int64_t V : {1, 2, 15, 17, 1023, 1024, 1025, 5003}) random_rows(isa, V > 1000 ? 3 : 1, V);
        hard_row(isa);
        products(isa, 1, 1, 5, 3);
        products(isa, 2, 197, 653, 41);
        for (int32_t kind : {AUXKERN_PACKED_F32, AUXKERN_PACKED_BF16, AUXKERN_PACKED_BF16_PAIRS, AUXKERN_PACKED_I8}) {
            packed_products(isa, 1, kind, 1, 5, 3);
            packed_products(isa, 2, kind, 29, 653, 83);
            packed_products(isa, 1, kind, 5, 64, 160);
            if (kind != AUXKERN_PACKED_BF16) gated_products(isa, kind, 14, 37, 21);
        }
        for (int32_t kind : {AUXKERN_PACKED_Q8_0, AUXKERN_PACKED_Q4_0, AUXKERN_PACKED_Q4_1}) {
            for (const bool widened : {false, true}) {
                stored_products(isa, 1, kind, widened, 1, 32, 3);
                stored_products(isa, 2, kind, widened, 29, 672, 83);
            }
        }
        attends(isa, 1, 1, 1, 16);
        attends(isa, 3, 3, 37, 80);
        for (int32_t kind : {AUXKERN_PACKED_F32, AUXKERN_PACKED_BF16_PAIRS, AUXKERN_PACKED_I8}) {
            const int one = layer_differences(isa, 1, kind, AUXKERN_F32, 1, 1);
            const int some = layer_differences(isa, 3, kind, AUXKERN_BF16, 2, 7);
            const int blocks = layer_differences(isa, 2, kind, AUXKERN_F32, 3, 350) + layer_differences(isa, 2, kind, AUXKERN_BF16, 13, 1);
            check(one == 0 && some == 0 && blocks == 0, "layer and its pieces", isa, one + some + blocks, 0);
        }
    }
    check(cache_columns_left_out() == 0, "cache asked for ahead", 0, cache_columns_left_out(), 0);
    covers();
    points();
    refusals();
    refused_products();
    refused_packing();
    std::printf("%d instruction sets, %d failures\n", tested, failures);
    return failures == 0 ? 0 : 1;
}
