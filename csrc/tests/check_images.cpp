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

void check_convolution(const Case &c, uint64_t seed, Tally &forward, Tally &backward, Tally &halves) {
  Conv p(c, seed);
  const auto count = [](const Floats &floats) { return int64_t(floats.size()); };
  Truth y(count(p.dy)), dx(count(p.x)), dvalues(count(p.values)), dbias(count(p.bias));
  for (int64_t i = 0; i < count(p.dy); ++i) {
    y.add(i, double(p.bias[i % c.out]));
    dbias.add(i % c.out, double(p.dy[i]));
  }
  p.products([&](int64_t value, int64_t in, int64_t out) {
    y.add(out, double(p.values[value]) * p.x[in]);
    dx.add(in, double(p.values[value]) * p.dy[out]);
    dvalues.add(value, double(p.dy[out]) * p.x[in]);
  });
  Floats first_y, first_dx, first_dvalues;
  for (const int threads : {1, 1, 2, 3}) {
    Guarded found(p.dy.size()), found_dx(p.x.size()), found_dvalues(p.values.size()), found_dbias(p.bias.size());
    const bool ran = rarefy_convolve(&p.shape, &p.pattern, p.values.data(), p.x.data(), p.bias.data(), found.data(), 0,
                                     threads) == RAREFY_OK;
    forward.check(copy(found), y, 0.0, ran && found.intact());
    const bool back = rarefy_convolve_backward(&p.shape, &p.pattern, p.values.data(), p.dy.data(), p.x.data(),
                                               found_dx.data(), found_dvalues.data(), found_dbias.data(), 0,
                                               threads) == RAREFY_OK;
    backward.check(copy(found_dx), dx, 0.0, back && found_dx.intact());
    backward.check(copy(found_dvalues), dvalues, 0.0, found_dvalues.intact());
    backward.check(copy(found_dbias), dbias, 0.0, found_dbias.intact());
    if (first_y.empty()) {
      first_y = copy(found);
      first_dx = copy(found_dx);
      first_dvalues = copy(found_dvalues);
    } else if (first_y != copy(found) || first_dx != copy(found_dx) || first_dvalues != copy(found_dvalues)) {
      ++backward.failures;  // other bits with other threads
    }
    Guarded only_values(p.values.size());
    const bool without = rarefy_convolve_backward(&p.shape, &p.pattern, p.values.data(), p.dy.data(), p.x.data(), nullptr,
                                                  only_values.data(), nullptr, 0, threads) == RAREFY_OK;
    backward.check(copy(only_values), dvalues, 0.0, without && only_values.intact());
  }
  // The truth of rounded images, but for the rounding of the result.
  const Halves narrow_x = narrow(p.x);
  const Floats rounded = widen(narrow_x);
  Truth y_half(count(p.dy));
  for (int64_t i = 0; i < count(p.dy); ++i) y_half.add(i, double(p.bias[i % c.out]));
  p.products([&](int64_t value, int64_t in, int64_t out) { y_half.add(out, double(p.values[value]) * rounded[in]); });
  GuardedHalves found(p.dy.size());
  const bool ran = rarefy_convolve(&p.shape, &p.pattern, p.values.data(), narrow_x.data(), p.bias.data(), found.data(), 1,
                                   2) == RAREFY_OK;
  halves.check(found.floats(), y_half, 0x1p-8, ran && found.intact());
}

}  // namespace

int main(int argc, char **argv) {
  return on_every_isa(argc, argv, [] {
    Tally forward, backward, halves;
    uint64_t seed = 0;
    for (const Case &c : kCases) check_convolution(c, ++seed, forward, backward, halves);
    return Tallies{{"convolve", forward}, {"backward", backward}, {"bfloat16", halves}};
  });
}
