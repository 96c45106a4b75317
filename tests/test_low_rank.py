"""Sparse plus low rank: what the layer computes, what a plan makes of it, and that everything else goes on working."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import rarefy
import tiny
from cases import gather, scatter
from rarefy import Plan, RigL, SparseLinear, SparseLowRank, SRigL, Static, pixelated_butterfly, sltrain, sparsify
from rarefy.cost import CostModel, dense_work, measure, predict
from rarefy.cost.terms import terms
from rarefy.cost.work import Work
from tiny import one_thread

__all__ = ["one_thread"]

EPS = torch.finfo(torch.float32).eps
BLOCKS = [(1, 1), (4, 4), (4, 1), (2, 3)]


def make(block: tuple[int, int] = (1, 1), seed: int = 0, **options) -> SparseLowRank:
    """24 inputs, 12 outputs, rank 3, B drawn so that it is not zero."""
    generator = torch.Generator().manual_seed(seed)
    layer = SparseLowRank(24, 12, density=0.7, rank=3, alpha=2.0, block=block, generator=generator, **options)
    with torch.no_grad():
        layer.b.copy_(torch.randn(layer.b.shape, generator=generator))
    return layer


def dense_of(layer: SparseLowRank) -> Tensor:
    """S + scale B A in float64, written out."""
    s = scatter(layer.sparse.values.detach().double(), layer.sparse.pattern)
    return s + layer.scale * layer.b.detach().double() @ layer.a.detach().double()


# -- what it computes --


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("leading", [(), (5,), (0,), (3, 7)], ids=str)
def test_forward_and_gradients_match_dense(block, leading):
    layer = make(block)
    x, dy = torch.randn(*leading, 24, requires_grad=True), torch.randn(*leading, 12)
    y = layer(x)
    y.backward(dy)
    assert layer.bias is not None and layer.bias.grad is not None and x.grad is not None
    assert layer.sparse.values.grad is not None and layer.a.grad is not None and layer.b.grad is not None

    x64, dy64 = x.detach().double().reshape(-1, 24), dy.double().reshape(-1, 12)
    s = scatter(layer.sparse.values.detach().double(), layer.sparse.pattern)
    a, b = layer.a.detach().double(), layer.b.detach().double()
    scale, bias, tokens = layer.scale, layer.bias.detach().double(), x64.shape[0]

    def close(got: Tensor, exact: Tensor, magnitude: Tensor, terms: int) -> None:
        """Within (terms + 4) roundings of the sum of magnitudes: each sum's own, and that of scale and addition."""
        assert ((got.double().reshape(exact.shape) - exact).abs() <= (terms + 4) * EPS * magnitude).all()

    dw, size = dy64.T @ x64, dy64.abs().T @ x64.abs()
    low, low_size = scale * b @ a, scale * b.abs() @ a.abs()
    close(y.detach(), x64 @ (s + low).T + bias, x64.abs() @ (s.abs() + low_size).T + bias.abs(), 24 + 3)
    close(x.grad, dy64 @ (s + low), dy64.abs() @ (s.abs() + low_size), 12 + 3)
    close(layer.bias.grad, dy64.sum(0), dy64.abs().sum(0), tokens)
    pattern = layer.sparse.pattern
    close(layer.sparse.values.grad, gather(dw, pattern), gather(size, pattern), tokens)
    close(layer.a.grad, scale * b.T @ dw, scale * b.abs().T @ size, tokens + 12)
    close(layer.b.grad, scale * dw @ a.T, scale * size @ a.abs().T, tokens + 24)


@pytest.mark.parametrize("block", [(1, 1), (4, 4)], ids=str)
def test_gradcheck(block):
    layer = make(block, dtype=torch.float64)
    names = [name for name, _ in layer.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, *(p.detach().requires_grad_() for p in layer.parameters())))


def test_compiles_to_one_graph():
    layer, x = make(), torch.randn(2, 5, 24)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()
    assert layer.a.grad is not None and layer.sparse.values.grad is not None


def test_under_autocast_and_with_half_inputs_weights_stay_fp32():
    layer, x = make(), torch.randn(6, 24)
    exact = x.bfloat16().double() @ dense_of(layer).T + layer.bias.detach().double()  # type: ignore[union-attr]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert layer.a.grad is not None and layer.a.grad.dtype == torch.float32


def test_to_dense_computes_the_same():
    layer, x = make(), torch.randn(9, 24)
    torch.testing.assert_close(layer.to_dense()(x), layer(x))
    with pytest.raises(AttributeError, match="no dense weight"):
        _ = layer.weight


def test_starts_as_the_sparse_layer_alone():
    layer = SparseLowRank(24, 12, density=0.5, rank=2)
    x = torch.randn(4, 24)
    assert torch.equal(layer(x), layer.sparse(x))
    assert float(layer.a.detach().abs().max()) <= 24**-0.5


# -- budget --


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 6), st.sampled_from(BLOCKS), st.floats(0.01, 1))
def test_both_parts_stay_within_the_density_and_use_it(rows, cols, rank, block, density):
    shape = (rows * block[0], cols * block[1])
    entries, unit, low = shape[0] * shape[1], block[0] * block[1], rank * (shape[0] + shape[1])
    if density * entries - low < unit:
        with pytest.raises(ValueError, match="no unit is left"):
            SparseLowRank(shape[1], shape[0], density=density, rank=rank, block=block)
        return
    layer = SparseLowRank(shape[1], shape[0], bias=False, density=density, rank=rank, block=block)
    weights = sum(p.numel() for p in layer.parameters())
    assert weights <= density * entries * (1 + 1e-9) < weights + unit * (1 + 1e-6)
    assert layer.density == weights / entries


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 48), nn.GELU(), nn.Linear(48, 8))


@pytest.mark.parametrize("low_rank", [2, 0.45])
@pytest.mark.parametrize("distribution", ["uniform", "erk"])
@pytest.mark.parametrize("block", [1, 4])
def test_explain_counts_what_sparsify_makes(low_rank, distribution, block):
    plan = Plan(density=0.35, low_rank=low_rank, distribution=distribution, block=block, method=Static())
    model = network()
    explanation = plan.explain(model)
    rewirer = sparsify(model, plan)
    assert list(rewirer.layers) == ["0.sparse", "2.sparse", "4.sparse"]
    for row, name in zip(explanation.rows, ("0", "2", "4"), strict=True):
        layer = model.get_submodule(name)
        assert isinstance(layer, SparseLowRank)
        parts = (layer.sparse.values, layer.a, layer.b)
        weights = sum(part.numel() for part in parts)
        assert (row["nnz"], row["rank"], row["units"]) == (weights, layer.rank, layer.sparse.num_units)
        assert row["bytes"] == 4 * weights + layer.sparse.index_bytes()
        assert row["flops"] == 6 * weights
        if isinstance(low_rank, float):
            thin, step = layer.a.numel() + layer.b.numel(), layer.in_features + layer.out_features
            assert thin <= low_rank * (weights + block * block) < thin + step + low_rank * block * block
    size = 64 * 96 + 96 * 48 + 48 * 8
    assert explanation.totals["nnz"] <= 0.35 * size < explanation.totals["nnz"] + 3 * block * block
    assert "rank" in str(explanation).splitlines()[0]


def test_overrides_have_a_budget_of_their_own_and_adopted_layers_keep_theirs():
    model = network()
    plan = Plan(density=0.3, low_rank=2, overrides={"2": 0.5}, method=Static())
    sparsify(model, plan)
    layer = model[2]  # type: ignore[index]
    assert sum(p.numel() for p in (layer.sparse.values, layer.a, layer.b)) == 96 * 48 // 2
    again = Plan(density=0.1, method=Static()).decide(model)
    assert [(d.name, d.rank, d.units) for d in again][1] == ("2", 2, layer.sparse.num_units)
    assert list(sparsify(model, Plan(density=0.1, method=Static())).layers) == ["0.sparse", "2.sparse", "4.sparse"]


def test_bad_wishes_are_refused():
    with pytest.raises(ValueError, match=r"4: a low-rank part of rank 5 has 280 weights in a 8x48 matrix"):
        Plan(density=0.3, low_rank=5).decide(network())
    for wrong in (-1, 1.0, 1.5, True):
        with pytest.raises(ValueError, match="low_rank must be a rank"):
            Plan(density=0.3, low_rank=wrong)
    with pytest.raises(ValueError, match="rows of equal fan-in then cannot be: leave one out"):
        Plan(density=0.1, low_rank=2, init="constant_fan_in")
    with pytest.raises(ValueError, match="rows of equal fan-in then cannot be: leave one out"):
        Plan(density=0.1, low_rank=2, method=SRigL())
    with pytest.raises(ValueError, match="there is none: give low_rank="):
        Plan(density=0.3, low_rank_alpha=2.0)
    with pytest.raises(ValueError, match="alpha must be a positive number"):
        Plan(density=0.3, low_rank=2, low_rank_alpha=0.0)
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="rank must be a positive int"):
            SparseLowRank(8, 8, density=0.9, rank=wrong)  # type: ignore[arg-type]


def test_a_share_too_small_for_rank_one_is_said():
    with pytest.warns(UserWarning, match=r"not enough for rank 1 in 1 of 3 sparse layers \(first: 4\)"):
        decisions = Plan(density=0.3, low_rank=0.3).decide(network())
    assert [d.rank for d in decisions][2] == 0


# -- times --


def test_times_include_the_low_rank_part():
    kinds = [Work((1, 1), 1, 1, block, "fp32") for block in (None, (1, 1))]
    ones = {f"{w.kind} {p}": dict.fromkeys(terms(w, p, 0), 1e-6) for w in kinds for p in ("forward", "step")}
    model = CostModel(ones, 1 << 20)
    alone, both = (predict(model, (32, 64), 100, (1, 1), 16, rank=rank) for rank in (0, 4))
    thin = model.ms(dense_work((4, 64), 16)), model.ms(dense_work((32, 4), 16))
    assert alone is not None and both is not None and alone.sparse_ms is not None and None not in thin
    assert both.sparse_ms == pytest.approx(alone.sparse_ms + sum(thin))  # type: ignore[arg-type]
    assert both.dense_ms == alone.dense_ms
    assert measure((32, 64), 100, (1, 1), 16, rank=4).sparse_ms is not None


# -- training, files, copies --


def trained(plan: Plan, steps: int, model: nn.Module | None = None):
    model = network() if model is None else model
    rewirer = sparsify(model, plan)
    optimizer = rarefy.AdamW(rarefy.param_groups(model, lr=1e-2, weight_decay=0.1))
    rewirer.attach(optimizer, total_steps=40)
    train(model, optimizer, range(steps))
    return model, rewirer, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, target = torch.randn(16, 64, generator=generator), torch.randn(16, 8, generator=generator)
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()


REWIRED = Plan(density=0.4, low_rank=0.4, low_rank_alpha=3.0, method=RigL(interval=3), block=4)
PLANS = [REWIRED, pixelated_butterfly(0.5, block=8, low_rank=1 / 3), sltrain(0.5, rank=2, alpha=3.0)]


@pytest.mark.parametrize("plan", PLANS, ids=["rigl", "pixelated_butterfly", "sltrain"])
def test_saved_and_resumed_bit_for_bit(plan, tmp_path):
    plan = Plan.from_dict(plan.to_dict())
    model, rewirer, optimizer = trained(plan, 7)
    rarefy.save(model, tmp_path / "a.safetensors", rewirer=rewirer, optimizer=optimizer)
    twin, its_rewirer, its_optimizer = trained(plan, 0)
    rarefy.load_into(tmp_path / "a.safetensors", twin, rewirer=its_rewirer, optimizer=its_optimizer)
    rarefy.save(twin, tmp_path / "b.safetensors", rewirer=its_rewirer, optimizer=its_optimizer)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    for one, its in ((model, optimizer), (twin, its_optimizer)):
        train(one, its, range(7, 14))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, twin.state_dict()[name]), name
    changed = {record["layer"] for record in rewirer.history if record["changed"]}
    assert changed == (set(rewirer.layers) if plan.method.rewires else set())


def test_low_rank_weights_train_and_decay():
    model, rewirer, _ = trained(REWIRED, 3)
    first = model.get_submodule("0")
    assert isinstance(first, SparseLowRank)
    assert float(first.b.detach().abs().max()) > 0
    decayed, spared = rarefy.param_groups(model, lr=1.0, weight_decay=0.1)
    for layer in model.modules():
        if isinstance(layer, SparseLowRank):
            assert {id(layer.a), id(layer.b), id(layer.sparse.values)} <= {id(p) for p in decayed["params"]}
            assert id(layer.bias) in {id(p) for p in spared["params"]}
    assert rewirer.fused == []


@pytest.mark.parametrize("suffix", ["dense", "scipy"])
def test_exports_hold_both_parts(suffix, tmp_path):
    model, rewirer, _ = trained(REWIRED, 4)
    rarefy.save(model, tmp_path / "a.safetensors", rewirer=rewirer)
    first = model.get_submodule("0")
    assert isinstance(first, SparseLowRank)
    exact, size = dense_of(first), first.sparse.dense_weight().abs().max() + first.rank * first.scale
    if suffix == "dense":
        state = rarefy.export.to_dense_state_dict(tmp_path / "a.safetensors")
        dense = network()
        dense.load_state_dict(state)
        x = torch.randn(5, 64)
        torch.testing.assert_close(dense(x), model(x))
        got = state["0.weight"]
    else:
        np, sparse = pytest.importorskip("numpy"), pytest.importorskip("scipy.sparse")
        folder = rarefy.export.export_scipy(tmp_path / "a.safetensors", tmp_path / "out")
        thin = torch.from_numpy(np.load(folder / "0.b.npy") @ np.load(folder / "0.a.npy"))
        got = torch.from_numpy(sparse.load_npz(folder / "0.sparse.weight.npz").toarray()) + thin
    assert (got.double() - exact).abs().max() <= (first.rank + 4) * EPS * size


def test_refuses_a_file_of_another_scale_or_rank(tmp_path):
    model, _, _ = trained(REWIRED, 1)
    rarefy.save(model, tmp_path / "a.safetensors")
    for change, message in (
        ({"low_rank_alpha": 1.0}, "0: its low-rank part is scaled by"),
        ({"low_rank": 0}, "0.sparse: the model, of another architecture, has no such layer"),
    ):
        other = Plan.from_dict({**REWIRED.to_dict(), "low_rank_alpha": None, **change})
        twin, _, _ = trained(other, 0)
        with pytest.raises(ValueError, match=message):
            rarefy.load_into(tmp_path / "a.safetensors", twin)


def test_a_copy_is_independent():
    layer = make()
    twin = copy.deepcopy(layer)
    x = torch.randn(3, 24)
    assert torch.equal(twin(x), layer(x))
    with torch.no_grad():
        twin.a.add_(1)
    assert not torch.equal(twin(x), layer(x))


def test_meta_device_then_reset():
    with torch.device("meta"):
        model = network()
    rewirer = sparsify(model, REWIRED)
    model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, SparseLowRank):
            module.reset_parameters()
            assert bool((module.b == 0).all()) and 0 < float(module.a.detach().abs().max()) <= module.in_features**-0.5
    again = network()
    for layer, same in zip(rewirer.layers.values(), sparsify(again, REWIRED).layers.values(), strict=True):
        assert layer.pattern == same.pattern


def test_companions_rewire_along():
    model = network()
    rewirer = sparsify(model, REWIRED)
    average = copy.deepcopy(model)
    rewirer.register_companion(average)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rewirer.attach(optimizer, total_steps=40)
    train(model, optimizer, range(8))
    for name, layer in rewirer.layers.items():
        theirs = average.get_submodule(name)
        assert isinstance(theirs, SparseLinear)
        assert layer.pattern == theirs.pattern


def test_frozen_and_tied_to_the_original_bias():
    model = network()
    bias = model[0].bias  # type: ignore[index]
    model[0].weight.requires_grad_(False)  # type: ignore[index]
    sparsify(model, REWIRED)
    layer = model.get_submodule("0")
    assert isinstance(layer, SparseLowRank)
    assert layer.bias is bias
    assert [p.requires_grad for p in (layer.sparse.values, layer.a, layer.b)] == [False] * 3


def test_presets_say_what_the_papers_do():
    butterfly, random = pixelated_butterfly(0.2), sltrain(0.3, rank=8, alpha=4.0, seed=3)
    assert (butterfly.init, butterfly.block, butterfly.low_rank) == ("butterfly", 16, 0.25)
    assert (random.init, random.rescale, random.low_rank, random.low_rank_alpha, random.seed) == (
        "random", False, 8, 4.0, 3,
    )  # fmt: skip
    assert not butterfly.method.rewires and not random.method.rewires
    model = network()
    before = model[0].weight.detach().clone()  # type: ignore[index]
    sparsify(model, sltrain(0.5, rank=2))
    layer = model.get_submodule("0")
    assert isinstance(layer, SparseLowRank)
    assert torch.equal(layer.sparse.values, gather(before, layer.sparse.pattern).flatten()), "kept, not rescaled"


@pytest.mark.usefixtures("one_thread")
def test_trains_from_a_plan_file(tmp_path: Path):
    """Through the command line, killed by nothing, with what its record says of weights."""
    text, plan = tiny.write_text(tmp_path / "text.txt"), tmp_path / "plan.yaml"
    plan.write_text(
        "density: 0.4\ninit: butterfly\nblock: 4\nlow_rank: 0.3\nlow_rank_alpha: 2.0\n"
        "keep_dense: [head]\nmethod: {name: static}\n"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        process = tiny.start(tiny.flags(text, "--plan", str(plan), "--run", "run", steps=6), tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert (tmp_path / "run" / "metrics.jsonl").exists(), out


def test_conv1d_is_exported_as_it_stores_its_weight(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = nn.ModuleDict({"c": transformers.pytorch_utils.Conv1D(24, 16)})
    sparsify(model, Plan(density=0.6, low_rank=3, method=Static()))
    layer = model.get_submodule("c")
    assert isinstance(layer, SparseLowRank)
    nn.init.normal_(layer.b)
    rarefy.save(model, tmp_path / "a.safetensors")
    state = rarefy.export.to_dense_state_dict(tmp_path / "a.safetensors")
    dense = transformers.pytorch_utils.Conv1D(24, 16)
    dense.load_state_dict({name.removeprefix("c."): tensor for name, tensor in state.items()})
    x = torch.randn(5, 16)
    torch.testing.assert_close(dense(x), layer(x))


def test_a_model_that_is_the_layer_itself_is_saved_and_loaded(tmp_path: Path):
    layer, twin = make(), make(seed=1)
    rarefy.save(layer, tmp_path / "a.safetensors")
    rarefy.load_into(tmp_path / "a.safetensors", twin)
    x = torch.randn(4, 24)
    assert torch.equal(twin(x), layer(x))
    dense = nn.Linear(24, 12)
    dense.load_state_dict(rarefy.export.to_dense_state_dict(tmp_path / "a.safetensors"))
    torch.testing.assert_close(dense(x), layer(x))
