// One orientation of a pattern, and ways to cut it into parts of equal work.
#pragma once

#include "simd.h"

namespace rarefy {
namespace {

// W for the forward pass, or W^T: unit rows of RB outputs, each unit contracting CB inputs.
template <class Index>
struct View {
  int64_t num_rows, num_cols;  // in units
  const int32_t *ptr;          // num_rows + 1
  const Index *cols;
  const int32_t *perm;  // unit k of this view is unit perm[k] of the values; null: k itself
};

template <class Index>
View<Index> by_rows(const rarefy_pattern *p) {
  return {p->out_features / p->block_rows, p->in_features / p->block_cols, p->crow, static_cast<const Index *>(p->cols),
          nullptr};
}
template <class Index>
View<Index> by_cols(const rarefy_pattern *p) {
  return {p->in_features / p->block_cols, p->out_features / p->block_rows, p->t_crow,
          static_cast<const Index *>(p->t_rows), p->t_perm};
}

// The row where part `part` of `parts` begins, when parts have equal numbers of units, an empty row counting as one too.
inline int64_t part_begin(const int32_t *ptr, int64_t num_rows, int64_t part, int64_t parts) {
  if (part <= 0) return 0;
  if (part >= parts) return num_rows;
  const int64_t wanted = (ptr[num_rows] + num_rows) * part / parts;
  int64_t low = 0, high = num_rows;  // the first row r with ptr[r] + r >= wanted
  while (low < high) {
    const int64_t mid = (low + high) / 2;
    if (ptr[mid] + mid >= wanted) {
      high = mid;
    } else {
      low = mid + 1;
    }
  }
  return low;
}

// How many parts to cut the rows into so that panels * parts tasks keep all threads busy.
inline int64_t row_parts(int64_t panels, int64_t num_rows, int threads) {
  if (threads <= 1 || panels >= 4 * threads) return 1;
  return max64(1, min64(ceil_div(4 * threads, max64(panels, 1)), ceil_div(num_rows, 8)));
}

}  // namespace
}  // namespace rarefy
