"""Milliseconds of a layer as a sum of physical terms, each with a coefficient that is fitted and never negative."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rarefy.cost.batching import DEFAULT, Batching
from rarefy.cost.convolution import Convolution
from rarefy.cost.terms import terms
from rarefy.cost.work import PASSES, Pass, Work
from rarefy.settings import from_plain

FORMAT = 2
"""Of the JSON; another one is not read."""


@dataclass(frozen=True)
class Timed:
    """Work, and what it took: medians."""

    work: Work
    forward_ms: float
    step_ms: float

    def ms(self, which: Pass) -> float:
        """Of one of the passes."""
        return self.forward_ms if which == "forward" else self.step_ms


@dataclass(frozen=True)
class CostModel:
    """Predicts what a layer takes under the conditions that it was fitted in.

    Raises:
        ValueError: not a model: wrong terms, or coefficients that are negative or not finite.
    """

    coefficients: Mapping[str, Mapping[str, float]]
    """"PRECISION STRUCTURE PASS" -> term -> milliseconds a unit of it."""

    l2_bytes: int
    """Cache of a core, which some terms depend on."""

    conditions: Mapping[str, Any] = field(default_factory=dict)
    """What it holds for (`rarefy.cost.host.conditions`)."""

    fitted: Mapping[str, Any] = field(default_factory=dict)
    """date, seconds, points, and median_error and p90_error of the fit on its own points."""

    batching: Batching = DEFAULT
    """How convolutions share out images, which some terms depend on."""

    def __post_init__(self) -> None:
        if not isinstance(self.l2_bytes, int) or self.l2_bytes < 0:
            raise ValueError(f"l2_bytes must be a number of bytes, got {self.l2_bytes!r}")
        for key, given in self.coefficients.items():
            for name, value in given.items():
                if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                    raise ValueError(f"{key}: {name} must be a finite time that is not negative, got {value!r}")

    def knows(self, work: Work) -> bool:
        """Whether such a structure in such a precision was timed."""
        return all(f"{work.kind} {which}" in self.coefficients for which in PASSES)

    def ms(self, work: Work, which: Pass = "step") -> float | None:
        """Milliseconds of one pass; None for a structure or precision that was not timed, or an empty matrix."""
        if not self.knows(work) or min(*work.shape, work.tokens) < 1:
            return None
        coefficients = self.coefficients[f"{work.kind} {which}"]
        amounts = terms(work, which, self.l2_bytes, self.batching)
        return sum(coefficients.get(name, 0.0) * amount for name, amount in amounts.items())

    # -- as data ------------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` reads back."""
        return {
            "format": FORMAT,
            "conditions": dict(self.conditions),
            "fitted": dict(self.fitted),
            "l2_bytes": self.l2_bytes,
            "batching": dataclasses.asdict(self.batching),
            "coefficients": {key: dict(given) for key, given in self.coefficients.items()},
        }

    @classmethod
    def from_json(cls, data: Any) -> CostModel:
        """Raises ValueError for what is not one."""
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise ValueError(f"not a cost model of format {FORMAT}")
        for name in ("conditions", "fitted", "coefficients", "batching"):
            if not isinstance(data.get(name), Mapping):
                raise ValueError(f"{name} should be a mapping, got {data.get(name)!r}")
        pixel = Convolution((1, 1, 1, 1), (1, 1), (2, 2))
        works = [Work((1, 1), 1, 1, block, conv=conv) for block in (None, (1, 1)) for conv in (None, pixel)]
        known = {name for work in works for name in terms(work, "step", 0)}
        for key, given in data["coefficients"].items():
            if not isinstance(given, Mapping) or not set(given) <= known:
                raise ValueError(f"{key} should be terms and their times, got {given!r}")
        batching = from_plain(Batching, data["batching"], where="batching")
        return cls(data["coefficients"], data.get("l2_bytes", -1), data["conditions"], data["fitted"], batching)


# -- fitting ----------------------------------------------------------------------------------------------------------


def fit(
    timed: Sequence[Timed],
    *,
    l2_bytes: int,
    conditions: Mapping[str, Any] | None = None,
    fitted: Mapping[str, Any] | None = None,
    batching: Batching = DEFAULT,
) -> CostModel:
    """The model whose relative errors on these timings are least, kind by kind.

    Points that disagree with the rest count less (Huber): other work on the machine only ever adds to a time.
    """
    coefficients: dict[str, dict[str, float]] = {}
    kinds: dict[str, list[Timed]] = {}
    for point in timed:
        kinds.setdefault(point.work.kind, []).append(point)
    for kind, points in kinds.items():
        for which in PASSES:
            amounts = [terms(point.work, which, l2_bytes, batching) for point in points]
            names = list(amounts[0])
            matrix = np.array([[amount[name] for name in names] for amount in amounts], dtype=float)
            times = np.array([point.ms(which) for point in points], dtype=float)
            found = fit_relative(matrix, times)
            coefficients[f"{kind} {which}"] = {n: float(c) for n, c in zip(names, found, strict=True) if c > 0}
    model = CostModel(coefficients, l2_bytes, conditions or {}, {}, batching)
    errors = np.abs([error(model, point) for point in timed]) if timed else np.zeros(1)
    about = {**(fitted or {}), "points": len(timed)}
    about |= {"median_error": float(np.median(errors)), "p90_error": float(np.quantile(errors, 0.9))}
    return CostModel(coefficients, l2_bytes, conditions or {}, about, batching)


def error(model: CostModel, point: Timed, which: Pass = "step") -> float:
    """Predicted over measured, minus 1."""
    predicted = model.ms(point.work, which)
    assert predicted is not None, "of a kind that was fitted"
    return predicted / point.ms(which) - 1.0


HUBER = 0.1
"""Relative error from which on a point counts less."""


def fit_relative(matrix: np.ndarray, times: np.ndarray) -> np.ndarray:
    """c >= 0 that minimises the Huber loss of (matrix @ c) / times - 1, by reweighted least squares."""
    scale = np.maximum(matrix.max(axis=0), 1e-300)
    relative = matrix / scale / times[:, None]
    weights = np.ones(len(times))
    found = np.zeros(matrix.shape[1])
    for _ in range(6):
        found = nnls(relative * weights[:, None], weights)
        miss = np.abs(relative @ found - 1.0)
        weights = np.sqrt(np.minimum(1.0, HUBER / np.maximum(miss, 1e-12)))
    return found / scale


def nnls(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """argmin |matrix @ c - target| over c >= 0.

    Source:
        Lawson and Hanson 1974, "Solving Least Squares Problems", chapter 23.
    """
    size = matrix.shape[1]
    found, free = np.zeros(size), np.zeros(size, dtype=bool)
    enough = 1e-10 * max(1.0, float(np.abs(matrix.T @ target).max(initial=0.0)))
    for _ in range(3 * size + 10):
        slope = matrix.T @ (target - matrix @ found)
        if free.all() or (slope[~free] <= enough).all():
            break
        free[np.argmax(np.where(free, -np.inf, slope))] = True
        while True:
            best = np.zeros(size)
            best[free] = np.linalg.lstsq(matrix[:, free], target, rcond=None)[0]
            low = free & (best <= 0)
            if not low.any():
                break
            step = np.min(found[low] / np.maximum(found[low] - best[low], 1e-300))
            found = found + step * (best - found)
            free &= found > 1e-14
            found[~free] = 0.0
        found = best
    return found
