// Weights into panels of 16 outputs, once when they are loaded. Built once, for any CPU.
#include "products.h"

#include "simd.h"

namespace auxkern {
namespace {

constexpr float TINY = 0x1p-120f;  // 127 / max would overflow below; such numbers count as zeros

float element(const auxkern_weight_rows &rows, int64_t at) {
    if (rows.dtype == AUXKERN_F32) return static_cast<const float *>(rows.weight)[at];
    const uint16_t *half = static_cast<const uint16_t *>(rows.weight) + at;
    return rows.dtype == AUXKERN_F16 ? F16::load_scalar(half) : BF16::load_scalar(half);
}

// Row `n` of all rows, widened; false where there is none.
bool read_row(const PackingTask &task, int64_t n, float *to) {
    for (int32_t i = 0; i < task.count; ++i) {
        const auxkern_weight_rows &rows = task.weights[i];
        if (n < rows.rows) {
            for (int64_t k = 0; k < task.product->K; ++k) to[k] = element(rows, n * rows.row_stride + k * rows.column_stride);
            return true;
        }
        n -= rows.rows;
    }
    return false;
}

// The row of the weight that is output `lane` of a panel; -1 for padding.
int64_t row_of(const auxkern_product &product, int64_t panel, int64_t lane) {
    const int64_t part = product.N / product.turns, within = panel / product.turns * PANEL + lane;
    return within < part ? panel % product.turns * part + within : -1;
}

void pack_floats(int32_t kind, const float *row, int64_t K, char *to) {
    for (int64_t k = 0; k < K; ++k) {
        if (kind == AUXKERN_PACKED_F32) reinterpret_cast<float *>(to)[k * PANEL] = row[k];
        else reinterpret_cast<uint16_t *>(to)[k * PANEL] = float_to_half(row[k]);
    }
}

void pack_pairs(const float *row, int64_t K, char *to) {
    for (int64_t k = 0; k < K; ++k)
        BF16::store_scalar(reinterpret_cast<uint16_t *>(to) + k / 2 * 2 * PANEL + k % 2, row[k]);
}

// Returns whether all are finite.
bool pack_bytes(const auxkern_product &product, const float *row, char *to, float *scales) {
    for (int64_t begin = 0, group = 0; begin < product.K; begin += product.group, ++group) {
        const int64_t end = begin + product.group < product.K ? begin + product.group : product.K;
        float max = 0;
        for (int64_t k = begin; k < end; ++k) {
            const float size = fabsf(row[k]);
            if (!(size < INFINITY)) return false;
            max = size > max ? size : max;
        }
        const bool zeros = max < TINY;
        const float inverse = zeros ? 0 : 127 / max;
        scales[group * PANEL] = zeros ? 0 : max / 127;
        for (int64_t k = begin; k < end; ++k)
            to[k / 4 * 4 * PANEL + k % 4] = char(uint8_t(128 + int32_t(rintf(row[k] * inverse))));
    }
    return true;
}

// Where row `n` of all rows begins, as blocks; NULL where there is none.
const char *stored_row(const PackingTask &task, int64_t n) {
    for (int32_t i = 0; i < task.count; ++i) {
        const auxkern_weight_rows &rows = task.weights[i];
        if (n < rows.rows) return static_cast<const char *>(rows.weight) + n * rows.row_stride;
        n -= rows.rows;
    }
    return nullptr;
}

// Puts a row's blocks into its lane of a panel, as they are. Returns whether scales and minima are finite.
bool pack_blocks(const auxkern_product &product, const char *row, int64_t lane, char *to) {
    const int64_t bytes = block_bytes(product.kind), halves = bytes == block_bytes(AUXKERN_PACKED_Q4_1) ? 2 : 1;
    const int64_t values = bytes - 2 * halves;
    const uint32_t flip = bytes == block_bytes(AUXKERN_PACKED_Q8_0) ? 0x80808080u : 0;  // q + 128 in each byte
    bool finite = true;
    for (int64_t block = 0; block < product.K / AUXKERN_BLOCK; ++block, row += bytes, to += PANEL * bytes) {
        for (int64_t at = 0; at < values; at += 4) {
            uint32_t four;
            memcpy(&four, row + 2 * halves + at, 4);
            four ^= flip;
            memcpy(to + at * PANEL + 4 * lane, &four, 4);
        }
        for (int64_t i = 0; i < halves; ++i) {
            uint16_t half;
            memcpy(&half, row + 2 * i, 2);
            finite &= (half & 0x7c00u) != 0x7c00u;
            memcpy(to + (values + 2 * i) * PANEL + 2 * lane, &half, 2);
        }
    }
    return finite;
}

}  // namespace

void pack_panels(const PackingTask &task, int64_t begin, int64_t end, float *scratch) {
    const auxkern_product &product = *task.product;
    const int64_t bytes = panel_bytes(product), groups = groups_of(product), size = element_bytes(product.kind);
    for (int64_t panel = begin; panel < end; ++panel) {
        char *values = task.values + panel * bytes;
        float *scales = task.scales + panel * groups * PANEL;
        memset(values, product.kind == AUXKERN_PACKED_I8 ? 128 : 0, size_t(bytes));
        if (groups) memset(scales, 0, sizeof(float) * size_t(groups * PANEL));
        task.not_finite[panel] = false;
        for (int64_t lane = 0; lane < PANEL; ++lane) {
            const int64_t n = row_of(product, panel, lane);
            if (is_stored(product.kind)) {
                const char *row = n < 0 ? nullptr : stored_row(task, n);
                if (row) task.not_finite[panel] |= !pack_blocks(product, row, lane, values);
                continue;
            }
            if (n < 0 || !read_row(task, n, scratch)) continue;
            char *to = values + lane * size;
            if (product.kind == AUXKERN_PACKED_I8)
                task.not_finite[panel] |= !pack_bytes(product, scratch, to, scales + lane);
            else if (step_of(product.kind) == 2)
                pack_pairs(scratch, product.K, to);
            else
                pack_floats(product.kind, scratch, product.K, to);
        }
    }
}

}  // namespace auxkern
