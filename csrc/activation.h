// Activations between two linear layers, with their derivatives: RAREFY_GELU and so on in rarefy.h.
#pragma once

#include "exponential.h"

namespace rarefy {
namespace {

inline vec logistic(vec x) { return broadcast(1.0f) / (broadcast(1.0f) + exp_of(-x)); }

// h = act(z) and its derivative d at z.
template <int ACTIVATION>
inline void activate(vec z, vec &h, vec &d) {
  const vec zero = {}, one = broadcast(1.0f);
  if constexpr (ACTIVATION == RAREFY_RELU || ACTIVATION == RAREFY_SQUARED_RELU) {
    const ints off = z <= zero;  // NaN passes
    h = off ? zero : z;
    if constexpr (ACTIVATION == RAREFY_RELU) {
      d = off ? zero : one;
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
    const vec bell = exp_of(-(v * v)), tail = broadcast(0.5f) * poly * t * bell;
    const vec s = z < zero ? tail : one - tail;
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
