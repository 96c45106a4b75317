"""Races on images: who runs, judged by all held-out images where higher is better, and what is said of it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

import check_report  # pyright: ignore[reportMissingImports]  (tools/, which pytest puts on the path)
from pictures import write_pictures
from rarefy.cli.main import main
from rarefy.cli.options import parse
from rarefy.cli.race import Images
from rarefy.compare import ImagesTask, TextTask
from rarefy.compare.contenders import nonzeros, parse_contender, parse_contenders
from rarefy.compare.jobs import jobs, make_job
from rarefy.compare.records import num_nonzeros
from rarefy.race import modes
from rarefy.race.heats import control, finalists
from rarefy.race.verdict import verdict
from rarefy.recipes.images import AllImages, ImageSettings
from rarefy.recipes.images.field import LADDERS
from rarefy.report.race import columns, heats_in_words, legend, sentences
from rarefy.training.subject import ACCURACY
from rarefy.training.twin import Twin
from tiny import cut_short, one_thread, settings, start, write_images, write_text

__all__ = ["one_thread"]
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::rarefy.GuardWarning")]

DATA = Path(__file__).parents[2] / "shared" / "data"

FLAGS = ["--batch", "16", "--evaluations", "5", "--eval-images", "8", "--threads", "1", "--no-try-compile"]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "set")


@pytest.fixture(scope="module")
def task(images) -> ImagesTask:
    return ImagesTask(ImageSettings(data=str(images), batch=16, eval_images=8, threads=1))


def arguments(images: Path, out: Path, *more: str) -> list[str]:
    return ["race", "images", "--data", str(images), "--out", str(out), *FLAGS, *more]


def kept(out: Path) -> dict[str, dict[str, Any]]:
    return {path.name: json.loads(path.read_text()) for path in (out / "runs").glob("*.json")}


def unclocked(out: Path) -> dict[str, dict[str, Any]]:
    return {name: {k: v for k, v in record.items() if k != "clock"} for name, record in kept(out).items()}


# -- what people type --------------------------------------------------------------------------------------------------


def test_text_need_not_be_named(tmp_path, capsys):
    text = write_text(tmp_path / "text.txt")
    shape = ["--width", "32", "--layers", "1", "--heads", "2", "--context", "16", "--batch", "2", "--eval-bytes", "64"]
    more = ["--contenders", "dense", "static", "--budget", "0.2s", "--no-try-compile", "--threads", "1", "--json"]
    said = []
    for words in (["race"], ["race", "text"]):
        assert main([*words, "--data", str(text), "--out", str(tmp_path / "out"), *shape, *more]) == 0
        said.append(json.loads(capsys.readouterr().out))
    assert said[0] == said[1] and said[0]["task"] == "text" and said[0]["judged"] == ""


def test_help_lists_what_there_is_to_race(capsys):
    assert main(["race", "--help"]) == 0
    said = capsys.readouterr().out
    assert "text" in said and "images" in said and "--eval-bytes" in said and "--eval-images" not in said
    assert main(["race", "images", "--help"]) == 0
    assert "--eval-images" in capsys.readouterr().out
    assert main(["race", "imges"]) == 2
    assert "did you mean 'images'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, said",
    [
        (["--data", "nowhere"], "no such folder"),
        (["--contenders", "dense:widht=2"], "did you mean 'width'"),
        (["--batch", "65"], "batch must be at most the 64 training images, got 65"),
        (["--heats", "soon"], "heats must be a time such as 90s, 10m or 1.5h, got 'soon'"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(images, tmp_path, capsys, more, said):
    assert main(arguments(images, tmp_path / "out", *more)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rarefy: ")]
    assert len(lines) == 1 and said in lines[0]
    assert not (tmp_path / "out").exists()


# -- who runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("minutes", [1, 3, 10, 30, 90])
@pytest.mark.parametrize("model", sorted(LADDERS))
def test_both_sides_have_as_many_heats(images, model, minutes):
    task = ImagesTask(ImageSettings(data=str(images), batch=16, model=model))
    field = parse_contenders(task.field(minutes), task)
    assert sum(one.dense for one in field) == sum(not one.dense for one in field)
    found = jobs(task, field, [0], lambda _: 100)  # refuses two that mean the same run
    blocks, densities, methods = set(), set(), set()
    for job in found:
        assert job.settings.network(task._set.shape) is not None
        if not job.dense:
            blocks.add(job.settings.plan.block)
            densities.add(job.settings.plan.density)
            methods.add(type(job.settings.plan.method).__name__)
    assert blocks == {1, (4, 1)} and 0.1 in densities and len(densities) == 2 and methods == {"Static", "SET"}


@pytest.mark.parametrize(
    "changes, dense, sparse",
    [({}, {1e-2, 2e-2}, 2.5e-2), ({"lr": 0.02}, {0.01, 0.02}, 0.02), ({"optimizer": "sgd"}, {0.05, 0.1}, 0.1)],
)
def test_rates_are_the_users_where_there_are_some(images, changes, dense, sparse):
    task = ImagesTask(ImageSettings(data=str(images), batch=16, model="wrn", **changes))
    field = parse_contenders(task.field(3), task)
    assert {one.settings.dense_lr for one in field if one.dense} == dense
    assert {one.settings.lr for one in field if not one.dense} == {sparse}


def test_the_best_finalists_are_the_most_accurate(task):
    field = parse_contenders(["dense", "dense:lr=0.01,dense_lr=0.01", "static", "static:block=[4,1]", "set"], task)
    finals = dict(zip((one.label for one in field), (0.5, 0.7, 0.4, 0.3, 0.2), strict=True))
    records = {label: {"state": "finished", "final": final} for label, final in finals.items()}
    found = finalists(task, field, records, each=1)
    assert [one.label for one in found] == [field[1].label, "static", "set"]
    (small,) = control(task, found, records)
    assert (small.label, small.dense, small.settings.dense_lr) == ("small-dense of static", True, 0.01)
    assert num_nonzeros(task.make(small.settled(0, 9), dense=True)) == pytest.approx(
        nonzeros(task, found[1].settings), rel=0.02
    )


def test_every_contender_has_its_modes_timed(task, tmp_path, monkeypatch):
    assert set(modes._fastest(task, parse_contender("static", task), compiled=False)["seconds"]) == {"fp32", "bf16"}
    monkeypatch.setattr(modes, "_time", lambda _, one, ways: [1.0, 0.9, 0.8, 0.7])
    field = parse_contenders(["dense", "static"], task)
    for one in modes.in_fastest_mode(tmp_path, task, field, lambda _: None, compiled=True):
        assert (one.settings.precision, one.settings.compile) == ("bf16", True)


def test_moving_and_mirroring_is_on_the_clock(images, monkeypatch):
    task = ImagesTask(ImageSettings(data=str(images), batch=16, shift=1, flip=True))
    twin = task.make(parse_contender("dense", task).settled(0, 4), dense=True)
    data, _ = task.feed(task.base.settled(4))
    now = [0.0]
    monkeypatch.setattr("rarefy.training.twin.time.perf_counter", lambda: now[0])
    true = type(data)._moved

    def moved(self, x, step):
        now[0] += 5.0
        return true(self, x, step)

    monkeypatch.setattr(type(data), "_moved", moved)
    twin.train_step(data)
    assert twin.clock.data_s == 5.0 == twin.clock.train_s


# -- what judges -------------------------------------------------------------------------------------------------------


def test_a_run_is_judged_by_all_images_and_its_curve_is_of_some(images, tmp_path, monkeypatch, capsys):
    seen: list[int] = []
    true = Twin.assess

    def assess(self, windows):
        assert isinstance(windows, AllImages)
        seen.append(windows.count)
        return true(self, windows)

    monkeypatch.setattr(Twin, "assess", assess)
    out = tmp_path / "out"
    assert main(arguments(images, out, "--contenders", "dense:hidden=[16]", "--budget", "0.2s", "--json")) == 0
    (record,) = kept(out).values()
    assert seen[-1] == 20 and set(seen[:-1]) == {8} and len(seen) == len(record["curve"]["step"]) + 1
    assert record["final"] * 20 == pytest.approx(round(record["final"] * 20), abs=1e-4)
    for found in record["curve"]["accuracy"]:
        assert found * 8 == pytest.approx(round(found * 8), abs=1e-4)
    data = json.loads(capsys.readouterr().out)
    assert "judged by all 20 held-out images; curves are of 8 of them" in data["judged"]
    assert data["judged"] in legend(data)


def test_who_is_judged_by_all_is_another_run(task, images):
    def digest(**changes: Any) -> str:
        task = ImagesTask(ImageSettings(**{"data": str(images), "batch": 16, **changes}))
        return make_job(task, parse_contender("dense", task), 0, 9).digest

    assert task.all_held_out(task.base) is not None
    every = ImagesTask(ImageSettings(data=str(images), batch=16))
    assert every.all_held_out(every.base) is None and every.judged() == ""
    job = make_job(every, parse_contender("dense", every), 0, 9)
    assert "judged" not in job.defines and digest() == job.digest != digest(eval_images=8)


def test_a_network_that_all_images_show_to_have_diverged(images, tmp_path, monkeypatch):
    true = Twin.assess

    def assess(self, windows):
        found = true(self, windows)
        return {**found, "loss": float("nan")} if windows.count == 20 else found

    monkeypatch.setattr(Twin, "assess", assess)
    assert main(arguments(images, tmp_path / "out", "--contenders", "dense:hidden=[16]", "--budget", "0.1s")) == 0
    (record,) = kept(tmp_path / "out").values()
    assert (record["state"], record["final"]) == ("diverged", None)


# -- a race ------------------------------------------------------------------------------------------------------------


def test_a_race_from_heats_to_the_page(tmp_path, capsys):
    """Colour images, so convolutions, as they are read from a folder of pictures."""
    data, out = write_pictures(tmp_path / "set"), tmp_path / "out"
    small = "depth=10,width=0.5"
    field = [
        f"dense:{small},dense_lr=0.01", f"dense:{small},dense_lr=0.003", f"static:{small},lr=0.01,density=0.3",
        f"static:{small},lr=0.01,density=0.3,block=[4,1]", f"set:{small},lr=0.01,density=0.3,interval=4",
    ]  # fmt: skip
    given = ["race", "images", "--data", str(data), "--out", str(out), *FLAGS, "--contenders", *field]
    given += ["--heats", "0.3s", "--budget", "1s", "--json"]
    assert main(given) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert found == json.loads((out / "race.json").read_text())
    assert found["metric"] == {"key": "accuracy", "title": "accuracy", "higher_is_better": True, "percent": True}
    heats = {row["label"]: row["final"]["mean"] for row in found["heats"]["table"]["rows"]}
    final = [row["label"] for row in found["table"]["rows"]]
    assert list(heats) == field
    assert final[:3] == [max(kind, key=heats.__getitem__) for kind in (field[:2], field[2:4], field[4:])]
    assert final[3:] == [f"small-dense of {max(final[1:3], key=heats.__getitem__)}"]
    ends = {row["label"]: row["final"]["mean"] for row in found["table"]["rows"]}
    verdict = found["verdict"]
    assert ends[verdict["best_dense"]] == max(ends[final[0]], ends[final[3]])
    assert ends[verdict["best_sparse"]] == max(ends[final[1]], ends[final[2]])
    by = ends[verdict["best_sparse"]] - ends[verdict["best_dense"]]
    assert verdict["winner"] == ("sparse" if by > 0 else "dense" if by < 0 else "neither")
    for line in sentences(found):
        assert line in " ".join(shown.err.split())
    assert heats_in_words(found)[0].count("%") == len(field)
    assert all(label in shown.err for label in final)  # a pipe gets the whole table, however wide
    assert main(given) == 0  # nothing is run again, and the same is said
    assert json.loads(capsys.readouterr().out) == found
    page = out / "race.html"
    written = page.read_text()
    assert "Made by rarefy race." in written and sentences(found)[0] in written and "accuracy" in written
    assert "bits" not in written.split("<script")[0]
    page.unlink()
    assert main(["report", str(out)]) == 0
    assert page.read_text() == written


@pytest.mark.skipif(check_report.find_browser() is None, reason=check_report.INSTALL)
@pytest.mark.browser
def test_a_browser_opens_the_page_in_silence(images, tmp_path):
    path, out = check_report.find_browser(), tmp_path / "out"
    assert path is not None
    field = ["dense:hidden=[16]", "set:hidden=[16],interval=3"]
    assert main(arguments(images, out, "--contenders", *field, "--budget", "0.2s", "--seeds", "0", "1")) == 0
    with check_report.browser(path) as one:
        looks = [("narrow", "light"), ("wide", "dark")]
        findings = check_report.check_page(one, out / "race.html", tmp_path, looks=looks)
    assert findings.problems == []
    assert findings.plots == 2


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_race_cut_short_goes_on_to_the_same_end(images, tmp_path, number):
    """With moved and mirrored images, in both precisions."""
    sparse = "set:hidden=[64],interval=3,density=0.2,precision=bf16,keep_dense=[head]"
    field = ["dense:hidden=[64],precision=fp32", sparse]
    more = ["--contenders", *field, "--budget", "1s", "--checkpoint-s", "0", "--no-report", "--shift", "1", "--flip"]
    straight, out = tmp_path / "straight", tmp_path / "out"
    assert main(arguments(images, straight, *more)) == 0
    out.mkdir()
    shutil.copy(straight / "pace.json", out)  # so that both have the same steps
    process = start(arguments(images, out, *more), tmp_path)
    cut_short(process, number, lambda: len(list(out.glob("partial/*/latest.json"))) == 2)
    assert not unclocked(out)
    assert main(arguments(images, out, *more)) == 0
    assert unclocked(out) == unclocked(straight) and len(unclocked(out)) == 2


@pytest.mark.data
@pytest.mark.skipif(not (DATA / "fashion-mnist").is_dir(), reason="needs ../shared/data/fashion-mnist")
def test_fashion_mnist_itself(tmp_path, capsys):
    field = ["dense:hidden=[64]", "set:hidden=[128],density=0.1,block=[4,1]"]
    given = ["race", "images", "--data", str(DATA / "fashion-mnist"), "--out", str(tmp_path / "out"), "--threads", "1"]
    given += ["--no-try-compile", "--budget", "4s", "--evaluations", "4", "--lr", "3e-3", "--contenders", *field]
    assert main([*given, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert "all 10,000 held-out images; curves are of 2,000" in data["judged"]
    for row in data["table"]["rows"]:
        assert row["final"]["mean"] > 0.3  # however few steps that are here
        assert row["final"]["mean"] * 10_000 == pytest.approx(round(row["final"]["mean"] * 10_000), abs=0.01)


# -- who wins ----------------------------------------------------------------------------------------------------------


def record(dense: bool, seed: int, curve: list[tuple[float, float]]) -> dict[str, Any]:
    return {
        "dense": dense, "seed": seed, "state": "finished", "final": curve[-1][1],
        "curve": {"accuracy": [y for _, y in curve]},
        "clock": {"curve_s": [x for x, _ in curve], "train_s": curve[-1][0]},
    }  # fmt: skip


def said_of(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    rows = [
        {"label": label, "final": {"mean": found[0]["final"], "spread": None, "count": 1}}
        for label, found in runs.items()
    ]
    data = {
        "verdict": dataclasses.asdict(verdict(runs, ACCURACY)), "table": {"rows": rows},
        "metric": dataclasses.asdict(ACCURACY),
    }  # fmt: skip
    assert ("accuracy %", "mean ± spread") in columns(data)
    return sentences(data)


def test_the_more_accurate_side_wins_by_percent_points():
    dense = [record(True, 0, [(50, 0.4), (100, 0.6)])]
    worse = [record(True, 0, [(50, 0.5), (100, 0.55)])]
    sparse = [record(False, 0, [(50, 0.5), (100, 0.7)])]
    assert said_of({"d": dense, "worse": worse, "s": sparse}) == [
        "Sparse wins here: s is as good as the best dense network, d, in 0.75 of its time, and ends 10.00 percent "
        "points of accuracy ahead.",
        "s ends at 70.00%, d at 60.00% accuracy; difference +10.00.",
    ]
    sparse = [record(False, 0, [(50, 0.3), (100, 0.5)])]
    assert said_of({"d": dense, "s": sparse}) == [
        "Dense wins here: d is as good as the best sparse network, s, in 0.75 of its time, and ends 10.00 percent "
        "points of accuracy ahead.",
        "s ends at 50.00%, d at 60.00% accuracy; difference -10.00.",
    ]
    found = verdict({"d": dense, "s": sparse}, ACCURACY)
    assert found.shares == {"s": None} and found.reverse is not None


def test_who_is_ahead_by_all_images_was_so_in_time():
    """However the part that curves are of misjudges either."""
    dense = {**record(True, 0, [(50, 0.5), (100, 0.7)]), "final": 0.6}
    sparse = {**record(False, 0, [(50, 0.4), (100, 0.6)]), "final": 0.65}
    found = verdict({"d": [dense], "s": [sparse]}, ACCURACY)
    share = found.shares["s"]
    assert found.winner == "sparse" and share is not None and share["mean"] == pytest.approx(0.875)


def test_the_tasks_that_there_are_can_be_raced(images, tmp_path):
    """A race knows of a task what `Task` says, so it needs no list of them."""
    text = TextTask(settings(write_text(tmp_path / "text.txt"), steps=None))
    asked = parse(Images, ["--data", str(images), "--batch", "16"], prog="rarefy race images")
    for task in (text, asked.task()):
        field = parse_contenders(task.field(3), task)
        assert len(jobs(task, field, [0], lambda _: 10)) == len(field) == 16
