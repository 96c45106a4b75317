// The kernels for images against plain loops, through the C interface alone, as check_kernels does for matrices.
//
//   check_images [NAME...]     fails too if an instruction set named is not offered
#include "checking.h"
#include "tally.h"

namespace {

struct Case {
  int64_t images, channels, out, in_size[2], kernel[2], stride[2], padding[2], dilation[2], block_rows, block_cols;
  double density;
};
const Case kCases[] = {
    {5, 3, 8, {7, 6}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1, 1, 0.3},
    {17, 4, 8, {5, 9}, {3, 3}, {2, 2}, {1, 1}, {1, 1}, 4, 1, 0.3},
    {16, 4, 8, {8, 8}, {3, 3}, {1, 1}, {0, 0}, {1, 1}, 4, 4, 0.4},
    {3, 6, 16, {11, 8}, {5, 3}, {2, 1}, {2, 0}, {1, 2}, 8, 1, 0.2},
    {9, 4, 4, {7, 7}, {2, 2}, {3, 3}, {0, 0}, {1, 1}, 1, 1, 0.5},
    {2, 16, 16, {6, 6}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 16, 16, 0.5},
    {4, 8, 8, {6, 30}, {2, 2}, {1, 1}, {3, 2}, {1, 1}, 8, 8, 0.5},
    {20, 40, 24, {4, 5}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1, 1, 0.1},
    {3, 5, 4, {5, 5}, {1, 1}, {2, 2}, {0, 0}, {1, 1}, 1, 1, 0.0},
    {33, 35, 10, {5, 5}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1, 1, 0.2},
    {32, 5, 20, {3, 7}, {3, 2}, {1, 3}, {1, 1}, {1, 2}, 4, 1, 0.4},
    {70, 3, 16, {4, 4}, {3, 3}, {2, 1}, {1, 1}, {1, 1}, 8, 1, 0.5},
    {24, 8, 12, {5, 6}, {3, 3}, {1, 2}, {1, 1}, {1, 1}, 4, 4, 0.3},
    {40, 8, 16, {4, 3}, {2, 2}, {1, 1}, {1, 0}, {1, 1}, 8, 8, 0.5},
    {48, 16, 32, {3, 4}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 16, 16, 0.4},
    {65, 32, 4, {2, 2}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1, 1, 1.0},
};

Floats copy(const Guarded &from) { return Floats(from.data(), from.data() + from.size()); }

// A convolution and everything it should give.
struct Conv {
  Conv(const Case &c, uint64_t seed) : shape{}, random{seed}, crow(1, 0), t_crow(1, 0) {
    shape.images = c.images;
    shape.channels = c.channels;
    shape.out_channels = c.out;
    for (int i = 0; i < 2; ++i) {
      shape.in_size[i] = c.in_size[i];
      shape.kernel[i] = c.kernel[i];
      shape.stride[i] = c.stride[i];
      shape.padding[i] = c.padding[i];
      shape.dilation[i] = c.dilation[i];
      shape.out_size[i] = (c.in_size[i] + 2 * c.padding[i] - c.dilation[i] * (c.kernel[i] - 1) - 1) / c.stride[i] + 1;
    }
    const int64_t in = c.channels * c.kernel[0] * c.kernel[1], rows = c.out / c.block_rows, cols = in / c.block_cols;
    std::vector<int32_t> unit_row;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t col = 0; col < cols; ++col) {
        if (random.uniform() >= c.density) continue;
        unit_row.push_back(int32_t(r));
        unit_cols.push_back(int32_t(col));
      }
      crow.push_back(int32_t(unit_cols.size()));
    }
    for (int64_t col = 0; col < cols; ++col) {
      for (size_t k = 0; k < unit_cols.size(); ++k) {
        if (unit_cols[k] != col) continue;
        t_rows.push_back(unit_row[k]);
        t_perm.push_back(int32_t(k));
      }
      t_crow.push_back(int32_t(t_rows.size()));
    }
    pattern = {c.out, in, c.block_rows, c.block_cols, int64_t(unit_cols.size()), crow.data(), unit_cols.data(),
               t_crow.data(), t_rows.data(), t_perm.data(), 4};
    const int64_t entries = c.block_rows * c.block_cols;
    values = random.floats(pattern.num_units * entries);
    x = random.floats(c.images * c.in_size[0] * c.in_size[1] * c.channels);
    dy = random.floats(c.images * shape.out_size[0] * shape.out_size[1] * c.out);
    bias = random.floats(c.out);
  }
  // each(value, output, channel of the image, its place in x, its place in y) for every product.
  template <class Each>
  void products(Each each) const {
    const int64_t entries = pattern.block_rows * pattern.block_cols, taps = shape.kernel[0] * shape.kernel[1];
    for (int64_t row = 0; row + 1 < int64_t(crow.size()); ++row) {
      for (int64_t k = crow[row]; k < crow[row + 1]; ++k) {
        for (int64_t e = 0; e < entries; ++e) {
          const int64_t o = row * pattern.block_rows + e / pattern.block_cols;
          const int64_t f = unit_cols[k] * pattern.block_cols + e % pattern.block_cols, c = f / taps;
          const int64_t ky = f % taps / shape.kernel[1], kx = f % shape.kernel[1];
          for (int64_t n = 0; n < shape.images; ++n) {
            for (int64_t v = 0; v < shape.out_size[0]; ++v) {
              for (int64_t u = 0; u < shape.out_size[1]; ++u) {
                const int64_t in_y = v * shape.stride[0] + ky * shape.dilation[0] - shape.padding[0];
                const int64_t in_x = u * shape.stride[1] + kx * shape.dilation[1] - shape.padding[1];
                if (in_y < 0 || in_y >= shape.in_size[0] || in_x < 0 || in_x >= shape.in_size[1]) continue;
                each(k * entries + e, ((n * shape.in_size[0] + in_y) * shape.in_size[1] + in_x) * shape.channels + c,
                     ((n * shape.out_size[0] + v) * shape.out_size[1] + u) * shape.out_channels + o);
              }
            }
          }
        }
      }
    }
  }
  rarefy_conv shape;
  Random random;
  std::vector<int32_t> crow, unit_cols, t_crow, t_rows, t_perm;
  rarefy_pattern pattern;
  Floats values, x, dy, bias;
};

constexpr double kRounding = 0x1p-8;  // of a number that becomes bfloat16, in parts of it

// Of `roundings` factors of a product, in parts of it.
double rounded(int roundings) { return pow(1.0 + kRounding, roundings) - 1.0; }

// Whether bfloat16 images' products, and those under medium precision, round their factors.
bool rounds_factors(const Conv &p) { return strcmp(rarefy_isa(), "avx512bf16") == 0 && p.shape.images > 16; }

// What a convolution and its gradients should be.
struct Truths {
  Truths(const Conv &p, const Floats &x, const Floats &dy)
      : y(int64_t(dy.size())), dx(int64_t(x.size())), dvalues(int64_t(p.values.size())), dbias(int64_t(p.bias.size())) {
    const int64_t outputs = dbias.exact.size();
    for (int64_t i = 0; i < int64_t(dy.size()); ++i) {
      y.add(i, double(p.bias[i % outputs]));
      dbias.add(i % outputs, double(dy[i]));
    }
    p.products([&](int64_t value, int64_t in, int64_t out) {
      y.add(out, double(p.values[value]) * x[in]);
      dx.add(in, double(p.values[value]) * dy[out]);
      dvalues.add(value, double(dy[out]) * x[in]);
    });
  }
  Truth y, dx, dvalues, dbias;
};

// Errors beyond those of float32 sums, in parts of the magnitudes.
struct Roundings {
  double images;  // of y and dx
  double dvalues, dbias;
};

Floats wide(const Guarded &from) { return copy(from); }
Floats wide(const GuardedHalves &from) { return from.floats(); }

// Images: what y and dx are.
template <class Images, class T>
void check_images(const Conv &p, const Truths &truths, const T *x, const T *dy, int32_t activations, const Roundings &roundings,
                  Tally &forward, Tally &backward) {
  Floats first_y, first_dx, first_dvalues;
  for (const int threads : {1, 1, 2, 3}) {
    Images y(p.dy.size()), dx(p.x.size());
    Guarded dvalues(p.values.size()), dbias(p.bias.size()), only_values(p.values.size());
    const bool ran = rarefy_convolve(&p.shape, &p.pattern, p.values.data(), x, p.bias.data(), y.data(), activations, threads) ==
                     RAREFY_OK;
    forward.check(wide(y), truths.y, roundings.images, ran && y.intact());
    const bool back = rarefy_convolve_backward(&p.shape, &p.pattern, p.values.data(), dy, x, dx.data(), dvalues.data(),
                                               dbias.data(), activations, threads) == RAREFY_OK;
    backward.check(wide(dx), truths.dx, roundings.images, back && dx.intact());
    backward.check(copy(dvalues), truths.dvalues, roundings.dvalues, dvalues.intact());
    backward.check(copy(dbias), truths.dbias, roundings.dbias, dbias.intact());
    if (first_y.empty()) {
      first_y = wide(y);
      first_dx = wide(dx);
      first_dvalues = copy(dvalues);
    } else if (first_y != wide(y) || first_dx != wide(dx) || first_dvalues != copy(dvalues)) {
      ++backward.failures;  // other bits with other threads
    }
    const bool without = rarefy_convolve_backward(&p.shape, &p.pattern, p.values.data(), dy, x, nullptr, only_values.data(),
                                                  nullptr, activations, threads) == RAREFY_OK;
    backward.check(copy(only_values), truths.dvalues, roundings.dvalues, without && only_values.intact());
  }
}

struct Tallied {
  Tally forward, backward, halves, medium;
};

void check_convolution(const Case &c, uint64_t seed, Tallied &to) {
  const Conv p(c, seed);
  const Truths truths(p, p.x, p.dy);
  check_images<Guarded>(p, truths, p.x.data(), p.dy.data(), RAREFY_FLOAT32, {}, to.forward, to.backward);
  const bool rounds = rounds_factors(p);
  const Roundings medium = {rounded(rounds ? 2 : 0), rounded(rounds ? 2 : 0), rounded(rounds ? 1 : 0)};
  check_images<Guarded>(p, truths, p.x.data(), p.dy.data(), RAREFY_MEDIUM, medium, to.medium, to.medium);
  const Halves x = narrow(p.x), dy = narrow(p.dy);
  check_images<GuardedHalves>(p, Truths(p, widen(x), widen(dy)), x.data(), dy.data(), RAREFY_BFLOAT16,
                              {rounded(rounds ? 2 : 1), 0.0, 0.0}, to.halves, to.halves);  // of the value, and of the result
}

}  // namespace

int main(int argc, char **argv) {
  return on_every_isa(argc, argv, [] {
    Tallied tallied;
    uint64_t seed = 0;
    for (const Case &c : kCases) check_convolution(c, ++seed, tallied);
    return Tallies{{"convolve", tallied.forward},
                   {"backward", tallied.backward},
                   {"bfloat16", tallied.halves},
                   {"medium", tallied.medium}};
  });
}
