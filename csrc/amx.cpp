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

// target = source times the side's matrix, transposed, + bias, for one panel of tokens.
template <int SIDE, class T>
void multiply_panel(const Side &side, const bf16 *blocks, const word *words, int64_t begin, int64_t end, const float *bias,
                    int64_t features, int64_t tokens, T *target, float *sums) {
  for (int64_t r = begin; r < end; r += kOutputsAtOnce / SIDE) {
    const int64_t stop = min64(r + kOutputsAtOnce / SIDE, end);
    multiply_rows<SIDE>(side, blocks, words, r, stop, sums);
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
      multiply_panel<SIDE>(side, blocks, words, part_begin(side.ptr, side.num_rows, part, parts),
                     part_begin(side.ptr, side.num_rows, part + 1, parts), bias, out, tokens, y + token * out, sums);
    }
  }
  return RAREFY_OK;
}

// How block columns are shared out: chunks of about equal numbers of blocks.
struct Chunks {
  const Side &side;
  int64_t count;
  int64_t begin(int64_t chunk) const { return part_begin(side.ptr, side.num_rows, chunk, count); }
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

// A thread's part in the gradients of one matrix from panels of dy, row-major x, and dx (or null).
template <int SIDE, class T>
void gradients_of(const Side &side, const Chunks &chunks, const bf16 *blocks, const word *dy_words, const bf16 *dy_rows,
                  int64_t out, const T *x, T *dx, int64_t in, int64_t first, int64_t count, int64_t batch,
                  word *x_words, int64_t x_panel, float *sums, float *dvalues, Tiles &tiles) {
#pragma omp for schedule(dynamic, 1)
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    const int64_t begin = chunks.begin(chunk), end = chunks.begin(chunk + 1);
    tiles.shape(SIDE, SIDE / 2, 16);
    for (int64_t at = 0; at < count; ++at) {
      const int64_t token = (first + at) * kTokens, tokens = min64(kTokens, batch - token);
      pack_tokens<SIDE>(x + token * in, in, tokens, begin * SIDE, end * SIDE, x_words + at * x_panel);
      if (dx == nullptr) continue;
      multiply_panel<SIDE>(side, blocks, dy_words + at * out / 2 * kTokens, begin, end, nullptr, in, tokens,
                           dx + token * in, sums);
    }
    tiles.shape(SIDE, 16, SIDE);
    add_columns<SIDE>(side, begin, end, dy_rows, out * kTokens, x_words, x_panel, count, first > 0, dvalues);
  }
}

// dvalues, and dx and dbias unless null, from bfloat16 dy and x. A thread owns block columns of W with all tokens.
template <int SIDE, class T>
int gradients(const rarefy_pattern *p, const float *values, const T *dy, const T *x, T *dx, float *dvalues,
              float *dbias, int64_t batch, int threads) {
  const Side side = side_of(p, true);
  const Chunks chunks = {side, threads > 1 ? 2 * threads : 1};
  const int64_t in = p->in_features, out = p->out_features, panels = ceil_div(batch, kTokens);
  const int64_t group = max64(2, min64(panels, kPanelBytes / max64(1, out * kTokens * 2)));
  const int64_t x_panel = chunks.widest() * (kTokens / 2 * SIDE), own = group * x_panel + kOutputsAtOnce * kTokens;
  bf16 *blocks = nullptr, *dy_rows = nullptr;
  word *dy_words = nullptr, *buffers = nullptr;
  float *bias_parts = nullptr;
  const Scratch memory([&](Carver &carver) {
    blocks = carver.take<bf16>(dx != nullptr ? p->num_units * (SIDE * SIDE) : 0);
    dy_words = carver.take<word>(group * out / 2 * kTokens);
    dy_rows = carver.take<bf16>(group * out * kTokens);
    bias_parts = carver.take<float>(dbias != nullptr ? panels * out : 0);
    buffers = carver.take<word>(threads * own);
  });
  if (memory.failed()) return RAREFY_NO_MEMORY;
#pragma omp parallel num_threads(threads)
  {
    const FlushDenormals flush;
    Tiles tiles;
    if (dx != nullptr) convert_side<SIDE>(side, values, true, blocks);
    word *x_words = buffers + omp_get_thread_num() * own;
    float *sums = reinterpret_cast<float *>(x_words + group * x_panel);
    for (int64_t first = 0; first < panels; first += group) {
      const int64_t count = min64(group, panels - first);
      pack_dy(dy, out, first, count, batch, dy_words, dy_rows, dbias != nullptr ? bias_parts : nullptr);
      gradients_of<SIDE>(side, chunks, blocks, dy_words, dy_rows, out, x, dx, in, first, count, batch, x_words, x_panel,
                         sums, dvalues, tiles);
    }
    if (dbias != nullptr) add_sums(bias_parts, panels, out, dbias);
  }
  return RAREFY_OK;
}

// -- an MLP: see drive_mlp.h. z is stored in bfloat16, (panel, hidden, 64) -------------------------------------------

template <int SIDE, class T>
int mlp_forward(const rarefy_mlp *mlp, const T *x, T *y, bf16 *z, int64_t batch, int threads) {
  const rarefy_pattern *first = mlp->up.pattern, *second = mlp->down.pattern;
  const Side up = side_of(first, false), down = side_of(second, false);
  const int64_t in = first->in_features, hidden = first->out_features, out = second->out_features;
  const int64_t panels = ceil_div(batch, kTokens), own = (in + hidden) / 2 * kTokens + kOutputsAtOnce * kTokens;
  bf16 *up_blocks = nullptr, *down_blocks = nullptr;
  word *buffers = nullptr;
  const Scratch memory([&](Carver &carver) {
    up_blocks = carver.take<bf16>(first->num_units * (SIDE * SIDE));
    down_blocks = carver.take<bf16>(second->num_units * (SIDE * SIDE));
    buffers = carver.take<word>(threads * own);
  });
  if (memory.failed()) return RAREFY_NO_MEMORY;
#pragma omp parallel num_threads(threads)
  {
    const FlushDenormals flush;
    Tiles tiles;
    tiles.shape(SIDE, SIDE / 2, 16);
    convert_side<SIDE>(up, mlp->up.values, false, up_blocks);
    convert_side<SIDE>(down, mlp->down.values, false, down_blocks);
#pragma omp barrier
    word *x_words = buffers + omp_get_thread_num() * own, *h_words = x_words + in / 2 * kTokens;
    float *sums = reinterpret_cast<float *>(h_words + hidden / 2 * kTokens);
#pragma omp for schedule(dynamic, 1)
    for (int64_t at = 0; at < panels; ++at) {
      const int64_t token = at * kTokens, tokens = min64(kTokens, batch - token);
      pack_pairs(x + token * in, in, tokens, 0, in, x_words);
      for (int64_t r = 0; r < up.num_rows; r += kOutputsAtOnce / SIDE) {
        const int64_t stop = min64(r + kOutputsAtOnce / SIDE, up.num_rows);
        multiply_rows<SIDE>(up, up_blocks, x_words, r, stop, sums);
        with_activation(mlp->activation, [&](auto activation) {
          for (int64_t f = r * SIDE; f < stop * SIDE; f += 2) {
            for (int64_t group = 0; group < kTokens; group += VL) {
              vec h[2], slope;
              for (int i = 0; i < 2; ++i) {
                const vec start = mlp->up.bias != nullptr ? broadcast(mlp->up.bias[f + i]) : vec{};
                bf16 *place = z + (at * hidden + f + i) * kTokens + group;
                store_any(place, load(sums + (f + i - r * SIDE) * kTokens + group) + start);
                activate<decltype(activation)::value>(load_any(place), h[i], slope);
              }
              store(reinterpret_cast<float *>(h_words + f / 2 * kTokens + group), join_pairs(h[0], h[1]));
            }
          }
        });
      }
      multiply_panel<SIDE>(down, down_blocks, h_words, 0, down.num_rows, mlp->down.bias, out, tokens, y + token * out, sums);
    }
  }
  return RAREFY_OK;
}

template <int SIDE, class T>
int mlp_backward(const rarefy_mlp *mlp, const T *dy, const T *x, const bf16 *z, T *dx,
                 const rarefy_layer_gradients &d_up, const rarefy_layer_gradients &d_down, int64_t batch, int threads) {
  const rarefy_pattern *up_pattern = mlp->up.pattern, *down_pattern = mlp->down.pattern;
  const Side up = side_of(up_pattern, true), down = side_of(down_pattern, true);
  const Chunks up_chunks = {up, threads > 1 ? 2 * threads : 1}, down_chunks = {down, threads > 1 ? 2 * threads : 1};
  const int64_t in = up_pattern->in_features, hidden = up_pattern->out_features, out = down_pattern->out_features;
  const int64_t panels = ceil_div(batch, kTokens);
  const int64_t group = max64(2, min64(panels, 2 * kPanelBytes / max64(1, (out + hidden) * kTokens * 2)));
  const int64_t up_panel = up_chunks.widest() * (kTokens / 2 * SIDE), down_panel = down_chunks.widest() * (kTokens / 2 * SIDE);
  const int64_t own = group * max64(up_panel, down_panel) + 2 * kOutputsAtOnce * kTokens;
  bf16 *up_blocks = nullptr, *down_blocks = nullptr, *dy_rows = nullptr, *dz_rows = nullptr;
  word *dy_words = nullptr, *dz_words = nullptr, *buffers = nullptr;
  float *up_parts = nullptr, *down_parts = nullptr;
  const Scratch memory([&](Carver &carver) {
    up_blocks = carver.take<bf16>(up_pattern->num_units * (SIDE * SIDE));
    down_blocks = carver.take<bf16>(down_pattern->num_units * (SIDE * SIDE));
    dy_words = carver.take<word>(group * out / 2 * kTokens);
    dz_words = carver.take<word>(group * hidden / 2 * kTokens);
    dy_rows = carver.take<bf16>(group * out * kTokens);
    dz_rows = carver.take<bf16>(group * hidden * kTokens);
    up_parts = carver.take<float>(panels * hidden);
    down_parts = carver.take<float>(d_down.bias != nullptr ? panels * out : 0);
    buffers = carver.take<word>(threads * own);
  });
  if (memory.failed()) return RAREFY_NO_MEMORY;
#pragma omp parallel num_threads(threads)
  {
    const FlushDenormals flush;
    Tiles tiles;
    if (dx != nullptr) convert_side<SIDE>(up, mlp->up.values, true, up_blocks);
    convert_side<SIDE>(down, mlp->down.values, true, down_blocks);
    word *words = buffers + omp_get_thread_num() * own;
    float *sums = reinterpret_cast<float *>(words + group * max64(up_panel, down_panel));
    bf16 *h_rows = reinterpret_cast<bf16 *>(sums + kOutputsAtOnce * kTokens);
    for (int64_t first = 0; first < panels; first += group) {
      const int64_t count = min64(group, panels - first);
      pack_dy(dy, out, first, count, batch, dy_words, dy_rows, d_down.bias != nullptr ? down_parts : nullptr);
#pragma omp for schedule(dynamic, 1)
      for (int64_t chunk = 0; chunk < down_chunks.count; ++chunk) {
        const int64_t begin = down_chunks.begin(chunk), end = down_chunks.begin(chunk + 1);
        tiles.shape(SIDE, SIDE / 2, 16);
        for (int64_t at = 0; at < count; ++at) {
          for (int64_t r = begin; r < end; r += kOutputsAtOnce / SIDE) {
            const int64_t stop = min64(r + kOutputsAtOnce / SIDE, end);
            multiply_rows<SIDE>(down, down_blocks, dy_words + at * out / 2 * kTokens, r, stop, sums);
            with_activation(mlp->activation, [&](auto activation) {
              for (int64_t f = r * SIDE; f < stop * SIDE; f += 2) {
                vec total[2] = {};
                for (int64_t lane = 0; lane < kTokens; lane += VL) {
                  vec dz[2];
                  for (int i = 0; i < 2; ++i) {
                    const int64_t local = (f + i - r * SIDE) * kTokens + lane;
                    vec h, slope;
                    const vec stored = load_any(z + ((first + at) * hidden + f + i) * kTokens + lane);
                    activate<decltype(activation)::value>(stored, h, slope);
                    dz[i] = load(sums + local) * slope;
                    total[i] += dz[i];
                    store_any(h_rows + local, h);
                    store_any(dz_rows + (at * hidden + f + i) * kTokens + lane, dz[i]);
                  }
                  store(reinterpret_cast<float *>(dz_words + (at * hidden + f) / 2 * kTokens + lane), join_pairs(dz[0], dz[1]));
                }
                for (int i = 0; i < 2; ++i) up_parts[(first + at) * hidden + f + i] = _mm512_reduce_add_ps(total[i]);
              }
            });
            for (int64_t c = r; c < stop; ++c) {
              pair_tokens<SIDE>(h_rows + (c - r) * SIDE * kTokens,
                                words + at * down_panel + (c - begin) * (kTokens / 2 * SIDE));
            }
          }
        }
        tiles.shape(SIDE, 16, SIDE);
        add_columns<SIDE>(down, begin, end, dy_rows, out * kTokens, words, down_panel, count, first > 0, d_down.values);
      }
      gradients_of<SIDE>(up, up_chunks, up_blocks, dz_words, dz_rows, hidden, x, dx, in, first, count, batch, words,
                         up_panel, sums, d_up.values, tiles);
    }
    if (d_up.bias != nullptr) add_sums(up_parts, panels, hidden, d_up.bias);
    if (d_down.bias != nullptr) add_sums(down_parts, panels, out, d_down.bias);
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
  const rarefy_pattern *up = mlp->up.pattern, *down = mlp->down.pattern;
  const Activations activations = mlp->half_saved == 0 ? FLOAT32 : mlp->half_rows != 0 ? BFLOAT16 : MEDIUM;
  return mlp->gate.pattern == nullptr && up->block_rows == down->block_rows && takes(up, activations, batch) &&
         takes(down, activations, batch);
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
                                               static_cast<const bf16 *>(z), static_cast<T *>(dx), gradients->up,
                                               gradients->down, batch, threads);
  });
}

}  // namespace

// Whether the system lets this process use the tiles: Linux grants them on request.
bool amx_allowed() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

const Kernels *kernels_amx() {
  static const Kernels table = [] {
    Kernels kernels = *kernels_avx512();
    kernels.name = "amx";
    kernels.spmm = spmm;
    kernels.backward = backward;
    kernels.mlp_forward = mlp_forward;
    kernels.mlp_backward = mlp_backward;
    return kernels;
  }();
  return &table;
}

}  // namespace rarefy
