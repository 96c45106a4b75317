// Kernels on a Stream: inputs in L1, sums in L2. See stream.h.
#pragma once

#include "dots.h"
#include "pack.h"
#include "prefetch.h"
#include "stream.h"

namespace rarefy {
namespace {

constexpr bool kPairedBackward = VL == 16;  // two rows of x and of sums take the registers that only AVX-512 has

inline const float *input_at(const float *tile, uint16_t offset) {
  return reinterpret_cast<const float *>(reinterpret_cast<const char *>(tile) + size_t(offset) * kOffsetBytes);
}

// Where a row's vectors lie: `at(row)` floats from the beginning of the chunk, `step` floats from one to the next.
template <int RB, int NV>
struct InPanels {
  static constexpr int64_t step = VL;
  static constexpr int64_t at(int64_t row) { return row * (RB * NV * VL); }
};
struct Scattered {  // for rows of one output
  const int32_t *offsets;
  int64_t step;
  int64_t at(int64_t row) const { return offsets[row]; }
};

// ROWS segments of equal length, unit by unit of each in turn: sums[row] += units times inputs.
// WT: a unit's values are [input][output] of this view, that is, the view is W^T.
template <int RB, int CB, int NV, bool WT, int ROWS, class Places>
inline void multiply_segments(const Segment *segments, const uint16_t *offsets, const float *values, const float *tile,
                              float *sums, const Places places) {
  constexpr int P = NV * VL;
  // Where the rows of a unit do not fit at once, fewer rows by more vectors: a third fewer loads, measured to be faster.
  constexpr int RT = RB <= kBudget ? RB : kBudget / 2;
  constexpr int VT = max_int(1, min_int(NV, kBudget / RT));
  const int64_t length = segments[0].length;
  for (int r0 = 0; r0 < RB; r0 += RT) {
    for (int v0 = 0; v0 < NV; v0 += VT) {
      vec sum[ROWS][RT][VT] = {};
      for (int64_t k = 0; k < length; ++k) {
#pragma GCC unroll 4
        for (int s = 0; s < ROWS; ++s) {
          const float *x = input_at(tile, offsets[ROWS * k + s]) + v0 * VL;
          const float *w = values + (ROWS * k + s) * (RB * CB);
#pragma GCC unroll 16
          for (int c = 0; c < CB; ++c) {
#pragma GCC unroll 16
            for (int r = 0; r < RT; ++r) {
              const vec weight = broadcast(WT ? w[c * RB + r0 + r] : w[(r0 + r) * CB + c]);
#pragma GCC unroll 16
              for (int v = 0; v < VT; ++v) sum[s][r][v] += weight * load(x + c * P + v * VL);
            }
          }
        }
      }
#pragma GCC unroll 4
      for (int s = 0; s < ROWS; ++s) {
        float *out = sums + places.at(segments[s].row) + r0 * P + v0 * places.step;
#pragma GCC unroll 16
        for (int r = 0; r < RT; ++r) {
#pragma GCC unroll 16
          for (int v = 0; v < VT; ++v) {
            float *to = out + r * P + v * places.step;
            store(to, load(to) + sum[s][r][v]);
          }
        }
      }
    }
  }
}

// All segments of one (chunk, tile).
template <int RB, int CB, int NV, bool WT, class Places>
inline void multiply_tile(const Stream &s, int64_t at, const float *tile, float *sums, Prefetch &prefetch, const Places places) {
  const Segment *segments = s.segments + at * s.chunk_rows;
  const int32_t count = s.num_segments[at];
  const uint16_t *offsets = s.offsets + s.first_unit[at];
  const float *values = s.values + int64_t(s.first_unit[at]) * (RB * CB);
  prefetch.spread(RB * CB == 1 ? count / 2 : count);
  for (int32_t i = 0; i < count;) {
    prefetch.step();
    const int64_t length = segments[i].length;
    if (RB * CB == 1 && paired(s, segments, i, count)) {
      multiply_segments<RB, CB, NV, WT, (RB * CB == 1 ? 2 : 1)>(segments + i, offsets, values, tile, sums, places);
      offsets += 2 * length;
      values += 2 * length * (RB * CB);
      i += 2;
    } else {
      multiply_segments<RB, CB, NV, WT, 1>(segments + i, offsets, values, tile, sums, places);
      offsets += length;
      values += length * (RB * CB);
      ++i;
    }
  }
}

// The backward pass of unstructured segments: the view is W^T, `tile` holds dy, and for each nonzero one load of dy
// serves both gradients: dx_sums[row] += w dy, and the dot product of dy with x[row]. Dot products of neighbours in the
// stream leave joined; a last one without a neighbour is joined with zero, and the stream has a place for the zero.
template <int NV, bool DX, int ROWS, class Places>
inline void backward_segments(const Segment *segments, int64_t length, const uint16_t *offsets, const float *values,
                              const float *tile, const float *x, float *dx_sums, float *out, const Places places) {
  vec own[ROWS][NV], sum[ROWS][NV] = {};
#pragma GCC unroll 4
  for (int s = 0; s < ROWS; ++s) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) own[s][v] = load(x + places.at(segments[s].row) + v * places.step);
  }
  auto unit = [&](int s, int64_t at) __attribute__((always_inline)) {
    const float *dy = input_at(tile, offsets[at]);
    vec weight = {};
    if (DX) weight = broadcast(values[at]);
    vec dot = {};
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      vec d = load(dy + v * VL);
      if (DX) {
        pin(d);
        sum[s][v] += weight * d;
      }
      dot = v == 0 ? own[s][0] * d : dot + own[s][v] * d;
    }
    return dot;
  };
  if constexpr (ROWS == 2) {
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
    for (int s = 0; s < ROWS; ++s) {
      float *to = dx_sums + places.at(segments[s].row);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) store(to + v * places.step, load(to + v * places.step) + sum[s][v]);
    }
  }
}

// All segments of one (chunk, tile) of the view W^T (units of BC rows, BR inputs). dvalues is in the stream's order.
template <int BR, int BC, int NV, bool DX, class Places>
inline void backward_tile(const Stream &s, int64_t at, const float *tile, const float *x, float *dx_sums, float *dots_buffer,
                          float *dvalues, bool add, Prefetch &prefetch, const Places places) {
  const Segment *segments = s.segments + at * s.chunk_rows;
  const int32_t count = s.num_segments[at];
  const uint16_t *offsets = s.offsets + s.first_unit[at];
  const float *values = s.values + int64_t(s.first_unit[at]) * (BR * BC);
  dvalues += int64_t(s.first_unit[at]) * (BR * BC);
  if constexpr (BR == 1 && BC == 1) {
    Dots<true> dots(dots_buffer);
    dots.begin(dvalues, add);
    prefetch.spread(count / 2);
    for (int32_t i = 0; i < count;) {
      prefetch.step();
      const int64_t length = segments[i].length;
      const int rows = kPairedBackward && paired(s, segments, i, count) ? 2 : 1;
      constexpr int64_t kMost = kDots / 2;  // longer segments go in pieces: the dots wait in a small buffer
      for (int64_t k = 0; k < length; k += kMost) {
        const int64_t piece = min64(kMost, length - k);
        if (kPairedBackward && rows == 2) {
          backward_segments<NV, DX, (kPairedBackward ? 2 : 1)>(segments + i, piece, offsets, values, tile, x, dx_sums,
                                                               dots.next(), places);
        } else {
          backward_segments<NV, DX, 1>(segments + i, piece, offsets, values, tile, x, dx_sums, dots.next(), places);
        }
        const int64_t places = rows == 2 ? 2 * piece : (piece + 1) / 2 * 2;
        dots.advance(places / 2);
        offsets += places;
        values += places;
      }
      i += rows;
    }
    dots.finish();
  } else {
    if (DX) {
      Prefetch none;
      multiply_tile<BC, BR, NV, true>(s, at, tile, dx_sums, none, places);
    }
    Dots<false> dots(dots_buffer);
    dots.begin(dvalues, add);
    prefetch.spread(count);
    for (int32_t i = 0; i < count; ++i) {
      prefetch.step();
      for (int64_t k = 0; k < segments[i].length; ++k) {
        unit_dots<BR, BC, NV>(input_at(tile, *offsets++), x + places.at(segments[i].row), places.step, dots);
      }
    }
    dots.finish();
  }
}

// The kernels of one block shape, as the drivers call them.
struct TileKernels {
  // The view is W; the view is W^T.
  using Multiply = void(const Stream &, int64_t at, const float *tile, float *sums, Prefetch &);
  Multiply *multiply, *multiply_t;
  // The second leaves dx_sums alone.
  using Backward = void(const Stream &, int64_t at, const float *tile, const float *x, float *dx_sums, float *dots_buffer,
                        float *dvalues, bool add, Prefetch &);
  Backward *backward, *backward_values;
  // The same with the rows of x and dx_sums in pieces; null for blocks of several columns.
  using ScatteredBackward = void(const Stream &, int64_t at, const float *tile, const float *x, float *dx_sums,
                                 float *dots_buffer, float *dvalues, bool add, Scattered);
  ScatteredBackward *scattered, *scattered_values;
};

constexpr int kWide = 4;           // vectors in a panel when there are tokens enough to fill it
constexpr int kPanel = kWide * VL;  // its tokens

template <int RB, int CB, bool WT>
void multiply_panel_tile(const Stream &s, int64_t at, const float *tile, float *sums, Prefetch &prefetch) {
  multiply_tile<RB, CB, kWide, WT>(s, at, tile, sums, prefetch, InPanels<RB, kWide>());
}
template <int BR, int BC, bool DX>
void backward_panel_tile(const Stream &s, int64_t at, const float *tile, const float *x, float *dx_sums, float *dots_buffer,
                         float *dvalues, bool add, Prefetch &prefetch) {
  backward_tile<BR, BC, kWide, DX>(s, at, tile, x, dx_sums, dots_buffer, dvalues, add, prefetch, InPanels<BC, kWide>());
}
template <int BR, bool DX>
void backward_scattered_tile(const Stream &s, int64_t at, const float *tile, const float *x, float *dx_sums,
                             float *dots_buffer, float *dvalues, bool add, Scattered places) {
  Prefetch none;
  backward_tile<BR, 1, kWide, DX>(s, at, tile, x, dx_sums, dots_buffer, dvalues, add, none, places);
}

template <int BR, int BC>
constexpr TileKernels kTileKernels = {multiply_panel_tile<BR, BC, false>,
                                      multiply_panel_tile<BC, BR, true>,
                                      backward_panel_tile<BR, BC, true>,
                                      backward_panel_tile<BR, BC, false>,
                                      BC == 1 ? backward_scattered_tile<(BC == 1 ? BR : 1), true> : nullptr,
                                      BC == 1 ? backward_scattered_tile<(BC == 1 ? BR : 1), false> : nullptr};

}  // namespace
}  // namespace rarefy
