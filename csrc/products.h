// Products of small dense blocks from registers: c (+)= a b, each element of a broadcast against a row of b.
//
// The factors are words of four bytes: a float32, or where a translation unit has cells for dot products (cells.h) two
// bfloat16, neighbours in the direction that is summed over, whose products are added with one instruction. Sums are float32.
#pragma once

#include "cells.h"

namespace rarefy {
namespace {

constexpr int kTileRows = 6;                       // most rows of c at a time
constexpr int kTileVectors = VL == 16 ? 4 : 2;     // most vectors of c's columns at a time
constexpr int kKeyPanel = kTileVectors * VL;          // the same in columns

constexpr int kPair = kDotCells ? 2 : 1;  // numbers a word

// Words of the numbers of a and, if they are paired, of b behind them.
inline vec pair_up(vec a, vec b) {
#if defined(RAREFY_DOT_CELLS)
  const __m512i halves = __m512i(_mm512_cvtne2ps_pbh(__m512(b), __m512(a)));
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20,
                                         4, 19, 3, 18, 2, 17, 1, 16, 0);
  return vec(_mm512_permutexvar_epi16(order, halves));
#else
  (void)b;
  return a;
#endif
}

// The words of `count` numbers along a row, from `row` on; row is padded with zeros to kPair vectors. `to` may be `row`.
inline void words_along(const float *row, int64_t count, float *to) {
#if defined(RAREFY_DOT_CELLS)
  for (int64_t c = 0; c < count; c += 2 * VL) {
    store(to + c / 2, vec(_mm512_cvtne2ps_pbh(__m512(load(row + c + VL)), __m512(load(row + c)))));
  }
#else
  (void)row, (void)count, (void)to;  // they are words already
#endif
}

inline vec add_products(vec sum, vec entry, vec columns) {
#if defined(RAREFY_DOT_CELLS)
  return vec(_mm512_dpbf16_ps(__m512(sum), __m512bh(entry), __m512bh(columns)));
#else
  return sum + entry * columns;
#endif
}

// A row-major matrix of rows that are `stride` words apart.
struct Rows {
  float *data;
  int64_t stride;
  float *row(int64_t r) const { return data + r * stride; }
};

// c[r][0, NV * VL) (+)= the sum over k < depth of a(r, k) b[k][...], where a(r, k) is a[r][k], or a[k][r] if TRANSPOSED.
template <int MR, int NV, bool TRANSPOSED>
void tile(const Rows a, const Rows b, int64_t depth, const Rows c, bool add) {
  vec sum[MR][NV];
  if (add) {
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[r][v] = load(c.row(r) + v * VL);
    }
  } else {
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[r][v] = vec{};
    }
  }
  const float *right = b.data, *left = a.data;
  for (int64_t k = 0; k < depth; ++k) {
    vec columns[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      columns[v] = load(right + v * VL);
      pin(columns[v]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      vec entry = broadcast(TRANSPOSED ? left[r] : left[r * a.stride]);
      pin(entry);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[r][v] = add_products(sum[r][v], entry, columns[v]);
    }
    right += b.stride;
    left += TRANSPOSED ? a.stride : 1;
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store(c.row(r) + v * VL, sum[r][v]);
  }
}

// How many rows the next tile has when `left` are left: 6 or 4, whichever wastes fewer; what is past `left` is padding.
inline int tile_rows(int64_t left) { return left <= 4 || left == 7 || left == 8 ? 4 : kTileRows; }

template <int MR, bool TRANSPOSED>
void tile_of(const Rows a, const Rows b, int64_t depth, const Rows c, int vectors, bool add) {
  if constexpr (kTileVectors == 4) {
    if (vectors == 4) return tile<MR, 4, TRANSPOSED>(a, b, depth, c, add);
    if (vectors == 3) return tile<MR, 3, TRANSPOSED>(a, b, depth, c, add);
  }
  if (vectors == 2) return tile<MR, 2, TRANSPOSED>(a, b, depth, c, add);
  tile<MR, 1, TRANSPOSED>(a, b, depth, c, add);
}

// `rows` of c (6 or 4, see tile_rows), `vectors` of its columns; `panel_step` words lie between panels of b.
template <bool TRANSPOSED>
void product(const Rows a, const Rows b, int64_t panel_step, int64_t depth, const Rows c, int rows, int64_t vectors,
             bool add) {
  for (int64_t v = 0; v < vectors; v += kTileVectors) {
    const Rows part = {b.data + v / kTileVectors * panel_step, b.stride}, out = {c.data + v * VL, c.stride};
    const int width = int(min64(kTileVectors, vectors - v));
    if (rows == 4) {
      tile_of<4, TRANSPOSED>(a, part, depth, out, width, add);
    } else {
      tile_of<kTileRows, TRANSPOSED>(a, part, depth, out, width, add);
    }
  }
}

}  // namespace
}  // namespace rarefy
