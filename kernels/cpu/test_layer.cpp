// A decoder layer in one call against the same products and attention in calls of their own: to the last
// bit, in memory of exactly as many entries as there are.
#include "test_layer.h"

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "products.h"

namespace {

constexpr int64_t D = 20, HEADS = 4, KEYS = 2, WIDTH = 16, INNER = 35;

// A packed product with its memory.
struct Packed {
    std::vector<float> weight, bias, scales;
    std::vector<char> memory;
    auxkern_layer_product product{};

    Packed(int64_t N, int64_t K, int32_t turns, int32_t kind, const auxkern_execution &execution) {
        std::mt19937 random(unsigned(N * 31 + K));
        std::normal_distribution<float> normal;
        weight.resize(size_t(N * K));
        bias.resize(size_t(N));
        for (float &w : weight) w = 0.3f * normal(random);
        for (float &b : bias) b = normal(random);
        auxkern_product &of = product.weight;
        of.N = N, of.K = K, of.kind = kind, of.turns = turns, of.bias = bias.data();
        of.group = kind == AUXKERN_PACKED_I8 ? K : 0;
        auxkern_packed_sizes sizes{};
        auxkern_packed_size(&of, &sizes);
        memory.resize(size_t(sizes.bytes) + 64);
        scales.resize(size_t(sizes.scales));
        char *values = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
        of.values = values;
        of.scales = scales.data();
        const auxkern_weight_rows rows = {weight.data(), N, K, 1, AUXKERN_F32};
        auxkern_pack(&of, &rows, 1, values, scales.data(), &execution);
    }
};

void multiply(const Packed &packed, const float *x, float *y, int64_t M, int32_t epilogue, const auxkern_execution &execution) {
    const auxkern_product &of = packed.product.weight;
    const int64_t columns = of.N / of.turns;
    const auxkern_product_call call = {M, x, y, of.K, columns, columns, 0, epilogue,
                                       epilogue == AUXKERN_GATE ? AUXKERN_SILU : AUXKERN_IDENTITY};
    auxkern_product_forward(&of, &call, &execution);
}

// To the nearest number whose lower 16 bits are 0, to the even one of two.
void round_upper(float &x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
    std::memcpy(&x, &bits, 4);
}

}  // namespace

int layer_differences(int32_t isa, int32_t threads, int32_t kind, int32_t cache, int64_t B, int64_t T) {
    const auxkern_execution execution = {threads, isa, nullptr};
    const int64_t M = B * T, widths = (HEADS + 2 * KEYS) * WIDTH;
    const Packed qkv(widths, D, 1, kind, execution), output(D, HEADS * WIDTH, 1, kind, execution),
        up(2 * INNER, D, 2, kind, execution), down(D, INNER, 1, kind, execution);
    std::mt19937 random(9);
    std::normal_distribution<float> normal;
    std::vector<float> x(size_t(M * D)), y(x.size(), NAN);
    const size_t columns = size_t(M * KEYS * WIDTH);
    std::vector<char> keys(columns * size_t(auxkern::entry_bytes(cache)), char(0xff)), values(keys);
    for (float &v : x) v = normal(random);

    auxkern_layer layer{};
    layer.D = D, layer.heads = HEADS, layer.key_heads = KEYS, layer.head_width = WIDTH, layer.inner = INNER;
    layer.qkv = qkv.product, layer.output = output.product, layer.up = up.product, layer.down = down.product;
    layer.scale = 0.25f, layer.activation = AUXKERN_SILU, layer.gated = 1;
    auxkern_layer_call call{};
    call.B = B, call.T = T, call.P = T, call.x = x.data(), call.y = y.data();
    call.new_key = keys.data(), call.new_value = values.data(), call.key = keys.data(), call.value = values.data();
    call.new_stride_batch = call.key_stride_batch = call.value_stride_batch = KEYS * T * WIDTH;
    call.new_stride_head = call.key_stride_head = call.value_stride_head = T * WIDTH;
    call.new_stride_position = call.key_stride_column = call.value_stride_column = WIDTH;
    call.stages = AUXKERN_LAYER_PROJECT | AUXKERN_LAYER_ATTEND, call.cache_dtype = cache;
    if (auxkern_layer_forward(&layer, &call, &execution) != AUXKERN_OK) return -1;

    std::vector<float> rows(size_t(M * widths)), out(size_t(M * HEADS * WIDTH)), inner(size_t(M * INNER)), expected = x;
    multiply(qkv, x.data(), rows.data(), M, AUXKERN_STORE, execution);
    if (cache == AUXKERN_BF16)
        for (int64_t m = 0; m < M; ++m)
            for (int64_t i = HEADS * WIDTH; i < widths; ++i) round_upper(rows[size_t(m * widths + i)]);
    const float *query = rows.data(), *key = query + HEADS * WIDTH, *value = key + KEYS * WIDTH;
    const auxkern_attention attention = {B, T, T, WIDTH, HEADS, KEYS, query, T * widths, WIDTH, widths,
                                         key, T * widths, WIDTH, widths, value, T * widths, WIDTH, widths,
                                         nullptr, 0, 0, 0, 0.25f, AUXKERN_F32, out.data()};
    auxkern_attention_forward(&attention, &execution);
    multiply(output, out.data(), expected.data(), M, AUXKERN_ADD, execution);
    multiply(up, expected.data(), inner.data(), M, AUXKERN_GATE, execution);
    multiply(down, inner.data(), expected.data(), M, AUXKERN_ADD, execution);
    int differences = 0;
    for (size_t i = 0; i < y.size(); ++i) differences += std::memcmp(&y[i], &expected[i], sizeof(float)) != 0;

    // The same layer after itself, in one call and in two; the last column alone is seen, of a sequence the first.
    std::vector<uint8_t> mask(size_t(B * T), 0);
    for (int64_t b = 0; b < B; ++b) mask[size_t(b * T + (b ? T - 1 : 0))] = 1;
    call.mask = mask.data(), call.mask_stride_batch = T, call.mask_stride_column = 1;
    std::vector<float> first(y.size()), second(y.size(), NAN), again(y.size(), NAN);
    auxkern_layer_call calls[2] = {call, call};
    calls[0].y = first.data(), calls[1].x = first.data(), calls[1].y = second.data();
    const auxkern_layer *const layers[2] = {&layer, &layer};
    differences += auxkern_layers_forward(layers, calls, 2, &execution) != AUXKERN_OK;
    calls[1].y = again.data();
    for (const auxkern_layer_call &one : calls) differences += auxkern_layer_forward(&layer, &one, &execution) != AUXKERN_OK;
    differences += std::memcmp(second.data(), again.data(), sizeof(float) * again.size()) != 0;

    // Refused, and nothing written.
    const std::vector<float> before = y;
    call.rotary = 3;
    differences += auxkern_layer_forward(&layer, &call, &execution) != AUXKERN_BAD_ARGUMENT;
    call.rotary = 0;
    call.stages = AUXKERN_LAYER_PROJECT;  // queries have nowhere to go
    differences += auxkern_layer_forward(&layer, &call, &execution) != AUXKERN_BAD_ARGUMENT;
    call.stages = AUXKERN_LAYER_PROJECT | AUXKERN_LAYER_ATTEND;
    layer.inner -= 1;
    differences += auxkern_layer_forward(&layer, &call, &execution) != AUXKERN_BAD_ARGUMENT;
    return differences + (before != y);
}

int cache_columns_left_out() {
    constexpr int64_t B = 3, P = 21, STRIDE = WIDTH;
    const std::vector<float> keys(size_t(B * KEYS * P * STRIDE)), values(keys.size());
    auxkern_layer_call call{};
    call.B = B, call.P = P, call.key = keys.data(), call.value = values.data();
    call.key_stride_batch = call.value_stride_batch = KEYS * P * STRIDE;
    call.key_stride_head = call.value_stride_head = P * STRIDE;
    call.key_stride_column = call.value_stride_column = STRIDE;
    auxkern::NextCache cache{&call, KEYS, {0, 5, P - 1}};
    std::vector<int> asked(size_t(2 * B * KEYS * P));
    int wrong = 0;
    for (int64_t i = 0; i < cache.chunks(); ++i) {
        const auxkern::NextCache::Chunk chunk = cache.chunk(i);
        const float *at = reinterpret_cast<const float *>(chunk.at);
        const bool of_keys = i / auxkern::NextCache::CHUNKS % 2 == 0;
        const int64_t column = (at - (of_keys ? keys.data() : values.data())) / STRIDE + (of_keys ? 0 : B * KEYS * P);
        for (int64_t c = 0; c < chunk.bytes / int64_t(sizeof(float)) / STRIDE; ++c)
            if (column + c >= 0 && column + c < int64_t(asked.size())) ++asked[size_t(column + c)];
            else ++wrong;
    }
    for (int64_t i = 0; i < 2 * B * KEYS * P; ++i) wrong += asked[size_t(i)] != (i % P >= cache.first[i / P / KEYS % B]);
    return wrong;
}
