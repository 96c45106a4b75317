// The inner loops of tiled.h on float32 cells.
#pragma once

#include "dots.h"
#include "stream.h"

namespace rarefy {
namespace {

// With AVX2 units of one entry are read four at a time: four neighbours' offsets in one load, and their values in another. Loads
// are what they are short of: each has four of inputs, one of an offset and one of a value to four multiply-adds, and a core
// does as many loads as multiply-adds in a cycle, or few more. With other vectors that is not measured yet.
#if defined(__AVX2__) && !defined(__AVX512F__)
#define RAREFY_QUADS
inline uint64_t four_offsets(const uint16_t *from) {
  uint64_t offsets;
  memcpy(&offsets, from, sizeof(offsets));
  __asm__("" : "+r"(offsets));  // else the compiler loads them one by one after all
  return offsets;
}
inline vec four_values(const weight *from) {  // in both halves
  vec values = _mm256_broadcast_ps(reinterpret_cast<const __m128 *>(from));
  pin(values);
  return values;
}
template <int I>
inline vec entry_of(vec four) {
  return _mm256_permute_ps(four, I * 0x55);
}
template <int I>
inline const cell *input_of(const cell *tile, uint64_t offsets) {
  return input_at(tile, uint16_t(offsets >> (16 * I)));
}
#endif

template <int NV>
__attribute__((always_inline)) inline void add_unit(vec (&sum)[NV], const cell *x, vec entry) {
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) sum[v] += entry * load(x + v * VL);
}

// Units of one entry: of a row, or of two rows of equal length in turn. Either way a row's products are added one after the
// other, as which rows have a partner depends on how many threads share them out.
template <int NV, int ROWS, class Places>
inline void multiply_singles(const Segment *segments, const uint16_t *offsets, const weight *values, const cell *tile,
                             float *sums, const Places places) {
  const int64_t count = ROWS * segments[0].length;
  vec sum[NV] = {}, other[NV] = {};
  vec(&second)[NV] = ROWS == 2 ? other : sum;  // of every other unit
  int64_t k = 0;
#if defined(RAREFY_QUADS)
  for (; k + 4 <= count; k += 4) {
    const uint64_t at = four_offsets(offsets + k);
    const vec four = four_values(values + k);
    add_unit(sum, input_of<0>(tile, at), entry_of<0>(four));
    add_unit(second, input_of<1>(tile, at), entry_of<1>(four));
    add_unit(sum, input_of<2>(tile, at), entry_of<2>(four));
    add_unit(second, input_of<3>(tile, at), entry_of<3>(four));
  }
#endif
  for (; k + ROWS <= count; k += ROWS) {
    add_unit(sum, input_at(tile, offsets[k]), broadcast(values[k]));
    if (ROWS == 2) add_unit(second, input_at(tile, offsets[k + 1]), broadcast(values[k + 1]));
  }
  add_to_row(sum, sums + places.at(segments[0].row), places.step);
  if (ROWS == 2) add_to_row(second, sums + places.at(segments[ROWS - 1].row), places.step);
}

// A segment of larger units.
template <int RB, int CB, int NV, bool WT, class Places>
inline void multiply_blocks(const Segment &segment, const uint16_t *offsets, const weight *values, const cell *tile,
                            float *sums, const Places places) {
  constexpr int P = NV * VL;
  // Where the rows of a unit do not fit at once, fewer rows by more vectors: a third fewer loads, measured to be faster.
  constexpr int RT = RB <= kBudget ? RB : kBudget / 2;
  constexpr int VT = max_int(1, min_int(NV, kBudget / RT));
  const int64_t length = segment.length;
  for (int r0 = 0; r0 < RB; r0 += RT) {
    for (int v0 = 0; v0 < NV; v0 += VT) {
      vec sum[RT][VT] = {};
      for (int64_t k = 0; k < length; ++k) {
        const cell *x = input_at(tile, offsets[k]) + v0 * VL;
        const weight *w = values + k * (RB * CB);
#pragma GCC unroll 16
        for (int c = 0; c < CB; ++c) {
          vec inputs[VT];
          load_cells<VT>(x + c * P, inputs);
#pragma GCC unroll 16
          for (int r = 0; r < RT; ++r) {
            const vec entry = broadcast(WT ? w[c * RB + r0 + r] : w[(r0 + r) * CB + c]);
#pragma GCC unroll 16
            for (int v = 0; v < VT; ++v) sum[r][v] += entry * inputs[v];
          }
        }
      }
      float *out = sums + places.at(segment.row) + r0 * P + v0 * places.step;
#pragma GCC unroll 16
      for (int r = 0; r < RT; ++r) add_to_row(sum[r], out + r * P, places.step);
    }
  }
}

// ROWS segments of equal length, unit by unit of each in turn: sums[row] += units times inputs.
// WT: a unit's values are [input][output] of this view, that is, the view is W^T.
template <int RB, int CB, int NV, bool WT, int ROWS, class Places>
inline void multiply_segments(const Segment *segments, const uint16_t *offsets, const weight *values, const cell *tile,
                              float *sums, const Places places) {
  if constexpr (RB * CB == 1) {
    multiply_singles<NV, ROWS>(segments, offsets, values, tile, sums, places);
  } else {
    static_assert(ROWS == 1, "only units of one entry share a loop");
    multiply_blocks<RB, CB, NV, WT>(segments[0], offsets, values, tile, sums, places);
  }
}

// The backward pass of units of BR x 1: the view is W^T, `tile` holds dy, and for each value one load of dy serves both
// gradients: dx_sums[row] += w dy, and the dot product of dy with x[row]. Dot products of neighbours in the stream leave
// joined; a last one without a neighbour is joined with zero, and the stream has a place for the zero.
template <int BR, int NV, bool DX, int ROWS, class Places>
#if defined(RAREFY_QUADS)
__attribute__((noinline))  // with 16 registers of each kind the compiler keeps the loop's addresses in memory, if inlined
#else
inline
#endif
void backward_segments(const Segment *segments, int64_t length, const uint16_t *offsets, const weight *values,
                       const cell *tile, const cell *x, float *dx_sums, float *out, const Places places) {
  vec own[ROWS][NV], sum[ROWS][NV] = {};
#pragma GCC unroll 4
  for (int s = 0; s < ROWS; ++s) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) own[s][v] = load(x + places.at(segments[s].row) + v * places.step);
  }
  auto product = [&](int s, const cell *dy, const weight *value) __attribute__((always_inline)) {
    vec entry = {};
    if (DX) entry = broadcast(*value);
    vec dot = {};
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      vec d = load(dy + v * VL);
      if (DX) {
        pin(d);
        sum[s][v] += entry * d;
      }
      dot = v == 0 ? own[s][0] * d : dot + own[s][v] * d;
    }
    return dot;
  };
  auto unit = [&](int s, int64_t at) __attribute__((always_inline)) {
    return product(s, input_at(tile, offsets[at]), values + at);
  };
  if constexpr (BR > 1) {
    static_assert(BR % 2 == 0 && ROWS == 1, "dot products leave in pairs, and one row takes the registers");
    for (int64_t k = 0; k < length; ++k) {
      const cell *dy = input_at(tile, offsets[k]);
#pragma GCC unroll 8
      for (int i = 0; i < BR; i += 2) {
        const weight *value = values + k * BR + i;
        const vec a = product(0, dy + i * places.input_step, value);
        const vec b = product(0, dy + (i + 1) * places.input_step, value + 1);
        store(out + (k * BR + i) / 2 * VL, join<1>(a, b));
      }
    }
  } else if constexpr (ROWS == 2) {
    for (int64_t k = 0; k < length; ++k) {
      const vec a = unit(0, 2 * k), b = unit(ROWS - 1, 2 * k + 1);
      store(out + k * VL, join<1>(a, b));
    }
  } else {
    int64_t k = 0;
    for (; k + 2 <= length; k += 2) {
      const vec a = unit(0, k), b = unit(0, k + 1);
      store(out + k / 2 * VL, join<1>(a, b));
    }
    if (k < length) store(out + k / 2 * VL, join<1>(unit(0, k), vec{}));
  }
  if (DX) {
#pragma GCC unroll 4
    for (int s = 0; s < ROWS; ++s) add_to_row(sum[s], dx_sums + places.at(segments[s].row), places.step);
  }
}

// The dot products of one unit over some panels: BR rows of dy with BC rows of x, at target[i * BC + j]. x's vectors lie
// `x_step` cells apart.
template <int BR, int BC, int NV, int PANELS, bool HALVED>
inline void unit_dots(const cell *dy, const cell *x, const Panels &panels, int64_t x_step, Dots<HALVED> &dots) {
  constexpr int P = NV * VL;
  constexpr int RJ = min_int(BC, VL), RI = min_int(BR, VL / RJ);  // neighbours in memory, VL of them if the unit has so many
  for (int i0 = 0; i0 < BR; i0 += RI) {
    for (int j0 = 0; j0 < BC; j0 += RJ) {
      vec acc[VL] = {};
#pragma GCC unroll 16
      for (int part = 0; part < PANELS * NV; ++part) {
        const int panel = part / NV, v = part % NV;
        const cell *inputs = x + panel * panels.x + j0 * P + v * x_step;
        vec held[RJ];  // where sums are not added across at once it pays to load x once
#pragma GCC unroll 16
        for (int j = 0; HALVED && j < RJ; ++j) {
          held[j] = load(inputs + j * P);
          pin(held[j]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < RI; ++i) {
          const vec y = load(dy + panel * panels.dy + (i0 + i) * P + v * VL);
#pragma GCC unroll 16
          for (int j = 0; j < RJ; ++j) acc[i * RJ + j] += y * (HALVED ? held[j] : load(inputs + j * P));
        }
      }
      put_unit<BR, BC, RI, RJ>(acc, dots);
    }
  }
}

}  // namespace
}  // namespace rarefy
