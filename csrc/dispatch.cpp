// The C interface: checks arguments once and hands them to the instruction set in use.
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>

#include "internal.h"

namespace rarefy {
namespace {

struct Choice {
  const Kernels *list[5];
  int count;
  char names[64];
};

// What this build has and this CPU can run, best first.
Choice find_choices() {
  Choice choice = {};
#if defined(RAREFY_X86)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("fma");
#if defined(RAREFY_AMX)
  if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("amx-tile") &&
      __builtin_cpu_supports("amx-bf16") && amx_allowed()) {
    choice.list[choice.count++] = kernels_amx();
  }
#endif
#if defined(RAREFY_DOTS)
  // AMD's cores issue as many products of bfloat16 pairs as of float32; Intel's half as many, and lose.
  const bool dots = avx512 && __builtin_cpu_supports("avx512bf16"), fast_dots = dots && __builtin_cpu_is("amd");
  if (fast_dots) choice.list[choice.count++] = kernels_avx512bf16();
#endif
  if (avx512) choice.list[choice.count++] = kernels_avx512();
#if defined(RAREFY_DOTS)
  if (dots && !fast_dots) choice.list[choice.count++] = kernels_avx512bf16();
#endif
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    choice.list[choice.count++] = kernels_avx2();
  }
#elif defined(RAREFY_ARM64)
  choice.list[choice.count++] = kernels_neon();  // every 64-bit ARM has it
#endif
  choice.list[choice.count++] = kernels_portable();
  for (int i = 0; i < choice.count; ++i) {
    if (i > 0) strcat(choice.names, ",");
    strcat(choice.names, choice.list[i]->name);
  }
  return choice;
}

const Choice &choices() {
  static const Choice choice = find_choices();
  return choice;
}

const Kernels *find(const char *name) {
  for (int i = 0; i < choices().count; ++i) {
    if (strcmp(choices().list[i]->name, name) == 0) return choices().list[i];
  }
  return nullptr;
}

const Kernels *initial() {
  const char *wanted = getenv("RAREFY_ISA");
  return wanted != nullptr && *wanted != '\0' ? find(wanted) : choices().list[0];
}

std::atomic<const Kernels *> &current() {
  static std::atomic<const Kernels *> kernels(initial());  // null: RAREFY_ISA could not be honoured
  return kernels;
}

bool bad(const rarefy_pattern *p, int64_t batch, bool transposed) {
  if (p == nullptr || batch < 0 || p->out_features < 0 || p->in_features < 0 || p->num_units < 0) return true;
  if (p->block_rows < 1 || p->block_cols < 1 || (p->index_bytes != 2 && p->index_bytes != 4)) return true;
  if (p->out_features % p->block_rows != 0 || p->in_features % p->block_cols != 0) return true;
  if (p->crow == nullptr || p->crow[p->out_features / p->block_rows] != p->num_units) return true;
  if (p->num_units > 0 && p->cols == nullptr) return true;
  if (!transposed) return false;
  if (p->t_crow == nullptr || p->t_crow[p->in_features / p->block_cols] != p->num_units) return true;
  return p->num_units > 0 && (p->t_rows == nullptr || p->t_perm == nullptr);
}

bool bad_attention(const float *rotary, int64_t batch, int64_t tokens, int64_t heads, int64_t head_dim) {
  return batch < 0 || tokens < 0 || heads < 0 || head_dim < 0 || (rotary != nullptr && head_dim % 2 != 0);
}

// A null pointer is fine where there is nothing behind it.
bool missing(const void *data, int64_t count) { return data == nullptr && count > 0; }

int thread_count(int threads) { return threads > 0 ? threads : omp_get_max_threads(); }

}  // namespace

#if defined(RAREFY_X86)
Kernels over_avx512(const char *name, decltype(Kernels::spmm) spmm, decltype(Kernels::backward) backward,
                    decltype(Kernels::mlp_forward) mlp_forward, decltype(Kernels::mlp_backward) mlp_backward) {
  Kernels kernels = *kernels_avx512();
  kernels.name = name;
  kernels.spmm = spmm;
  kernels.backward = backward;
  kernels.mlp_forward = mlp_forward;
  kernels.mlp_backward = mlp_backward;
  return kernels;
}
#endif

}  // namespace rarefy

using namespace rarefy;

const char *rarefy_interface(void) { return RAREFY_INTERFACE; }

const char *rarefy_isa(void) {
  const Kernels *kernels = current().load();
  return kernels != nullptr ? kernels->name : "unavailable";
}

int rarefy_set_isa(const char *name) {
  const Kernels *kernels = name != nullptr ? find(name) : nullptr;
  if (kernels == nullptr) return RAREFY_NO_ISA;
  current().store(kernels);
  return RAREFY_OK;
}

const char *rarefy_isas(void) { return choices().names; }

int rarefy_supports(int64_t block_rows, int64_t block_cols) {
  return kernels_portable()->supports(block_rows, block_cols);  // every instruction set has the same blocks
}

static int spmm(const rarefy_pattern *pattern, const float *values, const void *x, const float *bias, void *y,
                Activations activations, int64_t batch, int threads) {
  const Kernels *kernels = current().load();
  if (kernels == nullptr) return RAREFY_NO_ISA;
  if (bad(pattern, batch, false) || missing(values, pattern->num_units) || missing(x, batch * pattern->in_features) ||
      missing(y, batch * pattern->out_features)) {
    return RAREFY_BAD_ARGUMENT;
  }
  return kernels->spmm(pattern, values, x, bias, y, activations, batch, thread_count(threads));
}

static int backward(const rarefy_pattern *pattern, const float *values, const void *dy, const void *x, void *dx,
                    float *dvalues, float *dbias, Activations activations, int64_t batch, int threads) {
  const Kernels *kernels = current().load();
  if (kernels == nullptr) return RAREFY_NO_ISA;
  if (bad(pattern, batch, dx != nullptr) || missing(dy, batch * pattern->out_features)) return RAREFY_BAD_ARGUMENT;
  if (dx != nullptr && missing(values, pattern->num_units)) return RAREFY_BAD_ARGUMENT;
  if (dvalues != nullptr && missing(x, batch * pattern->in_features)) return RAREFY_BAD_ARGUMENT;
  return kernels->backward(pattern, values, dy, x, dx, dvalues, dbias, activations, batch, thread_count(threads));
}

int rarefy_spmm_f32(const rarefy_pattern *pattern, const float *values, const float *x, const float *bias, float *y,
                    int64_t batch, int threads) {
  return spmm(pattern, values, x, bias, y, FLOAT32, batch, threads);
}

int rarefy_spmm_bf16(const rarefy_pattern *pattern, const float *values, const uint16_t *x, const float *bias,
                     uint16_t *y, int64_t batch, int threads) {
  return spmm(pattern, values, x, bias, y, BFLOAT16, batch, threads);
}

int rarefy_backward_f32(const rarefy_pattern *pattern, const float *values, const float *dy, const float *x, float *dx,
                        float *dvalues, float *dbias, int64_t batch, int threads) {
  return backward(pattern, values, dy, x, dx, dvalues, dbias, FLOAT32, batch, threads);
}

int rarefy_backward_bf16(const rarefy_pattern *pattern, const float *values, const uint16_t *dy, const uint16_t *x,
                         uint16_t *dx, float *dvalues, float *dbias, int64_t batch, int threads) {
  return backward(pattern, values, dy, x, dx, dvalues, dbias, BFLOAT16, batch, threads);
}

int rarefy_spmm_medium(const rarefy_pattern *pattern, const float *values, const float *x, const float *bias, float *y,
                       int64_t batch, int threads) {
  return spmm(pattern, values, x, bias, y, MEDIUM, batch, threads);
}

int rarefy_backward_medium(const rarefy_pattern *pattern, const float *values, const float *dy, const float *x, float *dx,
                           float *dvalues, float *dbias, int64_t batch, int threads) {
  return backward(pattern, values, dy, x, dx, dvalues, dbias, MEDIUM, batch, threads);
}

static bool bad(const rarefy_layer &layer, int64_t batch, bool backward) {
  return bad(layer.pattern, batch, backward) || missing(layer.values, layer.pattern->num_units);
}

static bool bad(const rarefy_mlp *mlp, int64_t batch, bool backward) {
  if (mlp == nullptr || bad(mlp->up, batch, backward) || bad(mlp->down, batch, backward)) return true;
  const rarefy_pattern *up = mlp->up.pattern, *gate = mlp->gate.pattern;
  if (up->out_features != mlp->down.pattern->in_features) return true;
  if (gate != nullptr) {
    if (bad(mlp->gate, batch, backward)) return true;
    if (gate->in_features != up->in_features || gate->out_features != up->out_features) return true;
  }
  return mlp->activation < RAREFY_GELU || mlp->activation > RAREFY_SQUARED_RELU;
}

int rarefy_mlp_forward(const rarefy_mlp *mlp, const void *x, void *y, void *z, int64_t batch, int threads) {
  const Kernels *kernels = current().load();
  if (kernels == nullptr) return RAREFY_NO_ISA;
  if (bad(mlp, batch, false) || missing(x, batch * mlp->up.pattern->in_features) ||
      missing(y, batch * mlp->down.pattern->out_features) || missing(z, batch * mlp->up.pattern->out_features)) {
    return RAREFY_BAD_ARGUMENT;
  }
  return kernels->mlp_forward(mlp, x, y, z, batch, thread_count(threads));
}

int rarefy_mlp_backward(const rarefy_mlp *mlp, const void *dy, const void *x, const void *z, void *dx,
                        const rarefy_mlp_gradients *gradients, int64_t batch, int threads) {
  const Kernels *kernels = current().load();
  if (kernels == nullptr) return RAREFY_NO_ISA;
  if (bad(mlp, batch, true) || gradients == nullptr) return RAREFY_BAD_ARGUMENT;
  const rarefy_pattern *gate = mlp->gate.pattern, *up = mlp->up.pattern, *down = mlp->down.pattern;
  if (missing(gradients->up.values, up->num_units) || missing(gradients->down.values, down->num_units) ||
      (gate != nullptr && missing(gradients->gate.values, gate->num_units)) || missing(dy, batch * down->out_features) ||
      missing(x, batch * up->in_features) || missing(z, batch * up->out_features)) {
    return RAREFY_BAD_ARGUMENT;
  }
  return kernels->mlp_backward(mlp, dy, x, z, dx, gradients, batch, thread_count(threads));
}

static bool bad(const rarefy_conv *c, const rarefy_pattern *p) {
  if (c == nullptr || c->images < 0 || c->channels < 0 || c->out_channels < 0 || bad(p, 0, true)) return true;
  for (int i = 0; i < 2; ++i) {
    if (c->in_size[i] < 0 || c->kernel[i] < 1 || c->stride[i] < 1 || c->padding[i] < 0 || c->dilation[i] < 1) return true;
    const int64_t room = c->in_size[i] + 2 * c->padding[i] - c->dilation[i] * (c->kernel[i] - 1) - 1;
    if (room < 0 || c->out_size[i] != room / c->stride[i] + 1) return true;
  }
  if ((c->scale == nullptr) != (c->shift == nullptr)) return true;
  return p->out_features != c->out_channels || p->in_features != c->channels * c->kernel[0] * c->kernel[1];
}

static int64_t inputs(const rarefy_conv *c) { return c->images * c->channels * c->in_size[0] * c->in_size[1]; }
static int64_t outputs(const rarefy_conv *c) { return c->images * c->out_channels * c->out_size[0] * c->out_size[1]; }

static bool known(int32_t activations) { return activations >= FLOAT32 && activations <= MEDIUM; }

int rarefy_convolve(const rarefy_conv *conv, const rarefy_pattern *pattern, const float *values, const void *x,
                    const float *bias, void *y, int32_t activations, int threads) {
  const Kernels *kernels = current().load();
  if (kernels == nullptr) return RAREFY_NO_ISA;
  if (bad(conv, pattern) || missing(values, pattern->num_units) || missing(x, inputs(conv)) || missing(y, outputs(conv)) ||
      !known(activations)) {
    return RAREFY_BAD_ARGUMENT;
  }
  return kernels->convolve(conv, pattern, values, x, bias, y, Activations(activations), thread_count(threads));
}

int rarefy_convolve_backward(const rarefy_conv *conv, const rarefy_pattern *pattern, const float *values, const void *dy,
                             const void *x, void *dx, float *dvalues, float *dbias, int32_t activations, int threads) {
  const Kernels *kernels = current().load();
  if (kernels == nullptr) return RAREFY_NO_ISA;
  if (bad(conv, pattern) || missing(values, dx != nullptr ? pattern->num_units : 0) ||
      missing(dvalues, pattern->num_units) || missing(dy, outputs(conv)) || missing(x, inputs(conv)) ||
      !known(activations)) {
    return RAREFY_BAD_ARGUMENT;
  }
  return kernels->convolve_backward(conv, pattern, values, dy, x, dx, dvalues, dbias, Activations(activations),
                                    thread_count(threads));
}

static bool bad(const rarefy_norm *n) {
  return n == nullptr || n->rows < 0 || n->channels < 0 || (n->training != 0 && n->rows < 1) ||
         missing(n->mean, n->channels) || missing(n->var, n->channels);
}

int rarefy_norm_forward(const rarefy_norm *norm, const void *x, const void *residual, void *y, int threads) {
  const Kernels *kernels = current().load();
  if (kernels == nullptr) return RAREFY_NO_ISA;
  if (bad(norm) || missing(x, norm->rows * norm->channels)) return RAREFY_BAD_ARGUMENT;
  return kernels->norm_forward(norm, x, residual, y, thread_count(threads));
}

int rarefy_norm_backward(const rarefy_norm *norm, const void *dy, const void *x, const void *y, void *dx,
                         void *dresidual, float *dweight, float *dbias, int threads) {
  const Kernels *kernels = current().load();
  if (kernels == nullptr) return RAREFY_NO_ISA;
  if (bad(norm)) return RAREFY_BAD_ARGUMENT;
  const int64_t size = norm->rows * norm->channels;
  if (missing(dy, size) || missing(x, size) || missing(dx, size)) return RAREFY_BAD_ARGUMENT;
  return kernels->norm_backward(norm, dy, x, y, dx, dresidual, dweight, dbias, thread_count(threads));
}

static bool bad(const rarefy_layer_norm *n) {
  return n == nullptr || n->rows < 0 || n->width < 1 || n->period < 0 || (n->period > 0 && n->rows % n->period != 0);
}

int rarefy_layer_norm_forward(const rarefy_layer_norm *norm, const float *x, const void *delta, float *sum, void *y,
                              float *mean, float *rstd, int threads) {
  const Kernels *kernels = current().load();
  if (kernels == nullptr) return RAREFY_NO_ISA;
  if (bad(norm)) return RAREFY_BAD_ARGUMENT;
  const int64_t size = norm->rows * norm->width;
  if (missing(x, size) || missing(y, size) || missing(mean, norm->rows) || missing(rstd, norm->rows) ||
      missing(sum, delta != nullptr ? size : 0)) {
    return RAREFY_BAD_ARGUMENT;
  }
  return kernels->layer_norm_forward(norm, x, delta, sum, y, mean, rstd, thread_count(threads));
}

int rarefy_layer_norm_backward(const rarefy_layer_norm *norm, const void *dy, const float *dsum, const float *sum,
                               const float *mean, const float *rstd, float *dx, void *ddelta, float *dweight, float *dbias,
                               int threads) {
  const Kernels *kernels = current().load();
  if (kernels == nullptr) return RAREFY_NO_ISA;
  if (bad(norm)) return RAREFY_BAD_ARGUMENT;
  const int64_t size = norm->rows * norm->width;
  if (missing(dy, size) || missing(sum, size) || missing(mean, norm->rows) || missing(rstd, norm->rows) ||
      missing(dx, size) || missing(dweight, norm->width) || missing(dbias, norm->width)) {
    return RAREFY_BAD_ARGUMENT;
  }
  return kernels->layer_norm_backward(norm, dy, dsum, sum, mean, rstd, dx, ddelta, dweight, dbias, thread_count(threads));
}

int rarefy_adamw_step(const rarefy_adamw *parameters, int64_t num, int threads) {
  const Kernels *kernels = current().load();
  if (kernels == nullptr) return RAREFY_NO_ISA;
  if (num < 0 || missing(parameters, num)) return RAREFY_BAD_ARGUMENT;
  for (int64_t i = 0; i < num; ++i) {
    const rarefy_adamw &p = parameters[i];
    if (p.count < 0 || p.entries < 1 || missing(p.values, p.count) || missing(p.average, p.count) ||
        missing(p.square, p.count) || missing(p.gradient, p.count) || p.size_by_age == nullptr || p.root_by_age == nullptr) {
      return RAREFY_BAD_ARGUMENT;
    }
  }
  return kernels->adamw(parameters, num, thread_count(threads));
}

static bool not_a_graph(const rarefy_pattern *pattern) {
  return bad(pattern, 1, true) || pattern->block_rows != 1 || pattern->block_cols != 1;
}

int rarefy_link_pairs(const rarefy_pattern *pattern, int32_t inside, float *pairs, int threads) {
  const Kernels *kernels = current().load();
  if (kernels == nullptr) return RAREFY_NO_ISA;
  if (not_a_graph(pattern) || missing(pairs, pattern->out_features)) return RAREFY_BAD_ARGUMENT;
  return kernels->link_pairs(pattern, inside != 0, pairs, thread_count(threads));
}

int rarefy_link_scores(const rarefy_pattern *pattern, int32_t inside, const float *pairs, int64_t first, int64_t last,
                       float *scores, int threads) {
  const Kernels *kernels = current().load();
  if (kernels == nullptr) return RAREFY_NO_ISA;
  if (not_a_graph(pattern) || first < 0 || last < first || last > pattern->in_features ||
      missing(pairs, pattern->out_features) || missing(scores, (last - first) * pattern->out_features)) {
    return RAREFY_BAD_ARGUMENT;
  }
  return kernels->link_scores(pattern, inside != 0, pairs, first, last, scores, thread_count(threads));
}

int rarefy_attention(const void *qkv, const float *rotary, void *out, float *lse, int32_t half, int64_t batch, int64_t tokens,
                     int64_t heads, int64_t head_dim, int threads) {
  const Kernels *kernels = current().load();
  if (kernels == nullptr) return RAREFY_NO_ISA;
  if (bad_attention(rotary, batch, tokens, heads, head_dim)) return RAREFY_BAD_ARGUMENT;
  const int64_t rows = batch * tokens * heads, size = rows * head_dim;
  if (size == 0) return rows == 0 ? RAREFY_OK : RAREFY_BAD_ARGUMENT;
  if (missing(qkv, size) || missing(out, size) || missing(lse, rows)) return RAREFY_BAD_ARGUMENT;
  return kernels->attention(qkv, rotary, out, lse, half != 0, batch, tokens, heads, head_dim, thread_count(threads));
}

int rarefy_attention_backward(const void *dout, const void *qkv, const float *rotary, const void *out, const float *lse,
                              void *dqkv, int32_t half, int64_t batch, int64_t tokens, int64_t heads, int64_t head_dim,
                              int threads) {
  const Kernels *kernels = current().load();
  if (kernels == nullptr) return RAREFY_NO_ISA;
  if (bad_attention(rotary, batch, tokens, heads, head_dim)) return RAREFY_BAD_ARGUMENT;
  const int64_t rows = batch * tokens * heads, size = rows * head_dim;
  if (size == 0) return rows == 0 ? RAREFY_OK : RAREFY_BAD_ARGUMENT;
  if (missing(qkv, size) || missing(out, size) || missing(lse, rows) || missing(dout, size) || missing(dqkv, size)) {
    return RAREFY_BAD_ARGUMENT;
  }
  return kernels->attention_backward(dout, qkv, rotary, out, lse, dqkv, half != 0, batch, tokens, heads, head_dim,
                                     thread_count(threads));
}

int64_t rarefy_probe(int32_t work, void *data, int64_t bytes, int64_t repeats, int threads) {
  const Kernels *kernels = current().load();
  if (kernels == nullptr) return RAREFY_NO_ISA;
  if (bytes < 0 || repeats < 0 || missing(data, bytes)) return RAREFY_BAD_ARGUMENT;
  return kernels->probe(work, data, bytes, repeats, thread_count(threads));
}
