// Convolutions: the kernels of tiled.h on panels that are cut out of images on the way. A panel is kPixels pixels of a row of
// the output, of kLanes images; its inputs at a tap are kPixels pixels of a row of the input. See images.h for how images lie
// in memory.
//
// A weight's matrix is (out_channels, channels * taps). Where a unit spans several of its columns, the panel holds one
// input for each column, as if the layer were linear. Else the taps of a channel share what they read: 18 pixels of a channel
// for 3x3 taps rather than 36.
#pragma once

#include "drive_tiled.h"
#include "images.h"

namespace rarefy {
namespace {

constexpr int kPixels = kPanel / kLanes;            // in a panel
constexpr int64_t kBandBytes = int64_t(768) << 10;  // of the bands of a thread, in L2
constexpr int64_t kConvRows = 2;                    // rows of the output that share what a region reads
// Chunks of rows that threads share out while they build a stream. Their number decides in which order taps add to a pixel,
// so it does not follow the number of threads.
constexpr int64_t kConvChunks = 8;
constexpr int64_t kChunkBytes = int64_t(24) << 10;     // x and dx of a chunk at a tile, in L1
constexpr int64_t kDyStripBytes = int64_t(256) << 10;  // tiles of dy that all chunks go through in turn, in L2
constexpr int64_t kMostParts = 16;                  // sums of the values' gradient that exist side by side, at most

// `count` elements, and what fills the last line of the cache: threads share none.
template <class T>
constexpr int64_t whole_lines(int64_t count) {
  constexpr int64_t each = 64 / int64_t(sizeof(T));
  return ceil_div(count, each) * each;
}

struct Axis {
  int64_t kernel, stride, padding, dilation, in, out;
  int64_t reach() const { return (kernel - 1) * dilation + 1; }
};

struct Conv {
  Axis y, x;
  int64_t images, channels, out_channels;
  int64_t taps() const { return y.kernel * x.kernel; }
  int64_t features() const { return channels * taps(); }
  int64_t groups() const { return ceil_div(images, kLanes); }
  int64_t row_tiles() const { return ceil_div(x.out, kPixels); }
};

inline Conv conv_of(const rarefy_conv &c) {
  const auto axis = [&](int i) -> Axis {
    return {c.kernel[i], c.stride[i], c.padding[i], c.dilation[i], c.in_size[i], c.out_size[i]};
  };
  return {axis(0), axis(1), c.images, c.channels, c.out_channels};
}

inline Images inputs_of(const Conv &c, const void *x, bool half, const float *scale = nullptr, const float *shift = nullptr) {
  return {const_cast<void *>(x), c.images, c.channels, c.y.in, c.x.in, half, scale, shift};
}
inline Images outputs_of(const Conv &c, const void *y, bool half) {
  return {const_cast<void *>(y), c.images, c.out_channels, c.y.out, c.x.out, half, nullptr, nullptr};
}

// How many rows of the output are computed while bands with `held` bytes for each place stay where they are.
inline int64_t band_rows(const Conv &c, int64_t width, int64_t held) {
  const int64_t row_bytes = c.channels * width * kLanes * held;
  const int64_t fit = (kBandBytes / max64(row_bytes, 1) - c.y.reach()) / c.y.stride + 1;
  const int64_t bands = ceil_div(c.y.out, max64(2, min64(fit, c.y.out)));
  return ceil_div(c.y.out, max64(bands, 1));
}

// Bands of the inputs, and of their gradients, hold the padding, what the last tile of a row reads beyond it, and rows that
// strides leave out.
template <class T>
Band<T> input_band(const Conv &c, int64_t out_rows) {
  const int64_t width = max64(c.x.padding + c.x.in, (c.row_tiles() * kPixels - 1) * c.x.stride + c.x.reach());
  const int64_t rows = (out_rows - 1) * c.y.stride + max64(c.y.reach(), c.y.stride) + c.y.stride - 1;
  return {nullptr, c.channels, rows, width, c.x.padding};
}

template <class T>
void carve_band(Band<T> &band, Carver &carver, int threads) {
  band.data = carver.take<T>(threads * whole_lines<T>(band.size()));
}
template <class T>
Band<T> own_band(Band<T> band, int thread) {
  band.data += thread * whole_lines<T>(band.size());
  return band;
}

// The part of a band that the tiles of `rows` output rows read, in L1.
struct Region {
  bool shared;         // by the taps of a channel; else one input for each column of the matrix
  int64_t rows, cols;  // of a channel, if shared; cols in pixels
  int32_t *columns;    // where they lie in a row of the band, in pixels from the tile's first
  int32_t *starts;     // of each kx, which of them are read: kPixels from here on
  int64_t step(const Conv &c) const { return shared ? c.y.stride * cols * kLanes : 0; }  // from one output row to the next
  int64_t channel_cells() const { return rows * cols * kLanes; }
  int64_t channel_bytes() const { return channel_cells() * int64_t(sizeof(cell)); }
};

// Columns of the input that a tile reads, by their remainder: those of a tap lie side by side. Both may be null; the count.
inline int64_t lay_columns(const Conv &c, int32_t *columns, int32_t *starts) {
  int64_t count = 0;
  for (int64_t remainder = 0; remainder < c.x.stride; ++remainder) {
    int64_t low = -1, high = -1;
    for (int64_t k = 0; k < c.x.kernel; ++k) {
      if (k * c.x.dilation % c.x.stride != remainder) continue;
      const int64_t step = k * c.x.dilation / c.x.stride;
      low = low < 0 ? step : low;
      high = step;
      if (starts != nullptr) starts[k] = int32_t(count + step - low);
    }
    for (int64_t step = low; low >= 0 && step < high + kPixels; ++step, ++count) {
      if (columns != nullptr) columns[count] = int32_t(step * c.x.stride + remainder);
    }
  }
  return count;
}

inline Region plan_region(const Conv &c, bool shared, int64_t out_rows) {
  return {shared, (out_rows - 1) * c.y.stride + c.y.reach(), lay_columns(c, nullptr, nullptr), nullptr, nullptr};
}

inline void carve_region(const Conv &c, Region &region, Carver &carver) {
  region.columns = carver.take<int32_t>(region.cols);
  region.starts = carver.take<int32_t>(c.x.kernel);
  if (carver.data != nullptr) lay_columns(c, region.columns, region.starts);
}

// Tap `tap` of a channel's inputs: cells from the first.
inline int64_t tap_at(const Conv &c, const Region &region, int64_t tap) {
  return (tap / c.x.kernel * c.y.dilation * region.cols + region.starts[tap % c.x.kernel]) * kLanes;
}

// Where each column of the matrix lies in a band, from the place of an output pixel's first input on.
template <class T>
void lay_places(const Conv &c, const Band<T> &band, int32_t *places) {
  for (int64_t f = 0; f < c.features(); ++f) {
    const int64_t tap = f % c.taps(), ky = tap / c.x.kernel, kx = tap % c.x.kernel;
    places[f] = int32_t(band.at(f / c.taps(), ky * c.y.dilation, kx * c.x.dilation) - band.data);
  }
}
template <class T>
T *first_input(const Conv &c, const Band<T> &band, int64_t row, int64_t pixel) {
  return band.at(0, row * c.y.stride, pixel * c.x.stride);
}

// The inputs of a tile of output pixels at columns whose places are given: a panel for each. `from` is the first input.
inline void gather_columns(const Conv &c, const cell *from, const int32_t *places, int64_t count, cell *target) {
  const int64_t step = c.x.stride * kLanes;
  for (int64_t f = 0; f < count; ++f, target += kPanel) {
    const cell *inputs = from + places[f];
#pragma GCC unroll 4
    for (int p = 0; p < kPixels; ++p) copy_cells(target + p * kLanes, inputs + p * step);
  }
}

// The same for channels [begin, end), of which the taps share the inputs, from (row, pixel) on; `rows` of the band.
inline void gather_channels(const Conv &c, const Region &region, const Band<cell> &band, int64_t row, int64_t rows,
                            int64_t pixel, int64_t begin, int64_t end, cell *target) {
  for (int64_t channel = begin; channel < end; ++channel) {
    cell *to = target + (channel - begin) * region.channel_cells();
    for (int64_t r = 0; r < rows; ++r, to += region.cols * kLanes) {
      const cell *from = band.at(channel, row * c.y.stride + r, pixel * c.x.stride);
      if (c.x.stride == 1) {
        for (int64_t i = 0; i < region.cols; ++i) copy_cells(to + i * kLanes, from + i * kLanes);
      } else {
        for (int64_t i = 0; i < region.cols; ++i) copy_cells(to + i * kLanes, from + region.columns[i] * kLanes);
      }
    }
  }
}

// Columns of units in a tile of the stream: about as many as fit in L1 together with what they share.
inline int64_t conv_tile(const Conv &c, const Region &region, int64_t inputs) {
  if (!region.shared) return choose_tile(1, 1, 1, inputs);
  const int64_t wanted = max64(c.taps(), kTileBytes * 5 / 4 * c.taps() / (region.channel_bytes() * inputs));
  int64_t columns = 1;
  while (columns * 2 <= wanted) columns *= 2;
  return columns;
}

// Where taps share what they read, a tile has channels [first_channel(t), end_channel(t)) for units of `inputs` channels.
inline int64_t first_channel(const Conv &c, const Stream &s, int64_t inputs, int64_t t) {
  return min64(t * s.tile_cols / c.taps() * inputs, c.channels);
}
inline int64_t end_channel(const Conv &c, const Stream &s, int64_t inputs, int64_t t) {
  return min64(ceil_div((t + 1) * s.tile_cols, c.taps()) * inputs, c.channels);
}
inline int64_t most_channels(const Conv &c, const Stream &s, int64_t inputs) {
  return (ceil_div(s.tile_cols, c.taps()) + 1) * inputs;
}
inline bool region_fits(const Region &region, const Conv &c, const Stream &s, int64_t inputs) {
  return !region.shared || most_channels(c, s, inputs) * region.channel_bytes() <= 65535 * kOffsetBytes;
}

// Images at the tile of pixels from (row, pixel) on, a panel for each channel. Pixels past the row are zero.
inline void pack_tile(const Images &images, int64_t first_image, int64_t row, int64_t pixel, cell *target) {
  for (int64_t p = 0; p < kPixels; ++p) {
    if (pixel + p < images.width) {
      pack_pixel_of(images, first_image, row, pixel + p, target + p * kLanes, kPanel);
    } else {
      for (int64_t o = 0; o < images.channels; ++o) clear_cells(target + o * kPanel + p * kLanes);
    }
  }
}

// The reverse, from sums.
inline void unpack_tile(const float *sums, const Images &images, int64_t first_image, int64_t row, int64_t pixel) {
  for (int64_t p = 0; p < min64(kPixels, images.width - pixel); ++p) {
    unpack_pixel_of(sums + p * kLanes, kPanel, images, first_image, row, pixel + p);
  }
}

// The sums of each channel's panel, added to VL lanes of `totals`.
inline void add_panels(const cell *panels, int64_t channels, float *totals) {
  for (int64_t o = 0; o < channels; ++o) {
    vec sum = load(totals + o * VL), values[kWide];
    load_cells<kWide>(panels + o * kPanel, values);
#pragma GCC unroll 4
    for (int v = 0; v < kWide; ++v) sum += values[v];
    store(totals + o * VL, sum);
  }
}

// The reverse of gather_columns, adding.
inline void add_columns(const Conv &c, const float *source, const int32_t *places, int64_t count, float *to) {
  const int64_t step = c.x.stride * kLanes;
  for (int64_t f = 0; f < count; ++f, source += kPanel) {
    vec sums[kWide];
#pragma GCC unroll 4
    for (int v = 0; v < kWide; ++v) sums[v] = load(source + v * VL);
    add_to_row(sums, to + places[f], step);
  }
}

// y = the convolution of x, + bias.
inline int convolve(const rarefy_pattern *p, const TileKernels *kernels, const Conv &c, const float *values, const Images &x,
                    const float *bias, const Images &y, int threads) {
  const int64_t rows_at_once = min64(kConvRows, c.y.out), out = c.out_channels;
  Region region = plan_region(c, p->block_cols == 1, rows_at_once);
  const int64_t rows = band_rows(c, input_band<cell>(c, 1).width, 2 * int64_t(sizeof(cell)));  // the band, and as much else
  Band<cell> in = input_band<cell>(c, rows);
  Stream s = plan_stream(p->crow, out / p->block_rows, c.features() / p->block_cols, 65535, kConvChunks,
                         conv_tile(c, region, p->block_cols), p->block_rows * p->block_cols == 1,
                         kDotCells && p->block_cols == 1, false);
  if (!region_fits(region, c, s, 1)) return RAREFY_TOO_WIDE;
  const int64_t own_cells = whole_lines<cell>(region.shared ? most_channels(c, s, 1) * region.channel_cells()
                                                            : s.tile_cols * p->block_cols * kPanel);
  const int64_t own_sums = whole_lines<float>(rows_at_once * out * kPanel);
  uint16_t *offsets = nullptr;
  int32_t *places = nullptr;
  cell *tiles = nullptr;
  float *all_sums = nullptr;
  int32_t *scratch = nullptr;
  const Scratch memory([&](Carver &carver) {
    carve_stream(s, carver, p->block_rows * p->block_cols);
    carve_band(in, carver, threads);
    carve_region(c, region, carver);
    offsets = carver.take<uint16_t>(c.features());
    places = carver.take<int32_t>(region.shared ? 0 : c.features());
    tiles = carver.take<cell>(threads * own_cells);
    all_sums = carver.take<float>(threads * own_sums);
    scratch = carver.take<int32_t>(threads * build_scratch(s));
  });
  if (memory.failed()) return RAREFY_NO_MEMORY;
  cut_chunks(p->crow, s.num_rows, s.chunk_rows, s.parts, s.first_row);
  for (int64_t f = 0; f < c.features() / p->block_cols; ++f) {
    const int64_t tile = f >> s.tile_shift, channel = f / c.taps() - first_channel(c, s, 1, tile);
    const int64_t at = region.shared ? channel * region.channel_cells() + tap_at(c, region, f % c.taps())
                                     : (f - tile * s.tile_cols) * p->block_cols * kPanel;
    offsets[f] = uint16_t(at * int64_t(sizeof(cell)) / kOffsetBytes);
  }
  if (!region.shared) lay_places(c, in, places);
#pragma omp parallel num_threads(threads)
  {
    const FlushDenormals flush;
    const int thread = omp_get_thread_num();
    build_stream(s, p, false, values, scratch + thread * build_scratch(s), [&](int64_t col) { return offsets[col]; });
    const Band<cell> input = own_band(in, thread);
    cell *tile = tiles + thread * own_cells;
    float *sums = all_sums + thread * own_sums;
    input.clear();
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
    for (int64_t group = 0; group < c.groups(); ++group) {
      int64_t kept = 0;
      for (int64_t row = 0; row < c.y.out; row += rows) {
        const int64_t live_rows = min64(rows, c.y.out - row);
        pack_band(x, group * kLanes, row * c.y.stride - c.y.padding + kept, input.rows - kept, input, kept);
        for (int64_t r0 = 0; r0 < live_rows; r0 += rows_at_once) {
          const int64_t some = min64(rows_at_once, live_rows - r0);
          for (int64_t pixel = 0; pixel < c.x.out; pixel += kPixels) {
            for (int64_t o = 0; o < out; ++o) {
              const vec start = bias != nullptr ? broadcast(bias[o]) : vec{};
              for (int64_t r = 0; r < some; ++r) {
#pragma GCC unroll 4
                for (int v = 0; v < kWide; ++v) store(sums + (r * out + o) * kPanel + v * VL, start);
              }
            }
            for (int64_t t = 0; t < s.num_tiles; ++t) {
              if (region.shared) {
                gather_channels(c, region, input, r0, (some - 1) * c.y.stride + c.y.reach(), pixel,
                                first_channel(c, s, 1, t), end_channel(c, s, 1, t), tile);
              }
              for (int64_t r = 0; r < some; ++r) {
                if (!region.shared) {
                  const int64_t f0 = t * s.tile_cols * p->block_cols, f1 = min64(f0 + s.tile_cols * p->block_cols, c.features());
                  gather_columns(c, first_input(c, input, r0 + r, pixel), places + f0, f1 - f0, tile);
                }
                for (int64_t chunk = 0; chunk < s.num_chunks; ++chunk) {
                  Prefetch none;
                  kernels->multiply(s, chunk * s.num_tiles + t, tile + r * region.step(c),
                                    sums + (r * out + s.first_row[chunk] * p->block_rows) * kPanel, none);
                }
              }
            }
            for (int64_t r = 0; r < some; ++r) {
              unpack_tile(sums + r * out * kPanel, y, group * kLanes, row + r0 + r, pixel);
            }
          }
        }
        slide(input, rows * c.y.stride, false);
        kept = max64(0, input.rows - rows * c.y.stride);
      }
    }
  }
  return RAREFY_OK;
}

// To be called by all threads: the bias' gradient from `parts` sums of VL lanes a channel.
inline void add_bias_parts(const float *sums, int64_t parts, int64_t channels, float *dbias) {
#pragma omp for schedule(static)
  for (int64_t o = 0; o < channels; ++o) {
    float sum = 0.0f;
    for (int64_t part = 0; part < parts; ++part) {
      for (int64_t lane = 0; lane < VL; ++lane) sum += sums[(part * channels + o) * VL + lane];
    }
    dbias[o] = sum;
  }
}

// Rows of the transposed matrix in a chunk: their inputs at a tile, and the gradients of those, fit in L1 beside dy's.
inline int64_t conv_chunk(const Conv &c, const rarefy_pattern *p) {
  const int64_t pixels = c.y.reach() * ((kPixels - 1) * c.x.stride + c.x.reach());
  const int64_t channel_bytes = pixels * kLanes * int64_t(sizeof(cell) + sizeof(float));
  return max64(1, max64(1, kChunkBytes / channel_bytes) * c.taps() / p->block_cols);
}

// dvalues, and dx and dbias unless null. The view is W^T: an output pixel's dy meets the inputs that it was computed from.
inline int convolve_backward(const rarefy_pattern *p, const TileKernels *kernels, const Conv &c, const float *values,
                             const Images &dy, const Images &x, const Images &dx, float *dvalues, float *dbias, int threads) {
  const bool shared = p->block_cols == 1, has_dx = dx.data != nullptr;
  const int64_t entries = p->block_rows * p->block_cols, out = c.out_channels, features = c.features();
  const int64_t rows = band_rows(c, input_band<cell>(c, 1).width, 2 * int64_t(sizeof(cell) + sizeof(float)));
  Band<cell> in = input_band<cell>(c, rows);
  Band<float> gradient = input_band<float>(c, rows);
  const int64_t unit_rows = features / p->block_cols, unit_cols = out / p->block_rows;
  Stream s = plan_stream(p->t_crow, unit_rows, unit_cols, conv_chunk(c, p), kConvChunks,
                         choose_tile(unit_rows, unit_cols, p->num_units, p->block_rows), entries == 1 && kPairedBackward,
                         entries == 1 || (kDotCells && p->block_rows == 1), true);
  const int64_t groups = c.groups(), parts = max64(1, min64(groups, kMostParts));
  const int64_t panel = shared ? 0 : s.chunk_rows * p->block_cols * kPanel, dy_panel = ceil_div(out, 4) * 4 * kPanel;
  const int64_t dy_row_bytes = c.row_tiles() * dy_panel * int64_t(sizeof(cell));
  const int64_t dy_rows = max64(1, min64(rows, kDyStripBytes / max64(1, dy_row_bytes)));
  const int64_t own_cells = dy_rows * c.row_tiles() * dy_panel + panel, own_floats = panel + Dots<false>::BUFFER;
  int32_t *places = nullptr, *scratch = nullptr;
  cell *all_cells = nullptr;
  float *all_floats = nullptr, *in_order = nullptr, *bias_parts = nullptr;
  const Scratch memory([&](Carver &carver) {
    carve_stream(s, carver, entries);
    carve_band(in, carver, threads);
    carve_band(gradient, carver, threads);
    places = carver.take<int32_t>(features);
    in_order = carver.take<float>(parts * s.num_places * entries);
    bias_parts = carver.take<float>(parts * out * VL);
    all_cells = carver.take<cell>(threads * own_cells);
    all_floats = carver.take<float>(threads * own_floats);
    scratch = carver.take<int32_t>(threads * build_scratch(s));
  });
  if (memory.failed()) return RAREFY_NO_MEMORY;
  cut_chunks(p->t_crow, s.num_rows, s.chunk_rows, s.parts, s.first_row);
  lay_places(c, in, places);
#pragma omp parallel num_threads(threads)
  {
    const FlushDenormals flush;
    const int thread = omp_get_thread_num();
    build_stream(s, p, true, has_dx ? values : nullptr, scratch + thread * build_scratch(s), SideBySide(s, p->block_rows));
    const Band<cell> input = own_band(in, thread);
    const Band<float> sums = own_band(gradient, thread);
    cell *dy_tiles = all_cells + thread * own_cells, *x_panel = dy_tiles + own_cells - panel;
    float *dx_panel = all_floats + thread * own_floats, *dots = dx_panel + panel;
    input.clear();
    memset(dots, 0, size_t(Dots<false>::BUFFER) * sizeof(float));
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
    for (int64_t part = 0; part < parts; ++part) {
      float *part_values = in_order + part * s.num_places * entries, *part_bias = bias_parts + part * out * VL;
      memset(part_bias, 0, size_t(out * VL) * sizeof(float));
      bool add = false;
      if (groups == 0) memset(part_values, 0, size_t(s.num_places * entries) * sizeof(float));
      for (int64_t group = groups * part / parts; group < groups * (part + 1) / parts; ++group) {
        int64_t kept = 0;
        if (has_dx) sums.clear();
        for (int64_t row = 0; row < c.y.out; row += rows) {
          const int64_t live_rows = min64(rows, c.y.out - row), first = row * c.y.stride - c.y.padding;
          pack_band(x, group * kLanes, first + kept, input.rows - kept, input, kept);
          for (int64_t r0 = 0; r0 < live_rows; r0 += dy_rows) {
            const int64_t tiles = min64(dy_rows, live_rows - r0) * c.row_tiles();
            const auto row_of = [&](int64_t tile) { return r0 + tile / c.row_tiles(); };
            const auto pixel_of = [&](int64_t tile) { return tile % c.row_tiles() * kPixels; };
            for (int64_t at = 0; at < tiles; ++at) {
              pack_tile(dy, group * kLanes, row + row_of(at), pixel_of(at), dy_tiles + at * dy_panel);
              if (dbias != nullptr) add_panels(dy_tiles + at * dy_panel, out, part_bias);
            }
            for (int64_t chunk = 0; chunk < s.num_chunks; ++chunk) {
              const int64_t f0 = s.first_row[chunk] * p->block_cols, f1 = s.first_row[chunk + 1] * p->block_cols;
              for (int64_t at = 0; at < tiles; ++at) {
                const int64_t r = row_of(at), pixel = pixel_of(at);
                const cell *x_at = first_input(c, input, r, pixel);
                float *dx_at = first_input(c, sums, r, pixel);
                if (!shared) {
                  gather_columns(c, x_at, places + f0, f1 - f0, x_panel);
                  if (has_dx) memset(dx_panel, 0, size_t((f1 - f0) * kPanel) * sizeof(float));
                }
                for (int64_t t = 0; t < s.num_tiles; ++t) {
                  const cell *tile = dy_tiles + at * dy_panel + t * s.tile_cols * p->block_rows * kPanel;
                  const int64_t segments = chunk * s.num_tiles + t;
                  if (shared) {
                    const auto backward = has_dx ? kernels->scattered : kernels->scattered_values;
                    backward(s, segments, tile, x_at, dx_at, dots, part_values, add || at > 0,
                             {places + f0, c.x.stride * kLanes});
                  } else {
                    Prefetch none;
                    const auto backward = has_dx ? kernels->backward : kernels->backward_values;
                    backward(s, segments, tile, x_panel, dx_panel, dots, part_values, add || at > 0, none);
                  }
                }
                if (!shared && has_dx) add_columns(c, dx_panel, places + f0, f1 - f0, dx_at);
              }
            }
            add = true;
          }
          const bool last = row + rows >= c.y.out;
          if (has_dx) {
            unpack_band(sums, first, last ? sums.rows : rows * c.y.stride, dx, group * kLanes);
            slide(sums, rows * c.y.stride, true);
          }
          slide(input, rows * c.y.stride, false);
          kept = max64(0, input.rows - rows * c.y.stride);
        }
      }
    }
    put_in_order(s, entries, parts, in_order, dvalues);
    if (dbias != nullptr) add_bias_parts(bias_parts, parts, out, dbias);
  }
  return RAREFY_OK;
}

}  // namespace
}  // namespace rarefy
