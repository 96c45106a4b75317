"""Comparisons: who competes, what names a run, what is equal, what is kept, what is said."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import signal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import check_report  # pyright: ignore[reportMissingImports]  (tools/, which pytest puts on the path)
from rarefy.cli.main import main
from rarefy.compare import Comparison, Equal, ImagesTask, TextTask, compare, pace
from rarefy.compare.contenders import parse_contender, parse_contenders
from rarefy.compare.jobs import Job, jobs, make_job
from rarefy.compare.pace import Pace, num_rewires, steps_of
from rarefy.compare.records import flops_at, num_nonzeros
from rarefy.compare.rehearsal import REHEARSAL, TURNS
from rarefy.compare.table import make_table, mean_and_spread
from rarefy.methods import SET
from rarefy.recipes.images import ImageSettings
from rarefy.report.comparison import best, build_comparison, disturbed, headline
from rarefy.report.comparison_figures import mean_curve
from rarefy.schedules import Constant
from rarefy.training.twin import Twin
from tiny import SHAPE, cut_short, one_thread, settings, start, write_images, write_text

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

FLAGS = [
    "--width", "32", "--layers", "1", "--heads", "2", "--context", "16", "--batch", "2", "--eval-bytes", "64",
    "--eval-interval", "4", "--threads", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def task(text) -> TextTask:
    return TextTask(settings(text, steps=None, measure=False))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "set")


def arguments(text: Path, out: Path, *more: str, steps: int = 12) -> list[str]:
    return ["compare", "text", "--data", str(text), "--out", str(out), "--steps", str(steps), *FLAGS, *more]


def failure(capsys, given: list[str]) -> str:
    assert main(given) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("rarefy: ") and "warning" not in line]
    return line


def kept(out: Path) -> dict[str, dict[str, Any]]:
    """Name -> record."""
    return {path.name: json.loads(path.read_text()) for path in sorted((out / "runs").glob("*.json"))}


def unclocked(out: Path) -> dict[str, bytes]:
    """Name -> the record's bytes, but for what follows the clock."""
    return {
        name: json.dumps({key: value for key, value in record.items() if key != "clock"}, indent=1).encode()
        for name, record in kept(out).items()
    }


# -- who competes ------------------------------------------------------------------------------------------------------


def test_a_contender_says_fields_of_its_method_plan_and_recipe(task):
    found = parse_contender("set:interval=7,fraction=0.5,density=0.2,block=[4,1],sparse_lr=0.01", task)
    settled = found.settled(3, 40)
    assert settled.plan.method == SET(interval=7, fraction=Constant(0.5))
    assert (settled.plan.density, settled.plan.block, settled.plan.seed) == (0.2, (4, 1), 3)
    assert (settled.sparse_lr, settled.seed, settled.steps) == (0.01, 3, 40)
    assert found.label == "set:interval=7,fraction=0.5,density=0.2,block=[4,1],sparse_lr=0.01"


def test_a_preset_is_the_class_method_of_that_name(task):
    assert parse_contender("set.itop", task).settled(0, 40).plan.method == SET.itop()
    assert parse_contender("set.itop:interval=9", task).settled(0, 40).plan.method == SET.itop(interval=9)


@pytest.mark.parametrize("name, interval", [("rigl", 20), ("rigl:interval=100", 100), ("rigl.paper", 100)])
def test_an_interval_that_nobody_gave_follows_from_the_length(task, name, interval):
    assert parse_contender(name, task).settled(0, 400).plan.method.interval == interval


def test_a_shared_interval_is_everybodys(text):
    task = TextTask(settings(text, steps=None, interval=8))
    assert parse_contender("set", task).settled(0, 400).plan.method.interval == 8
    assert parse_contender("set:interval=5", task).settled(0, 400).plan.method.interval == 5


def test_a_plan_file_competes_under_its_name(task, tmp_path):
    (tmp_path / "mine.yaml").write_text("density: 0.3\nmethod: set\nkeep_dense: [head]\n")
    found = parse_contender(str(tmp_path / "mine.yaml"), task)
    assert (found.label, found.settled(0, 10).plan.density, found.dense) == ("mine", 0.3, False)


def test_small_dense_has_about_as_many_weights(text, images):
    for task in (
        TextTask(settings(text, width=128, steps=None)),
        TextTask(settings(text, width=128, attention=32, mlp=600, steps=None)),
        ImagesTask(ImageSettings(data=str(images), batch=16)),
    ):
        nonzeros = {
            name: num_nonzeros(task.make(parse_contender(name, task).settled(0, 9), dense=name != "static"))
            for name in ("static", "dense", "small-dense")
        }
        assert nonzeros["dense"] > 1.5 * nonzeros["static"]
        assert 0.85 < nonzeros["small-dense"] / nonzeros["static"] < 1.15


@pytest.mark.parametrize(
    "plans, said",
    [
        ([], "which plans"),
        (["rigll"], "did you mean 'rigl'"),
        (["dens"], "did you mean 'dense'"),
        (["set", "set"], "'set' is there twice"),
        (["set:intervall=3"], "did you mean 'interval'"),
        (["set:interval=0"], "interval must be at least 1"),
        (["set:interval=x"], "interval"),
        (["set:interval"], "write settings like set:interval=200"),
        (["set:fraction=[1]"], "expected the name of a schedule"),
        (["set.itopp"], "did you mean 'itop'"),
        (["static.itop"], "it has no presets"),
        (["dense:density=0.1,batc=3"], "did you mean 'batch'"),
        (["nowhere.yaml"], "nowhere.yaml cannot be read as a plan"),
        (["set:seed=3"], "there is no 'seed'"),
    ],
)
def test_what_is_no_contender_is_refused(task, plans, said):
    with pytest.raises(ValueError, match=said.replace("'", "['\"]").replace("[4", "\\[4")):
        parse_contenders(plans, task)


# -- what names a run --------------------------------------------------------------------------------------------------


def digest(task: TextTask, name: str = "set", seed: int = 0, steps: int = 20) -> str:
    return make_job(task, parse_contender(name, task), seed, steps).digest


def with_base(text: Path, **changes: Any) -> TextTask:
    return TextTask(settings(Path(changes.pop("data", text)), **{"steps": None, **changes}))


def test_a_digest_is_of_what_defines_the_run_and_of_nothing_else(task, text, tmp_path):
    same = digest(task)
    copy = write_text(tmp_path / "elsewhere.txt")
    for changes in ({"threads": 3}, {"checkpoint_s": 1.0}, {"dense_lr": 0.5}, {"data": str(copy)}, {"measure": True}):
        assert digest(with_base(text, **changes)) == same, changes
    assert digest(task, "set:interval=10") == same  # said, and by the length of the run
    others = [
        digest(task, seed=1), digest(task, steps=21), digest(task, "rigl"), digest(task, "set:interval=11"),
        digest(task, "dense"), digest(with_base(text, lr=0.1)), digest(with_base(text, eval_interval=5)),
        digest(with_base(write_text(tmp_path / "other.txt", seed=1))),
    ]  # fmt: skip
    assert len({same, *others}) == len(others) + 1


def test_a_dense_run_does_not_depend_on_how_the_others_are_sparse(task, text):
    assert digest(with_base(text, density=0.5, sparse_lr=1.0, optimizer="torch"), "dense") == digest(task, "dense")
    assert digest(with_base(text, dense_lr=1.0), "dense") != digest(task, "dense")


def test_a_setting_that_is_off_changes_no_digest(task):
    job = make_job(task, parse_contender("set", task), 0, 20)
    assert "mlp" in {field.name for field in dataclasses.fields(job.settings)}
    assert None not in job.defines["settings"].values() and "mlp" not in job.defines["settings"]


def test_seeds_and_runs_are_there_once(task):
    contenders = parse_contenders(["set", "set:interval=10"], task)
    for seeds, said in (([], "which seeds"), ([0, 1, 0], "seeds: 0 is there twice"), ([0], "mean the same run")):
        with pytest.raises(ValueError, match=said):
            jobs(task, contenders, seeds, lambda _: 20)
    order = [(job.seed, job.label) for job in jobs(task, parse_contenders(["set", "rigl"], task), [1, 0], lambda _: 20)]
    assert order == [(1, "set"), (1, "rigl"), (0, "set"), (0, "rigl")]


# -- what is equal -----------------------------------------------------------------------------------------------------


def test_steps_follow_from_the_budget(task):
    static, rigl = parse_contenders(["static", "rigl:interval=10"], task)
    slow = Pace(step_s=0.5, rewire_s=0.25, step_flops=1000.0, rewire_flops=300.0, layers=4)
    paces = {"static": dataclasses.replace(slow, rewire_s=0, rewire_flops=0), "rigl:interval=10": slow}
    assert steps_of(Equal(by="steps", amount=70), {}, rigl) == 70
    assert steps_of(Equal(by="minutes", amount=1), paces, static) == 120
    assert steps_of(Equal(by="flops", amount=1e5), paces, static) == 100
    for budget, each, rewire in (
        (Equal(by="minutes", amount=1), 0.5, 0.25),
        (Equal(by="flops", amount=6e4), 1e3, 300),
    ):
        limit = 60 if budget.by == "minutes" else 6e4
        steps = steps_of(budget, paces, rigl)
        spent = [n * each + num_rewires(rigl, n, 4) * rewire for n in (steps, steps + 1)]
        assert spent[0] <= limit < spent[1]
    assert steps_of(Equal(by="minutes", amount=1e-9), paces, rigl) == 1


def test_rewires_are_counted_as_the_engine_makes_them(task):
    contender = parse_contender("set:interval=5", task)
    settled = contender.settled(0, 60)
    twin = task.make(settled, dense=False)
    assert twin.rewirer is not None
    made = sum(len(twin.rewirer.due(t)) for t in range(1, 61))
    assert abs(made - num_rewires(contender, 60, len(twin.rewirer.layers))) <= len(twin.rewirer.layers)
    assert num_rewires(parse_contender("dense", task), 60, 4) == 0


def test_paces_are_measured_once_and_newcomers_scaled_to_them(task, tmp_path, monkeypatch):
    asked = []

    def rehearse(task, contenders):
        asked.append([contender.label for contender in contenders])
        busy = float(len(asked))  # the machine is slower each time
        return {
            c.label: Pace(step_s=busy, rewire_s=0.5 * busy, step_flops=1, rewire_flops=0, layers=1) for c in contenders
        }

    monkeypatch.setattr(pace, "rehearse", rehearse)
    two = parse_contenders(["static", "set"], task)
    three = parse_contenders(["rigl", "set", "static"], task)
    first = pace.paces(tmp_path, task, two, lambda line: None)
    assert pace.paces(tmp_path, task, two, lambda line: None) == first
    joined = pace.paces(tmp_path, task, three, lambda line: None)
    assert asked == [["static", "set"], ["rigl", "set"]]
    assert {label: joined[label] for label in first} == first
    assert (joined["rigl"].step_s, joined["rigl"].rewire_s) == (1.0, 0.5)
    (tmp_path / pace.FILE).write_text("{}")
    with pytest.raises(ValueError, match=r"pace\.json is damaged"):
        pace.paces(tmp_path, task, two, lambda line: None)


def test_a_rehearsal_times_everybody_and_counts_flops(task):
    found = pace.rehearse(task, parse_contenders(["static", "rigl", "dense"], task))
    model = task.make(parse_contender("static", task).settled(0, 9), dense=False).model
    assert found["static"].step_flops == found["rigl"].step_flops == 32 * task.flops_per_token(model)
    assert found["dense"].step_flops > found["static"].step_flops
    assert all(one.step_s > 0 for one in found.values())
    assert (found["static"].rewire_s, found["dense"].rewire_flops, found["static"].rewire_flops) == (0, 0, 0)
    sizes = [32 * 96, 32 * 32, 32 * 128, 128 * 32]
    assert found["rigl"].rewire_flops == pytest.approx(2 * 32 * sum(sizes) / 4) and found["rigl"].layers == 4


def test_rehearsals_grow_with_a_budget_of_time_and_are_kept_by_length(task, tmp_path, monkeypatch):
    assert Equal(by="minutes", amount=10).rehearsed_s == pytest.approx(18)
    assert Equal(by="minutes", amount=1).rehearsed_s == 0 == Equal(by="flops", amount=1e15).rehearsed_s
    asked: list[dict[str, int | None]] = []

    def rehearse(task, contenders, steps=None):
        asked.append({c.label: None if steps is None else steps[c.label] for c in contenders})
        busy = float(len(asked))
        each = {"static": 0.01, "set": 0.5, "rigl": 0.02}
        return {
            c.label: Pace(step_s=busy * each[c.label], rewire_s=0, step_flops=1, rewire_flops=0, layers=1)
            for c in contenders
        }

    def found(labels: list[str], seconds: float) -> dict[str, float]:
        kept = pace.paces(tmp_path, task, parse_contenders(labels, task), lambda line: None, seconds=seconds)
        return {label: one.step_s for label, one in kept.items()}

    monkeypatch.setattr(pace, "rehearse", rehearse)
    long = found(["static", "set"], 18)
    assert asked == [{"static": None, "set": None}, {"static": 1800, "set": REHEARSAL}]
    assert long == {"static": 0.02, "set": 1.0}
    assert found(["static", "set"], 18) == long and len(asked) == 2
    assert found(["static", "set"], 0) == {"static": 0.01, "set": 0.5} and len(asked) == 2
    assert found(["static", "set"], 36) == {"static": 0.03, "set": 1.5} and len(asked) == 3
    assert found(["static", "set"], 18) == long and len(asked) == 3  # other budgets change nothing
    joined = found(["rigl", "static"], 18)
    assert asked[3:] == [{"rigl": None, "static": None}, {"rigl": 900, "static": 1800}]
    assert joined == {"rigl": pytest.approx(0.04), "static": 0.02}  # as fast as it would have been with the others


def test_rehearsals_take_turns_and_rewire_as_often_whatever_their_length(task, monkeypatch):
    steps = {"set": 96, "dense": 480}
    taken = {"sparse": 0, "dense": 0}
    rewired: list[int] = []
    true = Twin.train_step

    def train_step(twin, *given, **more):
        result = true(twin, *given, **more)
        taken[twin.name] += 1
        rewired.extend([twin.step] if result.rewires else [])
        assert abs(taken["sparse"] / steps["set"] - taken["dense"] / steps["dense"]) <= 1 / TURNS + 1e-9
        return result

    monkeypatch.setattr(Twin, "train_step", train_step)
    found = pace.rehearse(task, parse_contenders(list(steps), task), steps)
    assert taken == {"sparse": 96, "dense": 480}
    assert rewired == [8 * n for n in range(1, 9)]  # before three quarters of its steps
    assert found["set"].step_s > 0 and found["set"].layers == 4


# -- what is kept ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory, text) -> Path:
    """A comparison that nothing disturbed."""
    threads = torch.get_num_threads()
    out = tmp_path_factory.mktemp("made") / "out"
    plans = ["--plans", "static", "set:interval=3", "rigl:interval=3", "dense"]
    assert main(arguments(text, out, *plans, "--seeds", "0", "1")) == 0
    torch.set_num_threads(threads)
    return out


def test_a_record_says_all_that_a_run_did(made):
    records = kept(made)
    assert len(records) == 8 and list((made / "partial").iterdir()) == [made / "partial" / ".lock"]
    by = {(record["label"], record["seed"]): record for record in records.values()}
    rigl, static, dense = by["rigl:interval=3", 0], by["static", 0], by["dense", 0]
    assert rigl["curve"]["step"] == [4, 8, 12] and rigl["final"] == rigl["curve"]["bits_per_byte"][-1]
    assert rigl["final"] == pytest.approx(rigl["curve"]["loss"][-1] / math.log(2))
    assert rigl["nonzeros"][0] == rigl["nonzeros"][1] == static["nonzeros"][0] < dense["nonzeros"][0]
    assert rigl["pattern"]["rewires"] > 0 and rigl["pattern"]["exploration"] > static["pattern"]["exploration"]
    assert dense["pattern"] is None and static["pattern"]["rewires"] == 0
    assert static["flops"] == 12 * 32 * static["flops_per_token"][0] == rigl["flops"] - rigl["rewire_flops"]
    assert rigl["rewire_flops"] > 0
    assert len(rigl["clock"]["curve_s"]) == 3 and rigl["clock"]["machine"]["threads"] == 1
    assert rigl["settings"]["plan"]["method"]["interval"] == 3 and "data" not in rigl["settings"]
    assert not any("/" in json.dumps(record["data"]) for record in records.values())


def test_what_has_been_made_is_not_made_again(made, text, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in (made / "runs").iterdir()}
    monkeypatch.setattr("rarefy.compare.schedule.run_job", None)
    plans = ["--plans", "static", "set:interval=3", "rigl:interval=3", "dense"]
    assert main(arguments(text, made, *plans, "--seeds", "0", "1")) == 0
    assert {path: path.stat().st_mtime_ns for path in (made / "runs").iterdir()} == before


def test_a_seed_or_a_plan_more_makes_only_what_is_missing(made, text, tmp_path, monkeypatch):
    from rarefy.compare import schedule

    out = tmp_path / "out"
    shutil.copytree(made, out)
    begun = []
    true = schedule.run_job
    monkeypatch.setattr(
        schedule, "run_job", lambda t, job, *rest: begun.append((job.label, job.seed)) or true(t, job, *rest)
    )
    assert main(arguments(text, out, "--plans", "static", "dense", "--seeds", "1", "2", "0")) == 0
    assert begun == [("static", 2), ("dense", 2)]
    assert main(arguments(text, out, "--plans", "static", "set:interval=4", "--seeds", "0")) == 0
    assert begun[2:] == [("set:interval=4", 0)]
    assert unclocked(made).items() <= unclocked(out).items()


def test_another_label_for_the_same_run_takes_it_over(made, text, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(made, out)
    (tmp_path / "mine.yaml").write_text("density: 0.1\nmethod: {name: set, interval: 3}\nkeep_dense: [head]\n")
    assert main(arguments(text, out, "--plans", str(tmp_path / "mine.yaml"), "--seeds", "0")) == 0
    assert len(kept(out)) == len(kept(made))


def second_run_is_at(out: Path, step: int) -> bool:
    """Whether a run is kept, and another one has logged that step."""
    done = {record["digest"] for record in kept(out).values()}
    going = [path for path in out.glob("partial/*/metrics.jsonl") if path.parent.name not in done]
    return bool(done and going) and f'"step": {step},' in going[0].read_text()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_comparison_cut_short_goes_on_to_the_same_bytes(text, tmp_path, number):
    plans = ["--plans", "set:interval=3", "rigl:interval=3", "--seeds", "1", "--checkpoint-s", "0"]
    straight, out = tmp_path / "straight", tmp_path / "out"
    assert main(arguments(text, straight, *plans, "--no-report", steps=150)) == 0
    process = start(arguments(text, out, *plans, "--no-report", steps=150), tmp_path)
    cut_short(process, number, lambda: second_run_is_at(out, 23))
    (partial,) = (path for path in (out / "partial").iterdir() if path.is_dir())
    assert len(kept(out)) == 1 and (partial / "latest.json").is_file()
    assert main(arguments(text, out, *plans, "--no-report", steps=150)) == 0
    assert unclocked(out) == unclocked(straight)
    assert list((out / "partial").iterdir()) == [out / "partial" / ".lock"]


def test_several_at_once_make_the_same(made, text, tmp_path):
    out = tmp_path / "out"
    plans = ["--plans", "static", "rigl:interval=3", "--seeds", "1", "--jobs", "2"]
    assert main(arguments(text, out, *plans)) == 0
    assert unclocked(out).items() <= unclocked(made).items() and len(kept(out)) == 2


def test_a_diverged_run_is_kept_and_ends_no_other(text, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    plans = ["--plans", "static", "static:sparse_lr=1e30,clip=0", "--seeds", "0", "1", "--json"]
    assert main(arguments(text, out, *plans)) == 0
    rows = {row["label"]: row for row in json.loads(capsys.readouterr().out)["table"]["rows"]}
    lost = rows["static:sparse_lr=1e30,clip=0"]
    assert (lost["diverged"], lost["final"], lost["difference"]) == (2, None, None)
    assert rows["static"]["final"]["count"] == 2 and "seed 0" in lost["messages"][0]
    record = next(record for record in kept(out).values() if record["state"] == "diverged")
    assert record["final"] is None and record["steps_taken"] < 12 and "step" in record["message"]
    assert "diverged" in (out / "compare.html").read_text()
    monkeypatch.setattr("rarefy.compare.schedule.run_job", None)  # it would diverge again: not tried
    assert main(arguments(text, out, *plans)) == 0


def test_a_loss_that_only_held_out_data_shows_to_be_no_number(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("rarefy.training.twin.Twin.assess", lambda self, windows: {"loss": math.nan})
    assert main(arguments(text, tmp_path / "out", "--plans", "static", "--seeds", "0")) == 0
    (record,) = kept(tmp_path / "out").values()
    assert (record["state"], record["final"]) == ("diverged", None)
    assert "the loss on held-out data is not a number at step 12" in capsys.readouterr().out


def test_a_run_that_breaks_is_told_of_and_tried_again(text, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    plans = ["--plans", "set:interval=3", "static", "--seeds", "0"]

    def broken(self, view):
        raise RuntimeError("no scores today")

    with monkeypatch.context() as patch:
        patch.setattr(SET, "drop_score", broken)
        assert main(arguments(text, out, *plans)) == 0
    assert "failed: RuntimeError: no scores today" in capsys.readouterr().out
    assert sorted(record["state"] for record in kept(out).values()) == ["failed", "finished"]
    assert main(arguments(text, out, *plans)) == 0
    assert [record["state"] for record in kept(out).values()] == ["finished", "finished"]


def test_a_damaged_record_and_a_damaged_checkpoint(made, text, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(made, out)
    path = next((out / "runs").glob("static-s0-*"))
    path.write_text("{")
    plans = ["--plans", "static", "--seeds", "0"]
    said = failure(capsys, arguments(text, out, *plans))
    assert path.name in said and "remove it" in said
    path.unlink()
    (out / "partial" / next((out / "runs").iterdir()).stem.rsplit("-", 1)[1]).mkdir()  # left by a kill after its record
    partial = out / "partial" / path.stem.rsplit("-", 1)[1]
    partial.mkdir()
    (partial / "latest.json").write_text("nonsense")
    assert (
        main(
            arguments(text, out, "--plans", "static", "set:interval=3", "rigl:interval=3", "dense", "--seeds", "0", "1")
        )
        == 0
    )
    assert unclocked(out) == unclocked(made) and [path.name for path in (out / "partial").iterdir()] == [".lock"]


def test_two_comparisons_do_not_share_a_folder_at_once(text, tmp_path, capsys):
    from rarefy.compare.schedule import alone_in

    with alone_in(tmp_path):
        message = failure(capsys, arguments(text, tmp_path, "--plans", "static"))
        assert "another comparison or race is at work" in message


def test_the_default_folder_follows_from_settings_and_data(task, text):
    from rarefy.compare.comparison import identity

    assert identity(task) == identity(with_base(text)) != identity(with_base(text, lr=0.1))


# -- what the user can mend --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more, said",
    [
        (["--plans", "rigll"], "did you mean 'rigl'"),
        ([], "which plans"),
        (["--plans", "set", "--seeds", "0", "0"], "seeds: 0 is there twice"),
        (["--plans", "set", "--minutes", "1"], "both say what is equal"),
        (["--plans", "set", "--against", "static"], "against: there is no 'static'"),
        (["--plans", "set", "--jobs", "0"], "jobs must be at least 1"),
        (["--plans", "set", "--steps", "-3"], "steps must be positive"),
        (["--plans", "set", "--data", "nowhere"], "no such file or folder"),
        (["--plans", "set", "--device", "nonsense"], "--device nonsense cannot be used"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(text, tmp_path, capsys, more, said):
    assert said in failure(capsys, arguments(text, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_a_config_file_says_the_same_as_flags(text, tmp_path, made, capsys):
    lines = {name: value for name, value in SHAPE.items() if name not in ("sample_bytes", "measure", "eval_interval")}
    lines |= {"data": str(text), "plans": ["static", "dense"], "seeds": [0], "steps": 99, "eval_interval": 4}
    path = tmp_path / "compare.yaml"
    path.write_text("\n".join(f"{name}: {json.dumps(value)}" for name, value in lines.items()))
    assert main(["compare", "text", "--config", str(path), "--steps", "12", "--out", str(tmp_path / "out")]) == 0
    assert unclocked(tmp_path / "out").items() <= unclocked(made).items()
    capsys.readouterr()
    path.write_text("method: set\n")
    assert "say it with 'plans'" in failure(capsys, ["compare", "text", "--config", str(path)])


# -- images ------------------------------------------------------------------------------------------------------------


def test_images_are_compared_by_accuracy(images, tmp_path, capsys):
    given = ["compare", "images", "--data", str(images), "--out", str(tmp_path / "out"), "--steps", "40"]
    given += [
        "--hidden",
        "32",
        "--batch",
        "16",
        "--density",
        "0.3",
        "--lr",
        "0.005",
        "--threads",
        "1",
        "--seeds",
        "0",
        "1",
    ]
    assert main([*given, "--plans", "static", "set:interval=4", "dense", "small-dense", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metric"]["key"] == "accuracy"
    for row in found["table"]["rows"]:
        assert 0.5 < row["final"]["mean"] <= 1
    record = next(iter(kept(tmp_path / "out").values()))
    assert record["curve"]["step"] == list(range(4, 41, 4)) and len(record["curve"]["accuracy"]) == 10
    assert "no such folder" in failure(capsys, ["compare", "images", "--data", "nowhere", "--plans", "set"])
    assert "which images" in failure(capsys, ["compare", "images", "--plans", "set"])
    assert "at most the 64 training images" in failure(capsys, [*given, "--plans", "set", "--batch", "65"])


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_flops_follow_units_that_come_and_go():
    start_of = {
        "flops_per_token": 6 * 110,
        "layers": {"a": {"size": 400, "unit": 1, "units": 100}, "b": {"size": 64, "unit": 4, "units": 2}},
    }
    rewires = [
        {"step": 2, "layer": "a", "num_units": 50, "grown_by": "gradient"},
        {"step": 4, "layer": "b", "num_units": 3, "grown_by": "random"},
        {"step": 4, "layer": "a", "num_units": 70, "grown_by": "gradient"},
        {"step": 4, "layer": "gone", "num_units": 70, "grown_by": "gradient"},
    ]
    found, scanned = flops_at([1, 2, 3, 6], start_of, rewires, tokens=10)
    each = {1: 110, 2: 110, 3: 60, 4: 60, 5: 84, 6: 84}  # weights in each step

    def exact(step: int, scans: int) -> int:
        return sum(6 * each[s] * 10 for s in range(1, step + 1)) + scans * 2 * 400 * 10

    assert found == [exact(1, 0), exact(2, 1), exact(3, 1), exact(6, 2)]
    assert scanned == 2 * 2 * 400 * 10


def handmade(finals: dict[str, dict[int, float | None]]) -> tuple[list[Job], dict[str, dict[str, Any]]]:
    """Jobs and records, of which only the finals are told; None: diverged."""
    made_up, records = [], {}
    for label, by_seed in finals.items():
        for seed, final in by_seed.items():
            job = Job(label, seed, label == "dense", None, {"label": label, "seed": seed})
            object.__setattr__(job, "settings", type("S", (), {"steps": 10}))
            made_up.append(job)
            seconds = 2.0 + seed
            records[job.digest] = {
                "state": "finished" if final is not None else "diverged", "message": "", "seed": seed, "label": label,
                "final": final, "nonzeros": [100, 50 + seed], "density": [0.2, 0.1], "flops": 1000 * (seed + 1),
                "rewire_flops": 10, "warnings": [], "clock": {
                    "train_s": seconds, "step_s": seconds / 10, "rewire_share": 0.01 * (seed + 1),
                    "curve_s": [seconds / 2, seconds], "machine": {"cpu": "<b>", "threads": 1},
                },
                "curve": {"step": [5, 10], "flops": [500, 1000], "loss": [2.0, final or 1.0],
                          "bits_per_byte": [2.0 + seed, final]},
                "pattern": None if label == "dense" else {
                    "exploration": 0.2 + 0.1 * seed, "churn": 0.1, "empty_rows": 0, "empty_cols": 1},
            }  # fmt: skip
    return made_up, records


FINALS: dict[str, dict[int, float | None]] = {
    "static": {0: 2.0, 1: 2.2, 2: 2.4},
    "set": {0: 1.9, 1: 2.0, 2: 2.1},
    "dense": {0: 2.5, 1: None, 2: 2.7},
    "rigl": {0: None, 1: None, 2: None},
}


def test_the_table_is_what_hand_computation_gives():
    table = make_table(*handmade(FINALS), key="bits_per_byte")
    static, set_, dense, rigl = table["rows"]
    assert table["against"] == "static" and static["difference"] is None
    assert static["final"] == {"mean": pytest.approx(2.2), "spread": pytest.approx(0.2), "count": 3}
    assert set_["difference"] == {"mean": pytest.approx(-0.2), "spread": pytest.approx(0.1), "count": 3}
    assert dense["difference"] == {"mean": pytest.approx(0.4), "spread": pytest.approx(0.1 * 2**0.5), "count": 2}
    assert (dense["diverged"], dense["seeds"], dense["exploration"]) == (1, [0, 2], None)
    assert (rigl["final"], rigl["nonzeros"], rigl["diverged"]) == (None, None, 3)
    assert static["nonzeros"] == [100, 51] and static["train_s"]["mean"] == 3.0
    assert static["exploration"]["mean"] == pytest.approx(0.3)
    assert mean_and_spread([]) is None and mean_and_spread([3.0]) == {"mean": 3.0, "spread": None, "count": 1}


def test_another_baseline_and_none():
    found = handmade({"set": {0: 2.0}, "dense": {0: 1.5}})
    assert make_table(*found, key="x")["against"] is None
    table = make_table(*found, key="x", against="dense")
    assert table["rows"][0]["difference"] == {"mean": 0.5, "spread": None, "count": 1}


def data_of(finals: dict[str, dict[int, float | None]]) -> tuple[dict[str, Any], dict[str, Any]]:
    made_up, records = handmade(finals)
    metric = {"key": "bits_per_byte", "title": "bits per byte", "higher_is_better": False, "percent": False}
    return {
        "task": "text", "data": {"name": "<i>", "digest": "0"}, "metric": metric, "seeds": [0, 1, 2],
        "budget": {"by": "minutes", "amount": 5.0}, "settings": {"width": 32}, "machines": [{"cpu": "<b>"}],
        "runs": [{"label": job.label, "seed": job.seed, "file": f"runs/{job.file}"} for job in made_up],
        "table": make_table(made_up, records, key="bits_per_byte"),
    }, records  # fmt: skip


def test_the_headline_follows_from_differences_by_seed():
    data, _ = data_of(FINALS)
    assert best(data) == ["set"]  # 0.2 apart with spreads of 0.2 and 0.1, but 0.1, 0.2 and 0.3 by seed
    assert headline(data) == [
        "set is best, with 2.000 ± 0.100 bits per byte.",
        "Better than static by more than the spread of the difference: set.",
    ]
    level, _ = data_of({"set": {0: 1.0, 1: 1.4}, "rigl": {0: 1.3, 1: 1.2}})
    assert best(level) == ["set", "rigl"]
    assert headline(level) == [
        "set is best, with 1.200 ± 0.283 bits per byte; rigl is within the spread of the difference."
    ]
    assert headline(data_of({"rigl": {0: None}})[0]) == ["No run has finished."]


def test_times_that_were_disturbed_are_pointed_out():
    data, _ = data_of({"static": {0: 2.0, 1: 2.1}, "set": {0: 2.0, 1: 2.1}})  # 2 and 3 seconds
    assert "static and set are more than 15% off" in disturbed(data)
    data["budget"] = {"by": "minutes", "amount": 2.5 / 60}
    for row in data["table"]["rows"]:
        row["train_s"]["spread"] = 0.3
    assert disturbed(data) == ""
    data["table"]["rows"][1]["train_s"]["mean"] = 2.9
    assert "times of set are" in disturbed(data)


def test_curves_are_means_at_shared_evaluations():
    _, records = handmade({"set": {0: 1.0, 1: 1.4}})
    runs = list(records.values())
    assert mean_curve(runs, "bits_per_byte", "step") == [
        (5, pytest.approx(2.5), pytest.approx(0.5**0.5)), (10, pytest.approx(1.2), pytest.approx(0.08**0.5)),
    ]  # fmt: skip
    assert [x for x, _, _ in mean_curve(runs, "bits_per_byte", "seconds")] == [1.25, 2.5]
    assert mean_curve(runs[:1], "loss", "flops") == [(500, 2.0, 0.0), (1000, 1.0, 0.0)]


# -- the page ----------------------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)


def test_the_page_says_what_the_table_says_and_asks_for_nothing(tmp_path):
    data, records = data_of(FINALS)
    page = build_comparison(tmp_path, data, records).read_text()
    for said in ("2.000 ± 0.100", "-0.200 ± 0.100", "(1 diverged)", "(3 diverged)", "&lt;b&gt;", "&lt;i&gt;", "5 min"):
        assert said in page, said
    seen = Elements(page).seen
    assert seen.count("script") == 3 and "i" not in seen
    assert "default-src 'none'" in page


def test_the_page_can_be_made_again_from_what_is_kept(made, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(made, out)
    (out / "compare.html").unlink()
    assert main(["report", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out / "compare.html")
    assert (out / "compare.html").read_text().count("set:interval=3") > 3
    gone = next((out / "runs").iterdir())
    gone.unlink()
    assert f"{gone.name} is missing" in failure(capsys, ["report", str(out)])
    (out / "comparison.json").write_text("[]")
    assert "comparison.json is damaged" in failure(capsys, ["report", str(out)])


def test_what_was_asked_is_kept_as_a_config_file(made, text, tmp_path):
    assert "text.txt" not in (made / "compare.yaml").read_text()
    given = ["--config", str(made / "compare.yaml"), "--data", str(text), "--out", str(tmp_path / "out")]
    assert main(["compare", "text", *given, "--no-report"]) == 0
    assert unclocked(tmp_path / "out") == unclocked(made)


@pytest.mark.skipif(check_report.find_browser() is None, reason=check_report.INSTALL)
@pytest.mark.browser
def test_a_browser_opens_the_page_in_silence(tmp_path, made):
    data, records = data_of({**FINALS, **{f"rigl:interval={n}": {0: 2 + 0.1 * n, 1: 2.1} for n in range(9)}})
    path = check_report.find_browser()
    assert path is not None
    with check_report.browser(path) as one:
        for page in (build_comparison(tmp_path, data, records), made / "compare.html"):
            findings = check_report.check_page(one, page, tmp_path, looks=[("narrow", "light"), ("wide", "dark")])
            assert findings.problems == []
            assert findings.plots == 2


def test_from_python(text, tmp_path):
    """The names that a script would use."""

    class Listener:
        def begin(self, job, place, count): ...
        def stepped(self, twin, result): ...
        def evaluated(self, twin, loss): ...
        def end(self, job, record): ...

    asked = Comparison(plans=("static",), seeds=(0,), budget=Equal(by="steps", amount=4), out=tmp_path)
    outcome = compare(TextTask(settings(text, steps=None)), asked, Listener())
    assert outcome.data["table"]["rows"][0]["final"]["count"] == 1
