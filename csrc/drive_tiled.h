// Whole calls for many tokens: reordering, packing, threads and scratch memory around tiled.h.
#pragma once

#include <omp.h>

#include "internal.h"

#include "tiled.h"

namespace rarefy {
namespace {

constexpr int64_t kTileBytes = int64_t(32) << 10;   // inputs in L1
constexpr int64_t kSumsBytes = int64_t(256) << 10;  // sums in L2
constexpr int64_t kDyBytes = int64_t(8) << 20;      // packed dy that the threads share, in L3

// Columns a tile should have: as many as fit in L1, but more where the segments would be too short to be worth it.
inline int64_t choose_tile(int64_t num_rows, int64_t num_cols, int64_t num_units, int block_inputs, int panel) {
  int64_t inputs = kTileBytes / (panel * int64_t(sizeof(float)));
  const double density = double(num_units) / (double(max64(num_rows, 1)) * double(max64(num_cols, 1)));
  while (inputs * 2 < max_tile_inputs(panel) && inputs * density < 6.0 * block_inputs) inputs *= 2;
  return max64(1, inputs / block_inputs);
}

// y = x times the view's matrix, transposed, + bias. y has RB and x has CB features for each unit row and column.
template <int RB, int CB, int NV, bool WT, class Index>
int multiply_tiled(const View<Index> &view, const float *values, const float *x, const float *bias, float *y,
                   int64_t batch, int threads) {
  constexpr int P = NV * VL, UNIT = RB * CB;
  const int64_t in = view.num_cols * CB, out = view.num_rows * RB, panels = ceil_div(batch, P);
  const int64_t num_units = view.ptr[view.num_rows];
  const int64_t parts_wanted = row_parts(panels, view.num_rows, threads);
  const int64_t chunk_rows = min64(kSumsBytes / (RB * P * int64_t(sizeof(float))), ceil_div(view.num_rows, parts_wanted));
  Stream s = plan_stream(view.num_rows, view.num_cols, num_units, chunk_rows,
                         choose_tile(view.num_rows, view.num_cols, num_units, CB, P), UNIT == 1, false, false);
  const int64_t parts = min64(parts_wanted, max64(s.num_chunks, 1));
  const int64_t own = in * P + s.chunk_rows * RB * P;
  float *buffers = nullptr;
  int32_t *scratch = nullptr;
  Carver carver = {nullptr, 0};
  Lease lease = {nullptr, 0};
  for (int pass = 0; pass < 2; ++pass) {
    carve_stream(s, carver, UNIT);
    buffers = carver.take<float>(threads * own);
    scratch = carver.take<int32_t>(threads * build_scratch(s));
    if (pass == 0) {
      lease = lease_acquire(carver.used);
      if (lease.data == nullptr) return RAREFY_NO_MEMORY;
      carver = {lease.data, 0};
    }
  }
#pragma omp parallel num_threads(threads)
  {
    const FlushDenormals flush;
    const int thread = omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
    for (int64_t chunk = 0; chunk < s.num_chunks; ++chunk) {
      build_chunk<UNIT>(s, view, values, chunk, CB * P * int(sizeof(float)) / kOffsetBytes,
                        scratch + thread * build_scratch(s));
    }
    float *panel = buffers + thread * own, *sums = panel + in * P;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < panels * parts; ++task) {
      const int64_t at = task / parts, part = task % parts;
      const int64_t token = at * P, tokens = min64(P, batch - token);
      const int64_t begin = s.num_chunks * part / parts, end = s.num_chunks * (part + 1) / parts;
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t first = chunk * s.chunk_rows * RB, count = min64(s.chunk_rows * RB, out - first);
        for (int64_t r = 0; r < count; ++r) {
          const vec start = bias != nullptr ? broadcast(bias[first + r]) : vec{};
#pragma GCC unroll 8
          for (int v = 0; v < NV; ++v) store(sums + r * P + v * VL, start);
        }
        for (int64_t t = 0; t < s.num_tiles; ++t) {
          const int64_t f0 = t * s.tile_cols * CB, f1 = min64(f0 + s.tile_cols * CB, in);
          if (chunk == begin) pack<NV>(x + token * in, in, tokens, f0, f1, panel + f0 * P);  // just before its use
          multiply_tile<RB, CB, NV, WT>(s, chunk * s.num_tiles + t, panel + f0 * P, sums);
        }
        unpack<NV>(sums, out, tokens, first, first + count, y + token * out);
      }
    }
  }
  lease_release(lease);
  return RAREFY_OK;
}

// dvalues, and dx and dbias unless null, in one pass over dy. The view is W^T: a thread owns chunks of columns of W with
// all tokens, so every sum has one owner and one order; the packed dy is shared, a few panels at a time.
template <int BR, int BC, int NV, class Index>
int backward_tiled(const View<Index> &view, const float *values, const float *dy, const float *x, float *dx,
                   float *dvalues, float *dbias, int64_t batch, int threads) {
  constexpr int P = NV * VL, UNIT = BR * BC;
  const int64_t in = view.num_rows * BC, out = view.num_cols * BR, panels = ceil_div(batch, P);
  const int64_t num_units = view.ptr[view.num_rows];
  const int64_t chunk_rows = max64(1, min64(kSumsBytes / 2 / (BC * P * int64_t(sizeof(float))), ceil_div(view.num_rows, 2 * threads)));
  Stream s = plan_stream(view.num_rows, view.num_cols, num_units, chunk_rows,
                         choose_tile(view.num_rows, view.num_cols, num_units, BR, P), UNIT == 1 && kPairedBackward, UNIT == 1, true);
  const int64_t group = max64(2, min64(panels, kDyBytes / max64(1, out * P * int64_t(sizeof(float)))));
  const int64_t own = 2 * s.chunk_rows * BC * P + Dots<false>::BUFFER;
  float *dy_panels = nullptr, *bias_parts = nullptr, *gradient = nullptr, *buffers = nullptr;
  int32_t *scratch = nullptr;
  Carver carver = {nullptr, 0};
  Lease lease = {nullptr, 0};
  for (int pass = 0; pass < 2; ++pass) {
    carve_stream(s, carver, UNIT);
    dy_panels = carver.take<float>(group * out * P);
    bias_parts = carver.take<float>(dbias != nullptr ? panels * out : 0);
    gradient = carver.take<float>(s.num_places * UNIT);  // dvalues in the order of the stream
    buffers = carver.take<float>(threads * own);
    scratch = carver.take<int32_t>(threads * build_scratch(s));
    if (pass == 0) {
      lease = lease_acquire(carver.used);
      if (lease.data == nullptr) return RAREFY_NO_MEMORY;
      carver = {lease.data, 0};
    }
  }
#pragma omp parallel num_threads(threads)
  {
    const FlushDenormals flush;
    const int thread = omp_get_thread_num();
    float *x_chunk = buffers + thread * own, *sums = x_chunk + s.chunk_rows * BC * P, *dots_buffer = sums + s.chunk_rows * BC * P;
    for (int64_t d = 0; d < Dots<false>::BUFFER; ++d) dots_buffer[d] = 0.0f;
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t chunk = 0; chunk < s.num_chunks; ++chunk) {
      build_chunk<UNIT>(s, view, dx != nullptr ? values : nullptr, chunk, BR * P * int(sizeof(float)) / kOffsetBytes,
                        scratch + thread * build_scratch(s));
    }
    for (int64_t first = 0; first < panels; first += group) {
      const int64_t count = min64(group, panels - first), pieces = ceil_div(out, 256);
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < count * pieces; ++task) {
        const int64_t at = task / pieces, token = (first + at) * P, tokens = min64(P, batch - token);
        const int64_t f0 = task % pieces * 256, f1 = min64(f0 + 256, out);
        pack<NV>(dy + token * out, out, tokens, f0, f1, dy_panels + (at * out + f0) * P);
        if (dbias != nullptr) column_sums(dy + token * out, out, tokens, f0, f1, bias_parts + (first + at) * out + f0);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t chunk = 0; chunk < s.num_chunks; ++chunk) {
        const int64_t c0 = chunk * s.chunk_rows * BC, c1 = min64(c0 + s.chunk_rows * BC, in);
        for (int64_t at = 0; at < count; ++at) {
          const int64_t token = (first + at) * P, tokens = min64(P, batch - token);
          pack<NV>(x + token * in, in, tokens, c0, c1, x_chunk);
          if (dx != nullptr) {
            for (int64_t i = 0; i < (c1 - c0) * P; i += VL) store(sums + i, vec{});
          }
          for (int64_t t = 0; t < s.num_tiles; ++t) {
            const float *tile = dy_panels + (at * out + t * s.tile_cols * BR) * P;
            const int64_t place = chunk * s.num_tiles + t;
            const int64_t tile_floats = s.tile_cols * BR * P;  // the next tile, of the next panel after the last
            const int64_t left = (count - at) * out * P - (t + 1) * tile_floats;
            const int64_t next = max64(0, min64(tile_floats, left));
            if (dx != nullptr) {
              backward_tile<BR, BC, NV, true>(s, place, tile, x_chunk, sums, dots_buffer, gradient, first + at > 0,
                                              tile + tile_floats, next);
            } else {
              backward_tile<BR, BC, NV, false>(s, place, tile, x_chunk, sums, dots_buffer, gradient, first + at > 0,
                                              tile + tile_floats, next);
            }
          }
          if (dx != nullptr) unpack<NV>(sums, in, tokens, c0, c1, dx + token * in);
        }
      }
    }
#pragma omp for schedule(static) nowait
    for (int64_t k = 0; k < s.num_places; ++k) {
      if (s.order[k] < 0) continue;
      for (int e = 0; e < UNIT; ++e) dvalues[int64_t(s.order[k]) * UNIT + e] = gradient[k * UNIT + e];
    }
    if (dbias != nullptr) {
#pragma omp for schedule(static)
      for (int64_t f = 0; f < out; ++f) {
        float sum = 0.0f;
        for (int64_t at = 0; at < panels; ++at) sum += bias_parts[at * out + f];
        dbias[f] = sum;
      }
    }
  }
  lease_release(lease);
  return RAREFY_OK;
}

}  // namespace
}  // namespace rarefy
