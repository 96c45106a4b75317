// Kernels on a Stream: inputs in L1, sums in L2. See stream.h.
#pragma once

#include "dots.h"
#include "pack.h"
#include "stream.h"

namespace rarefy {
namespace {

inline const float *input_at(const float *tile, uint16_t offset) {
  return reinterpret_cast<const float *>(reinterpret_cast<const char *>(tile) + size_t(offset) * kOffsetBytes);
}

// ROWS segments of equal length, stored one after the other: sums[row] += units times inputs.
// WT: a unit's values are [input][output] of this view, that is, the view is W^T.
template <int RB, int CB, int NV, bool WT, int ROWS>
inline void multiply_segments(const Segment *segments, const uint16_t *offsets, const float *values, const float *tile,
                              float *sums) {
  constexpr int P = NV * VL;
  constexpr int RT = min_int(RB, kBudget);
  constexpr int VT = max_int(1, min_int(NV, kBudget / RT));
  const int64_t length = segments[0].length;
  for (int r0 = 0; r0 < RB; r0 += RT) {
    for (int v0 = 0; v0 < NV; v0 += VT) {
      vec sum[ROWS][RT][VT] = {};
      for (int64_t k = 0; k < length; ++k) {
#pragma GCC unroll 4
        for (int s = 0; s < ROWS; ++s) {
          const float *x = input_at(tile, offsets[s * length + k]) + v0 * VL;
          const float *w = values + (s * length + k) * (RB * CB);
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
        float *out = sums + (int64_t(segments[s].row) * RB + r0) * P + v0 * VL;
#pragma GCC unroll 16
        for (int r = 0; r < RT; ++r) {
#pragma GCC unroll 16
          for (int v = 0; v < VT; ++v) store(out + r * P + v * VL, load(out + r * P + v * VL) + sum[s][r][v]);
        }
      }
    }
  }
}

// All segments of one (chunk, tile).
template <int RB, int CB, int NV, bool WT>
void multiply_tile(const Stream &s, int64_t at, const float *tile, float *sums) {
  const Segment *segments = s.segments + at * s.chunk_rows;
  const int32_t count = s.num_segments[at];
  const uint16_t *offsets = s.offsets + s.first_unit[at];
  const float *values = s.values + int64_t(s.first_unit[at]) * (RB * CB);
  constexpr int ROWS = RB * NV * 2 <= kBudget ? 2 : 1;
  for (int32_t i = 0; i < count;) {
    const int64_t length = segments[i].length;
    if (ROWS == 2 && i + 1 < count && segments[i + 1].length == length) {
      multiply_segments<RB, CB, NV, WT, ROWS>(segments + i, offsets, values, tile, sums);
      offsets += 2 * length;
      values += 2 * length * (RB * CB);
      i += 2;
    } else {
      multiply_segments<RB, CB, NV, WT, 1>(segments + i, offsets, values, tile, sums);
      offsets += length;
      values += length * (RB * CB);
      ++i;
    }
  }
}

// The backward pass of unstructured segments: the view is W^T, `tile` holds dy, and for each nonzero one load of dy
// serves both gradients: dx_sums[row] += w dy, and the dot product of dy with x[row].
template <int NV, bool DX, int ROWS>
inline void backward_segments(const Segment *segments, const uint16_t *offsets, const float *values, const float *tile,
                              const float *x, float *dx_sums, Dots &dots) {
  constexpr int P = NV * VL;
  const int64_t length = segments[0].length;
  vec own[ROWS][NV], sum[ROWS][NV] = {};
#pragma GCC unroll 4
  for (int s = 0; s < ROWS; ++s) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) own[s][v] = load(x + int64_t(segments[s].row) * P + v * VL);
  }
  float *out = dots.next();
  for (int64_t k = 0; k < length; ++k) {
#pragma GCC unroll 4
    for (int s = 0; s < ROWS; ++s) {
      const float *dy = input_at(tile, offsets[s * length + k]);
      const vec weight = DX ? broadcast(values[s * length + k]) : vec{};
      vec dot = {};
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        const vec d = load(dy + v * VL);
        if (DX) sum[s][v] += weight * d;
        dot = v == 0 ? own[s][0] * d : dot + own[s][v] * d;
      }
      store(out + (s * length + k) * VL, dot);
    }
  }
  if (DX) {
#pragma GCC unroll 4
    for (int s = 0; s < ROWS; ++s) {
      float *to = dx_sums + int64_t(segments[s].row) * P;
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) store(to + v * VL, load(to + v * VL) + sum[s][v]);
    }
  }
  dots.advance(ROWS * length);
}

// All segments of one (chunk, tile) of the view W^T (units of BC rows, BR inputs).
template <int BR, int BC, int NV, bool DX>
void backward_tile(const Stream &s, int64_t at, const float *tile, const float *x, float *dx_sums, Dots &dots,
                   float *dvalues, bool add) {
  const Segment *segments = s.segments + at * s.chunk_rows;
  const int32_t count = s.num_segments[at];
  const uint16_t *offsets = s.offsets + s.first_unit[at];
  const float *values = s.values + int64_t(s.first_unit[at]) * (BR * BC);
  dots.begin(dvalues + int64_t(s.first_unit[at]) * (BR * BC), add);
  if constexpr (BR == 1 && BC == 1) {
    constexpr int64_t kMost = kDots / 2;  // longer segments go in pieces: the dots wait in a small buffer
    for (int32_t i = 0; i < count;) {
      const int64_t length = segments[i].length;
      if (VL == 16 && i + 1 < count && segments[i + 1].length == length && length <= kMost) {
        backward_segments<NV, DX, (VL == 16 ? 2 : 1)>(segments + i, offsets, values, tile, x, dx_sums, dots);
        offsets += 2 * length;
        values += 2 * length;
        i += 2;
      } else {
        for (int64_t k = 0; k < length; k += kMost) {
          const Segment piece = {segments[i].row, uint16_t(min64(kMost, length - k))};
          backward_segments<NV, DX, 1>(&piece, offsets + k, values + k, tile, x, dx_sums, dots);
        }
        offsets += length;
        values += length;
        ++i;
      }
    }
    dots.finish();
  } else {
    constexpr int P = NV * VL;
    if (DX) multiply_tile<BC, BR, NV, true>(s, at, tile, dx_sums);
    for (int32_t i = 0; i < count; ++i) {
      for (int64_t k = 0; k < segments[i].length; ++k) {
        unit_dots<BR, BC, NV>(input_at(tile, *offsets++), x + int64_t(segments[i].row) * (BC * P), dots);
      }
    }
    dots.finish();
  }
}

}  // namespace
}  // namespace rarefy
