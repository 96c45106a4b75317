// An MLP in one call: up, activation, down. What lies between the two matrices never becomes row-major: the forward pass
// keeps it in a thread's own cache and stores only the inputs of the activation, in panels, for the backward pass.
#pragma once

#include "activation.h"
#include "drive_tiled.h"

namespace rarefy {
namespace {

constexpr int64_t kMlpBytes = int64_t(16) << 20;  // panels of gradients that the threads share

// The stored inputs of the activation: RAREFY_SAVED_TOKENS tokens side by side for each hidden feature, on every
// instruction set, so that a panel of ours is a part of one.
struct Saved {
  void *data;
  int64_t hidden;
  bool half;
  int64_t offset(int64_t token, int64_t f) const {
    return (token / RAREFY_SAVED_TOKENS * hidden + f) * RAREFY_SAVED_TOKENS + token % RAREFY_SAVED_TOKENS;
  }
  vec load_at(int64_t at) const {
    return half ? load_any(static_cast<const bf16 *>(data) + at) : load_any(static_cast<const float *>(data) + at);
  }
  void store_at(int64_t at, vec z) const {
    if (half) {
      store_any(static_cast<bf16 *>(data) + at, z);
    } else {
      store_any(static_cast<float *>(data) + at, z);
    }
  }
};
static_assert(RAREFY_SAVED_TOKENS % kPanel == 0, "a panel may not cross the border of a stored one");

struct Mlp {
  const rarefy_pattern *up, *down;
  const TileKernels *up_kernels, *down_kernels;
  int activation;
};

inline int mlp_forward(const Mlp &mlp, const float *up_values, const float *up_bias, const float *down_values,
                       const float *down_bias, const RowMajor &x, const RowMajor &y, const Saved &z, int64_t batch, int threads) {
  const int64_t panels = ceil_div(batch, kPanel);
  Matrix up = plan_multiply(mlp.up, mlp.up_kernels, false, 1), down = plan_multiply(mlp.down, mlp.down_kernels, false, 1);
  const int64_t sums_floats = max64(up.chunk_floats(), down.chunk_floats());
  const int64_t own = (x.features + z.hidden) * kPanel + sums_floats;
  const int64_t scratch_ints = max64(build_scratch(up.s), build_scratch(down.s));
  float *buffers = nullptr;
  int32_t *scratch = nullptr;
  Carver carver = {nullptr, 0};
  Lease lease = {nullptr, 0};
  for (int pass = 0; pass < 2; ++pass) {
    carve_matrix(up, carver);
    carve_matrix(down, carver);
    buffers = carver.take<float>(threads * own);
    scratch = carver.take<int32_t>(threads * scratch_ints);
    if (pass == 0) {
      lease = lease_acquire(carver.used);
      if (lease.data == nullptr) return RAREFY_NO_MEMORY;
      carver = {lease.data, 0};
    }
  }
#pragma omp parallel num_threads(threads)
  {
    const FlushDenormals flush;
    const int thread = omp_get_thread_num();
    build(up, up_values, scratch + thread * scratch_ints);
    build(down, down_values, scratch + thread * scratch_ints);
#pragma omp barrier
    float *panel = buffers + thread * own, *h = panel + x.features * kPanel, *sums = h + z.hidden * kPanel;
#pragma omp for schedule(dynamic, 1)
    for (int64_t at = 0; at < panels; ++at) {
      const int64_t token = at * kPanel, tokens = min64(kPanel, batch - token);
      multiply_panel(
          up, 0, up.s.num_chunks, up_bias, panel, sums,
          [&](int64_t f0, int64_t f1) { pack_rows<kWide>(x, token, tokens, f0, f1, panel + f0 * kPanel); },
          [&](int64_t chunk, int64_t t, Prefetch &prefetch) {
            const int64_t f0 = up.first_input(t + 1), f1 = up.first_input(t + 2);
            if (chunk == 0) prefetch.add(x.at(token, f0), x.features * x.element_bytes(), tokens, (f1 - f0) * x.element_bytes());
          },
          [&](int64_t first, int64_t count, const float *done) {
            with_activation(mlp.activation, [&](auto activation) {
              for (int64_t r = 0; r < count; ++r) {
                const int64_t place = z.offset(token, first + r);
                for (int v = 0; v < kWide; ++v) {
                  vec value, slope;
                  z.store_at(place + v * VL, load(done + r * kPanel + v * VL));
                  activate<decltype(activation)::value>(z.load_at(place + v * VL), value, slope);  // what backward will see
                  store(h + (first + r) * kPanel + v * VL, value);
                }
              }
            });
          });
      multiply_panel(
          down, 0, down.s.num_chunks, down_bias, h, sums, [](int64_t, int64_t) {},
          [&](int64_t chunk, int64_t t, Prefetch &prefetch) { expect_outputs(down, chunk, t, y, token, tokens, prefetch); },
          [&](int64_t first, int64_t count, const float *done) {
            unpack_rows<kWide>(done, token, tokens, first, first + count, y);
          });
    }
  }
  lease_release(lease);
  return RAREFY_OK;
}

// dx may be null. A group of panels goes through the second matrix, then through the first.
inline int mlp_backward(const Mlp &mlp, const float *up_values, const float *down_values, const RowMajor &dy, const RowMajor &x,
                        const Saved &z, const RowMajor &dx, float *d_up_values, float *d_up_bias, float *d_down_values,
                        float *d_down_bias, int64_t batch, int threads) {
  const int64_t panels = ceil_div(batch, kPanel), hidden = z.hidden, out = dy.features;
  Gradients up = plan_gradients(mlp.up, mlp.up_kernels, threads), down = plan_gradients(mlp.down, mlp.down_kernels, threads);
  const int64_t panel_bytes = max64(1, (hidden + out) * kPanel * int64_t(sizeof(float)));
  const int64_t group = max64(2, min64(panels, kMlpBytes / panel_bytes));
  const int64_t own = max64(up.own_floats(), down.own_floats()), slopes = down.m.chunk_floats();
  const int64_t scratch_ints = max64(build_scratch(up.m.s), build_scratch(down.m.s));
  const bool has_dx = dx.data != nullptr;
  float *dy_panels = nullptr, *dz_panels = nullptr, *buffers = nullptr;
  int32_t *scratch = nullptr;
  Carver carver = {nullptr, 0};
  Lease lease = {nullptr, 0};
  for (int pass = 0; pass < 2; ++pass) {
    carve_gradients(up, carver, panels, d_up_bias != nullptr);
    carve_gradients(down, carver, panels, d_down_bias != nullptr);
    dy_panels = carver.take<float>(group * out * kPanel);
    dz_panels = carver.take<float>(group * hidden * kPanel);
    buffers = carver.take<float>(threads * (own + slopes));
    scratch = carver.take<int32_t>(threads * scratch_ints);
    if (pass == 0) {
      lease = lease_acquire(carver.used);
      if (lease.data == nullptr) return RAREFY_NO_MEMORY;
      carver = {lease.data, 0};
    }
  }
#pragma omp parallel num_threads(threads)
  {
    const FlushDenormals flush;
    const int thread = omp_get_thread_num();
    float *mine = buffers + thread * (own + slopes), *slope = mine + own;
    build(up.m, has_dx ? up_values : nullptr, scratch + thread * scratch_ints);
    build(down.m, down_values, scratch + thread * scratch_ints);
    for (int64_t first = 0; first < panels; first += group) {
      const int64_t count = min64(group, panels - first);
      const auto tokens_of = [&](int64_t panel) { return max64(0, min64(kPanel, batch - panel * kPanel)); };
      pack_dy(dy, first, count, batch, dy_panels, d_down_bias != nullptr ? down.bias_parts : nullptr);
      clear_dots(down, mine);
#pragma omp for schedule(dynamic, 1)
      for (int64_t chunk = 0; chunk < down.m.s.num_chunks; ++chunk) {
        gradients_chunk<true>(
            down, chunk, dy_panels, first, count, mine,
            [&](int64_t panel, int64_t c0, int64_t c1, float *h) {
              with_activation(mlp.activation, [&](auto activation) {
                for (int64_t r = 0; r < c1 - c0; ++r) {
                  const int64_t place = z.offset(panel * kPanel, c0 + r);
                  for (int v = 0; v < kWide; ++v) {
                    vec value, derivative;
                    activate<decltype(activation)::value>(z.load_at(place + v * VL), value, derivative);
                    store(h + r * kPanel + v * VL, value);
                    store(slope + r * kPanel + v * VL, derivative);
                  }
                }
              });
            },
            [](int64_t, int64_t, int64_t, int64_t, Prefetch &) {},
            [&](int64_t panel, int64_t c0, int64_t c1, const float *dh) {
              float *dz = dz_panels + ((panel - first) * hidden + c0) * kPanel;
              for (int64_t r = 0; r < c1 - c0; ++r) {
                vec total = {};
                for (int v = 0; v < kWide; ++v) {
                  const vec d = load(dh + r * kPanel + v * VL) * load(slope + r * kPanel + v * VL);
                  store(dz + r * kPanel + v * VL, d);
                  total += d;
                }
                if (d_up_bias == nullptr) continue;
                float sum = 0.0f;
                for (int lane = 0; lane < VL; ++lane) sum += total[lane];
                up.bias_parts[panel * hidden + c0 + r] = sum;
              }
            });
      }
      clear_dots(up, mine);
      const auto load_x = [&](int64_t panel, int64_t c0, int64_t c1, float *target) {
        pack_rows<kWide>(x, panel * kPanel, tokens_of(panel), c0, c1, target);
      };
      const auto expect = [&](int64_t panel, int64_t c0, int64_t c1, int64_t t, Prefetch &prefetch) {
        expect_rows(x, (panel + 1) * kPanel, tokens_of(panel + 1), c0, c1, t, up.m.s.num_tiles, prefetch);
        if (has_dx) expect_rows(dx, panel * kPanel, tokens_of(panel), c0, c1, t, up.m.s.num_tiles, prefetch);
      };
      const auto emit = [&](int64_t panel, int64_t c0, int64_t c1, const float *sums) {
        unpack_rows<kWide>(sums, panel * kPanel, tokens_of(panel), c0, c1, dx);
      };
#pragma omp for schedule(dynamic, 1)
      for (int64_t chunk = 0; chunk < up.m.s.num_chunks; ++chunk) {
        if (has_dx) {
          gradients_chunk<true>(up, chunk, dz_panels, first, count, mine, load_x, expect, emit);
        } else {
          gradients_chunk<false>(up, chunk, dz_panels, first, count, mine, load_x, expect, emit);
        }
      }
    }
    finish_gradients(up, panels, d_up_values, d_up_bias);
    finish_gradients(down, panels, d_down_values, d_down_bias);
  }
  lease_release(lease);
  return RAREFY_OK;
}

}  // namespace
}  // namespace rarefy
