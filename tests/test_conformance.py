"""Each method's choice of units against its paper's rule in plain Python, for fixed weights and gradients, with ties.

Weights and gradients are small whole numbers, so that many are equal.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

import plain_methods as plain
from rarefy import GMP, MEST, SET, Constant, GraNet, Method, Plan, RigL, SparseLinear, SRigL, sparsify
from rarefy.sampling import keyed_generator, sample_without_replacement
from rewires import engine, layer_of, push, step, units_of, values_of

CASES = range(300)


def case(
    seed: int, density: float | None = None
) -> tuple[random.Random, tuple[int, int], dict[int, float], list[float]]:
    """A random layer: its shape in units, weights, and the gradient of every unit."""
    draw = random.Random(seed)
    shape = draw.randint(1, 7), draw.randint(1, 9)
    n = shape[0] * shape[1]
    active = draw.sample(range(n), max(1, round((density or draw.uniform(0.05, 0.95)) * n)))
    weights = {unit: float(draw.randint(-3, 3)) for unit in active}
    return draw, shape, weights, [float(draw.randint(-4, 4)) for _ in range(n)]


def after(
    method: Method, shape: tuple[int, int], weights: dict[int, float], gradient: list[float], *, seed: int = 0
) -> tuple[set[int], SparseLinear]:
    """Units after one rewire of a layer with these weights and this gradient."""
    block = (1, 1) if seed % 3 else (4, 4)
    layer = layer_of(weights, shape, block)
    _, optimizer = engine(layer, method, seed=seed)
    push(layer, torch.tensor(gradient))
    step(optimizer)
    return set(units_of(layer)), layer


@pytest.mark.parametrize("seed", CASES)
def test_set(seed):
    draw, shape, weights, gradient = case(seed)
    fraction, n = draw.choice([0.0, 0.1, 0.3, 0.5, 1.0]), len(gradient)
    found, layer = after(SET(interval=1, end=1, fraction=Constant(fraction)), shape, weights, gradient, seed=seed)
    drop, k = plain.set_rule(weights, n, fraction)
    ranks = sample_without_replacement(n - len(weights), k, keyed_generator(seed, 1, "layer")).tolist()
    grown = plain.random_growth(set(weights), n, ranks)
    assert found == (set(weights) - drop) | grown
    assert values_of(layer) == {unit: 0.0 if unit in grown else weights[unit] for unit in found}


@pytest.mark.parametrize("seed", CASES)
@pytest.mark.parametrize("may_return", [False, True])
def test_rigl(seed, may_return):
    draw, shape, weights, gradient = case(seed)
    fraction = draw.choice([0.0, 0.1, 0.3, 0.5, 1.0])
    method = RigL(interval=1, end=1, fraction=Constant(fraction), may_return=may_return)
    found, layer = after(method, shape, weights, gradient, seed=seed)
    assert found == plain.rigl_rule(weights, gradient, fraction, may_return=may_return)
    assert values_of(layer) == {unit: weights.get(unit, 0.0) for unit in found}


@pytest.mark.parametrize("seed", CASES)
@pytest.mark.parametrize("growth", ["random", "gradient"])
def test_mest(seed, growth):
    draw, shape, weights, gradient = case(seed)
    fraction, n = draw.choice([0.1, 0.3, 0.5]), len(gradient)
    scale = draw.choice([0.0, 0.5, 1.0])
    method = MEST(interval=1, end=1, fraction=Constant(fraction), gradient_weight=scale, growth=growth)
    found, _ = after(method, shape, weights, gradient, seed=seed)
    k = plain.count(fraction, len(weights), n)
    drop = plain.mest_drop(weights, gradient, scale, k)
    if growth == "random":
        ranks = sample_without_replacement(n - len(weights), k, keyed_generator(seed, 1, "layer")).tolist()
        grown = plain.random_growth(set(weights), n, ranks)
    else:
        grown = plain.largest({u: abs(g) for u, g in enumerate(gradient) if u not in weights}, k)
    assert found == (set(weights) - drop) | grown


@pytest.mark.parametrize("seed", CASES)
@pytest.mark.parametrize("may_return", [False, True])
@pytest.mark.parametrize("ablate", [False, True])
def test_srigl(seed, may_return, ablate):
    draw, (rows, cols), _, gradient = case(seed)
    fan_in = draw.randint(1, cols)
    weights = {
        row * cols + col: float(draw.randint(-3, 3)) for row in range(rows) for col in draw.sample(range(cols), fan_in)
    }
    fraction, gamma = draw.choice([0.1, 0.3, 0.5]), draw.choice([0.0, 0.3, 0.6, 0.95])
    method = SRigL(
        interval=1,
        end=1,
        fraction=Constant(fraction),
        gamma=gamma,
        may_return=may_return,
        ablate=("*",) if ablate else False,
    )
    found, _ = after(method, (rows, cols), weights, gradient, seed=seed)
    assert found == plain.srigl_rule(
        weights, gradient, (rows, cols), fan_in * rows, fraction, gamma, ablate=ablate, may_return=may_return
    )


def network(draw: random.Random, density: float) -> tuple[nn.Sequential, list[tuple[int, int]]]:
    """Two to four layers side by side, which share nothing but the budget."""
    shapes = [(draw.randint(2, 6), draw.randint(2, 7)) for _ in range(draw.randint(2, 4))]
    return nn.Sequential(*(nn.Linear(cols, rows, bias=False) for rows, cols in shapes)), shapes


@pytest.mark.parametrize("seed", CASES)
@pytest.mark.parametrize("name", ["GMP", "GraNet"])
def test_gradual_pruning_by_one_threshold(seed, name):
    """Over a whole schedule: the units of the largest magnitudes over all layers; GraNet then swaps within layers."""
    draw = random.Random(seed)
    start, stop = draw.choice([1.0, 0.8, 0.5]), draw.choice([0.3, 0.2])
    model, shapes = network(draw, start)
    end, fraction = 3, 0.4
    method = (
        GMP(start=start, interval=1, end=end, scope="global")
        if name == "GMP"
        else GraNet(start=start, interval=1, end=end, fraction=Constant(fraction), stagger=False)
    )
    rewirer = sparsify(model, Plan(density=stop, method=method, seed=seed))
    layers = list(rewirer.layers.values())
    state: list[dict[int, float]] = []
    for layer in layers:
        with torch.no_grad():
            layer.values.copy_(torch.tensor([float(draw.randint(-3, 3)) for _ in range(layer.num_units)]))
        state.append(values_of(layer))
    size = sum(rows * cols for rows, cols in shapes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    rewirer.attach(optimizer)
    for t in range(1, end + 1):
        gradients = [[float(draw.randint(-4, 4)) for _ in range(rows * cols)] for rows, cols in shapes]
        for layer, gradient in zip(layers, gradients, strict=True):
            push(layer, torch.tensor(gradient))
        step(optimizer)
        total = max(round(plain.cubic(start, stop, t / end) * size), len(layers))
        before = [set(weights) for weights in state]
        kept = plain.globally_kept(state, min(total, sum(map(len, state))))
        for at, (weights, gradient) in enumerate(zip(state, gradients, strict=True)):
            state[at] = {unit: weights[unit] for unit in kept[at]}
            if name == "GraNet":
                # Units that were there before the pruning may not come back at once.
                room = len(gradient) - len(before[at])
                k = min(plain.count(fraction, len(kept[at]), len(gradient)), room)
                drop = plain.smallest({u: abs(w) for u, w in state[at].items()}, k)
                grown = plain.largest({u: abs(g) for u, g in enumerate(gradient) if u not in before[at]}, k)
                state[at] = {unit: state[at].get(unit, 0.0) for unit in (kept[at] - drop) | grown}
        assert [values_of(layer) for layer in layers] == [dict(sorted(weights.items())) for weights in state], t
