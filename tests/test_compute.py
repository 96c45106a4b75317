"""Layers that compute dense: the same function, gradients, growth, files and trajectory as computing sparse."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from cases import CASES, Case, scatter
from rarefy import Plan, RigL, SparseLinear, Static, sparsify
from rarefy.cost import CostModel, Work, break_even, dense_work
from rarefy.growth import Exact, Request
from rarefy.models import GPT, GPTConfig, generate
from rarefy.ops import expanded
from rarefy.ops import sink as sinks
from rarefy.plan import thresholds
from rarefy.rewiring import Rewirer, choose_compute, ranks

OPS = torch.ops.rarefy
BLOCKS = [(1, 1), (4, 4), (4, 1), (1, 3), (2, 3)]


def make(block=(1, 1), density: float = 0.5, dtype: torch.dtype = torch.float32, seed: int = 0) -> SparseLinear:
    generator = torch.Generator().manual_seed(seed)
    return SparseLinear(24, 12, density=density, block=block, generator=generator, dtype=dtype)


def dense_like(layer: SparseLinear) -> SparseLinear:
    twin = copy.deepcopy(layer)
    twin.set_compute("dense")
    return twin


# -- the op -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_dense_oracle(case: Case):
    if case.out_features * case.in_features > 100_000:
        pytest.skip("the dense weight is the point of the sparse path there")
    pattern, generator = case.pattern(), case.generator()
    layer = SparseLinear.from_pattern(pattern, case.bias, generator=generator, dtype=torch.float64)
    layer.set_compute("dense")
    weight = scatter(layer.values.detach(), pattern).requires_grad_()
    x = torch.randn(case.batch, case.in_features, generator=generator, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(case.batch, case.out_features, generator=generator, dtype=torch.float64)
    x_too = x.detach().clone().requires_grad_()
    y, expected = layer(x), nn.functional.linear(x_too, weight, None if layer.bias is None else layer.bias.detach())
    y.backward(dy)
    expected.backward(dy)
    assert weight.grad is not None and layer.values.grad is not None
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, x_too.grad)
    torch.testing.assert_close(scatter(layer.values.grad, pattern), weight.grad * pattern.to_mask())
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.grad, dy.sum(0))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_copy_exactly(case: Case):
    pattern, generator = case.pattern(), case.generator()
    layer = SparseLinear.from_pattern(pattern, generator=generator)
    layer.set_compute("dense")
    expected = scatter(layer.values.detach(), pattern)
    assert torch.equal(expanded.weight(layer.values, layer.index), expected)
    gradient = torch.randn(expected.shape, generator=generator)
    assert torch.equal(scatter(expanded.units(gradient, layer.index), pattern), gradient * pattern.to_mask())


@pytest.mark.parametrize("density", [0.5, 1.0])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_gradcheck_and_opcheck(block, density):
    layer = make(block, density, torch.float64)
    layer.set_compute("dense")
    matrix = tuple(layer.index)
    x, dy = torch.randn(5, 24, dtype=torch.float64, requires_grad=True), torch.randn(5, 12, dtype=torch.float64)
    bias = layer.bias
    assert bias is not None
    torch.autograd.gradcheck(lambda v, x, b: OPS.spmm(v, *matrix, x, b), (layer.values, x, bias))
    torch.library.opcheck(OPS.spmm, (layer.values, *matrix, x, bias, sinks.new_sink()))
    torch.library.opcheck(OPS.spmm, (layer.values.detach(), *matrix, x.detach()))
    for needs in ([True, True, True], [False, True, False]):
        given = (layer.values.detach(), *matrix, dy, x.detach(), needs, sinks.new_sink())
        torch.library.opcheck(OPS.spmm_backward, given)


def test_full_pattern_is_the_weight_without_a_copy():
    layer = make(density=1.0)
    layer.set_compute("dense")
    seen = expanded.weight(layer.values, layer.index)
    assert seen.data_ptr() == layer.values.data_ptr() and seen.shape == (12, 24)
    gradient = torch.randn(12, 24)
    found = expanded.units(gradient, layer.index)
    assert found.data_ptr() == gradient.data_ptr() and found.shape == layer.values.shape


def test_wrong_input_is_named():
    layer = make()
    layer.set_compute("dense")
    with pytest.raises(RuntimeError, match=r"in_features = 24\), got \(3, 5\)"):
        layer(torch.randn(3, 5))
    with pytest.raises(ValueError, match='"sparse" or "dense", got \'fast\''):
        layer.set_compute("fast")  # type: ignore[arg-type]


def test_compiles_whole_and_follows_a_switch():
    layer, x = make(), torch.randn(6, 24)
    expected = layer(x)
    run = torch.compile(lambda x: layer(x), fullgraph=True, backend="aot_eager")
    for compute in ("dense", "sparse"):
        layer.set_compute(compute)
        layer.zero_grad()
        y = run(x)
        y.sum().backward()
        torch.testing.assert_close(y, expected)
        assert layer.values.grad is not None
        torch.testing.assert_close(layer.values.grad, x.sum(0)[layer.pattern.col_indices.long()])


# -- the layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_switching_frees_and_restores_the_index(block):
    layer = make(block)
    before, size = [t.clone() for t in layer.index[:5]], layer.index_bytes()
    layer.set_compute("dense")
    kept = sum(t.numel() * t.element_size() for t in (layer.crow_indices, layer.col_indices, layer.t_crow))
    assert layer.index_bytes() == kept < size and "computes dense" in repr(layer)
    assert all(torch.equal(a.int(), b.int()) for a, b in zip(before[:3], layer.index[:3], strict=True))
    layer.set_compute("sparse")
    assert layer.index_bytes() == size and "computes" not in repr(layer)
    assert all(torch.equal(a.int(), b.int()) for a, b in zip(before, layer.index[:5], strict=True))


@pytest.mark.parametrize("saved", ["sparse", "dense"])
@pytest.mark.parametrize("loading", ["sparse", "dense"])
def test_files_of_either_mode_load_in_the_other(saved, loading):
    source, target, x = make(seed=1), make(seed=2), torch.randn(3, 24)
    expected = source(x)
    source.set_compute(saved)
    target.set_compute(loading)
    target.load_state_dict(source.state_dict())
    assert target.compute == loading
    torch.testing.assert_close(target(x), expected)
    other = make(seed=3)
    other.set_compute(loading)
    other.load_state_dict({k: v.clone() for k, v in source.state_dict().items()}, assign=True)
    torch.testing.assert_close(other(x), expected)


def test_copies_keep_the_mode():
    layer, x = make(), torch.randn(3, 24)
    layer.set_compute("dense")
    stream = io.BytesIO(pickle.dumps(layer))
    for twin in (copy.deepcopy(layer), pickle.loads(stream.getvalue())):
        assert twin.compute == "dense"
        torch.testing.assert_close(twin(x), layer(x))
        twin.set_compute("sparse")
        torch.testing.assert_close(twin(x), layer(x))


def test_meta_device_in_dense_mode():
    layer = SparseLinear(24, 12, density=0.5, device="meta")
    layer.set_compute("dense")
    layer.to_empty(device="cpu")
    layer.reset_parameters(torch.Generator().manual_seed(0))
    y = layer(torch.ones(2, 24))
    layer.set_compute("sparse")
    torch.testing.assert_close(layer(torch.ones(2, 24)), y)
    late = SparseLinear(24, 12, density=0.5, device="meta")
    late.set_compute("dense")
    late.set_compute("sparse")
    late.to_empty(device="cpu").reset_parameters()
    assert late(torch.ones(2, 24)).isfinite().all()


def test_autocast_gives_bf16_out_and_fp32_gradients():
    layer, x = make(), torch.randn(6, 24)
    layer.set_compute("dense")
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and layer.values.grad is not None and layer.values.grad.dtype == torch.float32


# -- training ---------------------------------------------------------------------------------------------------------


def run_steps(switch: dict[int, str], rewires: bool = False) -> tuple[nn.Module, list[float]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 8)).double()
    plan = Plan(density=0.5, method=RigL(interval=2, end=9) if rewires else Static())
    rewirer = sparsify(model, plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rewirer.attach(optimizer, total_steps=12)
    data, losses = torch.Generator().manual_seed(1), []
    for step in range(12):
        if step in switch:
            for layer in rewirer.layers.values():
                layer.set_compute(switch[step])  # type: ignore[arg-type]
        x = torch.randn(16, 24, generator=data, dtype=torch.float64)
        loss = (model(x) - x[:, :8]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if rewires:
        assert any(record["changed"] for record in rewirer.history)
    return model, losses


@pytest.mark.parametrize("rewires", [False, True])
def test_switching_changes_no_trajectory(rewires):
    never, losses = run_steps({}, rewires)
    often, others = run_steps({0: "dense", 3: "sparse", 6: "dense"}, rewires)
    torch.testing.assert_close(losses, others, rtol=1e-10, atol=0)
    for (name, one), two in zip(never.state_dict().items(), often.state_dict().values(), strict=True):
        if one.is_floating_point():
            torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-11)
        else:
            assert torch.equal(one.int(), two.int()), name


def test_growth_is_fed_alike():
    layer, x, dy = make((4, 4), density=0.4), torch.randn(9, 24), torch.randn(9, 12)
    twin, found = dense_like(layer), []
    for one in (layer, twin):
        request = Request("layer", 1, 0, one.values, 3, True, 1, ranks)
        best = Exact().collector(request)
        sinks.arm(one.sink, best)
        one(x).backward(dy)
        assert sinks.take_calls(one.sink) == 1
        found.append(best.found(one.index, None))
    assert torch.equal(found[0].units, found[1].units) and found[0].units.numel() == 3
    torch.testing.assert_close(found[0].returning, found[1].returning)


def test_gpt_in_mixed_modes_under_autocast_and_generation():
    torch.manual_seed(0)
    model = GPT(GPTConfig(context=16, layers=2, heads=2, width=32)).eval()
    rewirer = sparsify(model, Plan(density=0.5))
    written = generate(model, b"abc", 8, temperature=0)
    tokens = torch.randint(256, (2, 12))
    expected = model(tokens)
    for number, layer in enumerate(rewirer.layers.values()):
        layer.set_compute("dense" if number % 2 else "sparse")
    assert {layer.compute for layer in rewirer.layers.values()} == {"sparse", "dense"}
    torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=1e-5)
    assert generate(model, b"abc", 8, temperature=0) == written
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(tokens).float(), expected.float(), rtol=0.05, atol=0.05)


# -- the policy -------------------------------------------------------------------------------------------------------


def costs(products: float, dense: float) -> CostModel:
    known = {
        f"{kind} {which}": {"products": ms} for kind, ms in kinds(products, dense) for which in ("forward", "step")
    }
    return CostModel(known, 2 << 20, {}, {})


def kinds(products: float, dense: float) -> list[tuple[str, float]]:
    return [
        (Work((8, 8), 8, 8, (1, 1), "fp32").kind, products),
        (dense_work((8, 8), 8, "fp32").kind, dense),
    ]


def test_break_even_is_where_the_times_cross():
    assert break_even(costs(2.0, 1.0), (100, 200), (1, 1), 64) == pytest.approx(0.5, abs=0.006)
    assert break_even(costs(0.5, 1.0), (100, 200), (1, 1), 64) == 1.0
    assert break_even(costs(1e6, 1.0), (100, 200), (1, 1), 64) == 0.0
    assert break_even(costs(2.0, 1.0), (100, 200), (4, 4), 64) is None


def test_thresholds_ask_the_model_only_under_auto():
    layers = {"a": make(), "b": make((4, 4))}

    def refuse() -> CostModel:
        raise AssertionError("no calibration was called for")

    assert thresholds(layers, None, {}, refuse) == {}
    assert thresholds(layers, 0.3, {}, refuse) == {"a": 0.3, "b": 0.3}
    found = thresholds(layers, "auto", {"a": 64, "b": 64}, lambda: costs(2.0, 1.0))
    assert list(found) == ["a"] and found["a"] == pytest.approx(0.5, abs=0.006)


def test_choose_compute_follows_the_density():
    layer = make(density=0.5)
    assert choose_compute(layer, 0.4) and layer.compute == "dense"
    assert not choose_compute(layer, 0.4)
    assert choose_compute(layer, 0.5) and layer.compute == "sparse"
    assert not choose_compute(layer, None)


@pytest.mark.parametrize("bad", [-0.1, 1.5, "never", True])
def test_plan_refuses_what_is_no_threshold(bad):
    with pytest.raises(ValueError, match="dense_above"):
        Plan(density=0.5, dense_above=bad)


def test_sparsify_applies_it_and_a_resumed_run_computes_as_before():
    def made(dense_above: float | None) -> Rewirer:
        model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 8))
        return sparsify(model, Plan(density=0.5, dense_above=dense_above))

    plan = Plan(density=0.5, dense_above=0.3)
    assert Plan.from_dict(plan.to_dict()) == plan
    first, resumed = made(0.3), made(0.9)
    assert {layer.compute for layer in first.layers.values()} == {"dense"}
    assert {layer.compute for layer in resumed.layers.values()} == {"sparse"}
    resumed.load_state_dict(first.state_dict())
    assert {layer.compute for layer in resumed.layers.values()} == {"dense"}
    assert resumed.dense_above == first.dense_above == dict.fromkeys(first.layers, 0.3)
