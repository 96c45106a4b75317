// The k best absent units of a dense gradient, streamed: memory is O(k), never the gradient's size.
//
// A candidate is one 64-bit key whose plain ascending order is the wanted one: the inverted bits of the score (a float
// that is not negative sorts as its bits do) above the unit index. A histogram of the scores' leading bits says at any
// time from which score on there are k candidates: lower ones are not even collected. Equal ones are, until the exact
// order refuses them. Cutting back the buffer is then a linear filter; nth_element is left for many equal scores.
#include <math.h>
#include <omp.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <new>
#include <vector>

#include "internal.h"

namespace rarefy {
namespace {

using Key = uint64_t;

Key make_key(float score, uint32_t unit) {
  uint32_t bits;
  memcpy(&bits, &score, sizeof bits);
  return Key(~bits) << 32 | unit;
}
uint32_t score_bits(Key key) { return ~static_cast<uint32_t>(key >> 32); }
float as_float(uint32_t bits) {
  float score;
  memcpy(&score, &bits, sizeof score);
  return score;
}

// What one thread finds in one tile.
struct Found {
  std::vector<Key> keys;
  float floor = 0.0f;  // lower scores need not be kept
  int64_t nonfinite = 0;

  void push(Key key, size_t k) {
    keys.push_back(key);
    if (keys.size() < 2 * k + 1024) return;
    std::nth_element(keys.begin(), keys.begin() + (k - 1), keys.end());
    keys.resize(k);
    floor = as_float(score_bits(keys[k - 1]));
  }
};

struct Selection {
  static constexpr int kDropped = 16;  // trailing bits of a score that the histogram does not see

  explicit Selection(size_t wanted) : k(wanted), counts(size_t(1) << (31 - kDropped), 0) {}

  void add(const std::vector<Key> &more) {
    for (const Key key : more) {
      const uint32_t bucket = score_bits(key) >> kDropped;
      if (bucket < lowest) continue;
      ++counts[bucket];
      ++counted;
      keys.push_back(key);
    }
    while (counted - counts[lowest] >= k && counted > k) counted -= counts[lowest++];
    if (keys.size() < 2 * k + 1024) return;
    keys.erase(std::remove_if(keys.begin(), keys.end(),
                              [&](Key key) { return score_bits(key) >> kDropped < lowest; }),
               keys.end());
    if (keys.size() >= 2 * k + 1024) cut();
  }

  // Keeps exactly the k best.
  void cut() {
    if (keys.size() <= k) return;
    std::nth_element(keys.begin(), keys.begin() + static_cast<std::ptrdiff_t>(k), keys.end());
    keys.resize(k);
    std::fill(counts.begin(), counts.end(), 0);
    for (const Key key : keys) ++counts[score_bits(key) >> kDropped];
    counted = k;
  }

  float floor() const { return as_float(lowest << kDropped); }

  // Ascending, by byte from the lowest: stable, and several times faster than a comparison sort.
  void sort() {
    std::vector<Key> other(keys.size());
    for (int shift = 0; shift < 64; shift += 8) {
      size_t starts[257] = {};
      for (const Key key : keys) ++starts[(key >> shift & 255) + 1];
      if (std::find(starts + 1, starts + 257, keys.size()) != starts + 257) continue;  // all alike in this byte
      for (int byte = 0; byte < 256; ++byte) starts[byte + 1] += starts[byte];
      for (const Key key : keys) other[starts[key >> shift & 255]++] = key;
      keys.swap(other);
    }
  }

  size_t k;
  std::vector<Key> keys;
  std::vector<uint32_t> counts;  // of the keys seen, by the leading bits of the score, from `lowest` on
  size_t counted = 0;            // their sum
  uint32_t lowest = 0;           // the highest bucket from which on there are at least k keys
  int64_t nonfinite = 0;
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

// Collects the absent units of one row. `scores` is changed: active units are marked with -1.
template <class Index>
void scan_row(Found &found, size_t k, int64_t row, int64_t num_cols, const Index *cols, int32_t begin, int32_t end,
              float *scores) {
  for (int32_t i = begin; i < end; ++i) scores[cols[i]] = -1.0f;
  auto take = [&](int64_t c) {
    const float score = scores[c];
    if (score < found.floor) return;  // active units too: the floor is not negative
    if (!(score <= 3.402823466e38f)) {
      ++found.nonfinite;
    } else if (k > 0) {
      found.push(make_key(score, static_cast<uint32_t>(row * num_cols + c)), k);
    }
  };
  // A block is first asked as a whole, without branches, whether anything is worth a look: seldom, once the floor is up.
  constexpr int64_t kBlock = 16;
  int64_t c0 = 0;
  for (; c0 + kBlock <= num_cols; c0 += kBlock) {
    const float floor = found.floor;
    int hits = 0;
    for (int64_t i = 0; i < kBlock; ++i) hits |= !(scores[c0 + i] < floor);  // NaN counts as a hit
    if (hits == 0) continue;
    for (int64_t i = 0; i < kBlock; ++i) take(c0 + i);
  }
  for (; c0 < num_cols; ++c0) take(c0);
}

template <class Index>
void scan(Selection &selection, const rarefy_pattern *p, const float *tile, int64_t first, int64_t count, int threads) {
  const int64_t br = p->block_rows, bc = p->block_cols, in = p->in_features, num_cols = in / bc;
  const Index *cols = static_cast<const Index *>(p->cols);
  std::vector<Found> found(threads);
  std::atomic<bool> failed(false);
#pragma omp parallel num_threads(threads)
  {
    try {
      Found &own = found[omp_get_thread_num()];
      own.floor = selection.floor();
      std::vector<float> scores(num_cols);
      const int64_t parts = omp_get_num_threads(), part = omp_get_thread_num();
      for (int64_t r = count * part / parts; r < count * (part + 1) / parts; ++r) {
        score_row(tile + r * br * in, in, br, bc, num_cols, scores.data());
        scan_row(own, selection.k, first + r, num_cols, cols, p->crow[first + r], p->crow[first + r + 1],
                 scores.data());
      }
    } catch (const std::bad_alloc &) {
      failed = true;
    }
  }
  if (failed) throw std::bad_alloc();
  for (const Found &part : found) {
    selection.nonfinite += part.nonfinite;
    selection.add(part.keys);
  }
}

}  // namespace
}  // namespace rarefy

using namespace rarefy;

void *rarefy_grow_new(int64_t k) {
  if (k < 0) return nullptr;
  try {
    return new Selection(static_cast<size_t>(k));
  } catch (const std::bad_alloc &) {
    return nullptr;
  }
}

int rarefy_grow_scan_f32(void *selection, const rarefy_pattern *pattern, const float *tile, int64_t first_unit_row,
                         int64_t num_unit_rows, int threads) {
  const rarefy_pattern *p = pattern;
  if (selection == nullptr || p == nullptr || p->crow == nullptr || first_unit_row < 0 || num_unit_rows < 0) {
    return RAREFY_BAD_ARGUMENT;
  }
  if (p->block_rows < 1 || p->block_cols < 1 || p->out_features % p->block_rows != 0 ||
      p->in_features % p->block_cols != 0 || first_unit_row + num_unit_rows > p->out_features / p->block_rows ||
      p->out_features / p->block_rows * (p->in_features / p->block_cols) > int64_t(1) << 32 ||
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
  try {
    s.cut();
    s.sort();
  } catch (const std::bad_alloc &) {
    return RAREFY_NO_MEMORY;
  }
  for (size_t i = 0; i < s.keys.size(); ++i) {
    if (unit_indices != nullptr) unit_indices[i] = static_cast<int64_t>(s.keys[i] & 0xffffffffu);
    if (scores != nullptr) scores[i] = as_float(score_bits(s.keys[i]));
  }
  if (num_nonfinite != nullptr) *num_nonfinite = s.nonfinite;
  return static_cast<int64_t>(s.keys.size());
}

void rarefy_grow_free(void *selection) { delete static_cast<Selection *>(selection); }
