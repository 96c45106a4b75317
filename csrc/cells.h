// What panels hold: a cell for each token of a feature. Cells are float32, or bfloat16 in a translation unit that defines
// RAREFY_HALF_CELLS, for CPUs that multiply bfloat16 in pairs (AVX512_BF16). Sums are float32 with either.
//
// A row of bfloat16 cells keeps 32 tokens in a vector in an order that makes pairs cheap: a vector's 128-bit lane L has tokens
// 4L to 4L + 3 of the first 16, then the same of the other 16. Interleaving the lower (upper) halves of all lanes of two
// features then gives the pairs of the first (other) 16 tokens, in their order, as the instruction wants them.
#pragma once

#include "simd.h"

namespace rarefy {
namespace {

#if defined(RAREFY_HALF_CELLS)

typedef bf16 cell;
constexpr bool kHalfCells = true;

// Both vectors of 16 tokens, rounded (to nearest, ties to even), as 32 cells.
inline __m512i narrow_cells(vec a, vec b) {
  const __m512i halves = __m512i(_mm512_cvtne2ps_pbh(__m512(b), __m512(a)));
  return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), halves);
}

// NV vectors of neighbouring tokens.
template <int NV>
inline void store_cells(cell *to, const vec (&values)[NV]) {
#pragma GCC unroll 8
  for (int v = 0; v < NV; v += 2) _mm512_store_si512(to + v * VL, narrow_cells(values[v], values[v + 1]));
}
template <int NV>
inline void load_cells(const cell *from, vec (&values)[NV]) {
#pragma GCC unroll 8
  for (int v = 0; v < NV; v += 2) {
    const __m512i cells = _mm512_load_si512(from + v * VL), zero = _mm512_setzero_si512();
    values[v] = vec(_mm512_unpacklo_epi16(zero, cells));
    values[v + 1] = vec(_mm512_unpackhi_epi16(zero, cells));
  }
}

#else

typedef float cell;
constexpr bool kHalfCells = false;

template <int NV>
inline void store_cells(cell *to, const vec (&values)[NV]) {
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) store(to + v * VL, values[v]);
}
template <int NV>
inline void load_cells(const cell *from, vec (&values)[NV]) {
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) values[v] = load(from + v * VL);
}

#endif

}  // namespace
}  // namespace rarefy
