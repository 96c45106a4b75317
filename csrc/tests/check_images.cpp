// The kernels for images, and the norms, against plain loops, through the C interface alone, as check_kernels does for matrices.
//
//   check_images [NAME...]     fails too if an instruction set named is not offered
#include <stdio.h>

#include <string>

#include "checking.h"
#include "rarefy.h"

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

struct Tally {
  int64_t runs = 0, failures = 0;
  double worst = 0.0;
  void check(const Floats &found, const Truth &truth, double relative, bool intact) {
    const Doubles bounds = truth.bounds();
    bool good = intact;
    for (size_t i = 0; i < truth.exact.size(); ++i) {
      const double allowed = bounds[i] + relative * truth.magnitude[i], error = fabs(double(found[i]) - truth.exact[i]);
      if (!(error <= allowed)) good = false;
      if (allowed > 0) worst = std::max(worst, error / allowed);
    }
    ++runs;
    if (!good) ++failures;
  }
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

void check_norm(int64_t rows, int64_t channels, bool with_residual, bool training, uint64_t seed, Tally &tally) {
  Random random{seed};
  const int64_t size = rows * channels;
  const Floats x = random.floats(size), residual = random.floats(size), weight = random.floats(channels),
               bias = random.floats(channels), dy = random.floats(size);
  Floats mean = random.floats(channels), var(static_cast<size_t>(channels), 0.5f);
  const float eps = 0.1f;  // so that a channel of few rows is no division by next to nothing
  Doubles true_mean(mean.begin(), mean.end()), true_var(var.begin(), var.end());
  if (training) {
    for (int64_t c = 0; c < channels; ++c) {
      double sum = 0.0, squares = 0.0;
      for (int64_t r = 0; r < rows; ++r) sum += x[r * channels + c];
      for (int64_t r = 0; r < rows; ++r) squares += pow(x[r * channels + c] - sum / double(rows), 2);
      true_mean[c] = sum / double(rows);
      true_var[c] = squares / double(rows);
    }
  }
  const auto normed = [&](int64_t i) {
    const int64_t c = i % channels;
    return (x[i] - true_mean[c]) / sqrt(true_var[c] + double(eps));
  };
  const double close = 1e-4;  // of sums of many roundings, generously; magnitudes are about 1
  Guarded y(static_cast<size_t>(size)), dx(static_cast<size_t>(size)), dresidual(static_cast<size_t>(size));
  Guarded dweight(static_cast<size_t>(channels)), dbias(static_cast<size_t>(channels));
  rarefy_norm norm = {rows, channels, 0, 1, training, eps, weight.data(), bias.data(), mean.data(), var.data()};
  bool good = rarefy_norm_forward(&norm, x.data(), with_residual ? residual.data() : nullptr, y.data(), 2) == RAREFY_OK;
  good = good && rarefy_norm_backward(&norm, dy.data(), x.data(), with_residual ? y.data() : nullptr, dx.data(),
                                      with_residual ? dresidual.data() : nullptr, dweight.data(), dbias.data(),
                                      3) == RAREFY_OK;
  Doubles sums(channels, 0.0), products(channels, 0.0), passed(size, 0.0);
  double worst = 0.0;
  for (int64_t i = 0; i < size && good; ++i) {
    const int64_t c = i % channels;
    const double z = normed(i) * weight[c] + bias[c] + (with_residual ? double(residual[i]) : 0.0);
    worst = std::max(worst, fabs(y.data()[i] - std::max(z, 0.0)));
    passed[i] = y.data()[i] > 0.0f ? double(dy[i]) : 0.0;  // what rounding decided counts
    sums[c] += passed[i];
    products[c] += passed[i] * normed(i);
  }
  for (int64_t i = 0; i < size && good; ++i) {
    const int64_t c = i % channels;
    const double scale = weight[c] / sqrt(true_var[c] + double(eps));
    const double centred = training ? passed[i] - (sums[c] + normed(i) * products[c]) / double(rows) : passed[i];
    worst = std::max(worst, fabs(dx.data()[i] - scale * centred));
    if (with_residual) worst = std::max(worst, fabs(dresidual.data()[i] - passed[i]));
  }
  for (int64_t c = 0; c < channels && good; ++c) {
    worst = std::max(worst, fabs(dbias.data()[c] - sums[c]) / double(rows));
    worst = std::max(worst, fabs(dweight.data()[c] - products[c]) / double(rows));
  }
  ++tally.runs;
  tally.worst = std::max(tally.worst, worst / close);
  if (!good || !(worst <= close) || !y.intact() || !dx.intact() || !dweight.intact() || !dbias.intact()) ++tally.failures;
}

// delta in float32 and y in bfloat16, or the other way round; without delta the stream alone.
void check_layer_norm(int64_t rows, int64_t width, bool half_delta, bool with_delta, uint64_t seed, Tally &tally) {
  Random random{seed};
  const int64_t size = rows * width;
  const Floats x = random.floats(size), weight = random.floats(width), bias = random.floats(width), dsum = random.floats(size);
  const Halves narrow_delta = narrow(random.floats(size)), narrow_dy = narrow(random.floats(size));
  const Floats delta = widen(narrow_delta), dy = widen(narrow_dy);
  const float eps = 0.1f;  // so that a narrow row is no division by next to nothing
  const rarefy_layer_norm norm = {rows, width, half_delta, !half_delta, eps, weight.data(), bias.data()};
  Guarded sum(static_cast<size_t>(size)), y(static_cast<size_t>(size)), dx(static_cast<size_t>(size));
  Guarded ddelta(static_cast<size_t>(size)), mean(static_cast<size_t>(rows)), rstd(static_cast<size_t>(rows));
  Guarded dweight(static_cast<size_t>(width)), dbias(static_cast<size_t>(width));
  GuardedHalves half_y(static_cast<size_t>(size)), half_ddelta(static_cast<size_t>(size));
  const void *added = half_delta ? static_cast<const void *>(narrow_delta.data()) : delta.data();
  const void *gradient = half_delta ? static_cast<const void *>(dy.data()) : narrow_dy.data();
  void *result = half_delta ? static_cast<void *>(y.data()) : half_y.data();
  void *to_delta = half_delta ? static_cast<void *>(half_ddelta.data()) : ddelta.data();
  bool good = rarefy_layer_norm_forward(&norm, x.data(), with_delta ? added : nullptr, with_delta ? sum.data() : nullptr,
                                        result, mean.data(), rstd.data(), 2) == RAREFY_OK;
  good = good && rarefy_layer_norm_backward(&norm, gradient, with_delta ? dsum.data() : nullptr,
                                            with_delta ? sum.data() : x.data(), mean.data(), rstd.data(), dx.data(),
                                            with_delta ? to_delta : nullptr, dweight.data(), dbias.data(), 3) == RAREFY_OK;
  const double close = 1e-4;  // of sums of many roundings, generously; magnitudes are about 1
  double worst = 0.0;
  const auto off = [&](double found, double truth, double rounding) {
    worst = std::max(worst, (fabs(found - truth) - rounding * fabs(truth)) / (1.0 + fabs(truth)));
  };
  const Floats ys = half_delta ? Floats() : half_y.floats(), ds = half_delta ? half_ddelta.floats() : Floats();
  Doubles weights(width, 0.0), biases(width, 0.0);
  for (int64_t r = 0; r < rows && good; ++r) {
    Doubles s(width), g(width);
    double middle = 0.0, squares = 0.0, plain = 0.0, crossed = 0.0;
    for (int64_t c = 0; c < width; ++c) {
      s[c] = double(x[r * width + c]) + (with_delta ? double(delta[r * width + c]) : 0.0);
      middle += s[c] / double(width);
    }
    for (int64_t c = 0; c < width; ++c) squares += pow(s[c] - middle, 2) / double(width);
    const double scale = 1.0 / sqrt(squares + double(eps));
    for (int64_t c = 0; c < width; ++c) {
      const int64_t i = r * width + c;
      s[c] = (s[c] - middle) * scale;  // normed
      off(half_delta ? y.data()[i] : ys[i], s[c] * weight[c] + bias[c], half_delta ? 0.0 : 0x1p-8);
      g[c] = double(dy[i]) * weight[c];
      weights[c] += dy[i] * s[c];
      biases[c] += dy[i];
      plain += g[c] / double(width);
      crossed += g[c] * s[c] / double(width);
    }
    for (int64_t c = 0; c < width; ++c) {
      const int64_t i = r * width + c;
      const double truth = scale * (g[c] - plain - s[c] * crossed) + (with_delta ? double(dsum[i]) : 0.0);
      off(dx.data()[i], truth, 0.0);
      if (with_delta && half_delta) off(ds[i], truth, 0x1p-8);
    }
  }
  for (int64_t c = 0; c < width && good; ++c) {
    off(dweight.data()[c] / double(rows), weights[c] / double(rows), 0.0);
    off(dbias.data()[c] / double(rows), biases[c] / double(rows), 0.0);
  }
  ++tally.runs;
  tally.worst = std::max(tally.worst, worst / close);
  for (const Guarded *one : {&sum, &y, &dx, &ddelta, &mean, &rstd, &dweight, &dbias}) good = good && one->intact();
  if (!good || !(worst <= close) || !half_y.intact() || !half_ddelta.intact()) ++tally.failures;
}

}  // namespace

int main(int argc, char **argv) {
  const std::string offered = std::string(",") + rarefy_isas() + ",";
  printf("instruction sets: %s\n", rarefy_isas());
  for (int i = 1; i < argc; ++i) {
    if (offered.find(std::string(",") + argv[i] + ",") != std::string::npos) continue;
    printf("FAILED %s is not among them\n", argv[i]);
    return 1;
  }
  bool good = true;
  for (size_t at = 1; at + 1 < offered.size();) {
    const size_t end = offered.find(',', at);
    const std::string isa = offered.substr(at, end - at);
    at = end + 1;
    if (rarefy_set_isa(isa.c_str()) != RAREFY_OK) {
      printf("FAILED %s cannot be chosen\n", isa.c_str());
      return 1;
    }
    Tally forward, backward, halves, norms, layer_norms;
    uint64_t seed = 0;
    for (const Case &c : kCases) check_convolution(c, ++seed, forward, backward, halves);
    for (const int64_t rows : {1, 7, 130, 1000}) {
      for (const int64_t channels : {1, 3, 16, 37}) {
        for (int kind = 0; kind < 4; ++kind) check_norm(rows, channels, kind % 2 != 0, kind / 2 != 0, ++seed, norms);
        for (int kind = 0; kind < 4; ++kind) {
          check_layer_norm(rows, channels, kind % 2 != 0, kind / 2 != 0, ++seed, layer_norms);
        }
      }
    }
    const std::pair<const char *, const Tally *> all[] = {
        {"convolve", &forward}, {"backward", &backward}, {"bfloat16", &halves}, {"norm", &norms}, {"layer norm", &layer_norms}};
    for (const auto &[name, tally] : all) {
      printf("%-10s %-10s %7lld runs, worst error / allowed %.3f  %s\n", isa.c_str(), name, (long long)tally->runs,
             tally->worst, tally->failures == 0 ? "ok" : "FAILED");
      good = good && tally->failures == 0 && tally->runs > 0;
    }
  }
  printf(good ? "all passed\n" : "FAILED\n");
  return good ? 0 : 1;
}
