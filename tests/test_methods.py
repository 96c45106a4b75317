"""Methods: the hand-worked table, the properties that every registered one has, and one of a user's own."""

from __future__ import annotations

import copy
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rarefy import (
    SET,
    Choice,
    Constant,
    Cosine,
    Exact,
    LayerView,
    Method,
    Momentum,
    Needs,
    NormProduct,
    Pattern,
    Plan,
    Rewirer,
    RigL,
    SampledTokens,
    SparseLinear,
    Static,
    sparsify,
    unit_mean,
)
from rarefy.methods import registered
from rarefy.selection import lowest
from rewires import (
    OPTIMIZERS,
    check_nothing_changed,
    check_rewire,
    engine,
    fit,
    layer_of,
    push,
    snapshot,
    step,
    units_of,
    values_of,
)

#               unit    0  1  2   3  4  5   6  7
ACTIVE = {1: 1.0, 3: -1.0, 5: 8.0, 6: -2.0}
GRADIENT = torch.tensor([-9.0, 1, 4, -1, 5, 8, -2, 3])

TABLE = [
    (0.0, False, [], []),
    (0.1, False, [], []),  # 0.1 * 4 + 0.5 is below 1
    (0.125, False, [1], [0]),  # halves round up
    (0.5, False, [1, 3], [0, 4]),  # |1| and |-1| tie: the lower unit goes first
    (0.75, False, [1, 3, 6], [0, 2, 4]),
    (1.0, False, [1, 3, 5, 6], [0, 2, 4, 7]),
    (0.5, True, [1, 3], [0, 4]),
    (0.75, True, [1, 3, 6], [0, 2, 4]),
    (1.0, True, [1, 3, 6], [0, 2, 4]),  # 5 was dropped and comes back
]


@pytest.mark.parametrize("fraction, may_return, dropped, grown", TABLE)
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("block", [(1, 1), (4, 4), (2, 3)], ids=str)
def test_rigl_by_hand(fraction, may_return, dropped, grown, micro_batches, block):
    """The same choice streamed (one micro-batch) and accumulated (two), for entries and for blocks."""
    layer = layer_of(ACTIVE, (2, 4), block)
    method = RigL(interval=2, fraction=Constant(fraction), may_return=may_return, end=2)
    _, optimizer = engine(layer, method)
    for t in (1, 2):
        for part in range(micro_batches):
            push(layer, GRADIENT * (0.25 if micro_batches == 1 else [0.75, -0.5][part]))
        before = snapshot(layer, optimizer)
        step(optimizer)
        if t == 1:
            assert units_of(layer) == sorted(ACTIVE)
    if not dropped:
        check_nothing_changed(before, layer, optimizer)
        return
    assert check_rewire(before, layer, optimizer) == (dropped, grown)
    stay = {unit: value for unit, value in ACTIVE.items() if unit not in dropped}
    assert values_of(layer) == {**stay, **dict.fromkeys(grown, 0.0)}


def test_set_drops_as_rigl_and_grows_at_random():
    """Over many seeds every absent unit is grown, equally often; the two smallest always go."""
    seen: dict[int, int] = dict.fromkeys((0, 2, 4, 7), 0)
    for seed in range(300):
        layer = layer_of(ACTIVE, (2, 4))
        _, optimizer = engine(layer, SET(interval=1, fraction=Constant(0.5), end=1), seed=seed)
        push(layer, GRADIENT)
        before = snapshot(layer, optimizer)
        optimizer.step()
        gone, born = check_rewire(before, layer, optimizer)
        assert gone == [1, 3] and len(born) == 2
        for unit in born:
            seen[unit] += 1
    assert all(110 <= count <= 190 for count in seen.values())  # 150 +- 8.7


def test_static_never_rewires():
    layer = layer_of(ACTIVE, (2, 4))
    rewirer, optimizer = engine(layer, Static(interval=1))
    for _ in range(5):
        push(layer, GRADIENT)
        step(optimizer)
    assert units_of(layer) == sorted(ACTIVE) and rewirer.history == [] and rewirer.t == 5


# -- what every registered method has --

SIGNALS = {
    "rigl exact": Exact(),
    "rigl of tokens": SampledTokens(tokens=5),
    "rigl of tokens by norm": SampledTokens(tokens=5, by="norm"),
    "rigl of norms": NormProduct(),
    "rigl of momentum": Momentum(steps=4),
    "rigl of two steps": Momentum(steps=2, pool=3, source=NormProduct()),
}
ALL = sorted(name for name, method in registered().items() if method.__module__.startswith("rarefy."))
ALL += sorted(SIGNALS)
BLOCKS = [1, 4, (2, 3)]


def model_and_plan(name: str, block, **options) -> tuple[nn.Module, Plan]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 12))
    options = {"interval": 2, "end": 40, "fraction": Constant(0.4), **options}
    if name in SIGNALS:
        options["signal"] = SIGNALS[name]
    method = registered()[name.partition(" ")[0]](**options)
    # A schedule, which a method that moves the density by itself takes as it is: here the density stays.
    return model, Plan(density=Constant(0.3), method=method, block=block, seed=3)


def train(model: nn.Module, optimizer, steps: range) -> None:
    for at in steps:
        generator = torch.Generator().manual_seed(at)
        x, wanted = torch.randn(8, 12, generator=generator), torch.randn(8, 12, generator=generator)
        (model(x) - wanted).pow(2).mean().backward()
        step(optimizer)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("optimizer_name", ["SGD", "AdamW", "rarefy.AdamW", "Hoard"])
@pytest.mark.parametrize("stagger", [True, False])
def test_every_method_keeps_the_invariants(name, block, optimizer_name, stagger):
    model, plan = model_and_plan(name, block, stagger=stagger)
    rewirer = sparsify(model, plan)
    counts = {n: layer.num_units for n, layer in rewirer.layers.items()}
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    rewirer.attach(optimizer, total_steps=40, hook=False)
    for t in range(1, 13):
        generator = torch.Generator().manual_seed(t)
        model(torch.randn(8, 12, generator=generator)).pow(2).mean().backward()
        optimizer.step()
        before = {n: snapshot(layer, optimizer) for n, layer in rewirer.layers.items()}
        made = len(rewirer.history)
        rewirer.step()
        rewired = {record["layer"]: record for record in rewirer.history[made:]}
        for n, layer in rewirer.layers.items():
            if n in rewired:
                gone, born = check_rewire(before[n], layer, optimizer, keeps_counts=plan.method.keeps_counts)
                assert len(born) == rewired[n]["changed"] and (not plan.method.keeps_counts or len(gone) == len(born))
            else:
                check_nothing_changed(before[n], layer, optimizer)
        optimizer.zero_grad()
    if plan.method.keeps_counts:
        assert {n: layer.num_units for n, layer in rewirer.layers.items()} == counts
    if plan.method.rewires:
        assert {record["layer"] for record in rewirer.history} == set(counts)


@pytest.mark.parametrize("name", ALL)
def test_fraction_zero_changes_nothing(name):
    model, plan = model_and_plan(name, 1, fraction=Constant(0.0))
    rewirer = sparsify(model, plan)
    before = {n: layer.pattern for n, layer in rewirer.layers.items()}
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    rewirer.attach(optimizer, total_steps=40)
    train(model, optimizer, range(10))
    assert {n: layer.pattern for n, layer in rewirer.layers.items()} == before and rewirer.history == []


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("interval", [2, 7])
def test_same_after_save_and_load(name, interval):
    """Saved between two rewires: after step 9, when those of interval 7 have watched candidates for some steps."""

    def build(steps: range, saved=None):
        model, plan = model_and_plan(name, 1, interval=interval)
        rewirer = sparsify(model, plan)
        optimizer = OPTIMIZERS["rarefy.AdamW"](model.parameters())
        rewirer.attach(optimizer, total_steps=40)
        if saved is not None:
            fit(model, saved[0])
            for part, state in zip((model, optimizer, rewirer), copy.deepcopy(saved), strict=True):
                part.load_state_dict(state)
        train(model, optimizer, steps)
        return model, (model.state_dict(), optimizer.state_dict(), rewirer.state_dict())

    straight, _ = build(range(20))
    _, saved = build(range(9))
    resumed, _ = build(range(9, 20), saved)
    for key, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[key]), key


# -- settings --


@pytest.mark.parametrize(
    "options, message",
    [
        ({"interval": 0}, "interval must be at least 1 step, got 0"),
        ({"begin": -1}, "begin and end must satisfy 0 <= begin <= end, got begin=-1"),
        ({"begin": 5, "end": 4}, "got begin=5, end=4"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        RigL(**options)


def test_a_fraction_outside_zero_to_one_is_refused():
    layer = layer_of(ACTIVE, (2, 4))
    _, optimizer = engine(layer, SET(interval=1, fraction=Constant(1.5), end=5))
    push(layer, GRADIENT)
    with pytest.raises(ValueError, match=r"fraction must lie in \[0, 1\], got 1.5"):
        optimizer.step()


def test_presets_say_what_the_papers_do():
    assert RigL.paper() == RigL(may_return=True, stagger=False, signal=Exact())
    assert SET.paper(interval=7, end=9) == SET(interval=7, end=9, fraction=Constant(0.3), stagger=False)
    assert SET.itop() == SET(interval=1500, fraction=Cosine(start=0.5, stop=0.005))
    assert RigL.itop(end=9) == RigL(interval=4000, end=9, fraction=Cosine(start=0.5, stop=0.005))
    assert SET.smet() == SET(interval=100, fraction=Cosine(start=0.2))
    assert RigL().fraction == Cosine(start=0.3) and RigL().interval == 100
    assert (RigL.needs, SET.needs) == (Needs.GRADIENT, Needs.NOTHING)


# -- one of one's own --


def test_a_method_of_ones_own_is_one_class():
    """Drops the rightmost columns, grows where the gradient is largest to the left: both scores are its own."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Leftist(Method):
        slope: float = 0.5

        needs = Needs.GRADIENT

        def drop_score(self, view: LayerView) -> Tensor:
            return -view.pattern.col_indices.float()

        def grow_score(self, tile: Tensor, view: LayerView) -> Tensor:
            assert view.step == 2 and view.name == "layer"
            columns = torch.arange(tile.shape[0]) % view.pattern.num_unit_cols
            return unit_mean(tile.abs()) - self.slope * 100 * columns

    for micro_batches in (1, 2):
        layer = layer_of({1: 1.0, 3: -1.0, 5: 8.0, 6: -2.0}, (2, 4), (2, 2))
        rewirer, optimizer = engine(layer, Leftist(interval=2, end=2, fraction=Constant(0.5)))
        for _ in (1, 2):
            for _ in range(micro_batches):
                push(layer, GRADIENT)
            before = snapshot(layer, optimizer)
            step(optimizer)
        assert check_rewire(before, layer, optimizer) == ([3, 6], [0, 4])
        assert rewirer.history[0]["grown_by"] == "gradient"
    assert registered()["leftist"] is Leftist
    plan = Plan(density=0.5, method=Leftist(slope=0.25))
    assert Plan.from_dict(plan.to_dict()) == plan


def test_a_method_must_score_units():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class PerEntry(Method):
        def drop_score(self, view: LayerView) -> Tensor:
            return view.values.abs()

    layer = layer_of(ACTIVE, (2, 4), (2, 2))
    _, optimizer = engine(layer, PerEntry(interval=1, end=3))
    push(layer, GRADIENT)
    with pytest.raises(ValueError, match=r"PerEntry.drop_score must give one score a unit, \(4,\), got \(4, 2, 2\)"):
        optimizer.step()


def test_unit_mean_is_over_a_units_entries():
    assert torch.equal(unit_mean(torch.tensor([1.0, 2.0])), torch.tensor([1.0, 2.0]))
    assert torch.equal(unit_mean(torch.tensor([[[1.0, 2.0], [3.0, 6.0]]])), torch.tensor([3.0]))


def test_views_are_of_the_layer_after_its_step():
    seen: list[tuple[LayerView, Tensor]] = []

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Watcher(Method):
        def drop_score(self, view: LayerView) -> Tensor:
            seen.append((view, view.values.clone()))
            return unit_mean(view.values.abs())

    layer = SparseLinear(4, 4, density=0.5)
    rewirer, optimizer = engine(
        layer, Watcher(interval=2, end=2, fraction=Constant(0.5)), OPTIMIZERS["SGD"], hook=False
    )
    for _ in (1, 2):
        layer(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        pattern, values = layer.pattern, layer.values.detach().clone()
        rewirer.step()
    [(view, theirs)] = seen
    assert (view.name, view.step, view.pattern) == ("layer", 2, pattern)
    assert torch.equal(theirs, values) and not theirs.requires_grad


@pytest.mark.parametrize(
    "grow, wrong",
    [([5, 4], "ascend"), ([4, 4], "ascend"), ([-1, 4], "lie in"), ([4, 12], "lie in"), ([1, 4], "must not be active")],
)
def test_a_choice_of_units_that_cannot_grow_is_refused(grow, wrong):
    """Nothing is changed, and the error says what was wrong."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Wrong(Method):
        def choose(self, view, k, candidates):
            return Choice(torch.tensor([0, 2]), torch.tensor(grow))

    layer = SparseLinear(4, 3, density=0.25)
    layer.set_pattern(Pattern.from_units(torch.tensor([0, 1, 2]), (3, 4)))
    before = layer.values.detach().clone()
    rewirer = Rewirer({"fc": layer}, Wrong(interval=1, end=1, fraction=Constant(0.7)))
    rewirer.attach(torch.optim.SGD(layer.parameters(), lr=0.0))
    layer(torch.randn(5, 4)).sum().backward()

    with pytest.raises(ValueError, match=wrong):
        rewirer._step()

    assert layer.pattern.unit_indices().tolist() == [0, 1, 2] and torch.equal(layer.values, before)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_rule_2_3_a_method_that_says_so_changes_the_number_of_units(optimizer):
    """Shrinking by one unit a rewire, and growing two at the last: survivors move bitwise, newborns are zero."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Shrinks(Method):
        keeps_counts = False

        def choose(self, view, k, candidates):
            drop = lowest(self.drop_score(view), 1)
            grow = candidates.best(3 if view.step == 3 else 0, drop)
            assert grow is not None
            return Choice(drop, grow)

    layer = SparseLinear(8, 6, density=0.5, generator=torch.Generator().manual_seed(0))
    rewirer = Rewirer({"fc": layer}, Shrinks(interval=1, end=3, fraction=Constant(0.1)))
    opt = optimizer(layer.parameters())
    rewirer.attach(opt)
    values, before = layer.values, layer.num_units
    for expected in (before - 1, before - 2, before):
        loss = layer(torch.randn(5, 8)).square().sum()
        loss.backward()
        opt.step()
        assert layer.values is values and layer.num_units == expected == layer.pattern.num_units
        assert all(t.shape[0] == expected for t in opt.state[values].values() if torch.is_tensor(t) and t.numel() > 1)
    assert int((layer.values == 0).sum()) == 3
    x = torch.randn(4, 8)
    torch.testing.assert_close(layer(x), layer.to_dense()(x))
    layer(x).sum().backward()
    assert layer.values.grad is not None and layer.values.grad.shape == layer.values.shape


def test_the_method_in_the_docs_works():
    """docs/methods.md, "A method of one's own": the class as it stands there trains, rewires and is known by name."""
    text = (Path(__file__).parent.parent / "docs" / "methods.md").read_text(encoding="utf-8")
    found = re.search(r"## A method of one's own.*?```python\n(.*?)```", text, flags=re.DOTALL)
    assert found is not None
    names: dict[str, Any] = {}
    exec(found[1], names)
    plan = names["plan"]
    assert registered()["forgetful"] is type(plan.method) and Plan.from_dict(plan.to_dict()) == plan
    plan = dataclasses.replace(plan, method=dataclasses.replace(plan.method, interval=2), density=0.3)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 12))
    rewirer = sparsify(model, plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    rewirer.attach(optimizer, total_steps=20)
    train(model, optimizer, range(20))
    assert {record["layer"] for record in rewirer.history} == set(rewirer.layers)
    assert {record["grown_by"] for record in rewirer.history} == {"gradient"}
