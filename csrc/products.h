// Products of small dense blocks from registers: c (+)= a b, each element of a broadcast against a row of b.
#pragma once

#include "simd.h"

namespace rarefy {
namespace {

constexpr int kTileRows = 6;                       // most rows of c at a time
constexpr int kTileVectors = VL == 16 ? 4 : 2;     // most vectors of c's columns at a time
constexpr int kKeyPanel = kTileVectors * VL;          // the same in columns

// A row-major matrix of rows that are `stride` floats apart.
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
      for (int v = 0; v < NV; ++v) sum[r][v] += entry * columns[v];
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

// `rows` of c (6 or 4, see tile_rows), `vectors` of its columns; `panel_step` floats lie between panels of b.
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
