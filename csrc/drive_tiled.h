// Whole calls for many tokens: reordering, packing, threads and scratch memory around tiled.h. The drivers know a block
// shape only by its sizes and its TileKernels, so that one driver serves all of them.
#pragma once

#include <omp.h>

#include "internal.h"

#include "tiled.h"

namespace rarefy {
namespace {

// Tokens from which reordering the pattern pays for itself. Sooner in backward: following the transposed index as it is,
// every panel would fetch the values in random order.
constexpr int64_t kForwardTiledFrom = 3 * kWide * VL, kBackwardTiledFrom = 2 * VL + 1;

// With dot products the ends of segments weigh twice as much, and longer segments are worth more than L1.
constexpr int64_t kTileBytes = int64_t(kDotCells ? 64 : 32) << 10;    // inputs in L1
constexpr int64_t kSumsBytes = int64_t(kDotCells ? 512 : 256) << 10;  // sums in L2
constexpr int64_t kDyBytes = int64_t(8) << 20;      // packed dy that the threads share, in L3
constexpr int64_t kPanelBytes = kPanel * int64_t(sizeof(cell));  // of one feature

// Columns a tile should have: as many as fit in `tile_bytes`, but more where the segments would be too short to be worth it.
inline int64_t choose_tile(int64_t num_rows, int64_t num_cols, int64_t num_units, int64_t block_inputs) {
  int64_t inputs = kTileBytes / kPanelBytes;
  const double density = double(num_units) / (double(max64(num_rows, 1)) * double(max64(num_cols, 1)));
  while (inputs * 2 < max_tile_inputs(kPanel) && inputs * density < 6.0 * double(block_inputs)) inputs *= 2;
  return max64(1, inputs / block_inputs);
}

// A matrix, or its transpose, in the order in which its kernels read it.
struct Matrix {
  const rarefy_pattern *p;
  const TileKernels *kernels;
  bool transposed;  // dx = dy W, and the gradients; else y = x W^T
  Stream s;
  const int32_t *ptr() const { return transposed ? p->t_crow : p->crow; }
  int64_t num_rows() const { return transposed ? p->in_features / p->block_cols : p->out_features / p->block_rows; }
  int64_t num_cols() const { return transposed ? p->out_features / p->block_rows : p->in_features / p->block_cols; }
  int64_t outputs() const { return transposed ? p->block_cols : p->block_rows; }  // of a unit
  int64_t inputs() const { return transposed ? p->block_rows : p->block_cols; }
  int64_t out_features() const { return transposed ? p->in_features : p->out_features; }
  int64_t in_features() const { return transposed ? p->out_features : p->in_features; }
  int64_t unit_entries() const { return p->block_rows * p->block_cols; }
  int64_t first_output(int64_t chunk) const { return s.first_row[chunk] * outputs(); }
  int64_t first_input(int64_t tile) const { return min64(tile * s.tile_cols * inputs(), in_features()); }
  int64_t chunk_floats() const { return s.chunk_rows * outputs() * kPanel; }
  int64_t tile_cols() const { return choose_tile(num_rows(), num_cols(), p->num_units, inputs()); }
};

// Rows are cut into at least `parts` chunks.
inline Matrix plan_multiply(const rarefy_pattern *p, const TileKernels *kernels, bool transposed, int64_t parts) {
  Matrix m = {p, kernels, transposed, {}};
  const int64_t chunk_rows = kSumsBytes / (m.outputs() * kPanel * int64_t(sizeof(float)));
  m.s = plan_stream(m.ptr(), m.num_rows(), m.num_cols(), chunk_rows, parts, m.tile_cols(), m.unit_entries() == 1,
                    kDotCells && m.inputs() == 1, false);
  return m;
}

inline void carve_matrix(Matrix &m, Carver &carver) {
  carve_stream(m.s, carver, m.unit_entries());
  if (carver.data != nullptr) cut_chunks(m.ptr(), m.num_rows(), m.s.chunk_rows, m.s.parts, m.s.first_row);
}

// To be called by all threads: the stream of a pattern, or of its transpose. values may be null: then only the index is
// built. offset_of(column) within its tile.
template <class OffsetOf>
void build_stream(const Stream &s, const rarefy_pattern *p, bool transposed, const float *values, int32_t *scratch,
                  OffsetOf offset_of) {
  const Unit unit = transposed ? Unit{p->block_cols, p->block_rows, true} : Unit{p->block_rows, p->block_cols, false};
#pragma omp for schedule(dynamic, 1) nowait
  for (int64_t chunk = 0; chunk < s.num_chunks; ++chunk) {
    if (p->index_bytes == 2) {
      build_chunk(s, transposed ? by_cols<uint16_t>(p) : by_rows<uint16_t>(p), values, unit, chunk, offset_of, scratch);
    } else {
      build_chunk(s, transposed ? by_cols<int32_t>(p) : by_rows<int32_t>(p), values, unit, chunk, offset_of, scratch);
    }
  }
}

// The offsets of a tile whose inputs lie side by side, `inputs` for each column.
struct SideBySide {
  int64_t mask;
  int step;
  SideBySide(const Stream &s, int64_t inputs)
      : mask(s.tile_cols - 1), step(int(inputs * kPanelBytes) / kOffsetBytes) {}
  uint16_t operator()(int64_t column) const { return uint16_t((column & mask) * step); }
};

// To be called by all threads. values may be null: then only the index is built.
inline void build(const Matrix &m, const float *values, int32_t *scratch) {
  build_stream(m.s, m.p, m.transposed, values, scratch, SideBySide(m.s, m.inputs()));
}

// To be called by all threads: the values' gradient in its own order, from the sum of `parts` in that of the stream.
inline void put_in_order(const Stream &s, int64_t entries, int64_t parts, const float *in_order, float *dvalues) {
  const int64_t part_floats = s.num_places * entries;
#pragma omp for schedule(static) nowait
  for (int64_t k = 0; k < s.num_places; ++k) {
    if (s.order[k] < 0) continue;
    if (parts == 1 && entries > 1) {
      memcpy(dvalues + s.order[k] * entries, in_order + k * entries, size_t(entries) * sizeof(float));
      continue;
    }
    for (int64_t e = 0; e < entries; ++e) {
      const float *from = in_order + k * entries + e;
      float sum = from[0];
      for (int64_t part = 1; part < parts; ++part) sum += from[part * part_floats];
      dvalues[s.order[k] * entries + e] = sum;
    }
  }
}

// One panel times the chunks [begin, end). load(f0, f1) is called before the inputs in [f0, f1) are first read from
// `panel`, expect(tile, prefetch) may announce memory, and emit(first, count, sums) takes finished outputs.
template <class Load, class Expect, class Emit>
void multiply_panel(const Matrix &m, int64_t begin, int64_t end, const float *bias, cell *panel, float *sums, Load load,
                    Expect expect, Emit emit) {
  const auto multiply = m.transposed ? m.kernels->multiply_t : m.kernels->multiply;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first = m.first_output(chunk), count = m.first_output(chunk + 1) - first;
    for (int64_t r = 0; r < count; ++r) {
      const vec start = bias != nullptr ? broadcast(bias[first + r]) : vec{};
#pragma GCC unroll 8
      for (int v = 0; v < kWide; ++v) store(sums + r * kPanel + v * VL, start);
    }
    for (int64_t t = 0; t < m.s.num_tiles; ++t) {
      const int64_t f0 = m.first_input(t);
      if (chunk == begin) load(f0, m.first_input(t + 1));
      Prefetch prefetch;
      expect(chunk, t, prefetch);
      multiply(m.s, chunk * m.s.num_tiles + t, panel + f0 * kPanel, sums, prefetch);
    }
    emit(first, count, sums);
  }
}

// What is needed around tile t of a chunk: its share of the rows that `emit` will write, and the inputs of the next tile.
inline void expect_outputs(const Matrix &m, int64_t chunk, int64_t t, const RowMajor &y, int64_t token, int64_t tokens,
                           Prefetch &prefetch) {
  const int64_t first = m.first_output(chunk), count = m.first_output(chunk + 1) - first;
  const int64_t begin = token + tokens * t / m.s.num_tiles, end = token + tokens * (t + 1) / m.s.num_tiles;
  prefetch.add(y.at(begin, first), y.features * y.element_bytes(), end - begin, count * y.element_bytes());
}

// y = x times the view's matrix, transposed, + bias.
inline int multiply_tiled(const rarefy_pattern *p, const TileKernels *kernels, bool transposed, const float *values,
                          const RowMajor &x, const float *bias, const RowMajor &y, int64_t batch, int threads) {
  const int64_t panels = ceil_div(batch, kPanel);
  const int64_t wanted = row_parts(panels, y.features / (transposed ? p->block_cols : p->block_rows), threads);
  Matrix m = plan_multiply(p, kernels, transposed, wanted);
  const int64_t parts = min64(wanted, max64(m.s.num_chunks, 1));
  const int64_t in = m.in_features();
  cell *panels_own = nullptr;
  float *sums_own = nullptr;
  int32_t *scratch = nullptr;
  const Scratch memory([&](Carver &carver) {
    carve_matrix(m, carver);
    panels_own = carver.take<cell>(threads * in * kPanel);
    sums_own = carver.take<float>(threads * m.chunk_floats());
    scratch = carver.take<int32_t>(threads * build_scratch(m.s));
  });
  if (memory.failed()) return RAREFY_NO_MEMORY;
#pragma omp parallel num_threads(threads)
  {
    const FlushDenormals flush;
    const int thread = omp_get_thread_num();
    build(m, values, scratch + thread * build_scratch(m.s));
#pragma omp barrier
    cell *panel = panels_own + thread * in * kPanel;
    float *sums = sums_own + thread * m.chunk_floats();
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < panels * parts; ++task) {
      const int64_t token = task / parts * kPanel, part = task % parts, tokens = min64(kPanel, batch - token);
      const int64_t begin = m.s.num_chunks * part / parts, end = m.s.num_chunks * (part + 1) / parts;
      multiply_panel(
          m, begin, end, bias, panel, sums,
          [&](int64_t f0, int64_t f1) { pack_rows<kWide>(x, token, tokens, f0, f1, panel + f0 * kPanel); },
          [&](int64_t chunk, int64_t t, Prefetch &prefetch) {
            expect_outputs(m, chunk, t, y, token, tokens, prefetch);
            const int64_t f0 = m.first_input(t + 1), f1 = m.first_input(t + 2);
            if (chunk == begin) {
              prefetch.add(x.at(token, f0), in * x.element_bytes(), tokens, (f1 - f0) * x.element_bytes());
            }
          },
          [&](int64_t first, int64_t count, const float *done) {
            unpack_rows<kWide>(done, token, tokens, first, first + count, y);
          });
    }
  }
  return RAREFY_OK;
}

// The gradients of one matrix, from panels of dy that the threads share. The view is W^T: a thread owns chunks of columns
// of W with all tokens, so every sum has one owner and one order.
struct Gradients {
  Matrix m;
  float *in_order;    // dvalues in the order of the stream
  float *bias_parts;  // sums of dy over the tokens of each panel: (panels, out)
  int64_t out() const { return m.in_features(); }   // of the layer, that is
  int64_t in() const { return m.out_features(); }
};

// What a thread of its own needs: inputs of a chunk, sums for their gradients, and dot products that wait.
struct Own {
  cell *x;
  float *sums, *dots;
  void clear_dots() const {
    for (int64_t d = 0; d < Dots<false>::BUFFER; ++d) dots[d] = 0.0f;
  }
};
struct OwnOfAll {
  int64_t chunk;  // cells and floats
  Own first;
  void carve(Carver &carver, int threads, int64_t chunk_floats) {
    chunk = chunk_floats;
    first.x = carver.take<cell>(threads * chunk * kTogether);
    first.sums = carver.take<float>(threads * chunk);
    first.dots = carver.take<float>(threads * Dots<false>::BUFFER);
  }
  Own of(int thread) const {
    return {first.x + thread * chunk * kTogether, first.sums + thread * chunk, first.dots + thread * Dots<false>::BUFFER};
  }
};

inline Gradients plan_gradients(const rarefy_pattern *p, const TileKernels *kernels, int threads) {
  Gradients g = {{p, kernels, true, {}}, nullptr, nullptr};
  const int64_t chunk_rows = max64(1, kSumsBytes / 2 / (p->block_cols * kPanel * int64_t(sizeof(float))));
  const bool single = g.m.unit_entries() == 1;
  g.m.s = plan_stream(g.m.ptr(), g.m.num_rows(), g.m.num_cols(), chunk_rows, 2 * threads, g.m.tile_cols(),
                      single && kPairedBackward, single || (kDotCells && g.m.inputs() == 1), true);
  return g;
}

inline void carve_gradients(Gradients &g, Carver &carver, int64_t panels, bool bias) {
  carve_matrix(g.m, carver);
  g.in_order = carver.take<float>(g.m.s.num_places * g.m.unit_entries());
  g.bias_parts = carver.take<float>(bias ? panels * g.out() : 0);
}

// One chunk over the `count` panels from `first_panel` on, of which dy_panels holds the first. load(panel, c0, c1, x) brings
// the inputs [c0, c1) of the layer for one panel; emit(panel, c0, c1, sums) takes their gradients; none: emit is not called.
template <bool DX, class Load, class Expect, class Emit>
void gradients_chunk(const Gradients &g, int64_t chunk, const cell *dy_panels, int64_t first_panel, int64_t count,
                     const Own &own, Load load, Expect expect, Emit emit) {
  const Matrix &m = g.m;
  const int64_t c0 = m.first_output(chunk), c1 = m.first_output(chunk + 1);
  const auto backward = DX ? m.kernels->backward : m.kernels->backward_values;
  const Panels panels = {g.out() * kPanel, (c1 - c0) * kPanel};
  for (int64_t at = 0; at < count; ++at) {
    // Whether this panel's dot products wait for those of its group.
    const bool wait = m.kernels->dot_products != nullptr && at / kTogether * kTogether + kTogether <= count;
    cell *x = own.x + (wait ? at % kTogether * panels.x : 0);
    const cell *panel = dy_panels + at * panels.dy;
    load(first_panel + at, c0, c1, x);
    if (DX) {
      for (int64_t i = 0; i < panels.x; i += VL) store(own.sums + i, vec{});
    }
    for (int64_t t = 0; t < m.s.num_tiles && (DX || !wait); ++t) {
      const int64_t f0 = m.first_input(t), f1 = m.first_input(t + 1), f2 = m.first_input(t + 2);
      const int64_t place = chunk * m.s.num_tiles + t;
      Prefetch prefetch;
      const int64_t next = f1 < g.out() ? f2 - f1 : at + 1 < count ? m.first_input(1) : 0;  // the next panel's after the last
      prefetch.add(panel + f1 * kPanel, 0, next > 0, next * kPanelBytes);
      expect(first_panel + at, c0, c1, t, prefetch);
      if (wait) {
        m.kernels->multiply_t(m.s, place, panel + f0 * kPanel, own.sums, prefetch);
      } else {
        backward(m.s, place, panel + f0 * kPanel, x, own.sums, own.dots, g.in_order, first_panel + at > 0, prefetch);
      }
    }
    if (DX) emit(first_panel + at, c0, c1, own.sums);
    if (!wait || (at + 1) % kTogether != 0) continue;
    const int64_t begin = at + 1 - kTogether;
    for (int64_t t = 0; t < m.s.num_tiles; ++t) {
      m.kernels->dot_products(m.s, chunk * m.s.num_tiles + t, dy_panels + begin * panels.dy + m.first_input(t) * kPanel, own.x,
                              panels, own.dots, g.in_order, first_panel + begin > 0);
    }
  }
}

// Memory of a chunk's rows that tile t of `tiles` announces: those of the next panel's inputs, or of this panel's outputs.
inline void expect_rows(const RowMajor &rows, int64_t token, int64_t tokens, int64_t c0, int64_t c1, int64_t t, int64_t tiles,
                        Prefetch &prefetch) {
  const int64_t begin = token + tokens * t / tiles, end = token + tokens * (t + 1) / tiles;
  prefetch.add(rows.at(begin, c0), rows.features * rows.element_bytes(), end - begin, (c1 - c0) * rows.element_bytes());
}

// To be called by all threads: dy's panels [first, first + count) from rows, and the sums for the bias.
inline void pack_dy(const RowMajor &dy, int64_t first, int64_t count, int64_t batch, cell *dy_panels, float *bias_parts) {
  const int64_t out = dy.features, pieces = ceil_div(out, kPieceFeatures);
#pragma omp for schedule(dynamic, 1)
  for (int64_t task = 0; task < count * pieces; ++task) {
    const int64_t at = task / pieces, token = (first + at) * kPanel, tokens = min64(kPanel, batch - token);
    const int64_t f0 = task % pieces * kPieceFeatures, f1 = min64(f0 + kPieceFeatures, out);
    pack_rows<kWide>(dy, token, tokens, f0, f1, dy_panels + (at * out + f0) * kPanel);
    if (bias_parts != nullptr) sum_columns(dy, token, tokens, f0, f1, bias_parts + (first + at) * out + f0);
  }
}

// To be called by all threads, after all chunks: the values' gradient in its own order, and the bias' summed.
inline void finish_gradients(const Gradients &g, int64_t panels, float *dvalues, float *dbias) {
  put_in_order(g.m.s, g.m.unit_entries(), 1, g.in_order, dvalues);
  if (dbias != nullptr) add_sums(g.bias_parts, panels, g.out(), dbias);
}

// dvalues, and dx and dbias unless null, in one pass over dy.
inline int backward_tiled(const rarefy_pattern *p, const TileKernels *kernels, const float *values, const RowMajor &dy,
                          const RowMajor &x, const RowMajor &dx, float *dvalues, float *dbias, int64_t batch, int threads) {
  const int64_t out = p->out_features, panels = ceil_div(batch, kPanel);
  Gradients g = plan_gradients(p, kernels, threads);
  const int64_t group = max64(2, min64(panels, kDyBytes / max64(1, out * kPanelBytes)));
  const bool has_dx = dx.data != nullptr;
  cell *dy_panels = nullptr;
  OwnOfAll owns = {};
  int32_t *scratch = nullptr;
  const Scratch memory([&](Carver &carver) {
    carve_gradients(g, carver, panels, dbias != nullptr);
    dy_panels = carver.take<cell>(group * out * kPanel);
    owns.carve(carver, threads, g.m.chunk_floats());
    scratch = carver.take<int32_t>(threads * build_scratch(g.m.s));
  });
  if (memory.failed()) return RAREFY_NO_MEMORY;
#pragma omp parallel num_threads(threads)
  {
    const FlushDenormals flush;
    const int thread = omp_get_thread_num();
    const Own own = owns.of(thread);
    own.clear_dots();
    build(g.m, has_dx ? values : nullptr, scratch + thread * build_scratch(g.m.s));  // pack_dy ends with a barrier
    for (int64_t first = 0; first < panels; first += group) {
      const int64_t count = min64(group, panels - first), tiles = g.m.s.num_tiles;
      pack_dy(dy, first, count, batch, dy_panels, dbias != nullptr ? g.bias_parts : nullptr);
      const auto tokens_of = [&](int64_t panel) { return max64(0, min64(kPanel, batch - panel * kPanel)); };
      const auto load = [&](int64_t panel, int64_t c0, int64_t c1, cell *target) {
        pack_rows<kWide>(x, panel * kPanel, tokens_of(panel), c0, c1, target);
      };
      const auto expect = [&](int64_t panel, int64_t c0, int64_t c1, int64_t t, Prefetch &prefetch) {
        expect_rows(x, (panel + 1) * kPanel, tokens_of(panel + 1), c0, c1, t, tiles, prefetch);
        if (has_dx) expect_rows(dx, panel * kPanel, tokens_of(panel), c0, c1, t, tiles, prefetch);
      };
      const auto emit = [&](int64_t panel, int64_t c0, int64_t c1, const float *sums) {
        unpack_rows<kWide>(sums, panel * kPanel, tokens_of(panel), c0, c1, dx);
      };
#pragma omp for schedule(dynamic, 1)
      for (int64_t chunk = 0; chunk < g.m.s.num_chunks; ++chunk) {
        if (has_dx) {
          gradients_chunk<true>(g, chunk, dy_panels, first, count, own, load, expect, emit);
        } else {
          gradients_chunk<false>(g, chunk, dy_panels, first, count, own, load, expect, emit);
        }
      }
    }
    finish_gradients(g, panels, dvalues, dbias);
  }
  return RAREFY_OK;
}

}  // namespace
}  // namespace rarefy
