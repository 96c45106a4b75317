// An MLP in one call: up, activation, down; if gated, activation(gate) * up, down. What lies between the matrices never
// becomes row-major: the forward pass keeps it in a thread's own cache and stores only the outputs of the matrices that read
// x, in panels, for the backward pass.
#pragma once

#include "activation.h"
#include "drive_tiled.h"

namespace rarefy {
namespace {

constexpr int64_t kMlpBytes = int64_t(16) << 20;  // panels of gradients that the threads share

// What is kept of the forward pass: RAREFY_SAVED_TOKENS tokens side by side for each feature, on every instruction set, so
// that a panel of ours is a part of one. Features are the hidden ones; if gated, those of the gate and then those of up.
struct Saved {
  void *data;
  int64_t features;
  bool half;
  int64_t offset(int64_t token, int64_t f) const {
    return (token / RAREFY_SAVED_TOKENS * features + f) * RAREFY_SAVED_TOKENS + token % RAREFY_SAVED_TOKENS;
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

struct MlpLayer {
  rarefy_layer layer;
  const TileKernels *kernels;
  rarefy_layer_gradients gradients;  // of the backward pass
};

// `inner` are the layers that read x: first the one whose outputs z go through the activation, then, if gated, the one whose
// outputs its result is multiplied by.
struct Mlp {
  MlpLayer inner[2], down;
  int num_inner, activation;
  int64_t hidden() const { return down.layer.pattern->in_features; }
};

inline int mlp_forward(const Mlp &mlp, const RowMajor &x, const RowMajor &y, const Saved &z, int64_t batch, int threads) {
  const int64_t panels = ceil_div(batch, kPanel), hidden = mlp.hidden();
  Matrix inner[2], down = plan_multiply(mlp.down.layer.pattern, mlp.down.kernels, false, 1);
  int64_t sums_floats = down.chunk_floats(), scratch_ints = build_scratch(down.s);
  for (int i = 0; i < mlp.num_inner; ++i) {
    inner[i] = plan_multiply(mlp.inner[i].layer.pattern, mlp.inner[i].kernels, false, 1);
    sums_floats = max64(sums_floats, inner[i].chunk_floats());
    scratch_ints = max64(scratch_ints, build_scratch(inner[i].s));
  }
  const int64_t own = (x.features + hidden) * kPanel;
  cell *buffers = nullptr;
  float *all_sums = nullptr;
  int32_t *scratch = nullptr;
  const Scratch memory([&](Carver &carver) {
    for (int i = 0; i < mlp.num_inner; ++i) carve_matrix(inner[i], carver);
    carve_matrix(down, carver);
    buffers = carver.take<cell>(threads * own);
    all_sums = carver.take<float>(threads * sums_floats);
    scratch = carver.take<int32_t>(threads * scratch_ints);
  });
  if (memory.failed()) return RAREFY_NO_MEMORY;
#pragma omp parallel num_threads(threads)
  {
    const FlushDenormals flush;
    const int thread = omp_get_thread_num();
    for (int i = 0; i < mlp.num_inner; ++i) build(inner[i], mlp.inner[i].layer.values, scratch + thread * scratch_ints);
    build(down, mlp.down.layer.values, scratch + thread * scratch_ints);
#pragma omp barrier
    cell *panel = buffers + thread * own, *h = panel + x.features * kPanel;
    float *sums = all_sums + thread * sums_floats;
#pragma omp for schedule(dynamic, 1)
    for (int64_t at = 0; at < panels; ++at) {
      const int64_t token = at * kPanel, tokens = min64(kPanel, batch - token);
      // What becomes of the outputs is computed from what is stored: that is what the backward pass will see.
      const auto activate_outputs = [&](int64_t first, int64_t count, const float *done) {
        with_activation(mlp.activation, [&](auto activation) {
          for (int64_t r = 0; r < count; ++r) {
            const int64_t place = z.offset(token, first + r);
            vec value[kWide];
            for (int v = 0; v < kWide; ++v) {
              vec slope;
              z.store_at(place + v * VL, load(done + r * kPanel + v * VL));
              activate<decltype(activation)::value>(z.load_at(place + v * VL), value[v], slope);
            }
            store_cells<kWide>(h + (first + r) * kPanel, value);
          }
        });
      };
      const auto multiply_outputs = [&](int64_t first, int64_t count, const float *done) {
        for (int64_t r = 0; r < count; ++r) {
          const int64_t place = z.offset(token, hidden + first + r);
          vec value[kWide];
          load_cells<kWide>(h + (first + r) * kPanel, value);
          for (int v = 0; v < kWide; ++v) {
            z.store_at(place + v * VL, load(done + r * kPanel + v * VL));
            value[v] *= z.load_at(place + v * VL);
          }
          store_cells<kWide>(h + (first + r) * kPanel, value);
        }
      };
      multiply_panel(
          inner[0], 0, inner[0].s.num_chunks, mlp.inner[0].layer.bias, panel, sums,
          [&](int64_t f0, int64_t f1) { pack_rows<kWide>(x, token, tokens, f0, f1, panel + f0 * kPanel); },
          [&](int64_t chunk, int64_t t, Prefetch &prefetch) {
            const int64_t f0 = inner[0].first_input(t + 1), f1 = inner[0].first_input(t + 2);
            if (chunk == 0) prefetch.add(x.at(token, f0), x.features * x.element_bytes(), tokens, (f1 - f0) * x.element_bytes());
          },
          activate_outputs);
      if (mlp.num_inner == 2) {
        // The first matrix packed x in whole, unless it has no outputs; then there are no hidden features at all.
        multiply_panel(
            inner[1], 0, inner[1].s.num_chunks, mlp.inner[1].layer.bias, panel, sums, [](int64_t, int64_t) {},
            [](int64_t, int64_t, Prefetch &) {}, multiply_outputs);
      }
      multiply_panel(
          down, 0, down.s.num_chunks, mlp.down.layer.bias, h, sums, [](int64_t, int64_t) {},
          [&](int64_t chunk, int64_t t, Prefetch &prefetch) { expect_outputs(down, chunk, t, y, token, tokens, prefetch); },
          [&](int64_t first, int64_t count, const float *done) {
            unpack_rows<kWide>(done, token, tokens, first, first + count, y);
          });
    }
  }
  return RAREFY_OK;
}

// dx may be null. A group of panels goes through the last matrix, then through those that read x.
inline int mlp_backward(const Mlp &mlp, const RowMajor &dy, const RowMajor &x, const Saved &z, const RowMajor &dx, int64_t batch,
                        int threads) {
  const int64_t panels = ceil_div(batch, kPanel), hidden = mlp.hidden(), out = dy.features, in = x.features;
  const int num_inner = mlp.num_inner;
  const bool has_dx = dx.data != nullptr, sums_dx = has_dx && num_inner == 2;
  Gradients inner[2], down = plan_gradients(mlp.down.layer.pattern, mlp.down.kernels, threads);
  const int64_t slopes = down.m.chunk_floats();
  int64_t chunk_floats = slopes, scratch_ints = build_scratch(down.m.s);
  for (int i = 0; i < num_inner; ++i) {
    inner[i] = plan_gradients(mlp.inner[i].layer.pattern, mlp.inner[i].kernels, threads);
    chunk_floats = max64(chunk_floats, inner[i].m.chunk_floats());
    scratch_ints = max64(scratch_ints, build_scratch(inner[i].m.s));
  }
  const int64_t panel_bytes = (num_inner * hidden + out) * kPanelBytes + (sums_dx ? in : 0) * kPanel * int64_t(sizeof(float));
  const int64_t group = max64(2, min64(panels, kMlpBytes / max64(1, panel_bytes)));
  cell *dy_panels = nullptr, *dz_panels[2] = {};
  float *dx_panels = nullptr, *all_slopes = nullptr;
  OwnOfAll owns = {};
  int32_t *scratch = nullptr;
  const Scratch memory([&](Carver &carver) {
    for (int i = 0; i < num_inner; ++i) {
      carve_gradients(inner[i], carver, panels, mlp.inner[i].gradients.bias != nullptr);
      dz_panels[i] = carver.take<cell>(group * hidden * kPanel);
    }
    carve_gradients(down, carver, panels, mlp.down.gradients.bias != nullptr);
    dy_panels = carver.take<cell>(group * out * kPanel);
    dx_panels = carver.take<float>(sums_dx ? group * in * kPanel : 0);
    owns.carve(carver, threads, chunk_floats);
    all_slopes = carver.take<float>(threads * num_inner * slopes);
    scratch = carver.take<int32_t>(threads * scratch_ints);
  });
  if (memory.failed()) return RAREFY_NO_MEMORY;
#pragma omp parallel num_threads(threads)
  {
    const FlushDenormals flush;
    const int thread = omp_get_thread_num();
    const Own mine = owns.of(thread);
    float *first_slope = all_slopes + thread * num_inner * slopes, *slope[2] = {first_slope, first_slope + slopes};
    for (int i = 0; i < num_inner; ++i) {
      build(inner[i].m, has_dx ? mlp.inner[i].layer.values : nullptr, scratch + thread * scratch_ints);
    }
    build(down.m, mlp.down.layer.values, scratch + thread * scratch_ints);
    for (int64_t first = 0; first < panels; first += group) {
      const int64_t count = min64(group, panels - first);
      const auto tokens_of = [&](int64_t panel) { return max64(0, min64(kPanel, batch - panel * kPanel)); };
      pack_dy(dy, first, count, batch, dy_panels, mlp.down.gradients.bias != nullptr ? down.bias_parts : nullptr);
      mine.clear_dots();
#pragma omp for schedule(dynamic, 1)
      for (int64_t chunk = 0; chunk < down.m.s.num_chunks; ++chunk) {
        gradients_chunk<true>(
            down, chunk, dy_panels, first, count, mine,
            [&](int64_t panel, int64_t c0, int64_t c1, cell *h) {  // and its derivatives, which `emit` needs
              with_activation(mlp.activation, [&](auto activation) {
                for (int64_t r = 0; r < c1 - c0; ++r) {
                  const int64_t place = z.offset(panel * kPanel, c0 + r), factor = z.offset(panel * kPanel, hidden + c0 + r);
                  vec value[kWide];
                  for (int v = 0; v < kWide; ++v) {
                    const int64_t lane = r * kPanel + v * VL;
                    vec derivative;
                    activate<decltype(activation)::value>(z.load_at(place + v * VL), value[v], derivative);
                    if (num_inner == 2) {
                      const vec up = z.load_at(factor + v * VL);
                      store(slope[1] + lane, value[v]);
                      value[v] *= up;
                      derivative *= up;
                    }
                    store(slope[0] + lane, derivative);
                  }
                  store_cells<kWide>(h + r * kPanel, value);
                }
              });
            },
            [](int64_t, int64_t, int64_t, int64_t, Prefetch &) {},
            [&](int64_t panel, int64_t c0, int64_t c1, const float *dh) {
              for (int i = 0; i < num_inner; ++i) {
                cell *dz = dz_panels[i] + ((panel - first) * hidden + c0) * kPanel;
                for (int64_t r = 0; r < c1 - c0; ++r) {
                  vec total = {}, d[kWide];
                  for (int v = 0; v < kWide; ++v) {
                    d[v] = load(dh + r * kPanel + v * VL) * load(slope[i] + r * kPanel + v * VL);
                    total += d[v];
                  }
                  store_cells<kWide>(dz + r * kPanel, d);
                  if (mlp.inner[i].gradients.bias == nullptr) continue;
                  inner[i].bias_parts[panel * hidden + c0 + r] = across(total);
                }
              }
            });
      }
      for (int i = 0; i < num_inner; ++i) {
        const Gradients &g = inner[i];
        const bool last = i == num_inner - 1;
        mine.clear_dots();
        const auto load_x = [&](int64_t panel, int64_t c0, int64_t c1, cell *target) {
          pack_rows<kWide>(x, panel * kPanel, tokens_of(panel), c0, c1, target);
        };
        const auto expect = [&](int64_t panel, int64_t c0, int64_t c1, int64_t t, Prefetch &prefetch) {
          expect_rows(x, (panel + 1) * kPanel, tokens_of(panel + 1), c0, c1, t, g.m.s.num_tiles, prefetch);
          if (has_dx && last) expect_rows(dx, panel * kPanel, tokens_of(panel), c0, c1, t, g.m.s.num_tiles, prefetch);
        };
        const auto emit = [&](int64_t panel, int64_t c0, int64_t c1, const float *sums) {
          const float *total = sums;
          if (sums_dx) {  // dx is rounded once, so the matrices' parts meet in float32
            float *parts = dx_panels + ((panel - first) * in + c0) * kPanel;
            for (int64_t at = 0; at < (c1 - c0) * kPanel; at += VL) {
              store(parts + at, last ? load(parts + at) + load(sums + at) : load(sums + at));
            }
            total = parts;
          }
          if (last) unpack_rows<kWide>(total, panel * kPanel, tokens_of(panel), c0, c1, dx);
        };
#pragma omp for schedule(dynamic, 1)
        for (int64_t chunk = 0; chunk < g.m.s.num_chunks; ++chunk) {
          if (has_dx) {
            gradients_chunk<true>(g, chunk, dz_panels[i], first, count, mine, load_x, expect, emit);
          } else {
            gradients_chunk<false>(g, chunk, dz_panels[i], first, count, mine, load_x, expect, emit);
          }
        }
      }
    }
    for (int i = 0; i < num_inner; ++i) {
      finish_gradients(inner[i], panels, mlp.inner[i].gradients.values, mlp.inner[i].gradients.bias);
    }
    finish_gradients(down, panels, mlp.down.gradients.values, mlp.down.gradients.bias);
  }
  return RAREFY_OK;
}

// An MLP with the kernels that find(pattern) gives; false if that is null for one of its matrices.
template <class Find>
bool find_mlp(Find find, const rarefy_mlp &mlp, const rarefy_mlp_gradients &gradients, Mlp &found) {
  const bool gated = mlp.gate.pattern != nullptr;
  const auto set = [&](MlpLayer &layer, const rarefy_layer &from, const rarefy_layer_gradients &to) {
    layer = {from, find(from.pattern), to};
    return layer.kernels != nullptr;
  };
  found.num_inner = gated ? 2 : 1;
  found.activation = mlp.activation;
  return (!gated || set(found.inner[0], mlp.gate, gradients.gate)) && set(found.inner[gated], mlp.up, gradients.up) &&
         set(found.down, mlp.down, gradients.down);
}

inline Saved saved(const rarefy_mlp &mlp, const Mlp &found, const void *z) {
  return {const_cast<void *>(z), found.num_inner * found.hidden(), mlp.half_saved != 0};
}

template <class Find>
int mlp_forward_with(Find find, const rarefy_mlp &mlp, const void *x, void *y, void *z, int64_t batch, int threads) {
  Mlp found = {};
  if (!find_mlp(find, mlp, {}, found)) return RAREFY_UNSUPPORTED_BLOCK;
  const bool half = mlp.half_rows != 0;
  return mlp_forward(found, {x, mlp.up.pattern->in_features, half}, {y, mlp.down.pattern->out_features, half},
                     saved(mlp, found, z), batch, threads);
}

template <class Find>
int mlp_backward_with(Find find, const rarefy_mlp &mlp, const void *dy, const void *x, const void *z, void *dx,
                      const rarefy_mlp_gradients &gradients, int64_t batch, int threads) {
  Mlp found = {};
  if (!find_mlp(find, mlp, gradients, found)) return RAREFY_UNSUPPORTED_BLOCK;
  const bool half = mlp.half_rows != 0;
  const int64_t in = mlp.up.pattern->in_features;
  return mlp_backward(found, {dy, mlp.down.pattern->out_features, half}, {x, in, half}, saved(mlp, found, z), {dx, in, half},
                      batch, threads);
}

}  // namespace
}  // namespace rarefy
