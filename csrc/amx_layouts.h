// The layouts that AMX products read. Pairs of neighbouring features are 32-bit words in a row-major matrix, so packing them
// is a transpose of words; pairs of neighbouring tokens take an interleaving.
#pragma once

#include "pack.h"

namespace rarefy {
namespace {

constexpr int64_t kTokens = 64;  // of a panel

typedef uint32_t word;

inline vec load_words(const void *p) { return load_any(static_cast<const float *>(p)); }

// `count` pairs of neighbouring features as words: bfloat16 as they are, float32 rounded.
inline vec load_pairs(const bf16 *row, int64_t count) {
  return _mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), row);
}
inline vec load_pairs(const float *row, int64_t count) {
  const auto part = [row, count](int64_t begin) {
    const int64_t live = min64(max64(2 * count - begin, 0), VL);
    return _mm512_maskz_loadu_ps(__mmask16((1u << live) - 1), row + begin);
  };
  return reinterpret_cast<vec>(_mm512_cvtne2ps_pbh(part(VL), part(0)));
}
// SIDE features of one token as the lower halves of words.
template <int SIDE>
inline __m512i load_low(const bf16 *row) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(__mmask16((1u << SIDE) - 1), row));
}
template <int SIDE>
inline __m512i load_low(const float *row) {
  return _mm512_cvtepu16_epi32(__m256i(_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(__mmask16((1u << SIDE) - 1), row))));
}

// words[(f - begin) / 2][64] of the features [begin, end), multiples of 8, of up to 64 tokens; tokens past the last are 0.
template <class T>
void pack_pairs(const T *source, int64_t features, int64_t tokens, int64_t begin, int64_t end, word *words) {
  for (int64_t group = 0; group < kTokens; group += VL) {
    for (int64_t f = begin; f < end; f += 2 * VL) {
      const int64_t count = min64(VL, (end - f) / 2);
      vec block[VL];
#pragma GCC unroll 16
      for (int i = 0; i < VL; ++i) {
        block[i] = group + i < tokens ? load_pairs(source + (group + i) * features + f, count) : vec{};
      }
      transpose(block);
      float *to = reinterpret_cast<float *>(words + (f - begin) / 2 * kTokens + group);
      for (int64_t w = 0; w < count; ++w) store(to + w * kTokens, block[w]);
    }
  }
}

// Two rows of 16 float32 to 16 words of bfloat16 pairs.
inline vec join_pairs(vec even, vec odd) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                         20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i both = __m512i(_mm512_cvtne2ps_pbh(odd, even));
  return reinterpret_cast<vec>(_mm512_permutexvar_epi16(order, both));
}

// The reverse of pack_pairs, from float32 sums[f - begin][64].
inline void unpack_sums(const float *sums, int64_t features, int64_t tokens, int64_t begin, int64_t end,
                        bf16 *target) {
  for (int64_t group = 0; group < tokens; group += VL) {
    for (int64_t f = begin; f < end; f += 2 * VL) {
      const int64_t count = min64(VL, (end - f) / 2);
      const __mmask16 mask = __mmask16((1u << count) - 1);
      vec block[VL];
      for (int64_t w = 0; w < VL; ++w) {
        if (w >= count) {
          block[w] = vec{};
          continue;
        }
        const float *row = sums + (f - begin + 2 * w) * kTokens + group;
        block[w] = join_pairs(load(row), load(row + kTokens));
      }
      transpose(block);
      for (int64_t i = 0; i < min64(VL, tokens - group); ++i) {
        _mm512_mask_storeu_ps(target + (group + i) * features + f, mask, block[i]);
      }
    }
  }
}

inline void unpack_sums(const float *sums, int64_t features, int64_t tokens, int64_t begin, int64_t end, float *target) {
  unpack<kTokens / VL>(sums, features, tokens, begin, end, target);
}

// rows[f][64] of bfloat16, a token after the other, from words[f / 2][64].
inline void split_pairs(const word *words, int64_t features, bf16 *rows) {
  for (int64_t w = 0; w < features / 2; ++w) {
    for (int64_t group = 0; group < kTokens; group += VL) {
      const __m512i both = _mm512_loadu_si512(words + w * kTokens + group);
      bf16 *even = rows + 2 * w * kTokens + group;
      _mm256_storeu_si256(reinterpret_cast<__m256i *>(even), _mm512_cvtepi32_epi16(both));
      _mm256_storeu_si256(reinterpret_cast<__m256i *>(even + kTokens), _mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)));
    }
  }
}

// words[(f - begin) / SIDE][token / 2][SIDE]: pairs of neighbouring tokens.
template <int SIDE, class T>
void pack_tokens(const T *source, int64_t features, int64_t tokens, int64_t begin, int64_t end, word *words) {
  constexpr __mmask16 mask = __mmask16((1u << SIDE) - 1);
  const auto read = [&](int64_t t, int64_t f) {
    return t < tokens ? load_low<SIDE>(source + t * features + f) : _mm512_setzero_si512();
  };
  for (int64_t t = 0; t < kTokens; t += 2) {
    for (int64_t f = begin; f < end; f += SIDE) {
      const __m512i pairs = _mm512_or_si512(read(t, f), _mm512_slli_epi32(read(t + 1, f), 16));
      _mm512_mask_storeu_epi32(words + ((f - begin) / SIDE * (kTokens / 2) + t / 2) * SIDE, mask, pairs);
    }
  }
}

// words[token / 2][SIDE] of SIDE features from rows[SIDE][64].
template <int SIDE>
void pair_tokens(const bf16 *rows, word *words) {
  constexpr __mmask16 mask = __mmask16((1u << SIDE) - 1);
  for (int half = 0; half < 2; ++half) {
    vec block[VL] = {};
#pragma GCC unroll 16
    for (int i = 0; i < SIDE; ++i) block[i] = load_words(rows + i * kTokens + half * 32);
    transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < VL; ++i) _mm512_mask_storeu_ps(words + (half * 16 + i) * SIDE, mask, block[i]);
  }
}

}  // namespace
}  // namespace rarefy
