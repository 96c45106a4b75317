"""What a run is about: what its networks are judged by, and the words for it in logs, on the screen and in reports."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Metric:
    """What networks are judged by."""

    key: str
    """Its name in records and logs."""
    title: str
    """Its name for people, after a figure too: 2.410 bits per byte, 91.20% accuracy."""
    higher_is_better: bool
    percent: bool = False
    """Whether it reads as a percentage."""
    level: float = 0.005
    """Closer than this is called level."""

    @property
    def sign(self) -> int:
        """Times this, less is better."""
        return -1 if self.higher_is_better else 1

    def of(self, record: Mapping[str, Any]) -> float:
        """What an evaluation found, from its record: NaN where it or the loss is not a number.

        Bits per byte follow from a loss in nats where the record has none.
        """
        loss, value = _number(record.get("loss")), _number(record.get(self.key))
        if self.key == BITS:
            return value if math.isfinite(value) else loss / math.log(2)
        return value if math.isfinite(loss) else math.nan

    def logged(self, loss: float) -> dict[str, float]:
        """What a log says beside a loss in nats."""
        return {BITS: loss / math.log(2)} if self.key == BITS else {}

    def show(self, value: float) -> str:
        """2.410, 91.20%; a dash for what is not a number."""
        if not math.isfinite(value):
            return "–"
        return f"{100 * value:.2f}%" if self.percent else f"{value:.3f}"

    def gap(self, difference: float) -> str:
        """A difference of two values, with its sign: +0.123, in percentage points +1.20."""
        return f"{100 * difference:+.2f}" if self.percent else f"{difference:+.3f}"


BITS = "bits_per_byte"

BITS_PER_BYTE = Metric(BITS, "bits per byte", higher_is_better=False)
ACCURACY = Metric("accuracy", "accuracy", higher_is_better=True, percent=True)


@dataclass(frozen=True)
class Subject:
    """A kind of runs, in words."""

    name: Literal["text", "images"]
    """What is learned from, and what `rarefy train` calls it."""
    metric: Metric
    short: str
    """The metric on the live line, after a figure."""
    item: str
    """What a network sees one after the other, and FLOPs and paces are counted by; one of them."""
    layers: str
    """What may become sparse."""


TEXT = Subject("text", BITS_PER_BYTE, "bits/byte", "token", "linear layers")
IMAGES = Subject("images", ACCURACY, "accuracy", "image", "layers")

SUBJECTS = {subject.name: subject for subject in (TEXT, IMAGES)}


def subject_of(record: Mapping[str, Any]) -> Subject:
    """Of a run, by the record that begins its log; one that names none is of text."""
    return SUBJECTS.get(record.get("task", TEXT.name), TEXT)


def _number(value: Any) -> float:
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else math.nan
