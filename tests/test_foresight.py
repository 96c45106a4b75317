"""What `rarefy plan --budget` foresees besides the loss: steps, memory; and the choice made by all three."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import check_steps
from rarefy.cost import CostModel, training_bytes
from rarefy.foresight import Law, Point, Shape, StepModel, Wish, choose, kept, step_bytes, step_model
from rarefy.foresight.choice import WIDTHS, attention_widths
from rarefy.foresight.memory import LOOKED_AT, activation_bytes, kept_bytes
from rarefy.foresight.steps import NAMES, TimedStep, fit_steps, linears_ms
from rarefy.foresight.timing import HELD_OUT, POINTS, Noise, make_network, time_steps
from test_plan_auto import costs
from tiny import one_thread

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

# -- networks as numbers, and their memory ----------------------------------------------------------------------------

NETWORKS = [
    Shape(width=32, layers=2, context=64, batch=2),
    Shape(width=64, layers=1, heads=2, context=64, batch=3, density=0.1),
    Shape(width=64, layers=3, context=64, batch=1, density=0.25, block=(4, 4)),
    Shape(width=96, layers=2, context=64, batch=2, density=0.25, block=(4, 1), precision="bf16"),
    Shape(width=96, layers=2, context=64, batch=2, precision="bf16"),
    Shape(width=96, layers=2, attention=32, context=64, batch=2),
    Shape(width=128, layers=1, attention=48, context=64, batch=2, density=0.25, block=(4, 4)),
]


@pytest.mark.parametrize("shape", NETWORKS, ids=str)
def test_what_is_held_between_steps_is_counted_exactly(shape):
    twin = make_network(shape)
    twin.train_step(Noise(shape), clip=1.0)
    counted = dataclasses.asdict(step_bytes(shape))
    assert counted.pop("activations") > 0 and counted.pop("working") > 0
    assert counted == training_bytes(twin.model, twin.optimizer)
    assert shape.nonzeros == sum(p.numel() for p in twin.model.parameters())


@pytest.mark.parametrize("shape", NETWORKS, ids=str)
def test_activations_are_as_a_real_step_keeps_them(shape):
    assert shape not in LOOKED_AT
    twin = make_network(shape)
    inputs, targets = Noise(shape).at(1)
    measured = kept_bytes(twin.model, lambda: twin.loss(twin.model, inputs, targets))
    assert activation_bytes(shape) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("batch, density, peak_mib", [(8, 1.0, 100), (32, 1.0, 311), (8, 0.1, 99), (32, 0.1, 273)])
def test_peaks_that_were_measured_are_given_back(batch, density, peak_mib):
    """tools/step_memory.py --width 128 --layers 2 --context 256 --batch 8|32 --threads 1 (rarefy.foresight.memory)."""
    shape = Shape(width=128, layers=2, heads=2, context=256, batch=batch, density=density)
    assert step_bytes(shape).peak / 2**20 == pytest.approx(peak_mib, rel=0.1)


def test_kept_tensors_are_counted_once_and_weights_are_not():
    layer = torch.nn.Linear(8, 4)
    x = torch.randn(16, 8, requires_grad=True)

    def forward():
        y = layer(x)
        return (y.exp() * y.exp()).sum()  # linear keeps x; exp its result, twice; the product the same two

    assert kept_bytes(layer, forward) == 4 * (16 * 8 + 2 * 16 * 4)


# -- steps ------------------------------------------------------------------------------------------------------------

TIMES = {  # milliseconds a unit, of the size that a machine shows
    "blocks": 1.2, "tokens": 1e-3, "attention": 7e-8, "scores": 1e-6, "features, dense": 5e-6, "features, sparse": 9e-6,
    "parameters, dense": 2e-6, "parameters, sparse": 6e-6, "linears, dense": 1.05, "linears, sparse": 0.9,
}  # fmt: skip


def test_a_step_model_finds_the_terms_that_made_its_steps():
    true = StepModel({"fp32": TIMES})
    model_of_layers = costs(dense=20.0)
    assert set(TIMES) == set(NAMES)

    def timed(shapes):
        known = [(shape, linears_ms(model_of_layers, shape)) for shape in shapes]
        return [TimedStep(shape, ms, true.of(shape, ms)) for shape, ms in known if ms is not None]

    model = fit_steps(timed(POINTS))
    assert model.fitted["worst_error"] < 0.01 and model.fitted["points"] == len(POINTS)
    for step in timed(HELD_OUT):
        assert model.ms(step.shape, model_of_layers) == pytest.approx(step.ms, rel=0.03)
    assert not set(POINTS) & set(HELD_OUT)


def test_a_step_is_shown_beside_its_prediction():
    shape = Shape(width=32, layers=1, attention=16, context=16, batch=2, density=0.25, block=(4, 4))
    model = StepModel({"fp32": {"blocks": 9.0}})
    line, error = check_steps.row(model, TimedStep(shape, linears=1.0, ms=10.0))
    assert line == "| 32, 1, 16, 16, 2 | 25%, 4x4 | fp32 | 9.0 | 10.0 | -10% |" and error == pytest.approx(-0.1)
    assert check_steps.structure(Shape(width=32, layers=1)) == "dense"


def test_what_was_not_timed_has_no_step_time():
    model = StepModel({"fp32": TIMES})
    assert model.ms(Shape(width=64, layers=1, precision="bf16"), costs()) is None
    assert model.ms(Shape(width=64, layers=1), CostModel({}, 0)) is None
    assert model.ms(Shape(width=64, layers=1), costs()) is not None


def test_steps_are_timed_and_the_model_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    few = (Shape(width=32, layers=1, context=16, batch=2), Shape(width=32, layers=1, context=16, batch=2, density=0.25))
    timed = time_steps(few, costs(), rounds=3)
    assert [step.shape for step in timed] == list(few) and all(step.ms > 0 and step.linears > 0 for step in timed)
    made = []

    def calibrate(model, **_):
        made.append(model)
        return fit_steps(timed, conditions=kept.step_conditions(model))

    monkeypatch.setattr(kept, "calibrate_steps", calibrate)
    assert kept.load_steps(costs()) is None
    first = step_model(costs())
    assert step_model(costs()) == first and len(made) == 1
    later = dataclasses.replace(costs(), fitted={"date": "tomorrow"})
    assert kept.load_steps(later) is None, "fitted with another cost model"
    kept.steps_path().write_text("{}")
    assert kept.load_steps(costs()) is None


@pytest.mark.parametrize(
    "change",
    [{"format": 0}, {"coefficients": {"fp32": {"blocks": -1.0}}}, {"coefficients": {"fp32": {"x": 1.0}}}],
    ids=str,
)
def test_what_is_no_step_model_is_refused(change):
    model = StepModel({"fp32": TIMES}, {"threads": 1}, {"date": "today"})
    assert StepModel.from_json(json.loads(json.dumps(model.to_json()))) == model
    with pytest.raises(ValueError):
        StepModel.from_json({**model.to_json(), **change})


# -- the choice -------------------------------------------------------------------------------------------------------

LAW = Law(
    E=0.6, A=120.0, B=90.0, spread=0.01, blocks={"4x4": 0.001},
    covers={
        "nonzeros": (1e4, 1e9), "tokens": (1e4, 1e12), "density": (0.1, 1.0), "layers": (2.0, 4.0),
        "attention": (1.0, 1.0), "tokens_per_step": (2048.0, 2048.0),
    },
)  # fmt: skip


def by_products(dense: float, sparse: float, four: float | None = None):
    """Step times of a machine where only products of weights and bytes take time: picoseconds of one, by structure."""

    def step_ms(shape: Shape) -> float | None:
        if shape.precision != "fp32":
            return None
        each = dense if shape.dense else sparse if shape.block == (1, 1) else four
        return None if each is None else each * 1e-9 * 3 * shape.tokens * shape.nonzeros

    return step_ms


def test_the_faster_sparse_products_are_the_likelier_sparse_wins():
    fast, slow = (choose(Wish(minutes=30), LAW, by_products(10.0, each)) for each in (10.0, 1000.0))
    assert fast.winner == "sparse" and slow.winner == "dense"
    assert fast.dense == slow.dense
    for choice in (fast, slow):
        assert choice.dense is not None and choice.sparse is not None and choice.difference is not None
        assert choice.difference == pytest.approx(choice.sparse.loss - choice.dense.loss)
        for one in (choice.dense, choice.sparse):
            assert one.steps == int(30 * 60e3 / one.step_ms) and one.tokens == 2048 * one.steps
            assert one.loss == pytest.approx(LAW.loss(one.point)) and one.outside == ()


def test_the_best_of_the_grid_is_chosen():
    """Against plain enumeration."""
    step_ms = by_products(10.0, 15.0, 12.0)
    choice = choose(Wish(minutes=3), LAW, step_ms)
    losses: dict[bool, list[float]] = {True: [], False: []}
    for layers in (2, 3, 4):
        for width in WIDTHS:
            for density, block in [(1.0, (1, 1)), *((s, b) for s in (0.5, 0.25, 0.1) for b in ((1, 1), (4, 4)))]:
                shape = Shape(width=width, layers=layers, density=density, block=block)
                ms = step_ms(shape)
                assert ms is not None
                if steps := int(180e3 / ms):
                    losses[shape.dense].append(LAW.loss(Point(shape.nonzeros, 2048 * steps, density, block, layers)))
    assert choice.dense is not None and choice.dense.loss == min(losses[True])
    assert choice.sparse is not None and choice.sparse.loss == min(losses[False])
    assert choice.considered == len(losses[True]) + len(losses[False])


def test_attention_is_as_wide_as_runs_were():
    law = dataclasses.replace(LAW, covers={**LAW.covers, "attention": (0.32, 1.0)})
    assert attention_widths(256, 4, law) == [256, 120] and attention_widths(320, 3, law) == [320, 144]
    assert attention_widths(96, 4, law) == [96, 64], "no head of fewer than 16 features"
    assert attention_widths(64, 4, law) == [64] and attention_widths(256, 4, LAW) == [256]
    narrow = dataclasses.replace(LAW, covers={**LAW.covers, "attention": (0.3, 0.5)})
    assert attention_widths(256, 4, narrow) == [120, 80]
    choice = choose(Wish(minutes=30), narrow, by_products(10.0, 10.0))
    assert choice.dense is not None and choice.dense.shape.attended < choice.dense.shape.width


def test_longer_budgets_want_larger_networks():
    sizes = [choose(Wish(minutes=minutes), LAW, by_products(10.0, 10.0)).dense for minutes in (1, 30, 900)]
    found = [one.shape.nonzeros for one in sizes if one is not None]
    assert len(found) == 3 and found == sorted(set(found))


def test_memory_is_a_limit():
    free = choose(Wish(minutes=30), LAW, by_products(10.0, 10.0))
    assert free.dense is not None and free.sparse is not None and free.too_large == 0
    limit = min(free.dense.memory.peak, free.sparse.memory.peak) - 1
    tight = choose(Wish(minutes=30, memory_bytes=limit), LAW, by_products(10.0, 10.0))
    assert tight.dense is not None and tight.sparse is not None and 0 < tight.too_large < tight.considered
    for one, before in ((tight.dense, free.dense), (tight.sparse, free.sparse)):
        assert one.memory.peak <= limit and one.loss > before.loss
    none = choose(Wish(minutes=30, memory_bytes=1), LAW, by_products(10.0, 10.0))
    assert none.too_large == none.considered and none.winner == "open"


def test_what_the_law_has_not_seen_is_said_or_left_out():
    seen = {**LAW.covers, "nonzeros": (1e4, 1e5)}
    choice = choose(Wish(minutes=30), dataclasses.replace(LAW, covers=seen), by_products(10.0, 10.0))
    assert choice.dense is not None and choice.dense.outside == ("nonzeros",)
    only = choose(Wish(minutes=30), LAW, by_products(10.0, 1000.0, 1.0))
    assert only.sparse is not None and only.sparse.shape.block == (4, 4)
    assert only.sparse.shape.layers in (2, 3, 4) and only.sparse.shape.batch == 8


@pytest.mark.parametrize("given, said", [({"minutes": 0}, "budget"), ({"minutes": 1, "memory_bytes": 0}, "memory")])
def test_no_time_and_no_memory_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        Wish(**given)
