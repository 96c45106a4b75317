// What the translation units share. Only declarations and plain data: an inline function here could be compiled once
// with AVX-512 and then be used by the portable code, since the linker keeps any one copy.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "rarefy.h"

namespace rarefy {

// What x, y, dy and dx hold. MEDIUM: float32, and a product may round its factors to bfloat16.
enum Activations { FLOAT32 = RAREFY_FLOAT32, BFLOAT16 = RAREFY_BFLOAT16, MEDIUM = RAREFY_MEDIUM };

// One instruction set's entry points. Arguments are as in rarefy.h, already checked; threads >= 1.
struct Kernels {
  const char *name;
  int (*supports)(int64_t block_rows, int64_t block_cols);
  int (*spmm)(const rarefy_pattern *, const float *values, const void *x, const float *bias, void *y, Activations,
              int64_t batch, int threads);
  // Any of dx, dvalues and dbias may be null.
  int (*backward)(const rarefy_pattern *, const float *values, const void *dy, const void *x, void *dx, float *dvalues,
                  float *dbias, Activations, int64_t batch, int threads);
  int (*mlp_forward)(const rarefy_mlp *, const void *x, void *y, void *z, int64_t batch, int threads);
  int (*mlp_backward)(const rarefy_mlp *, const void *dy, const void *x, const void *z, void *dx,
                      const rarefy_mlp_gradients *, int64_t batch, int threads);
  int (*attention)(const void *qkv, const float *rotary, void *out, float *lse, bool half, int64_t batch, int64_t tokens,
                   int64_t heads, int64_t head_dim, int threads);
  int (*attention_backward)(const void *dout, const void *qkv, const float *rotary, const void *out, const float *lse,
                            void *dqkv, bool half, int64_t batch, int64_t tokens, int64_t heads, int64_t head_dim,
                            int threads);
  int (*convolve)(const rarefy_conv *, const rarefy_pattern *, const float *values, const void *x, const float *bias,
                  void *y, Activations, int threads);
  int (*convolve_backward)(const rarefy_conv *, const rarefy_pattern *, const float *values, const void *dy,
                           const void *x, void *dx, float *dvalues, float *dbias, Activations, int threads);
  int (*norm_forward)(const rarefy_norm *, const void *x, const void *residual, void *y, int threads);
  int (*norm_backward)(const rarefy_norm *, const void *dy, const void *x, const void *y, void *dx, void *dresidual,
                       float *dweight, float *dbias, int threads);
  int (*layer_norm_forward)(const rarefy_layer_norm *, const float *x, const void *delta, float *sum, void *y, float *mean,
                            float *rstd, int threads);
  int (*layer_norm_backward)(const rarefy_layer_norm *, const void *dy, const float *dsum, const float *sum,
                             const float *mean, const float *rstd, float *dx, void *ddelta, float *dweight, float *dbias,
                             int threads);
  int (*adamw)(const rarefy_adamw *, int64_t num, int threads);
  int (*link_pairs)(const rarefy_pattern *, bool inside, float *pairs, int threads);
  int (*link_scores)(const rarefy_pattern *, bool inside, const float *pairs, int64_t first, int64_t last, float *scores,
                     int threads);
  int64_t (*probe)(int32_t work, void *data, int64_t bytes, int64_t repeats, int threads);
};

const Kernels *kernels_portable();
const Kernels *kernels_avx2();
const Kernels *kernels_avx512();
const Kernels *kernels_avx512bf16();
const Kernels *kernels_amx();
bool amx_allowed();
// AVX-512's table with other products.
Kernels over_avx512(const char *name, decltype(Kernels::spmm) spmm, decltype(Kernels::backward) backward,
                    decltype(Kernels::mlp_forward) mlp_forward, decltype(Kernels::mlp_backward) mlp_backward);
const Kernels *kernels_neon();

// Memory from the pool, 64-byte aligned, kept for a later call when it is released. Null if there is none to be had.
struct Lease {
  char *data;
  size_t bytes;
};
Lease lease_acquire(size_t bytes);
void lease_release(Lease lease);

}  // namespace rarefy
