// Blocks of 8x8 and 16x16 on AMX, the matrix unit of recent Xeons, on which dense bfloat16 products run there: with bfloat16
// activations, or with float32 ones whose products may round to bfloat16. Everything else of this instruction set is
// AVX-512's. The products are in amx_tiles.h, the layouts they read in amx_layouts.h; here are whole calls.
#include <omp.h>

#include "internal.h"

#include "activation.h"
#include "amx_tiles.h"
#include "scratch.h"
#include "view.h"

#include <sys/syscall.h>
#include <unistd.h>

namespace rarefy {
namespace {

constexpr int64_t kPanelBytes = int64_t(1) << 20;   // panels of dy, in one of two layouts, that the threads share in L2
constexpr int64_t kFewTokens = 64;                  // below, the vector kernels

constexpr int64_t kOutputsAtOnce = 64;  // whose sums are unpacked together: whole cache lines, and sums in L1

// A matrix in one orientation, and a panel of what it is multiplied with.
struct Factors {
  Side side;
  const bf16 *blocks;
  const word *words;
};

// target = the sum of `count` products, + bias, for one panel of tokens.
template <int SIDE, class T>
void multiply_panel(const Factors *factors, int count, int64_t begin, int64_t end, const float *bias, int64_t features,
                    int64_t tokens, T *target, float *sums) {
  for (int64_t r = begin; r < end; r += kOutputsAtOnce / SIDE) {
    const int64_t stop = min64(r + kOutputsAtOnce / SIDE, end);
    for (int i = 0; i < count; ++i) {
      multiply_rows<SIDE>(factors[i].side, factors[i].blocks, factors[i].words, r, stop, i > 0, sums);
    }
    if (bias != nullptr) add_rows(bias + r * SIDE, (stop - r) * SIDE, sums);
    unpack_sums(sums, features, tokens, r * SIDE, stop * SIDE, target);
  }
}

template <int SIDE, class T>
int multiply(const rarefy_pattern *p, bool transposed, const float *values, const T *x, const float *bias, T *y,
             int64_t batch, int threads) {
  const Side side = side_of(p, transposed);
  const int64_t in = transposed ? p->out_features : p->in_features, out = side.num_rows * SIDE;
  const int64_t panels = ceil_div(batch, kTokens), parts = row_parts(panels, side.num_rows, threads);
  const int64_t own = in / 2 * kTokens + kOutputsAtOnce * kTokens;  // in words, or floats
  bf16 *blocks = nullptr;
  word *buffers = nullptr;
  const Scratch memory([&](Carver &carver) {
    blocks = carver.take<bf16>(p->num_units * (SIDE * SIDE));
    buffers = carver.take<word>(threads * own);
  });
  if (memory.failed()) return RAREFY_NO_MEMORY;
#pragma omp parallel num_threads(threads)
  {
    const FlushDenormals flush;
    Tiles tiles;
    tiles.shape(SIDE, SIDE / 2, 16);
    convert_side<SIDE>(side, values, transposed, blocks);
#pragma omp barrier
    word *words = buffers + omp_get_thread_num() * own;
    float *sums = reinterpret_cast<float *>(words + in / 2 * kTokens);
    int64_t packed = -1;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < panels * parts; ++task) {
      const int64_t at = task / parts, part = task % parts, token = at * kTokens, tokens = min64(kTokens, batch - token);
      if (packed != at) pack_pairs(x + token * in, in, tokens, 0, in, words);
      packed = at;
      const Factors factors = {side, blocks, words};
      multiply_panel<SIDE>(&factors, 1, part_begin(side.ptr, side.num_rows, part, parts),
                           part_begin(side.ptr, side.num_rows, part + 1, parts), bias, out, tokens, y + token * out, sums);
    }
  }
  return RAREFY_OK;
}

// How block columns are shared out: chunks of about equal numbers of blocks, of which `ptr` counts those before a column.
struct Chunks {
  const int32_t *ptr;
  int64_t num_rows, count;
  int64_t begin(int64_t chunk) const { return part_begin(ptr, num_rows, chunk, count); }
  int64_t widest() const {
    int64_t most = 0;
    for (int64_t c = 0; c < count; ++c) most = max64(most, begin(c + 1) - begin(c));
    return most;
  }
};

// Panels of dy from row-major ones, in both layouts, and their sums for the bias. To be called by all threads.
template <class T>
void pack_dy(const T *dy, int64_t out, int64_t first, int64_t count, int64_t batch, word *dy_words, bf16 *dy_rows,
             float *bias_parts) {
  const int64_t pieces = ceil_div(out, kPieceFeatures);
#pragma omp for schedule(dynamic, 1)
  for (int64_t task = 0; task < count * pieces; ++task) {
    const int64_t at = task / pieces, token = (first + at) * kTokens, tokens = min64(kTokens, batch - token);
    const int64_t f0 = task % pieces * kPieceFeatures, f1 = min64(f0 + kPieceFeatures, out);
    word *words = dy_words + (at * out + f0) / 2 * kTokens;
    pack_pairs(dy + token * out, out, tokens, f0, f1, words);
    split_pairs(words, f1 - f0, dy_rows + (at * out + f0) * kTokens);
    if (bias_parts != nullptr) column_sums(dy + token * out, out, tokens, f0, f1, bias_parts + (first + at) * out + f0);
  }
}

inline int64_t num_chunks(int threads) { return threads > 1 ? 2 * threads : 1; }

// A matrix W as W^T, its blocks (if dx is wanted), and the panels of its dy in both layouts.
struct Gradient {
  Side side;
  bf16 *blocks;
  word *dy_words;
  bf16 *dy_rows;
  float *dvalues;
};

// A thread's part in the gradients of `num` matrices that read the same x, from panels of their dy, row-major x, and dx (or
// null), in which the matrices' parts meet.
template <int SIDE, class T>
void gradients_of(const Gradient *gradients, int num, const Chunks &chunks, int64_t out, const T *x, T *dx, int64_t in,
                  int64_t first, int64_t count, int64_t batch, word *x_words, int64_t x_panel, float *sums, Tiles &tiles) {
#pragma omp for schedule(dynamic, 1)
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    const int64_t begin = chunks.begin(chunk), end = chunks.begin(chunk + 1);
    tiles.shape(SIDE, SIDE / 2, 16);
    for (int64_t at = 0; at < count; ++at) {
      const int64_t token = (first + at) * kTokens, tokens = min64(kTokens, batch - token);
      pack_tokens<SIDE>(x + token * in, in, tokens, begin * SIDE, end * SIDE, x_words + at * x_panel);
      if (dx == nullptr) continue;
      Factors factors[2];
      for (int i = 0; i < num; ++i) {
        factors[i] = {gradients[i].side, gradients[i].blocks, gradients[i].dy_words + at * out / 2 * kTokens};
      }
      multiply_panel<SIDE>(factors, num, begin, end, nullptr, in, tokens, dx + token * in, sums);
    }
    tiles.shape(SIDE, 16, SIDE);
    for (int i = 0; i < num; ++i) {
      const Gradient &g = gradients[i];
      add_columns<SIDE>(g.side, begin, end, g.dy_rows, out * kTokens, x_words, x_panel, count, first > 0, g.dvalues);
    }
  }
}

// dvalues, and dx and dbias unless null, from dy and x. A thread owns block columns of W with all tokens.
template <int SIDE, class T>
int gradients(const rarefy_pattern *p, const float *values, const T *dy, const T *x, T *dx, float *dvalues,
              float *dbias, int64_t batch, int threads) {
  Gradient g = {side_of(p, true), nullptr, nullptr, nullptr, dvalues};
  const Chunks chunks = {g.side.ptr, g.side.num_rows, num_chunks(threads)};
  const int64_t in = p->in_features, out = p->out_features, panels = ceil_div(batch, kTokens);
  const int64_t group = max64(2, min64(panels, kPanelBytes / max64(1, out * kTokens * 2)));
  const int64_t x_panel = chunks.widest() * (kTokens / 2 * SIDE), own = group * x_panel + kOutputsAtOnce * kTokens;
  word *buffers = nullptr;
  float *bias_parts = nullptr;
  const Scratch memory([&](Carver &carver) {
    g.blocks = carver.take<bf16>(dx != nullptr ? p->num_units * (SIDE * SIDE) : 0);
    g.dy_words = carver.take<word>(group * out / 2 * kTokens);
    g.dy_rows = carver.take<bf16>(group * out * kTokens);
    bias_parts = carver.take<float>(dbias != nullptr ? panels * out : 0);
    buffers = carver.take<word>(threads * own);
  });
  if (memory.failed()) return RAREFY_NO_MEMORY;
#pragma omp parallel num_threads(threads)
  {
    const FlushDenormals flush;
    Tiles tiles;
    if (dx != nullptr) convert_side<SIDE>(g.side, values, true, g.blocks);
    word *x_words = buffers + omp_get_thread_num() * own;
    float *sums = reinterpret_cast<float *>(x_words + group * x_panel);
    for (int64_t first = 0; first < panels; first += group) {
      const int64_t count = min64(group, panels - first);
      pack_dy(dy, out, first, count, batch, g.dy_words, g.dy_rows, dbias != nullptr ? bias_parts : nullptr);
      gradients_of<SIDE>(&g, 1, chunks, out, x, dx, in, first, count, batch, x_words, x_panel, sums, tiles);
    }
    if (dbias != nullptr) add_sums(bias_parts, panels, out, dbias);
  }
  return RAREFY_OK;
}

// -- an MLP: see drive_mlp.h. z is stored in bfloat16, (panel, inner matrices * hidden, 64) ----------------------------

// The matrices that read x: the one whose outputs go through the activation, and if gated the one they are multiplied by.
struct Inner {
  const rarefy_layer *layers[2];
  int count;
};
inline Inner inner_of(const rarefy_mlp &mlp) {
  if (mlp.gate.pattern != nullptr) return {{&mlp.gate, &mlp.up}, 2};
  return {{&mlp.up, nullptr}, 1};
}

constexpr int64_t kSums = kOutputsAtOnce * kTokens;

template <int SIDE, class T>
int mlp_forward(const rarefy_mlp *mlp, const T *x, T *y, bf16 *z, int64_t batch, int threads) {
  const Inner inner = inner_of(*mlp);
  const rarefy_pattern *last = mlp->down.pattern;
  const int64_t in = mlp->up.pattern->in_features, hidden = last->in_features, out = last->out_features;
  const int64_t panels = ceil_div(batch, kTokens), own = (in + hidden) / 2 * kTokens + inner.count * kSums;
  Side sides[2] = {};
  for (int i = 0; i < inner.count; ++i) sides[i] = side_of(inner.layers[i]->pattern, false);
  const Side down = side_of(last, false);
  bf16 *blocks[2] = {}, *down_blocks = nullptr;
  word *buffers = nullptr;
  const Scratch memory([&](Carver &carver) {
    for (int i = 0; i < inner.count; ++i) blocks[i] = carver.take<bf16>(inner.layers[i]->pattern->num_units * (SIDE * SIDE));
    down_blocks = carver.take<bf16>(last->num_units * (SIDE * SIDE));
    buffers = carver.take<word>(threads * own);
  });
  if (memory.failed()) return RAREFY_NO_MEMORY;
#pragma omp parallel num_threads(threads)
  {
    const FlushDenormals flush;
    Tiles tiles;
    tiles.shape(SIDE, SIDE / 2, 16);
    for (int i = 0; i < inner.count; ++i) convert_side<SIDE>(sides[i], inner.layers[i]->values, false, blocks[i]);
    convert_side<SIDE>(down, mlp->down.values, false, down_blocks);
#pragma omp barrier
    word *x_words = buffers + omp_get_thread_num() * own, *h_words = x_words + in / 2 * kTokens;
    float *sums = reinterpret_cast<float *>(h_words + hidden / 2 * kTokens);
#pragma omp for schedule(dynamic, 1)
    for (int64_t at = 0; at < panels; ++at) {
      const int64_t token = at * kTokens, tokens = min64(kTokens, batch - token);
      pack_pairs(x + token * in, in, tokens, 0, in, x_words);
      for (int64_t r = 0; r < hidden / SIDE; r += kOutputsAtOnce / SIDE) {
        const int64_t stop = min64(r + kOutputsAtOnce / SIDE, hidden / SIDE);
        for (int i = 0; i < inner.count; ++i) {
          multiply_rows<SIDE>(sides[i], blocks[i], x_words, r, stop, false, sums + i * kSums);
        }
        // What matrix i gives for feature f, as it is stored: that is what the backward pass will see.
        const auto output = [&](int i, int64_t f, int64_t lane) {
          const float *bias = inner.layers[i]->bias;
          const vec start = bias != nullptr ? broadcast(bias[f]) : vec{};
          bf16 *place = z + ((at * inner.count + i) * hidden + f) * kTokens + lane;
          store_any(place, load(sums + i * kSums + (f - r * SIDE) * kTokens + lane) + start);
          return load_any(place);
        };
        with_activation(mlp->activation, [&](auto activation) {
          for (int64_t f = r * SIDE; f < stop * SIDE; f += 2) {
            for (int64_t lane = 0; lane < kTokens; lane += VL) {
              vec h[2], slope;
              for (int i = 0; i < 2; ++i) {
                activate<decltype(activation)::value>(output(0, f + i, lane), h[i], slope);
                if (inner.count == 2) h[i] *= output(1, f + i, lane);
              }
              store(reinterpret_cast<float *>(h_words + f / 2 * kTokens + lane), join_pairs(h[0], h[1]));
            }
          }
        });
      }
      const Factors factors = {down, down_blocks, h_words};
      multiply_panel<SIDE>(&factors, 1, 0, down.num_rows, mlp->down.bias, out, tokens, y + token * out, sums);
    }
  }
  return RAREFY_OK;
}

template <int SIDE, class T>
int mlp_backward(const rarefy_mlp *mlp, const T *dy, const T *x, const bf16 *z, T *dx, const rarefy_mlp_gradients &into,
                 int64_t batch, int threads) {
  const Inner inner = inner_of(*mlp);
  const rarefy_layer_gradients *to[2] = {inner.count == 2 ? &into.gate : &into.up, &into.up};
  const rarefy_pattern *last = mlp->down.pattern;
  const int64_t in = mlp->up.pattern->in_features, hidden = last->in_features, out = last->out_features;
  const int64_t panels = ceil_div(batch, kTokens), columns = in / SIDE;
  Gradient down = {side_of(last, true), nullptr, nullptr, nullptr, into.down.values}, g[2] = {};
  for (int i = 0; i < inner.count; ++i) {
    g[i] = {side_of(inner.layers[i]->pattern, true), nullptr, nullptr, nullptr, to[i]->values};
  }
  const int64_t group = max64(2, min64(panels, 2 * kPanelBytes / max64(1, (out + inner.count * hidden) * kTokens * 2)));
  int32_t *blocks_before = nullptr;  // of both inner matrices, which share their chunks
  float *parts[2] = {}, *down_parts = nullptr;
  const Scratch lasting([&](Carver &carver) {
    blocks_before = carver.take<int32_t>(columns + 1);
    for (int i = 0; i < inner.count; ++i) {
      g[i].blocks = carver.take<bf16>(dx != nullptr ? inner.layers[i]->pattern->num_units * (SIDE * SIDE) : 0);
      g[i].dy_words = carver.take<word>(group * hidden / 2 * kTokens);
      g[i].dy_rows = carver.take<bf16>(group * hidden * kTokens);
      parts[i] = carver.take<float>(panels * hidden);
    }
    down.blocks = carver.take<bf16>(last->num_units * (SIDE * SIDE));
    down.dy_words = carver.take<word>(group * out / 2 * kTokens);
    down.dy_rows = carver.take<bf16>(group * out * kTokens);
    down_parts = carver.take<float>(into.down.bias != nullptr ? panels * out : 0);
  });
  if (lasting.failed()) return RAREFY_NO_MEMORY;
  for (int64_t c = 0; c <= columns; ++c) blocks_before[c] = g[0].side.ptr[c] + (inner.count == 2 ? g[1].side.ptr[c] : 0);
  const Chunks inner_chunks = {blocks_before, columns, num_chunks(threads)};
  const Chunks down_chunks = {down.side.ptr, down.side.num_rows, num_chunks(threads)};
  const int64_t x_panel = inner_chunks.widest() * (kTokens / 2 * SIDE), h_panel = down_chunks.widest() * (kTokens / 2 * SIDE);
  const int64_t own = group * max64(x_panel, h_panel) + 2 * kSums;
  word *buffers = nullptr;
  const Scratch memory([&](Carver &carver) { buffers = carver.take<word>(threads * own); });
  if (memory.failed()) return RAREFY_NO_MEMORY;
#pragma omp parallel num_threads(threads)
  {
    const FlushDenormals flush;
    Tiles tiles;
    for (int i = 0; i < inner.count && dx != nullptr; ++i) {
      convert_side<SIDE>(g[i].side, inner.layers[i]->values, true, g[i].blocks);
    }
    convert_side<SIDE>(down.side, mlp->down.values, true, down.blocks);
    word *words = buffers + omp_get_thread_num() * own;
    float *sums = reinterpret_cast<float *>(words + group * max64(x_panel, h_panel));
    bf16 *h_rows = reinterpret_cast<bf16 *>(sums + kSums);
    for (int64_t first = 0; first < panels; first += group) {
      const int64_t count = min64(group, panels - first);
      pack_dy(dy, out, first, count, batch, down.dy_words, down.dy_rows, into.down.bias != nullptr ? down_parts : nullptr);
#pragma omp for schedule(dynamic, 1)
      for (int64_t chunk = 0; chunk < down_chunks.count; ++chunk) {
        const int64_t begin = down_chunks.begin(chunk), end = down_chunks.begin(chunk + 1);
        tiles.shape(SIDE, SIDE / 2, 16);
        for (int64_t at = 0; at < count; ++at) {
          const bf16 *stored = z + (first + at) * inner.count * hidden * kTokens;
          for (int64_t r = begin; r < end; r += kOutputsAtOnce / SIDE) {
            const int64_t stop = min64(r + kOutputsAtOnce / SIDE, end);
            multiply_rows<SIDE>(down.side, down.blocks, down.dy_words + at * out / 2 * kTokens, r, stop, false, sums);
            with_activation(mlp->activation, [&](auto activation) {
              for (int64_t f = r * SIDE; f < stop * SIDE; f += 2) {
                vec total[2][2] = {};  // of each feature, by matrix
                for (int64_t lane = 0; lane < kTokens; lane += VL) {
                  vec dz[2][2];
                  for (int i = 0; i < 2; ++i) {
                    const int64_t local = (f + i - r * SIDE) * kTokens + lane, place = (f + i) * kTokens + lane;
                    vec h, slope;
                    activate<decltype(activation)::value>(load_any(stored + place), h, slope);
                    const vec dh = load(sums + local);
                    if (inner.count == 2) {
                      const vec factor = load_any(stored + hidden * kTokens + place);
                      dz[1][i] = dh * h;
                      h *= factor;
                      slope *= factor;
                    }
                    dz[0][i] = dh * slope;
                    store_any(h_rows + local, h);
                    for (int m = 0; m < inner.count; ++m) {
                      total[m][i] += dz[m][i];
                      store_any(g[m].dy_rows + at * hidden * kTokens + place, dz[m][i]);
                    }
                  }
                  for (int m = 0; m < inner.count; ++m) {
                    store(reinterpret_cast<float *>(g[m].dy_words + (at * hidden + f) / 2 * kTokens + lane),
                          join_pairs(dz[m][0], dz[m][1]));
                  }
                }
                for (int m = 0; m < inner.count; ++m) {
                  for (int i = 0; i < 2; ++i) parts[m][(first + at) * hidden + f + i] = _mm512_reduce_add_ps(total[m][i]);
                }
              }
            });
            for (int64_t c = r; c < stop; ++c) {
              pair_tokens<SIDE>(h_rows + (c - r) * SIDE * kTokens, words + at * h_panel + (c - begin) * (kTokens / 2 * SIDE));
            }
          }
        }
        tiles.shape(SIDE, 16, SIDE);
        add_columns<SIDE>(down.side, begin, end, down.dy_rows, out * kTokens, words, h_panel, count, first > 0, down.dvalues);
      }
      gradients_of<SIDE>(g, inner.count, inner_chunks, hidden, x, dx, in, first, count, batch, words, x_panel, sums, tiles);
    }
    for (int i = 0; i < inner.count; ++i) {
      if (to[i]->bias != nullptr) add_sums(parts[i], panels, hidden, to[i]->bias);
    }
    if (into.down.bias != nullptr) add_sums(down_parts, panels, out, into.down.bias);
  }
  return RAREFY_OK;
}

bool takes(const rarefy_pattern *p, Activations activations, int64_t batch) {
  const bool square = p->block_rows == p->block_cols && (p->block_rows == 8 || p->block_rows == 16);
  return activations != FLOAT32 && batch >= kFewTokens && square;
}

// Calls work(side, element) with the block's side as a compile-time constant and a value of the activations' type.
template <class Work>
int with_types(int64_t side, bool half, Work work) {
  const std::integral_constant<int, 8> eight;
  const std::integral_constant<int, 16> sixteen;
  if (side == 8) return half ? work(eight, bf16()) : work(eight, float());
  return half ? work(sixteen, bf16()) : work(sixteen, float());
}

int spmm(const rarefy_pattern *p, const float *values, const void *x, const float *bias, void *y, Activations activations,
         int64_t batch, int threads) {
  if (!takes(p, activations, batch)) {
    return kernels_avx512()->spmm(p, values, x, bias, y, activations, batch, threads);
  }
  return with_types(p->block_rows, activations == BFLOAT16, [&](auto side, auto element) {
    using T = decltype(element);
    return multiply<decltype(side)::value>(p, false, values, static_cast<const T *>(x), bias, static_cast<T *>(y), batch,
                                           threads);
  });
}

int backward(const rarefy_pattern *p, const float *values, const void *dy, const void *x, void *dx, float *dvalues,
             float *dbias, Activations activations, int64_t batch, int threads) {
  const bool only_dx = dvalues == nullptr && dbias == nullptr && dx != nullptr;
  if (!takes(p, activations, batch) || p->t_crow == nullptr || (dvalues == nullptr && !only_dx)) {
    return kernels_avx512()->backward(p, values, dy, x, dx, dvalues, dbias, activations, batch, threads);
  }
  return with_types(p->block_rows, activations == BFLOAT16, [&](auto side, auto element) {
    using T = decltype(element);
    constexpr int SIDE = decltype(side)::value;
    const T *dy_rows = static_cast<const T *>(dy);
    if (only_dx) return multiply<SIDE>(p, true, values, dy_rows, nullptr, static_cast<T *>(dx), batch, threads);
    return gradients<SIDE>(p, values, dy_rows, static_cast<const T *>(x), static_cast<T *>(dx), dvalues, dbias, batch,
                           threads);
  });
}

bool takes(const rarefy_mlp *mlp, int64_t batch) {
  const Activations activations = mlp->half_saved == 0 ? FLOAT32 : mlp->half_rows != 0 ? BFLOAT16 : MEDIUM;
  const rarefy_pattern *up = mlp->up.pattern, *down = mlp->down.pattern, *gate = mlp->gate.pattern;
  const auto fits = [&](const rarefy_pattern *p) { return p->block_rows == up->block_rows && takes(p, activations, batch); };
  return fits(up) && fits(down) && (gate == nullptr || fits(gate));
}

int mlp_forward(const rarefy_mlp *mlp, const void *x, void *y, void *z, int64_t batch, int threads) {
  if (!takes(mlp, batch)) return kernels_avx512()->mlp_forward(mlp, x, y, z, batch, threads);
  return with_types(mlp->up.pattern->block_rows, mlp->half_rows != 0, [&](auto side, auto element) {
    using T = decltype(element);
    return mlp_forward<decltype(side)::value>(mlp, static_cast<const T *>(x), static_cast<T *>(y), static_cast<bf16 *>(z),
                                              batch, threads);
  });
}

int mlp_backward(const rarefy_mlp *mlp, const void *dy, const void *x, const void *z, void *dx,
                 const rarefy_mlp_gradients *gradients, int64_t batch, int threads) {
  if (!takes(mlp, batch)) return kernels_avx512()->mlp_backward(mlp, dy, x, z, dx, gradients, batch, threads);
  return with_types(mlp->up.pattern->block_rows, mlp->half_rows != 0, [&](auto side, auto element) {
    using T = decltype(element);
    return mlp_backward<decltype(side)::value>(mlp, static_cast<const T *>(dy), static_cast<const T *>(x),
                                               static_cast<const bf16 *>(z), static_cast<T *>(dx), *gradients, batch,
                                               threads);
  });
}

}  // namespace

// Whether the system lets this process use the tiles: Linux grants them on request.
bool amx_allowed() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

const Kernels *kernels_amx() {
  static const Kernels table = over_avx512("amx", spmm, backward, mlp_forward, mlp_backward);
  return &table;
}

}  // namespace rarefy
