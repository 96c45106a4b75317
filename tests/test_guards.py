"""Guard rails: each is triggered by what it is there for, and a healthy run triggers none."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rarefy
from rarefy import SET, Constant, Cosine, Method, Pattern, Plan, Rewirer, RigL, SparseLinear, Static, sparsify
from rarefy.cli.main import main
from rarefy.methods.base import _registry
from rarefy.report import build_report
from rarefy.rewiring import GUARDS, Guard, GuardWarning
from rarefy.rewiring.guards import (
    BEFORE,
    Collapse,
    Exploration,
    FrozenEnd,
    LossSpike,
    LossView,
    NeuronView,
    Newborns,
    PatternView,
    RunView,
    expected_tried,
)
from rewires import engine, layer_of, push
from rewires import step as step_of
from tiny import flags, one_thread, records, write_text

pytestmark = pytest.mark.filterwarnings("ignore::rarefy.GuardWarning")
__all__ = ["one_thread"]


def view(pattern: Pattern, **changes: Any) -> PatternView:
    given: dict[str, Any] = {"method": SET(), "rms": 1.0, "first_units": pattern.num_units, "first_rms": 1.0}
    return PatternView(pattern=pattern, **{**given, **changes})


def said(*, of: str, **seen: Any) -> dict[str, str]:
    """Guard -> message, of all that answer."""
    answers = {guard.name: getattr(guard, of)(*seen.values()) for guard in GUARDS}
    return {name: message for name, message in answers.items() if message}


HEALTHY = Pattern.random((64, 64), 0.2, generator=torch.Generator().manual_seed(0))


# -- a healthy run ----------------------------------------------------------------------------------------------------


def mlp(width: int = 64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, width), nn.ReLU(), nn.Linear(width, 32))


def train(model: nn.Module, rewirer: Rewirer, optimizer, steps: range, spike_at: int = -1) -> None:
    teacher = torch.randn(32, 32, generator=torch.Generator().manual_seed(9))
    for t in steps:
        x = torch.randn(64, 32, generator=torch.Generator().manual_seed(t))
        loss = (model(x) - torch.tanh(x @ teacher / 5)).pow(2).mean()
        loss.backward()
        rewirer.observe(loss.item() + (10.0 if t == spike_at else 0.0))
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("method", [RigL(interval=10), SET(interval=10), Static()], ids=lambda m: type(m).__name__)
def test_a_healthy_run_triggers_none(method: Method):
    model = mlp()
    rewirer = sparsify(model, Plan(density=0.3, method=method))
    assert rewirer.fused  # so the neurons between the layers are looked at too
    with warnings.catch_warnings():
        warnings.simplefilter("error", GuardWarning)
        optimizer = rarefy.AdamW(model.parameters(), lr=1e-2, ramp=5)
        rewirer.attach(optimizer, total_steps=200)
        train(model, rewirer, optimizer, range(1, 201))
    assert rewirer.warnings == []
    assert len(rewirer.history) == (29 if method.rewires else 0)


# -- of the run -------------------------------------------------------------------------------------------------------


def test_too_little_exploration_is_told_before_the_first_step_and_the_advice_works():
    def attached(method: Method) -> Rewirer:
        model = nn.Sequential(nn.Linear(200, 200), nn.Linear(200, 100))
        rewirer = sparsify(model, Plan(density=0.1, method=method))
        return rewirer.attach(torch.optim.SGD(model.parameters(), lr=0.1), total_steps=1000)

    with pytest.warns(GuardWarning, match=r"exploration: rewiring every 400 steps until step 750 of 1,000 steps"):
        (record,) = attached(SET(interval=400)).warnings
    assert (record["step"], record["layer"], record["guard"]) == (0, "", "exploration")
    advised = int(record["message"].partition("interval=")[2].split()[0])
    assert 1 <= advised < 400
    assert attached(SET(interval=advised)).warnings == []


def test_what_will_be_tried_is_what_random_growth_tries():
    """The expectation against the engine itself, over a layer large enough for the mean."""
    method = SET(interval=5, fraction=Cosine(start=0.5), end=75)
    layer = SparseLinear(200, 200, density=0.1)
    rewirer, optimizer = engine(layer, method)
    seen = layer.pattern.to_mask()
    first = seen.clone()
    for _ in range(80):
        push_nothing(layer)
        step_of(optimizer)
        seen |= layer.pattern.to_mask()
    tried = float(seen[~first].float().mean())
    assert tried == pytest.approx(expected_tried(method, rewirer.end, layer.num_units, 40_000), rel=0.03)


def push_nothing(layer: SparseLinear) -> None:
    layer.values.grad = torch.zeros_like(layer.values)


def test_exploration_needs_something_to_explore():
    assert expected_tried(Static(), 100, 10, 100) == 1.0
    assert expected_tried(SET(interval=10), 100, 100, 100) == 1.0
    assert expected_tried(SET(interval=200), 100, 10, 100) == 0.0
    never = Exploration().of_run(RunView(SET(interval=10, begin=90), 90, 100, [(1, 10_000)]))
    assert never is not None and "no interval is short enough" in never


def test_a_missing_frozen_end_is_told():
    guard = FrozenEnd()
    for end, total, speaks in ((1000, 1000, True), (2000, 1000, True), (950, 1000, True), (900, 1000, False)):
        message = guard.of_run(RunView(SET(), end, total, [(10, 100)]))
        assert (message is not None) == speaks
        assert message is None or "set end=750" in message
    assert guard.of_run(RunView(SET(), 1000, None, [(10, 100)])) is None
    assert guard.of_run(RunView(Static(), 1000, 1000, [(10, 100)])) is None


# -- of a layer -------------------------------------------------------------------------------------------------------


def test_dead_rows_and_columns_are_told():
    mask = HEALTHY.to_mask()
    mask[5] = False
    assert list(said(of="of_pattern", seen=view(Pattern.from_mask(mask)))) == ["dead rows"]
    mask = HEALTHY.to_mask()
    mask[:, [3, 60]] = False
    found = said(of="of_pattern", seen=view(Pattern.from_mask(mask)))
    assert list(found) == ["dead columns"] and "2 of 64 unit columns" in found["dead columns"]
    assert said(of="of_pattern", seen=view(HEALTHY)) == {}


def test_a_method_may_expect_empty_rows():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Ablates(SET):
        @property
        def expects_empty_rows(self) -> bool:
            return True

    mask = HEALTHY.to_mask()
    mask[5] = False
    pattern = Pattern.from_mask(mask)
    assert said(of="of_pattern", seen=view(pattern, method=Ablates())) == {}
    assert said(of="of_neurons", seen=NeuronView(Ablates(), pattern, HEALTHY)) == {}
    _registry.pop("ablates")


@pytest.mark.parametrize("block", [1, 4])
def test_dead_neurons_are_told(block):
    """A neuron without inputs, one without outputs, and one without both count once each."""
    up, down = torch.ones(16 * block, 16 * block, dtype=torch.bool), torch.ones(16 * block, 16 * block).bool()
    assert said(of="of_neurons", seen=NeuronView(SET(), *_patterns(up, down, block))) == {}
    up[: 2 * block] = False
    down[:, block : 3 * block] = False
    found = said(of="of_neurons", seen=NeuronView(SET(), *_patterns(up, down, block)))
    wanted = f"{3 * block} of {16 * block} hidden neurons are dead ({2 * block} read nothing, {2 * block} are read"
    assert list(found) == ["dead neurons"] and wanted in found["dead neurons"]


def _patterns(up: torch.Tensor, down: torch.Tensor, block: int) -> tuple[Pattern, Pattern]:
    return Pattern.from_mask(up, block), Pattern.from_mask(down, block)


def test_dead_neurons_of_a_fused_mlp_are_found_by_name():
    model = mlp(100)
    rewirer = sparsify(model, Plan(density=0.01, method=Static()))
    rewirer.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    assert {(r["layer"], r["guard"]) for r in rewirer.warnings} >= {("0", "dead neurons"), ("2", "dead columns")}


def test_layer_collapse_is_told_in_its_three_ways():
    few = Pattern.from_units(torch.tensor([0, 70, 140]), (64, 64))
    assert "3 units are left of 900" in str(Collapse().of_pattern(view(few, first_units=900)))
    assert Collapse().of_pattern(view(few)) is None  # it began that way: others speak of that
    assert "fell to a root mean square" in str(Collapse().of_pattern(view(HEALTHY, rms=1e-4)))
    assert Collapse().of_pattern(view(HEALTHY, rms=0.0, first_rms=0.0)) is None
    mask = torch.eye(64, dtype=torch.bool)
    assert Collapse().of_pattern(view(Pattern.from_mask(mask))) is None
    mask[:7] = True
    assert Collapse().of_pattern(view(Pattern.from_mask(mask))) is None  # 448 of 505 units: 89%
    mask[:7], mask[30:] = True, False
    assert "95% of the units are in 7 of 64 rows" in str(Collapse().of_pattern(view(Pattern.from_mask(mask))))


def test_newborns_that_never_survive_are_told():
    """Values that do not move leave every newborn at zero: it goes at the next rewire."""
    layer = SparseLinear(32, 32, density=0.3)
    rewirer, optimizer = engine(layer, SET(interval=2, fraction=Constant(0.3), end=100))
    for t in range(1, 9):
        assert not [r for r in rewirer.warnings if r["guard"] == "newborn survival"], t
        push_nothing(layer)
        step_of(optimizer)
    (record,) = [r for r in rewirer.warnings if r["guard"] == "newborn survival"]
    assert record["layer"] == "layer" and record["step"] == 8
    assert "0.0% were left at the layer's next rewire, 2 steps later" in record["message"]
    guard = Newborns()
    assert guard.of_pattern(view(HEALTHY, newborns=[(90, 0.3)] * 3)) is None
    assert guard.of_pattern(view(HEALTHY, newborns=[(90, 0.0)] * 2)) is None
    assert guard.of_pattern(view(HEALTHY, newborns=[(5, 0.0)] * 3)) is None
    assert guard.of_pattern(view(HEALTHY, newborns=[(900, 0.0), (1, 1.0), (1, 1.0)])) is not None


# -- of the loss ------------------------------------------------------------------------------------------------------


def test_a_loss_spike_is_a_rise_beyond_noise_and_five_percent():
    calm, noisy = [2.0] * BEFORE, [1.5, 2.5] * (BEFORE // 2)
    guard = LossSpike()
    for before, after, speaks in (
        (calm, [2.11] * 3, True),
        (calm, [2.09] * 3, False),
        (calm, [2.11] * 2, False),
        (calm[1:], [9.0] * 3, False),
        (noisy, [2.8] * 3, False),
        (noisy, [2.9] * 3, True),
        (noisy, [4.0, 2.0, 2.0], False),
    ):
        assert (guard.of_losses(LossView(before, after)) is not None) == speaks, (before[0], after)


def test_a_loss_spike_after_a_rewire_is_told_and_elsewhere_is_not():
    def run(spike_at: int) -> list[dict[str, Any]]:
        model = mlp()
        rewirer = sparsify(model, Plan(density=0.3, method=SET(interval=30, stagger=False)))
        optimizer = rarefy.AdamW(model.parameters(), lr=1e-2, ramp=5)
        rewirer.attach(optimizer, total_steps=100)
        train(model, rewirer, optimizer, range(1, 61), spike_at)
        return [record for record in rewirer.warnings if record["guard"] == "loss spike"]

    (record,) = run(32)
    assert (record["step"], record["layer"]) == (30, "")
    assert run(45) == [] and run(-1) == []


def test_losses_that_are_not_finite_are_passed_over():
    rewirer, _ = engine(layer_of({0: 1.0}, (2, 2)), SET(interval=1, end=5))
    before = rewirer.state_dict()["guards"]["losses"]
    rewirer.observe(float("nan"))
    rewirer.observe(torch.tensor(float("inf")))
    assert rewirer.state_dict()["guards"]["losses"] == before == []


# -- the engine -------------------------------------------------------------------------------------------------------


def test_growth_left_out_for_scores_that_are_not_finite_is_on_the_list():
    layer = layer_of({0: 1.0, 1: 2.0}, (2, 4))
    rewirer, optimizer = engine(layer, RigL(interval=1, fraction=Constant(0.5), end=9))
    for _ in range(3):
        push(layer, torch.full((8,), float("nan")))
        step_of(optimizer)
    found = [r for r in rewirer.warnings if r["guard"] == "skipped rewire"]
    assert len(found) == 1 and "not all finite" in found[0]["message"] and rewirer.skipped == 3


def test_each_guard_speaks_once_a_layer_and_warns_once():
    class Always(Guard):
        name = "always"

        def of_pattern(self, seen: PatternView) -> str:
            return "look"

    layers = {name: SparseLinear(8, 8, density=0.5) for name in "ab"}
    optimizer = torch.optim.SGD([p for layer in layers.values() for p in layer.parameters()], lr=0.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rewirer = Rewirer(layers, SET(interval=1, end=4), guards=[Always()]).attach(optimizer)
        for _ in range(4):
            for layer in layers.values():
                push_nothing(layer)
            step_of(optimizer)
    assert [str(w.message) for w in caught if w.category is GuardWarning] == ["always: a: look"]
    assert [(r["layer"], r["guard"], r["message"]) for r in rewirer.warnings] == [(n, "always", "look") for n in "ab"]


def test_warnings_are_the_same_after_save_and_load(tmp_path: Path):
    """A run that is saved between a rewire and the spike that follows says what the straight one says."""

    def build(steps: range, load: bool = False) -> Rewirer:
        model = mlp()
        rewirer = sparsify(model, Plan(density=0.3, method=SET(interval=30, stagger=False, end=90)))
        optimizer = rarefy.AdamW(model.parameters(), lr=1e-2, ramp=5)
        rewirer.attach(optimizer, total_steps=95)
        if load:
            rarefy.load_into(tmp_path / "saved.safetensors", model, rewirer=rewirer, optimizer=optimizer)
        train(model, rewirer, optimizer, steps, spike_at=33)
        rarefy.save(model, tmp_path / "saved.safetensors", rewirer=rewirer, optimizer=optimizer)
        return rewirer

    straight = build(range(1, 61))
    build(range(1, 33))
    resumed = build(range(33, 61), load=True)
    assert [r["guard"] for r in straight.warnings] == ["frozen end", "loss spike"]
    assert resumed.warnings == straight.warnings
    assert resumed.state_dict()["guards"] == straight.state_dict()["guards"]


# -- a text run -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
def test_a_text_run_shows_its_warnings_everywhere(tmp_path: Path, capsys):
    text, plan = write_text(tmp_path / "text.txt"), tmp_path / "plan.yaml"
    plan.write_text(Plan(density=0.3, method=SET(interval=6, end=12), keep_dense=("head",)).to_yaml())
    folder = tmp_path / "run"
    assert main(flags(text, "--run", str(folder), "--plan", str(plan), "--no-twin")) == 0
    shown = capsys.readouterr().out
    logged = {record["guard"]: record for record in records(folder, "guard")}
    assert "frozen end" in logged and logged["frozen end"]["step"] == 1 and logged["frozen end"]["twin"] == "sparse"
    assert shown.count("warning: frozen end: rewiring goes on until step 12 of 12") == 1  # as it happens
    assert "warning: step 1, frozen end: rewiring goes on until step 12 of 12" in shown  # at the end
    assert " warning" in shown.partition("step 12/12")[2].split("\n")[0]
    summary = json.loads((folder / "summary.json").read_text())
    assert "frozen end" in [record["guard"] for record in summary["twins"]["sparse"]["warnings"]]
    page = build_report(folder).read_text()
    assert "<b>frozen end</b>. rewiring goes on until step 12 of 12" in page
    assert "frozen after step 12" in page
