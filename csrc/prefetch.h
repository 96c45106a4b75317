// Memory that is needed next comes into L2 a few lines at a time, while something else is computed: the kernels leave
// the memory bus idle, and packing and unpacking would wait for it.
#pragma once

#include "simd.h"

namespace rarefy {
namespace {

class Prefetch {
 public:
  // `rows` pieces of `row_bytes`, `stride` bytes apart. Also memory that will be written: a line that is present need not
  // be fetched by the store.
  void add(const void *data, int64_t stride, int64_t rows, int64_t row_bytes) {
    if (rows <= 0 || row_bytes <= 0 || count_ == kRegions) return;
    regions_[count_++] = {static_cast<const char *>(data), stride, rows, row_bytes};
    lines_ += rows * (row_bytes / 64 + 1);
  }
  // To be called once, before the first of `steps` steps.
  void spread(int64_t steps) {
    per_step_ = ceil_div(lines_, max64(steps, 1));
    next_row();
  }
  void step() {
    for (int64_t i = 0; i < per_step_; ++i) {
      __builtin_prefetch(at_, 0, 2);
      at_ += 64;
      if (at_ >= end_) next_row();
    }
  }

 private:
  struct Region {
    const char *data;
    int64_t stride, rows, row_bytes;
  };

  __attribute__((noinline)) void next_row() {
    while (region_ < count_ && regions_[region_].rows == 0) ++region_;
    if (region_ == count_) {
      per_step_ = 0;
      return;
    }
    Region &region = regions_[region_];
    at_ = region.data;
    end_ = region.data + region.row_bytes;
    region.data += region.stride;
    --region.rows;
  }

  static constexpr int kRegions = 3;
  Region regions_[kRegions];
  int count_ = 0, region_ = 0;
  int64_t lines_ = 0, per_step_ = 0;
  const char *at_ = nullptr, *end_ = nullptr;
};

}  // namespace
}  // namespace rarefy
