// Activations between two linear layers, with their derivatives: RAREFY_GELU and so on in rarefy.h.
#pragma once

#include "simd.h"

namespace rarefy {
namespace {

typedef int32_t ints __attribute__((vector_size(VL * 4)));

inline vec select(ints mask, vec yes, vec no) {
  return reinterpret_cast<vec>((reinterpret_cast<ints>(yes) & mask) | (reinterpret_cast<ints>(no) & ~mask));
}

// e^x to about 2 units in the last place; 0 below the range of normal numbers, and finite above that of floats.
// Cody and Waite's reduction to |r| <= log(2) / 2, then the Taylor polynomial of degree 7 (error below 1e-8).
inline vec exponential(vec x) {
  const vec low = broadcast(-87.33f), high = broadcast(88.37f);
  const ints under = x < low;
  x = select(x > high, high, select(under, low, x));
  const vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the lowest bits
  const vec shifted = x * broadcast(1.44269504f) + magic;
  const vec n = shifted - magic;
  const vec r = (x - n * broadcast(0.693359375f)) + n * broadcast(2.12194440e-4f);
  vec p = broadcast(1.0f / 5040);
  p = p * r + broadcast(1.0f / 720);
  p = p * r + broadcast(1.0f / 120);
  p = p * r + broadcast(1.0f / 24);
  p = p * r + broadcast(1.0f / 6);
  p = p * r + broadcast(0.5f);
  p = p * r + broadcast(1.0f);
  p = p * r + broadcast(1.0f);
  const ints exponent = (reinterpret_cast<ints>(shifted) - reinterpret_cast<ints>(magic)) << 23;
  return select(under, vec{}, reinterpret_cast<vec>(reinterpret_cast<ints>(p) + exponent));
}

inline vec logistic(vec x) { return broadcast(1.0f) / (broadcast(1.0f) + exponential(-x)); }

// h = act(z) and its derivative d at z.
template <int ACTIVATION>
inline void activate(vec z, vec &h, vec &d) {
  const vec zero = {}, one = broadcast(1.0f);
  if constexpr (ACTIVATION == RAREFY_RELU || ACTIVATION == RAREFY_SQUARED_RELU) {
    const ints off = z <= zero;  // NaN passes
    h = select(off, zero, z);
    if constexpr (ACTIVATION == RAREFY_RELU) {
      d = select(off, zero, one);
    } else {
      d = h + h;
      h = h * h;
    }
  } else if constexpr (ACTIVATION == RAREFY_SILU) {
    const vec s = logistic(z);
    h = z * s;
    d = s + h * (one - s);
  } else if constexpr (ACTIVATION == RAREFY_GELU_TANH) {  // (1 + tanh(u)) / 2 is the logistic function of 2 u
    const vec a = broadcast(2 * 0.7978845608f), b = broadcast(0.044715f), square = z * z;
    const vec s = logistic(a * z * (one + b * square));
    h = z * s;
    d = s + h * (one - s) * a * (one + broadcast(3.0f) * b * square);
  } else {
    // z times the normal distribution function, by Abramowitz and Stegun 7.1.26: erfc(v) = poly(t) e^(-v^2) with
    // t = 1 / (1 + p v), absolute error 1.5e-7, as torch has it.
    const vec v = reinterpret_cast<vec>(reinterpret_cast<ints>(z) & 0x7fffffff) * broadcast(0.70710678f);
    const vec t = one / (one + broadcast(0.3275911f) * v);
    vec poly = broadcast(1.061405429f);
    poly = poly * t + broadcast(-1.453152027f);
    poly = poly * t + broadcast(1.421413741f);
    poly = poly * t + broadcast(-0.284496736f);
    poly = poly * t + broadcast(0.254829592f);
    const vec bell = exponential(-(v * v)), tail = broadcast(0.5f) * poly * t * bell;
    const vec s = select(z < zero, tail, one - tail);
    h = z * s;
    d = s + z * bell * broadcast(0.3989422804f);
  }
}

// Calls work(activation) with the number as a compile-time constant. The number has been checked.
template <class Work>
inline void with_activation(int activation, Work work) {
  switch (activation) {
    case RAREFY_RELU: return work(std::integral_constant<int, RAREFY_RELU>());
    case RAREFY_SQUARED_RELU: return work(std::integral_constant<int, RAREFY_SQUARED_RELU>());
    case RAREFY_SILU: return work(std::integral_constant<int, RAREFY_SILU>());
    case RAREFY_GELU_TANH: return work(std::integral_constant<int, RAREFY_GELU_TANH>());
    default: return work(std::integral_constant<int, RAREFY_GELU>());
  }
}

}  // namespace
}  // namespace rarefy
