// Both norms as the tables of instruction sets have them: element types are known at run time only.
#pragma once

#include "internal.h"

#include "layer_norm.h"

namespace rarefy {
namespace {

Norm norm_of(const rarefy_norm &n) {
  return {n.rows, n.channels, n.half != 0, n.relu != 0, n.training != 0, n.eps, n.weight, n.bias, n.mean, n.var};
}

int norm_forward(const rarefy_norm *n, const void *x, const void *residual, void *y, int threads) {
  if (n->half != 0) {
    return rarefy::norm_forward(norm_of(*n), static_cast<const bf16 *>(x), static_cast<const bf16 *>(residual),
                                static_cast<bf16 *>(y), threads);
  }
  return rarefy::norm_forward(norm_of(*n), static_cast<const float *>(x), static_cast<const float *>(residual),
                              static_cast<float *>(y), threads);
}

int norm_backward(const rarefy_norm *n, const void *dy, const void *x, const void *y, void *dx, void *dresidual,
                  float *dweight, float *dbias, int threads) {
  if (n->half != 0) {
    return rarefy::norm_backward(norm_of(*n), static_cast<const bf16 *>(dy), static_cast<const bf16 *>(x),
                                 static_cast<const bf16 *>(y), static_cast<bf16 *>(dx), static_cast<bf16 *>(dresidual),
                                 dweight, dbias, threads);
  }
  return rarefy::norm_backward(norm_of(*n), static_cast<const float *>(dy), static_cast<const float *>(x),
                               static_cast<const float *>(y), static_cast<float *>(dx), static_cast<float *>(dresidual),
                               dweight, dbias, threads);
}

LayerNorm layer_norm_of(const rarefy_layer_norm &n) { return {n.rows, n.width, n.eps, n.weight, n.bias, n.period}; }

// Calls work with a value of each element type: of what is added, and of what is normalised.
template <class Work>
int with_elements(const rarefy_layer_norm &n, Work work) {
  if (n.half_delta != 0) return n.half_y != 0 ? work(bf16(), bf16()) : work(bf16(), float());
  return n.half_y != 0 ? work(float(), bf16()) : work(float(), float());
}

int layer_norm_forward(const rarefy_layer_norm *n, const float *x, const void *delta, float *sum, void *y, float *mean,
                       float *rstd, int threads) {
  return with_elements(*n, [&](auto added, auto result) {
    using D = decltype(added);
    using Y = decltype(result);
    return layer_norm_forward<D, Y>(layer_norm_of(*n), x, static_cast<const D *>(delta), sum, static_cast<Y *>(y), mean, rstd,
                                    threads);
  });
}

int layer_norm_backward(const rarefy_layer_norm *n, const void *dy, const float *dsum, const float *sum, const float *mean,
                        const float *rstd, float *dx, void *ddelta, float *dweight, float *dbias, int threads) {
  return with_elements(*n, [&](auto added, auto result) {
    using D = decltype(added);
    using Y = decltype(result);
    return layer_norm_backward<D, Y>(layer_norm_of(*n), static_cast<const Y *>(dy), dsum, sum, mean, rstd, dx,
                                     static_cast<D *>(ddelta), dweight, dbias, threads);
  });
}

}  // namespace
}  // namespace rarefy
