// Panels: P = NV * VL tokens side by side for each feature, so that a nonzero works on whole cache lines.
// panel[feature][P], feature-major, in cells (cells.h); a row-major matrix has one token a row and float32 or bfloat16
// elements.
// Lanes past the last token are zero.
#pragma once

#include "cells.h"
#if defined(RAREFY_DOT_CELLS)
#include "pack_bf16.h"
#endif

namespace rarefy {
namespace {

constexpr int64_t kPieceFeatures = 256;  // what a thread packs at a time where threads share a panel

#if !defined(RAREFY_DOT_CELLS)
// panel[f - begin] for the features begin <= f < end of `tokens` <= P rows of `source`, whose row length is `stride`.
template <int NV, class T>
void pack(const T *source, int64_t stride, int64_t tokens, int64_t begin, int64_t end, float *panel) {
  constexpr int P = NV * VL;
  for (int group = 0; group < NV; ++group) {
    const int64_t live = min64(max64(tokens - group * VL, 0), VL);
    const T *rows = source + group * VL * stride;
    float *out = panel + group * VL;
    int64_t f = begin;
    if (live == VL) {
      for (; f + VL <= end; f += VL) {
        vec block[VL];
#pragma GCC unroll 16
        for (int i = 0; i < VL; ++i) block[i] = load_any(rows + i * stride + f);
        transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < VL; ++i) store(out + (f - begin + i) * P, block[i]);
      }
    } else if (live > 0) {
      for (; f + VL <= end; f += VL) {
        vec block[VL];
#pragma GCC unroll 16
        for (int i = 0; i < VL; ++i) block[i] = i < live ? load_any(rows + i * stride + f) : vec{};
        transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < VL; ++i) store(out + (f - begin + i) * P, block[i]);
      }
    }
    for (; f < end; ++f) {
      float *lane = out + (f - begin) * P;
      for (int64_t t = 0; t < live; ++t) lane[t] = widen(rows[t * stride + f]);
      for (int64_t t = live; t < VL; ++t) lane[t] = 0.0f;
    }
  }
}
#endif

// The reverse: target[token][f] for begin <= f < end from panel[f - begin]; only `tokens` rows are written.
template <int NV, class T>
void unpack(const float *panel, int64_t stride, int64_t tokens, int64_t begin, int64_t end, T *target) {
  constexpr int P = NV * VL;
  for (int group = 0; group < NV; ++group) {
    const int64_t live = min64(max64(tokens - group * VL, 0), VL);
    T *rows = target + group * VL * stride;
    const float *in = panel + group * VL;
    int64_t f = begin;
    for (; live > 0 && f + VL <= end; f += VL) {
      vec block[VL];
#pragma GCC unroll 16
      for (int i = 0; i < VL; ++i) block[i] = load(in + (f - begin + i) * P);
      transpose(block);
      if (live == VL) {
#pragma GCC unroll 16
        for (int i = 0; i < VL; ++i) store_any(rows + i * stride + f, block[i]);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < VL; ++i) {
          if (i < live) store_any(rows + i * stride + f, block[i]);
        }
      }
    }
    for (; f < end; ++f) {
      for (int64_t t = 0; t < live; ++t) narrow_to(rows + t * stride + f, in[(f - begin) * P + t]);
    }
  }
}

// sums[f - begin] = the sum over the tokens of column f, in the order of the tokens.
template <class T>
void column_sums(const T *source, int64_t stride, int64_t tokens, int64_t begin, int64_t end, float *sums) {
  int64_t f = begin;
  for (; f + VL <= end; f += VL) {
    vec sum = {};
    for (int64_t t = 0; t < tokens; ++t) sum += load_any(source + t * stride + f);
    store_any(sums + f - begin, sum);
  }
  for (; f < end; ++f) {
    float sum = 0.0f;
    for (int64_t t = 0; t < tokens; ++t) sum += widen(source[t * stride + f]);
    sums[f - begin] = sum;
  }
}

// total[f] = the sum of the parts of column f, in their order: parts[count][features]. To be called by all threads.
inline void add_sums(const float *parts, int64_t count, int64_t features, float *total) {
#pragma omp for schedule(static)
  for (int64_t f = 0; f < features; ++f) {
    float sum = 0.0f;
    for (int64_t at = 0; at < count; ++at) sum += parts[at * features + f];
    total[f] = sum;
  }
}

// Row-major activations of a caller, of either element type.
struct RowMajor {
  const void *data;
  int64_t features;
  bool half;  // bfloat16
  int64_t element_bytes() const { return half ? 2 : 4; }
  const char *at(int64_t token, int64_t f) const {
    return static_cast<const char *>(data) + (token * features + f) * element_bytes();
  }
};

template <int NV>
void pack_rows(const RowMajor &rows, int64_t token, int64_t tokens, int64_t begin, int64_t end, cell *panel) {
  if (rows.half) {
    pack<NV>(reinterpret_cast<const bf16 *>(rows.at(token, 0)), rows.features, tokens, begin, end, panel);
  } else {
    pack<NV>(reinterpret_cast<const float *>(rows.at(token, 0)), rows.features, tokens, begin, end, panel);
  }
}

template <int NV>
void unpack_rows(const float *panel, int64_t token, int64_t tokens, int64_t begin, int64_t end, const RowMajor &rows) {
  char *target = const_cast<char *>(rows.at(token, 0));
  if (rows.half) {
    unpack<NV>(panel, rows.features, tokens, begin, end, reinterpret_cast<bf16 *>(target));
  } else {
    unpack<NV>(panel, rows.features, tokens, begin, end, reinterpret_cast<float *>(target));
  }
}

inline void sum_columns(const RowMajor &rows, int64_t token, int64_t tokens, int64_t begin, int64_t end, float *sums) {
  if (rows.half) {
    column_sums(reinterpret_cast<const bf16 *>(rows.at(token, 0)), rows.features, tokens, begin, end, sums);
  } else {
    column_sums(reinterpret_cast<const float *>(rows.at(token, 0)), rows.features, tokens, begin, end, sums);
  }
}

}  // namespace
}  // namespace rarefy
