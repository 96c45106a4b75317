"""Races: who runs, in turn under one clock, who wins, and what is said of it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from rarefy.cli.main import main
from rarefy.cli.race import minutes_of
from rarefy.compare import TextTask, pace
from rarefy.compare.contenders import parse_contender, parse_contenders
from rarefy.compare.jobs import jobs
from rarefy.compare.run import Run
from rarefy.race import modes
from rarefy.race.course import SLICES, run_together
from rarefy.race.verdict import reached_s, verdict
from rarefy.recipes.execution import make_twin
from rarefy.recipes.text.networks import make_dense, make_sparse
from rarefy.report.race import sentences
from rarefy.training.subject import Metric
from tiny import cut_short, one_thread, settings, start, write_text

__all__ = ["one_thread"]
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::rarefy.GuardWarning")]

FLAGS = [
    "--width", "32", "--layers", "1", "--heads", "2", "--context", "16", "--batch", "2", "--eval-bytes", "64",
    "--evaluations", "8", "--threads", "1", "--no-try-compile",
]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def task(text) -> TextTask:
    return TextTask(settings(text, steps=None, measure=False))


def arguments(text: Path, out: Path, *more: str) -> list[str]:
    return ["race", "--data", str(text), "--out", str(out), *FLAGS, *more]


class Nobody:
    """A listener that does not listen."""

    def begin(self, job, place, count): ...
    def stepped(self, twin, result): ...
    def evaluated(self, twin, loss): ...
    def end(self, job, record): ...


# -- who runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said, minutes", [("90s", 1.5), ("10m", 10.0), ("1.5h", 90.0), ("3", 3.0), (" .5 m ", 0.5)])
def test_times_are_read(said, minutes):
    assert minutes_of("budget", said) == pytest.approx(minutes)


@pytest.mark.parametrize("budget", [1, 3, 10, 30, 90])
def test_both_sides_have_as_many_heats(task, budget):
    field = parse_contenders(task.field(budget), task)
    assert sum(one.dense for one in field) == sum(not one.dense for one in field)
    for one in field:
        assert one.settings.gpt().attended % one.settings.heads == 0


@pytest.mark.parametrize("heads", [1, 3, 5, 6, 32])
def test_who_runs_has_the_heads_that_were_asked_for(text, heads):
    task = TextTask(settings(text, steps=None, measure=False, width=64 * heads, heads=heads))
    for budget in (1, 30):
        assert {one.settings.gpt().heads for one in parse_contenders(task.field(budget), task)} == {heads}


@pytest.mark.parametrize(
    "more, said",
    [
        (["--budget", "soon"], "budget must be a time such as 90s, 10m or 1.5h, got 'soon'"),
        (["--budget", "0m"], "the budget must be positive, got 0 minutes"),
        (["--budget", "1m", "--finalists", "0"], "finalists must be at least 1, got 0"),
        (["--contenders", "dens"], "did you mean 'dense'"),
        (["--contenders", "dense", "static", "--seeds", "1", "1"], "1 is there twice"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(text, tmp_path, capsys, more, said):
    assert main(arguments(text, tmp_path / "out", *more)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rarefy: ")]
    assert len(lines) == 1 and said in lines[0]


# -- how they run ------------------------------------------------------------------------------------------------------


def test_bfloat16_is_of_activations_alone(text):
    ready = settings(text, precision="bf16").settled(5)
    seen: dict[str, torch.dtype] = {}
    for make in (lambda: make_dense(ready), lambda: make_sparse(ready, ready.plan)):
        twin = make()
        twin.model.register_forward_hook(lambda _, __, out: seen.update(logits=out.dtype))
        loss = twin.loss(twin.model, torch.zeros(2, 16, dtype=torch.int64), torch.zeros(2, 16, dtype=torch.int64))
        loss.backward()
        assert seen.pop("logits") == torch.bfloat16 and loss.dtype == torch.float32
        assert all(p.grad is not None and p.dtype == p.grad.dtype == torch.float32 for p in twin.model.parameters())


def test_a_network_is_compiled_where_asked(text, monkeypatch):
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: asked.append(how))
    plain = settings(text).settled(5)
    for way, times in ((None, 0), (False, 0), (True, 1)):
        before = make_dense(plain)
        make_twin("x", before.model, before.optimizer, None, before.loss, dataclasses.replace(plain, compile=way))
        assert len(asked) == times


@pytest.mark.parametrize(
    "seconds, chosen",
    [
        ([1.0, 0.9, 0.8, 0.7], {"precision": "bf16", "compile": True}),
        ([1.0, 0.9, 1.2, 1.1], {"precision": None, "compile": True}),
        ([1.0, 0.98, 0.99, 1.1], {"precision": None, "compile": None}),  # no mode is worth it
    ],
)
def test_the_fastest_mode_is_taken_and_kept(task, tmp_path, monkeypatch, seconds, chosen):
    asked = []
    monkeypatch.setattr(modes, "_time", lambda _, one, ways: asked.append(one.label) or seconds)
    field = parse_contenders(["dense", "static", "rigl:precision=fp32,compile=false"], task)
    for _ in range(2):
        found = modes.in_fastest_mode(tmp_path, task, field, lambda _: None, compiled=True)
        for one in found[:2]:
            assert {"precision": one.settings.precision, "compile": one.settings.compile} == chosen
        assert (found[2].settings.precision, found[2].settings.compile) == ("fp32", False)
    assert asked == ["dense", "static"]
    (tmp_path / modes.FILE).write_text("{}")
    with pytest.raises(ValueError, match=r"modes\.json is damaged"):
        modes.in_fastest_mode(tmp_path, task, field, lambda _: None, compiled=True)


def test_modes_are_timed(task):
    found = modes._fastest(task, parse_contender("static", task), compiled=False)
    assert set(found["seconds"]) == {"fp32", "bf16"} and all(taken > 0 for taken in found["seconds"].values())


def test_all_are_as_far_as_each_other(task, tmp_path, monkeypatch):
    """Whatever their numbers of steps, no two are ever further apart than a slice of either."""
    steps = {"dense": 500, "static": 23, "set": 120}
    found = jobs(task, parse_contenders(list(steps), task), [0], lambda one: steps[one.label])
    way: dict[str, float] = {}
    true = Run.go_on

    def go_on(run: Run, stop: Any) -> None:
        true(run, stop)
        way[run.job.label] = run.progress
        slices = {label: max(1, round(n / SLICES)) / n for label, n in steps.items()}
        if len(way) == len(steps):
            assert max(way.values()) - min(way.values()) <= max(slices.values()) + 1e-9

    monkeypatch.setattr(Run, "go_on", go_on)
    records = run_together(task, found, tmp_path, Nobody())
    assert [records[job.digest]["steps_taken"] for job in found] == list(steps.values())
    monkeypatch.setattr(Run, "__init__", None)
    assert run_together(task, found, tmp_path, Nobody()) == records  # what has been run is not run again


def unclocked(out: Path) -> dict[str, Any]:
    records = {path.name: json.loads(path.read_text()) for path in (out / "runs").glob("*.json")}
    return {name: {k: v for k, v in record.items() if k != "clock"} for name, record in records.items()}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_race_cut_short_goes_on_to_the_same_end(text, tmp_path, number):
    more = ["--contenders", "dense", "set:interval=3", "--budget", "2s", "--checkpoint-s", "0", "--no-report"]
    straight, out = tmp_path / "straight", tmp_path / "out"
    assert main(arguments(text, straight, *more)) == 0
    out.mkdir()
    for kept in ("pace.json", "modes.json"):  # so that both have the same steps
        shutil.copy(straight / kept, out)
    process = start(arguments(text, out, *more), tmp_path)
    cut_short(process, number, lambda: len(list(out.glob("partial/*/latest.json"))) == 2)
    assert not unclocked(out)
    assert main(arguments(text, out, *more)) == 0
    assert unclocked(out) == unclocked(straight) and len(unclocked(out)) == 2


def test_what_was_rehearsed_at_length_is_kept(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pace, "LEAST_S", 0.0)
    monkeypatch.setattr(pace, "REHEARSED", 0.5)
    more = ["--contenders", "dense", "set:interval=3", "--budget", "1s", "--no-report", "--json"]
    given = arguments(text, tmp_path, *more)
    assert main(given) == 0
    first = json.loads(capsys.readouterr().out)
    keys = list(json.loads((tmp_path / "pace.json").read_text())["paces"])
    assert len(keys) == 4 and [key.endswith("-0.5s") for key in keys] == [False, False, True, True]
    monkeypatch.setattr(pace, "rehearse", None)
    assert main(given) == 0
    assert json.loads(capsys.readouterr().out) == first


def test_heats_choose_the_finalists(text, tmp_path, capsys):
    out = tmp_path / "out"
    field = ["dense:width=16", "dense", "static", "static:block=4", "set:interval=3", "set:interval=5"]
    given = arguments(text, out, "--contenders", *field, "--heats", "0.5s", "--budget", "1s", "--json")
    assert main(given) == 0
    shown = capsys.readouterr()
    data = json.loads(shown.out)
    assert data == json.loads((out / "race.json").read_text())
    heats = {row["label"]: row["final"]["mean"] for row in data["heats"]["table"]["rows"]}
    assert list(heats) == field and data["heats"]["budget"]["amount"] == pytest.approx(0.5 / 60)
    lengths = [len(json.loads(path.read_text())["curve"]["loss"]) for path in (out / "runs").glob("*.json")]
    assert sorted(lengths)[: len(field)] == [1] * len(field)  # heats are evaluated at their end alone
    assert min(sorted(lengths)[len(field) :]) > 1
    final = [row["label"] for row in data["table"]["rows"]]
    kinds = (field[:2], field[2:4], field[4:])
    assert final[:3] == [min(kind, key=heats.__getitem__) for kind in kinds]
    best = min(final[1:3], key=heats.__getitem__)
    assert final[3:] == [f"small-dense of {best}"]
    assert data["verdict"]["winner"] in ("sparse", "dense")
    assert sentences(data)[0] in " ".join(shown.err.split())
    assert main(given) == 0  # nothing is run again, and the same is said
    assert json.loads(capsys.readouterr().out) == data
    page = out / "race.html"
    written = page.read_text()
    assert "default-src 'none'" in written and "Made by rarefy race." in written and sentences(data)[0] in written
    page.unlink()
    assert main(["report", str(out)]) == 0
    assert page.read_text() == written


# -- who wins ----------------------------------------------------------------------------------------------------------


BITS, POINTS = Metric("bits", "bits", higher_is_better=False), Metric("bits", "bits", higher_is_better=True)


def record(dense: bool, seed: int, curve: list[tuple[float, float | None]], state: str = "finished") -> dict[str, Any]:
    return {
        "dense": dense, "seed": seed, "state": state, "final": curve[-1][1], "curve": {"bits": [y for _, y in curve]},
        "clock": {"curve_s": [x for x, _ in curve], "train_s": curve[-1][0]},
    }  # fmt: skip


@pytest.mark.parametrize(
    "curve, target, seconds",
    [
        ([(10, 3.0), (20, 2.0)], 2.5, 15),
        ([(10, 3.0), (20, 2.0)], 2.0, 20),
        ([(10, 3.0), (20, 2.0)], 3.5, 10),  # before the first evaluation no one looked
        ([(10, 3.0), (20, 2.0)], 1.9, None),
        ([(10, 3.0), (20, None), (30, 2.0)], 2.5, 20),
        ([(10, 3.0), (20, 2.0), (30, 2.5)], 2.0, 20),
    ],
)
def test_when_a_loss_was_reached(curve, target, seconds):
    assert reached_s(record(False, 0, curve), BITS, target) == seconds
    flipped = [(x, None if y is None else -y) for x, y in curve]
    assert reached_s(record(False, 0, flipped), POINTS, -target) == seconds


def test_a_curve_of_a_part_is_moved_to_where_all_have_its_end():
    of_all = {**record(False, 0, [(10, 3.0), (20, 2.0)]), "final": 2.5}
    assert reached_s(of_all, BITS, 3.0) == 15 and reached_s(of_all, BITS, 2.5) == 20
    assert reached_s(of_all, BITS, 2.4) is None


def won(runs: dict[str, list[dict[str, Any]]]):
    return verdict(runs, BITS)


def test_sparse_wins_by_so_much():
    found = won(
        {
            "dense": [record(True, seed, [(50, 3.0), (100, 2.0 + seed / 100)]) for seed in (0, 1)],
            "wide": [record(True, seed, [(50, 3.0), (100, 2.5)]) for seed in (0, 1)],
            "static": [record(False, seed, [(50, 3.0), (100, 2.2)]) for seed in (0, 1)],
            "set": [record(False, seed, [(40, 2.2), (80, 1.8 + seed / 100)]) for seed in (0, 1)],
        }
    )
    assert (found.winner, found.best_dense, found.best_sparse) == ("sparse", "dense", "set")
    assert found.difference == {"mean": pytest.approx(-0.2), "spread": pytest.approx(0, abs=1e-9), "count": 2}
    assert found.shares["static"] is None and found.reverse is None
    first, second = 60 / 100, (40 + 40 * (2.2 - 2.01) / (2.2 - 1.81)) / 100
    share = found.shares["set"]
    assert share is not None and share["mean"] == pytest.approx((first + second) / 2)


def test_dense_wins_and_by_how_much():
    found = won(
        {"dense": [record(True, 0, [(50, 2.0), (100, 1.5)])], "set": [record(False, 0, [(50, 2.5), (100, 1.9)])]}
    )
    assert found.winner == "dense" and found.shares == {"set": None}
    assert found.reverse is not None and found.reverse["mean"] == pytest.approx(0.6)


def test_neither_wins_within_the_spread_and_none_without_both_sides():
    dense = [record(True, seed, [(100, 2.0)]) for seed in (0, 1, 2)]
    sparse = [record(False, seed, [(100, 2.0 + by)]) for seed, by in enumerate((-0.1, 0.05, 0.03))]
    assert won({"dense": dense, "set": sparse}).winner == "neither"
    broken = [record(False, 0, [(100, None)], state="diverged")]
    assert won({"dense": dense, "set": broken}).winner == "open"


def test_what_has_fewer_seeds_is_not_the_best():
    dense = [record(True, seed, [(100, 2.0)]) for seed in (0, 1)]
    lucky = [record(False, 0, [(100, 1.0)]), record(False, 1, [(100, None)], state="diverged")]
    steady = [record(False, seed, [(100, 1.5)]) for seed in (0, 1)]
    assert won({"dense": dense, "lucky": lucky, "steady": steady}).best_sparse == "steady"


@pytest.mark.parametrize(
    "runs, said",
    [
        (
            {"d": [record(True, 0, [(50, 3.0), (100, 2.0)])], "s": [record(False, 0, [(50, 2.0), (100, 1.5)])]},
            ["Sparse wins here: s is as good as the best dense network, d, in 0.50 of its time, "
             "and ends 0.500 bits ahead.",
             "s ends at 1.500, d at 2.000 bits; difference -0.500."],
        ),
        (
            {"d": [record(True, 0, [(50, 2.0), (100, 1.0)])], "s": [record(False, 0, [(50, 2.5), (100, 1.5)])]},
            ["Dense wins here: d is as good as the best sparse network, s, in 0.75 of its time, "
             "and ends 0.500 bits ahead.",
             "s ends at 1.500, d at 1.000 bits; difference +0.500."],
        ),
        (
            {"d": [record(True, 0, [(100, 1.0)])], "s": [record(False, 0, [(100, 1.0)])]},
            ["Neither wins here: s and d end level.", "s ends at 1.000, d at 1.000 bits; difference +0.000."],
        ),
        ({"d": [record(True, 0, [(100, 1.0)])]}, ["No verdict: no sparse network finished."]),
        (
            {"d": [record(True, 0, [(100, 1.0)])], "s": [record(False, 1, [(100, 1.0)])]},
            ["No verdict: s and d have no seed that both finished."],
        ),
    ],
)  # fmt: skip
def test_the_verdict_in_words(runs, said):
    rows = [
        {"label": label, "final": {"mean": found[0]["final"], "spread": None, "count": 1}}
        for label, found in runs.items()
    ]
    metric = {"title": "bits", "percent": False, "higher_is_better": False}
    assert sentences({"verdict": dataclasses.asdict(won(runs)), "table": {"rows": rows}, "metric": metric}) == said
