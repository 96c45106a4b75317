// Blocks of 8x8 and 16x16 on AMX, the matrix unit of recent Xeons, on which dense bfloat16 products run there: with bfloat16
// activations, or with float32 ones whose products may round to bfloat16. Everything else of this instruction set is
// AVX-512's.
//
// A tile register holds up to 16 rows of 64 bytes. One instruction adds A (rows of 2K bfloat16) times B (K rows of pairs,
// each of two consecutive k) to C (float32), in as many cycles as A has rows. Products are taken with the weights as A, so that B and C have tokens along
// their rows, as panels do:
//
//   y, dx   C[output][token]  += W[output][input] B[input pair][token]      one block of W, K its side / 2
//   dW      C[output][input]  += dy[output][token] B[token pair][input]     one block of dW, K = 16
//
// Pairs of neighbouring features are 32-bit words in a row-major matrix, so packing is a transpose of words.
#include <omp.h>

#include "internal.h"

#include "activation.h"
#include "pack.h"
#include "view.h"

#include <sys/syscall.h>
#include <unistd.h>

namespace rarefy {
namespace {

constexpr int64_t kTokens = 64;                     // of a panel
constexpr int64_t kPanelBytes = int64_t(1) << 20;   // panels of dy, in one of two layouts, that the threads share in L2
constexpr int64_t kFewTokens = 64;                  // below, the vector kernels

// Tiles: 0 to 3 sums, 4 and 5 the A operand, 6 and 7 the B operand.
struct __attribute__((packed)) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// Sets the tiles' shapes, and brings back what was set before: the caller's own libraries use them too.
class Tiles {
 public:
  Tiles() { _tile_storeconfig(&before_); }
  ~Tiles() {
    if (before_.palette != 0) {
      _tile_loadconfig(&before_);
    } else {
      _tile_release();
    }
  }
  Tiles(const Tiles &) = delete;
  Tiles &operator=(const Tiles &) = delete;
  // Of a product whose A operand and sums have `rows`, over `pairs`, with sums of `cols`.
  void shape(int64_t rows, int64_t pairs, int64_t cols) {
    TileConfig config = {};
    config.palette = 1;
    for (int t = 0; t < 8; ++t) {
      config.rows[t] = uint8_t(t < 6 ? rows : pairs);
      config.row_bytes[t] = uint16_t(4 * (t == 4 || t == 5 ? pairs : cols));
    }
    _tile_loadconfig(&config);
  }

 private:
  TileConfig before_;
};

typedef uint32_t word;

inline vec load_words(const void *p) { return load_any(static_cast<const float *>(p)); }

// `count` pairs of neighbouring features as words: bfloat16 as they are, float32 rounded.
inline vec load_pairs(const bf16 *row, int64_t count) {
  return _mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), row);
}
inline vec load_pairs(const float *row, int64_t count) {
  const auto part = [row, count](int64_t begin) {
    const int64_t live = min64(max64(2 * count - begin, 0), VL);
    return _mm512_maskz_loadu_ps(__mmask16((1u << live) - 1), row + begin);
  };
  return reinterpret_cast<vec>(_mm512_cvtne2ps_pbh(part(VL), part(0)));
}
// SIDE features of one token as the lower halves of words.
template <int SIDE>
inline __m512i load_low(const bf16 *row) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(__mmask16((1u << SIDE) - 1), row));
}
template <int SIDE>
inline __m512i load_low(const float *row) {
  return _mm512_cvtepu16_epi32(__m256i(_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(__mmask16((1u << SIDE) - 1), row))));
}

// words[(f - begin) / 2][64] of the features [begin, end), multiples of 16, of up to 64 tokens; tokens past the last are 0.
template <class T>
void pack_pairs(const T *source, int64_t features, int64_t tokens, int64_t begin, int64_t end, word *words) {
  for (int64_t group = 0; group < kTokens; group += VL) {
    for (int64_t f = begin; f < end; f += 2 * VL) {
      const int64_t count = min64(VL, (end - f) / 2);
      vec block[VL];
#pragma GCC unroll 16
      for (int i = 0; i < VL; ++i) {
        block[i] = group + i < tokens ? load_pairs(source + (group + i) * features + f, count) : vec{};
      }
      transpose(block);
      for (int64_t w = 0; w < count; ++w) store(reinterpret_cast<float *>(words + ((f - begin) / 2 + w) * kTokens + group), block[w]);
    }
  }
}

// Two rows of 16 float32 to 16 words of bfloat16 pairs.
inline vec join_pairs(vec even, vec odd) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                         20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i both = __m512i(_mm512_cvtne2ps_pbh(odd, even));
  return reinterpret_cast<vec>(_mm512_permutexvar_epi16(order, both));
}

// The reverse of pack_pairs, from float32 sums[f - begin][64], plus bias unless null.
void unpack_sums(const float *sums, const float *bias, int64_t features, int64_t tokens, int64_t begin, int64_t end,
                 bf16 *target) {
  for (int64_t group = 0; group < tokens; group += VL) {
    for (int64_t f = begin; f < end; f += 2 * VL) {
      const int64_t count = min64(VL, (end - f) / 2);
      const __mmask16 mask = __mmask16((1u << count) - 1);
      vec block[VL];
      for (int64_t w = 0; w < VL; ++w) {
        if (w >= count) {
          block[w] = vec{};
          continue;
        }
        const float *row = sums + (f - begin + 2 * w) * kTokens + group;
        vec even = load(row), odd = load(row + kTokens);
        if (bias != nullptr) {
          even += broadcast(bias[f + 2 * w]);
          odd += broadcast(bias[f + 2 * w + 1]);
        }
        block[w] = join_pairs(even, odd);
      }
      transpose(block);
      for (int64_t i = 0; i < min64(VL, tokens - group); ++i) {
        _mm512_mask_storeu_ps(target + (group + i) * features + f, mask, block[i]);
      }
    }
  }
}

inline void unpack_sums(const float *sums, const float *bias, int64_t features, int64_t tokens, int64_t begin, int64_t end,
                        float *target) {
  for (int64_t group = 0; group < tokens; group += VL) {
    for (int64_t f = begin; f < end; f += VL) {
      const int64_t count = min64(VL, end - f);
      vec block[VL];
      for (int64_t i = 0; i < VL; ++i) {
        block[i] = i < count ? load(sums + (f - begin + i) * kTokens + group) : vec{};
        if (i < count && bias != nullptr) block[i] += broadcast(bias[f + i]);
      }
      transpose(block);
      for (int64_t i = 0; i < min64(VL, tokens - group); ++i) {
        _mm512_mask_storeu_ps(target + (group + i) * features + f, __mmask16((1u << count) - 1), block[i]);
      }
    }
  }
}

// rows[f][64] of bfloat16, a token after the other, from words[f / 2][64].
void split_pairs(const word *words, int64_t features, bf16 *rows) {
  for (int64_t w = 0; w < features / 2; ++w) {
    for (int64_t group = 0; group < kTokens; group += VL) {
      const __m512i both = _mm512_loadu_si512(words + w * kTokens + group);
      bf16 *even = rows + 2 * w * kTokens + group;
      _mm256_storeu_si256(reinterpret_cast<__m256i *>(even), _mm512_cvtepi32_epi16(both));
      _mm256_storeu_si256(reinterpret_cast<__m256i *>(even + kTokens), _mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)));
    }
  }
}

// words[(f - begin) / SIDE][token / 2][SIDE]: pairs of neighbouring tokens.
template <int SIDE, class T>
void pack_tokens(const T *source, int64_t features, int64_t tokens, int64_t begin, int64_t end, word *words) {
  constexpr __mmask16 mask = __mmask16((1u << SIDE) - 1);
  const auto read = [&](int64_t t, int64_t f) {
    return t < tokens ? load_low<SIDE>(source + t * features + f) : _mm512_setzero_si512();
  };
  for (int64_t t = 0; t < kTokens; t += 2) {
    for (int64_t f = begin; f < end; f += SIDE) {
      const __m512i pairs = _mm512_or_si512(read(t, f), _mm512_slli_epi32(read(t + 1, f), 16));
      _mm512_mask_storeu_epi32(words + ((f - begin) / SIDE * (kTokens / 2) + t / 2) * SIDE, mask, pairs);
    }
  }
}

// A block of values as an A operand: bfloat16, [output][input], or its transpose.
template <int SIDE>
void convert_block(const float *values, bool transposed, bf16 *block) {
  constexpr __mmask16 mask = __mmask16((1u << SIDE) - 1);
  vec rows[VL] = {};
#pragma GCC unroll 16
  for (int i = 0; i < SIDE; ++i) rows[i] = _mm512_maskz_loadu_ps(mask, values + i * SIDE);
  if (transposed) transpose(rows);
#pragma GCC unroll 16
  for (int i = 0; i < SIDE; ++i) {
    _mm256_mask_storeu_epi16(block + i * SIDE, mask, __m256i(_mm512_cvtneps_pbh(rows[i])));
  }
}

struct Columns {  // of either index type
  const void *data;
  bool narrow;
  int64_t operator[](int64_t k) const {
    return narrow ? static_cast<const uint16_t *>(data)[k] : static_cast<const int32_t *>(data)[k];
  }
};

// One orientation of the pattern: W, or W^T.
struct Side {
  int64_t num_rows;
  const int32_t *ptr;
  Columns cols;
  const int32_t *perm;  // null: units are in this order
};

Side side_of(const rarefy_pattern *p, bool transposed) {
  const bool narrow = p->index_bytes == 2;
  if (transposed) return {p->in_features / p->block_cols, p->t_crow, {p->t_rows, narrow}, p->t_perm};
  return {p->out_features / p->block_rows, p->crow, {p->cols, narrow}, nullptr};
}

// The blocks in the side's order. To be called by all threads; ends without a barrier.
template <int SIDE>
void convert_side(const Side &side, const float *values, bool transposed, bf16 *blocks) {
#pragma omp for schedule(static) nowait
  for (int32_t k = 0; k < side.ptr[side.num_rows]; ++k) {
    const int64_t from = side.perm != nullptr ? side.perm[k] : k;
    convert_block<SIDE>(values + from * (SIDE * SIDE), transposed, blocks + int64_t(k) * (SIDE * SIDE));
  }
}

// sums[r - begin][SIDE][64] of the block rows [begin, end) over one panel of words[input / 2][64].
template <int SIDE>
void multiply_rows(const Side &side, const bf16 *blocks, const word *words, int64_t begin, int64_t end, float *sums) {
  for (int64_t r = begin; r < end; ++r) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = side.ptr[r]; k < side.ptr[r + 1]; ++k) {
      const word *x = words + side.cols[k] * (SIDE / 2 * kTokens);
      _tile_loadd(4, blocks + k * (SIDE * SIDE), SIDE * 2);
      _tile_loadd(6, x, kTokens * 4);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, x + 16, kTokens * 4);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(6, x + 32, kTokens * 4);
      _tile_dpbf16ps(2, 4, 6);
      _tile_loadd(7, x + 48, kTokens * 4);
      _tile_dpbf16ps(3, 4, 7);
    }
    float *out = sums + (r - begin) * SIDE * kTokens;
    _tile_stored(0, out, kTokens * 4);
    _tile_stored(1, out + 16, kTokens * 4);
    _tile_stored(2, out + 32, kTokens * 4);
    _tile_stored(3, out + 48, kTokens * 4);
  }
}

constexpr int64_t kOutputsAtOnce = 64;  // whose sums are unpacked together: whole cache lines, and sums in L1

// target = source times the side's matrix, transposed, + bias, for one panel of tokens.
template <int SIDE, class T>
void multiply_panel(const Side &side, const bf16 *blocks, const word *words, int64_t begin, int64_t end, const float *bias,
                    int64_t features, int64_t tokens, T *target, float *sums) {
  for (int64_t r = begin; r < end; r += kOutputsAtOnce / SIDE) {
    const int64_t stop = min64(r + kOutputsAtOnce / SIDE, end);
    multiply_rows<SIDE>(side, blocks, words, r, stop, sums);
    unpack_sums(sums, bias, features, tokens, r * SIDE, stop * SIDE, target);
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
  Carver carver = {nullptr, 0};
  Lease lease = {nullptr, 0};
  for (int pass = 0; pass < 2; ++pass) {
    blocks = carver.take<bf16>(p->num_units * (SIDE * SIDE));
    buffers = carver.take<word>(threads * own);
    if (pass == 0) {
      lease = lease_acquire(carver.used);
      if (lease.data == nullptr) return RAREFY_NO_MEMORY;
      carver = {lease.data, 0};
    }
  }
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
  lease_release(lease);
  return RAREFY_OK;
}

// dvalues of the blocks [k, k + COUNT) of one block column, in W^T's order, from `count` panels.
template <int SIDE, int COUNT>
void add_products(const Side &side, int64_t k, const bf16 *dy_rows, int64_t panel_rows, const word *x, int64_t x_panel,
                  int64_t count, bool add, float *dvalues) {
  float *to[4];
  const bf16 *from[4];
  for (int i = 0; i < COUNT; ++i) {
    to[i] = dvalues + int64_t(side.perm[k + i]) * (SIDE * SIDE);
    from[i] = dy_rows + side.cols[k + i] * (SIDE * kTokens);
  }
#define RAREFY_EACH(STEP)     \
  STEP(0, 4)                  \
  if (COUNT > 1) { STEP(1, 5) } \
  if (COUNT > 2) { STEP(2, 4) } \
  if (COUNT > 3) { STEP(3, 5) }
#define RAREFY_START(i, a)                   \
  if (add) {                                 \
    _tile_loadd(i, to[i], SIDE * 4);        \
  } else {                                   \
    _tile_zero(i);                           \
  }
#define RAREFY_STEP(i, a)                                              \
  _tile_loadd(a, from[i] + at * panel_rows + half, kTokens * 2);       \
  _tile_dpbf16ps(i, a, 6);
#define RAREFY_STOP(i, a) _tile_stored(i, to[i], SIDE * 4);
  RAREFY_EACH(RAREFY_START)
  for (int64_t at = 0; at < count; ++at) {
    for (int64_t half = 0; half < kTokens; half += 32) {
      _tile_loadd(6, x + at * x_panel + half / 2 * SIDE, SIDE * 4);
      RAREFY_EACH(RAREFY_STEP)
    }
  }
  RAREFY_EACH(RAREFY_STOP)
#undef RAREFY_EACH
#undef RAREFY_START
#undef RAREFY_STEP
#undef RAREFY_STOP
}

// dvalues of the block columns [begin, end) from `count` panels; see add_products.
template <int SIDE>
void add_columns(const Side &side, int64_t begin, int64_t end, const bf16 *dy_rows, int64_t panel_rows, const word *x,
                 int64_t x_panel, int64_t count, bool add, float *dvalues) {
  for (int64_t c = begin; c < end; ++c) {
    const word *own_x = x + (c - begin) * (kTokens / 2 * SIDE);
    int64_t k = side.ptr[c];
    for (; k + 4 <= side.ptr[c + 1]; k += 4) {
      add_products<SIDE, 4>(side, k, dy_rows, panel_rows, own_x, x_panel, count, add, dvalues);
    }
    for (; k < side.ptr[c + 1]; ++k) {
      add_products<SIDE, 1>(side, k, dy_rows, panel_rows, own_x, x_panel, count, add, dvalues);
    }
  }
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
  const int64_t pieces = ceil_div(out, 256);
#pragma omp for schedule(dynamic, 1)
  for (int64_t task = 0; task < count * pieces; ++task) {
    const int64_t at = task / pieces, token = (first + at) * kTokens, tokens = min64(kTokens, batch - token);
    const int64_t f0 = task % pieces * 256, f1 = min64(f0 + 256, out);
    word *words = dy_words + (at * out + f0) / 2 * kTokens;
    pack_pairs(dy + token * out, out, tokens, f0, f1, words);
    split_pairs(words, f1 - f0, dy_rows + (at * out + f0) * kTokens);
    if (bias_parts != nullptr) column_sums(dy + token * out, out, tokens, f0, f1, bias_parts + (first + at) * out + f0);
  }
}

// To be called by all threads.
void add_bias_parts(const float *parts, int64_t panels, int64_t out, float *dbias) {
#pragma omp for schedule(static)
  for (int64_t f = 0; f < out; ++f) {
    float sum = 0.0f;
    for (int64_t at = 0; at < panels; ++at) sum += parts[at * out + f];
    dbias[f] = sum;
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
  Carver carver = {nullptr, 0};
  Lease lease = {nullptr, 0};
  for (int pass = 0; pass < 2; ++pass) {
    blocks = carver.take<bf16>(dx != nullptr ? p->num_units * (SIDE * SIDE) : 0);
    dy_words = carver.take<word>(group * out / 2 * kTokens);
    dy_rows = carver.take<bf16>(group * out * kTokens);
    bias_parts = carver.take<float>(dbias != nullptr ? panels * out : 0);
    buffers = carver.take<word>(threads * own);
    if (pass == 0) {
      lease = lease_acquire(carver.used);
      if (lease.data == nullptr) return RAREFY_NO_MEMORY;
      carver = {lease.data, 0};
    }
  }
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
    if (dbias != nullptr) add_bias_parts(bias_parts, panels, out, dbias);
  }
  lease_release(lease);
  return RAREFY_OK;
}

// -- an MLP: see drive_mlp.h. z is stored in bfloat16, (panel, hidden, 64) -------------------------------------------

// The activation and its derivative at stored inputs, VL tokens of one feature.
template <int ACTIVATION>
inline void activate_at(const bf16 *z, vec &h, vec &slope) {
  activate<ACTIVATION>(load_any(z), h, slope);
}

template <int SIDE, class T>
int mlp_forward(const rarefy_mlp *mlp, const T *x, T *y, bf16 *z, int64_t batch, int threads) {
  const rarefy_pattern *first = mlp->up.pattern, *second = mlp->down.pattern;
  const Side up = side_of(first, false), down = side_of(second, false);
  const int64_t in = first->in_features, hidden = first->out_features, out = second->out_features;
  const int64_t panels = ceil_div(batch, kTokens), own = (in + hidden) / 2 * kTokens + kOutputsAtOnce * kTokens;
  bf16 *up_blocks = nullptr, *down_blocks = nullptr;
  word *buffers = nullptr;
  Carver carver = {nullptr, 0};
  Lease lease = {nullptr, 0};
  for (int pass = 0; pass < 2; ++pass) {
    up_blocks = carver.take<bf16>(first->num_units * (SIDE * SIDE));
    down_blocks = carver.take<bf16>(second->num_units * (SIDE * SIDE));
    buffers = carver.take<word>(threads * own);
    if (pass == 0) {
      lease = lease_acquire(carver.used);
      if (lease.data == nullptr) return RAREFY_NO_MEMORY;
      carver = {lease.data, 0};
    }
  }
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
                activate_at<decltype(activation)::value>(place, h[i], slope);
              }
              store(reinterpret_cast<float *>(h_words + f / 2 * kTokens + group), join_pairs(h[0], h[1]));
            }
          }
        });
      }
      multiply_panel<SIDE>(down, down_blocks, h_words, 0, down.num_rows, mlp->down.bias, out, tokens, y + token * out, sums);
    }
  }
  lease_release(lease);
  return RAREFY_OK;
}

// words[token / 2][SIDE] of SIDE features from rows[SIDE][64].
template <int SIDE>
void pair_tokens(const bf16 *rows, word *words) {
  constexpr __mmask16 mask = __mmask16((1u << SIDE) - 1);
  for (int half = 0; half < 2; ++half) {
    vec block[VL] = {};
#pragma GCC unroll 16
    for (int i = 0; i < SIDE; ++i) block[i] = load_words(rows + i * kTokens + half * 32);
    transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < VL; ++i) _mm512_mask_storeu_ps(words + (half * 16 + i) * SIDE, mask, block[i]);
  }
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
  Carver carver = {nullptr, 0};
  Lease lease = {nullptr, 0};
  for (int pass = 0; pass < 2; ++pass) {
    up_blocks = carver.take<bf16>(up_pattern->num_units * (SIDE * SIDE));
    down_blocks = carver.take<bf16>(down_pattern->num_units * (SIDE * SIDE));
    dy_words = carver.take<word>(group * out / 2 * kTokens);
    dz_words = carver.take<word>(group * hidden / 2 * kTokens);
    dy_rows = carver.take<bf16>(group * out * kTokens);
    dz_rows = carver.take<bf16>(group * hidden * kTokens);
    up_parts = carver.take<float>(panels * hidden);
    down_parts = carver.take<float>(d_down.bias != nullptr ? panels * out : 0);
    buffers = carver.take<word>(threads * own);
    if (pass == 0) {
      lease = lease_acquire(carver.used);
      if (lease.data == nullptr) return RAREFY_NO_MEMORY;
      carver = {lease.data, 0};
    }
  }
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
                    activate_at<decltype(activation)::value>(z + ((first + at) * hidden + f + i) * kTokens + lane, h, slope);
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
    if (d_up.bias != nullptr) add_bias_parts(up_parts, panels, hidden, d_up.bias);
    if (d_down.bias != nullptr) add_bias_parts(down_parts, panels, out, d_down.bias);
  }
  lease_release(lease);
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
    return multiply<decltype(side)::value>(p, false, values, static_cast<const T *>(x), bias, static_cast<T *>(y), batch, threads);
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
    return gradients<SIDE>(p, values, dy_rows, static_cast<const T *>(x), static_cast<T *>(dx), dvalues, dbias, batch, threads);
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
