/* rarefy: kernels for networks that are sparse from the first step. Plain C interface, no torch and no Python.
 *
 * A matrix W of out_features x in_features is held as units (blocks of block_rows x block_cols entries, 1 x 1 for an
 * unstructured pattern) in compressed rows of units. Activations are row-major, one token a row. Every pointer
 * must be valid for the sizes stated; the contents of the index arrays are trusted (rarefy.Pattern.check checks them).
 *
 * Threads are OpenMP's; threads <= 0 means omp_get_max_threads(). Results are the same from run to run and, for
 * everything below, independent of the number of threads. All functions may be called from several threads at once.
 */
#ifndef RAREFY_H
#define RAREFY_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define RAREFY_API __declspec(dllexport)
#else
#define RAREFY_API __attribute__((visibility("default")))
#endif

enum {
  RAREFY_OK = 0,
  RAREFY_BAD_ARGUMENT = -1,      /* a null pointer, a negative size, or a block that does not divide the matrix */
  RAREFY_UNSUPPORTED_BLOCK = -2, /* see rarefy_supports */
  RAREFY_NO_MEMORY = -3,
  RAREFY_TOO_WIDE = -5, /* see rarefy_convolve */
  RAREFY_NO_ISA = -4 /* RAREFY_ISA names an instruction set that this CPU or this build lacks */
};

typedef struct {
  int64_t out_features, in_features, block_rows, block_cols, num_units;
  const int32_t *crow;   /* out_features / block_rows + 1 */
  const void *cols;      /* num_units, ascending inside a row */
  const int32_t *t_crow; /* in_features / block_cols + 1: the same units by columns. Only the gradients read t_* */
  const void *t_rows;    /* num_units, ascending inside a column */
  const int32_t *t_perm; /* num_units: unit j of the transposed order is unit t_perm[j] of the values */
  int32_t index_bytes;   /* of cols and t_rows: 2 (uint16) or 4 (int32) */
} rarefy_pattern;

/* SHA-256 of this header, in hexadecimal, as it was when the library was built: callers see whether they know it. */
RAREFY_API const char *rarefy_interface(void);

/* The instruction set in use: "amx", "avx512bf16", "avx512", "avx2", "neon" or "portable"; "unavailable" if the environment variable
 * RAREFY_ISA asks for one that is not there: then the kernels return RAREFY_NO_ISA until rarefy_set_isa succeeds. */
RAREFY_API const char *rarefy_isa(void);
/* 0, or RAREFY_NO_ISA (and nothing changes) if this CPU or this build lacks it. */
RAREFY_API int rarefy_set_isa(const char *name);
/* Comma separated, best first: what both this build and this CPU offer. */
RAREFY_API const char *rarefy_isas(void);
/* Whether the kernels know the block shape (1) or not (0). */
RAREFY_API int rarefy_supports(int64_t block_rows, int64_t block_cols);

/* y (batch, out) = x (batch, in) W^T + bias (out). bias may be NULL. All of y is written. */
RAREFY_API int rarefy_spmm_f32(const rarefy_pattern *pattern, const float *values, const float *x, const float *bias,
                               float *y, int64_t batch, int threads);
/* dx (batch, in) = dy (batch, out) W; dvalues (num_units, block_rows, block_cols) = (dy^T x) at the pattern; dbias (out) =
 * the column sums of dy: in one pass over dy, and written whole. Any of them may be NULL: then it is not computed, and what
 * only it needs may be NULL too. */
RAREFY_API int rarefy_backward_f32(const rarefy_pattern *pattern, const float *values, const float *dy, const float *x,
                                   float *dx, float *dvalues, float *dbias, int64_t batch, int threads);

/* The same with activations and their gradients in bfloat16 (the upper half of a float32). Values, bias and their
 * gradients stay float32, and so does the arithmetic; what is stored is rounded to nearest, ties to even. */
RAREFY_API int rarefy_spmm_bf16(const rarefy_pattern *pattern, const float *values, const uint16_t *x, const float *bias,
                                uint16_t *y, int64_t batch, int threads);
RAREFY_API int rarefy_backward_bf16(const rarefy_pattern *pattern, const float *values, const uint16_t *dy,
                                    const uint16_t *x, uint16_t *dx, float *dvalues, float *dbias, int64_t batch,
                                    int threads);

/* The same with activations in float32, where products may round their factors to bfloat16: as fast as the processor
 * allows. Instruction sets without a gain from it compute as in float32. */
RAREFY_API int rarefy_spmm_medium(const rarefy_pattern *pattern, const float *values, const float *x, const float *bias,
                                  float *y, int64_t batch, int threads);
RAREFY_API int rarefy_backward_medium(const rarefy_pattern *pattern, const float *values, const float *dy,
                                      const float *x, float *dx, float *dvalues, float *dbias, int64_t batch,
                                      int threads);

/* An MLP in one call: h = act(z), z = x W_up^T + up_bias, and y = h W_down^T + down_bias. With a gate h = act(g) * z, where
 * g = x W_gate^T + gate_bias.
 * x, y, dy and dx hold bfloat16 if `half_rows`, else float32; with `half_saved` products may round their factors to
 * bfloat16. z is stored for the backward pass, in bfloat16 if
 * `half_saved` (then y is that of the rounded z), as (ceil(batch / RAREFY_SAVED_TOKENS), hidden, RAREFY_SAVED_TOKENS):
 * whole groups of tokens, feature-major; what stands at tokens past the last is undefined. With a gate there are
 * 2 hidden features: g's, then z's. */
enum { RAREFY_GELU = 0, RAREFY_GELU_TANH = 1, RAREFY_SILU = 2, RAREFY_RELU = 3, RAREFY_SQUARED_RELU = 4 };
#define RAREFY_SAVED_TOKENS 64

typedef struct {
  const rarefy_pattern *pattern;
  const float *values, *bias; /* bias may be NULL; the backward pass does not read it */
} rarefy_layer;

typedef struct {
  rarefy_layer gate, up, down; /* gate.pattern is NULL if there is none. Outputs of gate and up are down's inputs */
  int32_t activation, half_rows, half_saved;
} rarefy_mlp;

typedef struct {
  float *values, *bias; /* bias may be NULL: then it is not computed */
} rarefy_layer_gradients;

typedef struct {
  rarefy_layer_gradients gate, up, down; /* gate is not read if there is none */
} rarefy_mlp_gradients;

RAREFY_API int rarefy_mlp_forward(const rarefy_mlp *mlp, const void *x, void *y, void *z, int64_t batch, int threads);
/* dx may be NULL. */
RAREFY_API int rarefy_mlp_backward(const rarefy_mlp *mlp, const void *dy, const void *x, const void *z, void *dx,
                                   const rarefy_mlp_gradients *gradients, int64_t batch, int threads);

/* A convolution of images, whose weight is a pattern's matrix (out_channels, channels * taps), taps in rows of the kernel.
 * Pairs are (height, width); out_size = (in_size + 2 padding - dilation (kernel - 1) - 1) / stride + 1, rounded down. */
typedef struct {
  int64_t images, channels, out_channels, in_size[2], out_size[2];
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  const float *scale, *shift; /* (channels), or NULL: what is convolved is ReLU(x * scale + shift), and padding zero */
} rarefy_conv;

/* What images hold; MEDIUM: float32, where products may round their factors to bfloat16, and dbias what it adds. */
enum { RAREFY_FLOAT32 = 0, RAREFY_BFLOAT16 = 1, RAREFY_MEDIUM = 2 };

/* y = the convolution of x, + bias (out_channels), which may be NULL. All of y is written. Images are (images, height, width,
 * channels), in what `activations` says; values, bias and their gradients are float32. RAREFY_TOO_WIDE: what a few pixels of
 * one channel read would not fit into a cache, for taps spread too far. */
RAREFY_API int rarefy_convolve(const rarefy_conv *conv, const rarefy_pattern *pattern, const float *values,
                               const void *x, const float *bias, void *y, int32_t activations, int threads);
/* dvalues, dx and dbias, the last two unless NULL, in one pass over dy. dx is the gradient of what is convolved. */
RAREFY_API int rarefy_convolve_backward(const rarefy_conv *conv, const rarefy_pattern *pattern, const float *values,
                                        const void *dy, const void *x, void *dx, float *dvalues, float *dbias,
                                        int32_t activations, int threads);

/* Batch normalisation over rows (rows, channels), then a residual added and ReLU, where asked for:
 * y = act((x - mean) / sqrt(var + eps) * weight + bias + residual). */
typedef struct {
  int64_t rows, channels;
  int32_t half;                /* x, y, residual and their gradients hold bfloat16, else float32 */
  int32_t relu, training;
  float eps;
  const float *weight, *bias;  /* NULL: ones, zeros */
  float *mean, *var;           /* of the rows, var without Bessel's correction: written if training, else read */
} rarefy_norm;

/* residual may be NULL, and so may y: then only mean and var are computed. */
RAREFY_API int rarefy_norm_forward(const rarefy_norm *norm, const void *x, const void *residual, void *y, int threads);
/* y may be NULL where there was no residual or no ReLU; dresidual, dweight and dbias too. */
RAREFY_API int rarefy_norm_backward(const rarefy_norm *norm, const void *dy, const void *x, const void *y, void *dx,
                                    void *dresidual, float *dweight, float *dbias, int threads);

/* Layer normalisation of a residual stream x (rows, width), to which delta is added first: sum = x + delta, and
 * y = (sum - mean) * rstd * weight + bias, where rstd = 1 / sqrt(var + eps). delta and y hold bfloat16 where said, the rest is
 * float32. Where there is a period the rows are sequences of that many, and the last width / 2 features of y come from the
 * row before, zeros in the first of a sequence. */
typedef struct {
  int64_t rows, width;
  int32_t half_delta, half_y;
  float eps;
  const float *weight, *bias; /* (width), or NULL: ones, zeros */
  int64_t period;             /* divides rows, or 0 */
} rarefy_layer_norm;

/* delta may be NULL, and then sum too. mean and rstd: (rows). */
RAREFY_API int rarefy_layer_norm_forward(const rarefy_layer_norm *norm, const float *x, const void *delta, float *sum,
                                         void *y, float *mean, float *rstd, int threads);
/* dx from dy and dsum, the gradient that reaches sum besides, which may be NULL. ddelta is dx in delta's dtype, and may be
 * NULL. dweight and dbias (width) are written. */
RAREFY_API int rarefy_layer_norm_backward(const rarefy_layer_norm *norm, const void *dy, const float *dsum, const float *sum,
                                          const float *mean, const float *rstd, float *dx, void *ddelta, float *dweight,
                                          float *dbias, int threads);

/* A step of AdamW, in place, on the `count` entries of a parameter whose leading index has `entries` each:
 * average += (gradient - average) * new_average, square = square * old_square + gradient^2 * new_square, and
 * values = values * decay - average / (sqrt(square) * root_by_age[a] + eps) * size_by_age[a], where a is the age of the
 * entry's leading index, or 0 for all if age is NULL. */
typedef struct {
  int64_t count, entries;
  float *values, *average, *square;
  const float *gradient;
  const int32_t *age;
  const float *size_by_age, *root_by_age;
  float decay, new_average, old_square, new_square, eps;
} rarefy_adamw;
/* Of `num` parameters, which share no memory. */
RAREFY_API int rarefy_adamw_step(const rarefy_adamw *parameters, int64_t num, int threads);

/* Scores of the links of a bipartite graph by the three-step paths that they close: rows and columns of a 1 x 1 pattern are
 * its nodes. What a node counts for, seen from a line with c neighbours in common, is 0 where c is 0, else
 * (inside ? 1 + c : 1) / max(degree - c, 1).
 * pairs (rows, rows): what row j counts for, seen from row i, at [j][i]. */
RAREFY_API int rarefy_link_pairs(const rarefy_pattern *pattern, int32_t inside, float *pairs, int threads);
/* scores (last - first, rows) of the columns [first, last): what the row's columns count for, seen from the column, in
 * ascending order, plus what the column's rows count for, seen from the row; rounded to 17 bits. */
RAREFY_API int rarefy_link_scores(const rarefy_pattern *pattern, int32_t inside, const float *pairs, int64_t first,
                                  int64_t last, float *scores, int threads);

/* Causal attention of several heads on the output of one fused projection, scores scaled by 1 / sqrt(head_dim). qkv, out and
 * their gradients hold bfloat16 if `half`, else float32; arithmetic is float32.
 * qkv (batch, tokens, 3, heads, head_dim): query, key and value of each token. out (batch, tokens, heads, head_dim);
 * lse (batch, heads, tokens): the natural logarithm of each softmax's denominator, which the backward pass needs.
 * rotary (tokens, head_dim), of an even head_dim: for each token head_dim / 2 cosines and as many sines of the angles by which
 * the pairs (f, f + head_dim / 2) of queries and keys are turned; NULL: nothing is turned.
 * head_dim >= 1, unless there are no rows at all. Scratch is O(tokens * head_dim) a thread. */
RAREFY_API int rarefy_attention(const void *qkv, const float *rotary, void *out, float *lse, int32_t half, int64_t batch,
                                int64_t tokens, int64_t heads, int64_t head_dim, int threads);
/* dqkv, all of it, from dout, which has out's shape. */
RAREFY_API int rarefy_attention_backward(const void *dout, const void *qkv, const float *rotary, const void *out,
                                         const float *lse, void *dqkv, int32_t half, int64_t batch, int64_t tokens,
                                         int64_t heads, int64_t head_dim, int threads);

/* The transposed index by counting sort, in O(num_units + rows + cols). cols and t_rows have index_bytes each.
 * t_crow: num_unit_cols + 1, t_rows and t_perm: crow[num_unit_rows]. RAREFY_BAD_ARGUMENT if a column is out of range. */
RAREFY_API int rarefy_transpose(int64_t num_unit_rows, int64_t num_unit_cols, const int32_t *crow, const void *cols,
                                int32_t *t_crow, void *t_rows, int32_t *t_perm, int32_t index_bytes);

/* weight (out, in), written whole: the values at the pattern, zeros elsewhere. Any block shape; t_* is not read. */
RAREFY_API int rarefy_expand_f32(const rarefy_pattern *pattern, const float *values, float *weight, int threads);
/* values: the entries of weight (out, in) at the pattern. */
RAREFY_API int rarefy_collect_f32(const rarefy_pattern *pattern, const float *weight, float *values, int threads);

/* Growth: the k best absent units of a dense gradient that is seen a tile at a time.
 *
 * The score of a unit is the mean of |g| over its entries: their float32 sum in row-major order inside the unit, divided
 * by the number of entries (for a 1 x 1 unit |g| itself). The order is total: higher score first, then lower flat unit
 * index (unit row * num_unit_cols + unit col). Units in the pattern are skipped. NaN and infinite scores are counted and
 * never selected. The selection depends neither on the order of the tiles nor on the number of threads.
 * One selection is for one caller at a time. Memory: O(k) a thread. At most 2^32 units, active and absent together. */
RAREFY_API void *rarefy_grow_new(int64_t k); /* NULL if k < 0 or there is no memory */
/* tile: (num_unit_rows * block_rows, in_features) row-major, the rows of the gradient from unit row first_unit_row on. */
RAREFY_API int rarefy_grow_scan_f32(void *selection, const rarefy_pattern *pattern, const float *tile,
                                    int64_t first_unit_row, int64_t num_unit_rows, int threads);
/* Writes the selection, best first, and returns how many there are: k, or fewer if there were fewer candidates;
 * a negative error code otherwise.
 * unit_indices and scores hold k; either may be NULL, as may num_nonfinite. More tiles may be scanned afterwards. */
RAREFY_API int64_t rarefy_grow_finish(void *selection, int64_t *unit_indices, float *scores, int64_t *num_nonfinite);
RAREFY_API void rarefy_grow_free(void *selection);

/* A matrix of float32 (element_bytes 4) or bfloat16 (2) in memory that is kept for later calls once it is freed: a
 * DLManagedTensor of DLPack, whose deleter may be called from any thread. Its contents are undefined. NULL: no memory. */
RAREFY_API void *rarefy_tensor_new(int64_t rows, int64_t cols, int32_t element_bytes);

/* What the machine can do at most, with the instruction set in use: each thread does some work `repeats` times, and the
 * return value is how much all of them did, in FLOPs or in bytes read plus bytes written, for the caller to divide by the
 * time it took. READ and COPY work on `data`, split among the threads, and overwrite it; the others take NULL and 0.
 * RAREFY_NO_ISA: this CPU or this build lacks it. */
enum {
  RAREFY_PROBE_FMA_F32 = 0,
  RAREFY_PROBE_DOT_BF16 = 1,   /* AVX512_BF16 */
  RAREFY_PROBE_TILES_BF16 = 2, /* AMX */
  RAREFY_PROBE_READ = 3,
  RAREFY_PROBE_COPY = 4
};
RAREFY_API int64_t rarefy_probe(int32_t work, void *data, int64_t bytes, int64_t repeats, int threads);

/* Bytes of memory kept for later calls, and its release (what is in use stays). */
RAREFY_API int64_t rarefy_workspace_bytes(void);
RAREFY_API void rarefy_workspace_release(void);

#ifdef __cplusplus
}
#endif
#endif
