// Kernels on a Stream: inputs in L1, sums in L2. See stream.h.
#pragma once

#include "internal.h"

#include "cells.h"
#include "pack.h"
#include "prefetch.h"
#if defined(RAREFY_DOT_CELLS)
#include "segments_bf16.h"
#else
#include "segments_f32.h"
#endif

namespace rarefy {
namespace {

constexpr bool kPairedBackward = VL == 16;  // two rows of x and of sums take the registers that only AVX-512 has

// Where a row's vectors of cells lie, and the sums of as many tokens: `at(row)` from the beginning of the chunk, `step` from
// one to the next. The inputs of a unit lie `input_step` apart.
template <int RB, int NV>
struct InPanels {
  static constexpr int64_t step = kLanes;
  static constexpr int64_t input_step = NV * VL;
  static constexpr int64_t at(int64_t row) { return row * (RB * NV * VL); }
};

constexpr int kWide = 4;           // vectors in a panel when there are tokens enough to fill it
constexpr int kPanel = kWide * VL;  // its tokens

// Panels over which the dot products of blocks of several columns are taken at once, so that they are added across once for all
// of them: with bfloat16 cells that takes as long as the products of one panel.
constexpr int kTogether = kDotCells ? 4 : 2;

struct Scattered {  // for rows of one output
  const int32_t *places;
  int64_t step;
  static constexpr int64_t input_step = kPanel;
  int64_t at(int64_t row) const { return places[row]; }
};
struct Apart {  // panels, but for the inputs
  int64_t input_step;
  static constexpr int64_t step = kLanes;
  static constexpr int64_t at(int64_t row) { return row * kPanel; }
};

// All segments of one (chunk, tile).
template <int RB, int CB, int NV, bool WT, class Places>
inline void multiply_tile(const Stream &s, int64_t at, const cell *tile, float *sums, Prefetch &prefetch, const Places places) {
  const Segment *segments = s.segments + at * s.chunk_rows;
  const int32_t count = s.num_segments[at];
  const uint16_t *offsets = s.offsets + s.first_unit[at];
  const weight *values = s.values + int64_t(s.first_unit[at]) * (RB * CB);
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

// The dot products of one (chunk, tile) of the view W^T over some panels. dvalues is in the stream's order.
template <int BR, int BC, int NV, int PANELS, class Places>
inline void dots_tile(const Stream &s, int64_t at, const cell *tile, const cell *x, const Panels &panels, float *dots_buffer,
                      float *dvalues, bool add, Prefetch &prefetch, const Places places) {
  const Segment *segments = s.segments + at * s.chunk_rows;
  const int32_t count = s.num_segments[at];
  const uint16_t *offsets = s.offsets + s.first_unit[at];
  Dots<kPairsWait<BR, BC>> dots(dots_buffer);
  dots.begin(dvalues + int64_t(s.first_unit[at]) * (BR * BC), add);
  prefetch.spread(count);
  for (int32_t i = 0; i < count; ++i) {
    prefetch.step();
    const cell *row = x + places.at(segments[i].row);
    for (int64_t k = 0; k < segments[i].length; ++k) {
      unit_dots<BR, BC, NV, PANELS>(input_at(tile, *offsets++), row, panels, places.step, dots);
    }
  }
  dots.finish();
}

// All segments of one (chunk, tile) of the view W^T (units of BC rows, BR inputs). dvalues is in the stream's order.
template <int BR, int BC, int NV, bool DX, class Places>
inline void backward_tile(const Stream &s, int64_t at, const cell *tile, const cell *x, float *dx_sums, float *dots_buffer,
                          float *dvalues, bool add, Prefetch &prefetch, const Places places) {
  const Segment *segments = s.segments + at * s.chunk_rows;
  const int32_t count = s.num_segments[at];
  const uint16_t *offsets = s.offsets + s.first_unit[at];
  const weight *values = s.values + int64_t(s.first_unit[at]) * (BR * BC);
  if constexpr (BC == 1) {
    dvalues += int64_t(s.first_unit[at]) * (BR * BC);
    Dots<true> dots(dots_buffer);
    dots.begin(dvalues, add);
    prefetch.spread(BR == 1 ? count / 2 : count);
    for (int32_t i = 0; i < count;) {
      prefetch.step();
      const int64_t length = segments[i].length;
      const int rows = BR == 1 && kPairedBackward && paired(s, segments, i, count) ? 2 : 1;
      constexpr int64_t kMost = kDots / 2 / BR;  // longer segments go in pieces: the dots wait in a small buffer
      for (int64_t k = 0; k < length; k += kMost) {
        const int64_t piece = min64(kMost, length - k);
        if (rows == 2) {
          backward_segments<BR, NV, DX, (BR == 1 && kPairedBackward ? 2 : 1)>(segments + i, piece, offsets, values, tile, x,
                                                                              dx_sums, dots.next(), places);
        } else {
          backward_segments<BR, NV, DX, 1>(segments + i, piece, offsets, values, tile, x, dx_sums, dots.next(), places);
        }
        const int64_t units = rows == 2 ? 2 * piece : BR == 1 ? (piece + 1) / 2 * 2 : piece;
        dots.advance(units * BR / 2);
        offsets += units;
        values += units * BR;
      }
      i += rows;
    }
    dots.finish();
  } else {
    if (DX) {
      Prefetch none;
      multiply_tile<BC, BR, NV, true>(s, at, tile, dx_sums, none, places);
    }
    dots_tile<BR, BC, NV, 1>(s, at, tile, x, Panels(), dots_buffer, dvalues, add, prefetch, places);
  }
}

// The kernels of one block shape, as the drivers call them.
struct TileKernels {
  // The view is W; the view is W^T.
  using Multiply = void(const Stream &, int64_t at, const cell *tile, float *sums, Prefetch &);
  Multiply *multiply, *multiply_t;
  // The second leaves dx_sums alone.
  using Backward = void(const Stream &, int64_t at, const cell *tile, const cell *x, float *dx_sums, float *dots_buffer,
                        float *dvalues, bool add, Prefetch &);
  Backward *backward, *backward_values;
  // The dot products alone, of kTogether panels; null for units of one column, for which one pass over dy makes both gradients.
  using DotProducts = void(const Stream &, int64_t at, const cell *tile, const cell *x, const Panels &, float *dots_buffer,
                           float *dvalues, bool add);
  DotProducts *dot_products;
  // The same with the rows of x and dx_sums in pieces; null for blocks of several columns.
  using ScatteredBackward = void(const Stream &, int64_t at, const cell *tile, const cell *x, float *dx_sums,
                                 float *dots_buffer, float *dvalues, bool add, Scattered);
  ScatteredBackward *scattered, *scattered_values;
  // The same with the inputs of a unit apart; null where kApart is not.
  using ApartBackward = void(const Stream &, int64_t at, const cell *tile, const cell *x, float *dx_sums, float *dots_buffer,
                             float *dvalues, bool add, Apart);
  ApartBackward *apart, *apart_values;
};

template <int RB, int CB, bool WT>
void multiply_panel_tile(const Stream &s, int64_t at, const cell *tile, float *sums, Prefetch &prefetch) {
  multiply_tile<RB, CB, kWide, WT>(s, at, tile, sums, prefetch, InPanels<RB, kWide>());
}
template <int BR, int BC, bool DX>
void backward_panel_tile(const Stream &s, int64_t at, const cell *tile, const cell *x, float *dx_sums, float *dots_buffer,
                         float *dvalues, bool add, Prefetch &prefetch) {
  backward_tile<BR, BC, kWide, DX>(s, at, tile, x, dx_sums, dots_buffer, dvalues, add, prefetch, InPanels<BC, kWide>());
}
template <int BR, int BC>
void dots_panels_tile(const Stream &s, int64_t at, const cell *tile, const cell *x, const Panels &panels, float *dots_buffer,
                      float *dvalues, bool add) {
  Prefetch none;
  dots_tile<BR, BC, kWide, kTogether>(s, at, tile, x, panels, dots_buffer, dvalues, add, none, InPanels<BC, kWide>());
}
template <int BR, bool DX, class Places>
void backward_placed_tile(const Stream &s, int64_t at, const cell *tile, const cell *x, float *dx_sums, float *dots_buffer,
                          float *dvalues, bool add, Places places) {
  Prefetch none;
  backward_tile<BR, 1, kWide, DX>(s, at, tile, x, dx_sums, dots_buffer, dvalues, add, none, places);
}

// Units whose inputs may lie apart. With float32 cells taller ones lose a few percent by it (drive_conv_turned.h).
template <int BR, int BC>
constexpr bool kApart = BC == 1 && (BR == 1 || kDotCells);

// Block shapes with a kernel. Each costs some seconds of compilation per target, so the list holds what is used.
#define RAREFY_BLOCKS(OF) OF<1, 1>, OF<4, 1>, OF<8, 1>, OF<4, 4>, OF<8, 8>, OF<16, 16>

template <int BR, int BC>
constexpr TileKernels kTileKernels = {multiply_panel_tile<BR, BC, false>,
                                      multiply_panel_tile<BC, BR, true>,
                                      backward_panel_tile<BR, BC, true>,
                                      backward_panel_tile<BR, BC, false>,
                                      BC > 1 ? dots_panels_tile<BR, (BC > 1 ? BC : 4)> : nullptr,
                                      BC == 1 ? backward_placed_tile<(BC == 1 ? BR : 1), true, Scattered> : nullptr,
                                      BC == 1 ? backward_placed_tile<(BC == 1 ? BR : 1), false, Scattered> : nullptr,
                                      kApart<BR, BC> ? backward_placed_tile<(kApart<BR, BC> ? BR : 1), true, Apart> : nullptr,
                                      kApart<BR, BC> ? backward_placed_tile<(kApart<BR, BC> ? BR : 1), false, Apart> : nullptr};

struct TiledBlock {
  int64_t rows, cols;
  TileKernels kernels;
};
template <int BR, int BC>
constexpr TiledBlock kTiledBlock = {BR, BC, kTileKernels<BR, BC>};
constexpr TiledBlock kTiledBlocks[] = {RAREFY_BLOCKS(kTiledBlock)};

// Null for a block shape without kernels.
inline const TileKernels *find_tiled(const rarefy_pattern *p) {
  for (const TiledBlock &block : kTiledBlocks) {
    if (block.rows == p->block_rows && block.cols == p->block_cols) return &block.kernels;
  }
  return nullptr;
}

}  // namespace
}  // namespace rarefy
