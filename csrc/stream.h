// A pattern reordered for one call so that the inputs it reads stay in the L1 cache.
//
// A nonzero of an unstructured matrix does one multiply-add for each load of an input, so loads set the speed, and L1
// gives them faster than L2. The inputs are cut into tiles of columns that fit in L1, and the units are visited tile by
// tile; a row's units in one tile are a segment, and its sums are kept in L2 between
// tiles. A segment is a dozen units long and its length would be mispredicted every time: the segments of a tile are
// therefore sorted by length, which also lets two rows of equal length share a loop.
//
// Order of the units: chunk of rows, tile of columns, segment by length, column; in a pair of segments, unit by unit of
// each in turn (with dot products and units of one input, two units of each in turn). A chunk's units are the same set as
// in the compressed rows, so chunks are built in parallel and without a prefix sum. Chunks have about equal numbers of
// units, as they are what threads share out.
#pragma once

#include "cells.h"
#include "scratch.h"
#include "view.h"

namespace rarefy {
namespace {

struct Segment {
  uint16_t row;  // in its chunk
  uint16_t length;
};

struct Stream {
  int64_t num_rows, num_cols;             // of the view, in units
  int64_t num_places;                     // units and unused places
  bool pairs;                             // neighbours of equal length share a loop
  bool even;                              // every segment or pair has an even number of places, the last maybe unused;
                                          // with dot products every segment, and what is unused has a value of zero
  bool ordered;                           // keeps `order`
  int64_t chunk_spare;                    // unused places of a chunk, at most
  int64_t chunk_rows, tile_cols;          // the most of a chunk, in units; tile_cols is a power of two
  int64_t parts;                          // the chunks were cut for
  int64_t num_chunks, num_tiles;
  int tile_shift;
  int32_t *first_row;    // of each chunk; num_chunks + 1
  Segment *segments;     // chunk_rows places for each (chunk, tile)
  int32_t *num_segments; // for each (chunk, tile)
  int32_t *first_unit;   // for each (chunk, tile)
  uint16_t *offsets;     // of the unit's inputs in the tile, in steps of 8 bytes
  int32_t *order;        // the unit's place in the values, -1 if unused; only if ordered
  weight *values;        // a copy in this order
};

constexpr int kOffsetBytes = 8;  // an x86 address multiplies by it for nothing

// The most columns a tile may have for its offsets to fit 16 bits.
constexpr int64_t max_tile_inputs(int panel) { return 65536 * kOffsetBytes / (panel * int64_t(sizeof(cell))); }

// Cuts the rows into chunks of at most `most` rows and about a `parts`th of the work. Returns how many; first_row may be
// null.
inline int64_t cut_chunks(const int32_t *ptr, int64_t num_rows, int64_t most, int64_t parts, int32_t *first_row) {
  const int64_t share = ceil_div(ptr[num_rows] + num_rows, max64(parts, 1));
  int64_t count = 0;
  for (int64_t row = 0; row < num_rows; ++count) {
    if (first_row != nullptr) first_row[count] = int32_t(row);
    const int64_t begin = row, wanted = ptr[begin] + begin + share;
    while (row < num_rows && row - begin < most && ptr[row] + row < wanted) ++row;
  }
  if (first_row != nullptr) first_row[count] = int32_t(num_rows);
  return count;
}

// Where a chunk's places begin, with so many units before it.
inline int64_t first_place(const Stream &s, int64_t units, int64_t chunk) {
  const int64_t place = units + chunk * s.chunk_spare;
  return kDotCells && s.even ? (place + 1) / 2 * 2 : place;
}

// ptr: the units of each row, num_rows + 1.
inline Stream plan_stream(const int32_t *ptr, int64_t num_rows, int64_t num_cols, int64_t chunk_rows, int64_t parts,
                          int64_t tile_cols, bool pairs, bool even, bool ordered) {
  Stream s = {};
  s.num_rows = num_rows;
  s.num_cols = num_cols;
  while ((int64_t(1) << s.tile_shift) < tile_cols) ++s.tile_shift;
  s.tile_cols = int64_t(1) << s.tile_shift;
  s.parts = parts;
  s.chunk_rows = max64(1, min64(min64(chunk_rows, num_rows), 65535));
  s.num_chunks = cut_chunks(ptr, num_rows, s.chunk_rows, parts, nullptr);
  s.num_tiles = ceil_div(num_cols, s.tile_cols);
  s.pairs = pairs;
  s.even = even;
  s.ordered = ordered;
  // Where it is pairs that are even, only one segment of a length is left without a partner.
  s.chunk_spare = even ? s.num_tiles * (pairs && !kDotCells ? min64(s.chunk_rows, s.tile_cols) : s.chunk_rows) : 0;
  if (even && kDotCells) s.chunk_spare += 2;  // a chunk begins at an even place
  s.num_places = first_place(s, ptr[num_rows], s.num_chunks);
  return s;
}

inline void carve_stream(Stream &s, Carver &carver, int64_t unit_entries) {
  s.first_row = carver.take<int32_t>(s.num_chunks + 1);
  s.segments = carver.take<Segment>(s.num_chunks * s.num_tiles * s.chunk_rows);
  s.num_segments = carver.take<int32_t>(s.num_chunks * s.num_tiles);
  s.first_unit = carver.take<int32_t>(s.num_chunks * s.num_tiles);
  s.offsets = carver.take<uint16_t>(s.num_places);
  s.order = carver.take<int32_t>(s.ordered ? s.num_places : 0);
  s.values = carver.take<weight>(s.num_places * unit_entries);
}

// Whether segment i of `count` shares a loop with the next. To be asked at the first of each pair or single in turn.
inline bool paired(const Stream &s, const Segment *segments, int32_t i, int32_t count) {
  return s.pairs && i + 1 < count && segments[i].length == segments[i + 1].length;
}

// Scratch for build_chunk, in int32.
inline int64_t build_scratch(const Stream &s) { return s.chunk_rows * (s.num_tiles + 1) + s.tile_cols + 2; }

// How a view's units are stored: [output][input], or [input][output] where the view is W^T.
struct Unit {
  int64_t outputs, inputs;
  bool transposed;
  int64_t entries() const { return outputs * inputs; }
};

// A segment's places for `length` units.
inline int32_t places_of(const Stream &s, int32_t length) { return kDotCells && s.even ? (length + 1) / 2 * 2 : length; }

#if defined(RAREFY_DOT_CELLS)
// Where the pairs of inputs of a block of 4 x 4 come from: of one stored [output][input], and of one stored [input][output].
constexpr uint16_t kAlong4x4[16] = {0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15};
constexpr uint16_t kAcross4x4[16] = {0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15};

// A unit's values to place `to`, in pairs of inputs; null: zeros.
inline void put_values(const Unit &unit, const float *from, int64_t to, weight *values) {
  if (unit.entries() == 1) {
    narrow_to(values + to, from != nullptr ? *from : 0.0f);
    return;
  }
  if (unit.inputs == 1) {  // pairs of units
    weight *out = values + to / 2 * 2 * unit.outputs + to % 2;
    for (int64_t r = 0; r < unit.outputs; ++r) narrow_to(out + 2 * r, from != nullptr ? from[r] : 0.0f);
    return;
  }
  weight *out = values + to * unit.entries();
  if (unit.entries() == 16) {
    const __m256i order = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(unit.transposed ? kAcross4x4 : kAlong4x4));
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(out), _mm256_permutexvar_epi16(order, __m256i(narrow(load_any(from)))));
    return;
  }
  alignas(64) weight halves_of[256];
  for (int64_t e = 0; e < unit.entries(); e += VL) {
    const __mmask16 live = __mmask16((1u << min64(VL, unit.entries() - e)) - 1);
    store_any(halves_of + e, vec(_mm512_maskz_loadu_ps(live, from + e)));
  }
  const int64_t row = unit.transposed ? 1 : unit.inputs, column = unit.transposed ? unit.outputs : 1;
  for (int64_t c = 0; c < unit.inputs; c += 2) {
    const weight *first = halves_of + c * column, *second = first + column;
    for (int64_t r = 0; r < unit.outputs; ++r, out += 2) {
      out[0] = first[r * row];
      out[1] = second[r * row];
    }
  }
}
#else
inline void put_values(const Unit &unit, const float *from, int64_t to, weight *values) {
  if (unit.entries() == 1) {
    values[to] = *from;
  } else {
    memcpy(values + to * unit.entries(), from, size_t(unit.entries()) * sizeof(float));
  }
}
#endif

// values may be null: then only the index is built. offset_of(column) within its tile.
template <class Index, class OffsetOf>
void build_chunk(const Stream &s, const View<Index> &view, const float *values, const Unit &shape, int64_t chunk,
                 OffsetOf offset_of, int32_t *scratch) {
  const int64_t first = s.first_row[chunk], rows = s.first_row[chunk + 1] - first;
  const int64_t tiles = s.num_tiles;
  // bounds[r * (tiles + 1) + t]: the first unit of row r at or beyond tile t.
  int32_t *bounds = scratch, *places = scratch + s.chunk_rows * (tiles + 1);
  // In the order of columns each block of values is somewhere else; of single values too many share no line to ask for all.
  const bool announced = values != nullptr && view.perm != nullptr && shape.entries() >= 16;
  for (int64_t r = 0; r < rows; ++r) {
    int32_t *bound = bounds + r * (tiles + 1);
    const int32_t begin = view.ptr[first + r], end = view.ptr[first + r + 1];
    for (int64_t t = 0; t <= tiles; ++t) bound[t] = begin;
    for (int32_t k = begin; k < end; ++k) {
      bound[(int64_t(view.cols[k]) >> s.tile_shift) + 1] = k + 1;
      for (int64_t e = 0; announced && e < shape.entries(); e += 16) {
        __builtin_prefetch(values + view.perm[k] * shape.entries() + e);
      }
    }
    for (int64_t t = 1; t <= tiles; ++t) bound[t] = bound[t] > bound[t - 1] ? bound[t] : bound[t - 1];
  }
  int32_t unit = int32_t(first_place(s, view.ptr[first], chunk));
  const int32_t chunk_end = int32_t(first_place(s, view.ptr[first + rows], chunk + 1));
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t at = chunk * tiles + t;
    Segment *segments = s.segments + at * s.chunk_rows;
    for (int64_t i = 0; i <= s.tile_cols + 1; ++i) places[i] = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const int32_t *bound = bounds + r * (tiles + 1) + t;
      ++places[places_of(s, bound[1] - bound[0])];
    }
    int32_t count = 0;  // longest first; empty segments are left out
    for (int64_t i = s.tile_cols + 1; i > 0; --i) {
      const int32_t here = places[i];
      places[i] = count;
      count += here;
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int32_t *bound = bounds + r * (tiles + 1) + t;
      const int32_t length = places_of(s, bound[1] - bound[0]);
      if (length > 0) segments[places[length]++] = {uint16_t(r), uint16_t(length)};
    }
    s.num_segments[at] = count;
    s.first_unit[at] = unit;
    const int32_t begin_unit = unit;
    auto put = [&](int32_t k, int32_t to) {
      const int32_t place = view.perm != nullptr ? view.perm[k] : k;
      s.offsets[to] = offset_of(view.cols[k]);
      if (s.ordered) s.order[to] = place;
      if (values != nullptr) put_values(shape, values + place * shape.entries(), to, s.values);
    };
    auto leave = [&](int32_t to) {  // unused, beside a place of the same segment
      s.offsets[to] = s.offsets[to - 1];
      if (s.ordered) s.order[to] = -1;
      if (values != nullptr) put_values(shape, nullptr, to, s.values);
    };
    for (int32_t i = 0; i < count;) {
      const int32_t length = segments[i].length, rows = paired(s, segments, i, count) ? 2 : 1;
      for (int32_t r = 0; r < rows; ++r) {
        const int32_t *bound = bounds + segments[i + r].row * (tiles + 1) + t;
        const int32_t begin = bound[0], real = bound[1] - begin;
        if (kDotCells && s.even) {
          int32_t k = 0, to = unit + 2 * r;
          for (; k + 2 <= real; k += 2, to += 2 * rows) {
            put(begin + k, to);
            put(begin + k + 1, to + 1);
          }
          if (k < real) {
            put(begin + k, to);
            leave(to + 1);
          }
        } else {
          for (int32_t k = 0; k < length; ++k) put(begin + k, unit + k * rows + r);
        }
      }
      unit += rows * length;
      i += rows;
      if (s.even && unit % 2 != begin_unit % 2) {
        if (s.ordered) s.order[unit] = -1;
        ++unit;
      }
    }
  }
  if (s.ordered) {
    for (; unit < chunk_end; ++unit) s.order[unit] = -1;
  }
}

// Sums that leave their registers: added to memory, kLanes of them every `step` floats.
template <int NV>
__attribute__((always_inline)) inline void add_to_row(const vec (&sums)[NV], float *row, int64_t step) {
#pragma GCC unroll 16
  for (int v = 0; v < NV; ++v) {
    float *at = row + v / kCellVectors * step + v % kCellVectors * VL;
    store(at, load(at) + sums[v]);
  }
}

inline const cell *input_at(const cell *tile, uint16_t offset) {
  return reinterpret_cast<const cell *>(reinterpret_cast<const char *>(tile) + size_t(offset) * kOffsetBytes);
}

}  // namespace
}  // namespace rarefy
