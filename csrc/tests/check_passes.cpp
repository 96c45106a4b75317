// What goes over memory once or twice (norms, a step of AdamW) against plain loops in double, through the C interface alone.
//
//   check_passes [NAME...]     fails too if an instruction set named is not offered
#include "checking.h"
#include "tally.h"

namespace {

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

// delta in float32 and y in bfloat16, or the other way round; without delta the stream alone. With a period y is shifted by a
// row within it.
void check_layer_norm(int64_t rows, int64_t width, bool half_delta, bool with_delta, int64_t period, uint64_t seed,
                      Tally &tally) {
  Random random{seed};
  const int64_t size = rows * width;
  const Floats x = random.floats(size), weight = random.floats(width), bias = random.floats(width), dsum = random.floats(size);
  const Halves narrow_delta = narrow(random.floats(size)), narrow_dy = narrow(random.floats(size));
  const Floats delta = widen(narrow_delta), dy = widen(narrow_dy);
  const float eps = 0.1f;  // so that a narrow row is no division by next to nothing
  const rarefy_layer_norm norm = {rows, width, half_delta, !half_delta, eps, weight.data(), bias.data(), period};
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
      const bool shifts = period > 0 && c >= width - width / 2;
      const bool gone = shifts && r % period == period - 1;  // nowhere in y
      const int64_t to = shifts ? i + width : i;
      s[c] = (s[c] - middle) * scale;  // normed
      if (!gone) off(half_delta ? y.data()[to] : ys[to], s[c] * weight[c] + bias[c], half_delta ? 0.0 : 0x1p-8);
      if (shifts && r % period == 0) off(half_delta ? y.data()[i] : ys[i], 0.0, 0.0);
      const double d = gone ? 0.0 : double(dy[to]);
      g[c] = d * weight[c];
      weights[c] += d * s[c];
      biases[c] += d;
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

// Newborns among the leading indices, or one age for all.
void check_adamw(int64_t leading, int64_t entries, bool newborns, uint64_t seed, Tally &tally) {
  Random random{seed};
  const int64_t count = leading * entries, oldest = 5;
  const Floats start = random.floats(count), average = random.floats(count), gradient = random.floats(count);
  Floats square = random.floats(count), size = random.floats(oldest + 1), root = random.floats(oldest + 1);
  for (Floats *positive : {&square, &size, &root}) {
    for (float &x : *positive) x = fabsf(x);
  }
  std::vector<int32_t> age;
  for (int64_t i = 0; i < leading; ++i) age.push_back(int32_t(random.bits() % uint64_t(oldest + 1)));
  const float decay = 0.9f, new_average = seed % 2 == 0 ? 0.1f : 0.75f, old_square = 0.875f, new_square = 0.125f, eps = 0.01f;
  Guarded values(static_cast<size_t>(count)), averages(static_cast<size_t>(count)), squares(static_cast<size_t>(count));
  std::copy(start.begin(), start.end(), values.data());
  std::copy(average.begin(), average.end(), averages.data());
  std::copy(square.begin(), square.end(), squares.data());
  // Three parameters, one of them empty, whose memory happens to lie side by side.
  const int64_t cuts[] = {0, leading / 3, leading / 3, leading};
  std::vector<rarefy_adamw> parameters;
  for (int i = 0; i < 3; ++i) {
    const int64_t first = cuts[i] * entries;
    parameters.push_back({cuts[i + 1] * entries - first, entries, values.data() + first, averages.data() + first,
                          squares.data() + first, gradient.data() + first, newborns ? age.data() + cuts[i] : nullptr,
                          size.data(), root.data(), decay, new_average, old_square, new_square, eps});
  }
  const bool good = rarefy_adamw_step(parameters.data(), 3, 3) == RAREFY_OK && values.intact() && averages.intact() &&
                    squares.intact();
  const double close = 1e-5;  // a dozen roundings of numbers about 1, and a division by at least eps
  double worst = 0.0;
  for (int64_t i = 0; i < count && good; ++i) {
    const int64_t a = newborns ? age[i / entries] : 0;
    const double g = gradient[i], m = average[i] + (g - average[i]) * double(new_average);
    const double v = square[i] * double(old_square) + g * g * double(new_square);
    const double value = start[i] * double(decay) - m / (sqrt(v) * double(root[a]) + double(eps)) * double(size[a]);
    worst = std::max(worst, fabs(averages.data()[i] - m));
    worst = std::max(worst, fabs(squares.data()[i] - v));
    worst = std::max(worst, fabs(values.data()[i] - value) / (1.0 + fabs(value)));
  }
  ++tally.runs;
  tally.worst = std::max(tally.worst, worst / close);
  if (!good || !(worst <= close)) ++tally.failures;
}

}  // namespace

int main(int argc, char **argv) {
  return on_every_isa(argc, argv, [] {
    Tally norms, layer_norms, steps;
    uint64_t seed = 0;
    for (const int64_t rows : {1, 7, 130, 1000}) {
      for (const int64_t channels : {1, 3, 16, 37}) {
        for (int kind = 0; kind < 4; ++kind) {
          check_norm(rows, channels, kind % 2 != 0, kind / 2 != 0, ++seed, norms);
          check_layer_norm(rows, channels, kind % 2 != 0, kind / 2 != 0, 0, ++seed, layer_norms);
          check_layer_norm(rows, channels, kind % 2 != 0, kind / 2 != 0, rows % 5 == 0 ? rows / 5 : 1, ++seed, layer_norms);
        }
        for (const bool newborns : {false, true}) check_adamw(rows, channels, newborns, ++seed, steps);
      }
    }
    check_adamw(20000, 1, true, ++seed, steps);  // several threads
    return Tallies{{"norm", norms}, {"layer norm", layer_norms}, {"AdamW", steps}};
  });
}
