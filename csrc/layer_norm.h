// Layer normalisation of row-major activations with what stands before it, the addition to a residual stream, and what stands
// behind it, the cast to the dtype in which products read and the token shift, by which the second half of a row's features
// goes to the row after it: one pass over the rows forward and one backward, in which a row
// stays in L1. The stream is float32. A row's sums are added in one order, and weights' gradients over fixed parts of the
// rows, so results do not depend on the number of threads.
#pragma once

#include "norm.h"

namespace rarefy {
namespace {

struct LayerNorm {
  int64_t rows, width;
  float eps;
  const float *weight, *bias;  // null: ones, zeros
  int64_t period;              // rows of a sequence, within which y is shifted; 0: it is not
  int64_t kept() const { return period == 0 ? width : width - width / 2; }  // features that stay in their row
  bool first(int64_t r) const { return r % period == 0; }
  bool last(int64_t r) const { return r % period == period - 1; }
  int64_t parts() const { return max64(1, min64(kNormParts, rows / 16)); }
  int64_t begin(int64_t part) const { return rows * part / parts(); }
};

// Calls visit(c, count) for the vectors of the features [begin, end): count < VL lanes of the last.
template <class Visit>
inline void each_vector(int64_t begin, int64_t end, Visit visit) {
  int64_t c = begin;
  for (; c + VL <= end; c += VL) visit(c, int64_t(VL));
  if (c < end) visit(c, end - c);
}

template <class Visit>
inline void each_vector(int64_t width, Visit visit) {
  each_vector(0, width, visit);
}

// sum = x + delta, and y = (sum - mean) * rstd * weight + bias. delta may be null: then sum is not written.
template <class D, class Y>
int layer_norm_forward(const LayerNorm &n, const float *x, const D *delta, float *sum, Y *y, float *mean, float *rstd,
                       int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t r = 0; r < n.rows; ++r) {
    const float *row = x + r * n.width;
    vec total = {}, squares = {};
    if (delta != nullptr) {
      float *out = sum + r * n.width;
      each_vector(n.width, [&](int64_t c, int64_t count) {
        const vec s = load_some(row + c, count) + load_some(delta + r * n.width + c, count);
        store_some(out + c, s, count);
        total += s;
      });
      row = out;
    } else {
      each_vector(n.width, [&](int64_t c, int64_t count) { total += load_some(row + c, count); });
    }
    const float middle = across(total) / float(n.width);
    each_vector(n.width, [&](int64_t c, int64_t count) {
      const vec d = load_some(row + c, count) - broadcast(middle);
      squares += keep_lanes(d * d, count);
    });
    const float scale = 1.0f / __builtin_sqrtf(across(squares) / float(n.width) + n.eps);
    mean[r] = middle;
    rstd[r] = scale;
    const auto write = [&](Y *out) {
      return [=](int64_t c, int64_t count) {
        vec v = (load_some(row + c, count) - broadcast(middle)) * broadcast(scale);
        if (n.weight != nullptr) v *= load_some(n.weight + c, count);
        if (n.bias != nullptr) v += load_some(n.bias + c, count);
        store_some(out + c, v, count);
      };
    };
    Y *own = y + r * n.width;
    each_vector(0, n.kept(), write(own));
    if (n.period == 0) continue;
    if (!n.last(r)) each_vector(n.kept(), n.width, write(own + n.width));
    if (n.first(r)) each_vector(n.kept(), n.width, [&](int64_t c, int64_t count) { store_some(own + c, vec{}, count); });
  }
  return RAREFY_OK;
}

// dx = dsum + the gradient through the norm, and ddelta the same in delta's dtype. dsum and ddelta may be null.
template <class D, class Y>
int layer_norm_backward(const LayerNorm &n, const Y *dy, const float *dsum, const float *sum, const float *mean,
                        const float *rstd, float *dx, D *ddelta, float *dweight, float *dbias, int threads) {
  const int64_t parts = n.parts(), padded = ceil_div(n.width, VL) * VL;
  float *totals = nullptr;
  const Scratch memory([&](Carver &carver) { totals = carver.take<float>(2 * parts * padded); });
  if (memory.failed()) return RAREFY_NO_MEMORY;
#pragma omp parallel num_threads(threads)
  {
    const FlushDenormals flush;
#pragma omp for schedule(static)
    for (int64_t part = 0; part < parts; ++part) {
      float *weights = totals + 2 * part * padded, *biases = weights + padded;
      for (int64_t c = 0; c < 2 * padded; c += VL) store(weights + c, vec{});
      for (int64_t r = n.begin(part); r < n.begin(part + 1); ++r) {
        const float *row = sum + r * n.width;
        const Y *own = dy + r * n.width;
        // Calls visit(c, count, d) with the gradient of what was normed here, some of which reached y in the next row.
        const auto each_gradient = [&](auto visit) {
          each_vector(0, n.kept(), [&](int64_t c, int64_t count) { visit(c, count, load_some(own + c, count)); });
          if (n.period == 0) return;
          const Y *next = n.last(r) ? nullptr : own + n.width;
          each_vector(n.kept(), n.width, [&](int64_t c, int64_t count) {
            visit(c, count, next == nullptr ? vec{} : load_some(next + c, count));
          });
        };
        const vec middle = broadcast(mean[r]), scale = broadcast(rstd[r]);
        vec plain = {}, crossed = {};
        each_gradient([&](int64_t c, int64_t count, vec d) {
          const vec normed = (load_some(row + c, count) - middle) * scale;
          store_some(biases + c, load_some(biases + c, count) + d, count);
          store_some(weights + c, load_some(weights + c, count) + d * normed, count);
          const vec g = n.weight != nullptr ? d * load_some(n.weight + c, count) : d;
          plain += g;
          crossed += keep_lanes(g * normed, count);
        });
        const vec a = broadcast(across(plain) / float(n.width)), b = broadcast(across(crossed) / float(n.width));
        each_gradient([&](int64_t c, int64_t count, vec d) {
          const vec normed = (load_some(row + c, count) - middle) * scale;
          const vec g = n.weight != nullptr ? d * load_some(n.weight + c, count) : d;
          vec result = scale * (g - a - normed * b);
          if (dsum != nullptr) result += load_some(dsum + r * n.width + c, count);
          store_some(dx + r * n.width + c, result, count);
          if (ddelta != nullptr) store_some(ddelta + r * n.width + c, result, count);
        });
      }
    }
#pragma omp for schedule(static)
    for (int64_t c = 0; c < n.width; ++c) {
      float weight = 0.0f, bias = 0.0f;
      for (int64_t part = 0; part < parts; ++part) {
        weight += totals[2 * part * padded + c];
        bias += totals[(2 * part + 1) * padded + c];
      }
      dweight[c] = weight;
      dbias[c] = bias;
    }
  }
  return RAREFY_OK;
}

}  // namespace
}  // namespace rarefy
