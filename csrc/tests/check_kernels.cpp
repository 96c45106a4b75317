// The kernels against plain double loops, through the C interface alone: no torch, no Python, so it runs on any machine
// that has a C++ compiler, and under an emulator. Every instruction set that the library offers here is checked.
//
//   check_kernels [NAME...]     fails too if an instruction set named is not offered
//
// To check another function: write a check below and give it a line in kChecks.
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "checking.h"
#include "rarefy.h"

namespace {

const int64_t kBatches[] = {1, 3, 17, 64, 65, 200}, kLargeBatches[] = {17, 200}, kWideBatches[] = {1, 17};

// How each check is repeated. All give the same bits: from run to run, whatever the threads and the width of the indices.
struct Setting {
  int index_bytes, threads;
};
const Setting kSettings[] = {{2, 1}, {2, 1}, {2, 2}, {2, 3}, {4, 2}};

enum class Size { SMALL, LARGE, WIDE };  // LARGE: slow in an emulator. WIDE: more columns than 16 bits can name
struct Case {
  int64_t rows, cols;  // in units
  double density;
  Size size;
};
const Case kCases[] = {
    {7, 5, 0.5, Size::SMALL},   {37, 29, 0.2, Size::SMALL}, {1, 1, 1.0, Size::SMALL},
    {1, 41, 0.5, Size::SMALL},  {43, 1, 0.5, Size::SMALL},  {5, 6, 1.0, Size::SMALL},
    {9, 6, 0.0, Size::SMALL},   {0, 3, 0.5, Size::SMALL},   {3, 0, 0.5, Size::SMALL},
    {131, 1203, 0.1, Size::LARGE},  // several tiles and chunks, none of them whole
    {1203, 67, 0.1, Size::LARGE},   {2, 65601, 0.002, Size::WIDE},
};
// Whether a case is worth its time: blocks of 256 entries make much of few units.
bool fits(const Case &c, int64_t entries) {
  return entries == 1 || (c.size == Size::SMALL && double(c.rows * c.cols * entries) * c.density < 8000);
}
bool has_batch(const Case &c, int64_t batch) {
  const auto in = [batch](const auto &list) { return std::find(std::begin(list), std::end(list), batch) != std::end(list); };
  return c.size == Size::SMALL || (c.size == Size::LARGE ? in(kLargeBatches) : in(kWideBatches));
}

// The units of a pattern in both orders, with indices of one width.
template <class Index>
struct Indices {
  std::vector<Index> cols, t_rows;
};

struct Problem {
  Problem(Case shape, int64_t br, int64_t bc, uint64_t seed)
      : c(shape), br(br), bc(bc), out(c.rows * br), in(c.cols * bc), random{seed}, crow(1, 0), t_crow(1, 0) {
    const bool holes = c.density < 1 && c.rows > 4 && c.cols > 4;  // rows and columns without any unit
    for (int64_t r = 0; r < c.rows; ++r) {
      for (int64_t col = 0; col < c.cols; ++col) {
        const bool empty = holes && (r == 1 || r == c.rows - 1 || col == 0 || col == 3);
        if (random.uniform() < c.density && !empty) {
          unit_row.push_back(int32_t(r));
          unit_col.push_back(int32_t(col));
        }
      }
      crow.push_back(int32_t(unit_row.size()));
    }
    for (int64_t col = 0; col < c.cols; ++col) t_crow.push_back(0);
    for (const int32_t col : unit_col) ++t_crow[col + 1];
    for (int64_t col = 0; col < c.cols; ++col) t_crow[col + 1] += t_crow[col];
    t_perm.resize(unit_row.size());
    std::vector<int32_t> cursor(t_crow);
    for (size_t k = 0; k < unit_row.size(); ++k) t_perm[cursor[unit_col[k]]++] = int32_t(k);
    fill(short_indices);
    fill(full);
    values = random.floats(num_values());
    bias = random.floats(out);
  }

  // The operands and truths of another batch.
  void set_batch(int64_t tokens) {
    batch = tokens;
    x = random.floats(batch * in);
    dy = random.floats(batch * out);
    half_x = narrow(x);
    half_dy = narrow(dy);
    set_truths(x, dy, wide);
    if (c.size == Size::SMALL) set_truths(widen(half_x), widen(half_dy), half);
  }

  struct Truths {
    std::unique_ptr<Truth> y, y_bias, dx, dvalues, dbias;
  };

  void set_truths(const Floats &x, const Floats &dy, Truths &truths) const {
    truths.y.reset(new Truth(batch * out));
    truths.dx.reset(new Truth(batch * in));
    truths.dvalues.reset(new Truth(num_values()));
    truths.dbias.reset(new Truth(out));
    for (size_t k = 0; k < unit_row.size(); ++k) {
      for (int64_t i = 0; i < br; ++i) {
        for (int64_t j = 0; j < bc; ++j) {
          const int64_t row = unit_row[k] * br + i, col = unit_col[k] * bc + j;
          const int64_t entry = (int64_t(k) * br + i) * bc + j;
          for (int64_t t = 0; t < batch; ++t) {
            const double w = values[entry], input = x[t * in + col], gradient = dy[t * out + row];
            truths.y->add(t * out + row, w * input);
            truths.dx->add(t * in + col, w * gradient);
            truths.dvalues->add(entry, gradient * input);
          }
        }
      }
    }
    for (int64_t t = 0; t < batch; ++t) {
      for (int64_t row = 0; row < out; ++row) truths.dbias->add(row, dy[t * out + row]);
    }
    truths.y_bias.reset(new Truth(*truths.y));
    for (int64_t at = 0; at < batch * out; ++at) truths.y_bias->add(at, bias[at % out]);
  }

  rarefy_pattern pattern(int index_bytes) const {
    return {out, in, br, bc, int64_t(unit_row.size()), crow.data(),
            index_bytes == 2 ? static_cast<const void *>(short_indices.cols.data()) : full.cols.data(), t_crow.data(),
            index_bytes == 2 ? static_cast<const void *>(short_indices.t_rows.data()) : full.t_rows.data(), t_perm.data(),
            index_bytes};
  }
  int64_t num_values() const { return int64_t(unit_row.size()) * br * bc; }

  Case c;
  int64_t br, bc, out, in, batch = 0;
  Random random;
  std::vector<int32_t> unit_row, unit_col, crow, t_crow, t_perm;
  Indices<uint16_t> short_indices;
  Indices<int32_t> full;
  Floats values, bias, x, dy;
  Halves half_x, half_dy;
  Truths wide, half;  // of x and dy, and of their bfloat16 (small cases only)

 private:
  template <class Index>
  void fill(Indices<Index> &indices) const {
    for (const int32_t col : unit_col) indices.cols.push_back(Index(col));
    for (const int32_t k : t_perm) indices.t_rows.push_back(Index(unit_row[k]));
  }
};

// What one call of a check found, and every bit of its results.
struct Found {
  std::string wrong;     // the first thing that was
  double worst = 0.0;    // error, as a part of its bound
  std::string bits;

  void fail(const std::string &what) {
    if (wrong.empty()) wrong = what;
  }
  void status(int code) {
    if (code != RAREFY_OK) fail("returned " + std::to_string(code));
  }
  void compare(const char *what, const Guarded &got, const Truth &truth) {
    if (!got.intact()) fail(std::string(what) + ": written outside the output");
    compare(what, got.data(), truth.exact, truth.bounds());
  }
  // factors: the relative error of one factor of each product, where it was rounded before.
  void compare(const char *what, const GuardedHalves &got, const Truth &truth, double factors) {
    if (!got.intact()) fail(std::string(what) + ": written outside the output");
    Doubles bounds = truth.bounds();  // and half a unit in the last place of 8 bits
    for (size_t i = 0; i < bounds.size(); ++i) {
      bounds[i] += factors * truth.magnitude[i];
      bounds[i] += 0x1p-8 * (fabs(truth.exact[i]) + bounds[i]);
    }
    compare(what, got.floats().data(), truth.exact, bounds);
  }
  void compare(const char *what, const float *got, const Doubles &exact, const Doubles &bounds) {
    for (size_t i = 0; i < exact.size(); ++i) {
      const double error = fabs(got[i] - exact[i]), bound = bounds[i];
      if (!(error <= bound)) {
        char text[160];
        snprintf(text, sizeof text, "%s[%zu] is %.9g instead of %.9g, off by %.3g with %.3g allowed", what, i,
                 double(got[i]), exact[i], error, bound);
        fail(text);
      }
      if (bound > 0) worst = std::max(worst, error / bound);
    }
    bits.append(reinterpret_cast<const char *>(got), exact.size() * sizeof(float));
  }
  template <class T>
  void same(const char *what, const std::vector<T> &got, const std::vector<T> &expected) {
    if (got != expected) fail(std::string(what) + ": not as it must be");
    bits.append(reinterpret_cast<const char *>(got.data()), got.size() * sizeof(T));
  }
};

// --- The checks. A check calls one function with this many threads and compares all that it wrote.

void check_spmm(const Problem &p, const rarefy_pattern &pattern, int threads, Found &found) {
  Guarded plain(p.batch * p.out), biased(p.batch * p.out);
  found.status(rarefy_spmm_f32(&pattern, p.values.data(), p.x.data(), nullptr, plain.data(), p.batch, threads));
  found.compare("y", plain, *p.wide.y);
  found.status(rarefy_spmm_f32(&pattern, p.values.data(), p.x.data(), p.bias.data(), biased.data(), p.batch, threads));
  found.compare("y with bias", biased, *p.wide.y_bias);
}

void check_spmm_t(const Problem &p, const rarefy_pattern &pattern, int threads, Found &found) {
  Guarded dx(p.batch * p.in);
  found.status(rarefy_backward_f32(&pattern, p.values.data(), p.dy.data(), nullptr, dx.data(), nullptr, nullptr, p.batch, threads));
  found.compare("dx", dx, *p.wide.dx);
}

void check_sddmm(const Problem &p, const rarefy_pattern &pattern, int threads, Found &found) {
  Guarded plain(p.num_values()), dvalues(p.num_values()), dbias(p.out);
  found.status(rarefy_backward_f32(&pattern, nullptr, p.dy.data(), p.x.data(), nullptr, plain.data(), nullptr, p.batch, threads));
  found.compare("dvalues", plain, *p.wide.dvalues);
  found.status(rarefy_backward_f32(&pattern, nullptr, p.dy.data(), p.x.data(), nullptr, dvalues.data(), dbias.data(), p.batch,
                                   threads));
  found.compare("dvalues with dbias", dvalues, *p.wide.dvalues);
  found.compare("dbias", dbias, *p.wide.dbias);
}

void check_backward(const Problem &p, const rarefy_pattern &pattern, int threads, Found &found) {
  for (const int wanted : {3, 5, 7}) {  // dx 1, dvalues 2, dbias 4; spmm_t and sddmm ask for the rest
    Guarded dx(p.batch * p.in), dvalues(p.num_values()), dbias(p.out);
    found.status(rarefy_backward_f32(&pattern, p.values.data(), p.dy.data(), p.x.data(), wanted & 1 ? dx.data() : nullptr,
                                     wanted & 2 ? dvalues.data() : nullptr, wanted & 4 ? dbias.data() : nullptr, p.batch,
                                     threads));
    if (wanted & 1) found.compare("dx", dx, *p.wide.dx);
    if (wanted & 2) found.compare("dvalues", dvalues, *p.wide.dvalues);
    if (wanted & 4) found.compare("dbias", dbias, *p.wide.dbias);
  }
}

// Whether products round their factors to bfloat16: AMX for some blocks and 64 tokens, AVX512_BF16 for all, given enough tokens.
bool rounds_factors(const Problem &p, bool enough_for_dots) {
  const bool square = p.br == p.bc && (p.br == 8 || p.br == 16);
  return (square && p.batch >= 64 && strcmp(rarefy_isa(), "amx") == 0) ||
         (enough_for_dots && strcmp(rarefy_isa(), "avx512bf16") == 0);
}

void check_bf16(const Problem &p, const rarefy_pattern &pattern, int threads, Found &found) {
  if (p.c.size != Size::SMALL) return;
  const double factors = rounds_factors(p, p.batch >= 192) ? 0x1p-8 : 0.0;
  GuardedHalves y(p.batch * p.out), dx(p.batch * p.in);
  Guarded dvalues(p.num_values()), dbias(p.out);
  found.status(rarefy_spmm_bf16(&pattern, p.values.data(), p.half_x.data(), p.bias.data(), y.data(), p.batch, threads));
  found.compare("y", y, *p.half.y_bias, factors);
  found.status(rarefy_backward_bf16(&pattern, p.values.data(), p.half_dy.data(), p.half_x.data(), dx.data(), dvalues.data(),
                                    dbias.data(), p.batch, threads));
  found.compare("dx", dx, *p.half.dx, factors);
  found.compare("dvalues", dvalues, *p.half.dvalues);
  found.compare("dbias", dbias, *p.half.dbias);
  GuardedHalves alone(p.batch * p.in);
  found.status(rarefy_backward_bf16(&pattern, p.values.data(), p.half_dy.data(), nullptr, alone.data(), nullptr, nullptr,
                                    p.batch, threads));
  found.compare("dx alone", alone, *p.half.dx, factors);
}

// What is stored is rounded to nearest, ties to even, also where the carry reaches the exponent; NaN and infinity stay.
void check_rounding(const Problem &p, const rarefy_pattern &, int threads, Found &found) {
  const uint32_t words[] = {0x3f800000, 0x3f808000, 0x3f818000, 0x3f808001, 0x3f807fff, 0x3fffffff, 0x7f7fffff,
                            0x7f800000, 0xff800000, 0x7fc00000, 0x7f800001, 0xff7f8000, 0xbf818000, 0x00800000};
  constexpr int64_t count = sizeof words / sizeof *words;
  Floats values(count);
  memcpy(values.data(), words, sizeof words);
  std::vector<int32_t> crow(1, 0), cols(count, 0);
  for (int32_t i = 1; i <= count; ++i) crow.push_back(i);
  const rarefy_pattern column = {count, 1, 1, 1, count, crow.data(), cols.data(), nullptr, nullptr, nullptr, 4};
  const Halves ones(static_cast<size_t>(p.batch), 0x3f80);
  Halves y(static_cast<size_t>(p.batch * count)), expected;
  found.status(rarefy_spmm_bf16(&column, values.data(), ones.data(), nullptr, y.data(), p.batch, threads));
  for (int64_t t = 0; t < p.batch; ++t) {
    for (const float value : values) expected.push_back(narrow(value));
  }
  for (uint16_t &half : y) half = (half & 0x7fff) > 0x7f80 ? 0x7fc0 : half;  // any NaN will do
  found.same("y", y, expected);
}

// Results of an MLP with their bounds: what is off by a bound before a step is off by a derived one after it.
struct Near {
  Doubles exact, off;
  explicit Near(size_t size = 0) : exact(size, 0.0), off(size, 0.0) {}
  explicit Near(const Floats &given) : exact(given.begin(), given.end()), off(given.size(), 0.0) {}
  double size(size_t i) const { return fabs(exact[i]) + off[i]; }
};

// Sums of products in any order: adds(i, weight, at) is called for each product, weight * from[at], of result i.
template <class Products>
Near sums(int64_t count, const Near &from, Products products) {
  Near out(static_cast<size_t>(count));
  Doubles magnitude(static_cast<size_t>(count), 0.0);
  std::vector<int64_t> terms(static_cast<size_t>(count), 0);
  products([&](int64_t i, double weight, double weight_off, int64_t at) {
    const double whole = (fabs(weight) + weight_off) * from.size(size_t(at));
    out.exact[i] += weight * from.exact[at];
    out.off[i] += whole - fabs(weight * from.exact[at]);
    magnitude[i] += whole;
    ++terms[i];
  });
  for (size_t i = 0; i < out.exact.size(); ++i) out.off[i] += double(terms[i] + 2) * FLT_EPSILON * magnitude[i];
  return out;
}

template <class Work>
void each_entry(const Problem &p, Work work) {
  for (size_t k = 0; k < p.unit_row.size(); ++k) {
    for (int64_t i = 0; i < p.br; ++i) {
      for (int64_t j = 0; j < p.bc; ++j) {
        work((int64_t(k) * p.br + i) * p.bc + j, p.unit_row[k] * p.br + i, p.unit_col[k] * p.bc + j);
      }
    }
  }
}

Near forward(const Problem &p, const Near &x, int64_t batch) {
  Near bias(p.bias), y = sums(batch * p.out, x, [&](auto add) {
    each_entry(p, [&](int64_t entry, int64_t row, int64_t col) {
      for (int64_t t = 0; t < batch; ++t) add(t * p.out + row, p.values[entry], 0.0, t * p.in + col);
    });
  });
  for (size_t i = 0; i < y.exact.size(); ++i) {
    y.exact[i] += bias.exact[i % size_t(p.out)];
    y.off[i] += FLT_EPSILON * (2 * y.size(i) + bias.size(i % size_t(p.out)));
  }
  return y;
}

Near backward(const Problem &p, const Near &dy, int64_t batch) {
  return sums(batch * p.in, dy, [&](auto add) {
    each_entry(p, [&](int64_t entry, int64_t row, int64_t col) {
      for (int64_t t = 0; t < batch; ++t) add(t * p.in + col, p.values[entry], 0.0, t * p.out + row);
    });
  });
}

Near gradient(const Problem &p, const Near &dy, const Near &x, int64_t batch) {
  return sums(p.num_values(), x, [&](auto add) {
    each_entry(p, [&](int64_t entry, int64_t row, int64_t col) {
      for (int64_t t = 0; t < batch; ++t) add(entry, dy.exact[t * p.out + row], dy.off[t * p.out + row], t * p.in + col);
    });
  });
}

Near column_sums(const Near &dy, int64_t features, int64_t batch) {
  return sums(features, dy, [&](auto add) {
    for (int64_t at = 0; at < batch * features; ++at) add(at % features, 1.0, 0.0, at);
  });
}

Near product(const Near &a, const Near &b) {
  Near out(a.exact.size());
  for (size_t i = 0; i < out.exact.size(); ++i) {
    out.exact[i] = a.exact[i] * b.exact[i];
    out.off[i] = a.size(i) * b.size(i) * (1 + FLT_EPSILON) - fabs(out.exact[i]);
  }
  return out;
}

// act(z) and its derivative; `curve` bounds the change of the derivative, `steep` the derivative.
void activated(int activation, const Near &z, Near &h, Near &slope) {
  for (size_t i = 0; i < z.exact.size(); ++i) {
    const double x = z.exact[i], off = z.off[i], own = 8 * FLT_EPSILON * (1 + z.size(i));
    double value = 0, d = 0, steep = 1.13, change = 0.85 * off;
    if (activation == RAREFY_GELU) {
      const double below = 0.5 * erfc(-x * 0.70710678118654752);
      value = x * below;
      d = below + x * exp(-0.5 * x * x) * 0.39894228040143268;
    } else if (activation == RAREFY_GELU_TANH) {
      const double a = 0.79788456080286536, u = a * (x + 0.044715 * x * x * x), th = tanh(u);
      value = 0.5 * x * (1 + th);
      d = 0.5 * (1 + th) + 0.5 * x * (1 - th * th) * a * (1 + 3 * 0.044715 * x * x);
    } else if (activation == RAREFY_SILU) {
      const double s = 1 / (1 + exp(-x));
      value = x * s;
      d = s + value * (1 - s);
    } else if (activation == RAREFY_RELU) {
      value = x > 0 ? x : 0;
      d = x > 0;
      change = fabs(x) <= off;
    } else {
      value = x > 0 ? x * x : 0;
      d = x > 0 ? 2 * x : 0;
      steep = 2 * z.size(i);
      change = 2 * off;
    }
    h.exact[i] = value, h.off[i] = steep * off + own * (1 + fabs(value));
    slope.exact[i] = d, slope.off[i] = change + own;
  }
}

Near stored(Near z, bool half) {
  for (size_t i = 0; half && i < z.off.size(); ++i) z.off[i] += 0x1p-8 * z.size(i);
  return z;
}

// The operands and truths of an MLP whose matrix `up` is that of a problem. A gate has the same block and size.
struct Mlp {
  Mlp(const Problem &up, bool gated)
      : key(up.random.state), activation(int((up.batch + up.in) % 5)), half(gated == (up.batch % 2 == 0)),
        gate(up.c, up.br, up.bc, uint64_t(up.in)),
        down({up.c.cols, up.out / up.bc, up.c.density, Size::SMALL}, up.br, up.bc, uint64_t(up.out)) {
    const int64_t batch = up.batch;
    dy = Random{uint64_t(batch)}.floats(batch * down.out);
    const Near x(up.x), gradient_of_y(dy);
    const Near z = stored(forward(up, x, batch), half), g = gated ? stored(forward(gate, x, batch), half) : z;
    Near act(z.exact.size()), slope(z.exact.size());
    activated(activation, g, act, slope);
    const Near h = gated ? product(act, z) : act, dh = backward(down, gradient_of_y, batch);
    const Near dg = product(gated ? product(dh, z) : dh, slope), dz = gated ? product(dh, act) : dg;
    y = forward(down, h, batch);
    dx = backward(up, dz, batch);
    if (gated) {
      const Near more = backward(gate, dg, batch);
      for (size_t i = 0; i < dx.exact.size(); ++i) {
        dx.off[i] += more.off[i] + FLT_EPSILON * (dx.size(i) + more.size(i));
        dx.exact[i] += more.exact[i];
      }
      d_gate = gradient(gate, dg, x, batch);
      d_gate_bias = column_sums(dg, gate.out, batch);
    }
    d_up = gradient(up, dz, x, batch);
    d_up_bias = column_sums(dz, up.out, batch);
    d_down = gradient(down, gradient_of_y, h, batch);
    d_down_bias = column_sums(gradient_of_y, down.out, batch);
  }

  uint64_t key;  // of the problem and its batch
  int activation;
  bool half;  // what is kept for the backward pass is bfloat16
  Problem gate, down;
  Floats dy;
  Near y, dx, d_gate, d_gate_bias, d_up, d_up_bias, d_down, d_down_bias;
};

void check_mlp(const Problem &up, const rarefy_pattern &pattern, int threads, Found &found) {
  if (up.c.size != Size::SMALL || up.out * up.in == 0) return;
  static std::unique_ptr<Mlp> kept[2];  // the truth is the same in every setting, and slow
  for (const bool gated : {false, true}) {
    if (kept[gated] == nullptr || kept[gated]->key != up.random.state) kept[gated].reset(new Mlp(up, gated));
    const Mlp &truth = *kept[gated];
    const Problem &gate = truth.gate, &down = truth.down;
    const int64_t batch = up.batch, groups = (batch + RAREFY_SAVED_TOKENS - 1) / RAREFY_SAVED_TOKENS;
    const rarefy_pattern gate_pattern = gate.pattern(pattern.index_bytes), down_pattern = down.pattern(pattern.index_bytes);
    const rarefy_layer none = {nullptr, nullptr, nullptr}, first = {&gate_pattern, gate.values.data(), gate.bias.data()};
    const rarefy_mlp mlp = {gated ? first : none, {&pattern, up.values.data(), up.bias.data()},
                            {&down_pattern, down.values.data(), down.bias.data()}, truth.activation, 0, truth.half};
    Floats saved(size_t(groups * RAREFY_SAVED_TOKENS * up.out * (gated ? 2 : 1)));
    Guarded y(batch * down.out), dx(batch * up.in), d_up(up.num_values()), d_up_bias(up.out), d_down(down.num_values()),
        d_down_bias(down.out), d_gate(gate.num_values()), d_gate_bias(gate.out);
    const rarefy_mlp_gradients gradients = {{d_gate.data(), d_gate_bias.data()}, {d_up.data(), d_up_bias.data()},
                                            {d_down.data(), d_down_bias.data()}};
    found.status(rarefy_mlp_forward(&mlp, up.x.data(), y.data(), saved.data(), batch, threads));
    found.status(rarefy_mlp_backward(&mlp, truth.dy.data(), up.x.data(), saved.data(), dx.data(), &gradients, batch, threads));
    // Where factors are rounded tests/test_mlp.py has a bound: here only bits count.
    const bool rounds = truth.half && rounds_factors(up, batch >= 64);
    const auto compare = [&found, rounds](const char *what, const Guarded &got, const Near &near) {
      if (!got.intact()) found.fail(std::string(what) + ": written outside the output");
      found.compare(what, got.data(), near.exact, rounds ? Doubles(near.off.size(), INFINITY) : near.off);
    };
    compare("y", y, truth.y);
    compare("dx", dx, truth.dx);
    compare("d up", d_up, truth.d_up);
    compare("d up bias", d_up_bias, truth.d_up_bias);
    compare("d down", d_down, truth.d_down);
    compare("d down bias", d_down_bias, truth.d_down_bias);
    if (!gated) continue;
    compare("d gate", d_gate, truth.d_gate);
    compare("d gate bias", d_gate_bias, truth.d_gate_bias);
  }
}

// Products far below the smallest normal number come out as zero, and the caller's arithmetic stays as it was.
void check_denormals(const Problem &p, const rarefy_pattern &pattern, int threads, Found &found) {
  const Floats values(p.num_values(), 1e-30f), x(p.batch * p.in, 1e-10f);
  Guarded y(p.batch * p.out);
  found.status(rarefy_spmm_f32(&pattern, values.data(), x.data(), nullptr, y.data(), p.batch, threads));
#if defined(__x86_64__) || defined(__aarch64__)
  found.compare("y of denormals", y, Truth(p.batch * p.out));
#endif
  volatile float tiny = 1e-40f;
  tiny = tiny * 0.5f;
  if (!(tiny > 0.0f)) found.fail("the caller's denormals are flushed afterwards");
}

void check_transpose(const Problem &p, const rarefy_pattern &pattern, int, Found &found) {
  std::vector<int32_t> t_crow(p.t_crow.size(), -1), t_perm(p.t_perm.size(), -1), rows(p.t_perm.size(), -1);
  std::vector<uint16_t> short_rows(p.t_perm.size(), 0);
  void *t_rows = pattern.index_bytes == 2 ? static_cast<void *>(short_rows.data()) : rows.data();
  found.status(rarefy_transpose(p.c.rows, p.c.cols, p.crow.data(), pattern.cols, t_crow.data(), t_rows, t_perm.data(),
                                pattern.index_bytes));
  if (pattern.index_bytes == 2) rows.assign(short_rows.begin(), short_rows.end());
  found.same("t_crow", t_crow, p.t_crow);
  found.same("t_rows", rows, p.full.t_rows);
  found.same("t_perm", t_perm, p.t_perm);
}

// What a node counts for, seen from a line with so many neighbours in common.
double link_share(double common, double degree, bool inside) {
  return common > 0 ? (inside ? 1 + common : 1) / std::max(degree - common, 1.0) : 0.0;
}

void check_links(const Problem &p, const rarefy_pattern &pattern, int threads, Found &found) {
  if (p.br != 1 || p.bc != 1 || p.c.size != Size::SMALL) return;
  const size_t rows = p.c.rows, cols = p.c.cols, first = cols / 3;
  Doubles linked(rows * cols), of_rows(rows * rows), of_cols(cols * cols);
  for (size_t k = 0; k < p.unit_row.size(); ++k) linked[p.unit_row[k] * cols + p.unit_col[k]] = 1;
  for (size_t r = 0; r < rows; ++r) {
    for (size_t c = 0; c < cols; ++c) {
      if (linked[r * cols + c] == 0) continue;
      for (size_t i = 0; i < rows; ++i) of_rows[r * rows + i] += linked[i * cols + c];
      for (size_t t = 0; t < cols; ++t) of_cols[c * cols + t] += linked[r * cols + t];
    }
  }
  for (const bool inside : {false, true}) {
    Doubles exact_pairs(rows * rows), exact((cols - first) * rows);
    for (size_t j = 0; j < rows; ++j) {
      for (size_t i = 0; i < rows; ++i) {
        exact_pairs[j * rows + i] = link_share(of_rows[j * rows + i], of_rows[j * rows + j], inside);
      }
    }
    for (size_t t = first; t < cols; ++t) {
      for (size_t i = 0; i < rows; ++i) {
        double &score = exact[(t - first) * rows + i];
        for (size_t s = 0; s < cols; ++s) {
          if (linked[i * cols + s] != 0) score += link_share(of_cols[s * cols + t], of_cols[s * cols + s], inside);
        }
        for (size_t j = 0; j < rows; ++j) {
          if (linked[j * cols + t] != 0) score += exact_pairs[j * rows + i];
        }
      }
    }
    Doubles pair_bounds(exact_pairs), bounds(exact);  // one rounding; so many sums and 17 bits
    for (double &bound : pair_bounds) bound *= 0x1p-23;
    for (double &bound : bounds) bound *= 0x1p-16;
    Guarded pairs(exact_pairs.size()), scores(exact.size());
    found.status(rarefy_link_pairs(&pattern, inside, pairs.data(), threads));
    found.compare("pairs", pairs.data(), exact_pairs, pair_bounds);
    found.status(rarefy_link_scores(&pattern, inside, pairs.data(), int64_t(first), int64_t(cols), scores.data(), threads));
    found.compare("scores", scores.data(), exact, bounds);
    if (!pairs.intact() || !scores.intact()) found.fail("links: written outside the output");
  }
}

void check_expand(const Problem &p, const rarefy_pattern &pattern, int threads, Found &found) {
  Floats values(p.num_values());
  for (size_t i = 0; i < values.size(); ++i) values[i] = float(i + 1);
  std::vector<float> expected(static_cast<size_t>(p.out * p.in), 0.0f);
  for (size_t k = 0; k < p.unit_row.size(); ++k) {
    for (int64_t i = 0; i < p.br; ++i) {
      for (int64_t j = 0; j < p.bc; ++j) {
        expected[(p.unit_row[k] * p.br + i) * p.in + p.unit_col[k] * p.bc + j] =
            values[(int64_t(k) * p.br + i) * p.bc + j];
      }
    }
  }
  std::vector<float> weight(expected.size(), NAN), back(values.size(), NAN);
  found.status(rarefy_expand_f32(&pattern, values.data(), weight.data(), threads));
  found.same("expanded weight", weight, expected);
  found.status(rarefy_collect_f32(&pattern, expected.data(), back.data(), threads));
  found.same("collected values", back, std::vector<float>(values.begin(), values.end()));
}

void check_grow(const Problem &p, const rarefy_pattern &pattern, int threads, Found &found) {
  Random random = {uint64_t(p.out + p.in)};
  Floats gradient = random.floats(p.out * p.in);
  for (size_t i = 0; i < gradient.size(); i += 3) gradient[i] = roundf(4 * gradient[i]) / 4;  // ties
  if (gradient.size() > 50) gradient[7] = NAN, gradient[40] = INFINITY;

  std::vector<bool> active(p.c.rows * p.c.cols);
  for (size_t k = 0; k < p.unit_row.size(); ++k) active[p.unit_row[k] * p.c.cols + p.unit_col[k]] = true;
  struct Unit {
    float score;
    int64_t index;
  };
  std::vector<Unit> absent;
  int64_t nonfinite = 0;
  for (int64_t unit = 0; unit < p.c.rows * p.c.cols; ++unit) {
    if (active[unit]) continue;
    float sum = 0.0f;
    for (int64_t i = 0; i < p.br; ++i) {
      for (int64_t j = 0; j < p.bc; ++j) {
        sum += fabsf(gradient[(unit / p.c.cols * p.br + i) * p.in + unit % p.c.cols * p.bc + j]);
      }
    }
    const float score = sum / float(p.br * p.bc);
    if (score <= FLT_MAX) absent.push_back({score, unit});
    nonfinite += !(score <= FLT_MAX);
  }
  std::stable_sort(absent.begin(), absent.end(), [](const Unit &a, const Unit &b) { return a.score > b.score; });

  for (const int64_t k : {int64_t(0), int64_t(1), int64_t(13), p.c.rows * p.c.cols}) {
    std::vector<int64_t> best;
    Floats best_scores;
    for (size_t i = 0; i < std::min(absent.size(), size_t(k)); ++i) {
      best.push_back(absent[i].index);
      best_scores.push_back(absent[i].score);
    }
    void *selection = rarefy_grow_new(k);
    const int64_t step = std::max<int64_t>(1, p.c.rows / 3);
    for (int64_t first = (p.c.rows - 1) / step * step; first >= 0; first -= step) {  // the last tile first
      found.status(rarefy_grow_scan_f32(selection, &pattern, gradient.data() + first * p.br * p.in, first,
                                        std::min(step, p.c.rows - first), threads));
    }
    std::vector<int64_t> units(static_cast<size_t>(k), -1), odd(1, -1);
    Floats scores(static_cast<size_t>(k), NAN);
    const int64_t count = rarefy_grow_finish(selection, units.data(), scores.data(), odd.data());
    rarefy_grow_free(selection);
    if (count < 0) return found.status(int(count));
    units.resize(static_cast<size_t>(count));
    scores.resize(static_cast<size_t>(count));
    found.same("units", units, best);
    found.same("scores", scores, best_scores);
    found.same("number not finite", odd, {nonfinite});
  }
}

struct Check {
  const char *name;
  void (*run)(const Problem &, const rarefy_pattern &, int threads, Found &);
  bool by_isa;  // depends on instruction set and batch
};
const Check kChecks[] = {
    {"spmm", check_spmm, true},           {"spmm_t", check_spmm_t, true},       {"sddmm", check_sddmm, true},
    {"backward", check_backward, true},   {"denormals", check_denormals, true}, {"transpose", check_transpose, false},
    {"grow", check_grow, false},          {"bf16", check_bf16, true},           {"rounding", check_rounding, true},
    {"mlp", check_mlp, true},             {"expand", check_expand, false},    {"links", check_links, true},
};

// --- Running them.

struct Row {  // of the table that is printed
  int64_t problems = 0, runs = 0, failures = 0;
  double worst = 0.0;
};

constexpr int64_t kFailuresShown = 4;  // of each check

// One check of one problem, in every setting.
void run(const char *isa, const Check &check, const Problem &p, Row &row) {
  std::string bits;
  bool first = true;
  ++row.problems;
  for (const Setting &setting : kSettings) {
    const int index_bytes = p.c.size == Size::WIDE ? 4 : setting.index_bytes;
    const rarefy_pattern pattern = p.pattern(index_bytes);
    Found found;
    check.run(p, pattern, setting.threads, found);
    if (first) bits = found.bits;
    if (found.bits != bits) found.fail("other bits than in the first run");
    first = false;
    ++row.runs;
    row.worst = std::max(row.worst, found.worst);
    if (!found.wrong.empty() && ++row.failures <= kFailuresShown) {
      printf("\nFAILED %s %s: %lldx%lld units of %lldx%lld, density %g, batch %lld, %d-byte indices, %d threads: %s\n", isa,
             check.name, (long long)p.c.rows, (long long)p.c.cols, (long long)p.br, (long long)p.bc, p.c.density,
             (long long)p.batch, index_bytes, setting.threads, found.wrong.c_str());
    }
  }
}

std::vector<std::string> split(const char *names) {
  std::vector<std::string> out(1);
  for (; *names; ++names) {
    if (*names == ',') {
      out.emplace_back();
    } else {
      out.back() += *names;
    }
  }
  return out;
}

}  // namespace

int main(int argc, char **argv) {
  const std::vector<std::string> isas = split(rarefy_isas());
  constexpr size_t kNumChecks = sizeof kChecks / sizeof *kChecks;
  std::vector<std::vector<Row>> rows(isas.size() + 1, std::vector<Row>(kNumChecks));  // the last: of no instruction set
  printf("instruction sets: %s\n", rarefy_isas());
  for (int i = 1; i < argc; ++i) {
    if (std::find(isas.begin(), isas.end(), argv[i]) != isas.end()) continue;
    printf("FAILED %s is not among them\n", argv[i]);
    return 1;
  }
  bool good = true;
  printf("blocks:");
  uint64_t seed = 0;
  int blocks = 0;
  for (int64_t br = 1; br <= 64; ++br) {
    for (int64_t bc = 1; bc <= 64; ++bc) {
      if (!rarefy_supports(br, bc)) continue;
      printf(" %lldx%lld", (long long)br, (long long)bc);
      fflush(stdout);
      ++blocks;
      for (const Case &shape : kCases) {
        if (!fits(shape, br * bc)) continue;
        Problem p(shape, br, bc, ++seed);
        for (size_t c = 0; c < kNumChecks; ++c) {
          if (!kChecks[c].by_isa) run("any", kChecks[c], p, rows[isas.size()][c]);
        }
        for (const int64_t batch : kBatches) {
          if (!has_batch(shape, batch)) continue;
          p.set_batch(batch);
          for (size_t i = 0; i < isas.size(); ++i) {
            if (rarefy_set_isa(isas[i].c_str()) != RAREFY_OK || rarefy_isa() != isas[i]) {
              printf("\nFAILED %s cannot be chosen\n", isas[i].c_str());
              return 1;
            }
            for (size_t c = 0; c < kNumChecks; ++c) {
              if (kChecks[c].by_isa) run(isas[i].c_str(), kChecks[c], p, rows[i][c]);
            }
          }
        }
      }
    }
  }
  printf("\nbatches 1 to 200, 2- and 4-byte indices, 1, 2 and 3 threads; every run is compared with the truth, and its\n"
         "bits with those of the first\n\n%-10s %-10s %9s %7s %22s\n", "", "", "problems", "runs", "worst error / allowed");
  for (size_t i = 0; i <= isas.size(); ++i) {
    for (size_t c = 0; c < kNumChecks; ++c) {
      const Row &row = rows[i][c];
      if (row.problems == 0) continue;
      printf("%-10s %-10s %9lld %7lld %22.3f  ", i < isas.size() ? isas[i].c_str() : "any", kChecks[c].name,
             (long long)row.problems, (long long)row.runs, row.worst);
      if (row.failures == 0) {
        printf("ok\n");
      } else {
        printf("%lld FAILED\n", (long long)row.failures);
      }
      good = good && row.failures == 0;
    }
  }
  good = good && blocks > 0;
  printf(good ? "all passed\n" : "FAILED\n");
  return good ? 0 : 1;
}
