// The kernels of one instruction set: this file is compiled once per target, with RAREFY_TARGET naming it.
// Nothing but the table at the end is visible outside, and no standard containers are used: the linker must find no
// function here that another target has too.
#include "internal.h"

#include "adamw.h"
#include "attention.h"
#include "drive_conv_turned.h"
#include "drive_direct.h"
#include "drive_few.h"
#include "drive_mlp.h"
#include "links.h"
#include "norm_entries.h"
#include "probe.h"

namespace rarefy {
namespace {

template <int BR, int BC, class Index>
int spmm_some(const rarefy_pattern *p, const float *values, const float *x, const float *bias, float *y, int64_t batch,
              int threads) {
  if (batch >= 1 && batch <= few_tokens<BR, BC>()) return spmm_few<BR, BC, Index>(p, values, x, bias, y, batch, threads);
  if (batch <= VL) return spmm_direct<BR, BC, 1, Index>(p, values, x, bias, y, batch, threads);
  return spmm_direct<BR, BC, 2, Index>(p, values, x, bias, y, batch, threads);
}

template <int BR, int BC, class Index>
int backward_some(const rarefy_pattern *p, const float *values, const float *dy, const float *x, float *dx,
                 float *dvalues, float *dbias, int64_t batch, int threads) {
  if (batch <= VL) return backward_direct<BR, BC, 1, Index>(p, values, dy, x, dx, dvalues, dbias, batch, threads);
  return backward_direct<BR, BC, 2, Index>(p, values, dy, x, dx, dvalues, dbias, batch, threads);
}

// Whole calls for few tokens, by width of the index; for many there is find_tiled.
struct Block {
  int64_t rows, cols;
  int (*spmm_some[2])(const rarefy_pattern *, const float *values, const float *x, const float *bias, float *y,
                     int64_t batch, int threads);
  int (*backward_some[2])(const rarefy_pattern *, const float *values, const float *dy, const float *x, float *dx,
                         float *dvalues, float *dbias, int64_t batch, int threads);
};

template <int BR, int BC>
constexpr Block kBlock = {BR,
                          BC,
                          {spmm_some<BR, BC, uint16_t>, spmm_some<BR, BC, int32_t>},
                          {backward_some<BR, BC, uint16_t>, backward_some<BR, BC, int32_t>}};

constexpr Block kBlocks[] = {RAREFY_BLOCKS(kBlock)};

const Block *find_block(int64_t rows, int64_t cols) {
  for (const Block &block : kBlocks) {
    if (block.rows == rows && block.cols == cols) return &block;
  }
  return nullptr;
}

int supports(int64_t block_rows, int64_t block_cols) { return find_block(block_rows, block_cols) != nullptr; }

// Float32 copies of bfloat16 activations, for the kernels that know no other, and back. Freed with the object.
class Wide {
 public:
  Wide(const void *narrow, int64_t count, bool half, bool read) : narrow_(narrow), count_(narrow != nullptr ? count : 0) {
    if (!half || narrow == nullptr) return;
    lease_ = lease_acquire(size_t(count_) * sizeof(float));
    float *wide = reinterpret_cast<float *>(lease_.data);
    for (int64_t i = 0; read && wide != nullptr && i < count_; ++i) wide[i] = widen(static_cast<const bf16 *>(narrow)[i]);
    failed_ = wide == nullptr;
  }
  ~Wide() {
    if (lease_.data != nullptr) lease_release(lease_);
  }
  Wide(const Wide &) = delete;
  Wide &operator=(const Wide &) = delete;
  bool failed() const { return failed_; }
  float *data() {
    if (lease_.data != nullptr) return reinterpret_cast<float *>(lease_.data);
    return static_cast<float *>(const_cast<void *>(narrow_));
  }
  void write_back() {
    for (int64_t i = 0; lease_.data != nullptr && i < count_; ++i) {
      narrow_to(static_cast<bf16 *>(const_cast<void *>(narrow_)) + i, data()[i]);
    }
  }

 private:
  const void *narrow_;
  int64_t count_;
  Lease lease_ = {nullptr, 0};
  bool failed_ = false;
};

int spmm(const rarefy_pattern *p, const float *values, const void *x, const float *bias, void *y,
         Activations activations, int64_t batch, int threads) {
  const bool half = activations == BFLOAT16;
  const Block *block = find_block(p->block_rows, p->block_cols);
  if (block == nullptr) return RAREFY_UNSUPPORTED_BLOCK;
  const int64_t in = p->in_features, out = p->out_features;
  if (batch < kForwardTiledFrom) {
    Wide wide_x(x, batch * in, half, true), wide_y(y, batch * out, half, false);
    if (wide_x.failed() || wide_y.failed()) return RAREFY_NO_MEMORY;
    const int code = block->spmm_some[p->index_bytes == 4](p, values, wide_x.data(), bias, wide_y.data(), batch, threads);
    wide_y.write_back();
    return code;
  }
  return multiply_tiled(p, find_tiled(p), false, values, {x, in, half}, bias, {y, out, half}, batch, threads);
}

int backward(const rarefy_pattern *p, const float *values, const void *dy, const void *x, void *dx, float *dvalues,
             float *dbias, Activations activations, int64_t batch, int threads) {
  const bool half = activations == BFLOAT16;
  const Block *block = find_block(p->block_rows, p->block_cols);
  if (block == nullptr) return RAREFY_UNSUPPORTED_BLOCK;
  const int64_t in = p->in_features, out = p->out_features;
  if (batch >= kBackwardTiledFrom && dvalues == nullptr && dbias == nullptr) {
    if (dx == nullptr) return RAREFY_OK;
    return multiply_tiled(p, find_tiled(p), true, values, {dy, out, half}, nullptr, {dx, in, half}, batch, threads);
  }
  if (batch < kBackwardTiledFrom || dvalues == nullptr || p->t_crow == nullptr) {
    Wide wide_dy(dy, batch * out, half, true), wide_x(x, batch * in, half, true), wide_dx(dx, batch * in, half, false);
    if (wide_dy.failed() || wide_x.failed() || wide_dx.failed()) return RAREFY_NO_MEMORY;
    const int code = block->backward_some[p->index_bytes == 4](p, values, wide_dy.data(), wide_x.data(), wide_dx.data(),
                                                              dvalues, dbias, batch, threads);
    wide_dx.write_back();
    return code;
  }
  return backward_tiled(p, find_tiled(p), values, {dy, out, half}, {x, in, half}, {dx, in, half}, dvalues, dbias, batch,
                        threads);
}

int mlp_forward(const rarefy_mlp *mlp, const void *x, void *y, void *z, int64_t batch, int threads) {
  return mlp_forward_with(find_tiled, *mlp, x, y, z, batch, threads);
}

int mlp_backward(const rarefy_mlp *mlp, const void *dy, const void *x, const void *z, void *dx,
                 const rarefy_mlp_gradients *gradients, int64_t batch, int threads) {
  return mlp_backward_with(find_tiled, *mlp, dy, x, z, dx, *gradients, batch, threads);
}

int convolve(const rarefy_conv *conv, const rarefy_pattern *p, const float *values, const void *x, const float *bias,
             void *y, Activations activations, int threads) {
  return rarefy::convolve(*conv, p, values, x, bias, y, activations == BFLOAT16, threads);
}

int convolve_backward(const rarefy_conv *conv, const rarefy_pattern *p, const float *values, const void *dy,
                      const void *x, void *dx, float *dvalues, float *dbias, Activations activations, int threads) {
  return rarefy::convolve_backward(*conv, p, values, dy, x, dx, dvalues, dbias, activations == BFLOAT16, threads);
}

int attention(const void *qkv, const float *rotary, void *out, float *lse, bool half, int64_t batch, int64_t tokens,
              int64_t heads, int64_t dim, int threads) {
  const auto run = [&](auto element) {
    using T = decltype(element);
    return attention_forward(static_cast<const T *>(qkv), rotary, static_cast<T *>(out), lse, batch, tokens, heads, dim,
                             threads);
  };
  return half ? run(bf16()) : run(float());
}

int attention_backward(const void *dout, const void *qkv, const float *rotary, const void *out, const float *lse, void *dqkv,
                       bool half, int64_t batch, int64_t tokens, int64_t heads, int64_t dim, int threads) {
  const auto run = [&](auto element) {
    using T = decltype(element);
    return attention_backward<T>(static_cast<const T *>(dout), static_cast<const T *>(qkv), rotary,
                                 static_cast<const T *>(out), lse, static_cast<T *>(dqkv), batch, tokens, heads, dim, threads);
  };
  return half ? run(bf16()) : run(float());
}

int link_pairs(const rarefy_pattern *p, bool inside, float *pairs, int threads) {
  return (p->index_bytes == 2 ? link_pairs<uint16_t> : link_pairs<int32_t>)(p, inside, pairs, threads);
}

int link_scores(const rarefy_pattern *p, bool inside, const float *pairs, int64_t first, int64_t last, float *scores,
                int threads) {
  const auto run = p->index_bytes == 2 ? link_scores<uint16_t> : link_scores<int32_t>;
  return run(p, inside, pairs, first, last, scores, threads);
}

#define RAREFY_TEXT(x) RAREFY_TEXT_(x)
#define RAREFY_TEXT_(x) #x
#define RAREFY_JOIN(a, b) RAREFY_JOIN_(a, b)
#define RAREFY_JOIN_(a, b) a##b

constexpr Kernels kTable = {RAREFY_TEXT(RAREFY_TARGET), supports,          spmm, backward, mlp_forward, mlp_backward,
                            attention,                  attention_backward, convolve, convolve_backward,
                            norm_forward,               norm_backward,      layer_norm_forward, layer_norm_backward,
                            adamw,                      link_pairs,        link_scores, probe};

}  // namespace

const Kernels *RAREFY_JOIN(kernels_, RAREFY_TARGET)() { return &kTable; }

}  // namespace rarefy
