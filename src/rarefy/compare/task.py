"""What a comparison needs to know of a recipe: data, networks, what they are judged by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from rarefy.training.twin import StepData, Twin

NOT_DEFINING = frozenset(
    {
        "data", "minutes", "twin", "measure", "evaluations", "slice_steps", "checkpoint_s", "recompute", "sample_bytes",
        "threads",
    }
)  # fmt: skip
"""Settings that say where and how a run goes, not what comes out of it."""

ONLY_SPARSE = frozenset({"plan", "lr", "sparse_lr", "optimizer", "ramp"})
"""Settings that a dense network does not look at, but for SGD."""

ONLY_DENSE = frozenset({"dense_lr"})


@dataclass(frozen=True)
class Metric:
    """What networks are judged by."""

    key: str
    """Its name in records and logs."""
    title: str
    """Its name for people."""
    higher_is_better: bool
    percent: bool = False
    """Whether it reads as a percentage."""


@dataclass(frozen=True)
class DataName:
    """The data of a comparison, without where it lies on this machine."""

    name: str
    digest: str


class Task(Protocol):
    """A recipe with its data loaded. `settings` are settled ones of the recipe's own class."""

    name: str
    base: Any
    """What all contenders share, as the user said it."""
    data: DataName
    source: str
    """What was read, for people."""
    metric: Metric

    def make(self, settings: Any, *, dense: bool) -> Twin:
        """A network before its first step, with its optimizer and engine."""
        ...

    def feed(self, settings: Any) -> tuple[StepData, Iterable[tuple[Tensor, Tensor]]]:
        """What it trains on, and what it is judged by."""
        ...

    def flops_per_token(self, model: nn.Module) -> int:
        """FLOPs of training on one byte or image, forward and backward, as the model is now."""
        ...

    def narrowed(self, settings: Any, nonzeros: int) -> Any:
        """The settings of a dense network of about so many parameters."""
        ...


def name_of_data(data: str | None, otherwise: str) -> str:
    """The last part of a path."""
    if data is None:
        return otherwise
    return data if data.startswith("hf:") else Path(data).name or data
