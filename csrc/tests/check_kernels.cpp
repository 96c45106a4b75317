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

#include "rarefy.h"

namespace {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

const int64_t kBatches[] = {1, 3, 17, 64, 65, 200}, kLargeBatches[] = {17, 200}, kWideBatches[] = {1, 17};

// How each check is repeated. All give the same bits: from run to run, whatever the threads and the width of the indices.
struct Setting {
  int index_bytes, threads;
};
const Setting kSettings[] = {{2, 1}, {2, 1}, {2, 2}, {2, 3}, {4, 2}};

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
    fill(narrow);
    fill(full);
    values = random.floats(num_values());
    bias = random.floats(out);
  }

  // The operands and truths of another batch.
  void set_batch(int64_t tokens) {
    batch = tokens;
    x = random.floats(batch * in);
    dy = random.floats(batch * out);
    y.reset(new Truth(batch * out));
    dx.reset(new Truth(batch * in));
    dvalues.reset(new Truth(num_values()));
    dbias.reset(new Truth(out));
    for (size_t k = 0; k < unit_row.size(); ++k) {
      for (int64_t i = 0; i < br; ++i) {
        for (int64_t j = 0; j < bc; ++j) {
          const int64_t row = unit_row[k] * br + i, col = unit_col[k] * bc + j;
          const int64_t entry = (int64_t(k) * br + i) * bc + j;
          for (int64_t t = 0; t < batch; ++t) {
            const double w = values[entry], input = x[t * in + col], gradient = dy[t * out + row];
            y->add(t * out + row, w * input);
            dx->add(t * in + col, w * gradient);
            dvalues->add(entry, gradient * input);
          }
        }
      }
    }
    for (int64_t t = 0; t < batch; ++t) {
      for (int64_t row = 0; row < out; ++row) dbias->add(row, dy[t * out + row]);
    }
    y_bias.reset(new Truth(*y));
    for (int64_t at = 0; at < batch * out; ++at) y_bias->add(at, bias[at % out]);
  }

  rarefy_pattern pattern(int index_bytes) const {
    return {out, in, br, bc, int64_t(unit_row.size()), crow.data(),
            index_bytes == 2 ? static_cast<const void *>(narrow.cols.data()) : full.cols.data(), t_crow.data(),
            index_bytes == 2 ? static_cast<const void *>(narrow.t_rows.data()) : full.t_rows.data(), t_perm.data(),
            index_bytes};
  }
  int64_t num_values() const { return int64_t(unit_row.size()) * br * bc; }

  Case c;
  int64_t br, bc, out, in, batch = 0;
  Random random;
  std::vector<int32_t> unit_row, unit_col, crow, t_crow, t_perm;
  Indices<uint16_t> narrow;
  Indices<int32_t> full;
  Floats values, bias, x, dy;
  std::unique_ptr<Truth> y, y_bias, dx, dvalues, dbias;

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
    for (size_t i = 0; i < got.size(); ++i) {
      const double error = fabs(got.data()[i] - truth.exact[i]);
      const double bound = double(truth.terms[i] + 2) * FLT_EPSILON * truth.magnitude[i];
      if (!(error <= bound)) {
        char text[160];
        snprintf(text, sizeof text, "%s[%zu] is %.9g instead of %.9g, off by %.3g with %.3g allowed", what, i,
                 double(got.data()[i]), truth.exact[i], error, bound);
        fail(text);
      }
      if (bound > 0) worst = std::max(worst, error / bound);
    }
    bits.append(reinterpret_cast<const char *>(got.data()), got.size() * sizeof(float));
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
  found.compare("y", plain, *p.y);
  found.status(rarefy_spmm_f32(&pattern, p.values.data(), p.x.data(), p.bias.data(), biased.data(), p.batch, threads));
  found.compare("y with bias", biased, *p.y_bias);
}

void check_spmm_t(const Problem &p, const rarefy_pattern &pattern, int threads, Found &found) {
  Guarded dx(p.batch * p.in);
  found.status(rarefy_spmm_t_f32(&pattern, p.values.data(), p.dy.data(), dx.data(), p.batch, threads));
  found.compare("dx", dx, *p.dx);
}

void check_sddmm(const Problem &p, const rarefy_pattern &pattern, int threads, Found &found) {
  Guarded plain(p.num_values()), dvalues(p.num_values()), dbias(p.out);
  found.status(rarefy_sddmm_f32(&pattern, p.dy.data(), p.x.data(), plain.data(), nullptr, p.batch, threads));
  found.compare("dvalues", plain, *p.dvalues);
  found.status(rarefy_sddmm_f32(&pattern, p.dy.data(), p.x.data(), dvalues.data(), dbias.data(), p.batch, threads));
  found.compare("dvalues with dbias", dvalues, *p.dvalues);
  found.compare("dbias", dbias, *p.dbias);
}

void check_backward(const Problem &p, const rarefy_pattern &pattern, int threads, Found &found) {
  for (const int wanted : {3, 5, 7}) {  // dx 1, dvalues 2, dbias 4; spmm_t and sddmm ask for the rest
    Guarded dx(p.batch * p.in), dvalues(p.num_values()), dbias(p.out);
    found.status(rarefy_backward_f32(&pattern, p.values.data(), p.dy.data(), p.x.data(), wanted & 1 ? dx.data() : nullptr,
                                     wanted & 2 ? dvalues.data() : nullptr, wanted & 4 ? dbias.data() : nullptr, p.batch,
                                     threads));
    if (wanted & 1) found.compare("dx", dx, *p.dx);
    if (wanted & 2) found.compare("dvalues", dvalues, *p.dvalues);
    if (wanted & 4) found.compare("dbias", dbias, *p.dbias);
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
  std::vector<uint16_t> narrow(p.t_perm.size(), 0);
  void *t_rows = pattern.index_bytes == 2 ? static_cast<void *>(narrow.data()) : rows.data();
  found.status(rarefy_transpose(p.c.rows, p.c.cols, p.crow.data(), pattern.cols, t_crow.data(), t_rows, t_perm.data(),
                                pattern.index_bytes));
  if (pattern.index_bytes == 2) rows.assign(narrow.begin(), narrow.end());
  found.same("t_crow", t_crow, p.t_crow);
  found.same("t_rows", rows, p.full.t_rows);
  found.same("t_perm", t_perm, p.t_perm);
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
    {"grow", check_grow, false},
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
