// A step of AdamW in one pass over parameters, their gradients and their moments, where separate operations make a dozen. Every
// leading index of a parameter has an age, by which tables correct the moments' bias.
#pragma once

#include <omp.h>

#include "simd.h"

namespace rarefy {
namespace {

constexpr int64_t kAdamShare = 8192;  // entries that are worth a thread

// average + (gradient - average) * weight, from the nearer end, as torch's lerp has it: exact at both.
template <class T>
inline T toward(T average, T gradient, float weight) {
  return weight < 0.5f ? average + (gradient - average) * weight : gradient - (gradient - average) * (1.0f - weight);
}

// The update of one vector of entries with the factors of their ages.
inline void adamw_vector(const rarefy_adamw &a, int64_t at, vec size, vec root) {
  const vec g = load_any(a.gradient + at);
  const vec m = toward(load_any(a.average + at), g, a.new_average);
  vec v = load_any(a.square + at);
  v = v * broadcast(a.old_square) + g * g * broadcast(a.new_square);
  store_any(a.average + at, m);
  store_any(a.square + at, v);
  vec deviation;
#pragma GCC unroll 16
  for (int i = 0; i < VL; ++i) deviation[i] = __builtin_sqrtf(v[i]);
  store_any(a.values + at, load_any(a.values + at) * broadcast(a.decay) - m / (deviation * root + broadcast(a.eps)) * size);
}

inline void adamw_entry(const rarefy_adamw &a, int64_t at, float size, float root) {
  const float g = a.gradient[at];
  const float m = toward(a.average[at], g, a.new_average);
  const float v = a.square[at] * a.old_square + g * g * a.new_square;
  a.average[at] = m;
  a.square[at] = v;
  a.values[at] = a.values[at] * a.decay - m / (__builtin_sqrtf(v) * root + a.eps) * size;
}

// The entries [at, end) of a parameter. `at` is a multiple of VL, and `end` another or the parameter's: an entry is part of the
// same vector, or of none, however the work is cut, so that its bits are the same for any number of threads.
inline void adamw_entries(const rarefy_adamw &a, int64_t at, int64_t end) {
  if (a.age == nullptr) {
    const vec size = broadcast(*a.size_by_age), root = broadcast(*a.root_by_age);
    for (; at + VL <= end; at += VL) adamw_vector(a, at, size, root);
    for (; at < end; ++at) adamw_entry(a, at, *a.size_by_age, *a.root_by_age);
    return;
  }
  for (; at + VL <= end; at += VL) {
    vec size, root;
    for (int i = 0; i < VL; ++i) {
      const int32_t age = a.age[a.entries == 1 ? at + i : (at + i) / a.entries];
      size[i] = a.size_by_age[age];
      root[i] = a.root_by_age[age];
    }
    adamw_vector(a, at, size, root);
  }
  for (; at < end; ++at) {
    const int32_t age = a.age[at / a.entries];
    adamw_entry(a, at, a.size_by_age[age], a.root_by_age[age]);
  }
}

// All parameters in one go, as most are small: thread t takes a run of all entries one after another.
int adamw(const rarefy_adamw *parameters, int64_t num, int threads) {
  int64_t total = 0;
  for (int64_t i = 0; i < num; ++i) total += parameters[i].count;
  const int shares = int(min64(threads, max64(total / kAdamShare, 1)));
#pragma omp parallel for schedule(static, 1) num_threads(shares)
  for (int share = 0; share < shares; ++share) {
    const int64_t begin = total * share / shares, end = total * (share + 1) / shares;
    int64_t before = 0;
    for (int64_t i = 0; i < num && before < end; before += parameters[i++].count) {
      const rarefy_adamw &a = parameters[i];
      const auto cut = [&](int64_t entry) { return entry >= a.count ? a.count : max64(entry, 0) / VL * VL; };
      adamw_entries(a, cut(begin - before), cut(end - before));
    }
  }
  return RAREFY_OK;
}

}  // namespace
}  // namespace rarefy
