// What the programs that check the kernels share: numbers that are the same everywhere, truths with their bounds, bfloat16,
// and outputs that tell when more was written than asked for.
#pragma once

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <vector>

namespace {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

struct Random {  // splitmix64: the same numbers everywhere
  uint64_t state;
  uint64_t bits() {
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  double uniform() { return double(bits() >> 11) * 0x1p-53; }  // [0, 1)
  Floats floats(int64_t count) {
    Floats out(static_cast<size_t>(count));
    for (float &x : out) x = float(2.0 * uniform() - 1.0);
    return out;
  }
};

// One result that is right: out may be off by (terms + 2) eps magnitude, the bound for `terms` products in any order.
struct Truth {
  Doubles exact, magnitude;
  std::vector<int64_t> terms;
  explicit Truth(int64_t count) : exact(count, 0.0), magnitude(count, 0.0), terms(count, 0) {}
  void add(int64_t at, double term) {
    exact[at] += term;
    magnitude[at] += fabs(term);
    ++terms[at];
  }
  Doubles bounds() const {
    Doubles out;
    for (size_t i = 0; i < exact.size(); ++i) out.push_back(double(terms[i] + 2) * FLT_EPSILON * magnitude[i]);
    return out;
  }
};

// bfloat16 is the upper half of a float. To nearest, ties to even.
using Halves = std::vector<uint16_t>;
float widen(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}
uint16_t narrow(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint16_t below = uint16_t(bits >> 16);
  const uint32_t rest = bits & 0xffff;
  if (x != x) return 0x7fc0;
  return uint16_t(below + (rest > 0x8000 || (rest == 0x8000 && below % 2 == 1)));
}
Halves narrow(const Floats &wide) {
  Halves out;
  for (const float x : wide) out.push_back(narrow(x));
  return out;
}
Floats widen(const Halves &halves) {
  Floats out;
  for (const uint16_t x : halves) out.push_back(widen(x));
  return out;
}

// The same as Guarded, for bfloat16.
class GuardedHalves {
 public:
  explicit GuardedHalves(size_t size) : size_(size), room_(size + 33, 0x7fc1) {}
  uint16_t *data() { return room_.data() + 17; }
  Floats floats() const { return widen(Halves(room_.begin() + 17, room_.begin() + 17 + int64_t(size_))); }
  bool intact() const {
    const auto untouched = [](uint16_t x) { return x == 0x7fc1; };
    return std::all_of(room_.begin(), room_.begin() + 17, untouched) &&
           std::all_of(room_.begin() + 17 + int64_t(size_), room_.end(), untouched);
  }

 private:
  size_t size_;
  Halves room_;
};

// An output full of NaN, at an address that is 4-byte aligned only, between cells that must stay as they are.
class Guarded {
 public:
  explicit Guarded(size_t size) : size_(size), room_(size + 33, NAN) {}
  float *data() { return room_.data() + 17; }
  const float *data() const { return room_.data() + 17; }
  size_t size() const { return size_; }
  bool intact() const {
    return std::all_of(room_.begin(), room_.begin() + 17, [](float x) { return x != x; }) &&
           std::all_of(room_.begin() + 17 + int64_t(size_), room_.end(), [](float x) { return x != x; });
  }

 private:
  size_t size_;
  Floats room_;
};

}  // namespace
