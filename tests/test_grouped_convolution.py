"""Convolutions with groups: what growth, rewires, plans and files make of them. Their products: test_convolution."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rarefy
from rarefy.cost import layer_bytes, training_bytes
from rarefy.groups import groups_of, split_over
from rarefy.growth import Request
from rarefy.nn import SparseConv1d, SparseConv2d
from rarefy.nn.norm import norm_relu, norm_relu_conv
from rarefy.ops import sink, spread, tiled
from rarefy.pattern import Pattern
from rarefy.rewiring import ranks


def layer_of(groups: int = 4, channels: int = 8, outputs: int = 16, density: float = 0.4, **more: Any) -> SparseConv2d:
    torch.manual_seed(0)
    return SparseConv2d(channels, outputs, 3, padding=1, groups=groups, density=density, **more)


def seen_by(layer: SparseConv2d, signal: rarefy.Signal, calls: int = 1, **more: Any):
    """What a signal finds in one step of an armed layer, and the dense gradient of that step."""
    options = {"name": "layer", "step": 1, "seed": 0, "k": 6, "returns": True, "calls": calls, "ranks": ranks}
    collector = signal.collector(Request(**{**options, "values": layer.values, **more}))
    sink.arm(layer.sink, collector)
    dense = layer.to_dense()
    for _ in range(calls):
        x = torch.randn(5, layer.in_channels, 6, 7)
        for module in (layer, dense):
            module(x).square().sum().backward()
    assert dense.weight.grad is not None
    return collector.found(layer.index, None), dense.weight.grad.flatten(1)


def scores(gradient: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Mean magnitude of each unit, row-major."""
    return tiled.unit_scores(gradient, list(block)).flatten()


EXACT = [
    rarefy.Exact(),
    rarefy.SampledTokens(tokens=10_000),
    rarefy.Momentum(pool=1000, steps=2, beta=0),
]


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("block", [(1, 1), (4, 1), (2, 2)])
@pytest.mark.parametrize("balanced", [1, 2, 8])
@pytest.mark.parametrize("signal", EXACT, ids=lambda signal: type(signal).__name__)
@pytest.mark.filterwarnings("ignore:rarefy runs in plain torch")
def test_signals_see_the_gradient_within_the_groups(signal, balanced, block, calls):
    layer = layer_of(block=block, density=0.25 if block == (2, 2) else 0.4, channels=16, outputs=32)
    found, gradient = seen_by(layer, signal, calls, groups=balanced)
    wanted, active = scores(gradient, block), layer.pattern.unit_indices()
    assert found.returning is not None
    torch.testing.assert_close(found.returning, wanted[active], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.scores, wanted[found.units], rtol=1e-4, atol=1e-3)
    absent = wanted.clone()
    absent[active] = -1
    parts = list(groups_of(layer.pattern, balanced))
    for part, k in zip(parts, split_over(6, parts), strict=True):
        best = torch.sort(absent[part.units], descending=True).indices[:k] + part.units.start
        assert set(best.tolist()) <= set(found.units.tolist())


@pytest.mark.parametrize("calls", [1, 2])
def test_the_best_of_each_row(calls):
    layer = layer_of()
    found, gradient = seen_by(layer, rarefy.Exact(), calls, row_capacity=3)
    assert found.rows is not None
    wanted = gradient.abs()
    wanted.view(-1)[layer.pattern.unit_indices()] = -1
    best = torch.sort(wanted, dim=1, descending=True)
    assert torch.equal(found.rows.row_cols, best.indices[:, :3])
    torch.testing.assert_close(found.rows.row_scores, best.values[:, :3], rtol=1e-4, atol=1e-4)


def test_norms_are_those_of_the_groups_inputs():
    layer = layer_of()
    x = torch.randn(5, 8, 6, 7) * torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8]).view(1, -1, 1, 1)
    collector = rarefy.NormProduct().collector(
        Request(name="layer", step=1, seed=0, values=layer.values, k=5, returns=False, calls=1, ranks=ranks)
    )
    sink.arm(layer.sink, collector)
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    patches = F.unfold(x, 3, padding=1).transpose(0, 1).reshape(4, 18, -1).norm(dim=2)  # (groups, columns)
    rows = dy.transpose(0, 1).reshape(4, 4, -1).norm(dim=2)  # (groups, their rows)
    wanted = (rows[:, :, None] * patches[:, None]).flatten()
    found = collector.found(layer.index, None)
    torch.testing.assert_close(found.scores, wanted[found.units], rtol=1e-4, atol=1e-3)
    wanted[layer.pattern.unit_indices()] = -1
    assert set(torch.topk(wanted, 5).indices.tolist()) <= set(found.units.tolist())


@pytest.mark.parametrize("block", [(1, 1), (4, 4), (8, 8)])
def test_the_spread_index_lists_the_same_units_where_the_groups_are(block):
    layer = layer_of(groups=2, channels=16, outputs=16, block=block)
    wide = spread.spread(layer.index, 2)
    pattern = Pattern(wide.crow, wide.cols.to(torch.int32), (wide.out_features, wide.in_features), block)
    mask = layer.pattern.to_mask()
    assert torch.equal(pattern.to_mask(), torch.block_diag(mask[:8], mask[8:]).bool())
    assert all(torch.equal(a, b) for a, b in zip((t.int() for t in wide[2:5]), pattern.transposed(), strict=True))
    assert spread.spread(layer.index, 2) is wide, "made once"


def test_it_follows_the_pattern_into_the_same_memory():
    layer, x = layer_of(), torch.randn(4, 8, 6, 6)
    layer(x)
    wide = spread.spread(layer.index, 4)
    places = [array.data_ptr() for array in wide[:5]]
    layer.set_pattern(Pattern.with_units((16, 18), layer.num_units, (1, 1), torch.Generator().manual_seed(5)))
    torch.testing.assert_close(layer(x), layer.to_dense()(x))
    again = spread.spread(layer.index, 4)
    assert [array.data_ptr() for array in again[:5]] == places, "which a captured graph reads"
    layer.make_room(7)
    torch.testing.assert_close(layer(x), layer.to_dense()(x))


def test_wide_matrices_have_wide_columns():
    """A group's columns fit 16 bits, and those of all groups do not."""
    layer = SparseConv2d(8 * 1024, 8, 3, padding=1, groups=8, density=0.01)
    assert layer.index.cols.dtype == torch.uint16 and spread.spread(layer.index, 8).cols.dtype == torch.int32
    x = torch.randn(2, 8 * 1024, 3, 3)
    torch.testing.assert_close(layer(x), layer.to_dense()(x), rtol=1e-4, atol=1e-4)


def test_bytes_are_counted():
    layer = layer_of(channels=32, outputs=64)
    counted = layer_bytes((64, 72), layer.num_units, (1, 1), groups=4)
    assert layer.index_bytes() == counted - 4 * layer.num_units
    wide = spread.spread(layer.index, 4)
    own = layer_bytes((64, 72), layer.num_units, (1, 1)) - 4 * layer.num_units
    assert layer.index_bytes() - own == sum(array.numel() * array.element_size() for array in wide[:5])
    assert training_bytes(layer)["indices"] == layer.index_bytes()
    layer.set_compute("dense")
    assert layer.index_bytes() == layer_bytes((64, 72), layer.num_units, (1, 1), 0, computes_dense=True, groups=4)


def test_norm_relu_and_a_convolution_with_groups_are_one():
    norm, conv = nn.BatchNorm2d(8), layer_of()
    x = torch.randn(16, 8, 6, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    found = []
    for run in (lambda: norm_relu_conv(norm, conv, x), lambda: conv(norm_relu(norm, x))):
        y = run()
        found.append((y, *torch.autograd.grad(y.square().sum(), [x, conv.values, norm.weight, norm.bias])))
    for together, apart in zip(*found, strict=True):
        torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-3)
    compiled = torch.compile(lambda x: norm_relu_conv(norm, conv, x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), norm_relu_conv(norm, conv, x))


def test_layers_are_copied_loaded_and_turned_dense():
    conv = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=4, dtype=torch.float64)
    layer = SparseConv2d.from_dense(conv, density=0.3)
    x = torch.randn(3, 8, 7, 7, dtype=torch.float64)
    back = layer.to_dense()
    assert isinstance(back, nn.Conv2d) and back.groups == 4 and back.weight.shape == conv.weight.shape
    torch.testing.assert_close(layer(x), back(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    again = SparseConv2d(8, 16, 3, 2, 1, groups=4, density=0.3, dtype=torch.float64)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))
    for how in ("dense", "sparse"):
        layer.set_compute(how)
        torch.testing.assert_close(layer(x), back(x))


def test_along_one_axis():
    conv = nn.Conv1d(6, 12, 5, stride=2, padding=2, groups=3, dtype=torch.float64)
    layer = SparseConv1d.from_dense(conv, density=0.4)
    x = torch.randn(4, 6, 15, dtype=torch.float64, requires_grad=True)
    back = layer.to_dense()
    torch.testing.assert_close(layer(x), back(x))
    assert torch.autograd.gradcheck(layer, x, fast_mode=True)


class Grouped(nn.Module):
    """A stem, one convolution with groups, and a head."""

    def __init__(self, groups: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 16, 3, padding=1, groups=groups)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(F.relu(self.conv(F.relu(self.stem(x)))).mean(dim=(2, 3)))


def trained(method: rarefy.Method, steps: int = 9, **options: Any) -> tuple[Any, rarefy.Rewirer]:
    torch.manual_seed(0)
    model: Any = Grouped()
    rewirer = rarefy.sparsify(model, rarefy.Plan(density=0.4, method=method, include=("conv",), **options))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rewirer.attach(optimizer, total_steps=20)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(6, 3, 8, 8)), torch.randint(4, (6,))).backward()
        optimizer.step()
    return model, rewirer


def test_each_group_is_a_graph_of_its_own():
    """Link prediction sees no path through a column of two groups: each keeps its number of links."""
    model, _ = trained(rarefy.CHTs(interval=2))
    counts = torch.diff(model.conv.pattern.crow_indices).view(4, 4).sum(dim=1)
    torch.manual_seed(0)
    start: Any = Grouped()
    rarefy.sparsify(start, rarefy.Plan(density=0.4, method=rarefy.CHTs(interval=2), include=("conv",)))
    assert torch.equal(counts, torch.diff(start.conv.pattern.crow_indices).view(4, 4).sum(dim=1))
    assert start.conv.pattern != model.conv.pattern


@pytest.mark.parametrize("balanced", [2, 8])
def test_groups_of_rows_may_be_kept_equal_beside_those_of_channels(balanced):
    model, rewirer = trained(rarefy.RigL(interval=2), balance={"conv": balanced})
    counts = torch.diff(model.conv.pattern.crow_indices).view(balanced, -1).sum(dim=1)
    assert rewirer.history and int(counts.max() - counts.min()) <= 1


def test_what_a_plan_refuses():
    model = nn.Sequential(nn.Conv2d(12, 24, 3, groups=4), nn.Flatten())
    with pytest.raises(ValueError, match="6 equal groups of rows cut across the 4 that 0 has by itself"):
        rarefy.Plan(density=0.5, balance={"0": 6}).decide(model)
    (decision,) = rarefy.Plan(density=0.5, block=(4, 1)).decide(model)
    assert "block 4x1 does not fit 4 groups of 6 output channels" in decision.why_dense


def test_plans_count_and_time_them():
    model, sample = Grouped(), torch.randn(2, 3, 8, 8)
    plan = rarefy.Plan(density=0.4, include=("conv",))
    (timed,) = (row for row in plan.explain(model, sample).rows if row["name"] == "conv")
    assert timed["times"] == "measured" and timed["sparse_ms"] > 0 and timed["dense_ms"] > 0
    explained = plan.explain(model)
    (row,) = (row for row in explained.rows if row["name"] == "conv")
    rewirer = rarefy.sparsify(model, plan)
    layer = rewirer.layers["conv"]
    assert row["bytes"] == layer.index_bytes() + 4 * layer.num_units
    assert explained.growth_bytes == 4 * 16 * 18, "the dense gradient within the groups"
    assert math.isclose(row["density"], 0.4, abs_tol=0.01) and row["dense_bytes"] == 4 * 16 * 18


def test_a_transformers_convnext():
    """Depthwise convolutions of 7x7 are worth it, where those of 3x3 are not."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2)
    model = transformers.ConvNextForImageClassification(config)
    rewirer = rarefy.sparsify(model, rarefy.Plan(density=0.3, method=rarefy.SET()))
    depthwise = [layer for layer in rewirer.layers.values() if layer.groups > 1]
    assert [(layer.groups, layer.in_features) for layer in depthwise] == [(16, 49), (32, 49)]
    model(torch.randn(2, 3, 32, 32)).logits.sum().backward()
    assert all(layer.values.grad is not None for layer in rewirer.layers.values())


def test_a_transformers_regnet():
    transformers = pytest.importorskip("transformers")
    config = transformers.RegNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], groups_width=8, layer_type="x"
    )
    model = transformers.RegNetForImageClassification(config)
    method = rarefy.RigL(interval=2, stagger=False)
    rewirer = rarefy.sparsify(model, rarefy.Plan(density=0.3, method=method))
    grouped = {name: layer for name, layer in rewirer.layers.items() if layer.groups > 1}
    assert len(grouped) == 3
    before = {name: layer.pattern for name, layer in grouped.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rewirer.attach(optimizer, total_steps=20)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 32, 32)).logits.square().sum().backward()
        optimizer.step()
    assert all(layer.pattern != before[name] for name, layer in grouped.items())
