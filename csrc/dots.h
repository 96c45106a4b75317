// Dot products over the tokens of a panel: kept as vectors until VL of them can be added across together.
#pragma once

#include "simd.h"

namespace rarefy {
namespace {

// How far apart the panels lie that are taken together: those of dy, and those of x.
struct Panels {
  int64_t dy, x;
};

constexpr int kDots = 128;  // dot products that wait at most, besides those added at once

// Collects dot products in the order of their places target[0], target[1], ...
// HALVED: a waiting vector is join<1> of two neighbours, made while they were in registers; else it is one of them.
template <bool HALVED>
class Dots {
 public:
  static constexpr int EACH = HALVED ? 2 : 1;
  static constexpr int64_t BUFFER = 2 * kDots / EACH * VL;  // floats of buffer, which must hold something finite

  explicit Dots(float *buffer) : buffer_(buffer), waiting_(0), target_(nullptr), add_(false) {}

  void begin(float *target, bool add) {
    target_ = target;
    add_ = add;
    waiting_ = 0;
  }
  // Where the next vectors go: kDots dot products at most before `advance`, which takes the number of vectors.
  float *next() { return buffer_ + waiting_ * VL; }
  void advance(int64_t vectors) {
    waiting_ += vectors;
    if (waiting_ >= kDots / EACH) flush_whole();
  }
  void finish() {
    flush_whole();
    if (waiting_ > 0) {
      const vec sum = reduce_at(0);
      for (int64_t i = 0; i < waiting_ * EACH; ++i) target_[i] = add_ ? target_[i] + sum[i] : sum[i];
      target_ += waiting_ * EACH;
      waiting_ = 0;
    }
  }
  // VL dot products at once. Not to be mixed with `next`.
  void put(vec (&sums)[VL]) {
    const vec sum = reduce(sums);
    store_any(target_, add_ ? load_any(target_) + sum : sum);
    target_ += VL;
  }
  // The same for ROWS x COLS = VL places of a matrix whose rows are `stride` long, from target[first] on, which stays.
  template <int ROWS, int COLS>
  void put_rows(vec (&sums)[VL], int64_t first, int64_t stride) {
    const vec sum = reduce(sums);
    typedef float row __attribute__((vector_size(COLS * 4), aligned(4), may_alias));
    alignas(sizeof(vec)) float places[VL];
    store(places, sum);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      row *to = reinterpret_cast<row *>(target_ + first + r * stride);
      const row from = *reinterpret_cast<const row *>(places + r * COLS);
      *to = add_ ? *to + from : from;
    }
  }
  void skip(int64_t places) { target_ += places; }

 private:
  vec reduce_at(int64_t first) const {
    vec sums[VL / EACH];
#pragma GCC unroll 16
    for (int i = 0; i < VL / EACH; ++i) sums[i] = load(buffer_ + (first + i) * VL);
    if constexpr (HALVED) {
      return reduce_halved(sums);
    } else {
      return reduce(sums);
    }
  }
  void flush_whole() {
    int64_t d = 0;
    float *target = target_;
    for (; d + VL / EACH <= waiting_; d += VL / EACH, target += VL) {
      const vec sum = reduce_at(d);
      store_any(target, add_ ? load_any(target) + sum : sum);
    }
    target_ = target;
    for (int64_t i = d; i < waiting_; ++i) store(buffer_ + (i - d) * VL, load(buffer_ + i * VL));
    waiting_ -= d;
  }

  float *buffer_;
  int64_t waiting_;
  float *target_;
  bool add_;
};

// Whether the dot products of a block of several columns wait in pairs, instead of being added across at once: with AVX2's
// registers a block of 4 x 4 is two tiles of eight, and the next would wait for their sums. A block of 8 x 8, whose tile is a
// row, was better off without; other vectors are not measured.
template <int BR, int BC>
constexpr bool kPairsWait = VL == 8 && BC < VL && BR * BC >= VL;

// Takes the dot products of RI x RJ places of a BR x BC unit.
template <int BR, int BC, int RI, int RJ, bool HALVED>
inline void put_unit(vec (&acc)[VL], Dots<HALVED> &dots) {
  if constexpr (HALVED) {
    static_assert(RI * RJ == VL, "whole vectors wait");
#pragma GCC unroll 16
    for (int i = 0; i < VL / 2; ++i) store(dots.next() + i * VL, join<1>(acc[2 * i], acc[2 * i + 1]));
    dots.advance(VL / 2);
  } else if constexpr (RI * RJ == VL) {
    dots.put(acc);
  } else {
    static_assert(RI == BR && RJ == BC, "a unit smaller than a vector is one tile");
#pragma GCC unroll 16
    for (int i = 0; i < RI * RJ; ++i) store(dots.next() + i * VL, acc[i]);
    dots.advance(RI * RJ);
  }
}

}  // namespace
}  // namespace rarefy
