// Packing rows into panels of bfloat16 cells (cells.h): words of two features are transposed, then their halves parted.
#pragma once

#include "cells.h"

namespace rarefy {
namespace {

// The first `count` <= 32 features from `p` on, rounded to nearest, ties to even; zeros after them.
inline __m512i narrow_row(const float *p, int64_t count) {
  if (count >= 32) return __m512i(_mm512_cvtne2ps_pbh(_mm512_loadu_ps(p + 16), _mm512_loadu_ps(p)));
  const uint32_t mask = (uint32_t(1) << count) - 1;
  return __m512i(_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(__mmask16(mask >> 16), p + 16),
                                     _mm512_maskz_loadu_ps(__mmask16(mask), p)));
}
inline __m512i narrow_row(const bf16 *p, int64_t count) {
  if (count >= 32) return _mm512_loadu_si512(p);
  return _mm512_maskz_loadu_epi16(__mmask32((uint32_t(1) << count) - 1), p);
}

// ReLU(x scale + shift) of them instead.
inline __m512i activate_row(const float *p, int64_t count, const float *scale, const float *shift) {
  const uint32_t mask = count >= 32 ? ~uint32_t(0) : (uint32_t(1) << count) - 1;
  const auto half = [&](__mmask16 live, int64_t at) __attribute__((always_inline)) {
    const vec x = vec(_mm512_maskz_loadu_ps(live, p + at)), by = vec(_mm512_maskz_loadu_ps(live, scale + at));
    return _mm512_max_ps(__m512(x * by + vec(_mm512_maskz_loadu_ps(live, shift + at))), _mm512_setzero_ps());
  };
  return __m512i(_mm512_cvtne2ps_pbh(half(__mmask16(mask >> 16), 16), half(__mmask16(mask), 0)));
}
inline __m512i activate_row(const bf16 *p, int64_t count, const float *scale, const float *shift) {
  alignas(64) float wide[32];
  const __m512i row = narrow_row(p, count);
  store(wide, vec(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(row)), 16)));
  store(wide + 16, vec(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(row, 1)), 16)));
  return activate_row(wide, count, scale, shift);
}

// `count` <= 32 features of 32 tokens, of which the first `live` are there: a vector of cells at out[i * step] for feature i.
// row(i) is token i's features as narrow_row has them.
template <class Row>
__attribute__((always_inline)) inline void pack_cells(int64_t live, int64_t count, Row row, cell *out, int64_t step) {
  const __m512i low = _mm512_set1_epi32(0xffff);
  vec words[2][VL];  // of the first and the other 16 tokens: word i of a row has features 2i and 2i + 1
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    vec block[VL];
    if (live >= (half + 1) * VL) {
#pragma GCC unroll 16
      for (int i = 0; i < VL; ++i) block[i] = vec(row(half * VL + i));
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < VL; ++i) block[i] = half * VL + i < live ? vec(row(half * VL + i)) : vec{};
    }
    transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < VL; ++i) words[half][i] = block[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < VL; ++i) {
    const __m512i a = __m512i(words[0][i]), b = __m512i(words[1][i]);
    if (2 * i < count) {
      _mm512_store_si512(out + 2 * i * step, _mm512_packus_epi32(_mm512_and_si512(a, low), _mm512_and_si512(b, low)));
    }
    if (2 * i + 1 < count) {
      _mm512_store_si512(out + (2 * i + 1) * step, _mm512_packus_epi32(_mm512_srli_epi32(a, 16), _mm512_srli_epi32(b, 16)));
    }
  }
}

// panel[f - begin] for the features begin <= f < end of `tokens` <= P rows of `source`, whose row length is `stride`.
template <int NV, class T>
void pack(const T *source, int64_t stride, int64_t tokens, int64_t begin, int64_t end, cell *panel) {
  constexpr int P = NV * VL;
  for (int group = 0; group < P; group += kLanes) {
    const T *rows = source + group * stride;
    for (int64_t f = begin; f < end; f += 2 * VL) {
      const int64_t count = min64(2 * VL, end - f);
      const auto row = [&](int i) __attribute__((always_inline)) { return narrow_row(rows + i * stride + f, count); };
      pack_cells(tokens - group, count, row, panel + (f - begin) * P + group, P);
    }
  }
}

// The channels of one pixel of `live` images, `stride` elements apart: a vector of cells at out[c * step]. Of ReLU(x scale +
// shift) if ACT.
template <bool ACT, class T>
void pack_pixel(const T *pixel, int64_t stride, int64_t live, int64_t channels, const float *scale, const float *shift,
                cell *out, int64_t step) {
  for (int64_t c = 0; c < channels; c += 2 * VL) {
    const int64_t count = min64(2 * VL, channels - c);
    const auto row = [&](int n) __attribute__((always_inline)) {
      const T *from = pixel + n * stride + c;
      return ACT ? activate_row(from, count, scale + c, shift + c) : narrow_row(from, count);
    };
    pack_cells(live, count, row, out + c * step, step);
  }
}

}  // namespace
}  // namespace rarefy
