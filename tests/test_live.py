"""The live line: all of it where it fits, plain lines where there is no terminal."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
from rich.console import Console

from rarefy.training.live import LiveLine
from rarefy.training.subject import IMAGES
from rarefy.training.twin import StepResult, Twin
from tiny import make_twins, settings, write_text


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt")


def live(width: int, text: Path) -> tuple[LiveLine, list[Twin], io.StringIO]:
    out = io.StringIO()
    line = LiveLine(Console(file=out, force_terminal=True, width=width))
    given = settings(text).settled(1200)
    twins = make_twins(given, given.plan)
    line.begin(twins, 1200, 2048)
    for twin in twins:
        twin.step, twin.clock.forward_s = 100, 10.0
        line.stepped(twin, StepResult(loss=math.log(2), grad_norm=1.0, churn=0.25, rewires=[{}]))
        line.evaluated(twin, 2 * math.log(2))
    return line, twins, out


@pytest.mark.parametrize("width", [200, 110, 80])
def test_the_live_line_shows_what_fits(text, width):
    line, _, out = live(width, text)
    line.end()
    shown = line.line()
    assert len(shown) < width
    for part in ("100/1,200", "loss 0.693", "2.000", "bits/byte", "205", "tokens/s", "churn 0.25", "left"):
        assert part in shown
    assert ("density 0.1" in shown) == (width > 80)
    assert ("(dense 2.000)" in shown) == (width > 110)
    assert shown.rpartition("churn")[0] in out.getvalue()  # the last state stays on the screen


def test_a_run_of_images_shows_accuracy(text):
    line = LiveLine(Console(file=io.StringIO(), force_terminal=True, width=200), IMAGES)
    given = settings(text).settled(1200)
    twin = make_twins(given, given.plan)[0]
    line.begin([twin], 1200, 128)
    twin.step, twin.clock.forward_s = 100, 10.0
    line.stepped(twin, StepResult(loss=1.0, grad_norm=1.0, churn=0.25, rewires=[]))
    assert "– accuracy" in line.line() and "13 images/s" in line.line()
    twin.assessed = {"loss": 1.0, "accuracy": 0.6125}
    line.evaluated(twin, 1.0)
    line.end()
    assert "61.25% accuracy" in line.line() and "bits" not in line.line()


def test_elsewhere_there_is_a_plain_line_now_and_then(text):
    out = io.StringIO()
    line = LiveLine(Console(file=out, width=80), plain_every_s=0)
    given = settings(text).settled(1200)
    twin = make_twins(given, given.plan)[0]
    line.begin([twin], 1200, 2048)
    for step in (1, 2):
        twin.step, twin.clock.forward_s = step, step * 0.5
        line.stepped(twin, StepResult(loss=1.0, grad_norm=1.0, churn=0.0, rewires=[]))
    said = out.getvalue().splitlines()
    assert [part.split(" · ")[0] for part in said] == ["step 1/1,200", "step 2/1,200"]
    assert "4,096 tokens/s" in said[0] and "density 0.1" in said[0] and "\x1b" not in out.getvalue()
