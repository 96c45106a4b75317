"""What training, comparisons and races need to know of a recipe: data, networks, judgement, and how a run ends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn

from rarefy.recipes.settings import RunSettings
from rarefy.training.calibrate import Trial
from rarefy.training.subject import Metric, Subject
from rarefy.training.twin import StepData, Twin

S = TypeVar("S", bound=RunSettings)

SPARSE, DENSE = "sparse", "dense"
"""Names of a run's networks."""


@dataclass(frozen=True)
class DataName:
    """The data of a run, without where it lies on this machine."""

    name: str
    digest: str


@dataclass(frozen=True, kw_only=True)
class Ending:
    """What a finished run has to show besides its figures."""

    heading: str
    """What the body is."""
    body: str
    hint: str
    """What to do next with the network."""


class Task(ABC, Generic[S]):
    """A recipe with its data loaded, which is done when it is made.

    Attributes:
        base: what the user said, with what follows from the data filled in.
        source: what was read, for people.

    `settings` below are settled ones of the recipe's own class.
    """

    subject: ClassVar[Subject]
    settings_class: ClassVar[type[RunSettings]]

    base: S
    data: DataName
    source: str

    @abstractmethod
    def __init__(self, base: S) -> None:
        """Reads the data. Raises ValueError where they or the settings cannot be used."""

    @property
    def name(self) -> str:
        """As `rarefy train` calls it."""
        return self.subject.name

    @property
    def metric(self) -> Metric:
        """What networks are judged by."""
        return self.subject.metric

    @abstractmethod
    def make(self, settings: S, *, dense: bool) -> Twin:
        """A network before its first step, with its optimizer and engine."""

    @abstractmethod
    def feed(self, settings: S) -> tuple[StepData, Iterable[tuple[Tensor, Tensor]]]:
        """What it trains on, and what it is judged by."""

    @abstractmethod
    def flops_per_token(self, model: nn.Module) -> int:
        """FLOPs of training on one byte or image, forward and backward, as the model is now."""

    @abstractmethod
    def narrowed(self, settings: S, nonzeros: int) -> S:
        """The settings of a dense network of about so many parameters."""

    @abstractmethod
    def field(self, minutes: float) -> tuple[str, ...]:
        """Who runs in a race of so many minutes each, unless the user says: as `rarefy compare` writes contenders, as
        many dense as sparse ones.
        """

    @abstractmethod
    def sample(self, settings: S) -> tuple[nn.Module, Tensor]:
        """The dense network on the CPU, and a batch to time its layers with."""

    @abstractmethod
    def eval_batches(self, settings: S) -> float:
        """How many forward passes of a micro-batch an evaluation takes."""

    @abstractmethod
    def ending_s(self, settings: S, trials: Mapping[str, Trial]) -> float:
        """Seconds that `end` takes, by what a few steps of each network took."""

    @abstractmethod
    def end(self, settings: S, folder: Path, twins: Sequence[Twin]) -> Ending:
        """Write what a finished run leaves besides networks and figures, and say what there is to see.

        Args:
            settings: those that the sparse network was made with, its plan as it was decided.
        Raises:
            OSError: a file could not be written.
        """

    def all_held_out(self, settings: S) -> Iterable[tuple[Tensor, Tensor]] | None:
        """All held-out data, where a finished network is judged by them and `feed` has a part; None: by `feed`'s."""
        return None

    def judged(self) -> str:
        """A sentence for people where `all_held_out` are more than what evaluations look at; empty otherwise."""
        return ""

    def about(self) -> dict[str, Any]:
        """What the run's record says besides what all records say; text runs say nothing, and were there first."""
        return {}


def name_of_data(data: str | None, otherwise: str) -> str:
    """The last part of a path."""
    if data is None:
        return otherwise
    return data if data.startswith("hf:") else Path(data).name or data
