// Both gradients of a convolution with a stride of 1 and units of one column, as a convolution of dy: the taps turned round,
// x's channels for outputs. A channel's x and dx are touched once for all its taps, where the way of drive_conv.h touches them
// once for each: much, where few of a tap's values are there to share it.
#pragma once

#include "drive_conv.h"

namespace rarefy {
namespace {

inline bool turns(const TileKernels *kernels, const Conv &c) {
  const auto fits = [](const Axis &a) { return a.stride == 1 && a.padding <= a.dilation * (a.kernel - 1) && a.in > 0; };
  return kernels->apart != nullptr && fits(c.y) && fits(c.x) && c.taps() > 1;
}

// The convolution of dy that has dx for outputs.
inline Conv turned(const Conv &c) {
  const auto axis = [](const Axis &a) -> Axis {
    return {a.kernel, 1, a.dilation * (a.kernel - 1) - a.padding, a.dilation, a.out, a.in};
  };
  return {axis(c.y), axis(c.x), c.images, c.out_channels, c.channels};
}

// The pattern as rows of channels, and columns of (outputs of a unit, tap), taps as the convolution has them.
struct TurnedIndex {
  int32_t *ptr, *cols, *perm;
};

template <class Index>
void turn_index(const rarefy_pattern *p, const Conv &c, const TurnedIndex &to) {
  const int64_t taps = c.taps();
  const Index *cols = static_cast<const Index *>(p->cols);
  for (int64_t channel = 0; channel < c.channels; ++channel) to.ptr[channel + 1] = p->t_crow[channel * taps];
  to.ptr[0] = 0;
  for (int64_t o = 0; o < p->out_features / p->block_rows; ++o) {
    for (int32_t k = p->crow[o]; k < p->crow[o + 1]; ++k) {
      const int64_t channel = int64_t(cols[k]) / taps, tap = int64_t(cols[k]) % taps;
      const int32_t at = to.ptr[channel + 1]++;  // which ends where the next begins
      to.cols[at] = int32_t(o * taps + tap);
      to.perm[at] = k;
    }
  }
}

// The sums of each channel in `count` rows of a band, added to VL lanes of `totals`.
inline void add_rows(const Band<cell> &band, int64_t first, int64_t count, float *totals) {
  for (int64_t o = 0; o < band.channels; ++o) {
    vec sum = load(totals + o * VL);
    const cell *row = band.at(o, first, 0);
    for (int64_t i = 0; i < count * band.width * kLanes; i += kLanes) {
      vec values[kCellVectors];
      load_cells<kCellVectors>(row + i, values);
      for (int v = 0; v < kCellVectors; ++v) sum += values[v];
    }
    store(totals + o * VL, sum);
  }
}

// As convolve_backward.
inline int convolve_backward_turned(const rarefy_pattern *p, const TileKernels *kernels, const Conv &original,
                                    const float *values, const Images &dy, const Images &x, const Images &dx, float *dvalues,
                                    float *dbias, int threads) {
  const Conv c = turned(original);
  const bool has_dx = dx.data != nullptr;
  const int64_t rows_at_once = min64(kConvRows, c.y.out), out = c.out_channels, inputs = p->block_rows;
  const int64_t columns = c.features() / inputs, groups = c.groups(), parts = max64(1, min64(groups, kMostParts));
  TurnedIndex index = {};
  const Scratch index_memory([&](Carver &carver) {
    index = {carver.take<int32_t>(out + 1), carver.take<int32_t>(p->num_units), carver.take<int32_t>(p->num_units)};
  });
  if (index_memory.failed()) return RAREFY_NO_MEMORY;
  if (p->index_bytes == 2) {
    turn_index<uint16_t>(p, original, index);
  } else {
    turn_index<int32_t>(p, original, index);
  }
  Region region = plan_region(c, true, rows_at_once);
  const int64_t rows = band_rows(c, input_band<cell>(c, 1).width, 2 * int64_t(sizeof(cell)));
  Band<cell> in = input_band<cell>(c, rows);
  Stream s = plan_stream(index.ptr, out, columns, 65535, kConvChunks, conv_tile(c, region, inputs),
                         inputs == 1 && kPairedBackward, inputs == 1, true);
  if (!region_fits(region, c, s, inputs)) {
    return convolve_backward(p, kernels, original, values, dy, x, dx, dvalues, dbias, threads);
  }
  const int64_t tile_cells = whole_lines<cell>(most_channels(c, s, inputs) * region.channel_cells());
  const int64_t panels = rows_at_once * out * kPanel, own_cells = tile_cells + panels;
  const int64_t own_floats = panels + Dots<false>::BUFFER;
  uint16_t *offsets = nullptr;
  cell *all_cells = nullptr;
  float *all_floats = nullptr, *in_order = nullptr, *bias_parts = nullptr;
  int32_t *scratch = nullptr;
  const Scratch memory([&](Carver &carver) {
    carve_stream(s, carver, inputs);
    carve_band(in, carver, threads);
    carve_region(c, region, carver);
    offsets = carver.take<uint16_t>(columns);
    all_cells = carver.take<cell>(threads * own_cells);
    all_floats = carver.take<float>(threads * own_floats);
    in_order = carver.take<float>(parts * s.num_places * inputs);
    bias_parts = carver.take<float>(parts * c.channels * VL);
    scratch = carver.take<int32_t>(threads * build_scratch(s));
  });
  if (memory.failed()) return RAREFY_NO_MEMORY;
  cut_chunks(index.ptr, s.num_rows, s.chunk_rows, s.parts, s.first_row);
  for (int64_t f = 0; f < columns; ++f) {
    const int64_t channel = f / c.taps() * inputs - first_channel(c, s, inputs, f >> s.tile_shift);
    const int64_t at = channel * region.channel_cells() + tap_at(c, region, c.taps() - 1 - f % c.taps());
    offsets[f] = uint16_t(at * int64_t(sizeof(cell)) / kOffsetBytes);
  }
#pragma omp parallel num_threads(threads)
  {
    const FlushDenormals flush;
    const int thread = omp_get_thread_num();
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t chunk = 0; chunk < s.num_chunks; ++chunk) {
      build_chunk(s, View<int32_t>{out, columns, index.ptr, index.cols, index.perm}, has_dx ? values : nullptr,
                  Unit{1, inputs, true}, chunk, [&](int64_t col) { return offsets[col]; },
                  scratch + thread * build_scratch(s));
    }
    const Band<cell> input = own_band(in, thread);
    cell *tile = all_cells + thread * own_cells, *x_panels = tile + tile_cells;
    float *sums = all_floats + thread * own_floats, *dots = sums + panels;
    input.clear();
    memset(dots, 0, size_t(Dots<false>::BUFFER) * sizeof(float));
    const auto backward = has_dx ? kernels->apart : kernels->apart_values;
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
    for (int64_t part = 0; part < parts; ++part) {
      float *part_values = in_order + part * s.num_places * inputs, *part_bias = bias_parts + part * c.channels * VL;
      memset(part_bias, 0, size_t(c.channels * VL) * sizeof(float));
      bool add = false;
      if (groups == 0) memset(part_values, 0, size_t(s.num_places * inputs) * sizeof(float));
      for (int64_t group = groups * part / parts; group < groups * (part + 1) / parts; ++group) {
        int64_t kept = 0;
        for (int64_t row = 0; row < c.y.out; row += rows) {
          const int64_t live_rows = min64(rows, c.y.out - row);
          pack_band(dy, group * kLanes, row - c.y.padding + kept, input.rows - kept, input, kept);
          if (dbias != nullptr) add_rows(input, kept, input.rows - kept, part_bias);
          for (int64_t r0 = 0; r0 < live_rows; r0 += rows_at_once) {
            const int64_t some = min64(rows_at_once, live_rows - r0);
            for (int64_t pixel = 0; pixel < c.x.out; pixel += kPixels) {
              for (int64_t r = 0; r < some; ++r) {
                pack_tile(x, group * kLanes, row + r0 + r, pixel, x_panels + r * out * kPanel);
              }
              if (has_dx) memset(sums, 0, size_t(some * out * kPanel) * sizeof(float));
              for (int64_t t = 0; t < s.num_tiles; ++t) {
                gather_channels(c, region, input, r0, some - 1 + c.y.reach(), pixel, first_channel(c, s, inputs, t),
                                end_channel(c, s, inputs, t), tile);
                for (int64_t r = 0; r < some; ++r) {
                  for (int64_t chunk = 0; chunk < s.num_chunks; ++chunk) {
                    const int64_t at = (r * out + s.first_row[chunk]) * kPanel;
                    backward(s, chunk * s.num_tiles + t, tile + r * region.step(c), x_panels + at, sums + at, dots, part_values,
                             add || r > 0, {region.channel_cells()});
                  }
                }
              }
              add = true;
              for (int64_t r = 0; has_dx && r < some; ++r) {
                unpack_tile(sums + r * out * kPanel, dx, group * kLanes, row + r0 + r, pixel);
              }
            }
          }
          slide(input, rows, false);
          kept = max64(0, input.rows - rows);
        }
      }
    }
    put_in_order(s, inputs, parts, in_order, dvalues);
    if (dbias != nullptr) add_bias_parts(bias_parts, parts, c.channels, dbias);
  }
  return RAREFY_OK;
}

// Both for a caller's images.
inline int convolve(const rarefy_conv &conv, const rarefy_pattern *p, const float *values, const void *x, const float *bias,
                    void *y, bool half, int threads) {
  const TileKernels *kernels = find_tiled(p);
  if (kernels == nullptr) return RAREFY_UNSUPPORTED_BLOCK;
  const Conv c = conv_of(conv);
  return convolve(p, kernels, c, values, inputs_of(c, x, half, conv.scale, conv.shift), bias, outputs_of(c, y, half), threads);
}
inline int convolve_backward(const rarefy_conv &conv, const rarefy_pattern *p, const float *values, const void *dy,
                             const void *x, void *dx, float *dvalues, float *dbias, bool half, int threads) {
  const TileKernels *kernels = find_tiled(p);
  if (kernels == nullptr) return RAREFY_UNSUPPORTED_BLOCK;
  const Conv c = conv_of(conv);
  const Images dy_images = outputs_of(c, dy, half), x_images = inputs_of(c, x, half, conv.scale, conv.shift);
  const Images dx_images = inputs_of(c, dx, half);
  if (turns(kernels, c)) {
    return convolve_backward_turned(p, kernels, c, values, dy_images, x_images, dx_images, dvalues, dbias, threads);
  }
  return convolve_backward(p, kernels, c, values, dy_images, x_images, dx_images, dvalues, dbias, threads);
}

}  // namespace
}  // namespace rarefy
