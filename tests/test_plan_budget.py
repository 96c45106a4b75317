"""`rarefy plan --budget`: what it prints, what it refuses, and that its commands are ones that can be run."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path

import pytest

from rarefy.cli import plan_budget
from rarefy.cli import plan_words as words
from rarefy.cli.main import main
from rarefy.cli.options import parse
from rarefy.cli.plan_budget import bytes_of
from rarefy.cli.race import Text
from rarefy.cli.train import TASKS
from rarefy.compare import TextTask
from rarefy.compare.contenders import parse_contenders
from rarefy.cost import cache
from rarefy.foresight import StepModel, Wish, choose
from test_foresight import LAW, TIMES, by_products
from test_plan_auto import costs
from tiny import one_thread, write_text

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def text(tmp_path) -> Path:
    return write_text(tmp_path / "text.txt")


@pytest.fixture
def calibrated(monkeypatch, tmp_path):
    """A machine whose times are known."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = dataclasses.replace(costs(), conditions=cache.conditions())
    cache.save_model(model)
    steps = StepModel({"fp32": TIMES, "bf16": TIMES}, {}, {"date": "today"})
    monkeypatch.setattr(plan_budget, "load_steps", lambda costs: steps)


@pytest.mark.parametrize(
    "said, size",
    [("8G", 8 << 30), ("500M", 500 << 20), ("2GiB", 2 << 30), ("1.5 kb", 1536), ("4096", 4096), ("1T", 1 << 40)],
)
def test_sizes_are_read(said, size):
    assert bytes_of("memory", said) == size


@pytest.mark.parametrize(
    "more, said",
    [
        (["--budget", "soon"], "budget must be a time such as 90s, 10m or 1.5h, got 'soon'"),
        (["--budget", "0m"], "the budget must be positive, got 0 minutes"),
        (["--budget", "3m", "--memory", "much"], "memory must be a size such as 8G, 500M or 2GiB, got 'much'"),
        (["--budget", "3m", "--memory", "0"], "memory must be positive, got 0 bytes"),
        (["--budget", "3m", "--data", "nowhere.txt"], "there is no such file or folder"),
        (["--budget", "3m", "--width", "128", "--density", "0.2"], "--budget chooses --density, --width itself"),
        (["--memory", "8G"], "--memory and --data are for --budget"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line_before_anything_is_timed(monkeypatch, capsys, more, said):
    monkeypatch.setattr("rarefy.cli.plan._model", lambda **_: pytest.fail("timed"))
    assert main(["plan", *more]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rarefy: ")]
    assert len(lines) == 1 and said in lines[0]


def test_a_machine_that_was_never_calibrated_is_calibrated(monkeypatch, tmp_path, text, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = []
    monkeypatch.setattr(cache, "calibrate", lambda **_: asked.append("layers") or costs())
    model = StepModel({"fp32": TIMES}, {}, {"date": "today"})
    monkeypatch.setattr(plan_budget, "step_model", lambda costs, progress: asked.append("steps") or model)
    assert main(["plan", "--budget", "3m", "--data", str(text)]) == 0
    assert asked == ["layers", "steps"] and "best sparse" in capsys.readouterr().out


def test_both_sides_are_shown_and_what_to_run(calibrated, text, capsys):
    assert main(["plan", "--budget", "3m", "--data", str(text), "--memory", "120M"]) == 0
    out = capsys.readouterr().out
    titles = [line.split("  ")[0] for line in out.splitlines()]
    for title in (
        "bits per byte", "width", "layers", "attention", "density", "block", "precision", "parameters", "steps",
        "memory",
    ):  # fmt: skip
        assert title in titles
    assert "best dense" in out and "best sparse" in out and "of which none was trained" in out
    assert "networks need more than 120 MiB" in out
    assert "would read it" in out and "repetition hurts sparse networks later than dense ones" in out
    assert "rarefy race --data" in out and "rarefy train text --data" in out


def test_json_says_the_same(calibrated, text, capsys):
    assert main(["plan", "--budget", "90s", "--data", str(text), "--json"]) == 0
    shown = capsys.readouterr()
    data = json.loads(shown.out)
    assert (data["budget_minutes"], data["memory_bytes"]) == (1.5, None)
    assert data["winner"] in ("sparse", "dense", "neither") and data["law"]["provenance"]["runs"]
    for side in (data["dense"], data["sparse"]):
        assert side["steps"] == int(90e3 / side["step_ms"]) and side["tokens"] == side["steps"] * 2048
        parts = dict(side["memory_bytes"])
        assert parts.pop("peak") > parts["total"] and parts.pop("total") == sum(parts.values())
    difference = data["sparse"]["bits_per_byte"] - data["dense"]["bits_per_byte"]
    assert data["difference"] == pytest.approx(difference) and data["dense"]["density"] == 1.0
    assert data["sentence"] and data["commands"]["race"].startswith("rarefy race")


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
def test_the_commands_train_the_networks_that_were_chosen(text, block, narrow):
    four, one = (1.0, None) if block == (4, 4) else (None, 1.0)
    law = dataclasses.replace(LAW, covers={**LAW.covers, "attention": (0.3, 0.5) if narrow else (1.0, 1.0)})
    choice = choose(Wish(minutes=3), law, by_products(10.0, one or 100.0, four))
    assert choice.dense is not None and choice.sparse is not None and choice.sparse.shape.block == block
    method = words.usual_method(choice)
    assert method == ("set" if block == (1, 1) else "static")
    race = words.race_command(choice, data=str(text), budget="3m", method=method)
    train = words.train_command(choice, data=str(text), method=method)
    assert race is not None and train is not None
    asked = parse(Text, shlex.split(race)[2:], prog="rarefy race")
    assert asked.asked().minutes == 3.0 and asked.asked().heat_minutes == 0
    task = TextTask(plan_budget_settings(text))
    field = parse_contenders(asked.contenders, task)
    assert [one.dense for one in field] == [True, True, False]
    for contender in field:
        chosen = choice.dense.shape if contender.dense else choice.sparse.shape
        settings = contender.settings
        assert (settings.width, settings.layers, settings.batch) == (chosen.width, chosen.layers, chosen.batch)
        assert settings.attention == chosen.attention and (chosen.attended < chosen.width) == narrow
        if not contender.dense:
            said = settings.plan.block
            assert ((said, said) if isinstance(said, int) else tuple(said)) == block
            assert settings.plan.density == chosen.density and contender.label.startswith(f"{method}:")
    cls, _ = TASKS["text"]
    given = parse(cls, shlex.split(train)[3:], prog="rarefy train text")
    assert (given.width, given.layers, given.steps) == (
        choice.sparse.shape.width, choice.sparse.shape.layers, choice.sparse.steps,
    )  # fmt: skip
    assert given.density == choice.sparse.shape.density and not given.twin
    assert given.attention == choice.sparse.shape.attention


def plan_budget_settings(text: Path):
    from rarefy.recipes.text import TextSettings

    return TextSettings(data=str(text), measure=False)


def test_the_sentence():
    fast, slow, tie = (choose(Wish(minutes=30), LAW, by_products(10.0, each)) for each in (10.0, 1000.0, 10.0))
    assert words.sentence(fast).startswith("Sparse should win, by ") and "bits per byte" in words.sentence(fast)
    assert words.sentence(slow).startswith("Dense should win, by ")
    close = dataclasses.replace(tie, difference=-0.01, difference_sigma=0.02)
    assert words.sentence(close).startswith("Too close to call: sparse is ahead by 0.014 bits per byte")
    none = choose(Wish(minutes=30, memory_bytes=1), LAW, by_products(10.0, 10.0))
    assert words.sentence(none) == "Nothing to choose: no network of the grid fits."
    assert words.sentence(dataclasses.replace(fast, sparse=None, difference=None)).startswith("No verdict: no sparse")


def test_what_lies_beyond_the_runs_is_said():
    law = dataclasses.replace(LAW, covers={**LAW.covers, "tokens": (1e4, 1e6)})
    choice = choose(Wish(minutes=30), law, by_products(10.0, 10.0))
    said = words.doubts(choice, law, data_bytes=10**12)
    assert len(said) == 2 and all("its runs had 10.0 k to 1.00 M" in line for line in said)
    assert "bytes trained on" in said[0] and "dense" in said[0] and "sparse" in said[1]
