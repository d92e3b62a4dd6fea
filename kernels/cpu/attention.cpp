// Attention of a few query positions over keys and values that stand in a cache.
//
// Heads that share keys are taken together, so keys and values are read once. Only the columns that a
// position sees are read, in their order: padding costs nothing, and changes nothing in the sums.
#include "attention.h"

#include "simd.h"

namespace auxkern {
namespace AUXKERN_ISA {
namespace {

constexpr int HEADS = 3;                        // of a group, at a time
constexpr int TILE = LANES == 16 ? 8 : 4;       // columns of a product
constexpr int VECTORS = LANES == 16 ? 4 : 2;    // of a value, at a time

template <class Cache>
struct Row {
    typedef typename Cache::scalar scalar;

    const auxkern_attention &a;
    const float *query;
    const scalar *key, *value;  // of the group
    float *out;
    const int32_t *columns;
    int64_t count, stride;  // columns seen; floats from head to head in `weight`
    float *weight;
    bool fetches;            // keys and values are read once, so that they come from memory
    const scalar *next_key;  // where the keys of the next piece stand, or null
};

// A cache of many sequences comes from memory, a few hundred bytes from each place: while keys are
// multiplied, values of the same columns are fetched, and then keys of the next piece, whose columns
// are mostly the same.
template <class T>
inline void fetch_row(const T *row, int64_t width) {
    for (int64_t d = 0; d < width; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + d, 0, 2);
}

// weight[h, i] = scale * query[h] . key[columns[i]] for the tile that begins at i.
template <class Cache, int H>
inline void products(const Row<Cache> &row, int64_t head, int64_t i) {
    const auxkern_attention &a = row.a;
    if (row.fetches && head == 0)
        for (int64_t j = i; j < i + TILE && j < row.count; ++j)
            fetch_row(row.value + row.columns[j] * a.value_stride_column, a.D);
    const float *query = row.query + head * a.query_stride_head;
    const typename Cache::scalar *key[TILE];
    for (int j = 0; j < TILE; ++j) key[j] = row.key + row.columns[i + j < row.count ? i + j : row.count - 1] * a.key_stride_column;
    vf sum[H][TILE];
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 8
        for (int j = 0; j < TILE; ++j) sum[h][j] = splat(0);
    for (int64_t d = 0; d < a.D; d += LANES) {
        vf q[H];
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) q[h] = load(query + h * a.query_stride_head + d);
#pragma GCC unroll 8
        for (int j = 0; j < TILE; ++j) {
            const vf k = in_register(Cache::load(key[j] + d));
#pragma GCC unroll 4
            for (int h = 0; h < H; ++h) sum[h][j] += q[h] * k;
        }
    }
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
        float *to = row.weight + (head + h) * row.stride + i;
        reduce_each<TILE>(sum[h], to);
        for (int j = 0; j < TILE; ++j) to[j] *= a.scale;
    }
}

// Weights become exp(weight - max), 0 behind the last column; returns 1 / their sum.
float exponentiate(float *weight, int64_t count, int64_t padded) {
    for (int64_t i = count; i < padded; ++i) weight[i] = -INFINITY;
    vf best = splat(-INFINITY);
    for (int64_t i = 0; i < padded; i += LANES) best = vmax(load(weight + i), best);
    const float max = reduce_max(best);
    vf sum = splat(0);
    for (int64_t i = 0; i < padded; i += LANES) {
        const vf e = vexp(load(weight + i) - max);
        store(weight + i, e);
        sum += e;
    }
    return float(1 / reduce_sum(sum));
}

// out[h, d..] = sum over the columns of weight * value, times the factors.
template <class Cache, int H, int V>
inline void mix(const Row<Cache> &row, int64_t head, int64_t d, const float *factor) {
    const auxkern_attention &a = row.a;
    const float *weight = row.weight + head * row.stride;
    vf sum[H][V];
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) sum[h][j] = splat(0);
    for (int64_t i = 0; i < row.count; ++i) {
        const typename Cache::scalar *value = row.value + row.columns[i] * a.value_stride_column + d;
        if (head == 0 && d == 0 && row.next_key) fetch_row(row.next_key + row.columns[i] * a.key_stride_column, a.D);
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) {
            const vf v = in_register(Cache::load(value + j * LANES));
#pragma GCC unroll 4
            for (int h = 0; h < H; ++h) sum[h][j] += weight[h * row.stride + i] * v;
        }
    }
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) store(row.out + (head + h) * a.D + d + j * LANES, sum[h][j] * factor[h]);
}

template <class Cache, int H>
void attend(const Row<Cache> &row, int64_t head) {
    for (int64_t i = 0; i < row.count; i += TILE) products<Cache, H>(row, head, i);
    float factor[H];
    const int64_t padded = (row.count + LANES - 1) / LANES * LANES;
    for (int h = 0; h < H; ++h) factor[h] = exponentiate(row.weight + (head + h) * row.stride, row.count, padded);
    int64_t d = 0;
    for (; d + VECTORS * LANES <= row.a.D; d += VECTORS * LANES) mix<Cache, H, VECTORS>(row, head, d, factor);
    for (; d < row.a.D; d += LANES) mix<Cache, H, 1>(row, head, d, factor);
}

// The columns that a query position sees, in their order; returns their number.
int64_t seen(const auxkern_attention &a, int64_t b, int64_t t, int32_t *columns) {
    int64_t count = 0;
    const int64_t last = a.mask ? a.P : a.P - a.T + t + 1;
    const uint8_t *mask = a.mask ? a.mask + b * a.mask_stride_batch + t * a.mask_stride_query : nullptr;
    for (int64_t p = 0; p < last; ++p) {
        columns[count] = int32_t(p);
        count += mask ? mask[p * a.mask_stride_column] != 0 : 1;
    }
    return count;
}

template <class Cache>
void attend_pieces(const AttentionTask &task, int64_t begin, int64_t end, float *scratch) {
    typedef typename Cache::scalar scalar;
    const auxkern_attention &a = *task.attention;
    const scalar *keys = static_cast<const scalar *>(a.key), *values = static_cast<const scalar *>(a.value);
    const int64_t group = task.group(), padded = task.padded();
    static_assert(sizeof(int32_t) == sizeof(float), "columns stand in the scratch memory");
    int32_t *columns = reinterpret_cast<int32_t *>(scratch);
    int64_t listed = -1, count = 0;
    for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t key_head = piece % a.key_heads, position = piece / a.key_heads, t = position % a.T, b = position / a.T;
        if (position != listed) count = seen(a, b, t, columns);
        listed = position;
        float *out = a.out + (position * a.heads + key_head * group) * a.D;
        const scalar *next_key = nullptr;
        const bool fetches = a.T == 1;
        if (fetches && key_head + 1 < a.key_heads)
            next_key = keys + b * a.key_stride_batch + (key_head + 1) * a.key_stride_head;
        else if (fetches && b + 1 < a.B)
            next_key = keys + (b + 1) * a.key_stride_batch;
        const Row<Cache> row{a, a.query + b * a.query_stride_batch + key_head * group * a.query_stride_head + t * a.query_stride_position,
                      keys + b * a.key_stride_batch + key_head * a.key_stride_head,
                      values + b * a.value_stride_batch + key_head * a.value_stride_head, out, columns, count, padded,
                      scratch + padded, fetches, next_key};
        if (count == 0) {
            memset(out, 0, sizeof(float) * size_t(group * a.D));
            continue;
        }
        int64_t head = 0;
        for (; head + HEADS <= group; head += HEADS) attend<Cache, HEADS>(row, head);
        static_assert(HEADS == 3, "what is left is one head or two");
        if (group - head == 2) attend<Cache, 2>(row, head);
        if (group - head == 1) attend<Cache, 1>(row, head);
    }
}

}  // namespace

void attention(const AttentionTask &task, int64_t begin, int64_t end, float *scratch) {
    if (task.attention->cache_dtype == AUXKERN_BF16) attend_pieces<BF16>(task, begin, end, scratch);
    else attend_pieces<F32>(task, begin, end, scratch);
}

}  // namespace AUXKERN_ISA
}  // namespace auxkern
