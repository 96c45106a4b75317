// What panels hold: a cell for each token of a feature. Sums are float32 with either kind of cell:
//
// - float32.
// - bfloat16 where a translation unit defines RAREFY_DOT_CELLS, for CPUs that multiply bfloat16 in pairs (AVX512_BF16). Weights
//   are bfloat16, too. A vector holds 32 tokens in an order that makes pairs cheap: its 128-bit lane L has tokens 4L to 4L + 3
//   of the first 16, then the same of the other 16. Interleaving the lower (upper) halves of all lanes of two features gives
//   the pairs of the first (other) 16 tokens, in their order.
#pragma once

#include "simd.h"

namespace rarefy {
namespace {

#if defined(RAREFY_DOT_CELLS)
typedef bf16 cell;
typedef bf16 weight;  // a value of the matrix, in the stream
constexpr bool kDotCells = true;
constexpr int kCellVectors = 2;  // vectors of tokens that are stored and loaded together
#else
typedef float cell;
typedef float weight;
constexpr bool kDotCells = false;
constexpr int kCellVectors = 1;
#endif

constexpr int kLanes = kCellVectors * VL;  // tokens that a vector of cells holds

#if defined(RAREFY_DOT_CELLS)

// Both vectors of 16 tokens, rounded (to nearest, ties to even), as 32 cells.
inline __m512i narrow_cells(vec a, vec b) {
  const __m512i halves = __m512i(_mm512_cvtne2ps_pbh(__m512(b), __m512(a)));
  return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), halves);
}
inline void store_some(cell *to, const vec *values) { _mm512_store_si512(to, narrow_cells(values[0], values[1])); }
inline void load_some(const cell *from, vec *values) {
  const __m512i cells = _mm512_load_si512(from), zero = _mm512_setzero_si512();
  values[0] = vec(_mm512_unpacklo_epi16(zero, cells));
  values[1] = vec(_mm512_unpackhi_epi16(zero, cells));
}
inline void copy_cells(cell *to, const cell *from) { _mm512_store_si512(to, _mm512_load_si512(from)); }  // one vector
inline void clear_cells(cell *to) { _mm512_store_si512(to, _mm512_setzero_si512()); }

#else

inline void store_some(cell *to, const vec *values) { store(to, *values); }
inline void load_some(const cell *from, vec *values) { *values = load(from); }
inline void copy_cells(cell *to, const cell *from) { store(to, load(from)); }
inline void clear_cells(cell *to) { store(to, vec{}); }

#endif

// NV vectors of neighbouring tokens.
template <int NV>
inline void store_cells(cell *to, const vec (&values)[NV]) {
#pragma GCC unroll 8
  for (int v = 0; v < NV; v += kCellVectors) store_some(to + v * VL, values + v);
}
template <int NV>
inline void load_cells(const cell *from, vec (&values)[NV]) {
#pragma GCC unroll 8
  for (int v = 0; v < NV; v += kCellVectors) load_some(from + v * VL, values + v);
}

}  // namespace
}  // namespace rarefy
