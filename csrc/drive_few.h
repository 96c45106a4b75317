// Whole calls for a handful of tokens: threads around few.h.
#pragma once

#include <omp.h>

#include "internal.h"

#include "few.h"
#include "scratch.h"

namespace rarefy {
namespace {

// Up to how many tokens few.h beats direct.h. For blocks: while the sums of all tokens stay near the registers, and
// their vectors are not so short that those of direct.h do more at once. Measured; docs/log.md has the times.
template <int BR, int BC>
constexpr int64_t few_tokens() {
  using S = UnitShape<BR, BC>;
  if (BR * BC == 1) return VL;
  return max_int(2, min_int(4, min_int(2 * kBudget / S::SUMS, S::W / 2)));
}

// On every thread prepare(thread), then rows(thread, begin, end) for parts of equal work of the unit rows.
template <class Index, class Prepare, class Rows>
void for_parts(const View<Index> &view, int threads, const Prepare &prepare, const Rows &rows) {
  const int64_t parts = row_parts(1, view.num_rows, threads);
#pragma omp parallel num_threads(threads)
  {
    const FlushDenormals flush;
    const int thread = omp_get_thread_num();
    prepare(thread);
#pragma omp for schedule(dynamic, 1)
    for (int64_t part = 0; part < parts; ++part) {
      rows(thread, part_begin(view.ptr, view.num_rows, part, parts),
           part_begin(view.ptr, view.num_rows, part + 1, parts));
    }
  }
}

// Each thread packs all of x for itself: one that waits for another to pack its share waits for the scheduler, where
// cores are not idle.
template <int P, class Index>
int spmm_narrow(const rarefy_pattern *p, const float *values, const float *x, const float *bias, float *y,
                int64_t batch, int threads) {
  const View<Index> view = by_rows<Index>(p);
  const int64_t in = p->in_features, out = p->out_features, panel_floats = ceil_div(in * P, 16) * 16;
  float *panels = nullptr;
  const Scratch memory([&](Carver &carver) { panels = carver.take<float>(threads * panel_floats); });
  if (memory.failed()) return RAREFY_NO_MEMORY;
  for_parts(
      view, threads, [&](int thread) { pack_narrow<P>(x, in, batch, panels + thread * panel_floats); },
      [&](int thread, int64_t begin, int64_t end) {
        narrow_rows<P>(view, values, panels + thread * panel_floats, bias, begin, end, batch, y, out);
      });
  return RAREFY_OK;
}

// y for 1 <= batch <= few_tokens<BR, BC>() tokens.
template <int BR, int BC, class Index>
int spmm_few(const rarefy_pattern *p, const float *values, const float *x, const float *bias, float *y, int64_t batch,
             int threads) {
  const View<Index> view = by_rows<Index>(p);
  const int64_t in = p->in_features, out = p->out_features;
  const auto nothing = [](int) {};
  if constexpr (BR * BC == 1) {
    if (batch == 1) {
      for_parts(view, threads, nothing,
                [&](int, int64_t begin, int64_t end) { one_token_rows(view, values, x, bias, begin, end, y); });
      return RAREFY_OK;
    }
    if (batch <= 2) return spmm_narrow<2, Index>(p, values, x, bias, y, batch, threads);
    if (batch <= 4) return spmm_narrow<4, Index>(p, values, x, bias, y, batch, threads);
    if (batch <= 8) return spmm_narrow<min_int(8, VL), Index>(p, values, x, bias, y, batch, threads);
    return spmm_narrow<VL, Index>(p, values, x, bias, y, batch, threads);
  } else {
    for_parts(view, threads, nothing, [&](int, int64_t begin, int64_t end) {
      if (batch == 1) few_rows<BR, BC, 1>(view, values, x, in, bias, begin, end, y, out);
      if (batch == 2) few_rows<BR, BC, 2>(view, values, x, in, bias, begin, end, y, out);
      if constexpr (few_tokens<BR, BC>() >= 4) {
        if (batch == 3) few_rows<BR, BC, 3>(view, values, x, in, bias, begin, end, y, out);
        if (batch == 4) few_rows<BR, BC, 4>(view, values, x, in, bias, begin, end, y, out);
      }
    });
    return RAREFY_OK;
  }
}

}  // namespace
}  // namespace rarefy
