"""The rules of docs/rewiring.md, one by one: the number of each is in its test's name.

Those of several ranks (6.4, 8.2, 8.3) are in test_ranks.py too, those of files (9.1, 9.2) with the files' own tests.
"""

from __future__ import annotations

import copy
import gc
import math
import re
import subprocess
import sys
import warnings
import weakref
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import rarefy
from rarefy import SET, Constant, Cosine, Linear, Pattern, Plan, Rewirer, RigL, SparseLinear, sparsify
from rarefy.growth import exact
from rarefy.init import magnitude_pattern
from rarefy.ops import sink as sinks
from rarefy.selection import highest, lowest, num_to_replace
from rewires import (
    OPTIMIZERS,
    Hoard,
    bits,
    check_index,
    check_nothing_changed,
    check_rewire,
    engine,
    layer_of,
    push,
    snapshot,
    state_tensors,
    step,
    units_of,
    values_of,
)

EIGHT = torch.tensor([5.0, 1, 2, 3, 4, 6, 7, 8])


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between: "0", "2", "4" ..."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


# -- 2. Counts are exact --


@pytest.mark.parametrize("distribution", ["uniform", "er", "erk"])
@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("density", [0.01, 0.137, 0.5, 1.0])
def test_rule_2_1_layers_sum_to_the_rounded_budget(distribution, block, density):
    model = mlp(12, 100, 52, 4, 20)
    plan = Plan(density=density, distribution=distribution, block=block)
    rewirer = sparsify(model, plan)
    n = sum(layer.out_features * layer.in_features // block**2 for layer in rewirer.layers.values())
    assert sum(layer.num_units for layer in rewirer.layers.values()) == round(density * n)


def test_rule_2_1_layers_left_dense_are_outside_the_budget():
    model = mlp(12, 100, 52, 4)
    rewirer = sparsify(model, Plan(density=0.1, keep_dense=("2",)))
    assert list(rewirer.layers) == ["0", "4"]
    assert sum(layer.num_units for layer in rewirer.layers.values()) == round(0.1 * (12 * 100 + 52 * 4))
    assert rewirer.left_dense == {"2": "kept dense as asked (keep_dense '2')"}


@pytest.mark.parametrize("method", [SET, RigL])
def test_rule_2_3_a_rewire_keeps_every_layers_count(method):
    model = mlp(10, 30, 20, 5)
    rewirer = sparsify(model, Plan(density=0.2, distribution="erk", method=method(interval=1, fraction=Constant(0.7))))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rewirer.attach(optimizer, total_steps=20)
    counts = {name: layer.num_units for name, layer in rewirer.layers.items()}
    for _ in range(10):
        model(torch.randn(4, 10)).pow(2).mean().backward()
        step(optimizer)
        assert {name: layer.num_units for name, layer in rewirer.layers.items()} == counts
        assert all(layer.pattern.num_units == counts[name] for name, layer in rewirer.layers.items())
    assert len(rewirer.history) >= 20


def test_rule_2_4_erk_counts_the_kernel():
    found = rarefy.erk({"conv": (8, 4, 3, 3), "linear": (20, 30)}, 0.1)
    assert found["conv"] / found["linear"] == pytest.approx((18 / 288) / (50 / 600))


# -- 3. First pattern and first values --


def test_rule_3_1_random_leaves_no_row_empty_when_there_are_enough():
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        counts = torch.diff(Pattern.with_units((40, 5), 40, generator=generator).crow_indices)
        assert counts.tolist() == [1] * 40
        some = Pattern.with_units((40, 50), 60, generator=generator)
        assert some.num_units == 60 and int(torch.diff(some.crow_indices).min()) == 1
    assert int(torch.diff(Pattern.with_units((40, 5), 39).crow_indices).min()) == 0, "fewer units than rows: no repair"


def test_rule_3_1_each_init_is_what_it_says():
    for init in ("random", "balanced", "magnitude"):
        torch.manual_seed(0)
        linear = nn.Linear(20, 30)
        weight = linear.weight.detach().clone()
        rewirer = sparsify(nn.Sequential(linear), Plan(density=0.25, init=init, rescale=False, seed=4))
        pattern = rewirer.layers["0"].pattern
        assert pattern.num_units == 150
        if init == "magnitude":
            assert pattern == magnitude_pattern(weight, 150)
        else:
            by_row = torch.diff(pattern.crow_indices)
            assert (int(by_row.max() - by_row.min()) <= 1) == (init == "balanced")


def test_rule_3_1_first_patterns_follow_the_plans_seed_and_the_layers_name():
    def patterns(seed: int) -> list[Pattern]:
        torch.manual_seed(99 + seed)
        rewirer = sparsify(mlp(16, 16, 16), Plan(density=0.2, seed=seed))
        return [layer.pattern for layer in rewirer.layers.values()]

    assert patterns(0) == patterns(0)
    assert patterns(0) != patterns(1)
    assert patterns(0)[0] != patterns(0)[1], "two layers of one shape have patterns of their own"


@pytest.mark.parametrize("block", [1, 4])
def test_rule_3_2_kept_values_are_scaled_by_their_rows_density(block):
    model = mlp(16, 24, 8)
    weights = {name: m.weight.detach().clone() for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    biases = {name: m.bias.detach().clone() for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    rewirer = sparsify(model, Plan(density=0.4, block=block))
    for name, layer in rewirer.layers.items():
        mask = layer.pattern.to_mask()
        scale = mask.float().mean(dim=1, keepdim=True).clamp(min=1e-9).rsqrt()
        torch.testing.assert_close(layer.dense_weight(), weights[name] * mask * scale)
        assert layer.bias is not None and torch.equal(layer.bias, biases[name])


def test_rule_3_2_trained_weights_are_not_scaled():
    linear = nn.Linear(16, 24)
    model = nn.Sequential(linear, nn.ReLU())
    weight = linear.weight.detach().clone()
    layer = sparsify(model, Plan(density=0.4, rescale=False)).layers["0"]
    assert torch.equal(layer.dense_weight(), weight * layer.pattern.to_mask())
    dense = nn.Linear(16, 24)
    kept = SparseLinear.from_dense(dense, density=0.3)
    assert torch.equal(kept.dense_weight(), dense.weight.detach() * kept.pattern.to_mask())


def test_rule_3_2_a_sparse_module_is_adopted_unchanged():
    mine = SparseLinear(16, 24, density=0.123)
    model = nn.Sequential(nn.Linear(8, 16), mine)
    values, pattern = mine.values.detach().clone(), mine.pattern
    rewirer = sparsify(model, Plan(density=0.5))
    assert rewirer.layers["1"] is mine is model[1]
    assert torch.equal(mine.values, values) and mine.pattern == pattern
    assert rewirer.layers["0"].num_units == 64, "what is adopted is outside the budget"


# -- 4. When --


def scaled_run(optimizer_name: str) -> tuple[Rewirer, nn.Sequential, list[int]]:
    """Six steps under a CPU GradScaler; at the third and fifth the gradient is infinite. Returns t after each."""
    model = mlp(8, 12)
    model = nn.Sequential(model[0], nn.ReLU())
    rewirer = sparsify(model, Plan(density=0.5, method=RigL(interval=1, fraction=Constant(0.5), end=100)))
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    rewirer.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    counted = []
    for at in range(6):
        optimizer.zero_grad()
        loss = model(torch.randn(4, 8)).pow(2).mean() * (math.inf if at in (2, 4) else 1)
        scaler.scale(loss).backward()
        before = snapshot(rewirer.layers["0"], optimizer)
        t = rewirer.t
        scaler.step(optimizer)
        scaler.update()
        if rewirer.t == t:
            assert rewirer.layers["0"].pattern == before.pattern
        counted.append(rewirer.t)
    return rewirer, model, counted


@pytest.mark.parametrize("optimizer_name", ["AdamW", "AdamW-fused", "SGD", "rarefy.AdamW"])
def test_rule_4_1_steps_that_amp_skipped_do_not_count(optimizer_name):
    rewirer, _, counted = scaled_run(optimizer_name)
    assert counted == [1, 2, 2, 3, 3, 4]
    assert [record["step"] for record in rewirer.history] == [1, 2, 3, 4]
    assert rewirer.skipped == 0, "what a step left behind that was never applied is forgotten"


def test_rule_4_1_micro_batches_do_not_count():
    layer = layer_of({0: 1.0, 3: 2.0}, (2, 4))
    rewirer, optimizer = engine(layer, RigL(interval=1, end=9))
    for _ in range(3):
        for _ in range(4):
            push(layer, EIGHT)
        step(optimizer)
    assert rewirer.t == 3


def test_rule_4_1_a_step_that_calls_its_base_class_counts_once():
    """Torch wraps every class's step when it is first used, and runs the hooks in each."""

    class Base(torch.optim.SGD):
        def step(self, closure=None):  # type: ignore[override]
            return super().step(closure)

    class Derived(Base):
        def step(self, closure=None):  # type: ignore[override]
            return super().step(closure)

    layer = layer_of({0: 1.0, 3: 2.0}, (2, 4))
    for kind in (torch.optim.SGD, Base, Derived):
        rewirer, optimizer = engine(layer, SET(interval=1, end=9), lambda p, kind=kind: kind(p, lr=0.0))
        for t in range(1, 4):
            optimizer.step()
            assert rewirer.t == t
        rewirer.detach()
    rewirer, optimizer = engine(layer, SET(interval=1, end=9))
    with pytest.raises(TypeError):
        optimizer.step("no closure")  # type: ignore[arg-type]
    optimizer.step()
    assert rewirer.t == 1, "a step that raised is forgotten"


@pytest.mark.parametrize("num_layers", [1, 3, 7])
@pytest.mark.parametrize("interval", [1, 5, 10])
@pytest.mark.parametrize("begin, end", [(0, 40), (3, 33), (12, 12)])
@pytest.mark.parametrize("stagger", [True, False])
def test_rule_4_2_due_steps(num_layers, interval, begin, end, stagger):
    layers = {str(i): layer_of({0: 1.0, 3: 2.0}, (2, 4)) for i in range(num_layers)}
    method = SET(interval=interval, begin=begin, end=end, stagger=stagger, fraction=Constant(0.5))
    rewirer, optimizer = engine(layers, method)
    for _ in range(50):
        optimizer.step()
    for i, name in enumerate(layers):
        offset = i * interval // num_layers if stagger else 0
        wanted = [t for t in range(1, 51) if begin <= t <= end and (t - begin - offset) % interval == 0]
        assert [record["step"] for record in rewirer.history if record["layer"] == name] == wanted


def test_rule_4_2_staggered_layers_take_turns():
    layers = {str(i): layer_of({0: 1.0, 3: 2.0}, (2, 4)) for i in range(5)}
    rewirer, _ = engine(layers, SET(interval=10, end=100))
    assert [rewirer.due(t) for t in range(10, 20)] == [["0"], [], ["1"], [], ["2"], [], ["3"], [], ["4"], []]
    assert rewirer.due(0) == []


def test_rule_4_2_frozen_layers_have_no_turn():
    layers = {str(i): layer_of({0: 1.0, 3: 2.0}, (2, 4)) for i in range(2)}
    layers["1"].values.requires_grad_(False)
    rewirer, optimizer = engine(layers, SET(interval=1, end=100, stagger=False, fraction=Constant(0.5)))
    optimizer.step()
    assert [record["layer"] for record in rewirer.history] == ["0"]


def test_rule_4_3_ends_at_three_quarters_of_the_run():
    layer = layer_of({0: 1.0, 3: 2.0}, (2, 4))
    rewirer, optimizer = engine(layer, SET(interval=1, fraction=Constant(0.5)), total_steps=20)
    for _ in range(20):
        optimizer.step()
    assert rewirer.end == 15 and [record["step"] for record in rewirer.history] == list(range(1, 16))
    with pytest.raises(ValueError, match="needs total_steps= to know when to stop rewiring"):
        engine(layer_of({0: 1.0}, (2, 4)), SET())


@pytest.mark.parametrize("schedule", [Cosine(0.8), Linear(0.9, 0.1), Constant(0.3)])
def test_rule_4_3_the_fraction_follows_progress_from_begin_to_end(schedule):
    """Relative to begin and end, not to step 0 or to the run's length."""
    method = SET(interval=1, begin=10, end=30, fraction=schedule)
    layer = SparseLinear(20, 10, density=0.5)
    rewirer, optimizer = engine(layer, method, total_steps=1000)
    for _ in range(35):
        optimizer.step()
    wanted = {t: math.floor(schedule((t - 10) / 20) * 100 + 0.5) for t in range(10, 31)}
    assert {r["step"]: r["changed"] for r in rewirer.history} == {t: k for t, k in wanted.items() if k}


# -- 5. Drop --


@pytest.mark.parametrize(
    "fraction, active, total, k",
    [
        (0.0, 10, 100, 0),
        (0.04, 10, 100, 0),
        (0.05, 10, 100, 1),  # .5 rounds up
        (0.25, 10, 100, 3),  # 2.5 rounds up, where round() would give 2
        (0.3, 10, 100, 3),
        (1.0, 10, 100, 10),
        (1.0, 60, 100, 40),
        (0.5, 90, 100, 10),
        (0.5, 100, 100, 0),
        (0.5, 0, 100, 0),
    ],
)
def test_rule_5_1_as_many_dropped_as_grown(fraction, active, total, k):
    assert num_to_replace(fraction, active, total) == k


@pytest.mark.parametrize("active, dropped", [(4, 2), (6, 2), (7, 1), (8, 0)])
def test_rule_5_1_in_the_engine(active, dropped):
    layer = layer_of({unit: 1.0 + unit for unit in range(active)}, (2, 4))
    rewirer, optimizer = engine(layer, RigL(interval=1, end=1, fraction=Constant(0.5)))
    before = snapshot(layer, optimizer)
    push(layer, EIGHT)
    optimizer.step()
    if not dropped:
        assert rewirer.history == [] and layer.pattern == before.pattern
        return
    gone, born = check_rewire(before, layer, optimizer)
    assert (gone, len(born)) == (list(range(dropped)), dropped)


def test_rule_5_2_the_smallest_mean_magnitude_goes():
    """Over its entries: 0 sums to nothing, 1 has the smallest one, 2 the smallest largest; 3 has the smallest mean."""
    layer = layer_of({0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}, (2, 4), (2, 2))
    with torch.no_grad():
        layer.values[0] = torch.tensor([[2.0, -2.0], [2.0, -2.0]])
        layer.values[1] = torch.tensor([[-4.0, 0.0], [-4.0, 0.0]])
        layer.values[2] = torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
        layer.values[3] = torch.tensor([[0.5, 0.25], [-2.0, 0.25]])
    _, optimizer = engine(layer, SET(interval=1, end=1, fraction=Constant(0.25)))
    before = snapshot(layer, optimizer)
    optimizer.step()
    assert check_rewire(before, layer, optimizer)[0] == [3]


def test_rule_5_2_ties_drop_the_lower_unit_first():
    layer = layer_of({1: -2.0, 2: 2.0, 4: 2.0, 6: -2.0, 7: 1.0}, (2, 5))
    _, optimizer = engine(layer, SET(interval=1, end=1, fraction=Constant(0.6)))
    before = snapshot(layer, optimizer)
    optimizer.step()
    assert check_rewire(before, layer, optimizer)[0] == [1, 2, 7]


@pytest.mark.parametrize("k", range(7))
def test_rule_5_2_ties_of_a_selection(k):
    score = torch.tensor([2.0, 1, 1, 0, 1, 2])
    assert lowest(score, k).tolist() == sorted([3, 1, 2, 4, 0, 5][:k])
    units = torch.tensor([30, 10, 11, 5, 12, 3])
    assert highest(score, units, k).tolist() == sorted([3, 30, 10, 11, 12, 5][:k])


def test_rule_5_2_scores_come_after_the_optimizers_step():
    """Before the step unit 0 is the smallest; the step makes it 1 - (-3) = 4 and unit 5 becomes 2 - 1 = 1."""
    layer = layer_of({0: 1.0, 5: 2.0}, (2, 4))
    _, optimizer = engine(layer, SET(interval=1, end=1, fraction=Constant(0.5)), lambda p: torch.optim.SGD(p, lr=1.0))
    push(layer, torch.tensor([-3.0, 0, 0, 0, 0, 1, 0, 0]))
    optimizer.step()
    assert values_of(layer)[0] == 4.0 and 5 not in units_of(layer)


def test_rule_5_3_an_exact_zero_competes_like_any_other():
    """Zeros go first, but k is not stretched to take all of them, nor do they count as absent."""
    layer = layer_of({0: 0.0, 2: -0.0, 3: 0.0, 5: 1.0}, (2, 4))
    _, optimizer = engine(layer, RigL(interval=1, end=1, fraction=Constant(0.5)))
    before = snapshot(layer, optimizer)
    push(layer, torch.tensor([9.0, 1, 9, 9, 2, 9, 3, 4]))
    optimizer.step()
    assert check_rewire(before, layer, optimizer) == ([0, 2], [6, 7])


# -- 6. Grow --


def test_rule_6_1_just_dropped_units_are_no_candidates():
    for _ in range(20):
        layer = layer_of({0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0}, (2, 4))
        _, optimizer = engine(layer, SET(interval=1, end=1, fraction=Constant(1.0)))
        optimizer.step()
        assert units_of(layer) == [4, 5, 6, 7]


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_rule_6_1_one_that_returns_never_left(micro_batches):
    """Dropped 0 and 1; 1 has the best gradient of all and comes back with its value and state, 7 is new."""
    layer = layer_of({0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0}, (2, 4))
    method = RigL(interval=2, end=2, fraction=Constant(0.5), may_return=True)
    _, optimizer = engine(layer, method, OPTIMIZERS["SGD"])
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for _ in (1, 2):
        for _ in range(micro_batches):
            push(layer, torch.tensor([1.0, 9, 0, 0, 2, 3, 4, 5]))
        step(optimizer)
    momentum = optimizer.state[layer.values]["momentum_buffer"]
    assert units_of(layer) == [1, 2, 3, 7]
    assert values_of(layer) == {1: 2.0, 2: 3.0, 3: 4.0, 7: 0.0}
    assert float(momentum[0]) > 0 and float(momentum[3]) == 0.0, "the state of 1 is still there, that of 7 is new"


@pytest.mark.parametrize("may_return", [False, True])
def test_rule_6_1_random_growth_may_return_or_not(may_return):
    returned = 0
    for seed in range(60):
        layer = layer_of({0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0}, (2, 4))
        method = SET(interval=1, end=1, fraction=Constant(0.5), may_return=may_return)
        rewirer, optimizer = engine(layer, method, seed=seed)
        before = snapshot(layer, optimizer)
        optimizer.step()
        if rewirer.history[0]["changed"]:
            gone, _ = check_rewire(before, layer, optimizer)
            assert set(gone) <= {0, 1}
        returned += len({0, 1} & set(units_of(layer)))
    assert (returned > 0) == may_return  # of 120 dropped, a third come back: 2 of 6 candidates are drawn


def test_rule_6_2_the_absolute_value_is_taken_last():
    """Unit 4's two gradients cancel; unit 6's add up. Local |g| averaged would prefer 4."""
    layer = layer_of({0: 1.0, 1: 2.0}, (2, 4))
    _, optimizer = engine(layer, RigL(interval=1, end=1, fraction=Constant(0.5)))
    push(layer, torch.tensor([0.0, 0, 0, 0, 10, 0, 1, 0]))
    push(layer, torch.tensor([0.0, 0, 0, 0, -10, 0, 1, 0]))
    optimizer.step()
    assert units_of(layer) == [1, 6]


def test_rule_6_2_the_score_of_a_block_is_its_mean_magnitude():
    """Entries of both signs do not cancel inside a unit, and one large entry does not beat four middling ones."""
    layer = layer_of({0: 1.0, 1: 2.0}, (2, 2), (2, 2))
    gradient = torch.zeros(4, 4)
    gradient[2:, :2] = torch.tensor([[3.0, -3.0], [-3.0, 3.0]])
    gradient[2, 2] = 8.0
    for micro_batches in (1, 2):
        layer = layer_of({0: 1.0, 1: 2.0}, (2, 2), (2, 2))
        _, optimizer = engine(layer, RigL(interval=2, end=2, fraction=Constant(0.5)))
        for _ in (1, 2):
            for _ in range(micro_batches):
                push(layer, gradient)
            step(optimizer)
        assert units_of(layer) == [1, 2]


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_rule_6_2_ties_grow_the_lower_unit_first(micro_batches):
    """Dead units make many zeros: with no gradient at all the lowest absent units come."""
    for gradient, wanted in ((torch.zeros(12), [0, 1, 3]), (torch.tensor([0.0] * 6 + [7] * 6), [6, 8, 9])):
        layer = layer_of({2: 1.0, 4: 2.0, 5: 3.0, 7: 4.0}, (3, 4))
        _, optimizer = engine(layer, RigL(interval=2, end=2, fraction=Constant(0.75)))
        for _ in (1, 2):
            for _ in range(micro_batches):
                push(layer, gradient)
            before = snapshot(layer, optimizer)
            step(optimizer)
        assert check_rewire(before, layer, optimizer)[1] == wanted


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_rule_6_2_clipping_does_not_change_growth(micro_batches):
    """Nor does whatever else happens to .grad between backward and step."""
    chosen = []
    for clip in (False, True):
        layer = layer_of({0: 1.0, 1: 2.0, 2: 3.0}, (2, 4))
        _, optimizer = engine(layer, RigL(interval=2, end=2, fraction=Constant(0.67)))
        for _ in (1, 2):
            for _ in range(micro_batches):
                push(layer, EIGHT)
            if clip:
                nn.utils.clip_grad_norm_(layer.parameters(), 1e-3)
                assert layer.values.grad is not None
                layer.values.grad.neg_()
            step(optimizer)
        chosen.append(units_of(layer))
    assert chosen[0] == chosen[1] == [2, 6, 7]


def test_rule_6_2_the_gradient_is_exact_under_autocast():
    """bf16 products are summed in fp32: 256 + 1 and 256 differ, though bf16 cannot tell them apart."""
    for micro_batches in (1, 2):
        layer = layer_of({0: 1.0, 1: 2.0}, (2, 4))
        _, optimizer = engine(layer, RigL(interval=2, end=2, fraction=Constant(0.5)))
        for _ in (1, 2):
            for _ in range(micro_batches):
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    y = layer(torch.tensor([[0.0, 0, 16, 16], [0, 0, 0, 1]]))
                y.backward(torch.tensor([[0.0, 16], [0, 1]], dtype=torch.bfloat16))
            step(optimizer)
        assert units_of(layer) == [1, 7]


def test_rule_6_3_one_micro_batch_keeps_no_dense_gradient(monkeypatch):
    """From the second step on, when it is known that a step is one backward."""
    made: list[str] = []
    for kind in (exact.BestUnits, exact.DenseGradient):
        add = kind.add
        monkeypatch.setattr(
            kind, "add", lambda self, *given, add=add, kind=kind: (made.append(kind.__name__), add(self, *given))[1]
        )
    layer = SparseLinear(16, 16, density=0.2)
    _, optimizer = engine(layer, RigL(interval=1, end=9))
    for _ in range(4):
        layer(torch.randn(3, 16)).sum().backward()
        step(optimizer)
    assert made == ["DenseGradient", "BestUnits", "BestUnits", "BestUnits"]


PEAK = """
import resource, torch
from rarefy import Constant, Rewirer, RigL, SparseLinear
side = 4000
layer = SparseLinear(side, side, density=0.005)
optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
rewirer = Rewirer({"layer": layer}, RigL(interval=2, end=9, fraction=Constant(0.3))).attach(optimizer)
peaks = []
for t in range(3):
    layer(torch.randn(4, side)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
assert [record["step"] for record in rewirer.history] == [2]
print(peaks[1] - peaks[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux reports it")
def test_rule_6_3_extra_memory_is_measured():
    """A step that rewires peaks above one that does not by far less than the 64 MB of a dense gradient."""
    found = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, timeout=200)
    assert int(found.stdout) < 4000 * 4000 * 4 / 4


def test_rule_6_4_several_micro_batches_choose_by_their_mean():
    """Each would choose another unit; together they choose as the whole batch does."""
    parts = torch.randn(4, 10, 12)
    whole, split = ([], [])
    for batches, chosen in ((parts.flatten(0, 1)[None], whole), (parts, split)):
        torch.manual_seed(5)
        layer = SparseLinear(12, 20, density=0.3)
        target = torch.randn(20, 12)
        method = RigL(interval=1, end=9, fraction=Constant(0.3))
        rewirer, optimizer = engine(layer, method, lambda p: torch.optim.SGD(p, lr=2.0, momentum=0.5))
        for _ in range(5):
            for x in batches:
                loss = (layer(x) - x @ target.T).pow(2).mean() / len(batches)
                loss.backward()
            step(optimizer)
            chosen.append(layer.pattern)
        assert len(rewirer.history) == 5 and rewirer.skipped == 0
    assert whole == split and len(set(whole)) == 5


def test_rule_6_4_a_layer_used_twice_counts_both_uses():
    """Two uses in one forward sum to one gradient, as they do in .grad."""
    layer = layer_of({0: 1.0, 1: 2.0}, (2, 2))
    dense = layer.to_dense()
    _, optimizer = engine(layer, RigL(interval=1, end=9, fraction=Constant(0.5)))
    for module in (layer, dense):
        x = torch.tensor([[3.0, -1.0]])
        (module(module(x)) * torch.tensor([[2.0, -5.0]])).sum().backward()
    assert dense.weight.grad is not None
    absent = dense.weight.grad.flatten()[2:].abs()
    before = snapshot(layer, optimizer)
    optimizer.step()
    assert check_rewire(before, layer, optimizer) == ([0], [2 + int(absent.argmax())])


def test_rule_6_4_an_unforeseen_second_use_leaves_the_rewire_out():
    """What single calls kept cannot be combined; it is said, counted, and the next time accumulated."""
    layer = layer_of({0: 1.0, 1: 2.0}, (2, 4))
    rewirer, optimizer = engine(layer, RigL(interval=2, end=9, fraction=Constant(0.5)))
    for t in range(1, 7):
        for _ in range(1 if t == 1 else 2):
            push(layer, EIGHT)
        if t == 2:
            with pytest.warns(UserWarning, match="layer was used 2 times in this step, after once in the one before"):
                step(optimizer)
        else:
            step(optimizer)
    assert rewirer.skipped == 1 and [record["step"] for record in rewirer.history] == [4, 6]


def test_rule_6_4_only_due_layers_accumulate_and_only_for_this_step():
    layers = {name: SparseLinear(8, 8, density=0.3) for name in "ab"}
    rewirer, optimizer = engine(layers, RigL(interval=4, end=20))
    for t in range(1, 9):
        due = rewirer.due(t)
        assert [name for name, layer in layers.items() if int(layer.sink[0])] == due
        for _ in range(2):
            sum(layer(torch.randn(3, 8)).sum() for layer in layers.values()).backward()  # type: ignore[union-attr]
        assert list(rewirer._collectors) == due
        held = [weakref.ref(collector) for collector in rewirer._collectors.values()]
        step(optimizer)
        gc.collect()
        assert all(ref() is None for ref in held)


def test_rule_6_4_the_plan_states_the_bytes():
    model = mlp(10, 30, 20, 5)
    sizes = sorted((300, 600, 100), reverse=True)
    for method, entries in (
        (RigL(), sizes[0]),
        (RigL(interval=2), sum(sizes[:2])),
        (RigL(stagger=False), sum(sizes)),
        (SET(), 0),
    ):
        explanation = Plan(density=0.5, method=method).explain(model)
        assert explanation.growth_bytes == 4 * entries == explanation.to_json()["totals"]["growth_bytes"]
        assert (f"{4 * entries:,} bytes" in str(explanation)) == bool(entries)


def test_rule_6_5_random_growth_depends_on_seed_step_and_name_alone():
    def chosen(seed: int, name: str, at: int, noise: int) -> list[int]:
        torch.manual_seed(noise)
        layer = layer_of({unit: 1.0 + unit for unit in range(30)}, (10, 10))
        method = SET(interval=1, begin=at, end=at, fraction=Constant(0.5))
        _, optimizer = engine({name: layer}, method, seed=seed)
        for _ in range(at):
            optimizer.step()
        return units_of(layer)

    assert chosen(0, "a", 1, 1) == chosen(0, "a", 1, 2)
    state = torch.get_rng_state()
    different = [chosen(0, "a", 1, 1), chosen(1, "a", 1, 1), chosen(0, "b", 1, 1), chosen(0, "a", 2, 1)]
    torch.set_rng_state(state)
    assert len({tuple(units) for units in different}) == 4


def test_rule_6_5_the_global_generator_is_left_alone():
    layer = layer_of({unit: 1.0 + unit for unit in range(30)}, (10, 10))
    _, optimizer = engine(layer, SET(interval=1, end=3, fraction=Constant(0.5)))
    state = torch.get_rng_state()
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", [SET, RigL])
@pytest.mark.parametrize("may_return", [False, True])
def test_rule_6_6_fewer_candidates_make_k_smaller(method, may_return):
    """Seven of eight units active: half of them is 4, but one place is free, so one goes and one comes."""
    layer = layer_of({unit: 1.0 + unit for unit in range(7)}, (2, 4))
    _, optimizer = engine(layer, method(interval=1, end=1, fraction=Constant(0.5), may_return=may_return))
    before = snapshot(layer, optimizer)
    push(layer, torch.tensor([0.0] * 7 + [5]))
    optimizer.step()
    if units_of(layer) == list(range(7)):  # SET may draw the one that it dropped
        assert may_return and method is SET
    else:
        assert check_rewire(before, layer, optimizer) == ([0], [7])


def test_rule_6_7_other_steps_pay_nothing(monkeypatch):
    """No collector, no scan: growth is asked for at the steps that rewire, and by the layers that do."""
    asked: list[int] = []
    for kind in (exact.BestUnits, exact.DenseGradient):
        monkeypatch.setattr(kind, "add", lambda self, *given, add=kind.add: (asked.append(t), add(self, *given))[1])
    layer = SparseLinear(16, 16, density=0.2)
    _, optimizer = engine(layer, RigL(interval=5, end=10, fraction=Constant(0.3)))
    others = len(sinks._collectors)
    for t in range(1, 16):
        assert bool(int(layer.sink[0])) == (t in (5, 10))
        layer(torch.randn(3, 16)).sum().backward()
        step(optimizer)
    assert asked == [5, 10] and len(sinks._collectors) <= others


def test_rule_6_7_random_growth_never_looks_at_gradients():
    layer = SparseLinear(16, 16, density=0.2)
    _, optimizer = engine(layer, SET(interval=1, end=10))
    for _ in range(3):
        assert int(layer.sink[0]) == 0
        layer(torch.randn(3, 16)).sum().backward()
        step(optimizer)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_rule_6_an_armed_step_without_gradient_rewires_nothing(micro_batches):
    """The layer took no part: its optimizer did not move it, and the next step starts clean."""
    layers = {name: layer_of({0: 1.0, 1: 2.0}, (2, 4)) for name in "ab"}
    rewirer, optimizer = engine(layers, RigL(interval=1, end=9, fraction=Constant(0.5), stagger=False))
    for t in range(1, 5):
        for name, layer in layers.items():
            if (name, t) != ("a", 3):
                for _ in range(micro_batches):
                    push(layer, EIGHT if t != 2 else -EIGHT.flip(0))
        step(optimizer)
    rewired = [(record["step"], record["layer"]) for record in rewirer.history]
    assert rewired == [(1, "a"), (1, "b"), (2, "a"), (2, "b"), (3, "b"), (4, "a"), (4, "b")]


# -- 7. What survives --


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("block", [(1, 1), (4, 4)], ids=str)
@pytest.mark.parametrize("method", [SET, RigL])
@pytest.mark.parametrize("may_return", [False, True])
def test_rule_7_1_survivors_move_bitwise_with_all_their_state(name, block, method, may_return):
    layer = SparseLinear(40, 24, density=0.4, block=block)
    options = {"interval": 1, "end": 9, "fraction": Constant(0.4), "may_return": may_return}
    rewirer, optimizer = engine(layer, method(**options), OPTIMIZERS[name], hook=False)
    for _ in range(4):
        layer(torch.randn(6, 40)).pow(2).mean().backward()
        optimizer.step()
        before = snapshot(layer, optimizer)
        rewirer.step()
        gone, born = check_rewire(before, layer, optimizer)
        assert len(gone) == len(born) > 0 or may_return
        optimizer.zero_grad()
    assert len(before.rows) > 1 or name == "SGD"


def test_rule_7_2_newborns_start_from_nothing():
    """In place of a dropped unit's moments, a newborn has none."""
    layer = layer_of({0: 1e-3, 1: 2.0, 2: 3.0}, (2, 4))
    _, optimizer = engine(
        layer, RigL(interval=3, end=3, fraction=Constant(0.3)), lambda p: torch.optim.AdamW(p, lr=0.0)
    )
    for _ in range(3):
        push(layer, EIGHT)
        step(optimizer)
    assert units_of(layer) == [1, 2, 7]
    state = optimizer.state[layer.values]
    assert values_of(layer)[7] == 0.0
    assert state["exp_avg"].tolist()[2] == state["exp_avg_sq"].tolist()[2] == 0.0
    assert all(value > 0 for value in state["exp_avg"].tolist()[:2])


def test_rule_7_2_adamw_gives_newborns_an_age():
    layer = layer_of({0: 1e-3, 1: 2.0, 2: 3.0}, (2, 4))
    _, optimizer = engine(layer, RigL(interval=3, end=3, fraction=Constant(0.3)), lambda p: rarefy.AdamW(p, lr=0.0))
    for _ in range(4):
        push(layer, EIGHT)
        step(optimizer)
    assert optimizer.state[layer.values]["age"].tolist() == [4, 4, 1]


def test_rule_7_3_an_optimizer_nobody_has_seen_is_carried():
    """State of many shapes and depths: everything with a row a unit moves, everything else stays."""
    layer = SparseLinear(40, 24, density=0.3, block=2)
    rewirer, optimizer = engine(layer, SET(interval=1, end=9, fraction=Constant(0.5)), Hoard, hook=False)
    for _ in range(3):
        layer(torch.randn(6, 40)).pow(2).mean().backward()
        optimizer.step()
        before = snapshot(layer, optimizer)
        rewirer.step()
        check_rewire(before, layer, optimizer)
        optimizer.zero_grad()
    moved = {"values", "slow", "per unit", "age", "nested.history.0", "nested.deep.0.x", "the same again"}
    assert set(before.rows) == moved and {"step", "single"} <= set(before.rest)
    state = optimizer.state[layer.values]
    assert state["slow"] is state["the same again"] and state["label"] == "made up" and state["count"] == 3


class Newton(torch.optim.SGD):
    """Keeps a matrix between the weights, as second-order methods do."""

    def step(self, closure=None):  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p].setdefault("curvature", self.matrix(p.numel()))
        return super().step(closure)

    def matrix(self, size: int) -> Tensor:
        return torch.eye(size)


class Transposed(Newton):
    def matrix(self, size: int) -> Tensor:
        return torch.zeros(3, size)


class Quantised(Newton):
    def matrix(self, size: int) -> Tensor:
        return torch.zeros(size // 2 + 1)


class Later(Quantised):
    """Shows its state only after some steps."""

    def step(self, closure=None):  # type: ignore[override]
        self.steps = getattr(self, "steps", 0) + 1
        return super().step(closure) if self.steps > 2 else torch.optim.SGD.step(self, closure)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: torch.optim.LBFGS(p), "LBFGS keeps state that mixes all weights"),
        (lambda p: torch.optim.Muon([torch.nn.Parameter(torch.ones(2, 2))]), "Muon keeps state that mixes all weights"),
        (
            lambda p: Newton(p, lr=0.1),
            r"Newton keeps 'curvature' of shape \(211, 211\) for 211 units: that pairs units",
        ),
        (lambda p: Transposed(p, lr=0.1), r"Transposed keeps 'curvature' of shape \(3, 211\)"),
        (lambda p: Quantised(p, lr=0.1), r"Quantised keeps 'curvature' of shape \(106,\)"),
        (lambda p: type("MyLBFGS", (torch.optim.LBFGS,), {})(p), "MyLBFGS keeps state that mixes"),
    ],
)
def test_rule_7_3_state_that_cannot_be_carried_is_refused_by_name(make, message):
    layer = layer_of({0: 1.0, 1: 2.0}, (2, 4))
    with pytest.raises(ValueError, match=message):
        Rewirer({"layer": layer}, SET()).attach(make(layer.parameters()), total_steps=9)


def test_rule_7_3_state_that_shows_later_is_refused_then():
    layer = layer_of({0: 1.0, 1: 2.0, 2: 3.0}, (2, 4))
    _, optimizer = engine(layer, SET(interval=4, end=9, fraction=Constant(0.5)), lambda p: Later(p, lr=0.0))
    for _ in range(3):
        push(layer, EIGHT)
        optimizer.step()
    before = snapshot(layer, optimizer)
    with pytest.raises(ValueError, match=r"Later keeps 'curvature' of shape \(2,\) for the 3 units of layer"):
        optimizer.step()
    check_nothing_changed(before, layer, optimizer)


def test_rule_7_3_an_optimizer_already_in_use_is_looked_into():
    layer = layer_of({0: 1.0, 1: 2.0, 2: 3.0}, (2, 4))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    optimizer.state[layer.values]["odd"] = torch.zeros(5)
    with pytest.raises(ValueError, match=r"SGD keeps 'odd' of shape \(5,\) for the 3 units of layer"):
        Rewirer({"layer": layer}, SET()).attach(optimizer, total_steps=9)


def ema_by_hand(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def averaged(model: nn.Module) -> nn.Module:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))


@pytest.mark.parametrize("duplicate", [ema_by_hand, averaged])
@pytest.mark.parametrize("method", [SET, RigL])
def test_rule_7_4_companions_are_carried(duplicate, method):
    """Their own values move with the same units; newborns are zero there too."""
    model = mlp(8, 16, 4)
    rewirer = sparsify(model, Plan(density=0.4, method=method(interval=1, end=50, fraction=Constant(0.5))))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    rewirer.attach(optimizer)
    companion = duplicate(model)
    rewirer.register_companion(companion)
    inner = companion.module if isinstance(companion, AveragedModel) else companion
    for _ in range(5):
        copies = {n: copy.deepcopy(inner.get_submodule(n)) for n in rewirer.layers}
        model(torch.randn(5, 8)).pow(2).mean().backward()
        step(optimizer)
        for name, layer in rewirer.layers.items():
            mine, before = inner.get_submodule(name), copies[name]
            assert isinstance(mine, SparseLinear) and isinstance(before, SparseLinear)
            assert mine.pattern == layer.pattern != before.pattern
            check_index(mine)
            kept = before.pattern.to_mask() & mine.pattern.to_mask()
            assert torch.equal(mine.dense_weight(), before.dense_weight() * kept)
        if isinstance(companion, AveragedModel):
            companion.update_parameters(model)
        else:
            with torch.no_grad():
                for mine, theirs in zip(companion.parameters(), model.parameters(), strict=True):
                    mine.lerp_(theirs, 0.5)


def test_rule_7_4_a_companion_must_be_a_copy():
    model = mlp(8, 16, 4)
    dense = copy.deepcopy(model)
    rewirer = sparsify(model, Plan(density=0.4))
    with pytest.raises(
        ValueError, match="the companion has no sparse layer '0' of 51 units: copy the sparsified model"
    ):
        rewirer.register_companion(dense)


def test_rule_7_4_grad_is_dropped():
    layers = {name: layer_of({0: 1.0, 1: 2.0}, (2, 4)) for name in "ab"}
    _, optimizer = engine(layers, SET(interval=2, end=9, fraction=Constant(0.5)))
    for layer in layers.values():
        push(layer, EIGHT)
    optimizer.step()  # t = 1: b's turn
    assert layers["b"].values.grad is None and layers["a"].values.grad is not None


@pytest.mark.parametrize("method", [SET, RigL])
def test_rule_7_5_a_rewire_between_forward_and_backward_raises(method):
    model = mlp(8, 16, 4)
    rewirer = sparsify(
        model, Plan(density=0.4, method=method(interval=1, end=50, stagger=False, fraction=Constant(0.3)))
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    rewirer.attach(optimizer)
    held = {name: layer.values for name, layer in rewirer.layers.items()}
    model(torch.randn(5, 8)).sum().backward()
    loss = model(torch.randn(5, 8)).sum()
    optimizer.step()
    assert len(rewirer.history) == 2
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert all(layer.values is held[name] for name, layer in rewirer.layers.items())
    assert {id(p) for p in model.parameters()} == {id(p) for g in optimizer.param_groups for p in g["params"]}


# -- 8. Everyone agrees --


def trained(seed: int = 0, method: type = RigL) -> tuple[nn.Module, Rewirer]:
    torch.manual_seed(seed)
    model = mlp(8, 32, 16, 4)
    rewirer = sparsify(model, Plan(density=0.3, method=method(interval=2, end=50, fraction=Constant(0.3)), seed=seed))
    optimizer = rarefy.AdamW(model.parameters(), lr=0.01)
    rewirer.attach(optimizer)
    for _ in range(12):
        model(torch.randn(16, 8)).pow(2).mean().backward()
        step(optimizer)
    return model, rewirer


@pytest.mark.parametrize("method", [SET, RigL])
def test_rule_8_1_the_same_seed_gives_the_same_bits(method):
    (first, one), (second, two), (other, _) = trained(0, method), trained(0, method), trained(1, method)
    states = [first.state_dict(), second.state_dict(), other.state_dict()]
    assert all(torch.equal(bits(states[0][key]), bits(states[1][key])) for key in states[0])
    assert any(not torch.equal(states[0][key], states[2][key]) for key in states[0])
    for mine, theirs in zip(one.history, two.history, strict=True):
        assert {**mine, "seconds": 0} == {**theirs, "seconds": 0}


@pytest.mark.parametrize("method, where", [(SET, "values"), (RigL, "values"), (RigL, "gradient")])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_rule_8_3_what_is_not_finite_skips_the_rewire_whole(method, where, bad, micro_batches):
    layer = layer_of({0: 1.0, 1: 2.0, 2: 3.0}, (2, 4))
    options = {"interval": 1, "begin": 2, "end": 5, "fraction": Constant(0.5)}
    rewirer, optimizer = engine(layer, method(**options), hook=False)
    for t in range(1, 5):
        if where == "values":
            with torch.no_grad():
                layer.values[1] = bad if t < 4 else 2.0
        for _ in range(micro_batches):
            gradient = EIGHT.clone()
            if where == "gradient" and t < 4:
                gradient[5] = bad
            x, dy = torch.eye(4), gradient.view(2, 4).T
            layer(x).backward(dy)
        before = snapshot(layer, optimizer)
        if t == 2:
            with pytest.warns(UserWarning, match="the rewire of layer at step 2 was skipped: .* not all finite"):
                rewirer.step()
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                rewirer.step()
        if t < 4:
            check_nothing_changed(before, layer, optimizer)
        optimizer.zero_grad()
    assert rewirer.skipped == 2 and [record["step"] for record in rewirer.history] == [4]


def test_rule_8_3_a_score_that_is_nan_skips_too():
    class Odd(SET):
        def drop_score(self, view):
            return torch.full((view.values.shape[0],), math.nan)

    layer = layer_of({0: 1.0, 1: 2.0, 2: 3.0}, (2, 4))
    rewirer, optimizer = engine(layer, Odd(interval=1, end=5, fraction=Constant(0.5)))
    before = snapshot(layer, optimizer)
    with pytest.warns(UserWarning, match="skipped"):
        optimizer.step()
    check_nothing_changed(before, layer, optimizer)
    assert rewirer.skipped == 1


# -- 9. Resume --

RESUME = """
import sys, torch
import rarefy
from torch import nn

def build(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
    method = getattr(rarefy, name)(interval=3, fraction=rarefy.Cosine(0.5))
    rewirer = rarefy.sparsify(model, rarefy.Plan(density=0.3, method=method, seed=5))
    optimizer = rarefy.AdamW(model.parameters(), lr=0.01)
    return model, rewirer.attach(optimizer, total_steps=40), optimizer

def train(parts, steps):
    model, rewirer, optimizer = parts
    for at in steps:
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(at))
        (model(x) - x[:, :4]).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

def state(parts):
    return [part.state_dict() for part in parts]

torch.set_num_threads(1)
for name in ("SET", "RigL"):
    parts, file = build(name), sys.argv[2] + name
    if sys.argv[1] == "first":
        train(parts, range(13))
        torch.save(state(parts), file + ".saved")
    else:
        for part, saved in zip(parts, torch.load(file + ".saved", weights_only=True)):
            part.load_state_dict(saved)
    train(parts, range(13, 30))
    torch.save(state(parts), file + "." + sys.argv[1])
"""


def flat(item: object, prefix: str = "") -> dict[str, object]:
    if isinstance(item, dict):
        return {k: v for key, part in item.items() for k, v in flat(part, f"{prefix}{key}.").items()}
    if isinstance(item, list | tuple):
        return flat(dict(enumerate(item)), prefix)
    return {prefix: item}


def test_rule_9_1_a_resumed_run_is_bitwise_the_straight_one(tmp_path):
    """30 steps straight, and 13, save, a new process, load, 17 more: every bit of model, optimizer and engine."""
    for part in ("first", "second"):
        subprocess.run([sys.executable, "-c", RESUME, part, f"{tmp_path}/"], check=True, timeout=200)
    for method in ("SET", "RigL"):
        files = [tmp_path / f"{method}.{part}" for part in ("first", "second")]
        straight, resumed = (flat(torch.load(file, weights_only=True)) for file in files)
        assert straight.keys() == resumed.keys() and straight["1.t."] == 30
        for key, item in straight.items():
            other = resumed[key]
            if isinstance(item, Tensor):
                assert isinstance(other, Tensor) and torch.equal(bits(item), bits(other)), key
            else:
                assert item == other, key


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.update(method="set"), "the saved rewiring state has method 'set', this run has 'rigl'"),
        (lambda s: s.update(layers=["0"]), r"has layers \['0'\], this run has \['0', '2'\]"),
        (lambda s: s.update(total_steps=99), "has total_steps 99, this run has 40"),
        (lambda s: s["trackers"]["2"].update(seen=torch.zeros(1, 3)), "exploration was tracked on"),
    ],
)
def test_rule_9_1_a_state_of_another_run_is_refused_and_changes_nothing(change, message):
    model = mlp(8, 16, 4)
    rewirer = sparsify(model, Plan(density=0.4, method=RigL(interval=1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rewirer.attach(optimizer, total_steps=40)
    other = copy.deepcopy(rewirer.state_dict())
    other["t"] = 7
    other["trackers"]["0"]["seen"].fill_(True)
    change(other)
    before = flat(copy.deepcopy(rewirer.state_dict()))
    with pytest.raises(ValueError, match=message):
        rewirer.load_state_dict(other)
    for key, item in flat(rewirer.state_dict()).items():
        old = before[key]
        assert torch.equal(item, old) if isinstance(item, Tensor) and isinstance(old, Tensor) else item == old


@pytest.mark.parametrize("spoil", ["crow_indices", "col_indices"])
def test_rule_9_2_a_state_without_its_pattern_is_refused(spoil):
    model = mlp(8, 16, 4)
    sparsify(model, Plan(density=0.4))
    state = model.state_dict()
    del state[f"2.{spoil}"]
    with pytest.raises(RuntimeError, match=r"2: values come with crow_indices and col_indices, and one .* is missing"):
        model.load_state_dict(state)


def test_rule_9_3_an_equal_count_loads_strictly_and_rebuilds_the_rest():
    torch.manual_seed(0)
    first, second = mlp(8, 16, 4), mlp(8, 16, 4)
    one, two = (sparsify(m, Plan(density=0.4, seed=s)) for s, m in enumerate((first, second)))
    assert not any("t_" in key or "sink" in key for key in first.state_dict())
    second.load_state_dict(first.state_dict(), strict=True)
    for name, layer in two.layers.items():
        assert layer.pattern == one.layers[name].pattern
        check_index(layer)
    x = torch.randn(3, 8)
    assert torch.equal(first(x), second(x))


# -- 10. What is measured --


def test_rule_10_history_by_hand():
    """3 x 4, six units. The row sampled for exploration is whichever; with all rows full of gradients it is checked."""
    layer = layer_of({0: 1.0, 1: 2.0, 4: 3.0, 5: 4.0}, (3, 4))
    rewirer, optimizer = engine(layer, RigL(interval=1, end=2, fraction=Constant(0.5)))
    push(layer, torch.tensor([0.0, 0, 9, 8, 0, 0, 0, 0, 0, 0, 0, 0]))
    step(optimizer)  # 0, 1 -> 2, 3
    push(layer, torch.tensor([0.0, 0, 0, 0, 0, 0, 0, 0, 9, 8, 0, 0]))
    step(optimizer)  # 2, 3 (zero) -> 8, 9
    assert units_of(layer) == [4, 5, 8, 9]
    [row] = rewirer._trackers["layer"].rows.tolist()
    ever = [{0: 4, 1: 2, 2: 0}[row] / 4, {0: 4, 1: 2, 2: 2}[row] / 4]
    seconds = [record.pop("seconds") for record in rewirer.history]
    assert all(value > 0 for value in seconds)
    common = {"layer": "layer", "kind": "rewire", "num_units": 4, "changed": 2, "churn": 0.5, "grown_by": "gradient"}
    assert rewirer.history == [
        {**common, "step": 1, "exploration": ever[0], "newborn_survival": None, "empty_rows": 1, "empty_cols": 0},
        {**common, "step": 2, "exploration": ever[1], "newborn_survival": 0.0, "empty_rows": 1, "empty_cols": 2},
    ]


# -- 12. Known traps --


def test_rule_12_copies_of_a_trained_model_take_no_engine_along():
    model = mlp(8, 16, 4)
    rewirer = sparsify(model, Plan(density=0.4, method=RigL(interval=1, end=50, stagger=False)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rewirer.attach(optimizer)
    twin = copy.deepcopy(model)
    patterns = [layer.pattern for layer in rewirer.layers.values()]
    other = torch.optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(3):
        twin(torch.randn(4, 8)).sum().backward()
        step(other)
    assert rewirer.t == 0 and [layer.pattern for layer in rewirer.layers.values()] == patterns
    assert [m.pattern for m in twin.modules() if isinstance(m, SparseLinear)] == patterns


def test_rule_12_engine_and_collectors_go_with_their_run():
    """An armed engine that nobody holds any more leaves nothing behind."""
    gc.collect()
    others = set(sinks._collectors)
    model = mlp(8, 16, 4)
    rewirer = sparsify(model, Plan(density=0.4, method=RigL(interval=1, end=50, stagger=False)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rewirer.attach(optimizer)
    model(torch.randn(4, 8)).sum().backward()
    assert len(set(sinks._collectors) - others) == 2
    held = [weakref.ref(model[0].values), weakref.ref(rewirer), weakref.ref(optimizer)]
    del model, rewirer, optimizer
    gc.collect()
    assert all(ref() is None for ref in held) and set(sinks._collectors) <= others


def test_rule_12_attach_warns_of_values_that_do_not_decay():
    model = mlp(8, 16, 4)
    rewirer = sparsify(model, Plan(density=0.4, keep_dense=("2",)))
    usual = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    with pytest.warns(UserWarning, match=r"off for the values of 1 sparse layers \(first: 0\)"):
        rewirer.attach(torch.optim.AdamW(usual, lr=0.1), total_steps=9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rewirer.attach(torch.optim.AdamW(rarefy.param_groups(model, lr=0.1, weight_decay=0.1)), total_steps=9)
        rewirer.attach(torch.optim.SGD(model.parameters(), lr=0.1), total_steps=9)
        rewirer.attach(torch.optim.AdamW(model.parameters(), lr=0.1), total_steps=9)


# -- attaching --


def test_attach_wants_an_optimizer_that_holds_the_values():
    model = mlp(8, 16, 4)
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    rewirer = sparsify(model, Plan(density=0.4))
    with pytest.raises(ValueError, match=r"does not hold the values of 0: create it after sparsify\(\)"):
        rewirer.attach(early, total_steps=9)
    with pytest.raises(ValueError, match=r"call rewirer.attach\(optimizer, total_steps=...\) first"):
        rewirer.step()


@pytest.mark.parametrize("hook", [True, False])
def test_step_by_hand_and_by_hook_are_the_same(hook):
    layer = layer_of({0: 1.0, 1: 2.0}, (2, 4))
    rewirer, optimizer = engine(layer, RigL(interval=1, end=9, fraction=Constant(0.5)), hook=hook)
    for _ in range(3):
        push(layer, EIGHT)
        optimizer.step()
        rewirer.step()
        optimizer.zero_grad()
    assert rewirer.t == 3 and len(rewirer.history) == 3


def test_detach_ends_it_and_a_new_attach_goes_on():
    layer = layer_of({0: 1.0, 1: 2.0}, (2, 4))
    rewirer, first = engine(layer, RigL(interval=1, end=9, fraction=Constant(0.5)))
    rewirer.detach()
    assert int(layer.sink[0]) == 0
    push(layer, EIGHT)
    first.step()
    assert rewirer.t == 0
    second = torch.optim.SGD(layer.parameters(), lr=0.0)
    rewirer.attach(second)
    first.step()
    assert rewirer.t == 0
    second.step()
    assert rewirer.t == 1


def test_a_learning_rate_schedule_may_wrap_the_step():
    layer = layer_of({0: 1.0, 1: 2.0}, (2, 4))
    rewirer, optimizer = engine(layer, RigL(interval=1, end=9, fraction=Constant(0.5)))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for _ in range(3):
        push(layer, EIGHT)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert rewirer.t == 3 and len(rewirer.history) == 3


def test_a_run_on_meta_gets_its_patterns_later():
    with torch.device("meta"):
        model = mlp(8, 16, 4)
    rewirer = sparsify(model, Plan(density=0.4, method=RigL(interval=1, end=9)))
    model.to_empty(device="cpu")
    for layer in rewirer.layers.values():
        layer.reset_parameters()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rewirer.attach(optimizer)
    for _ in range(3):
        model(torch.randn(4, 8)).sum().backward()
        step(optimizer)
    assert [(record["step"], record["layer"]) for record in rewirer.history] == [
        (t, n) for t in (1, 2, 3) for n in "02"
    ]
    assert set(rewirer.state_dict()["trackers"]) == {"0", "2"}


def test_state_of_hoard_is_what_the_tests_think():
    layer = layer_of({0: 1.0, 1: 2.0, 2: 3.0, 5: 1.0, 6: 1.0}, (2, 4))
    _, optimizer = engine(layer, SET(end=1), Hoard)
    push(layer, EIGHT)
    optimizer.step()
    names = [name for name, _ in state_tensors(optimizer.state[layer.values])]
    assert len(names) == 8 and "nested.deep.0.x" in names


def test_every_numbered_rule_has_a_test_with_its_number():
    here = Path(__file__).parent
    document = (here.parent / "docs" / "rewiring.md").read_text(encoding="utf-8")
    rules = set(re.findall(r"^(\d\.\d) ", document, flags=re.M))
    tests = "".join(file.read_text(encoding="utf-8") for file in here.glob("test_*.py"))
    tested = {".".join(number) for number in re.findall(r"^def test_rule_(\d)_(\d)_", tests, flags=re.M)}
    assert rules == tested
