"""Thousands of rewires of random layers: after each, every invariant, and for gradient growth the exact choice."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from rarefy import SET, Constant, Cosine, Linear, Method, Pattern, Rewirer, RigL, SparseLinear
from rewires import OPTIMIZERS, Snapshot, check_nothing_changed, check_rewire, push, snapshot

REWIRES = 5000


@dataclass(frozen=True)
class LayerPlan:
    rows: int
    cols: int
    block: tuple[int, int]
    units: int
    bias: bool


@st.composite
def layer_plans(draw) -> LayerPlan:
    rows, cols = draw(st.integers(1, 8)), draw(st.integers(3, 8))
    block = draw(st.sampled_from([(1, 1), (1, 1), (4, 4), (4, 1), (2, 3)]))
    n = rows * cols
    units = draw(st.one_of(*[st.integers(min(n // 4, n - 1), n - 1)] * 3, st.integers(0, n)))
    return LayerPlan(rows, cols, block, units, draw(st.booleans()))


FRACTIONS = st.one_of(
    st.floats(0.2, 1).map(Constant),
    st.floats(0.2, 1).map(Constant),
    st.sampled_from([Constant(0.0), Constant(0.01), Constant(1.0), Cosine(1.0), Cosine(0.5, 0.1), Linear(0.2, 0.9)]),
)


@st.composite
def options(draw) -> dict[str, Any]:
    return {
        "interval": draw(st.sampled_from([1, 1, 1, 2])),
        "end": 20,
        "fraction": draw(FRACTIONS),
        "stagger": draw(st.booleans()),
        "may_return": draw(st.booleans()),
    }


def build(plan: LayerPlan, dtype: torch.dtype, generator: torch.Generator) -> SparseLinear:
    """Values from a handful of numbers, zeros of both signs among them: ties are the rule."""
    shape = (plan.rows * plan.block[0], plan.cols * plan.block[1])
    pattern = Pattern.with_units(shape, plan.units, plan.block, generator)
    layer = SparseLinear.from_pattern(pattern, plan.bias, generator=generator, dtype=dtype)
    few = torch.tensor([0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 3.0], dtype=dtype)
    with torch.no_grad():
        layer.values.copy_(few[torch.randint(len(few), layer.values.shape, generator=generator)])
    return layer


def expected(before: Snapshot, k: int, score: Tensor, dense: Tensor, method: Method) -> tuple[set[int], set[int]]:
    """(dropped, grown) by sorting: the lowest (score, unit), then of the candidates the highest (gradient, -unit)."""
    active = before.units.tolist()
    dropped = [unit for _, unit in sorted(zip(score.tolist(), active, strict=True))[:k]]
    (b_r, b_c), (rows, cols) = before.pattern.block, dense.shape
    by_unit = dense.abs().reshape(rows // b_r, b_r, cols // b_c, b_c).sum(dim=(1, 3)).flatten().tolist()
    out = set(active) - (set(dropped) if method.may_return else set())
    candidates = [unit for unit in range(len(by_unit)) if unit not in out]
    grown = sorted(candidates, key=lambda unit: (-by_unit[unit], unit))[:k]
    return set(dropped), set(grown)


@pytest.mark.timeout(280)
def test_thousands_of_rewires_keep_every_invariant():
    made: dict[str, int] = {}

    @settings(max_examples=15)
    @given(
        st.lists(layer_plans(), min_size=2, max_size=3),
        options(),
        st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16]),
        st.integers(1, 2),
        st.integers(0, 2**30),
    )
    def rewire(optimizer_name, kind, plans, options, dtype, micro_batches, draw):
        method = kind(**options)
        if optimizer_name == "Adafactor" and not all(plan.units for plan in plans):
            optimizer_name = "SGD"  # torch's Adafactor divides by the number of weights
        generator = torch.Generator().manual_seed(draw)
        layers = {f"layer{i}": build(plan, dtype, generator) for i, plan in enumerate(plans)}
        optimizer = OPTIMIZERS[optimizer_name]([p for layer in layers.values() for p in layer.parameters()])
        rewirer = Rewirer(layers, method, seed=draw).attach(optimizer, hook=False)
        for t in range(1, 14):
            dense = {}
            for name, layer in layers.items():
                shape = (micro_batches, layer.out_features, layer.in_features)
                parts = torch.randint(-2, 3, shape, generator=generator)
                parts[:, ::2] *= int(torch.randint(2, (1,), generator=generator))  # dead units, now and then
                if kind is RigL:
                    for part in parts:
                        push(layer, part)
                else:
                    layer.values.grad = torch.randn(layer.values.shape, generator=generator).to(dtype)
                dense[name] = parts.sum(dim=0)
            optimizer.step()
            before = {name: snapshot(layer, optimizer) for name, layer in layers.items()}
            scores = {name: unit_scores(layer) for name, layer in layers.items()}
            history = len(rewirer.history)
            rewirer.step()
            rewired = {record["layer"]: record for record in rewirer.history[history:]}
            for name, layer in layers.items():
                if name not in rewired:
                    check_nothing_changed(before[name], layer, optimizer)
                    continue
                gone, born = check_rewire(before[name], layer, optimizer)
                n = plans[int(name[-1])].rows * plans[int(name[-1])].cols
                k = min(math.floor(method.fraction(t / 20) * layer.num_units + 0.5), n - layer.num_units)
                dropped, grown = expected(before[name], k, scores[name], dense[name], method)
                if isinstance(method, RigL):
                    assert (set(gone), set(born)) == (dropped - grown, grown - dropped)
                else:
                    assert set(gone) <= dropped and len(gone) == len(born)
                    assert method.may_return or set(gone) == dropped
                assert rewired[name]["changed"] == len(born) and rewired[name]["num_units"] == layer.num_units
                key = f"{type(method).__name__} {optimizer_name}"
                made[key] = made.get(key, 0) + 1
            optimizer.zero_grad()
        assert rewirer.skipped == 0

    for optimizer_name in OPTIMIZERS:
        for kind in (SET, RigL):
            key = zlib.crc32(f"{optimizer_name} {kind}".encode())  # examples of its own for every pair
            (seed(key)(rewire) if settings().derandomize else rewire)(optimizer_name, kind)
    assert sum(made.values()) >= REWIRES, made
    assert len(made) == 2 * len(OPTIMIZERS), "every method with every optimizer"


def unit_scores(layer: SparseLinear) -> Tensor:
    """Mean magnitude of each unit."""
    values = layer.values.detach().abs()
    return values if values.dim() == 1 else values.mean(dim=(1, 2))
