// The inner loops of tiled.h on bfloat16 cells: vdpbf16ps multiplies pairs of neighbours and adds both products to a float32
// sum, so half the multiply-adds of float32 cells do. The products y = W x need pairs of features, which are made on the way
// from two neighbours in the stream (units of one input) or two inputs of a unit; dot products over tokens take the cells
// as they lie. The stream's values are in the order of use: for each pair of inputs the two values of each output.
#pragma once

#include "dots.h"
#include "stream.h"

namespace rarefy {
namespace {

typedef uint32_t pair __attribute__((may_alias));

inline __m512i cells_at(const cell *p) { return _mm512_load_si512(p); }
inline vec dot_pairs(vec sum, __m512i a, __m512i b) {
  return vec(_mm512_dpbf16_ps(__m512(sum), __m512bh(a), __m512bh(b)));
}
inline void pin(__m512i &v) { __asm__("" : "+v"(v)); }

// ROWS segments of equal length, pair of inputs by pair of inputs of each in turn: sums[row] += units times inputs.
template <int RB, int CB, int NV, bool WT, int ROWS, class Places>
inline void multiply_segments(const Segment *segments, const uint16_t *offsets, const weight *values, const cell *tile,
                              float *sums, const Places places) {
  static_assert(CB == 1 || CB % 2 == 0, "a unit has one input or pairs of them");
  constexpr int P = NV * VL;
  constexpr int RT = min_int(RB, kBudget / 2), VT = max_int(2, min_int(NV, kBudget / (RT * ROWS)));
  constexpr int UNITS = CB == 1 ? 2 : 1, PAIRS = max_int(CB / 2, 1);  // of a step
  const pair *words = reinterpret_cast<const pair *>(values);
  const int64_t steps = segments[0].length / UNITS;
  for (int r0 = 0; r0 < RB; r0 += RT) {
    for (int v0 = 0; v0 < NV; v0 += VT) {
      vec sum[ROWS][RT][VT] = {};
      for (int64_t k = 0; k < steps; ++k) {
#pragma GCC unroll 4
        for (int s = 0; s < ROWS; ++s) {
          const uint16_t *offset = offsets + (ROWS * k + s) * UNITS;
          const pair *w = words + (ROWS * k + s) * (PAIRS * RB) + r0;
          const cell *first = input_at(tile, offset[0]) + v0 * VL;
          const cell *second = (CB == 1 ? input_at(tile, offset[UNITS - 1]) + v0 * VL : first + P);
#pragma GCC unroll 8
          for (int c = 0; c < PAIRS; ++c) {
            __m512i inputs[VT];
#pragma GCC unroll 8
            for (int v = 0; v < VT; v += 2) {
              const __m512i a = cells_at(first + 2 * c * P + v * VL), b = cells_at(second + 2 * c * P + v * VL);
              inputs[v] = _mm512_unpacklo_epi16(a, b);
              inputs[v + 1] = _mm512_unpackhi_epi16(a, b);
            }
#pragma GCC unroll 16
            for (int r = 0; r < RT; ++r) {
              __m512i weight = _mm512_set1_epi32(int(w[c * RB + r]));
              if (VT > 2) pin(weight);
#pragma GCC unroll 8
              for (int v = 0; v < VT; ++v) sum[s][r][v] = dot_pairs(sum[s][r][v], inputs[v], weight);
            }
          }
        }
      }
#pragma GCC unroll 4
      for (int s = 0; s < ROWS; ++s) {
        float *out = sums + places.at(segments[s].row) + r0 * P + v0 / 2 * places.step;
#pragma GCC unroll 16
        for (int r = 0; r < RT; ++r) add_to_row(sum[s][r], out + r * P, places.step);
      }
    }
  }
}

// As for float32 cells: one load of dy serves both gradients, and dot products of neighbours in the stream leave joined.
template <int BR, int NV, bool DX, int ROWS, class Places>
inline void backward_segments(const Segment *segments, int64_t length, const uint16_t *offsets, const weight *values,
                              const cell *tile, const cell *x, float *dx_sums, float *out, const Places places) {
  constexpr int HV = NV / 2;  // vectors of cells
  const pair *words = reinterpret_cast<const pair *>(values);
  __m512i own[ROWS][HV];
  vec sum[ROWS][NV] = {};
#pragma GCC unroll 4
  for (int s = 0; s < ROWS; ++s) {
#pragma GCC unroll 8
    for (int v = 0; v < HV; ++v) own[s][v] = cells_at(x + places.at(segments[s].row) + v * places.step);
  }
  // A pair of inputs for row s: both gradients, where `at` is its place in the pairs of the stream.
  auto product = [&](int s, int64_t at, const cell *first, const cell *second) __attribute__((always_inline)) {
    __m512i values_of_pair = {};
    if (DX) {
      values_of_pair = _mm512_set1_epi32(int(words[at]));
      pin(values_of_pair);
    }
    vec dot[2] = {};
#pragma GCC unroll 8
    for (int v = 0; v < HV; ++v) {
      __m512i a = cells_at(first + 2 * v * VL), b = cells_at(second + 2 * v * VL);
      if (DX) {
        pin(a);
        pin(b);
        sum[s][2 * v] = dot_pairs(sum[s][2 * v], _mm512_unpacklo_epi16(a, b), values_of_pair);
        sum[s][2 * v + 1] = dot_pairs(sum[s][2 * v + 1], _mm512_unpackhi_epi16(a, b), values_of_pair);
      }
      dot[0] = dot_pairs(dot[0], own[s][v], a);
      dot[1] = dot_pairs(dot[1], own[s][v], b);
    }
    store(out + at * VL, join<1>(dot[0], dot[1]));
  };
  if constexpr (BR > 1) {
    static_assert(BR % 2 == 0 && ROWS == 1, "inputs come in pairs, and one row takes the registers");
    for (int64_t k = 0; k < length; ++k) {
      const cell *dy = input_at(tile, offsets[k]);
#pragma GCC unroll 8
      for (int i = 0; i < BR; i += 2) {
        product(0, (k * BR + i) / 2, dy + i * places.input_step, dy + (i + 1) * places.input_step);
      }
    }
  } else {
    for (int64_t k = 0; k < length / 2; ++k) {
#pragma GCC unroll 4
      for (int s = 0; s < ROWS; ++s) {
        const uint16_t *offset = offsets + (ROWS * k + s) * 2;
        product(s, ROWS * k + s, input_at(tile, offset[0]), input_at(tile, offset[1]));
      }
    }
  }
  if (DX) {
#pragma GCC unroll 4
    for (int s = 0; s < ROWS; ++s) add_to_row(sum[s], dx_sums + places.at(segments[s].row), places.step);
  }
}

// The dot products of one unit over some panels: BR rows of dy with BC rows of x, at target[i * BC + j]. Tiles of 4 x 4 need
// the fewest loads, which these cores have one of in a cycle.
template <int BR, int BC, int NV, int PANELS>
inline void unit_dots(const cell *dy, const cell *x, const Panels &panels, int64_t x_step, Dots<false> &dots) {
  constexpr int P = NV * VL;
  constexpr int RJ = min_int(BC, 4), RI = min_int(BR, VL / RJ);
  for (int i0 = 0; i0 < BR; i0 += RI) {
    for (int j0 = 0; j0 < BC; j0 += RJ) {
      vec acc[VL] = {};
#pragma GCC unroll 16
      for (int part = 0; part < PANELS * (NV / 2); ++part) {
        const int panel = part / (NV / 2), v = part % (NV / 2) * 2;
        __m512i columns[RJ];
#pragma GCC unroll 4
        for (int j = 0; j < RJ; ++j) {
          columns[j] = cells_at(x + panel * panels.x + (j0 + j) * P + v / 2 * x_step);
          pin(columns[j]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < RI; ++i) {
          __m512i y = cells_at(dy + panel * panels.dy + (i0 + i) * P + v * VL);
          pin(y);
#pragma GCC unroll 4
          for (int j = 0; j < RJ; ++j) acc[i * RJ + j] = dot_pairs(acc[i * RJ + j], y, columns[j]);
        }
      }
      if constexpr (RI * RJ == VL && BC > RJ) {
        dots.put_rows<RI, RJ>(acc, i0 * BC + j0, BC);
      } else {
        put_unit<BR, BC, RI, RJ>(acc, dots);
      }
    }
  }
  if constexpr (BC > RJ) dots.skip(BR * BC);
}

}  // namespace
}  // namespace rarefy
