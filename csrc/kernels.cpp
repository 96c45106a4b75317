// The kernels of one instruction set: this file is compiled once per target, with RAREFY_TARGET naming it.
// Nothing but the table at the end is visible outside, and no standard containers are used: the linker must find no
// function here that another target has too.
#include "internal.h"

#include "drive_direct.h"
#include "drive_few.h"
#include "drive_tiled.h"

namespace rarefy {
namespace {

constexpr int kWide = 4;  // vectors in a panel when there are tokens enough to fill it

// Tokens from which reordering the pattern pays for itself. Sooner in backward: following the transposed index as it is,
// every panel would fetch the values in random order.
constexpr int64_t kForwardTiledFrom = 3 * kWide * VL, kBackwardTiledFrom = 2 * VL + 1;

template <int BR, int BC, class Index>
int spmm_blocks(const rarefy_pattern *p, const float *values, const float *x, const float *bias, float *y,
                int64_t batch, int threads) {
  if (batch >= 1 && batch <= few_tokens<BR, BC>()) return spmm_few<BR, BC, Index>(p, values, x, bias, y, batch, threads);
  if (batch <= VL) return spmm_direct<BR, BC, 1, Index>(p, values, x, bias, y, batch, threads);
  if (batch < kForwardTiledFrom) return spmm_direct<BR, BC, 2, Index>(p, values, x, bias, y, batch, threads);
  return multiply_tiled<BR, BC, kWide, false>(by_rows<Index>(p), values, x, bias, y, batch, threads);
}

template <int BR, int BC, class Index>
int backward_blocks(const rarefy_pattern *p, const float *values, const float *dy, const float *x, float *dx,
                    float *dvalues, float *dbias, int64_t batch, int threads) {
  if (batch <= VL) return backward_direct<BR, BC, 1, Index>(p, values, dy, x, dx, dvalues, dbias, batch, threads);
  if (batch < kBackwardTiledFrom) {
    return backward_direct<BR, BC, 2, Index>(p, values, dy, x, dx, dvalues, dbias, batch, threads);
  }
  if (dvalues == nullptr && dbias == nullptr) {
    if (dx == nullptr) return RAREFY_OK;
    return multiply_tiled<BC, BR, kWide, true>(by_cols<Index>(p), values, dy, nullptr, dx, batch, threads);
  }
  if (dvalues == nullptr || p->t_crow == nullptr) {
    return backward_direct<BR, BC, 2, Index>(p, values, dy, x, dx, dvalues, dbias, batch, threads);
  }
  return backward_tiled<BR, BC, kWide>(by_cols<Index>(p), values, dy, x, dx, dvalues, dbias, batch, threads);
}

// Block shapes with a kernel. Each costs some seconds of compilation per target, so the list holds what is used.
#define RAREFY_BLOCKS(X) X(1, 1) X(4, 1) X(8, 1) X(4, 4) X(8, 8) X(16, 16)

int supports(int64_t block_rows, int64_t block_cols) {
#define RAREFY_CASE(BR, BC) \
  if (block_rows == BR && block_cols == BC) return 1;
  RAREFY_BLOCKS(RAREFY_CASE)
#undef RAREFY_CASE
  return 0;
}

int spmm(const rarefy_pattern *p, const float *values, const float *x, const float *bias, float *y, int64_t batch,
         int threads) {
#define RAREFY_CASE(BR, BC)                                                                        \
  if (p->block_rows == BR && p->block_cols == BC) {                                                \
    if (p->index_bytes == 2) return spmm_blocks<BR, BC, uint16_t>(p, values, x, bias, y, batch, threads); \
    return spmm_blocks<BR, BC, int32_t>(p, values, x, bias, y, batch, threads);                    \
  }
  RAREFY_BLOCKS(RAREFY_CASE)
#undef RAREFY_CASE
  return RAREFY_UNSUPPORTED_BLOCK;
}

int backward(const rarefy_pattern *p, const float *values, const float *dy, const float *x, float *dx, float *dvalues,
             float *dbias, int64_t batch, int threads) {
#define RAREFY_CASE(BR, BC)                                                                                        \
  if (p->block_rows == BR && p->block_cols == BC) {                                                                \
    if (p->index_bytes == 2) return backward_blocks<BR, BC, uint16_t>(p, values, dy, x, dx, dvalues, dbias, batch, threads); \
    return backward_blocks<BR, BC, int32_t>(p, values, dy, x, dx, dvalues, dbias, batch, threads);                 \
  }
  RAREFY_BLOCKS(RAREFY_CASE)
#undef RAREFY_CASE
  return RAREFY_UNSUPPORTED_BLOCK;
}

#define RAREFY_TEXT(x) RAREFY_TEXT_(x)
#define RAREFY_TEXT_(x) #x
#define RAREFY_JOIN(a, b) RAREFY_JOIN_(a, b)
#define RAREFY_JOIN_(a, b) a##b

constexpr Kernels kTable = {RAREFY_TEXT(RAREFY_TARGET), supports, spmm, backward};

}  // namespace

const Kernels *RAREFY_JOIN(kernels_, RAREFY_TARGET)() { return &kTable; }

}  // namespace rarefy
