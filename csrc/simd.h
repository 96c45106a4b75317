// Vectors as wide as the target allows, in GCC's vector extension: one source for every instruction set. The compiler
// contracts a * b + c to one instruction where there is one. Everything lives in an anonymous namespace, so that no two
// translation units share code compiled for different instruction sets.
#pragma once

#include <stdint.h>
#include <string.h>

#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(RAREFY_NEON)
#include <arm_neon.h>
#endif

namespace rarefy {
namespace {

#if defined(__AVX512F__)
constexpr int VL = 16;      // floats a vector
constexpr int kBudget = 16; // accumulators that leave registers for the operands
#elif defined(__AVX2__)
constexpr int VL = 8;
constexpr int kBudget = 8;
#elif defined(RAREFY_NEON)
constexpr int VL = 4;
constexpr int kBudget = 16;  // of 32 registers
#else
constexpr int VL = 4;
constexpr int kBudget = 8;
#endif

typedef float vec __attribute__((vector_size(VL * 4)));
typedef float vec_any __attribute__((vector_size(VL * 4), aligned(4), may_alias));  // at any address

inline vec load(const float *p) { return *reinterpret_cast<const vec *>(p); }
inline void store(float *p, vec v) { *reinterpret_cast<vec *>(p) = v; }
inline vec load_any(const float *p) { return *reinterpret_cast<const vec_any *>(p); }
inline void store_any(float *p, vec v) { *reinterpret_cast<vec_any *>(p) = v; }

inline vec broadcast(float x) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(x);
#elif defined(__AVX2__)
  return _mm256_set1_ps(x);
#else
  return vec{x, x, x, x};
#endif
}

// bfloat16 is the upper half of a float. It is only ever storage: arithmetic is in float32.
typedef uint16_t bf16;
typedef uint16_t halves __attribute__((vector_size(VL * 2)));
typedef uint16_t halves_any __attribute__((vector_size(VL * 2), aligned(2), may_alias));
typedef uint32_t words __attribute__((vector_size(VL * 4)));
typedef int32_t ints __attribute__((vector_size(VL * 4)));

// By name with AVX-512: of a conversion of 16 the compiler makes two of 8, and joins them.
inline vec wide(halves narrow) {
#if defined(__AVX512F__)
  return reinterpret_cast<vec>(words(_mm512_maskz_cvtepu16_epi32(0xffff, __m256i(narrow))) << 16);
#else
  return reinterpret_cast<vec>(__builtin_convertvector(narrow, words) << 16);
#endif
}
inline vec load_any(const bf16 *p) { return wide(*reinterpret_cast<const halves_any *>(p)); }
// In the upper halves: to nearest, ties to even; NaN stays NaN. The lower halves are anything.
inline words round_to_bf16(vec v) {
  const words bits = reinterpret_cast<words>(v), is_nan = reinterpret_cast<words>(v != v);
  return ((bits + 0x7fff + ((bits >> 16) & 1)) & ~is_nan) | (is_nan & 0x7fc00000);
}
inline halves narrow(vec v) {
#if defined(__AVX512BF16__)
  return halves(_mm512_cvtneps_pbh(__m512(v)));
#elif defined(__AVX512F__)
  return halves(_mm512_maskz_cvtepi32_epi16(0xffff, __m512i(round_to_bf16(v) >> 16)));
#else
  return __builtin_convertvector(round_to_bf16(v) >> 16, halves);
#endif
}
inline void store_any(bf16 *p, vec v) { *reinterpret_cast<halves_any *>(p) = narrow(v); }
inline float widen(float x) { return x; }
inline float widen(bf16 x) {
  const uint32_t bits = uint32_t(x) << 16;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}
inline void narrow_to(float *p, float x) { *p = x; }
inline void narrow_to(bf16 *p, float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  *p = x != x ? bf16(0x7fc0) : bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// One step of a transpose: lanes whose index has bit S are swapped between the two vectors of a pair.
template <int S, int... I>
inline vec low_half(vec a, vec b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, ((I & S) == 0 ? I : VL + I - S)...);
}
template <int S, int... I>
inline vec high_half(vec a, vec b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, ((I & S) == 0 ? I + S : VL + I)...);
}
using Lanes = std::make_integer_sequence<int, VL>;

template <int S>
inline void swap_step(vec (&rows)[VL]) {
#pragma GCC unroll 16
  for (int i = 0; i < VL; ++i) {
    if ((i & S) != 0) continue;
    const vec a = rows[i], b = rows[i + S];
    rows[i] = low_half<S>(a, b, Lanes());
    rows[i + S] = high_half<S>(a, b, Lanes());
  }
}

// rows[i][j] <-> rows[j][i]
inline void transpose(vec (&rows)[VL]) {
  if constexpr (VL > 8) swap_step<(VL > 8 ? 8 : 1)>(rows);
  if constexpr (VL > 4) swap_step<(VL > 4 ? 4 : 1)>(rows);
  swap_step<2>(rows);
  swap_step<1>(rows);
}

// Sums across lanes, two vectors to one at a time: the even places of a and b plus the odd ones, a place being a lane
// (GROUP = 1) or 4 lanes. Within 4 places the first two of the result come from a. Two such steps bring the sums of four
// vectors in order.
template <int GROUP, int ODD, int... I>
inline vec half_of(vec a, vec b, std::integer_sequence<int, I...>) {
  constexpr int G = GROUP;
  return __builtin_shufflevector(
      a, b, (I / (4 * G) * (4 * G) + (I / G % 2 * 2 + ODD) * G + I % G + (I / G % 4 >= 2 ? VL : 0))...);
}
template <int GROUP>
inline vec join(vec a, vec b) {
#if defined(RAREFY_NEON)
  if constexpr (GROUP == 1) return vpaddq_f32(a, b);
#endif
  return half_of<GROUP, 0>(a, b, Lanes()) + half_of<GROUP, 1>(a, b, Lanes());
}
inline vec join_halves(vec a, vec b) {  // (the lower plus the upper half of a, the same of b)
  return low_half<VL / 2>(a, b, Lanes()) + high_half<VL / 2>(a, b, Lanes());
}

// Lane i of the result is the sum of the lanes of vector i, where halved[i] is join<1> of vectors 2i and 2i + 1.
inline vec reduce_halved(vec (&halved)[VL / 2]) {
#pragma GCC unroll 16
  for (int i = 0; i < VL / 4; ++i) halved[i] = join<1>(halved[2 * i], halved[2 * i + 1]);
  if constexpr (VL == 8) return join_halves(halved[0], halved[1]);
  if constexpr (VL == 16) {
    const vec a = join<(VL == 16 ? 4 : 1)>(halved[0], halved[1]), b = join<(VL == 16 ? 4 : 1)>(halved[2], halved[3]);
    return join<(VL == 16 ? 4 : 1)>(a, b);
  }
  return halved[0];
}
inline vec reduce(vec (&sums)[VL]) {
  vec halved[VL / 2];
#pragma GCC unroll 16
  for (int i = 0; i < VL / 2; ++i) halved[i] = join<1>(sums[2 * i], sums[2 * i + 1]);
  return reduce_halved(halved);
}

inline ints lane_numbers() {
  ints lanes;
#pragma GCC unroll 16
  for (int i = 0; i < VL; ++i) lanes[i] = i;
  return lanes;
}

// The sum of all lanes, half onto half: VL of them one after another would wait for each other.
inline float across(vec v) {
#pragma GCC unroll 4
  for (int step = VL / 2; step > 0; step /= 2) v += __builtin_shuffle(v, lane_numbers() ^ step);
  return v[0];
}

// v where lane < live, else `other`.
inline vec keep(vec v, int64_t live, vec other) { return lane_numbers() < (ints{} + int32_t(live)) ? v : other; }
inline vec keep_lanes(vec v, int64_t live) { return live == VL ? v : keep(v, live, vec{}); }

// Keeps a loaded vector in its register: the compiler would rather load it again for a second use, and loads are what
// these kernels are short of.
inline void pin(vec &v) {
#if defined(__x86_64__)
  __asm__("" : "+v"(v));
#elif defined(__aarch64__)
  __asm__("" : "+w"(v));
#else
  (void)v;
#endif
}

// Gradients decay into denormals, which several cores handle a hundred times slower. Restored on exit: the caller's
// arithmetic is not ours to change.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }  // flush to zero, denormals are zero
  ~FlushDenormals() { _mm_setcsr(saved_); }
#elif defined(__aarch64__)
  FlushDenormals() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    __asm__ volatile("msr fpcr, %0" : : "r"(saved_ | (uint64_t(1) << 24)));
  }
  ~FlushDenormals() { __asm__ volatile("msr fpcr, %0" : : "r"(saved_)); }
#else
  FlushDenormals() : saved_(0) {}
#endif
  FlushDenormals(const FlushDenormals &) = delete;
  FlushDenormals &operator=(const FlushDenormals &) = delete;

 private:
#if defined(__x86_64__)
  unsigned saved_;
#else
  uint64_t saved_;
#endif
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int min_int(int a, int b) { return a < b ? a : b; }
constexpr int max_int(int a, int b) { return a > b ? a : b; }

}  // namespace
}  // namespace rarefy
