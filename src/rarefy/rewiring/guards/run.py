"""Guards of a whole run, which speak before its first step."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

from rarefy.methods import Method
from rarefy.rewiring.guards.base import Guard, RunView
from rarefy.selection import num_to_replace


def expected_tried(method: Method, end: int, num_units: int, num_all: int) -> float:
    """Share of the units absent at the start that are active at some time until `end`, if growth were uniform.

    A rewire that grows k of n - K absent units tries a share k / (n - K) of those never tried. Exploration R_s of ITOP
    (Liu et al. 2021, arXiv:2102.02887, section 3) is then density + (1 - density) * this. Growth by gradient comes
    back to the same units more often, so there this is about the most.
    """
    if not method.rewires or num_units >= num_all:
        return 1.0
    untried, span = 1.0, max(end - method.begin, 1)
    for t in range(method.begin or method.interval, end + 1, method.interval):
        fraction = min(
            max(method.fraction((t - method.begin) / span), 0.0), 1.0
        )  # a wrong one is the engine's to refuse
        k = num_to_replace(fraction, num_units, num_all)
        untried *= 1 - k / (num_all - num_units)
    return 1 - untried


@dataclass(frozen=True)
class Exploration(Guard):
    """Too few of the absent units will ever be tried in the steps that there are."""

    name: ClassVar[str] = "exploration"
    least: float = 0.1
    """Share of the absent units to be tried; below it a run is hardly more than a static pattern."""

    def of_run(self, run: RunView) -> str | None:
        if not run.method.rewires:
            return None
        tried = self._tried(run)
        if tried >= self.least:
            return None
        units, everything = (sum(column) for column in zip(*run.sizes, strict=True))
        explored = units / everything + (1 - units / everything) * tried
        factor = math.log1p(-self.least) / math.log1p(-tried) if tried > 0 else math.inf
        steps = "" if run.total_steps is None else f" of {run.total_steps:,} steps"
        return (
            f"rewiring every {run.method.interval} steps until step {run.end:,}{steps} will try at most about "
            f"{tried:.1%} of the units that are absent at the start (exploration R_s {explored:.3f} at a density of "
            f"{units / everything:.3g}): {self._advice(run, factor)}"
        )

    def _tried(self, run: RunView, interval: int | None = None) -> float:
        """Over all layers together."""
        method = run.method if interval is None else dataclasses.replace(run.method, interval=interval)
        by_size = {size: expected_tried(method, run.end, *size) for size in set(run.sizes)}
        absent = sum(n - k for k, n in run.sizes)
        return sum((n - k) * by_size[k, n] for k, n in run.sizes) / absent if absent else 1.0

    def _advice(self, run: RunView, factor: float) -> str:
        """The longest interval that is enough; else how much larger the fraction, or longer the run, would have to be.

        What is tried grows with the number of rewires times their fraction, which gives a first guess.
        """
        interval = min(run.method.interval - 1, int(run.method.interval / factor)) if factor < math.inf else 0
        while interval >= 1 and self._tried(run, interval) < self.least:
            interval -= 1
        longer = (
            ""
            if factor == math.inf
            else f", a fraction {factor:.1f} times as large, or {factor:.1f} times as many steps"
        )
        if interval < 1:
            return "no interval is short enough; " + (
                f"take{longer[1:]}" if longer else "rewire earlier (begin, end) or train for longer"
            )
        return f"use interval={interval} (or shorter){longer}"


@dataclass(frozen=True)
class FrozenEnd(Guard):
    """The last pattern has too few steps to be trained in."""

    name: ClassVar[str] = "frozen end"
    least: float = 0.1
    """Share of the run's steps that should follow the last rewire."""

    def of_run(self, run: RunView) -> str | None:
        if not run.method.rewires or run.total_steps is None:
            return None
        left = max(run.total_steps - run.end, 0)
        if left >= self.least * run.total_steps:
            return None
        return (
            f"rewiring goes on until step {run.end:,} of {run.total_steps:,}, which leaves {left:,} steps with the "
            f"last pattern: set end={int(0.75 * run.total_steps)}, or leave it out, which means 75% of the run"
        )
