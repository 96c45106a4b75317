// Kernels that follow the compressed rows as they are: no preparation, so the right ones for few tokens.
#pragma once

#include "dots.h"
#include "pack.h"
#include "view.h"

namespace rarefy {
namespace {

// Values that are read in order are asked for this many bytes ahead: the hardware does not look past the end of a page.
constexpr int64_t kAhead = 2048;
inline void fetch_ahead(const void *p) { __builtin_prefetch(static_cast<const char *>(p) + kAhead); }

// out[RB][P] = start (or 0) + the units k0 <= k < k1 of one unit row times the packed inputs.
// WT: the values hold a unit as [input][output] of this view, that is, the view is W^T.
template <int RB, int CB, int NV, bool WT, class Index>
inline void direct_row(const View<Index> &view, const float *values, int64_t k0, int64_t k1, const float *panel,
                       const float *start, float *out) {
  constexpr int P = NV * VL;
  constexpr int RT = min_int(RB, kBudget);                    // outputs and vectors of one register tile
  constexpr int VT = max_int(1, min_int(NV, kBudget / RT));
  constexpr int U = max_int(1, 8 / (RT * VT));                // independent sums, to cover the latency of an addition
  for (int r0 = 0; r0 < RB; r0 += RT) {
    for (int v0 = 0; v0 < NV; v0 += VT) {
      vec sum[U][RT][VT] = {};
      auto unit = [&](int64_t k, vec (&acc)[RT][VT]) __attribute__((always_inline)) {
        const float *w = values + int64_t(view.perm != nullptr && WT ? view.perm[k] : k) * (RB * CB);
        const float *x = panel + int64_t(view.cols[k]) * (CB * P) + v0 * VL;
        if constexpr (!WT && RB * CB > 1) {  // a single entry is less than what asking costs
          constexpr int EVERY = max_int(1, 16 / CB);
#pragma GCC unroll 16
          for (int r = 0; r < RT; r += EVERY) fetch_ahead(w + (r0 + r) * CB);
        }
#pragma GCC unroll 16
        for (int c = 0; c < CB; ++c) {
#pragma GCC unroll 16
          for (int r = 0; r < RT; ++r) {
            const vec weight = broadcast(WT ? w[c * RB + r0 + r] : w[(r0 + r) * CB + c]);
#pragma GCC unroll 16
            for (int v = 0; v < VT; ++v) acc[r][v] += weight * load(x + c * P + v * VL);
          }
        }
      };
      int64_t k = k0;
      for (; k + U <= k1; k += U) {
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) unit(k + u, sum[u]);
      }
      for (; k < k1; ++k) unit(k, sum[0]);
#pragma GCC unroll 16
      for (int r = 0; r < RT; ++r) {
        const vec first = start != nullptr ? broadcast(start[r0 + r]) : vec{};
#pragma GCC unroll 16
        for (int v = 0; v < VT; ++v) {
          vec total = sum[0][r][v];
#pragma GCC unroll 8
          for (int u = 1; u < U; ++u) total += sum[u][r][v];
          store(out + (r0 + r) * P + (v0 + v) * VL, total + first);
        }
      }
    }
  }
}

// Unit rows of the view in [begin, end): y[token][row] for the tokens of one panel. tile: kRowGroup * RB * P floats.
constexpr int kRowGroup = 16;
template <int RB, int CB, int NV, bool WT, class Index>
void direct_rows(const View<Index> &view, const float *values, const float *panel, const float *bias, int64_t begin,
                 int64_t end, int64_t tokens, int64_t stride, float *y, float *tile) {
  constexpr int P = NV * VL;
  for (int64_t r0 = begin; r0 < end; r0 += kRowGroup) {
    const int64_t r1 = min64(r0 + kRowGroup, end);
    for (int64_t r = r0; r < r1; ++r) {
      direct_row<RB, CB, NV, WT>(view, values, view.ptr[r], view.ptr[r + 1], panel,
                                 bias != nullptr ? bias + r * RB : nullptr, tile + (r - r0) * RB * P);
    }
    unpack<NV>(tile, stride, tokens, r0 * RB, r1 * RB, y);
  }
}

// dvalues of unit rows [begin, end) from `panels` packed panels of dy and x, summed in the order of the panels.
template <int BR, int BC, int NV, class Index>
void direct_dvalues(const View<Index> &view, const float *dy_panels, const float *x_panels, int64_t panels,
                    int64_t begin, int64_t end, bool accumulate, float *dvalues, float *dots_buffer) {
  constexpr int P = NV * VL;
  Dots<false> dots(dots_buffer);
  for (int64_t p = 0; p < panels; ++p) {
    const float *dy = dy_panels + p * view.num_rows * (BR * P), *x = x_panels + p * view.num_cols * (BC * P);
    dots.begin(dvalues + int64_t(view.ptr[begin]) * (BR * BC), accumulate || p > 0);
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t k = view.ptr[r]; k < view.ptr[r + 1]; ++k) {
        unit_dots<BR, BC, NV, 1>(dy + r * (BR * P), x + int64_t(view.cols[k]) * (BC * P), Panels(), VL, dots);
      }
    }
    dots.finish();
  }
}

}  // namespace
}  // namespace rarefy
