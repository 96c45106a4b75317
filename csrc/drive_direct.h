// Whole calls for few tokens: packing, threads and scratch memory around direct.h.
#pragma once

#include <omp.h>

#include "internal.h"

#include "direct.h"
#include "scratch.h"

namespace rarefy {
namespace {

constexpr int64_t kSharedBytes = int64_t(16) << 20;  // packed activations kept at once in backward: they stay in cache

template <int BR, int BC, int NV, class Index>
int spmm_direct(const rarefy_pattern *p, const float *values, const float *x, const float *bias, float *y,
                int64_t batch, int threads) {
  constexpr int P = NV * VL;
  const View<Index> view = by_rows<Index>(p);
  const int64_t in = p->in_features, out = p->out_features, panels = ceil_div(batch, P);
  const int64_t parts = row_parts(panels, view.num_rows, threads);
  const int64_t panel_floats = in * P, tile_floats = kRowGroup * BR * P;
  float *buffers = nullptr;
  const Scratch memory([&](Carver &carver) { buffers = carver.take<float>(threads * (panel_floats + tile_floats)); });
  if (memory.failed()) return RAREFY_NO_MEMORY;
#pragma omp parallel num_threads(threads)
  {
    const FlushDenormals flush;
    float *panel = buffers + omp_get_thread_num() * (panel_floats + tile_floats);
    float *tile = panel + panel_floats;
    int64_t packed = -1;  // the panel that this thread's buffer holds
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < panels * parts; ++task) {
      const int64_t at = task / parts, part = task % parts;
      const int64_t tokens = min64(P, batch - at * P);
      if (packed != at) pack<NV>(x + at * P * in, in, tokens, 0, in, panel);
      packed = at;
      direct_rows<BR, BC, NV, false>(view, values, panel, bias, part_begin(view.ptr, view.num_rows, part, parts),
                                     part_begin(view.ptr, view.num_rows, part + 1, parts), tokens, out, y + at * P * out,
                                     tile);
    }
  }
  return RAREFY_OK;
}

template <int BR, int BC, int NV, class Index>
int backward_direct(const rarefy_pattern *p, const float *values, const float *dy, const float *x, float *dx,
                    float *dvalues, float *dbias, int64_t batch, int threads) {
  constexpr int P = NV * VL;
  const View<Index> rows = by_rows<Index>(p);
  const int64_t in = p->in_features, out = p->out_features, panels = ceil_div(batch, P);
  const int64_t group =  // panels in flight at once
      max64(1, min64(max64(panels, 1), max64(kSharedBytes / max64(1, (in + out) * P * int64_t(sizeof(float))), 2 * threads)));
  const int64_t parts = row_parts(group, in / BC, threads), row_chunks = threads > 1 ? 4 * threads : 1;
  float *dy_panels, *x_panels, *bias_parts, *tiles, *dots;
  const int64_t tile_floats = kRowGroup * BC * P, dots_floats = Dots<false>::BUFFER;
  const Scratch memory([&](Carver &carver) {
    dy_panels = carver.take<float>(group * out * P);
    x_panels = carver.take<float>(dvalues != nullptr ? group * in * P : 0);
    bias_parts = carver.take<float>(dbias != nullptr ? panels * out : 0);
    tiles = carver.take<float>(threads * tile_floats);
    dots = carver.take<float>(threads * dots_floats);
  });
  if (memory.failed()) return RAREFY_NO_MEMORY;
#pragma omp parallel num_threads(threads)
  {
    const FlushDenormals flush;
    float *tile = tiles + omp_get_thread_num() * tile_floats;
    float *own_dots = dots + omp_get_thread_num() * dots_floats;
    for (int64_t d = 0; d < dots_floats; ++d) own_dots[d] = 0.0f;
    for (int64_t first = 0; first < max64(panels, 1); first += group) {
      const int64_t count = min64(group, panels - first);
      // Pack in pieces, so that a single panel still occupies all threads.
      const int64_t dy_pieces = ceil_div(out, kPieceFeatures);
      const int64_t x_pieces = dvalues != nullptr ? ceil_div(in, kPieceFeatures) : 0;
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < count * (dy_pieces + x_pieces); ++task) {
        const int64_t at = task / (dy_pieces + x_pieces), piece = task % (dy_pieces + x_pieces);
        const int64_t token = (first + at) * P, tokens = min64(P, batch - token);
        if (piece < dy_pieces) {
          const int64_t f0 = piece * kPieceFeatures, f1 = min64(f0 + kPieceFeatures, out);
          pack<NV>(dy + token * out, out, tokens, f0, f1, dy_panels + (at * out + f0) * P);
          if (dbias != nullptr) column_sums(dy + token * out, out, tokens, f0, f1, bias_parts + (first + at) * out + f0);
        } else {
          const int64_t f0 = (piece - dy_pieces) * kPieceFeatures, f1 = min64(f0 + kPieceFeatures, in);
          pack<NV>(x + token * in, in, tokens, f0, f1, x_panels + (at * in + f0) * P);
        }
      }
      if (dx != nullptr) {
        const View<Index> cols = by_cols<Index>(p);
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t task = 0; task < count * parts; ++task) {
          const int64_t at = task / parts, part = task % parts;
          const int64_t token = (first + at) * P, tokens = min64(P, batch - token);
          direct_rows<BC, BR, NV, true>(cols, values, dy_panels + at * out * P, nullptr,
                                        part_begin(cols.ptr, cols.num_rows, part, parts),
                                        part_begin(cols.ptr, cols.num_rows, part + 1, parts), tokens, in,
                                        dx + token * in, tile);
        }
      }
      if (dvalues != nullptr) {
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t chunk = 0; chunk < row_chunks; ++chunk) {
          const int64_t r0 = part_begin(rows.ptr, rows.num_rows, chunk, row_chunks);
          const int64_t r1 = part_begin(rows.ptr, rows.num_rows, chunk + 1, row_chunks);
          if (count <= 0) {  // no tokens: the gradient is zero
            for (int64_t k = int64_t(rows.ptr[r0]) * (BR * BC); k < int64_t(rows.ptr[r1]) * (BR * BC); ++k) dvalues[k] = 0.0f;
          }
          direct_dvalues<BR, BC, NV>(rows, dy_panels, x_panels, count, r0, r1, first > 0, dvalues, own_dots);
        }
      }
#pragma omp barrier
    }
    if (dbias != nullptr) add_sums(bias_parts, panels, out, dbias);
  }
  return RAREFY_OK;
}

}  // namespace
}  // namespace rarefy
