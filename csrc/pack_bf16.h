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

// panel[f - begin] for the features begin <= f < end of `tokens` <= P rows of `source`, whose row length is `stride`.
template <int NV, class T>
void pack(const T *source, int64_t stride, int64_t tokens, int64_t begin, int64_t end, cell *panel) {
  constexpr int P = NV * VL;
  const __m512i low = _mm512_set1_epi32(0xffff);
  for (int group = 0; group < NV; group += 2) {
    const T *rows = source + group * VL * stride;
    for (int64_t f = begin; f < end; f += 2 * VL) {
      const int64_t count = min64(2 * VL, end - f);
      vec words[2][VL];  // of the first and the other 16 tokens: word i of a row has features 2i and 2i + 1
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const int64_t live = min64(max64(tokens - (group + half) * VL, 0), VL);
        vec block[VL];
        if (live == VL) {
#pragma GCC unroll 16
          for (int i = 0; i < VL; ++i) block[i] = vec(narrow_row(rows + (half * VL + i) * stride + f, count));
        } else {
#pragma GCC unroll 16
          for (int i = 0; i < VL; ++i) {
            block[i] = i < live ? vec(narrow_row(rows + (half * VL + i) * stride + f, count)) : vec{};
          }
        }
        transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < VL; ++i) words[half][i] = block[i];
      }
      cell *out = panel + (f - begin) * P + group * VL;
#pragma GCC unroll 16
      for (int i = 0; i < VL; ++i) {
        const __m512i a = __m512i(words[0][i]), b = __m512i(words[1][i]);
        if (2 * i < count) {
          _mm512_store_si512(out + 2 * i * P, _mm512_packus_epi32(_mm512_and_si512(a, low), _mm512_and_si512(b, low)));
        }
        if (2 * i + 1 < count) {
          _mm512_store_si512(out + (2 * i + 1) * P, _mm512_packus_epi32(_mm512_srli_epi32(a, 16), _mm512_srli_epi32(b, 16)));
        }
      }
    }
  }
}

}  // namespace
}  // namespace rarefy
