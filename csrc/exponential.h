// Exponentials, by vectors.
#pragma once

#include "simd.h"

namespace rarefy {
namespace {

inline vec larger(vec a, vec b) { return a > b ? a : b; }  // b where either is not a number

constexpr float kLog2E = 1.44269504f;

// 2^rest for |rest| <= 1/2: minimax in relative error, 7.5e-8.
inline vec exp2_near_zero(vec rest) {
  vec sum = broadcast(0x1.5c08e6p-10f);
  sum = sum * rest + broadcast(0x1.3d0c54p-7f);
  sum = sum * rest + broadcast(0x1.c6b6e4p-5f);
  sum = sum * rest + broadcast(0x1.ebf918p-3f);
  sum = sum * rest + broadcast(0x1.62e428p-1f);
  return sum * rest + broadcast(0x1.000002p+0f);
}

// Adding it rounds to whole numbers and leaves an exponent's bits lowest: 1.5 * 2^23, and the bias of the exponent.
constexpr float kToExponent = 12582912.0f + 127.0f;
inline vec power_of_two(vec shifted) { return reinterpret_cast<vec>(reinterpret_cast<ints>(shifted) << 23); }

// 2^x for x <= 127, to 1.5 units in the last place; 0 below 2^-126. Not a number stays so.
inline vec exp2_of(vec x) {
  x = larger(broadcast(-127.0f), x);
  const vec shifted = x + broadcast(kToExponent), whole = shifted - broadcast(kToExponent);
  return exp2_near_zero(x - whole) * power_of_two(shifted);
}

// e^x to about 2 units in the last place; 0 below the range of normal numbers, and finite above that of floats. Not a number
// stays so. With log(2) in two parts (Cody and Waite), as x log2(e) in one product would lose what x has before the point.
inline vec exp_of(vec x) {
  const vec high = broadcast(88.37f);
  x = larger(broadcast(-88.02f), x > high ? high : x);
  const vec shifted = x * broadcast(kLog2E) + broadcast(kToExponent), whole = shifted - broadcast(kToExponent);
  const vec rest = (x - whole * broadcast(0.693359375f)) + whole * broadcast(2.12194440e-4f);
  return exp2_near_zero(rest * broadcast(kLog2E)) * power_of_two(shifted);
}

}  // namespace
}  // namespace rarefy
