// What a decoder layer does to a row between two products: norms, rotary positions, activations.
//
// A row is handled alone and in one order, so that it is the same in any batch.
#include "layer.h"

#include "simd.h"

namespace auxkern {
namespace AUXKERN_ISA {
namespace {

constexpr int CHAINS = 4;  // sums that do not wait for each other

// The first `count` lanes, 0 in the others.
inline vf load_some(const float *p, int64_t count) {
    vf x = splat(0);
    memcpy(&x, p, sizeof(float) * size_t(count));
    return x;
}

inline void store_some(float *p, vf x, int64_t count) { memcpy(p, &x, sizeof(float) * size_t(count)); }

// body(at, count) for each vector of a row; count is LANES but for the last.
template <class Body>
inline void vectors(int64_t width, Body body) {
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) body(i, int64_t(LANES));
    if (i < width) body(i, width - i);
}

inline vf read(const float *p, int64_t count) { return count == LANES ? load(p) : load_some(p, count); }
inline void write(float *p, vf x, int64_t count) {
    if (count == LANES) store(p, x);
    else store_some(p, x, count);
}

// sum of value(x[i]) over a row; what stands behind its end is not taken.
template <class Value>
inline double sum_of(const float *x, int64_t width, Value value) {
    vf sum[CHAINS];
#pragma GCC unroll 4
    for (int j = 0; j < CHAINS; ++j) sum[j] = splat(0);
    int64_t i = 0;
    for (; i + CHAINS * LANES <= width; i += CHAINS * LANES)
#pragma GCC unroll 4
        for (int j = 0; j < CHAINS; ++j) sum[j] += value(load(x + i + j * LANES));
    for (; i + LANES <= width; i += LANES) sum[0] += value(load(x + i));
    double total = reduce_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
    for (; i < width; ++i) total += value(splat(x[i]))[0];
    return total;
}

struct Scaled {
    float mean, factor;
};

Scaled scaled(const auxkern_norm &norm, const float *x, int64_t width) {
    float mean = 0;
    if (norm.kind == AUXKERN_NORM_LAYER) mean = float(sum_of(x, width, [](vf v) { return v; }) / double(width));
    const double squares = sum_of(x, width, [mean](vf v) { return (v - mean) * (v - mean); });
    return {mean, float(1 / sqrt(squares / double(width) + double(norm.eps)))};
}

inline vf normed(const auxkern_norm &norm, const Scaled &by, const float *x, int64_t i, int64_t count) {
    vf value = (read(x + i, count) - by.mean) * by.factor;
    if (norm.weight) value *= read(norm.weight + i, count);
    if (norm.bias) value += read(norm.bias + i, count);
    return value;
}

// to[i] = the head's numbers turned by the position's angles; those behind the first `rotary` stay. May be in place.
inline void rotate(const auxkern_layer_call &call, const float *head, const float *cos, const float *sin, float *to,
                   int64_t width) {
    const int64_t half = call.rotary / 2;
    vectors(half, [&](int64_t i, int64_t count) {
        const vf a = read(head + i, count), b = read(head + half + i, count);
        write(to + i, a * read(cos + i, count) - b * read(sin + i, count), count);
        write(to + half + i, b * read(cos + half + i, count) + a * read(sin + half + i, count), count);
    });
    if (call.rotary < width && to != head) memcpy(to + call.rotary, head + call.rotary, sizeof(float) * size_t(width - call.rotary));
}

// A head's numbers to a cache; `width` is a multiple of all vectors.
inline void keep(const auxkern_layer_call &call, const float *head, void *cache, int64_t at, int64_t width) {
    if (call.cache_dtype == AUXKERN_F32) {
        memcpy(static_cast<float *>(cache) + at, head, sizeof(float) * size_t(width));
        return;
    }
    uint16_t *to = static_cast<uint16_t *>(cache) + at;
    for (int64_t i = 0; i < width; i += LANES) BF16::store(to + i, load(head + i));
}

void norm_heads(const auxkern_norm &norm, bool whole, float *x, int64_t heads, int64_t width) {
    if (norm.kind == AUXKERN_NORM_NONE) return;
    if (whole) norm_row(norm, x, x, heads * width);
    else
        for (int64_t h = 0; h < heads; ++h) norm_row(norm, x + h * width, x + h * width, width);
}

void clip_row(float limit, float *x, int64_t width) {
    // A comparison that NaN fails leaves it as it is.
    vectors(width, [=](int64_t i, int64_t count) {
        const vf v = read(x + i, count);
        const vf below = choose((vi)(v > limit), splat(limit), v);
        write(x + i, choose((vi)(v < -limit), splat(-limit), below), count);
    });
}

}  // namespace

void norm_row(const auxkern_norm &norm, const float *x, float *y, int64_t width) {
    const Scaled by = scaled(norm, x, width);
    vectors(width, [&](int64_t i, int64_t count) { write(y + i, normed(norm, by, x, i, count), count); });
}

void add_normed_row(const auxkern_norm &norm, const float *x, const float *residual, float *y, int64_t width) {
    const Scaled by = scaled(norm, x, width);
    vectors(width, [&](int64_t i, int64_t count) {
        write(y + i, read(residual + i, count) + normed(norm, by, x, i, count), count);
    });
}

void split_rows(const LayerRows &rows, int64_t begin, int64_t end) {
    const auxkern_layer &layer = *rows.layer;
    const auxkern_layer_call &call = *rows.call;
    const int64_t width = layer.head_width, queries = rows.query_width(), keys = rows.key_width();
    for (int64_t m = begin; m < end; ++m) {
        const int64_t row = rows.first + m, b = row / call.T, t = row % call.T;
        float *query = rows.qkv + m * (queries + 2 * keys), *key = query + queries, *value = key + keys;
        if (layer.clip > 0) clip_row(layer.clip, query, queries + 2 * keys);
        norm_heads(layer.query_norm, layer.whole_norms != 0, query, layer.heads, width);
        norm_heads(layer.key_norm, layer.whole_norms != 0, key, layer.key_heads, width);
        const int64_t angle = b * call.angle_stride_batch + t * call.angle_stride_position;
        const float *cos = call.cos + angle, *sin = call.sin + angle;
        for (int64_t h = 0; h < layer.heads; ++h)
            rotate(call, query + h * width, cos, sin, rows.query + row * queries + h * width, width);
        for (int64_t g = 0; g < layer.key_heads; ++g)
            rotate(call, key + g * width, cos, sin, key + g * width, width);
        const int64_t at = b * call.new_stride_batch + t * call.new_stride_position;
        for (int64_t g = 0; g < layer.key_heads; ++g) {
            keep(call, key + g * width, call.new_key, at + g * call.new_stride_head, width);
            keep(call, value + g * width, call.new_value, at + g * call.new_stride_head, width);
        }
    }
}

}  // namespace AUXKERN_ISA
}  // namespace auxkern
