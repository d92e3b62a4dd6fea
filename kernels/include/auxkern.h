/* auxkern: the C interface of the native kernels. Plain C, no torch.
 *
 * Shapes: N rows, V vocabulary, I terms. All sizes and strides count elements, not bytes.
 * Functions return a status; nothing is written when it is not AUXKERN_OK.
 */
#ifndef AUXKERN_H
#define AUXKERN_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define AUXKERN_ABI_VERSION 8
#define AUXKERN_MAX_TERMS 8
/* A target that is not among these ids but among others, of another shard of the vocabulary. */
#define AUXKERN_NO_TARGET INT64_MIN

#if defined(_WIN32)
#define AUXKERN_EXPORT __declspec(dllexport)
#else
#define AUXKERN_EXPORT __attribute__((visibility("default")))
#endif

enum auxkern_status {
    AUXKERN_OK = 0,
    AUXKERN_BAD_ARGUMENT = 1,    /* a size, count or dtype out of range, or a null pointer */
    AUXKERN_UNSUPPORTED_ISA = 2, /* the instruction set asked for is not in this CPU or build */
    AUXKERN_OUT_OF_MEMORY = 3,   /* no scratch memory, V floats per thread */
    AUXKERN_NOT_FINITE = 4,      /* a weight is NaN or infinite, and its kind cannot keep that */
};

enum auxkern_dtype { AUXKERN_F32 = 0, AUXKERN_F16 = 1, AUXKERN_BF16 = 2 };

enum auxkern_isa {
    AUXKERN_ISA_BEST = 0,
    AUXKERN_ISA_GENERIC = 1,
    AUXKERN_ISA_AVX2 = 2,   /* with FMA and F16C */
    AUXKERN_ISA_AVX512 = 3, /* F, BW, DQ, VL */
    /* The same, with dot products of narrow numbers for those kernels that have them. */
    AUXKERN_ISA_AVX2_VNNI = 4,
    AUXKERN_ISA_AVX512_VNNI = 5,
    AUXKERN_ISA_AVX512_BF16 = 6, /* and VNNI */
};

/* One term: scale * softcap(values). Row n starts at
 * values + (n / inner) * stride_outer + (n % inner) * stride_inner. */
typedef struct {
    const void *values;
    int64_t width; /* ids per row, at least V */
    int64_t inner; /* at least 1 */
    int64_t stride_outer;
    int64_t stride_inner;
    int64_t stride_column;
    int32_t dtype;
    float scale;
    float softcap; /* 0: none */
} auxkern_term;

/* Runs body(context) on `threads` threads and returns when all are done: the signature of
 * GOMP_parallel, so that the caller's own OpenMP pool can be lent to the kernels. */
typedef void (*auxkern_parallel)(void (*body)(void *), void *context, unsigned threads, unsigned flags);

typedef struct {
    int32_t threads;           /* at least 1 */
    int32_t isa;               /* auxkern_isa */
    auxkern_parallel parallel; /* NULL: threads are started for the call and joined */
} auxkern_execution;

/* The gradient that a forward call makes on the way, while a row's logits are still in the cache:
 * of sum_n row_weight[n] * ((1 - label_smoothing) nll[n] + label_smoothing smooth[n] + z_loss lse[n]^2). */
typedef struct {
    const float *row_weight; /* (N,) */
    float label_smoothing;
    float z_loss;
    void *const *gradients; /* n_terms pointers to contiguous (N, width) of the term's dtype, or NULL;
                             * contiguous values may be replaced by their own gradient */
} auxkern_gradient;

AUXKERN_EXPORT int32_t auxkern_abi_version(void);

/* 1 if this CPU and build have the instruction set. */
AUXKERN_EXPORT int32_t auxkern_has_isa(int32_t isa);

/* What AUXKERN_ISA_BEST means on this CPU. */
AUXKERN_EXPORT int32_t auxkern_best_isa(void);

/* Per row: nll = lse - z[y], row_max = max z, log_sum = log sum exp(z - row_max) and, unless NULL,
 * smooth = mean (lse - z), argmax (lowest id among equals), term_nll (I, N): the target's nll
 * under each term alone. Rows with y == ignore_index get 0 (argmax -1) and are not read; rows with
 * y outside [0, V) get NaN in nll and row_max. A row with AUXKERN_NO_TARGET is one whose target has a
 * logit of -inf: its nll is infinite, the rest says what its V ids add up to. Of a row of nothing but
 * -inf, row_max and log_sum are -inf, and the nll of its target is NaN. */
AUXKERN_EXPORT int32_t auxkern_cross_entropy_forward(
    const auxkern_term *terms, int32_t n_terms,
    const int64_t *target, /* (N,) */
    int64_t N, int64_t V, int64_t ignore_index,
    float *nll,       /* (N,) */
    float *row_max,   /* (N,) */
    float *log_sum,   /* (N,) */
    float *smooth,    /* (N,) or NULL */
    int64_t *argmax,  /* (N,) or NULL */
    float *term_nll,  /* (I, N) or NULL */
    const auxkern_gradient *gradient, /* or NULL */
    const auxkern_execution *execution);

/* dz[n, v] = exp_coefficient[n] * exp(z[n, v] - row_max[n]) - constant[n], target_gradient[n] at
 * v = y if that is in [0, V), 0 for v >= V; gradients[i] = dz * scale * softcap'. Rows whose three coefficients are 0
 * are set to 0 and not read. */
AUXKERN_EXPORT int32_t auxkern_cross_entropy_backward(
    const auxkern_term *terms, int32_t n_terms,
    const int64_t *target, /* (N,) */
    int64_t N, int64_t V,
    const float *row_max,         /* (N,) */
    const float *exp_coefficient, /* (N,) */
    const float *constant,        /* (N,) */
    const float *target_gradient, /* (N,) */
    void *const *gradients, /* n_terms pointers to contiguous (N, width) of the term's dtype, or NULL */
    const auxkern_execution *execution);

/* ---- sums of output heads -------------------------------------------------------------------
 *
 *     z[n, v] = sum over heads of scale * (hidden[n, :] . weight[v, :] + bias[v])
 *               + values of the entries with row n and id v
 *
 * for C rows at a time. The vocabulary is cut into segments of AUXKERN_HEADS_IDS ids; the results of
 * a segment do not depend on the others, nor on the number of threads. Of the logits only
 * e = exp(z - segment_max) is kept, once, with the rows side by side: e[v * stride + n].
 */
#define AUXKERN_HEADS_IDS 1024

typedef struct {
    const float *hidden; /* (C, D) contiguous */
    const void *weight;  /* V rows of D */
    const float *bias;   /* (V,) or NULL */
    int64_t weight_stride; /* from row to row; 0 where all are one */
    int64_t D;
    int32_t dtype; /* of the weight */
    float scale;
    float *back;     /* forward, out: (segments, D, stride), e @ weight of the segment, or NULL */
    float *d_weight; /* backward, out: (V, D) contiguous, or NULL */
    float *d_bias;   /* backward, out: (V,) or NULL */
} auxkern_head;

/* Entries of some rows, by rising id: the rows' targets, or values added to a few logits. */
typedef struct {
    int64_t count;
    const int64_t *ids;  /* (count,) in [0, V) */
    const int64_t *rows; /* (count,) in [0, C) */
} auxkern_entries;

typedef struct {
    int64_t C;
    int64_t stride;          /* C or more, a multiple of 16 */
    auxkern_entries targets; /* one at most for each row */
    auxkern_entries sparse;
    const float *values; /* (sparse.count,) */
    const uint8_t *live; /* (C,) 0 for rows whose gradient is 0 whatever they hold, or NULL: all live */
    float *e;            /* (V, stride), or NULL where no gradient is wanted */
    float *segment_max;  /* (segments, stride): the reference of e, close to the maximum */
    float *segment_sum;  /* (segments, stride): sum of e over all ids but the target */
    float *z_target;     /* (C,); not written for a row without a target */
} auxkern_rows;

typedef struct {
    const float *coefficient;     /* (segments, stride): dz = coefficient * e, but for targets */
    const float *target_gradient; /* (C,): dz of the targets */
    float *d_values;              /* (sparse.count,) dz at the entries, or NULL */
    int32_t accumulate;           /* add to d_weight and d_bias instead of writing them */
} auxkern_heads_gradient;

/* Fills e, segment_max, segment_sum, z_target and each head's back. */
AUXKERN_EXPORT int32_t auxkern_heads_forward(const auxkern_head *heads, int32_t n_heads,
                                             const auxkern_rows *rows, int64_t V,
                                             const auxkern_execution *execution);

/* Fills each head's d_weight and d_bias, and d_values, from e. */
AUXKERN_EXPORT int32_t auxkern_heads_backward(const auxkern_head *heads, int32_t n_heads,
                                              const auxkern_rows *rows, int64_t V,
                                              const auxkern_heads_gradient *gradient,
                                              const auxkern_execution *execution);

/* ---- linear layers that are not trained ------------------------------------------------------ */

/* y[m, n] = sum over k of x[m, k] * weight[n, k] + bias[n], for any M, and plus what y[m, n] held with
 * `accumulate`; a row of y is the same to the last bit whatever other rows there are. */
typedef struct {
    int64_t M, N, K;     /* K at least 1 */
    const float *x;      /* M rows of K */
    const void *weight;  /* N rows of K */
    const float *bias;   /* (N,) or NULL */
    float *y;            /* M rows of N */
    int64_t x_stride, weight_stride, y_stride; /* from row to row; rows of x and weight may overlap */
    int32_t dtype;       /* of the weight */
    int32_t accumulate;
} auxkern_linear;

AUXKERN_EXPORT int32_t auxkern_linear_forward(const auxkern_linear *layer, const auxkern_execution *execution);

/* ---- products with a weight that is packed once ------------------------------------------------
 *
 *     z[m, n] = sum over k of x[m, k] * weight[n, k]
 *
 * A row of the result is the same to the last bit whatever other rows there are. A weight stands in
 * panels of 16 outputs, the same bytes for every instruction set; k is padded to a multiple of the
 * step with zeros, outputs to whole panels.
 */
enum auxkern_packed_kind {
    AUXKERN_PACKED_F32 = 0,  /* [panel][k][16]; products and sums in float32 */
    AUXKERN_PACKED_F16 = 1,  /* the same, kept in half precision and widened */
    AUXKERN_PACKED_BF16 = 2, /* [panel][k / 2][16][2] of bfloat16, widened */
    AUXKERN_PACKED_BF16_PAIRS = 3, /* the same bytes; rows are rounded to bfloat16 too, sums are float32 */
    AUXKERN_PACKED_I8 = 4, /* [panel][k / 4][16][4], each byte 128 more than round(weight / scale); rows are
                            * rounded likewise; scales are [panel][group][16] */
    /* The blocks of a GGUF file, K a multiple of AUXKERN_BLOCK: for each, integers of the 16 outputs, then their
     * scales d and of Q4_1 their minima m, each [16] in half precision. Rows are rounded to bytes. */
    AUXKERN_PACKED_Q8_0 = 5, /* [panel][block]{[8][16][4] bytes, each q + 128; d}: d q */
    AUXKERN_PACKED_Q4_0 = 6, /* [panel][block]{[4][16][4] bytes, of k in the lower four bits and k + 16 in the
                              * upper; d}: d (q - 8) */
    AUXKERN_PACKED_Q4_1 = 7, /* the same and m: d q + m */
    /* The same bytes, widened; products and sums in float32. */
    AUXKERN_PACKED_Q8_0_WIDENED = 8,
    AUXKERN_PACKED_Q4_0_WIDENED = 9,
    AUXKERN_PACKED_Q4_1_WIDENED = 10,
};

#define AUXKERN_BLOCK 32 /* values of a block */
#define AUXKERN_MAX_GROUP 65536 /* most k that share an integer sum: it stays in 32 bits */

typedef struct {
    int64_t N, K;        /* at least 1 */
    int64_t group;       /* AUXKERN_PACKED_I8: k that share a weight's scale, a multiple of 4, or K; of a block's
                          * kind AUXKERN_BLOCK; else 0 */
    const void *values;  /* auxkern_packed_size() says how many bytes; aligned to 64 */
    const float *scales;
    const float *bias;   /* (N,) in the order of the weight's rows, or NULL */
    int32_t kind;
    int32_t turns;       /* 1; 2: panels of the first N / 2 rows and of the others take turns */
} auxkern_product;

enum auxkern_epilogue {
    AUXKERN_STORE = 0, /* y = activation(z + bias) */
    AUXKERN_ADD = 1,   /* y += z + bias */
    AUXKERN_GATE = 2,  /* y[m, n] = activation(z[m, n] + bias) * (z[m, N / 2 + n] + bias); turns must be 2 */
};

enum auxkern_activation {
    AUXKERN_IDENTITY = 0,
    AUXKERN_SILU = 1,
    AUXKERN_GELU_TANH = 2,
    AUXKERN_GELU_ERF = 3,
    AUXKERN_RELU = 4,
};

typedef struct {
    int64_t M;
    const float *x;    /* M rows of K */
    float *y;          /* M rows of `columns` */
    int64_t x_stride, y_stride;
    int64_t columns;   /* the first outputs that are wanted: N at most, N / 2 with AUXKERN_GATE */
    int64_t row_group; /* AUXKERN_PACKED_I8: k of a row that share its scale: a multiple of 4 that is a multiple
                        * or a divisor of the weight's group; 0, or K and more: all. Of a block's kind a
                        * multiple of AUXKERN_BLOCK. */
    int32_t epilogue;
    int32_t activation; /* of AUXKERN_STORE and AUXKERN_GATE */
} auxkern_product_call;

AUXKERN_EXPORT int32_t auxkern_product_forward(const auxkern_product *product, const auxkern_product_call *call,
                                               const auxkern_execution *execution);

/* Some rows of a weight; element (n, k) is at n * row_stride + k * column_stride. Of a block's kind, blocks as the
 * file has them, from row to row `row_stride` bytes; the last two are not read. */
typedef struct {
    const void *weight;
    int64_t rows, row_stride, column_stride;
    int32_t dtype;
} auxkern_weight_rows;

/* Bytes of the values and number of the scales of a product, of which only the sizes are read. */
typedef struct {
    int64_t bytes, scales;
} auxkern_packed_sizes;

AUXKERN_EXPORT int32_t auxkern_packed_size(const auxkern_product *product, auxkern_packed_sizes *sizes);

/* Fills values and scales, which the product points to as well, from weights whose rows follow each
 * other and are N together. A half-precision kind takes its own dtype only. */
AUXKERN_EXPORT int32_t auxkern_pack(const auxkern_product *product, const auxkern_weight_rows *weights, int32_t count,
                                    void *values, float *scales, const auxkern_execution *execution);

/* ---- attention over a cache -------------------------------------------------------------------
 *
 *     out[b, t, h] = sum over columns p that (b, t) sees of softmax(scale * query[b, h, t] . key[b, g, p]) value[b, g, p]
 *
 * where g = h / (heads / key_heads). A row is the same to the last bit whatever columns there are that
 * it does not see, and whatever other rows. A row that sees none is 0.
 */
typedef struct {
    int64_t B, T, P, D;       /* sequences, query positions, columns, width of a head: a multiple of 16 */
    int64_t heads, key_heads; /* the second divides the first */
    const float *query;       /* rows of D; strides count floats */
    int64_t query_stride_batch, query_stride_head, query_stride_position;
    const void *key; /* of cache_dtype, as values; strides count entries */
    int64_t key_stride_batch, key_stride_head, key_stride_column;
    const void *value;
    int64_t value_stride_batch, value_stride_head, value_stride_column;
    const uint8_t *mask; /* not 0 where a position sees a column; NULL: position t sees P - T + t + 1 */
    int64_t mask_stride_batch, mask_stride_query, mask_stride_column;
    float scale;
    int32_t cache_dtype; /* AUXKERN_F32 or AUXKERN_BF16 */
    float *out; /* (B, T, heads, D) contiguous */
} auxkern_attention;

AUXKERN_EXPORT int32_t auxkern_attention_forward(const auxkern_attention *attention,
                                                 const auxkern_execution *execution);

/* ---- a decoder layer as one step --------------------------------------------------------------
 *
 *     q, k, v = split(clip(norm(x) @ qkv)); q, k = rotated(norm(q)), rotated(norm(k))
 *     y = x + after(attention(q, keys, values) @ output)
 *     y = y + after(activation(norm(y) @ gate) * (norm(y) @ up) @ down)
 *
 * Norms that a layer lacks are left out. Rows are the same to the last bit in any batch.
 */
enum auxkern_norm_kind {
    AUXKERN_NORM_NONE = 0,
    AUXKERN_NORM_RMS = 1,   /* x / sqrt(mean x^2 + eps) */
    AUXKERN_NORM_LAYER = 2, /* (x - mean) / sqrt(variance + eps) */
};

typedef struct {
    const float *weight; /* factors, or NULL */
    const float *bias;   /* or NULL */
    float eps;
    int32_t kind;
} auxkern_norm;

/* x and y: (rows, width) contiguous; they may be the same. */
AUXKERN_EXPORT int32_t auxkern_norm_forward(const auxkern_norm *norm, const float *x, float *y, int64_t rows, int64_t width,
                                            const auxkern_execution *execution);

typedef struct {
    auxkern_product weight;
    int64_t row_group; /* as in auxkern_product_call */
} auxkern_layer_product;

typedef struct {
    int64_t D, heads, key_heads, head_width, inner; /* head_width is a multiple of 16 */
    auxkern_norm attention_norm, attention_after;   /* of D; before the projections, and of what attention adds */
    auxkern_norm mlp_norm, mlp_after;
    auxkern_norm query_norm, key_norm;
    auxkern_layer_product qkv;    /* of heads + 2 key_heads times head_width outputs */
    auxkern_layer_product output; /* D outputs */
    auxkern_layer_product up;     /* inner outputs; twice as many, in turns with the gate's, where it is gated */
    auxkern_layer_product down;   /* D outputs */
    float scale;            /* of attention's products */
    float clip;             /* of queries, keys and values; 0: none */
    int32_t activation;
    int32_t gated;
    int32_t parallel;    /* the MLP reads what attention reads, norm(x) */
    int32_t whole_norms; /* norms of queries and keys are over all heads, else over each */
} auxkern_layer;

/* Queries, keys and values of new positions are made, written to `query`, `new_key` and `new_value`. */
#define AUXKERN_LAYER_PROJECT 1
/* What attention makes of `query` goes on through the layer; `query` is overwritten. */
#define AUXKERN_LAYER_ATTEND 2

typedef struct {
    int64_t B, T, P;     /* sequences, new positions, columns that are attended to */
    int64_t rotary;      /* numbers of a head that positions turn, even; 0: none */
    const float *x;      /* (B, T, D) contiguous */
    float *y;            /* (B, T, D) contiguous, no part of x */
    const float *cos;    /* rows of `rotary` */
    const float *sin;
    int64_t angle_stride_batch, angle_stride_position;
    float *query;        /* (B, T, heads, head_width) contiguous; NULL where both stages run */
    void *new_key;       /* columns of new positions; of cache_dtype, as all keys and values */
    void *new_value;
    int64_t new_stride_batch, new_stride_head, new_stride_position;
    const void *key; /* all columns; may be where new ones are written */
    const void *value;
    int64_t key_stride_batch, key_stride_head, key_stride_column;
    int64_t value_stride_batch, value_stride_head, value_stride_column;
    const uint8_t *mask; /* as in auxkern_attention */
    int64_t mask_stride_batch, mask_stride_query, mask_stride_column;
    int32_t stages; /* AUXKERN_LAYER_PROJECT, AUXKERN_LAYER_ATTEND or both */
    int32_t cache_dtype; /* as in auxkern_attention */
} auxkern_layer_call;

AUXKERN_EXPORT int32_t auxkern_layer_forward(const auxkern_layer *layer, const auxkern_layer_call *call,
                                             const auxkern_execution *execution);

/* Layers one after the other, as so many calls would run them: the next one's x is mostly a layer's y. */
AUXKERN_EXPORT int32_t auxkern_layers_forward(const auxkern_layer *const *layers, const auxkern_layer_call *calls,
                                              int64_t count, const auxkern_execution *execution);

/* ---- what of a condition stands in a text ------------------------------------------------------
 *
 * One more token of each of B texts. A stretch is tokens in a row in both a text and its condition. All
 * float32 results are rounded once for each operation.
 */
typedef struct {
    int64_t B, K, D;    /* texts, tokens of a condition, width of marks */
    const int64_t *ids; /* (B,) the new tokens */
    int64_t ids_stride;
    const int64_t *mask; /* (B,) 0 where a new token is padding: it ends no stretch */
    int64_t mask_stride;
    const int64_t *condition_ids; /* (B, K) */
    int64_t condition_ids_stride_batch, condition_ids_stride_token;
    const int64_t *condition_mask; /* (B, K) 0 for padding */
    int64_t condition_mask_stride_batch, condition_mask_stride_token;
    const int64_t *past; /* (B, K, 2) contiguous: `stretches` after the token before; NULL: all 0 */
    const float *share_weight; /* (D,) each */
    const float *lacking_weight;
    const float *written_weight;
    float *share;   /* (B,) longest stretch by now, over the condition's length; 0 without a condition */
    float *lacking; /* (B,) 1 - share; 0 without a condition */
    float *written; /* (B,) 1 where the text ends with the whole condition, else 0 */
    float *begun;   /* (B, K) 1 where it ends with all tokens of the condition before j, j > 0, else 0 */
    float *marks;   /* (B, D) share share_weight + lacking lacking_weight + written written_weight */
    int64_t *stretches; /* (B, K, 2), no part of past: the longest that ends with token j of the condition,
                         * and the one that the text ends with now */
} auxkern_coverage;

AUXKERN_EXPORT int32_t auxkern_coverage_step(const auxkern_coverage *coverage);

/* ---- what is added to the logits of a condition's tokens ---------------------------------------
 *
 *     scores[b, j] = query[b] . keys[b, j] / sqrt(d)  +  start[b] [j = 0]  +  spread follow[b] begun[b, j]
 *                    +  against[b] (lm_scores[b, j] - lm_logit) / spread
 *     end[b]       = spread closing[b] lacking[b]
 *
 * of one position of each of B texts. A text's numbers do not depend on the others.
 */
typedef struct {
    const float *at;
    int64_t stride; /* from text to text */
} auxkern_of_text;

typedef struct {
    int64_t B, K, d;
    auxkern_of_text query; /* d each */
    auxkern_of_text start, follow, closing;
    auxkern_of_text against; /* NULL: no part of the base's logits */
    const float *keys; /* (B, K, d), rows contiguous */
    int64_t keys_stride_batch, keys_stride_token;
    const float *begun;     /* (B, K) contiguous */
    const float *lacking;   /* (B,) */
    const float *lm_scores; /* (B, K) contiguous */
    float lm_logit, spread;
    float *scores; /* (B, K) */
    float *end;    /* (B,) */
} auxkern_pointer;

AUXKERN_EXPORT int32_t auxkern_pointer_step(const auxkern_pointer *pointer);

/* ---- sampling ------------------------------------------------------------------------------- */

enum auxkern_row_status {
    AUXKERN_ROW_OK = 0,
    AUXKERN_ROW_NAN = 1,      /* a logit is NaN */
    AUXKERN_ROW_EMPTY = 2,    /* no logit is finite */
    AUXKERN_ROW_INFINITE = 3, /* a logit is +inf */
};

/* Ids of each row, (N, width) contiguous; an id outside [0, V) stands for nothing. */
typedef struct {
    const int64_t *ids;
    int64_t width;
} auxkern_row_ids;

/* One entry per row unless said otherwise. In this order, z being the sum of the terms:
 * z[added] += added_values; z[bias] += bias_values; z of ids in prompt or history divided
 * (z > 0) or multiplied (else) by repetition; z[id] -= presence + frequency * count in history, if
 * there is any; then d = (z - max z) / temperature; the top_k largest z and all equal to the last of
 * them; of these, by falling z and rising id, the first, and each before which the sum of masses exp d
 * has not reached top_p of the sum of all; of these those with d >= log_min_p. Masses are integers, so
 * that no order of adding matters: floor(2^(31 - o) 2^s), where o is -d log2(e) with 22 bits of its
 * fraction and s = 31 - bits of V (auxkern/core/mass.py). The token is the id with the largest
 * d - log(-log1p(-u)), the lowest among equals, where u = (bits + 0.5) 2^-32 and the bits are word
 * id % 4 of Philox4x32-10 of counter (id / 4, 0, position low, position high) and key (seed low, seed
 * high). With temperature 0 it is the id with the largest z, and no filter applies. */
typedef struct {
    const float *temperature;
    const int64_t *top_k;    /* at least 1; V or more: all */
    const double *top_p;     /* less its slack of 2^-20, which may leave it below 0; 1: all */
    const float *log_min_p;  /* -inf: all */
    const float *repetition; /* 1: none */
    const float *presence;
    const float *frequency;
    const int64_t *seed;
    const int64_t *position;
    auxkern_row_ids prompt;
    auxkern_row_ids history;
    auxkern_row_ids added;
    auxkern_row_ids bias;
    const float *added_values; /* (N, added.width) */
    const float *bias_values;  /* (N, bias.width) */
    const float *const *row_scales; /* for each term (N,) factors, or NULL: none */
} auxkern_sampling;

/* token (N,): -1 where the status is not AUXKERN_ROW_OK; logprob (N,) or NULL: of the token among
 * what the filters left, 0 with temperature 0. */
AUXKERN_EXPORT int32_t auxkern_sample(const auxkern_term *terms, int32_t n_terms, int64_t N, int64_t V,
                                      const auxkern_sampling *sampling, int64_t *token, int32_t *status,
                                      float *logprob, const auxkern_execution *execution);

#ifdef __cplusplus
}
#endif
#endif
