"""Density that moves (rules 2.5 to 2.8, 9.4): exact at every change, storage of that size, all that belongs to units
moved.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import rarefy
from rarefy import (
    GMP,
    MEST,
    SET,
    Constant,
    Cosine,
    Cubic,
    GraNet,
    LayerView,
    Linear,
    Method,
    Pattern,
    Plan,
    Redistribution,
    Rewirer,
    RigL,
    SparseLinear,
    Static,
    Steps,
    sparsify,
)
from rarefy.budget import Budget
from rarefy.distributions import spread
from rarefy.methods.redistribution import by_global_score
from rarefy.nn import SparseLayer
from rewires import OPTIMIZERS, bits, check_index, layer_of, push, snapshot, step, units_of


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Networks this small are slower on more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network(widths=(12, 24, 18, 6)) -> nn.Sequential:
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def learn(model: nn.Module, optimizer, steps: range) -> None:
    for at in steps:
        x = torch.randn(16, 12, generator=torch.Generator().manual_seed(at))
        (model(x) - x[:, :6].tanh()).pow(2).mean().backward()
        step(optimizer)


def check_resized(before, layer: SparseLayer, optimizer, *, back: bool = False) -> tuple[list[int], list[int]]:
    """As `check_rewire`, of a change to any number of units.

    Args:
        back: what a change of density drops may come back in the rewire of that step, as 0.
    """
    check_index(layer)
    after = snapshot(layer, optimizer)
    assert after.values is before.values, "the parameter object stays the same one"
    assert before.rows.keys() == after.rows.keys() and before.rest.keys() == after.rest.keys()
    assert all(torch.equal(old, after.rest[name]) for name, old in before.rest.items())
    old_stays, new_stays = np.isin(before.units, after.units), np.isin(after.units, before.units)
    for name, old in before.rows.items():
        new = after.rows[name]
        same = (old[old_stays] == new[new_stays]).all(axis=1)
        assert same.all() or (back and not new[new_stays][~same].any()), f"{name} of a survivor changed"
        assert not new[~new_stays].any(), f"{name} of a newborn is not zero"
    return before.units[~old_stays].tolist(), after.units[~new_stays].tolist()


# -- 2.5 exactly its figure --

SCHEDULES = [
    Cubic(1.0, 0.1),
    Linear(0.15, 0.6),
    Cosine(0.5, 0.05),
    Steps((0.2, 0.7, 0.3), (0.0, 0.4, 0.8)),
    Constant(0.25),
]


@settings(max_examples=40, deadline=None)
@given(
    schedule=st.sampled_from(SCHEDULES),
    method=st.sampled_from(
        [
            lambda **o: Static(**o),
            lambda **o: SET(**o),
            lambda **o: RigL(**o),
            lambda **o: RigL(may_return=True, **o),
            lambda **o: GMP(scope="global", **o),
            lambda **o: GraNet(**o),
            lambda **o: MEST(growth="gradient", **o),
            lambda **o: SET(redistribute=Redistribution(), **o),
            lambda **o: RigL(redistribute=Redistribution(), **o),
        ]
    ),
    distribution=st.sampled_from(["uniform", "er", "erk"]),
    block=st.sampled_from([1, 2, (2, 3)]),
    own=st.sampled_from([{}, {"2": Linear(0.5, 0.3)}, {"0": 0.4}]),
    optimizer=st.sampled_from(list(OPTIMIZERS)),
    stagger=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rule_2_5_exact_at_every_change(schedule, method, distribution, block, own, optimizer, stagger, seed):
    model = network()
    made = method(interval=2, density_interval=3, end=10, stagger=stagger)
    plan = Plan(density=schedule, method=made, distribution=distribution, block=block, overrides=own, seed=seed)
    rewirer = sparsify(model, plan)
    # With a single unit no one can tell what is of one entry a unit from what is of one entry for all.
    assume(optimizer != "Hoard" or block == 1)
    opt = OPTIMIZERS[optimizer](model.parameters())
    rewirer.attach(opt, hook=False)
    sizes = {n: math.prod(torch.tensor(s).tolist()) for n, s in ((n, _grid(x)) for n, x in rewirer.layers.items())}
    owned = {name: plan.overrides[name] for name in rewirer.layers if name in own}
    for t in range(13):
        if t:
            x = torch.randn(8, 12, generator=torch.Generator().manual_seed(1000 * seed + t))
            model(x).pow(2).mean().backward()
            opt.step()
            before = {n: snapshot(layer, opt) for n, layer in rewirer.layers.items()}
            seen = len(rewirer.history)
            rewirer.step()
            for name, layer in rewirer.layers.items():
                records = [r for r in rewirer.history[seen:] if r["layer"] == name]
                both = {r["kind"] for r in records} == {"density", "rewire"}
                gone, born = check_resized(before[name], layer, opt, back=both and made.may_return)
                assert records or not (gone or born)
                assert not records or records[-1]["num_units"] == layer.num_units
            opt.zero_grad()
        # The figure of the last change: every third step, and the end.
        progress = (t // 3 * 3 if t < 10 else 10) / 10
        shared = [name for name in rewirer.layers if name not in owned]
        now = {name: layer.num_units for name, layer in rewirer.layers.items()}
        assert sum(now[n] for n in shared) == round(schedule(progress) * sum(sizes[n] for n in shared))
        for name, density in owned.items():
            assert now[name] == round(made.densities(density)(progress) * sizes[name])
        assert min(now.values()) >= 1
    assert rewirer.skipped == 0


def _grid(layer: SparseLayer) -> tuple[int, int]:
    return layer.pattern.num_unit_rows, layer.pattern.num_unit_cols


@pytest.mark.parametrize("method", [GMP(end=14, interval=4), GMP(end=14, interval=4, scope="global")], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_rule_2_6_while_the_total_falls_no_layer_grows_and_the_lowest_go(method, optimizer):
    model = network()
    rewirer = sparsify(model, Plan(density=0.15, method=method, distribution="erk"))
    opt = OPTIMIZERS[optimizer](model.parameters())
    rewirer.attach(opt, hook=False)
    assert all(layer.density == 1 for layer in rewirer.layers.values())
    for t in range(1, 16):
        learn_one(model, t)
        opt.step()
        before = {n: snapshot(layer, opt) for n, layer in rewirer.layers.items()}
        scores = {n: layer.values.detach().abs() for n, layer in rewirer.layers.items()}
        rewirer.step()
        for name, layer in rewirer.layers.items():
            gone, born = check_resized(before[name], layer, opt)
            assert not born and len(gone) == len(before[name].units) - layer.num_units
            score = scores[name].numpy()
            order = np.lexsort((before[name].units, score))
            assert sorted(gone) == sorted(before[name].units[order[: len(gone)]].tolist())
        opt.zero_grad()
    total = sum(layer.num_units for layer in rewirer.layers.values())
    assert total == round(0.15 * (12 * 24 + 24 * 18 + 18 * 6))
    assert {r["kind"] for r in rewirer.history} == {"density"}
    assert {r["step"] for r in rewirer.history} == {4, 8, 12, 14}


def learn_one(model: nn.Module, at: int) -> None:
    x = torch.randn(16, 12, generator=torch.Generator().manual_seed(at))
    (model(x) - x[:, :6].tanh()).pow(2).mean().backward()


def test_rule_2_5_growth_is_where_the_gradient_is_largest():
    """1 x 8, from 2 units to 4 to 6."""
    layer = layer_of({1: 1.0, 5: 2.0}, (1, 8))
    budget = Budget(
        shapes={"fc": (1, 8)}, blocks={"fc": (1, 1)}, density=Linear(0.25, 0.75), distribution="uniform", own={}
    )
    method = RigL(interval=1, end=2, fraction=Constant(0.0))
    rewirer = Rewirer({"fc": layer}, method, budget=budget)
    optimizer = torch.optim.SGD([layer.values], lr=0.0)
    rewirer.attach(optimizer)
    push(layer, torch.tensor([3.0, 9, -7, 1, 7, 9, 2, 7]))  # 2, 4 and 7 tie: the lower units come
    step(optimizer)
    assert units_of(layer) == [1, 2, 4, 5]
    push(layer, torch.tensor([0.0, 0, 0, 1, 0, 0, 2, 0]))
    step(optimizer)
    assert units_of(layer) == [1, 2, 3, 4, 5, 6]
    assert [(r["kind"], r["grown_by"], r["changed"]) for r in rewirer.history] == [("density", "gradient", 2)] * 2


def test_rule_2_5_without_a_gradient_the_figure_is_met_at_random():
    layer = layer_of({1: 1.0, 5: 2.0}, (1, 8))
    budget = Budget(
        shapes={"fc": (1, 8)}, blocks={"fc": (1, 1)}, density=Linear(0.25, 0.75), distribution="uniform", own={}
    )
    rewirer = Rewirer({"fc": layer}, RigL(interval=1, end=1), budget=budget)
    other = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([layer.values, other], lr=0.1)
    rewirer.attach(optimizer)
    other.sum().backward()  # the layer takes no part
    step(optimizer)
    assert layer.num_units == 6 and {1, 5} <= set(units_of(layer))
    assert [r["grown_by"] for r in rewirer.history] == ["random"]


def test_rule_2_8_newborns_of_a_change_stay_in_the_rewire_of_that_step():
    layer = layer_of({1: 1.0, 5: 2.0}, (1, 8))
    budget = Budget(
        shapes={"fc": (1, 8)}, blocks={"fc": (1, 1)}, density=Linear(0.25, 0.5), distribution="uniform", own={}
    )
    rewirer = Rewirer({"fc": layer}, RigL(interval=1, end=1, fraction=Constant(0.25)), budget=budget)
    optimizer = torch.optim.SGD([layer.values], lr=0.0)
    rewirer.attach(optimizer)
    push(layer, torch.tensor([3.0, 9, -7, 1, 7, 9, 2, 6]))
    step(optimizer)  # 2 and 4 are born as zeros; the rewire of one unit drops 1 all the same, for 7
    assert units_of(layer) == [2, 4, 5, 7]
    assert [r["kind"] for r in rewirer.history] == ["density", "rewire"]


@pytest.mark.parametrize("may_return, expected", [(False, [3, 4]), (True, [2, 4])])
def test_rule_2_8_what_a_change_drops_returns_only_where_dropped_units_may(may_return, expected):
    """1 x 8, four units to two, then one of them regenerates."""
    layer = layer_of({1: 1.0, 2: 2.0, 3: 3.0, 5: 9.0}, (1, 8))
    with torch.no_grad():
        layer.values.copy_(torch.tensor([1.0, 2.0, 4.0, 3.0]))
    budget = Budget(
        shapes={"fc": (1, 8)}, blocks={"fc": (1, 1)}, density=Linear(0.5, 0.25), distribution="uniform", own={}
    )
    method = GraNet(interval=1, end=1, fraction=Constant(0.5), may_return=may_return)
    rewirer = Rewirer({"fc": layer}, method, budget=budget)
    optimizer = torch.optim.SGD([layer.values], lr=0.0)
    rewirer.attach(optimizer)
    push(layer, torch.tensor([0.0, 0, 9, 0, 5, 0, 0, 0]))
    step(optimizer)  # 1 and 2 go, 3 and 5 stay; 5 is dropped; 2 has the largest gradient, 4 is the best that was absent
    assert units_of(layer) == ([3, 4] if not may_return else [2, 3])
    assert layer.values.tolist() == ([4.0, 0.0] if not may_return else [0.0, 4.0])


# -- budgets --


@pytest.mark.parametrize(
    "scores, total, kept",
    [
        ([[1.0, 2, 3], [4.0, 5]], 3, [1, 2]),
        ([[1.0, 1, 1], [1.0, 1]], 4, [2, 2]),  # ties: the earlier layer's go first
        ([[1.0, 1, 1], [1.0, 1]], 2, [1, 1]),  # but one of each stays
        ([[9.0, 9], [1.0, 1, 1]], 2, [1, 1]),
        ([[9.0, 9], [1.0, 1, 1]], 5, [2, 3]),
        ([[0.0, 0.0, 2.0], [0.0, 1.0]], 3, [1, 2]),
    ],
)
def test_budget_by_global_score(scores, total, kept):
    assert by_global_score([torch.tensor(s) for s in scores], total) == kept


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_rule_2_9_redistribution_is_exact_and_bounded(data):
    rule = Redistribution(
        salient=data.draw(st.floats(0.05, 1)), most=data.draw(st.floats(0.01, 1)), least=data.draw(st.floats(0.01, 1))
    )
    sizes = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=5))
    now = [data.draw(st.integers(1, n)) for n in sizes]
    total = data.draw(st.integers(len(now), sum(now)))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    scores = [torch.randint(0, 4, (k,), generator=draw).float() for k in now]
    counts = rule.counts(scores, sizes, total)
    assert sum(counts) == total and all(1 <= k <= n for k, n in zip(counts, sizes, strict=True))
    base = [before * total / sum(now) for before in now]
    slack = sum(b < 2 for b in base)  # that none is left without a unit comes first
    for k, b in zip(counts, base, strict=True):
        assert math.floor((1 - rule.most) * b) - slack <= k <= math.ceil((1 + rule.most) * b)


def test_redistribution_by_hand():
    """Ten units each; the half that counts lies in the second layer."""
    scores = [torch.arange(10.0), torch.arange(10.0) + 100]
    assert Redistribution(most=0.2).counts(scores, [20, 20], 20) == [8, 12]
    assert Redistribution(most=1.0, least=0.5).counts(scores, [20, 20], 20) == [5, 15]
    assert Redistribution(most=1.0, least=0.5).counts(scores, [20, 11], 20) == [9, 11]
    assert Redistribution(salient=1.0).counts(scores, [20, 20], 20) == [10, 10]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_spread_is_exact_within_its_bounds(data):
    names = [str(i) for i in range(data.draw(st.integers(1, 6)))]
    least = {n: data.draw(st.integers(1, 30)) for n in names}
    most = {n: least[n] + data.draw(st.integers(0, 3000)) for n in names}
    total = data.draw(st.integers(sum(least.values()), sum(most.values())))
    ideal = {n: data.draw(st.floats(0, 3000)) for n in names}
    counts = spread(ideal, total, least, most)
    assert sum(counts.values()) == total and all(least[n] <= counts[n] <= most[n] for n in names)


def test_redistribution_moves_units_to_the_layer_that_needs_them():
    model = network()
    method = SET(interval=2, stagger=False, redistribute=Redistribution(least=0.3))
    rewirer = sparsify(model, Plan(density=0.2, method=method))
    first = {n: layer.num_units for n, layer in rewirer.layers.items()}
    with torch.no_grad():
        rewirer.layers["2"].values.mul_(10)
    opt = OPTIMIZERS["rarefy.AdamW"](model.parameters())
    rewirer.attach(opt, total_steps=40)
    learn(model, opt, range(40))
    last = {n: layer.num_units for n, layer in rewirer.layers.items()}
    assert sum(first.values()) == sum(last.values()) and last["2"] > first["2"] * 1.3
    for name, size in (("0", 288), ("2", 432), ("4", 108)):
        assert last[name] >= min(first[name], math.floor(0.3 * 0.2 * size))


# -- methods --


def test_mest_drops_by_magnitude_and_gradient():
    view = LayerView(
        name="fc",
        pattern=Pattern.from_units(torch.tensor([0, 3, 5]), (2, 4)),
        values=torch.tensor([1.0, -2.0, 0.5]),
        step=1,
        gradient=torch.tensor([0.0, 1.0, -10.0]),
    )
    torch.testing.assert_close(MEST(gradient_weight=0.1).drop_score(view), torch.tensor([1.0, 2.1, 1.5]))
    without = dataclasses.replace(view, gradient=None)
    torch.testing.assert_close(MEST().drop_score(without), torch.tensor([1.0, 2.0, 0.5]))


def test_mest_soft_bound_holds_the_surplus_and_gives_it_up_in_steps():
    model = network()
    method = MEST(interval=4, end=40, soft=True, stagger=False)
    rewirer = sparsify(model, Plan(density=0.2, method=method))
    opt = OPTIMIZERS["SGD"](model.parameters())
    rewirer.attach(opt)
    n = 12 * 24 + 24 * 18 + 18 * 6
    totals = {}
    for t in range(1, 61):
        learn(model, opt, range(t, t + 1))
        totals[t] = sum(layer.num_units for layer in rewirer.layers.values())
    assert {totals[t] for t in range(1, 32)} == {round(0.24 * n)}
    assert {totals[t] for t in range(32, 40)} == {round(0.22 * n)}
    assert {totals[t] for t in range(40, 61)} == {round(0.2 * n)}
    rewires = [r for r in rewirer.history if r["kind"] == "rewire"]
    for record in rewires:  # as many as the surplus: what an update falls to is the plan's density
        share = 0.2 if record["step"] < 32 else 0.1
        assert record["changed"] == math.floor(record["num_units"] * share / (1 + share) + 0.5)
    assert max(r["step"] for r in rewires) == 36


def test_methods_read_and_write_as_data():
    plan = Plan(
        density=Cubic(0.5, 0.1),
        method=SET(redistribute=Redistribution(most=0.2), density_interval=7),
        overrides={"head": Steps((0.5, 0.2), (0.0, 0.5)), "mlp": 0.3},
    )
    assert Plan.from_dict(plan.to_dict()) == plan
    for method in (GMP(scope="global"), GraNet.paper(), MEST.em_s(), MEST(growth="gradient")):
        assert Plan.from_dict(Plan(density=0.1, method=method).to_dict()).method == method
    assert Plan.from_dict({"density": {"name": "cubic", "start": 1.0, "stop": 0.2}}).density == Cubic(1.0, 0.2)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Plan(density=Linear(0.5, 0.0)), "density must lie in"),
        (lambda: Plan(density=0.5, overrides={"a": Cubic(1.2, 0.1)}), "density must lie in"),
        (lambda: Plan(density=0.5, method=GMP(start=0.3)), "start must lie between the plan's density and 1"),
        (lambda: Plan(density=0.5, method=GraNet(start=1.5)), "start must lie between the plan's density and 1"),
        (lambda: GMP(scope="net"), 'scope must be "layer" or "global"'),  # type: ignore[arg-type]
        (lambda: MEST(growth="up"), 'growth must be "random" or "gradient"'),  # type: ignore[arg-type]
        (lambda: MEST(gradient_weight=-1), "gradient_weight must not be negative"),
        (lambda: SET(density_interval=0), "density_interval must be at least 1 step"),
        (lambda: Redistribution(most=0), "most must lie in"),
        (lambda: Steps((1.0,), (0.5,)), "rising from 0"),
        (lambda: Steps((1.0, 2.0), (0.0, 1.5)), "progress ends at 1"),
        (lambda: Plan.from_dict({"density": {"name": "cubik", "start": 1}}), "did you mean 'cubic'"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_resize_by_hand_and_its_errors():
    layer = layer_of({1: 1.0, 2: -3.0, 5: 2.0, 7: 4.0}, (2, 4))
    rewirer = Rewirer({"fc": layer}, Static())
    with pytest.raises(ValueError, match=r"call rewirer\.attach"):
        rewirer.resize({"fc": 2})
    optimizer = torch.optim.SGD([layer.values], lr=0.1, momentum=0.9)
    rewirer.attach(optimizer)
    push(layer, torch.ones(8))
    step(optimizer)
    momentum = optimizer.state[layer.values]["momentum_buffer"]
    rewirer.resize({"fc": 2})
    assert units_of(layer) == [2, 7] and momentum.shape == (2,)
    rewirer.resize({"fc": 5})
    assert layer.num_units == 5 and {2, 7} <= set(units_of(layer)) and int((momentum == 0).sum()) == 3
    assert [(r["kind"], r["grown_by"], r["num_units"]) for r in rewirer.history] == [
        ("resize", "nothing", 2),
        ("resize", "random", 5),
    ]
    with pytest.raises(ValueError, match="can have 1 to 8 units, not 9"):
        rewirer.resize({"fc": 9})
    with pytest.raises(ValueError, match="did you mean 'fc'"):
        rewirer.resize({"fd": 3})
    assert layer.num_units == 5


def test_a_budget_with_another_total_is_refused():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Greedy(Method):
        def budget(self, views, total):
            return {view.name: view.pattern.num_units + 1 for view in views}

    model = network()
    rewirer = sparsify(model, Plan(density=0.2, method=Greedy(interval=1)))
    opt = OPTIMIZERS["SGD"](model.parameters())
    rewirer.attach(opt, total_steps=8)
    with pytest.raises(ValueError, match=r"Greedy\.budget must spread"):
        learn(model, opt, range(2))


def test_a_method_may_move_units_by_a_budget_of_its_own_and_grow_by_gradient():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Shifts(Method):
        needs = rarefy.Needs.GRADIENT

        def budget(self, views, total):
            first, *rest = (view.pattern.num_units for view in views)
            return {view.name: k for view, k in zip(views, (first - 1, rest[0] + 1, *rest[1:]), strict=True)}

    model = network()
    rewirer = sparsify(model, Plan(density=0.2, method=Shifts(interval=2, fraction=Constant(0.1))))
    opt = OPTIMIZERS["AdamW"](model.parameters())
    rewirer.attach(opt, total_steps=12)
    before = [layer.num_units for layer in rewirer.layers.values()]
    learn(model, opt, range(12))
    assert [layer.num_units for layer in rewirer.layers.values()] == [before[0] - 4, before[1] + 4, before[2]]
    assert {r["grown_by"] for r in rewirer.history if r["kind"] == "density"} == {"gradient", "nothing"}


def test_the_budget_of_the_documentation():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Even(Method):
        def budget(self, views, total):
            each, left = divmod(total, len(views))
            return {view.name: each + (at < left) for at, view in enumerate(views)}

    model = network()
    rewirer = sparsify(model, Plan(density=0.2, method=Even(interval=2)))
    opt = OPTIMIZERS["AdamW"](model.parameters())
    rewirer.attach(opt, total_steps=12)
    learn(model, opt, range(12))
    assert [layer.num_units for layer in rewirer.layers.values()] == [56, 55, 55]


def test_rule_8_3_a_change_with_values_that_are_no_numbers_is_skipped_whole():
    model = network()
    rewirer = sparsify(model, Plan(density=0.2, method=GMP(interval=1)))
    opt = OPTIMIZERS["SGD"](model.parameters())
    rewirer.attach(opt, total_steps=8)
    with torch.no_grad():
        rewirer.layers["2"].values[3] = math.nan
    learn_one(model, 0)
    before = {n: layer.num_units for n, layer in rewirer.layers.items()}
    for layer in rewirer.layers.values():
        layer.values.grad = torch.zeros_like(layer.values)
    with pytest.warns(UserWarning, match="change of sizes at step 1 was skipped"):
        opt.step()
    assert {n: layer.num_units for n, layer in rewirer.layers.items()} == before and rewirer.skipped == 1


def test_companions_and_frozen_layers():
    model = network()
    rewirer = sparsify(model, Plan(density=0.1, method=GMP(interval=2)))
    rewirer.layers["4"].values.requires_grad_(False)
    ema = copy.deepcopy(model)
    rewirer.register_companion(ema)
    opt = OPTIMIZERS["AdamW"]([p for p in model.parameters() if p.requires_grad])
    rewirer.attach(opt, total_steps=20)
    learn(model, opt, range(20))
    assert rewirer.layers["4"].density == 1
    for name, layer in rewirer.layers.items():
        twin = ema.get_submodule(name)
        assert isinstance(twin, SparseLinear) and twin.pattern == layer.pattern
        check_index(twin)


# -- 9.4 resume --

MOVING = {
    "GMP": GMP(interval=3),
    "GMP global": GMP(interval=3, scope="global"),
    "GraNet": GraNet(interval=3),
    "GraNet paper": GraNet.paper(interval=3, start=1.0),
    "EM&S": MEST(interval=3, soft=True),
    "redistribute": RigL(interval=3, redistribute=Redistribution()),
}


def build(method: Method, density: float = 0.1):
    model = network()
    rewirer = sparsify(model, Plan(density=density, method=method))
    optimizer = OPTIMIZERS["rarefy.AdamW"](model.parameters())
    rewirer.attach(optimizer, total_steps=32)
    return model, rewirer, optimizer


@pytest.mark.parametrize("name", MOVING)
@pytest.mark.parametrize("way", ["file", "state dicts"])
def test_rule_9_4_resume_across_a_density_change_bit_for_bit(tmp_path, name, way):
    model, rewirer, optimizer = build(MOVING[name])
    learn(model, optimizer, range(13))
    rarefy.save(model, tmp_path / "half", rewirer=rewirer, optimizer=optimizer)
    state = copy.deepcopy((rewirer.state_dict(), model.state_dict(), optimizer.state_dict()))
    learn(model, optimizer, range(13, 32))
    rarefy.save(model, tmp_path / "straight", rewirer=rewirer, optimizer=optimizer)

    fresh, other, opt = build(MOVING[name])
    values = {n: layer.values for n, layer in other.layers.items()}
    if way == "file":
        rarefy.load_into(tmp_path / "half", fresh, rewirer=other, optimizer=opt)
    else:
        for part, saved in zip((other, fresh, opt), state, strict=True):
            part.load_state_dict(saved)
    assert all(layer.values is values[n] for n, layer in other.layers.items())
    learn(fresh, opt, range(13, 32))
    rarefy.save(fresh, tmp_path / "resumed", rewirer=other, optimizer=opt)
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "straight").read_bytes()


def test_rule_9_4_another_size_is_refused_without_a_rewirer_that_resizes(tmp_path):
    model, rewirer, optimizer = build(GMP(interval=3))
    learn(model, optimizer, range(13))
    rarefy.save(model, tmp_path / "half", rewirer=rewirer, optimizer=optimizer)
    fresh, _, _ = build(GMP(interval=3))
    with pytest.raises(ValueError, match="sparsify with the plan of the saved model"):
        rarefy.load_into(tmp_path / "half", fresh)
    with pytest.raises(RuntimeError, match="load the rewirer's state first"):
        fresh.load_state_dict(model.state_dict())
    static, still, opt = build(RigL(interval=3), density=0.3)
    with pytest.raises(ValueError, match="sparsify with the plan of the saved model"):
        rarefy.load_into(tmp_path / "half", static, rewirer=still, optimizer=opt)


def test_rule_9_4_a_load_that_fails_leaves_sizes_as_they_were(tmp_path):
    model, rewirer, optimizer = build(GMP(interval=3))
    learn(model, optimizer, range(13))
    rarefy.save(model, tmp_path / "half", rewirer=rewirer, optimizer=optimizer)
    fresh, other, opt = build(GMP(interval=3, scope="global"))
    learn(fresh, opt, range(5))
    before = {name: bits(t) for name, t in fresh.state_dict().items()}
    other.load_state_dict = lambda state: _fail()  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="no such luck"):
        rarefy.load_into(tmp_path / "half", fresh, rewirer=other, optimizer=opt)
    after = fresh.state_dict()
    assert all(torch.equal(bits(after[name]), old) for name, old in before.items())
    for layer in other.layers.values():
        check_index(layer)


def _fail() -> None:
    raise ValueError("no such luck")


# -- plans --


def test_explain_shows_both_ends():
    found = Plan(density=0.1, method=GraNet()).explain(network())
    assert "density 0.5000 (asked 0.5)" in str(found)
    assert "density moves to 0.1002 (asked 0.1) at the end" in " ".join(str(found).split())
    totals = found.totals
    assert totals["density"] == pytest.approx(0.5, abs=0.001) and totals["last_density"] == pytest.approx(
        0.1, abs=0.001
    )
    still = Plan(density=0.1).explain(network())
    assert "moves" not in str(still) and still.totals["last_density"] == still.totals["density"]
