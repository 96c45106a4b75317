// The k best absent units of a dense gradient, streamed: memory is O(k), never the gradient's size.
//
// Each candidate is one 64-bit key whose plain order is the wanted one: the score's bits above (a float that is not
// negative sorts as its bits do), the unit index, inverted, below where it fits; see Key. A buffer of 2k keys collects
// what reaches the threshold, the k-th best score so far; when it is full, nth_element keeps the k best and raises the
// threshold. A candidate equal to the threshold is kept until then: only the full order may refuse it.
#include <math.h>
#include <omp.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <new>
#include <vector>

#include "internal.h"

namespace rarefy {
namespace {

struct Key {
  float score;
  int64_t unit;
  // Better first: higher score, then lower unit. Total, since no unit comes twice and no score is NaN.
  bool operator<(const Key &other) const {
    return score > other.score || (score == other.score && unit < other.unit);
  }
};

struct Buffer {
  std::vector<Key> keys;
  float threshold = -1.0f;  // at least k of the keys seen so far have this score or a higher one; -1: fewer than k seen
  int64_t nonfinite = 0;

  // Keeps the k best.
  void compact(size_t k) {
    if (keys.size() <= k) return;
    if (k > 0) {
      std::nth_element(keys.begin(), keys.begin() + (k - 1), keys.end());
      threshold = keys[k - 1].score;
    }
    keys.resize(k);
  }
};

struct Selection {
  size_t k;
  Buffer best;
};

// Scores of one unit row: scores[c] is the unit at column c. |g| is summed in row-major order inside the unit.
void score_row(const float *tile, int64_t in, int64_t br, int64_t bc, int64_t num_cols, float *scores) {
  if (br == 1 && bc == 1) {
    for (int64_t c = 0; c < num_cols; ++c) scores[c] = fabsf(tile[c]);
    return;
  }
  const float entries = static_cast<float>(br * bc);
  for (int64_t c = 0; c < num_cols; ++c) scores[c] = 0.0f;
  for (int64_t i = 0; i < br; ++i) {
    const float *row = tile + i * in;
    for (int64_t c = 0; c < num_cols; ++c) {
      float sum = scores[c];
      for (int64_t j = 0; j < bc; ++j) sum += fabsf(row[c * bc + j]);
      scores[c] = sum;
    }
  }
  for (int64_t c = 0; c < num_cols; ++c) scores[c] /= entries;
}

// Adds the absent units of one row to the buffer. `scores` is changed: active units are marked with -1.
template <class Index>
void scan_row(Buffer &buffer, size_t k, int64_t row, int64_t num_cols, const Index *cols, int32_t begin, int32_t end,
              float *scores) {
  for (int32_t i = begin; i < end; ++i) scores[cols[i]] = -1.0f;
  // Blocks first ask, without a branch an entry, whether anything is worth a look: rarely once the threshold is tight.
  constexpr int64_t kBlock = 32;
  for (int64_t c0 = 0; c0 < num_cols; c0 += kBlock) {
    const int64_t c1 = std::min(c0 + kBlock, num_cols);
    const float floor = std::max(buffer.threshold, 0.0f);
    int hits = 0;
    for (int64_t c = c0; c < c1; ++c) hits |= !(scores[c] < floor);  // NaN counts as a hit
    if (hits == 0) continue;
    for (int64_t c = c0; c < c1; ++c) {
      const float score = scores[c];
      if (score < floor) continue;  // active units too: floor >= 0
      if (!(score <= 3.402823466e38f)) {
        ++buffer.nonfinite;
        continue;
      }
      if (k > 0) buffer.keys.push_back({score, row * num_cols + c});
    }
    if (buffer.keys.size() >= 2 * k + 1024) buffer.compact(k);
  }
}

template <class Index>
void scan(Selection &selection, const rarefy_pattern *p, const float *tile, int64_t first, int64_t count, int threads) {
  const int64_t br = p->block_rows, bc = p->block_cols, in = p->in_features, num_cols = in / bc;
  const Index *cols = static_cast<const Index *>(p->cols);
  const size_t k = selection.k;
  std::vector<Buffer> found(threads);
  std::atomic<bool> failed(false);
#pragma omp parallel num_threads(threads)
  {
    try {
      Buffer &buffer = found[omp_get_thread_num()];
      buffer.threshold = selection.best.threshold;
      std::vector<float> scores(num_cols);
      const int64_t parts = omp_get_num_threads(), part = omp_get_thread_num();
      for (int64_t r = count * part / parts; r < count * (part + 1) / parts; ++r) {
        score_row(tile + r * br * in, in, br, bc, num_cols, scores.data());
        scan_row(buffer, k, first + r, num_cols, cols, p->crow[first + r], p->crow[first + r + 1], scores.data());
      }
    } catch (const std::bad_alloc &) {
      failed = true;
    }
  }
  if (failed) throw std::bad_alloc();
  Buffer &best = selection.best;
  for (const Buffer &buffer : found) {
    best.nonfinite += buffer.nonfinite;
    best.keys.insert(best.keys.end(), buffer.keys.begin(), buffer.keys.end());
    if (best.keys.size() >= 2 * k + 1024) best.compact(k);
  }
}

}  // namespace
}  // namespace rarefy

using namespace rarefy;

void *rarefy_grow_new(int64_t k) {
  if (k < 0) return nullptr;
  Selection *selection = new (std::nothrow) Selection;
  if (selection != nullptr) selection->k = static_cast<size_t>(k);
  return selection;
}

int rarefy_grow_scan_f32(void *selection, const rarefy_pattern *pattern, const float *tile, int64_t first_unit_row,
                         int64_t num_unit_rows, int threads) {
  const rarefy_pattern *p = pattern;
  if (selection == nullptr || p == nullptr || p->crow == nullptr || first_unit_row < 0 || num_unit_rows < 0) {
    return RAREFY_BAD_ARGUMENT;
  }
  if (p->block_rows < 1 || p->block_cols < 1 || p->out_features % p->block_rows != 0 ||
      p->in_features % p->block_cols != 0 || first_unit_row + num_unit_rows > p->out_features / p->block_rows ||
      (p->num_units > 0 && p->cols == nullptr) || (p->index_bytes != 2 && p->index_bytes != 4)) {
    return RAREFY_BAD_ARGUMENT;
  }
  if (num_unit_rows == 0 || p->in_features == 0) return RAREFY_OK;
  if (tile == nullptr) return RAREFY_BAD_ARGUMENT;
  if (threads <= 0) threads = omp_get_max_threads();
  try {
    Selection &s = *static_cast<Selection *>(selection);
    if (p->index_bytes == 2) {
      scan<uint16_t>(s, p, tile, first_unit_row, num_unit_rows, threads);
    } else {
      scan<int32_t>(s, p, tile, first_unit_row, num_unit_rows, threads);
    }
  } catch (const std::bad_alloc &) {
    return RAREFY_NO_MEMORY;
  }
  return RAREFY_OK;
}

int64_t rarefy_grow_finish(void *selection, int64_t *unit_indices, float *scores, int64_t *num_nonfinite) {
  if (selection == nullptr) return RAREFY_BAD_ARGUMENT;
  Selection &s = *static_cast<Selection *>(selection);
  s.best.compact(s.k);
  std::sort(s.best.keys.begin(), s.best.keys.end());
  for (size_t i = 0; i < s.best.keys.size(); ++i) {
    if (unit_indices != nullptr) unit_indices[i] = s.best.keys[i].unit;
    if (scores != nullptr) scores[i] = s.best.keys[i].score;
  }
  if (num_nonfinite != nullptr) *num_nonfinite = s.best.nonfinite;
  return static_cast<int64_t>(s.best.keys.size());
}

void rarefy_grow_free(void *selection) { delete static_cast<Selection *>(selection); }
