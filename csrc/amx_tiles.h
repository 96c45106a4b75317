// Products on AMX, of blocks of 8x8 and 16x16.
//
// A tile register holds up to 16 rows of 64 bytes. One instruction adds A (rows of 2K bfloat16) times B (K rows of pairs,
// each of two consecutive k) to C (float32), in about as many cycles as A has rows. So the weights are A, with the rows of
// a block, and B and C have tokens along their rows, as panels do:
//
//   y, dx   C[output][token]  += W[output][input] B[input pair][token]      one block of W, K its side / 2
//   dW      C[output][input]  += dy[output][token] B[token pair][input]     one block of dW, K = 16
#pragma once

#include "amx_layouts.h"

namespace rarefy {
namespace {

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

inline Side side_of(const rarefy_pattern *p, bool transposed) {
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

// sums[r - begin][SIDE][64] of the block rows [begin, end) over one panel of words[input / 2][64], on top of what is there
// if `add`.
template <int SIDE>
void multiply_rows(const Side &side, const bf16 *blocks, const word *words, int64_t begin, int64_t end, bool add,
                   float *sums) {
  for (int64_t r = begin; r < end; ++r) {
    float *out = sums + (r - begin) * SIDE * kTokens;
    if (add) {
      _tile_loadd(0, out, kTokens * 4);
      _tile_loadd(1, out + 16, kTokens * 4);
      _tile_loadd(2, out + 32, kTokens * 4);
      _tile_loadd(3, out + 48, kTokens * 4);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
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
    _tile_stored(0, out, kTokens * 4);
    _tile_stored(1, out + 16, kTokens * 4);
    _tile_stored(2, out + 32, kTokens * 4);
    _tile_stored(3, out + 48, kTokens * 4);
  }
}

// sums[row][64] += value[row].
inline void add_rows(const float *value, int64_t rows, float *sums) {
  for (int64_t r = 0; r < rows; ++r) {
    const vec add = broadcast(value[r]);
    for (int64_t t = 0; t < kTokens; t += VL) store(sums + r * kTokens + t, load(sums + r * kTokens + t) + add);
  }
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

}  // namespace
}  // namespace rarefy
