// Kernels for a handful of tokens. With so few, vectors of VL tokens would be mostly padding, so they lie along the
// entries of a unit or the units of a row, or are as short as the tokens are few. What limits them is how fast values and
// columns arrive from memory: each is read once, in order, and x stays in the caches.
#pragma once

#include "direct.h"

namespace rarefy {
namespace {

// Vectors of W <= VL floats, loaded from any address.
template <int W>
struct lanes_of {
  typedef float type __attribute__((vector_size(W * 4)));
  typedef float any __attribute__((vector_size(W * 4), aligned(4), may_alias));
};
template <int W>
using lanes = typename lanes_of<W>::type;
template <int W>
inline lanes<W> load_lanes(const float *p) {
  return *reinterpret_cast<const typename lanes_of<W>::any *>(p);
}
template <int W>
inline lanes<W> broadcast_lanes(float x) {
  return x - lanes<W>{};  // x in every lane: GCC turns it into one broadcast
}

// The sum of N lanes from `first` on, by halves.
template <int N, class Vector>
inline float sum_of(const Vector &v, int first) {
  float parts[N];
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) parts[i] = v[first + i];
#pragma GCC unroll 4
  for (int half = N / 2; half >= 1; half /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
  }
  return parts[0];
}

// The BC inputs of a unit as a vector of W lanes: repeated where the vector spans several rows of the unit.
template <int W, int BC>
inline lanes<W> inputs(const float *x) {
  if constexpr (BC == 1) return broadcast_lanes<W>(*x);
#if defined(__AVX512F__)
  if constexpr (BC == 4 && W == 16) return _mm512_maskz_broadcast_f32x4(0xffff, _mm_loadu_ps(x));
  if constexpr (BC == 8 && W == 16) return _mm512_maskz_broadcast_f32x8(0xffff, _mm256_loadu_ps(x));
#endif
#if defined(__AVX2__)
  if constexpr (BC == 4 && W == 8) return _mm256_broadcast_ps(reinterpret_cast<const __m128 *>(x));
#endif
  static_assert(BC == 1 || BC >= W || VL > 4, "only vectors wider than four floats span several rows");
  return load_lanes<W>(x);
}

// How vectors lie on the entries of a unit, which are in row-major order.
template <int BR, int BC>
struct UnitShape {
  static constexpr int W = min_int(VL, BR * BC);
  static constexpr int SPAN = max_int(1, W / BC);    // rows of the unit that a vector covers
  static constexpr int CHUNKS = max_int(1, BC / W);  // vectors that a row of the unit takes
  static constexpr int SUMS = BR / SPAN;             // vectors of sums a token
};

// y[t][r] for TB tokens and the unit rows in [begin, end); BR * BC > 1.
template <int BR, int BC, int TB, class Index>
void few_rows(const View<Index> &view, const float *values, const float *x, int64_t in, const float *bias,
                        int64_t begin, int64_t end, float *y, int64_t out) {
  using S = UnitShape<BR, BC>;
  constexpr int W = S::W, SPAN = S::SPAN, CHUNKS = S::CHUNKS, A = S::SUMS, EACH = W / SPAN;
  constexpr int AT = min_int(A, max_int(1, kBudget / TB));  // sums of a token at a time
  constexpr int U = max_int(1, 4 / (AT * TB));              // independent ones, to cover the latency of an addition
  for (int64_t r = begin; r < end; ++r) {
    for (int a0 = 0; a0 < A; a0 += AT) {
      lanes<W> sum[U][TB][AT] = {};
      auto unit = [&](int64_t k, lanes<W>(&acc)[TB][AT]) __attribute__((always_inline)) {
        const float *w = values + k * (BR * BC) + a0 * (SPAN * BC);
        const float *at = x + int64_t(view.cols[k]) * BC;
#pragma GCC unroll 16
        for (int a = 0; a < AT; a += max_int(1, 16 / (SPAN * BC))) fetch_ahead(w + a * SPAN * BC);
#pragma GCC unroll 4
        for (int c = 0; c < CHUNKS; ++c) {
          lanes<W> operand[TB];
#pragma GCC unroll 16
          for (int t = 0; t < TB; ++t) operand[t] = inputs<W, BC>(at + t * in + c * W);
#pragma GCC unroll 16
          for (int a = 0; a < AT; ++a) {
            const lanes<W> weight = load_lanes<W>(w + (a * CHUNKS + c) * W);
#pragma GCC unroll 16
            for (int t = 0; t < TB; ++t) acc[t][a] += weight * operand[t];
          }
        }
      };
      int64_t k = view.ptr[r];
      const int64_t k1 = view.ptr[r + 1];
      for (; k + U <= k1; k += U) {
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) unit(k + u, sum[u]);
      }
      for (; k < k1; ++k) unit(k, sum[0]);
#pragma GCC unroll 16
      for (int t = 0; t < TB; ++t) {
#pragma GCC unroll 16
        for (int a = 0; a < AT; ++a) {
          lanes<W> total = sum[0][t][a];
#pragma GCC unroll 8
          for (int u = 1; u < U; ++u) total += sum[u][t][a];
#pragma GCC unroll 16
          for (int s = 0; s < SPAN; ++s) {
            const int64_t f = r * BR + (a0 + a) * SPAN + s;
            y[t * out + f] = sum_of<EACH>(total, s * EACH) + (bias != nullptr ? bias[f] : 0.0f);
          }
        }
      }
    }
  }
}

// x at VL columns.
#if defined(__AVX512F__)
inline vec gather_at(const float *x, __m512i cols) { return _mm512_mask_i32gather_ps(vec{}, 0xffff, cols, x, 4); }
inline vec gather(const float *x, const uint16_t *cols) {
  return gather_at(x, _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i *>(cols))));
}
inline vec gather(const float *x, const int32_t *cols) { return gather_at(x, _mm512_loadu_si512(cols)); }
#elif defined(__AVX2__)
inline vec gather(const float *x, const uint16_t *cols) {
  return _mm256_i32gather_ps(x, _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(cols))), 4);
}
inline vec gather(const float *x, const int32_t *cols) {
  return _mm256_i32gather_ps(x, _mm256_loadu_si256(reinterpret_cast<const __m256i *>(cols)), 4);
}
#else
template <class Index>
inline vec gather(const float *x, const Index *cols) {
  return vec{x[cols[0]], x[cols[1]], x[cols[2]], x[cols[3]]};
}
#endif

// One token of an unstructured pattern: vectors along the units of a row.
template <class Index>
void one_token_rows(const View<Index> &view, const float *values, const float *x, const float *bias, int64_t begin,
                    int64_t end, float *y) {
  for (int64_t r = begin; r < end; ++r) {
    const int64_t k1 = view.ptr[r + 1];
    int64_t k = view.ptr[r];
    vec sum[2] = {};
    for (; k + 2 * VL <= k1; k += 2 * VL) {
#pragma GCC unroll 2
      for (int u = 0; u < 2; ++u) {
        fetch_ahead(values + k + u * VL);
        sum[u] += load_any(values + k + u * VL) * gather(x, view.cols + k + u * VL);
      }
      fetch_ahead(view.cols + k);
    }
    if (k + VL <= k1) {
      sum[0] += load_any(values + k) * gather(x, view.cols + k);
      k += VL;
    }
    // The last ones as a vector too: of a scalar loop the compiler may or may not fuse the multiplications and additions.
    alignas(64) float last_values[VL] = {}, last_x[VL] = {};
    for (int i = 0; k < k1; ++k, ++i) {
      last_values[i] = values[k];
      last_x[i] = x[view.cols[k]];
    }
    sum[1] += load(last_values) * load(last_x);
    y[r] = sum_of<VL>(sum[0] + sum[1], 0) + (bias != nullptr ? bias[r] : 0.0f);
  }
}

// Four neighbouring columns. One load where they are narrow: loads are what the next kernel is short of.
struct Columns {
  uint64_t at[4];
};
inline Columns four_columns(const uint16_t *cols) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the first column is in the lowest bits");
  uint64_t all;
  memcpy(&all, cols, sizeof all);
  return {{all & 0xffff, (all >> 16) & 0xffff, (all >> 32) & 0xffff, all >> 48}};
}
inline Columns four_columns(const int32_t *cols) {
  return {{uint64_t(cols[0]), uint64_t(cols[1]), uint64_t(cols[2]), uint64_t(cols[3])}};
}

// Up to P tokens of an unstructured pattern, x packed as panel[column][P]: vectors along P tokens.
template <int P, class Index>
void narrow_rows(const View<Index> &view, const float *values, const float *panel, const float *bias, int64_t begin,
                 int64_t end, int64_t tokens, float *y, int64_t out) {
  constexpr int64_t STEP = 16;  // floats of a cache line
  for (int64_t r = begin; r < end; ++r) {
    const int64_t k1 = view.ptr[r + 1];
    int64_t k = view.ptr[r];
    lanes<P> sum[4] = {};
    for (; k + STEP <= k1; k += STEP) {
      fetch_ahead(values + k);
      fetch_ahead(view.cols + k);
#pragma GCC unroll 4
      for (int q = 0; q < STEP; q += 4) {
        const Columns cols = four_columns(view.cols + k + q);
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) {
          sum[u] += broadcast_lanes<P>(values[k + q + u]) * load_lanes<P>(panel + cols.at[u] * P);
        }
      }
    }
    for (; k < k1; ++k) sum[0] += broadcast_lanes<P>(values[k]) * load_lanes<P>(panel + int64_t(view.cols[k]) * P);
    const lanes<P> total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    const float first = bias != nullptr ? bias[r] : 0.0f;
    for (int64_t t = 0; t < tokens; ++t) y[t * out + r] = total[t] + first;
  }
}

// panel[f][t] = x[t][f]; lanes past the last token are zero.
template <int P>
void pack_narrow(const float *x, int64_t in, int64_t tokens, float *panel) {
  if constexpr (P == VL) {
    pack<1>(x, in, tokens, 0, in, panel);
  } else {
    for (int64_t f = 0; f < in; ++f) {
#pragma GCC unroll 16
      for (int t = 0; t < P; ++t) panel[f * P + t] = t < tokens ? x[t * in + f] : 0.0f;
    }
  }
}

}  // namespace
}  // namespace rarefy
