// Causal attention, forward and backward, straight from and into the layout of a fused projection: q, k and v are
// qkv[token][0..2][head][dim], float32 or bfloat16, which is widened while it is packed. Products are float32's, or those of
// bfloat16 pairs where there are dot products (products.h); softmax and sums are float32. Where there are rotary positions (Su
// et al. 2021) queries and keys are turned as they are packed, and their gradients turned back as they are unpacked. Only what
// lies on or below the diagonal is computed, to the vector of keys and the tile of rows. Scores of a block of queries are kept
// for a strip of keys, so that their softmax sees them once; past a strip it goes on online. Memory is O(tokens * dim) a thread.
//
// Every element of a result is one chain of additions in the order of the keys (out, dq) or of the queries (dk, dv),
// however the work is cut: so the bits do not depend on the number of threads.
#pragma once

#include <math.h>
#include <omp.h>

#include "internal.h"

#include "exponential.h"
#include "products.h"
#include "scratch.h"

namespace rarefy {
namespace {

constexpr int64_t kQueries = 48;         // a block of queries: whole tiles of rows and whole vectors
constexpr int64_t kKeys = 64;            // a block of keys, whose panel stays in L1
constexpr int64_t kForwardStrip = 512;   // keys whose scores are kept, for kQueries queries in L2
constexpr int64_t kBackwardStrip = 256;  // the same, of probabilities and of their gradients
constexpr int64_t kSpareRows = kTileRows;

// Lane i is the largest lane of rows[i].
inline vec largest(vec (&rows)[VL]) {
  transpose(rows);
#pragma GCC unroll 4
  for (int step = VL / 2; step > 0; step /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < step; ++i) rows[i] = larger(rows[i], rows[i + step]);
  }
  return rows[0];
}

// Sizes, and the distances in qkv.
struct Heads {
  int64_t batch, tokens, heads, dim;
  int64_t pairs() const { return batch * heads; }
  int64_t width() const { return ceil_div(dim, VL) * VL; }                     // of a row of sums, or of words in deep rows
  int64_t along() const { return ceil_div(dim, kPair * VL) * VL; }             // words of a row
  int64_t depth() const { return ceil_div(dim, kPair); }                       // the same without what is padding
  int64_t panels() const { return ceil_div(tokens, kKeyPanel); }                  // of packed, transposed keys
  int64_t panel_words() const { return panels() * kKeyPanel * depth(); }
  int64_t rows() const { return ceil_div(tokens, VL) * VL + kSpareRows; }      // of packed rows, with room for whole tiles
  int64_t at(int64_t pair) const { return (pair / heads * tokens * heads + pair % heads) * dim; }  // in out
  int64_t qkv_at(int64_t pair) const { return (pair / heads * tokens * 3 * heads + pair % heads) * dim; }
  float scale() const { return 1.0f / sqrtf(float(dim)); }
};

// The threads that share one pair of sequence and head: one, or all.
struct Team {
  int rank, size;
  // Whether piece i is this thread's, dealt there and back: pieces grow or shrink steadily.
  bool owns(int64_t i) const { return (i / size % 2 == 0 ? i % size : size - 1 - i % size) == rank; }
  void wait() const {
    if (size > 1) {
#pragma omp barrier
    }
  }
};

// `count` rows of `dim` numbers, each padded with zeros to whole vectors, and `spare` rows of zeros.
template <class T>
void pack_rows(const T *source, int64_t stride, int64_t count, int64_t spare, int64_t dim, const Rows target) {
  for (int64_t r = 0; r < count; ++r) {
    const T *from = source + r * stride;
    float *to = target.row(r);
    int64_t f = 0;
    for (; f + VL <= dim; f += VL) store(to + f, load_any(from + f));
    for (; f < target.stride; ++f) to[f] = f < dim ? widen(from[f]) : 0.0f;
  }
  for (int64_t r = count; r < count + spare; ++r) {
    for (int64_t f = 0; f < target.stride; f += VL) store(target.row(r) + f, vec{});
  }
}

inline void stream(float *p, vec v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, v);
#else
  store(p, v);
#endif
}

// Turns the pairs (row[f], row[f + dim / 2]) of `count` packed rows by the angles of their tokens, or back. rotary holds, for
// each token, dim / 2 cosines and as many sines, from that of the first row on; nullptr: nothing turns.
inline void turn(const Rows rows, const float *rotary, int64_t count, int64_t dim, bool back) {
  if (rotary == nullptr) return;
  const int64_t half = dim / 2;
  const float sign = back ? -1.0f : 1.0f;
  for (int64_t r = 0; r < count; ++r) {
    float *first = rows.row(r), *second = first + half;
    const float *cosine = rotary + r * dim, *sine = cosine + half;
    int64_t f = 0;
    for (; f + VL <= half; f += VL) {
      const vec a = load_any(first + f), b = load_any(second + f), c = load_any(cosine + f);
      const vec s = load_any(sine + f) * broadcast(sign);
      store_any(first + f, a * c - b * s);
      store_any(second + f, b * c + a * s);
    }
    for (; f < half; ++f) {
      const float a = first[f], b = second[f], c = cosine[f], s = sign * sine[f];
      first[f] = a * c - b * s;
      second[f] = b * c + a * s;
    }
  }
}

// What a packed matrix is needed as: rows of words along its features, to be multiplied by panels; deep rows, a word of which
// pairs a feature of neighbouring tokens, to be summed over tokens; panels of kKeyPanel tokens, feature-major. Where words are
// single numbers, rows and deep rows are the same.
struct Factors {
  float *rows, *deep, *panel;  // any may be null
};

// Numbers of a row while it is still float32.
inline int64_t plain_stride(const Heads &h) { return kPair * h.along(); }
inline int64_t plain_size(const Heads &h) { return (kKeyPanel + kSpareRows + kPair) * plain_stride(h); }

inline void make_panel(const Rows plain, int64_t count, int64_t dim, float *panel) {
  for (int group = 0; group < kTileVectors; ++group) {
    const int64_t live = min64(max64(count - group * VL, 0), VL);
    for (int64_t f = 0; f < dim; f += VL) {
      vec block[VL];
#pragma GCC unroll 16
      for (int i = 0; i < VL; ++i) block[i] = i < live ? load(plain.row(group * VL + i) + f) : vec{};
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < VL; i += kPair) {
        if (f + i < dim) store(panel + (f + i) / kPair * kKeyPanel + group * VL, pair_up(block[i], block[i + kPair - 1]));
      }
    }
  }
}

// Packs `count` <= kKeyPanel rows and `spare` rows of zeros, turned; returns them in float32, in `scratch` or where they belong.
template <class T>
Rows pack_factors(const Heads &h, const T *source, int64_t stride, int64_t count, int64_t spare, const float *rotary,
                  float *scratch, const Factors to) {
  float *const words = to.rows != nullptr ? to.rows : to.deep;
  const Rows plain = {kPair == 1 && words != nullptr ? words : scratch, plain_stride(h)};
  pack_rows(source, stride, count, spare + kPair - 1, h.dim, plain);
  turn(plain, rotary, count, h.dim, false);
  if (to.panel != nullptr) make_panel(plain, count, h.dim, to.panel);
  if constexpr (kPair == 1) return plain;
  for (int64_t r = 0; to.deep != nullptr && r < count + spare; r += kPair) {
    for (int64_t f = 0; f < h.width(); f += VL) {
      store(to.deep + r / kPair * h.width() + f, pair_up(load(plain.row(r) + f), load(plain.row(r + 1) + f)));
    }
  }
  for (int64_t r = 0; to.rows != nullptr && r < count + spare; ++r) {
    words_along(plain.row(r), plain_stride(h), to.rows + r * h.along());
  }
  return plain;
}

// From where on `rotary` is that of the token at `t`.
inline const float *turns_at(const float *rotary, int64_t t, int64_t dim) {
  return rotary == nullptr ? nullptr : rotary + t * dim;
}

// The reverse of pack_rows, times `scale`.
template <class T>
void unpack_rows(const Rows source, float scale, int64_t count, int64_t dim, T *target, int64_t stride) {
  for (int64_t r = 0; r < count; ++r) {
    const float *from = source.row(r);
    T *to = target + r * stride;
    int64_t f = 0;
    if constexpr (sizeof(T) == sizeof(float)) {
      if (reinterpret_cast<uintptr_t>(to) % sizeof(vec) == 0) {
        for (; f + VL <= dim; f += VL) stream(to + f, load(from + f) * broadcast(scale));
      }
    }
    for (; f + VL <= dim; f += VL) store_any(to + f, load(from + f) * broadcast(scale));
    for (; f < dim; ++f) narrow_to(to + f, from[f] * scale);
  }
}

// How many pairs go one to a thread: what would leave threads idle at the end does not.
inline int64_t alone_pairs(int64_t pairs, int threads) {
  return threads == 1 || pairs >= 8 * threads ? pairs : pairs - pairs % threads;
}

// Runs work(pair, team) for all pairs: those that go round evenly one to a thread, the rest one after the other with
// every thread at work. A thread takes neighbouring heads, whose rows lie side by side. To be called by all threads of a
// parallel region.
template <class Work>
void share_pairs(int64_t pairs, int64_t heads, int threads, int64_t *next, Work work) {
  const int rank = omp_get_thread_num();
  const int64_t alone = alone_pairs(pairs, threads);
  const int64_t group = max64(1, min64(heads, alone / (4 * threads)));
  for (;;) {
    int64_t begin;
#pragma omp atomic capture
    {
      begin = *next;
      *next += group;
    }
    if (begin >= alone) break;
    for (int64_t pair = begin; pair < min64(begin + group, alone); ++pair) work(pair, Team{0, 1});
  }
  if (alone == pairs) return;
#pragma omp barrier
  for (int64_t pair = alone; pair < pairs; ++pair) {
    work(pair, Team{rank, threads});
#pragma omp barrier
  }
}

// ---- forward ------------------------------------------------------------------------------------------------------------

struct ForwardBuffers {
  float *keys, *values;                 // of the pair: panels of keys, and deep rows of values
  float *plain;                         // rows on their way there
  float *queries, *scores, *out, *row;  // of a block of queries; row: kQueries largest scores, sums and factors
};

inline ForwardBuffers carve_forward(Carver &carver, const Heads &h) {
  ForwardBuffers b;
  b.keys = carver.take<float>(h.panel_words());
  b.values = carver.take<float>(ceil_div(h.rows(), kPair) * h.width());
  b.plain = carver.take<float>(plain_size(h));
  b.queries = carver.take<float>((kQueries + kSpareRows) * h.along());
  b.scores = carver.take<float>((kQueries + kSpareRows) * (kForwardStrip + 16));
  b.out = carver.take<float>((kQueries + kSpareRows) * h.width());
  b.row = carver.take<float>((kQueries + VL) * (VL + 2));
  return b;
}

// out and lse of the queries [q0, q1) of a pair.
template <class T>
void forward_block(const Heads &h, const ForwardBuffers &b, const T *queries, const float *rotary, int64_t q0, int64_t q1,
                   T *out, float *lse) {
  constexpr int64_t kStride = kForwardStrip + 16;  // an odd number of cache lines
  const int64_t count = q1 - q0, width = h.width(), vectors = width / VL;
  const Rows q = {b.queries, h.along()}, o = {b.out, width}, v = {b.values, width};
  const Rows scores = {b.scores, kStride};
  float *largest_of = b.row, *sum_of = largest_of + kQueries + VL - kQueries % VL;
  float *partial = b.row + 2 * (kQueries + VL - kQueries % VL);  // VL a row
  const float k = h.scale() * kLog2E;
  pack_factors(h, queries, 3 * h.heads * h.dim, count, kSpareRows, turns_at(rotary, q0, h.dim), b.plain,
               {b.queries, nullptr, nullptr});
  for (int64_t s0 = 0; s0 < q1; s0 += kForwardStrip) {
    const int64_t s1 = min64(s0 + kForwardStrip, q1);
    // The keys that a tile of rows [r, r + rows) sees in [begin, end), counted from begin: none if not positive.
    auto seen = [&](int64_t r, int rows, int64_t begin, int64_t end) { return min64(end, q0 + r + rows) - begin; };
    for (int64_t j = s0; j < s1; j += kKeys) {
      for (int64_t r = 0, rows; r < count; r += rows) {
        rows = tile_rows(count - r);
        const int64_t live = seen(r, int(rows), j, min64(j + kKeys, s1));
        if (live <= 0) continue;
        product<false>({q.row(r), q.stride}, {b.keys + j * h.depth(), kKeyPanel}, kKeyPanel * h.depth(), h.depth(),
                       {scores.row(r) + (j - s0), kStride}, int(rows), ceil_div(live, VL), false);
      }
    }
    for (int64_t r0 = 0; r0 < count; r0 += VL) {
      const vec none = broadcast(-INFINITY);
      vec most[VL];
      for (int i = 0; i < VL; ++i) {
        const int64_t live = r0 + i < count ? min64(s1, q0 + r0 + i + 1) - s0 : 0;
        const float *row = scores.row(r0 + i);
        vec best = none;
        int64_t c = 0;
        for (; c + VL <= live; c += VL) best = larger(load(row + c), best);
        if (c < live) best = larger(keep(load(row + c), live - c, none), best);
        most[i] = best;
      }
      vec best = largest(most);
      if (s0 > 0) best = larger(load(largest_of + r0), best);
      if (s0 > 0) store(partial + r0 * VL, exp2_of((load(largest_of + r0) - best) * broadcast(k)));
      store(largest_of + r0, best);
      if (s0 > 0) {  // what was summed under the former largest score shrinks
        for (int64_t i = 0; i < VL && r0 + i < count; ++i) {
          const vec factor = broadcast(partial[r0 * VL + i]);
          for (int64_t f = 0; f < width; f += VL) store(o.row(r0 + i) + f, load(o.row(r0 + i) + f) * factor);
        }
        store(sum_of + r0, load(sum_of + r0) * load(partial + r0 * VL));
      }
    }
    for (int64_t r = 0, rows; r < count; r += rows) {
      rows = tile_rows(count - r);
      const int64_t needed = seen(r, int(rows), s0, s1);
      for (int64_t i = r; i < r + rows && i < count; ++i) {
        const int64_t live = min64(s1, q0 + i + 1) - s0;
        float *row = scores.row(i);
        const vec factor = broadcast(k), shift = broadcast(-k * largest_of[i]);
        vec sum = {};
        int64_t c = 0;
        for (; c + VL <= live; c += VL) {
          const vec p = exp2_of(load(row + c) * factor + shift);
          store(row + c, p);
          sum += p;
        }
        if (c < live) {
          const vec p = keep(exp2_of(load(row + c) * factor + shift), live - c, vec{});
          store(row + c, p);
          sum += p;
          c += VL;
        }
        for (; c < ceil_div(needed, kPair * VL) * kPair * VL; c += VL) store(row + c, vec{});
        words_along(row, needed, row);
        store(partial + i * VL, sum);
      }
    }
    for (int64_t r0 = 0; r0 < count; r0 += VL) {
      vec sums[VL];
      for (int i = 0; i < VL; ++i) sums[i] = r0 + i < count ? load(partial + (r0 + i) * VL) : vec{};
      const vec sum = reduce(sums);
      store(sum_of + r0, s0 > 0 ? load(sum_of + r0) + sum : sum);
    }
    for (int64_t j = s0; j < s1; j += kKeys) {
      for (int64_t r = 0, rows; r < count; r += rows) {
        rows = tile_rows(count - r);
        const int64_t live = seen(r, int(rows), j, min64(j + kKeys, s1));
        if (live <= 0) continue;
        product<false>({scores.row(r) + (j - s0) / kPair, kStride}, {v.row(j / kPair), width}, kKeyPanel,
                       ceil_div(live, kPair), {o.row(r), width}, int(rows), vectors, j > 0);
      }
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    lse[q0 + i] = largest_of[i] * h.scale() + logf(sum_of[i]);
    unpack_rows({o.row(i), width}, 1.0f / sum_of[i], 1, h.dim, out + (q0 + i) * h.heads * h.dim, h.dim);
  }
}

template <class T>
int attention_forward(const T *qkv, const float *rotary, T *out, float *lse, int64_t batch, int64_t tokens, int64_t heads,
                      int64_t dim, int threads) {
  const Heads h = {batch, tokens, heads, dim};
  const int64_t blocks = ceil_div(tokens, kQueries), stride = 3 * heads * dim;
  threads = int(max64(1, min64(threads, h.pairs() * blocks)));
  Carver counter = {nullptr, 0};
  carve_forward(counter, h);
  const size_t own = counter.used;
  const Lease lease = lease_acquire(own * threads);
  if (lease.data == nullptr) return RAREFY_NO_MEMORY;
  int64_t next = 0;
#pragma omp parallel num_threads(threads)
  {
    const FlushDenormals flush;
    const int team_size = omp_get_num_threads();
    Carver mine = {lease.data + own * omp_get_thread_num(), 0}, first = {lease.data, 0};
    const ForwardBuffers alone = carve_forward(mine, h);
    ForwardBuffers together = alone;
    const ForwardBuffers common = carve_forward(first, h);
    together.keys = common.keys;
    together.values = common.values;
    share_pairs(h.pairs(), heads, team_size, &next, [&](int64_t pair, const Team team) {
      const ForwardBuffers &b = team.size > 1 ? together : alone;
      const T *q = qkv + h.qkv_at(pair), *k = q + heads * dim, *v = k + heads * dim;
      for (int64_t p = 0; p < h.panels(); ++p) {
        if (!team.owns(p)) continue;
        const int64_t t = p * kKeyPanel, count = min64(kKeyPanel, tokens - t);
        pack_factors(h, k + t * stride, stride, count, 0, turns_at(rotary, t, dim), alone.plain,
                     {nullptr, nullptr, b.keys + t * h.depth()});
        pack_factors(h, v + t * stride, stride, count, 0, nullptr, alone.plain,
                     {nullptr, b.values + t / kPair * h.width(), nullptr});
      }
      team.wait();
      for (int64_t block = blocks - 1; block >= 0; --block) {
        if (!team.owns(block)) continue;
        const int64_t q0 = block * kQueries, q1 = min64(q0 + kQueries, tokens);
        forward_block(h, b, q + q0 * stride, rotary, q0, q1, out + h.at(pair), lse + pair * tokens);
      }
    });
  }
  lease_release(lease);
  return RAREFY_OK;
}

// ---- backward -----------------------------------------------------------------------------------------------------------

struct BackwardBuffers {
  Factors q, k, v, dout;
  float *dq, *dk, *dv;         // rows of sums
  float *lse, *shift;          // a token: log2-sum-exp2, and the sum of dout * out
  float *p, *ds;               // strips of deep rows: probabilities, and gradients of the scores
  float *tile_p, *tile_ds;     // a tile of them before it is paired: where words are single numbers it lies in its strip
  float *plain;                // rows that are being packed
};

constexpr int64_t kStripStride = kBackwardStrip + 16;  // an odd number of cache lines

constexpr int64_t kTileStride = kKeys + 16;

inline BackwardBuffers carve_backward(Carver &carver, const Heads &h, int64_t strip_rows) {
  BackwardBuffers b;
  const int64_t rows = h.rows() * h.width();
  const auto take = [&](bool along, bool deep, bool panel) {
    Factors f = {nullptr, nullptr, nullptr};
    if (along) f.rows = carver.take<float>(h.rows() * h.along());
    if (deep) f.deep = kPair == 1 && along ? f.rows : carver.take<float>(ceil_div(h.rows(), kPair) * h.width());
    if (panel) f.panel = carver.take<float>(h.panel_words());
    return f;
  };
  b.q = take(true, true, false);
  b.k = take(false, true, true);
  b.v = take(false, false, true);
  b.dout = take(true, true, false);
  b.dq = carver.take<float>(rows);
  b.dk = carver.take<float>(rows);
  b.dv = carver.take<float>(rows);
  b.lse = carver.take<float>(h.rows());
  b.shift = carver.take<float>(h.rows());
  b.p = carver.take<float>(ceil_div(strip_rows + kSpareRows, kPair) * kStripStride);
  b.ds = carver.take<float>(ceil_div(strip_rows + kSpareRows, kPair) * kStripStride);
  b.tile_p = carver.take<float>(kPair == 1 ? 0 : kTileRows * kTileStride);
  b.tile_ds = carver.take<float>(kPair == 1 ? 0 : kTileRows * kTileStride);
  b.plain = carver.take<float>(plain_size(h));
  return b;
}

// Probabilities, gradients of the scores and dq of the queries [q0, q1) for the keys [s0, s1); p and ds are their deep rows of
// the strips. Right of the diagonal both are zero as far as any tile reads.
inline void backward_queries(const Heads &h, const BackwardBuffers &b, int64_t q0, int64_t q1, int64_t s0, int64_t s1,
                             const Rows p, const Rows ds) {
  const int64_t count = q1 - q0, width = h.width(), depth = h.depth(), along = h.along();
  const float k = h.scale() * kLog2E;
  for (int64_t j = s0; j < min64(s1, q1); j += kKeys) {
    const int64_t j1 = min64(j + kKeys, s1), at = j - s0;
    const auto probs_of = [&](int64_t r) { return kPair == 1 ? Rows{p.row(r) + at, p.stride} : Rows{b.tile_p, kTileStride}; };
    const auto score = [&](int64_t r, int64_t rows) {
      const int64_t seen = min64(j1, q0 + r + rows) - j;
      if (seen <= 0) return;
      product<false>({b.q.rows + (q0 + r) * along, along}, {b.k.panel + j * depth, kKeyPanel}, kKeyPanel * depth, depth,
                     probs_of(r), int(rows), ceil_div(seen, VL), false);
    };
    // Panels of pairs are half as large, so that keys and values are in L1 together.
    for (int64_t r = 0; kPair == 1 && r < count; r += tile_rows(count - r)) score(r, tile_rows(count - r));
    for (int64_t r = 0, rows; r < count; r += rows) {
      rows = tile_rows(count - r);
      const int64_t seen = min64(j1, q0 + r + rows) - j;
      if (seen <= 0) continue;
      if (kPair == 2) score(r, rows);
      const Rows probs = probs_of(r);
      const Rows gradients = kPair == 1 ? Rows{ds.row(r) + at, ds.stride} : Rows{b.tile_ds, kTileStride};
      product<false>({b.dout.rows + (q0 + r) * along, along}, {b.v.panel + j * depth, kKeyPanel}, kKeyPanel * depth, depth,
                     gradients, int(rows), ceil_div(seen, VL), false);
      // In backward_keys a tile of keys that begins at a row's own key reads some more of the row.
      const int64_t more = q0 + r + rows <= j1 ? seen + kTileRows - 1 : seen;
      const int64_t reach = max64(more, ceil_div(seen, kPair * VL) * kPair * VL);
      for (int64_t i = r; i < r + rows; ++i) {
        const int64_t live = i < count ? min64(j1, q0 + i + 1) - j : 0;  // a row that only fills the tile is of zeros
        float *prob = probs.row(i - r), *gradient = gradients.row(i - r);
        const vec factor = broadcast(k), lse = broadcast(-b.lse[q0 + i]), shift = broadcast(b.shift[q0 + i]);
        int64_t c = 0;
        for (; c + VL <= live; c += VL) {
          const vec value = exp2_of(load(prob + c) * factor + lse);
          store(prob + c, value);
          store(gradient + c, value * (load(gradient + c) - shift));
        }
        if (c < live) {
          const vec value = exp2_of(load(prob + c) * factor + lse);
          store(prob + c, keep(value, live - c, vec{}));
          store(gradient + c, keep(value * (load(gradient + c) - shift), live - c, vec{}));
          c += VL;
        }
        for (; c < reach; c += VL) {
          store(prob + c, vec{});
          store(gradient + c, vec{});
        }
      }
      for (int64_t i = 0; kPair == 2 && i < rows; i += kPair) {
        float *deep_p = p.row((r + i) / kPair) + at, *deep_ds = ds.row((r + i) / kPair) + at;
        for (int64_t c = 0; c < reach; c += VL) {
          store(deep_p + c, pair_up(load(probs.row(i) + c), load(probs.row(i + 1) + c)));
          store(deep_ds + c, pair_up(load(gradients.row(i) + c), load(gradients.row(i + 1) + c)));
        }
      }
      for (int64_t i = 0; kPair == 2 && i < rows; ++i) words_along(gradients.row(i), seen, gradients.row(i));
      product<false>(gradients, {b.k.deep + j / kPair * width, width}, kKeyPanel, ceil_div(seen, kPair),
                     {b.dq + (q0 + r) * width, width}, int(rows), width / VL, j > 0);
    }
  }
}

// dk and dv of the keys [j0, j1), summed over the queries [c0, c1); p and ds are the strips, whose first row is query c0
// and first column key s0.
inline void backward_keys(const Heads &h, const BackwardBuffers &b, int64_t j0, int64_t j1, int64_t c0, int64_t c1,
                          int64_t s0, const Rows p, const Rows ds) {
  const int64_t width = h.width();
  for (int64_t j = j0, rows; j < j1; j += rows) {
    rows = tile_rows(j1 - j);
    const int64_t i = max64(c0, j), depth = ceil_div(c1 - i, kPair);  // i and c0 are even
    if (depth <= 0) break;
    product<true>({ds.row((i - c0) / kPair) + (j - s0), kStripStride}, {b.q.deep + i / kPair * width, width}, kKeyPanel, depth,
                  {b.dk + j * width, width}, int(rows), width / VL, c0 > j);
    product<true>({p.row((i - c0) / kPair) + (j - s0), kStripStride}, {b.dout.deep + i / kPair * width, width}, kKeyPanel,
                  depth, {b.dv + j * width, width}, int(rows), width / VL, c0 > j);
  }
}

template <class T>
void backward_pair(const Heads &h, const BackwardBuffers &b, const T *dout, const T *qkv, const float *rotary, const T *out,
                   const float *lse, T *dqkv, int64_t chunk, const Team team) {
  const int64_t tokens = h.tokens, dim = h.dim, width = h.width(), apart = h.heads * dim, stride = 3 * apart;
  // Of the rows from token t on.
  const auto from = [&](const Factors &f, int64_t t) {
    return Factors{f.rows == nullptr ? nullptr : f.rows + t * h.along(), f.deep == nullptr ? nullptr : f.deep + t / kPair * width,
                   f.panel == nullptr ? nullptr : f.panel + t * h.depth()};
  };
  for (int64_t panel = 0; panel < h.panels(); ++panel) {
    if (!team.owns(panel)) continue;
    const int64_t t = panel * kKeyPanel, count = min64(kKeyPanel, tokens - t), spare = t + kKeyPanel >= tokens ? kSpareRows : 0;
    const T *q = qkv + t * stride;
    pack_factors(h, q, stride, count, spare, turns_at(rotary, t, dim), b.plain, from(b.q, t));
    pack_factors(h, q + apart, stride, count, spare, turns_at(rotary, t, dim), b.plain, from(b.k, t));
    pack_factors(h, q + 2 * apart, stride, count, 0, nullptr, b.plain, from(b.v, t));
    const Rows gradients = pack_factors(h, dout + t * apart, apart, count, spare, nullptr, b.plain, from(b.dout, t));
    for (int64_t r0 = 0; r0 < count; r0 += VL) {
      vec sums[VL];
      for (int i = 0; i < VL; ++i) {
        sums[i] = vec{};
        if (r0 + i >= count) continue;
        const float *gradient = gradients.row(r0 + i);
        const T *result = out + (t + r0 + i) * apart;
        int64_t f = 0;
        for (; f + VL <= dim; f += VL) sums[i] += load(gradient + f) * load_any(result + f);
        float rest = 0.0f;
        for (; f < dim; ++f) rest += gradient[f] * widen(result[f]);
        sums[i][0] += rest;
      }
      store(b.shift + t + r0, reduce(sums));
    }
    for (int64_t r = 0; r < count; ++r) b.lse[t + r] = lse[t + r] * kLog2E;
  }
  team.wait();
  for (int64_t s0 = 0; s0 < tokens; s0 += kBackwardStrip) {
    const int64_t s1 = min64(s0 + kBackwardStrip, tokens);
    for (int64_t c0 = s0; c0 < tokens; c0 += chunk) {
      const int64_t c1 = min64(c0 + chunk, tokens), blocks = ceil_div(c1 - c0, kQueries);
      for (int64_t block = 0; block < blocks; ++block) {
        if (!team.owns(block)) continue;
        const int64_t q0 = c0 + block * kQueries, q1 = min64(q0 + kQueries, c1);
        const int64_t first = (q0 - c0) / kPair * kStripStride;
        backward_queries(h, b, q0, q1, s0, s1, {b.p + first, kStripStride}, {b.ds + first, kStripStride});
      }
      team.wait();
      for (int64_t j = s0; j < min64(s1, c1); j += kQueries) {
        if (!team.owns((j - s0) / kQueries)) continue;
        backward_keys(h, b, j, min64(min64(j + kQueries, s1), c1), c0, c1, s0, {b.p, kStripStride}, {b.ds, kStripStride});
      }
      team.wait();
    }
  }
  for (int64_t panel = 0; panel < h.panels(); ++panel) {
    if (!team.owns(panel)) continue;
    const int64_t t = panel * kKeyPanel, count = min64(kKeyPanel, tokens - t);
    T *to = dqkv + t * stride;
    turn({b.dq + t * width, width}, turns_at(rotary, t, dim), count, dim, true);
    turn({b.dk + t * width, width}, turns_at(rotary, t, dim), count, dim, true);
    unpack_rows({b.dq + t * width, width}, h.scale(), count, dim, to, stride);
    unpack_rows({b.dk + t * width, width}, h.scale(), count, dim, to + apart, stride);
    unpack_rows({b.dv + t * width, width}, 1.0f, count, dim, to + 2 * apart, stride);
  }
}

template <class T>
int attention_backward(const T *dout, const T *qkv, const float *rotary, const T *out, const float *lse, T *dqkv,
                       int64_t batch, int64_t tokens, int64_t heads, int64_t dim, int threads) {
  const Heads h = {batch, tokens, heads, dim};
  threads = int(max64(1, min64(threads, h.pairs() * ceil_div(tokens, kQueries))));
  const int64_t chunk = alone_pairs(h.pairs(), threads) < h.pairs() ? 4 * threads * kQueries : kQueries;
  Carver counter = {nullptr, 0};
  carve_backward(counter, h, kQueries);
  const size_t own = counter.used;
  counter = {nullptr, 0};
  carve_backward(counter, h, chunk);
  const size_t common = max64(int64_t(own), int64_t(counter.used));
  const Lease lease = lease_acquire(common + own * (threads - 1));
  if (lease.data == nullptr) return RAREFY_NO_MEMORY;
  int64_t next = 0;
#pragma omp parallel num_threads(threads)
  {
    const FlushDenormals flush;
    const int rank = omp_get_thread_num(), team_size = omp_get_num_threads();
    Carver mine = {rank == 0 ? lease.data : lease.data + common + own * (rank - 1), 0}, first = {lease.data, 0};
    const BackwardBuffers alone = carve_backward(mine, h, kQueries);
    BackwardBuffers together = carve_backward(first, h, chunk);
    if (rank > 0) {  // what each thread needs for itself; the first's own buffers lie where the common ones do
      together.tile_p = alone.tile_p;
      together.tile_ds = alone.tile_ds;
      together.plain = alone.plain;
    }
    share_pairs(h.pairs(), heads, team_size, &next, [&](int64_t pair, const Team team) {
      backward_pair(h, team.size > 1 ? together : alone, dout + h.at(pair), qkv + h.qkv_at(pair), rotary, out + h.at(pair),
                    lse + pair * tokens, dqkv + h.qkv_at(pair), team.size > 1 ? chunk : kQueries, team);
    });
  }
  lease_release(lease);
  return RAREFY_OK;
}

}  // namespace
}  // namespace rarefy
