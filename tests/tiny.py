"""Text runs that take a second: a text made up from a formula, networks of a few thousand weights."""

from __future__ import annotations

import gzip
import json
import os
import random
import shlex
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import rarefy
from rarefy.plan import Plan
from rarefy.recipes.text import TextSettings
from rarefy.recipes.text.networks import make_dense, make_sparse
from rarefy.training.twin import Twin

WORDS = [
    "sparse",
    "dense",
    "pattern",
    "units",
    "rewire",
    "drop",
    "grow",
    "newborn",
    "survivor",
    "value",
    "layer",
    "step",
]

SHAPE: dict[str, Any] = {
    "width": 32, "layers": 1, "heads": 2, "context": 16, "batch": 2, "eval_bytes": 64, "eval_interval": 3,
    "sample_bytes": 8, "measure": False, "threads": 1,
}  # fmt: skip


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Networks this small are slower on more, much slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_text(path: Path, num_bytes: int = 4000, seed: int = 0) -> Path:
    """A file of lines of words."""
    rng = random.Random(seed)
    text = ""
    while len(text) < num_bytes:
        text += " ".join(rng.choices(WORDS, k=8)) + "\n"
    path.write_text(text[:num_bytes])
    return path


def settings(data: Path, **changes: Any) -> TextSettings:
    """Settings of a tiny run."""
    return TextSettings(**{**SHAPE, "data": str(data), "steps": 12, **changes})


def make_twins(given: TextSettings, plan: Plan) -> list[Twin]:
    """Both networks of settled settings."""
    return [make_sparse(given, plan), make_dense(given)]


def flags(data: Path, *more: str, steps: int | None = 12) -> list[str]:
    """The same as arguments of `rarefy`, without a report."""
    arguments = ["train", "text", "--data", str(data), "--no-report"]
    for name, value in SHAPE.items():
        flag = name.replace("_", "-")
        arguments += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return [*arguments, *(["--steps", str(steps)] if steps else []), *more]


def start(arguments: Sequence[str], folder: Path) -> subprocess.Popen[str]:
    """`rarefy` in a process of its own."""
    source = str(Path(rarefy.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "rarefy.cli.main", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def records(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if kind in (None, record["kind"])]


def write_images(folder: Path, *, suffix: str = "", seed: int = 0) -> Path:
    """A folder in the layout of MNIST: 64 and 20 noisy images of 6 x 6, whose brightest row says what they are."""
    rng = random.Random(seed)
    folder.mkdir()
    for part, count in (("train", 64), ("t10k", 20)):
        labels = [at % 6 for at in range(count)]
        pixels = bytes(
            min(255, rng.randrange(60) + 180 * (row == label)) for label in labels for row in range(6) for _ in range(6)
        )
        for name, shape, entries in (
            (f"{part}-images-idx3-ubyte", (count, 6, 6), pixels),
            (f"{part}-labels-idx1-ubyte", (count,), bytes(labels)),
        ):
            raw = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + entries
            (folder / (name + suffix)).write_bytes(gzip.compress(raw) if suffix == ".gz" else raw)
    return folder


def cut_short(process: subprocess.Popen[str], number: signal.Signals, ready: Callable[[], bool]) -> None:
    """Send a signal to a command as soon as it has come far enough; one that it can hear it must answer politely."""
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)
    process.send_signal(number)
    said, err = process.communicate(timeout=60)
    if number == signal.SIGINT:
        again = shlex.join(["rarefy", *cast(list[str], process.args)[3:]])
        assert process.returncode == 130 and f"the same command goes on: {again}\n" in said and "Traceback" not in err
