// Products that may round their factors to bfloat16 (bfloat16 activations, and float32 ones under medium precision) on panels
// of bfloat16 cells, with AVX512_BF16's dot products. What is exact, few tokens and all else are AVX-512's.
#define RAREFY_DOT_CELLS

#include "internal.h"

#include "attention.h"
#include "drive_conv_turned.h"
#include "drive_mlp.h"
#include "norm_entries.h"

namespace rarefy {
namespace {

constexpr int64_t kFewTokens = 192;  // below, AVX-512's kernels

bool takes(Activations activations, int64_t batch) { return activations != FLOAT32 && batch >= kFewTokens; }

int spmm(const rarefy_pattern *p, const float *values, const void *x, const float *bias, void *y, Activations activations,
         int64_t batch, int threads) {
  const TileKernels *kernels = find_tiled(p);
  if (kernels == nullptr || !takes(activations, batch)) {
    return kernels_avx512()->spmm(p, values, x, bias, y, activations, batch, threads);
  }
  const bool half = activations == BFLOAT16;
  return multiply_tiled(p, kernels, false, values, {x, p->in_features, half}, bias, {y, p->out_features, half}, batch, threads);
}

int backward(const rarefy_pattern *p, const float *values, const void *dy, const void *x, void *dx, float *dvalues,
             float *dbias, Activations activations, int64_t batch, int threads) {
  const TileKernels *kernels = find_tiled(p);
  const bool only_dx = dvalues == nullptr && dbias == nullptr && dx != nullptr;
  if (kernels == nullptr || !takes(activations, batch) || p->t_crow == nullptr || (dvalues == nullptr && !only_dx)) {
    return kernels_avx512()->backward(p, values, dy, x, dx, dvalues, dbias, activations, batch, threads);
  }
  const bool half = activations == BFLOAT16;
  const RowMajor dy_rows = {dy, p->out_features, half}, x_rows = {x, p->in_features, half}, dx_rows = {dx, p->in_features, half};
  if (only_dx) return multiply_tiled(p, kernels, true, values, dy_rows, nullptr, dx_rows, batch, threads);
  return backward_tiled(p, kernels, values, dy_rows, x_rows, dx_rows, dvalues, dbias, batch, threads);
}

bool takes(const rarefy_mlp *mlp, int64_t batch) {
  return mlp->half_saved != 0 && batch >= RAREFY_SAVED_TOKENS && find_tiled(mlp->up.pattern) != nullptr &&
         find_tiled(mlp->down.pattern) != nullptr && (mlp->gate.pattern == nullptr || find_tiled(mlp->gate.pattern) != nullptr);
}

int mlp_forward(const rarefy_mlp *mlp, const void *x, void *y, void *z, int64_t batch, int threads) {
  if (!takes(mlp, batch)) return kernels_avx512()->mlp_forward(mlp, x, y, z, batch, threads);
  return mlp_forward_with(find_tiled, *mlp, x, y, z, batch, threads);
}

int mlp_backward(const rarefy_mlp *mlp, const void *dy, const void *x, const void *z, void *dx,
                 const rarefy_mlp_gradients *gradients, int64_t batch, int threads) {
  if (!takes(mlp, batch)) return kernels_avx512()->mlp_backward(mlp, dy, x, z, dx, gradients, batch, threads);
  return mlp_backward_with(find_tiled, *mlp, dy, x, z, dx, *gradients, batch, threads);
}

int attention(const void *qkv, const float *rotary, void *out, float *lse, bool half, int64_t batch, int64_t tokens,
              int64_t heads, int64_t dim, int threads) {
  if (!half) return kernels_avx512()->attention(qkv, rotary, out, lse, half, batch, tokens, heads, dim, threads);
  return attention_forward(static_cast<const bf16 *>(qkv), rotary, static_cast<bf16 *>(out), lse, batch, tokens, heads, dim,
                           threads);
}

int attention_backward(const void *dout, const void *qkv, const float *rotary, const void *out, const float *lse, void *dqkv,
                       bool half, int64_t batch, int64_t tokens, int64_t heads, int64_t dim, int threads) {
  if (!half) {
    return kernels_avx512()->attention_backward(dout, qkv, rotary, out, lse, dqkv, half, batch, tokens, heads, dim, threads);
  }
  return attention_backward<bf16>(static_cast<const bf16 *>(dout), static_cast<const bf16 *>(qkv), rotary,
                                  static_cast<const bf16 *>(out), lse, static_cast<bf16 *>(dqkv), batch, tokens, heads, dim,
                                  threads);
}

// With few images AVX-512's kernels, whose panels have half as many.
bool takes(const rarefy_conv *conv, Activations activations) { return activations != FLOAT32 && conv->images > kLanes / 2; }

int convolve(const rarefy_conv *conv, const rarefy_pattern *p, const float *values, const void *x, const float *bias, void *y,
             Activations activations, int threads) {
  if (!takes(conv, activations)) return kernels_avx512()->convolve(conv, p, values, x, bias, y, activations, threads);
  return rarefy::convolve(*conv, p, values, x, bias, y, activations == BFLOAT16, threads);
}

int convolve_backward(const rarefy_conv *conv, const rarefy_pattern *p, const float *values, const void *dy, const void *x,
                      void *dx, float *dvalues, float *dbias, Activations activations, int threads) {
  if (!takes(conv, activations)) {
    return kernels_avx512()->convolve_backward(conv, p, values, dy, x, dx, dvalues, dbias, activations, threads);
  }
  return rarefy::convolve_backward(*conv, p, values, dy, x, dx, dvalues, dbias, activations == BFLOAT16, threads);
}

}  // namespace

const Kernels *kernels_avx512bf16() {
  static const Kernels table = [] {
    Kernels kernels = over_avx512("avx512bf16", spmm, backward, mlp_forward, mlp_backward);
    kernels.attention = attention;
    kernels.attention_backward = attention_backward;
    kernels.convolve = convolve;
    kernels.convolve_backward = convolve_backward;
    kernels.norm_forward = norm_forward;  // which round to bfloat16 by an instruction here
    kernels.norm_backward = norm_backward;
    kernels.layer_norm_forward = layer_norm_forward;
    kernels.layer_norm_backward = layer_norm_backward;
    return kernels;
  }();
  return &table;
}

}  // namespace rarefy
