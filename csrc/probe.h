// Work of a known size, to measure what the machine can do at most: arithmetic that never leaves the registers, and
// reads and copies of a given size. See rarefy_probe in rarefy.h.
#pragma once

#include "internal.h"
#include "simd.h"

#if defined(__AVX512F__) && defined(__linux__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#define RAREFY_PROBE_BF16
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace rarefy {
namespace {

// Independent sums enough to hide the latency of two multiply-adds a cycle, in registers that leave room for operands.
constexpr int kSums = VL == 16 ? 24 : 12;
constexpr int64_t kTurns = 1024;  // of the inner loop in one repeat
constexpr int kTwoHalves = 0x3f003f00;  // 0.5 twice in bf16: zeros would need less power than numbers do

// The compiler must believe that someone reads v, or it would not compute it.
inline void use(vec v) {
#if defined(__x86_64__)
  __asm__ volatile("" : : "v"(v));
#elif defined(__aarch64__)
  __asm__ volatile("" : : "w"(v));
#else
  __asm__ volatile("" : : "m"(v));
#endif
}

int64_t probe_fma(int64_t repeats, int threads) {
#pragma omp parallel num_threads(threads)
  {
    vec sums[kSums], shrink = broadcast(0.5f), add = broadcast(0.25f);
    for (int i = 0; i < kSums; ++i) sums[i] = broadcast(static_cast<float>(i));
    for (int64_t turn = 0; turn < repeats * kTurns; ++turn) {
      pin(shrink);
#pragma GCC unroll 32
      for (int i = 0; i < kSums; ++i) sums[i] = sums[i] * shrink + add;
    }
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i) use(sums[i]);
  }
  return repeats * kTurns * kSums * VL * 2 * threads;
}

#if defined(RAREFY_PROBE_BF16)
__attribute__((target("avx512bf16"))) void dots(int64_t turns) {
  const __m512bh halves = (__m512bh)_mm512_set1_epi32(kTwoHalves);
  __m512 sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = _mm512_setzero_ps();
  for (int64_t turn = 0; turn < turns; ++turn) {
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], halves, halves);
  }
  for (int i = 0; i < kSums; ++i) use((vec)sums[i]);
}

int64_t probe_dot(int64_t repeats, int threads) {
  if (!__builtin_cpu_supports("avx512bf16")) return RAREFY_NO_ISA;
#pragma omp parallel num_threads(threads)
  dots(repeats * kTurns);
  return repeats * kTurns * kSums * VL * 2 * 2 * threads;
}

bool has_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  const unsigned tile = 1u << 24, bf16 = 1u << 22;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & tile) == 0 || (d & bf16) == 0) return false;
  const long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM: a process asks before it may use tiles
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
}

// The thread's tile configuration is put back: oneDNN remembers what it has loaded, and would not load it again.
__attribute__((target("amx-tile,amx-bf16"))) void tiles(int64_t turns) {
  struct alignas(64) Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } before, config = {};
  _tile_storeconfig(&before);
  config.palette = 1;
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = 64;
    config.rows[i] = 16;
  }
  alignas(64) int operand[16 * 16];
  for (int &pair : operand) pair = kTwoHalves;
  // GCC's intrinsics tell it of the first eight bytes only: without this it would not write the others.
  __asm__ volatile("" : : "r"(&before), "r"(&config), "r"(operand) : "memory");
  _tile_loadconfig(&config);
  _tile_loadd(4, operand, 64);
  _tile_loadd(5, operand, 64);
  _tile_loadd(6, operand, 64);
  _tile_loadd(7, operand, 64);
  for (int64_t turn = 0; turn < turns; ++turn) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_loadconfig(&before);
}

int64_t probe_tiles(int64_t repeats, int threads) {
  if (!has_tiles()) return RAREFY_NO_ISA;
#pragma omp parallel num_threads(threads)
  tiles(repeats * kTurns);
  return repeats * kTurns * 4 * (16 * 16 * 32) * 2 * threads;
}
#else
int64_t probe_dot(int64_t, int) { return RAREFY_NO_ISA; }
int64_t probe_tiles(int64_t, int) { return RAREFY_NO_ISA; }
#endif

// Each thread reads, or copies the first half of to the second, its own part of data.
template <bool COPY>
int64_t probe_stream(float *data, int64_t bytes, int64_t repeats, int threads) {
  constexpr int kStride = 8;  // vectors a turn
  const int64_t part = bytes / 4 / threads / (2 * kStride * VL) * (2 * kStride * VL);
  const int64_t count = COPY ? part / 2 : part;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; ++thread) {
    float *from = data + thread * part, *to = from + count;
    vec sums[kStride] = {};
    for (int64_t repeat = 0; repeat < repeats; ++repeat) {
      for (int64_t at = 0; at < count; at += kStride * VL) {
#pragma GCC unroll 8
        for (int i = 0; i < kStride; ++i) {
          vec v = load_any(from + at + i * VL);
          if constexpr (COPY) {
            store_any(to + at + i * VL, v);
          } else {
            sums[i] += v;
          }
        }
      }
      __asm__ volatile("" : : : "memory");  // or a repeat of the same copy would be dropped
    }
    for (int i = 0; i < kStride; ++i) use(sums[i]);
  }
  return part * 4 * threads * repeats;
}

int64_t probe(int32_t work, void *data, int64_t bytes, int64_t repeats, int threads) {
  switch (work) {
    case RAREFY_PROBE_FMA_F32: return probe_fma(repeats, threads);
    case RAREFY_PROBE_DOT_BF16: return probe_dot(repeats, threads);
    case RAREFY_PROBE_TILES_BF16: return probe_tiles(repeats, threads);
    case RAREFY_PROBE_READ: return probe_stream<false>(static_cast<float *>(data), bytes, repeats, threads);
    case RAREFY_PROBE_COPY: return probe_stream<true>(static_cast<float *>(data), bytes, repeats, threads);
  }
  return RAREFY_BAD_ARGUMENT;
}

}  // namespace
}  // namespace rarefy
