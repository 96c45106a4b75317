"""SRigL and rows of equal fan-in: a hand-worked table, and a plain implementation of the rule on random layers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rarefy import Constant, Pattern, Plan, Rewirer, RigL, SparseLinear, SRigL, sparsify
from rarefy.growth import NormProduct
from rarefy.growth.exact import BestPerRow
from rarefy.init import constant_fan_in, constant_fan_in_pattern
from rarefy.selection import num_to_replace
from rewires import check_rewire, engine, layer_of, push, snapshot, step, units_of, values_of

# -- rule 2.2 --


@pytest.mark.parametrize("block", [1, 4, (2, 3)], ids=str)
def test_rule_2_2_constant_fan_in(block):
    """Every row has max(1, round(density * columns)) units, and the plan shows what that makes of what was asked."""
    model = nn.Sequential(nn.Linear(60, 24), nn.ReLU(), nn.Linear(24, 36), nn.Linear(36, 24))
    plan = Plan(density=0.07, init="constant_fan_in", block=block, method=RigL(), overrides={"3": 0.5}, seed=4)
    explained = plan.explain(model, measure=None)
    rewirer = sparsify(model, plan)
    b_c = block if isinstance(block, int) else block[1]
    for (name, layer), row in zip(rewirer.layers.items(), explained.rows, strict=True):
        columns, density = layer.in_features // b_c, 0.5 if name == "3" else 0.07
        assert set(torch.diff(layer.pattern.crow_indices).tolist()) == {max(1, round(density * columns))}
        assert row["asked_density"] == density and row["density"] == pytest.approx(layer.density)
    assert "densities rounded to whole units: 0 0.0" in str(explained) and "(asked 0.07)" in str(explained)


def test_rule_2_2_also_on_the_meta_device_and_from_yaml(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text("density: 0.2\ninit: constant_fan_in\nmethod: srigl\n")
    plan = Plan.from_yaml(path)
    assert plan.method == SRigL() and Plan.from_dict(plan.to_dict()) == plan
    layers = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = nn.Sequential(nn.Linear(40, 30))
        layer = sparsify(model, plan).layers["0"]
        if device == "meta":
            model.to_empty(device="cpu")
            layer.reset_parameters()
        layers.append(layer)
    patterns = [layer.pattern for layer in layers]
    assert patterns[0] == patterns[1] and set(torch.diff(patterns[0].crow_indices).tolist()) == {8}


def test_constant_fan_in_is_uniform_over_columns():
    counts = torch.zeros(5, 12)
    for seed in range(400):
        pattern = constant_fan_in_pattern((5, 12), 15, generator=torch.Generator().manual_seed(seed))
        counts += pattern.to_mask()
    assert counts.sum() == 400 * 15 and (counts - 100).abs().max() < 5 * (400 * 0.25 * 0.75) ** 0.5


def test_constant_fan_in_draws_do_not_depend_on_how_many_rows_are_drawn_at_once(monkeypatch):
    draw = lambda: constant_fan_in_pattern((50, 12), 150, generator=torch.Generator().manual_seed(1))  # noqa: E731
    whole = draw()
    monkeypatch.setattr("rarefy.init._DRAWN_ENTRIES", 36)
    assert draw() == whole


def test_constant_fan_in_refuses_what_cannot_be():
    assert [constant_fan_in(d, 10) for d in (0.01, 0.25, 0.35, 1.0)] == [1, 2, 4, 10]
    with pytest.raises(ValueError, match="hold a multiple of 5 units, at most 60, got 16"):
        constant_fan_in_pattern((5, 12), 16)
    with pytest.raises(ValueError, match=r'SRigL keeps the rows of a layer equal: use init="constant_fan_in"'):
        Plan(density=0.1, method=SRigL(), init="balanced")
    assert Plan(density=0.1, method=SRigL()).first_pattern == "constant_fan_in"
    assert Plan(density=0.1).first_pattern == "random"


# -- by hand --

#        columns   0    1    2    3
ACTIVE = {0: 5.0, 1: 4.0, 4: 1.0, 5: 2.0, 10: 0.5, 11: 0.25}
GRADIENT = torch.tensor([[0.0, 0, 9, 8], [0, 0, 7, 1], [2, 3, 0, 0]])
# K = 6, k = 3. Kept by |w|: 0, 1, 5. Largest gradients: 2, 3, 6. Salient per row: 4, 2, 0.


def rewire(active: dict[int, float], gradient: Tensor, method: SRigL, *, block=(1, 1), parts: int = 1):
    """One rewire, streamed (one backward call a step) or accumulated (several)."""
    layer = layer_of(active, (gradient.shape[0], gradient.shape[1]), block)
    last = SparseLinear(2, 2, density=0.5)
    last.values.requires_grad_(False)  # so that the layer is not the last
    rewirer, optimizer = engine({"layer": layer, "last": last}, dataclasses.replace(method, interval=2, end=2))
    for t in (1, 2):
        for part in range(parts):
            push(layer, gradient * (1 if parts == 1 else [0.75, 0.25][part]))
        if t == 2:
            streamed = isinstance(rewirer._collectors["layer"], BestPerRow)
            assert streamed == (parts == 1)
        before = snapshot(layer, optimizer)
        step(optimizer)
    return layer, rewirer, check_rewire(before, layer, optimizer, keeps_counts=False)


TABLE = [
    # Row 2 has nothing salient and goes; of the others 0, 1, 5 are the three largest; six units to two neurons.
    ({}, [0, 1, 2, 5, 6, 7]),
    # Two salient are enough only up to a gamma of 1: floor(1 * 2) = 2.
    ({"gamma": 1.0}, [0, 1, 2, 5, 6, 7]),
    # No neuron may go: every row keeps two. 10 and 11 fall to 8 and 9; 4 falls to 6.
    ({"ablate": False}, [0, 1, 5, 6, 8, 9]),
    ({"ablate": ("other*",)}, [0, 1, 5, 6, 8, 9]),
    ({"ablate": ("lay*",)}, [0, 1, 2, 5, 6, 7]),
]


@pytest.mark.parametrize("options, units", TABLE)
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("block", [(1, 1), (4, 4), (2, 3)], ids=str)
def test_srigl_by_hand(options, units, parts, block):
    layer, rewirer, (gone, born) = rewire(
        ACTIVE, GRADIENT, SRigL(fraction=Constant(0.5), **options), block=block, parts=parts
    )
    assert units_of(layer) == units
    assert gone == sorted(set(ACTIVE) - set(units)) and born == sorted(set(units) - set(ACTIVE))
    assert values_of(layer) == {unit: ACTIVE.get(unit, 0.0) for unit in units}
    assert rewirer.history[-1]["grown_by"] == "gradient"
    assert rewirer.history[-1]["empty_rows"] == (1 if 10 not in units and 8 not in units else 0)


def test_a_neuron_comes_back_when_its_gradients_are_large():
    active = {0: 5.0, 1: 4.0, 4: 1.0, 5: 2.0}  # row 2 is empty
    gradient = torch.tensor([[0.0, 0, 0, 0], [0, 0, 0, 0], [2, 3, 0, 0]])
    layer, _, (gone, born) = rewire(active, gradient, SRigL(fraction=Constant(0.5), gamma=0.0))
    # Kept: 0, 1. Largest gradients: 8, 9. Row 1 has nothing salient; two rows share four units.
    assert units_of(layer) == [0, 1, 8, 9] and (gone, born) == ([4, 5], [8, 9])


def test_at_most_half_of_the_neurons_go_at_once():
    active = {4 * row + col: 1.0 + row for row in range(4) for col in range(2)}
    gradient = torch.zeros(4, 4)
    gradient[3] = torch.tensor([9.0, 9, 9, 9])
    layer, _, _ = rewire(active, gradient, SRigL(fraction=Constant(1.0), gamma=1.0))
    # Only row 3 is salient (nothing is kept, zeros tie upwards from row 0): two rows live, with 8 / 2 units each.
    assert torch.diff(layer.pattern.crow_indices).tolist() == [4, 0, 0, 4]


def test_srigl_tells_what_to_expect():
    assert SRigL().expects_empty_rows and not SRigL(ablate=False).expects_empty_rows and not RigL().expects_empty_rows
    assert SRigL(ablate="fc*").ablate == ("fc*",)  # type: ignore[arg-type]
    assert SRigL.paper() == SRigL(may_return=True, stagger=False) and SRigL.vit().gamma == 0.95
    with pytest.raises(ValueError, match=r"signal must be Exact\(\), not NormProduct"):
        SRigL(signal=NormProduct())
    with pytest.raises(ValueError, match=r"gamma must lie in \[0, 1\], got 1.5; the authors' is 0.3"):
        SRigL(gamma=1.5)


# -- by a plain implementation --


def plain(
    active: dict[int, float], score: list[list[float]], k: int, planned: int, method: SRigL, ablates: bool
) -> set[int]:
    """The rule, unit by unit, on the dense scores. Values by magnitude."""
    num_rows, num_cols = len(score), len(score[0])
    flat = [s for row in score for s in row]
    rows = [[u for u in sorted(active) if u // num_cols == r] for r in range(num_rows)]
    by_value = sorted(active, key=lambda u: (active[u], u))  # the first go first
    by_gradient = sorted(range(len(flat)), key=lambda u: (-flat[u], u))
    living = list(range(num_rows))
    if ablates:
        salient = set(by_value[k:]) | set(by_gradient[:k])
        counts = [sum(u // num_cols == r for u in salient) for r in living]
        fewest = max((sum(map(bool, rows)) + 1) // 2, -(-planned // num_cols), 1)
        spared = sorted(living, key=lambda r: (-counts[r], r))[:fewest]
        living = [r for r in living if counts[r] >= max(1, int(method.gamma * (planned // num_rows))) or r in spared]
    fan_in = min(max(int(planned / len(living) + 0.5), 1), num_cols)
    dead = [u for u in by_value if u // num_cols not in living]
    lost = [*dead, *[u for u in by_value if u not in dead]][:k]
    after: set[int] = set()
    for r in living:
        best_first = [u for u in reversed(by_value) if u in rows[r]]
        kept = [u for u in best_first if u not in lost]
        if not method.may_return:
            kept += [u for u in best_first if u not in kept][: max(0, fan_in - (num_cols - len(rows[r])) - len(kept))]
        kept = kept[:fan_in]
        free = [u for u in by_gradient if u // num_cols == r and u not in kept]
        free = [u for u in free if method.may_return or u not in active]
        after |= {*kept, *free[: fan_in - len(kept)]}
    return after


@settings(max_examples=250)
@given(st.data())
def test_srigl_is_the_plain_rule_streamed_and_dense(data):
    """Choice, equal rows, survivors bitwise; a handful of values and gradients, so that ties are the rule."""
    num_rows, num_cols = data.draw(st.integers(1, 9)), data.draw(st.integers(2, 8))
    fan_in = data.draw(st.integers(1, num_cols))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**30)))
    pattern = constant_fan_in_pattern((num_rows, num_cols), num_rows * fan_in, generator=generator)
    few = torch.tensor([0.25, 0.5, 0.75, 1.0, 3.0, 4.0])
    values = few[torch.randint(6, (pattern.num_units,), generator=generator)].tolist()
    active = dict(zip(pattern.unit_indices().tolist(), values, strict=True))
    method = SRigL(
        fraction=Constant(data.draw(st.sampled_from([0.1, 0.3, 0.5, 0.9, 1.0]))),
        gamma=data.draw(st.sampled_from([0.0, 0.3, 0.6, 0.95])),
        ablate=data.draw(st.booleans()),
        may_return=data.draw(st.booleans()),
        interval=2,
        end=6,
    )
    block, parts = data.draw(st.sampled_from([(1, 1), (2, 3)])), data.draw(st.integers(1, 2))
    layer = layer_of(active, (num_rows, num_cols), block)
    last = SparseLinear(2, 2, density=0.5)
    last.values.requires_grad_(False)
    rewirer, optimizer = engine({"layer": layer, "last": last}, dataclasses.replace(method, stagger=False))
    planned = layer.num_units
    for t in range(1, 7):
        active = values_of(layer)
        gradient = torch.randint(-2, 3, (num_rows, num_cols), generator=generator).float()
        gradient[torch.rand(num_rows, generator=generator) < 0.4] = 0  # dead neurons make many zeros
        for _ in range(parts):
            push(layer, gradient)
        k = num_to_replace(rewirer._fraction(t), layer.num_units, num_rows * num_cols) if t % 2 == 0 else 0
        before = snapshot(layer, optimizer)
        made = len(rewirer.history)
        step(optimizer)
        if not k:
            assert len(rewirer.history) == made
            continue
        assert len(rewirer.history) == made + 1 and rewirer.skipped == 0
        check_rewire(before, layer, optimizer, keeps_counts=False)
        wanted = plain(active, gradient.abs().tolist(), k, planned, method, bool(method.ablate))
        assert set(units_of(layer)) == wanted
        fan_ins = set(torch.diff(layer.pattern.crow_indices).tolist()) - {0}
        assert len(fan_ins) == 1
        living = int((torch.diff(layer.pattern.crow_indices) > 0).sum())
        assert abs(layer.num_units - planned) <= living / 2 or fan_ins <= {1, num_cols}


def test_srigl_evens_rows_that_were_not():
    """A layer adopted with unequal rows has equal ones after its first rewire."""
    layer = layer_of({0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0, 4: 5.0, 8: 6.0}, (3, 4))
    _, optimizer = engine(layer, SRigL(interval=1, end=9, fraction=Constant(0.4), ablate=False))
    for _ in (1, 2):
        push(layer, GRADIENT)
        step(optimizer)
    assert torch.diff(layer.pattern.crow_indices).tolist() == [2, 2, 2]


@pytest.mark.parametrize("where", ["value", "gradient", "gradient in an active unit"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("parts", [1, 2])
def test_rule_8_3_srigl_skips_what_is_not_finite(where, bad, parts):
    layer = layer_of(ACTIVE, (3, 4))
    rewirer, optimizer = engine(layer, SRigL(interval=2, end=2, fraction=Constant(0.5)))
    for t in (1, 2):
        gradient = GRADIENT.clone()
        if t == 2 and where != "value":
            gradient[0, 0 if "active" in where else 2] = bad
        for _ in range(parts):
            push(layer, gradient)
        layer.values.grad = torch.zeros_like(layer.values)
        if t == 2 and where == "value":
            layer.values.grad[1] = bad
            optimizer.param_groups[0]["lr"] = 1.0
        with torch.no_grad():
            before = units_of(layer)
        if t == 2:
            with pytest.warns(UserWarning, match="not all finite"):
                step(optimizer)
        else:
            step(optimizer)
    assert units_of(layer) == before and rewirer.skipped == 1 and rewirer.history == []


def test_rule_6_3_srigl_holds_no_dense_gradient():
    """What the collector keeps is at most twice the fan-in a row, and the best k of all."""
    layer = SparseLinear.from_pattern(constant_fan_in_pattern((64, 256), 64 * 16))
    last = SparseLinear(2, 2, density=0.5)
    last.values.requires_grad_(False)
    rewirer, optimizer = engine({"layer": layer, "last": last}, SRigL(interval=2, end=2, fraction=Constant(0.3)))
    for _ in (1, 2):
        (layer(torch.randn(8, 256)) ** 2).sum().backward()
        if rewirer._collectors:
            collector = rewirer._collectors["layer"]
            assert isinstance(collector, BestPerRow)
            found = collector.found(layer.index, None).rows
            assert found is not None and found.row_cols.shape == (64, 32) and found.units.numel() == 307
        optimizer.step()
    assert len(rewirer.history) == 1
    assert isinstance(rewirer, Rewirer) and isinstance(layer.pattern, Pattern)
