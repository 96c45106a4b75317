"""Rule 9 of rewiring, for whole runs: what a kill or a Control-C cuts short goes on as if nothing had happened."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rarefy.cli.main import main
from tiny import SHAPE, flags, one_thread, records, start, write_text

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 40
RUN = ("--interval", "4", "--checkpoint-s", "0", "--seed", "3", "--accumulate", "2")
"""Rewires often and saves after every slice."""

CLOCKED = {"train_s", "tokens_per_s", "seconds"}
"""Fields of records that follow the clock."""


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def straight(tmp_path_factory, text) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    threads = torch.get_num_threads()
    assert main(flags(text, "--run", str(folder), *RUN, steps=STEPS)) == 0
    torch.set_num_threads(threads)
    return folder


def interrupted(text: Path, folder: Path, number: int, ready: Callable[[Path], bool]) -> tuple[int, str]:
    """Start the same run in a process of its own and send it a signal once it is `ready`. Exit status and output."""
    process = start(flags(text, "--run", str(folder), *RUN, steps=STEPS), folder.parent)
    deadline = time.monotonic() + 120
    while not ready(folder):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return process.returncode, out + err


def at_step(step: int) -> Callable[[Path], bool]:
    """Whether the sparse network has logged that step."""

    def ready(folder: Path) -> bool:
        path = folder / "metrics.jsonl"
        return path.is_file() and f'"twin": "sparse", "step": {step},' in path.read_text()

    return ready


def unclocked(folder: Path, twin: str) -> list[dict[str, Any]]:
    """What a network logged, without what follows the clock."""
    mine = [record for record in records(folder) if record.get("twin") == twin and record["kind"] != "time"]
    return [{name: value for name, value in record.items() if name not in CLOCKED} for record in mine]


def assert_same_run(folder: Path, straight: Path) -> None:
    """Equal final states bit for bit, patterns and optimizer included, and equal logs but for the clock."""
    for twin in ("sparse", "dense"):
        name = f"checkpoint-{twin}-{STEPS}.safetensors"
        assert (folder / name).read_bytes() == (straight / name).read_bytes()
        assert unclocked(folder, twin) == unclocked(straight, twin)
    assert (folder / "sample.txt").read_bytes() == (straight / "sample.txt").read_bytes()


@pytest.mark.parametrize("step", [13, 31])
def test_rule_9_1_a_killed_run_resumes_bit_for_bit(tmp_path, text, straight, step):
    code, _ = interrupted(text, tmp_path / "run", signal.SIGKILL, at_step(step))
    assert code == -signal.SIGKILL
    before = json.loads((tmp_path / "run" / "latest.json").read_text())["twins"]["sparse"]["step"]
    assert 0 < before < STEPS
    (tmp_path / "run" / ".latest.json.0123abcd.tmp").write_text("what a save that was killed leaves")
    second = start(["train", "text", "--resume", str(tmp_path / "run"), "--no-report"], tmp_path)
    out, err = second.communicate(timeout=120)
    assert second.returncode == 0, err
    assert f"after step {before}" in out
    assert not list((tmp_path / "run").glob(".*"))
    assert_same_run(tmp_path / "run", straight)


def test_a_run_killed_before_its_first_checkpoint_begins_again(tmp_path, text, straight):
    interrupted(text, tmp_path / "run", signal.SIGKILL, lambda folder: (folder / "run.yaml").is_file())
    for path in tmp_path.glob("run/*.safetensors"):  # had it come further
        path.unlink()
    (tmp_path / "run" / "latest.json").unlink(missing_ok=True)
    assert main(["train", "text", "--resume", str(tmp_path / "run"), "--no-report"]) == 0
    assert_same_run(tmp_path / "run", straight)


def test_control_c_saves_and_says_how_to_go_on(tmp_path, text, straight):
    code, said = interrupted(text, tmp_path / "run", signal.SIGINT, at_step(17))
    assert code == 130
    assert f"rarefy train text --resume {tmp_path / 'run'}" in said and "Traceback" not in said
    assert {record["reason"] for record in records(tmp_path / "run", "end")} == {"interrupted"}
    assert main(["train", "text", "--resume", str(tmp_path / "run"), "--no-report"]) == 0
    assert_same_run(tmp_path / "run", straight)


def test_a_finished_run_has_nothing_to_go_on_with(capsys, straight):
    assert main(["train", "text", "--resume", str(straight)]) == 2
    assert f"has taken all of its {STEPS} steps" in capsys.readouterr().err


@pytest.fixture
def half(tmp_path, straight) -> Path:
    """A run whose end has not been written yet: all that resuming looks at is there."""
    shutil.copytree(straight, tmp_path / "half")
    (tmp_path / "half" / "summary.json").unlink()
    return tmp_path / "half"


@pytest.mark.parametrize(
    "changed, name",
    [
        (["--density", "0.2"], "plan.density 0.1, and 0.2"),
        (["--width", "64"], "width 32, and 64"),
        (["--lr", "0.5"], "lr 0.004, and 0.5"),
        (["--seed", "4"], "seed 3, and 4"),
        (["--no-twin"], "twin True, and False"),
        (["--steps", "90"], f"has {STEPS} steps, and its schedules depend on that"),
        (["--minutes", "9"], f"has {STEPS} steps, and its schedules depend on that"),
    ],
)
def test_other_settings_are_refused_by_name(capsys, half, changed, name):
    before = (half / "metrics.jsonl").read_bytes()
    assert main(["train", "text", "--resume", str(half), *changed]) == 2
    said = capsys.readouterr().err
    assert name in " ".join(said.replace("│", " ").split()) and "Traceback" not in said
    assert (half / "metrics.jsonl").read_bytes() == before


def test_another_plan_is_refused(capsys, half, tmp_path):
    (tmp_path / "plan.yaml").write_text("density: 0.1\nblock: 4\nkeep_dense: [head]\n")
    assert main(["train", "text", "--resume", str(half), "--plan", str(tmp_path / "plan.yaml")]) == 2
    assert "plan." in capsys.readouterr().err


def test_repeating_the_runs_own_settings_is_fine(half, straight, text):
    own = [
        "--data",
        str(text),
        "--width",
        str(SHAPE["width"]),
        "--density",
        "0.1",
        "--method",
        "set",
        "--steps",
        str(STEPS),
    ]
    assert main(["train", "text", "--resume", str(half), "--no-report", *own]) == 0
    assert_same_run(half, straight)


def test_decisions_come_from_the_run_and_are_not_measured_again(half, monkeypatch):
    def never(*_, **__):
        raise AssertionError("timed again")

    monkeypatch.setattr("rarefy.cost.measure", never)
    settings = yaml.safe_load((half / "run.yaml").read_text())
    (half / "run.yaml").write_text(yaml.safe_dump({**settings, "measure": True}))
    assert main(["train", "text", "--resume", str(half), "--no-report"]) == 0


def test_other_text_is_refused(capsys, half, tmp_path):
    other = write_text(tmp_path / "other.txt", seed=1)
    settings = yaml.safe_load((half / "run.yaml").read_text())
    (half / "run.yaml").write_text(yaml.safe_dump({**settings, "data": str(other)}))
    assert main(["train", "text", "--resume", str(half)]) == 2
    assert "the text is not what" in capsys.readouterr().err


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-10] ^= 1
    path.write_bytes(raw)


def pickle(path: Path) -> None:
    torch.save({"w": torch.zeros(3)}, path)


@pytest.mark.parametrize("damage", [truncate, flip, pickle, Path.unlink])
def test_a_damaged_checkpoint_is_refused(capsys, half, damage):
    path = half / f"checkpoint-sparse-{STEPS}.safetensors"
    damage(path)
    assert main(["train", "text", "--resume", str(half)]) == 2
    said = capsys.readouterr().err
    assert path.name in said and "Traceback" not in said


@pytest.mark.parametrize("name", ["run.yaml", "plan.json", "latest.json", "metrics.jsonl"])
def test_a_damaged_run_is_refused(capsys, half, name):
    (half / name).write_text("{nonsense")
    assert main(["train", "text", "--resume", str(half)]) == 2
    said = capsys.readouterr().err
    assert name in said and "Traceback" not in said


def test_what_is_no_run_is_refused(capsys, tmp_path):
    assert main(["train", "text", "--resume", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["gmp", "granet"])
def test_rule_9_4_a_run_killed_while_its_density_falls_resumes_bit_for_bit(tmp_path, text, method):
    more = ("--no-twin", "--method", method)
    folder, straight = tmp_path / "run", tmp_path / "straight"
    assert main(flags(text, "--run", str(straight), *RUN, *more, steps=STEPS)) == 0
    process = start(flags(text, "--run", str(folder), *RUN, *more, steps=STEPS), tmp_path)
    while not at_step(15)(folder):
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.kill()
    process.communicate(timeout=60)
    assert 0 < json.loads((folder / "latest.json").read_text())["twins"]["sparse"]["step"] < STEPS
    assert main(["train", "text", "--resume", str(folder), "--no-report"]) == 0
    for name in (f"checkpoint-sparse-{STEPS}.safetensors", "model.safetensors", "sample.txt"):
        assert (folder / name).read_bytes() == (straight / name).read_bytes()
    assert unclocked(folder, "sparse") == unclocked(straight, "sparse")
    densities = [record["density"] for record in records(straight, "train")]
    flops = [record["flops"] for record in records(straight, "train")]
    per_step = [later - before for before, later in pairwise([0, *flops])]
    assert densities[0] > 0.4 and densities[-1] == pytest.approx(0.1, abs=1e-4) and per_step[0] > per_step[-1]
    assert {record["step"] % 4 for record in records(straight, "density")[:-1]} <= {0, 2}  # the last is at step 30
