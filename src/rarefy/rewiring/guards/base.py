"""What a guard is asked, and what it sees: of a run, of a layer, of hidden neurons, of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rarefy.methods import Method
from rarefy.pattern import Pattern


@dataclass(frozen=True)
class RunView:
    """What a guard sees of a run before its first step."""

    method: Method
    end: int
    """Last step after which a layer may rewire."""
    total_steps: int | None
    sizes: Sequence[tuple[int, int]]
    """(K, n) of each layer."""


@dataclass(frozen=True)
class PatternView:
    """What a guard sees of a layer, at the start and after each of its rewires."""

    method: Method
    pattern: Pattern
    rms: float
    """Root mean square of the values."""
    first_units: int
    """K at the start."""
    first_rms: float
    """`rms` at the start."""
    newborns: Sequence[tuple[int, float]] = ()
    """Of the last rewires whose newborns have met one more: how many there were, and the share that was left."""


@dataclass(frozen=True)
class NeuronView:
    """What a guard sees of the hidden neurons of an MLP."""

    method: Method
    up: Pattern
    """Its rows are the neurons' inputs."""
    down: Pattern
    """Its columns are the neurons' outputs."""


@dataclass(frozen=True)
class LossView:
    """What a guard sees of the training loss around a rewire."""

    before: Sequence[float]
    """Of the last steps before the rewire, the one of the rewire included."""
    after: Sequence[float]
    """Of the steps after it, so far."""


class Guard:
    """Answers with a message, which has the figures and what to change, or None."""

    name: ClassVar[str]

    def of_run(self, run: RunView) -> str | None:
        """At `attach`, when the number of steps is known."""
        return None

    def of_pattern(self, seen: PatternView) -> str | None:
        """Of each layer, at `attach` and after each of its rewires."""
        return None

    def of_neurons(self, seen: NeuronView) -> str | None:
        """Of each MLP, at `attach` and after each rewire of one of its layers."""
        return None

    def of_losses(self, seen: LossView) -> str | None:
        """After each of the steps that follow a rewire."""
        return None
