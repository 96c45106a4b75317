// Batch normalisation of row-major activations (one pixel a row), with what follows it: a residual added, and ReLU.
// Two passes forward and two backward, where separate layers take seven. Sums are over fixed parts of the rows, so results
// do not depend on the number of threads.
#pragma once

#include <omp.h>

#include "pack.h"
#include "scratch.h"

namespace rarefy {
namespace {

constexpr int64_t kNormParts = 64;                     // of the rows, at most
constexpr int64_t kNormTile = int64_t(24) << 10;       // bytes of rows that are visited channels by channels

struct Norm {
  int64_t rows, channels;
  bool half, relu, training;
  float eps;
  const float *weight, *bias;  // null: ones, zeros
  float *mean, *var;           // of the batch: written if training; of the past otherwise
  int64_t parts() const { return max64(1, min64(kNormParts, rows / 16)); }
  int64_t begin(int64_t part) const { return rows * part / parts(); }
  int64_t tile_rows() const { return max64(4, kNormTile / max64(1, channels * 4)); }
};

// y = act(x * scale + shift + residual), each channel its own.
struct Affine {
  float *scale, *shift;
};

inline float inverse_deviation(float var, float eps) { return 1.0f / __builtin_sqrtf(var + eps); }

inline void fill_affine(const Norm &n, const Affine &a) {
  for (int64_t c = 0; c < n.channels; ++c) {
    a.scale[c] = inverse_deviation(n.var[c], n.eps) * (n.weight != nullptr ? n.weight[c] : 1.0f);
    a.shift[c] = (n.bias != nullptr ? n.bias[c] : 0.0f) - n.mean[c] * a.scale[c];
  }
}

// The first `count` < VL lanes; the others are zero, or stay in memory as they are.
#if defined(__AVX512BW__) && defined(__AVX512VL__)
inline __mmask16 first_lanes(int64_t count) { return __mmask16((1u << count) - 1); }
inline vec load_lanes(const float *p, int64_t count) { return vec(_mm512_maskz_loadu_ps(first_lanes(count), p)); }
inline vec load_lanes(const bf16 *p, int64_t count) {
  return wide(reinterpret_cast<halves>(_mm256_maskz_loadu_epi16(first_lanes(count), p)));
}
inline void store_lanes(float *p, vec v, int64_t count) { _mm512_mask_storeu_ps(p, first_lanes(count), __m512(v)); }
inline void store_lanes(bf16 *p, vec v, int64_t count) {
  _mm256_mask_storeu_epi16(p, first_lanes(count), __m256i(narrow(v)));
}
#else
template <class T>
inline vec load_lanes(const T *p, int64_t count) {
  vec v = {};
  for (int64_t i = 0; i < count; ++i) v[i] = widen(p[i]);
  return v;
}
template <class T>
inline void store_lanes(T *p, vec v, int64_t count) {
  for (int64_t i = 0; i < count; ++i) narrow_to(p + i, v[i]);
}
#endif

// The lanes that channels [c, c + count) fill, count <= VL.
template <class T>
inline vec load_some(const T *p, int64_t count) {
  return count == VL ? load_any(p) : load_lanes(p, count);
}
template <class T>
inline void store_some(T *p, vec v, int64_t count) {
  if (count == VL) return store_any(p, v);
  store_lanes(p, v, count);
}

// Two sums for every channel over the rows [begin, end): of term(row, c, count) -> a pair of vectors. totals: 2 * channels.
template <class Term>
inline void channel_sums(const Norm &n, int64_t begin, int64_t end, double *totals, Term term) {
  for (int64_t c = 0; c < 2 * n.channels; ++c) totals[c] = 0.0;
  const int64_t tile = n.tile_rows();
  for (int64_t r0 = begin; r0 < end; r0 += tile) {
    const int64_t r1 = min64(r0 + tile, end);
    for (int64_t c = 0; c < n.channels; c += VL) {
      const int64_t count = min64(VL, n.channels - c);
      vec a[2] = {}, b[2] = {};
      int64_t r = r0;
      for (; r + 2 <= r1; r += 2) {
        term(r, c, count, a[0], b[0]);
        term(r + 1, c, count, a[1], b[1]);
      }
      if (r < r1) term(r, c, count, a[0], b[0]);
      const vec first = a[0] + a[1], second = b[0] + b[1];
      for (int64_t i = 0; i < count; ++i) {
        totals[c + i] += double(first[i]);
        totals[n.channels + c + i] += double(second[i]);
      }
    }
  }
}

// To be called by all threads: the sums of all parts, in their order.
inline void add_parts(const Norm &n, const double *parts, double *totals) {
#pragma omp for schedule(static)
  for (int64_t c = 0; c < 2 * n.channels; ++c) {
    double sum = 0.0;
    for (int64_t part = 0; part < n.parts(); ++part) sum += parts[part * 2 * n.channels + c];
    totals[c] = sum;
  }
}

template <class T>
int norm_forward(const Norm &n, const T *x, const T *residual, T *y, int threads) {
  double *parts = nullptr, *totals = nullptr;
  Affine affine = {};
  const Scratch memory([&](Carver &carver) {
    parts = carver.take<double>(n.parts() * 2 * n.channels);
    totals = carver.take<double>(2 * n.channels);
    affine = {carver.take<float>(n.channels + VL), carver.take<float>(n.channels + VL)};
  });
  if (memory.failed()) return RAREFY_NO_MEMORY;
#pragma omp parallel num_threads(threads)
  {
    const FlushDenormals flush;
    if (n.training) {
      // Around the first row, so that a mean far from zero costs no digits.
#pragma omp for schedule(static)
      for (int64_t part = 0; part < n.parts(); ++part) {
        channel_sums(n, n.begin(part), n.begin(part + 1), parts + part * 2 * n.channels,
                     [&](int64_t r, int64_t c, int64_t count, vec &sum, vec &squares) __attribute__((always_inline)) {
                       const vec d = load_some(x + r * n.channels + c, count) - load_some(x + c, count);
                       sum += d;
                       squares += d * d;
                     });
      }
      add_parts(n, parts, totals);
#pragma omp for schedule(static)
      for (int64_t c = 0; c < n.channels; ++c) {
        const double mean = totals[c] / double(n.rows);
        n.mean[c] = float(double(widen(x[c])) + mean);
        const double var = totals[n.channels + c] / double(n.rows) - mean * mean;
        n.var[c] = float(var > 0.0 ? var : 0.0);
      }
    }
#pragma omp single
    fill_affine(n, affine);
#pragma omp for schedule(static)
    for (int64_t part = 0; part < (y != nullptr ? n.parts() : 0); ++part) {
      for (int64_t r = n.begin(part); r < n.begin(part + 1); ++r) {
        for (int64_t c = 0; c < n.channels; c += VL) {
          const int64_t count = min64(VL, n.channels - c), at = r * n.channels + c;
          vec v = load_some(x + at, count) * load_any(affine.scale + c) + load_any(affine.shift + c);
          if (residual != nullptr) v += load_some(residual + at, count);
          if (n.relu) v = v > 0.0f ? v : vec{};
          store_some(y + at, v, count);
        }
      }
    }
  }
  return RAREFY_OK;
}

// dresidual may be null. y, if not null, is read where its sign is not x's: with a residual and ReLU.
template <class T>
int norm_backward(const Norm &n, const T *dy, const T *x, const T *y, T *dx, T *dresidual, float *dweight, float *dbias,
                  int threads) {
  double *parts = nullptr, *totals = nullptr;
  Affine affine = {};
  float *inverse = nullptr, *centre = nullptr, *slope = nullptr;
  const Scratch memory([&](Carver &carver) {
    parts = carver.take<double>(n.parts() * 2 * n.channels);
    totals = carver.take<double>(2 * n.channels);
    affine = {carver.take<float>(n.channels + VL), carver.take<float>(n.channels + VL)};
    inverse = carver.take<float>(n.channels + VL);
    centre = carver.take<float>(n.channels + VL);
    slope = carver.take<float>(n.channels + VL);
  });
  if (memory.failed()) return RAREFY_NO_MEMORY;
  fill_affine(n, affine);
  for (int64_t c = 0; c < n.channels; ++c) inverse[c] = inverse_deviation(n.var[c], n.eps);
  // What of dy passes the activation.
  const auto passed = [&](int64_t at, int64_t c, int64_t count, vec input) __attribute__((always_inline)) {
    const vec d = load_some(dy + at, count);
    if (!n.relu) return d;
    const vec out = y != nullptr ? load_some(y + at, count) : input * load_any(affine.scale + c) + load_any(affine.shift + c);
    return out > 0.0f ? d : vec{};
  };
#pragma omp parallel num_threads(threads)
  {
    const FlushDenormals flush;
#pragma omp for schedule(static)
    for (int64_t part = 0; part < n.parts(); ++part) {
      channel_sums(n, n.begin(part), n.begin(part + 1), parts + part * 2 * n.channels,
                   [&](int64_t r, int64_t c, int64_t count, vec &sum, vec &products) __attribute__((always_inline)) {
                     const int64_t at = r * n.channels + c;
                     const vec input = load_some(x + at, count), d = passed(at, c, count, input);
                     sum += d;
                     products += d * (input - load_some(n.mean + c, count));
                   });
    }
    add_parts(n, parts, totals);
#pragma omp single
    for (int64_t c = 0; c < n.channels; ++c) {
      const double sum = totals[c], product = totals[n.channels + c] * double(inverse[c]);
      if (dbias != nullptr) dbias[c] = float(sum);
      if (dweight != nullptr) dweight[c] = float(product);
      // dx = scale * (d - sum / rows - normed * product / rows); with statistics of the past only the first.
      const double share = n.training ? 1.0 / double(n.rows) : 0.0;
      slope[c] = float(double(affine.scale[c]) * double(inverse[c]) * product * share);
      centre[c] = float(double(affine.scale[c]) * sum * share - double(n.mean[c]) * double(slope[c]));
    }
#pragma omp for schedule(static)
    for (int64_t part = 0; part < n.parts(); ++part) {
      for (int64_t r = n.begin(part); r < n.begin(part + 1); ++r) {
        for (int64_t c = 0; c < n.channels; c += VL) {
          const int64_t count = min64(VL, n.channels - c), at = r * n.channels + c;
          const vec input = load_some(x + at, count), d = passed(at, c, count, input);
          if (dresidual != nullptr) store_some(dresidual + at, d, count);
          store_some(dx + at, d * load_any(affine.scale + c) - (input * load_any(slope + c) + load_any(centre + c)), count);
        }
      }
    }
  }
  return RAREFY_OK;
}

}  // namespace
}  // namespace rarefy
