// Scores of links by the three-step paths that they close (src/rarefy/methods/topology.py): VL lines of the graph at a time,
// one a lane, so that all sums run over vectors that stay in the cache. Sums go by pieces of columns, as those of the products
// that would do the same go by tiles: so the scores have the same bits.
#pragma once

#include <omp.h>

#include "drive_tiled.h"

namespace rarefy {
namespace {

// Lane l of marks (num, VL) says which entries line first + l has.
template <class Index>
inline void mark_lines(const View<Index> &lines, int64_t first, int64_t last, float *marks, float mark) {
  for (int64_t line = first; line < last; ++line) {
    for (int32_t k = lines.ptr[line]; k < lines.ptr[line + 1]; ++k) marks[int64_t(lines.cols[k]) * VL + line - first] = mark;
  }
}

// Columns of a piece, for products with so many lines.
inline int64_t piece_of(int64_t lines, int64_t num_rows, int64_t num_cols, int64_t num_units) {
  if (lines < kForwardTiledFrom) return max64(num_cols, 1);
  const int64_t wanted = choose_tile(num_rows, num_cols, num_units, 1);
  int64_t piece = 1;
  while (piece < wanted) piece *= 2;
  return piece;
}

// Adds up the row's entries piece by piece: add(column, sums) one entry, to sums that begin at zero.
template <int VECTORS, class Index, class Add>
inline void sum_in_pieces(const View<Index> &rows, int64_t row, int64_t piece, vec (&sums)[VECTORS], Add add) {
  const int32_t end = rows.ptr[row + 1];
  for (int32_t k = rows.ptr[row]; k < end;) {
    vec part[VECTORS] = {};
    const int64_t limit = (int64_t(rows.cols[k]) / piece + 1) * piece;
    for (; k < end && rows.cols[k] < limit; ++k) add(int64_t(rows.cols[k]), part);
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) sums[v] += part[v];
  }
}

// The sum of in (num_cols, VL) over the entries of a row.
template <class Index>
inline vec sum_entries(const View<Index> &rows, int64_t row, const float *in, int64_t piece) {
  vec sum[1] = {};
  sum_in_pieces(rows, row, piece, sum, [&](int64_t col, vec(&part)[1]) { part[0] += load(in + col * VL); });
  return sum[0];
}

// What a row counts for, by its common neighbours with each lane's line.
template <class Index>
inline vec shared(const View<Index> &rows, int64_t row, const float *marks, bool inside) {
  const vec common = sum_entries(rows, row, marks, rows.num_cols + 1), one = broadcast(1.0f);
  const vec left = broadcast(float(rows.ptr[row + 1] - rows.ptr[row])) - common;  // below 1 only from a line to itself
  const vec linked = common > vec{} ? (inside ? one + common : one) : vec{};
  return linked / (left > one ? left : one);
}

template <class Index>
int link_pairs(const rarefy_pattern *p, bool inside, float *pairs, int threads) {
  const View<Index> rows = by_rows<Index>(p), cols = by_cols<Index>(p);
  const int64_t num = rows.num_rows, groups = ceil_div(num, VL);
  threads = int(max64(1, min64(threads, groups)));
  const int64_t piece = cols.num_rows * VL;
  float *marks = nullptr;
  Scratch memory([&](Carver &carver) { marks = carver.take<float>(threads * piece + 1); });
  if (memory.failed()) return RAREFY_NO_MEMORY;
  memset(marks, 0, sizeof(float) * size_t(threads * piece));
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t group = 0; group < groups; ++group) {
    float *mine = marks + omp_get_thread_num() * piece;
    const int64_t first = group * VL, last = min64(first + VL, num);
    mark_lines(rows, first, last, mine, 1.0f);
    for (int64_t row = 0; row < num; ++row) {
      const vec share = shared(rows, row, mine, inside);
      float *out = pairs + row * num + first;
      if (last - first == VL) {
        store_any(out, share);
      } else {
        for (int64_t l = 0; l < last - first; ++l) out[l] = share[l];
      }
    }
    mark_lines(rows, first, last, mine, 0.0f);
  }
  return RAREFY_OK;
}

// To 17 bits, so that equal scores tie whatever order they were summed in.
inline vec rounded(vec score) { return (vec)(((ints)score + 32) & ~63); }

// Adds to scores[begin ..] the same part of the sum of pairs' rows that the column's entries name, and rounds. Fewer than
// VL of them: one by one.
template <int VECTORS, class Index>
inline void add_pairs(const View<Index> &cols, int64_t col, int64_t piece, const float *pairs, int64_t num, int64_t begin,
                      float *scores) {
  vec sums[VECTORS] = {};
  const int64_t live = min64(num - begin, VECTORS * VL);
  if (live < VECTORS * VL) {
    sum_in_pieces(cols, col, piece, sums, [&](int64_t row, vec(&part)[VECTORS]) {
      for (int64_t l = 0; l < live; ++l) part[0][l] += pairs[row * num + begin + l];
    });
    for (int64_t l = 0; l < live; ++l) scores[begin + l] = rounded(broadcast(scores[begin + l] + sums[0][l]))[0];
    return;
  }
  sum_in_pieces(cols, col, piece, sums, [&](int64_t row, vec(&part)[VECTORS]) {
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) part[v] += load_any(pairs + row * num + begin + v * VL);
  });
#pragma GCC unroll 8
  for (int v = 0; v < VECTORS; ++v) {
    float *at = scores + begin + v * VL;
    store_any(at, rounded(load_any(at) + sums[v]));
  }
}

constexpr int kPairVectors = 8;  // so many columns of pairs stay in the L2 cache for all of the lines

template <class Index>
int link_scores(const rarefy_pattern *p, bool inside, const float *pairs, int64_t from, int64_t to, float *scores,
                int threads) {
  const View<Index> rows = by_rows<Index>(p), cols = by_cols<Index>(p);
  const int64_t num = rows.num_rows, groups = ceil_div(to - from, VL);
  const int64_t units = cols.ptr[to] - cols.ptr[from];
  const int64_t piece = piece_of(to - from, num, cols.num_rows, p->num_units), pair_piece = piece_of(num, to - from, num, units);
  threads = int(max64(1, min64(threads, groups)));
  float *marks = nullptr, *shares = nullptr;
  Scratch memory([&](Carver &carver) {
    marks = carver.take<float>(threads * num * VL + 1);
    shares = carver.take<float>(threads * cols.num_rows * VL + 1);
  });
  if (memory.failed()) return RAREFY_NO_MEMORY;
  memset(marks, 0, sizeof(float) * size_t(threads * num * VL));
#pragma omp parallel num_threads(threads)
  {
    float *my_marks = marks + omp_get_thread_num() * num * VL;
    float *my_shares = shares + omp_get_thread_num() * cols.num_rows * VL;
#pragma omp for schedule(static)
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first = from + group * VL, last = min64(first + VL, to);
      mark_lines(cols, first, last, my_marks, 1.0f);
      for (int64_t col = 0; col < cols.num_rows; ++col) store(my_shares + col * VL, shared(cols, col, my_marks, inside));
      mark_lines(cols, first, last, my_marks, 0.0f);
      for (int64_t row = 0; row < num; ++row) {
        const vec score = sum_entries(rows, row, my_shares, piece);
        for (int64_t l = 0; l < last - first; ++l) scores[(first - from + l) * num + row] = score[l];
      }
    }
    int64_t begin = 0;
    for (; begin + kPairVectors * VL <= num; begin += kPairVectors * VL) {
#pragma omp for schedule(static) nowait
      for (int64_t col = from; col < to; ++col) {
        add_pairs<kPairVectors>(cols, col, pair_piece, pairs, num, begin, scores + (col - from) * num);
      }
    }
    for (; begin < num; begin += VL) {
#pragma omp for schedule(static) nowait
      for (int64_t col = from; col < to; ++col) {
        add_pairs<1>(cols, col, pair_piece, pairs, num, begin, scores + (col - from) * num);
      }
    }
  }
  return RAREFY_OK;
}

}  // namespace
}  // namespace rarefy
