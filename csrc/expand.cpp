// A dense weight from the values of a pattern, and values from a dense gradient: for layers that compute dense above
// the density where that is faster. Bound by memory, so there is one version for every instruction set.
#include <omp.h>
#include <string.h>

#include "internal.h"

namespace rarefy {
namespace {

bool bad(const rarefy_pattern *p) {
  if (p == nullptr || p->out_features < 0 || p->in_features < 0 || p->block_rows < 1 || p->block_cols < 1) return true;
  if (p->index_bytes != 2 && p->index_bytes != 4) return true;
  if (p->out_features % p->block_rows != 0 || p->in_features % p->block_cols != 0 || p->crow == nullptr) return true;
  return p->crow[p->out_features / p->block_rows] > 0 && p->cols == nullptr;
}

// One row of entries of one unit row: `visit(values at the unit's row, column of its first entry)`.
template <class Index, class Visit>
void over_row(const rarefy_pattern &p, int64_t row, Visit visit) {
  const Index *cols = static_cast<const Index *>(p.cols);
  const int64_t unit_row = row / p.block_rows, inside = row % p.block_rows, size = p.block_rows * p.block_cols;
  for (int64_t k = p.crow[unit_row]; k < p.crow[unit_row + 1]; ++k) {
    visit(k * size + inside * p.block_cols, static_cast<int64_t>(cols[k]) * p.block_cols);
  }
}

template <class Index>
void expand(const rarefy_pattern &p, const float *values, float *weight, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < p.out_features; ++row) {
    float *to = weight + row * p.in_features;
    memset(to, 0, static_cast<size_t>(p.in_features) * sizeof(float));
    if (p.block_cols == 1) {
      over_row<Index>(p, row, [&](int64_t at, int64_t col) { to[col] = values[at]; });
    } else {
      const size_t bytes = static_cast<size_t>(p.block_cols) * sizeof(float);
      over_row<Index>(p, row, [&](int64_t at, int64_t col) { memcpy(to + col, values + at, bytes); });
    }
  }
}

template <class Index>
void collect(const rarefy_pattern &p, const float *weight, float *values, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < p.out_features; ++row) {
    const float *from = weight + row * p.in_features;
    if (p.block_cols == 1) {
      over_row<Index>(p, row, [&](int64_t at, int64_t col) { values[at] = from[col]; });
    } else {
      const size_t bytes = static_cast<size_t>(p.block_cols) * sizeof(float);
      over_row<Index>(p, row, [&](int64_t at, int64_t col) { memcpy(values + at, from + col, bytes); });
    }
  }
}

}  // namespace
}  // namespace rarefy

int rarefy_expand_f32(const rarefy_pattern *pattern, const float *values, float *weight, int threads) {
  if (rarefy::bad(pattern)) return RAREFY_BAD_ARGUMENT;
  const int64_t size = pattern->out_features * pattern->in_features;
  if ((size > 0 && weight == nullptr) || (pattern->num_units > 0 && values == nullptr)) return RAREFY_BAD_ARGUMENT;
  if (threads <= 0) threads = omp_get_max_threads();
  if (pattern->index_bytes == 2) {
    rarefy::expand<uint16_t>(*pattern, values, weight, threads);
  } else {
    rarefy::expand<int32_t>(*pattern, values, weight, threads);
  }
  return RAREFY_OK;
}

int rarefy_collect_f32(const rarefy_pattern *pattern, const float *weight, float *values, int threads) {
  if (rarefy::bad(pattern)) return RAREFY_BAD_ARGUMENT;
  if (pattern->num_units > 0 && (weight == nullptr || values == nullptr)) return RAREFY_BAD_ARGUMENT;
  if (threads <= 0) threads = omp_get_max_threads();
  if (pattern->index_bytes == 2) {
    rarefy::collect<uint16_t>(*pattern, weight, values, threads);
  } else {
    rarefy::collect<int32_t>(*pattern, weight, values, threads);
  }
  return RAREFY_OK;
}
