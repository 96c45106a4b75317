"""The law fitted to runs: coefficients by non-negative least squares, exponents by a search where they are free."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rarefy.cost.model import nnls
from rarefy.foresight.law import PAPER, Law, Point, block_name, columns, exponent_slopes

SEARCHED: Mapping[str, np.ndarray] = {
    "a": np.geomspace(0.05, 1.0, 13),
    "b": np.geomspace(0.05, 2.0, 16),
    "g": np.linspace(0.0, 4.0, 13),
    "d": np.linspace(0.0, 1.0, 6),
}
"""Where free exponents are looked for at first; then ever closer around the best."""

REFINEMENTS = 4


@dataclass(frozen=True)
class Run:
    """A run's end."""

    point: Point
    loss: float
    """Nats a byte on held-out text."""
    tokens_per_step: int = 2048
    attention: float = 1.0
    """Features of attention, as a share of the width."""
    network: tuple[Hashable, ...] = ()
    """How it was found (dense, static, set), and its shape."""
    rate: Hashable = None
    """Its learning rates."""
    weight: float = 1.0
    """In a fit; seeds of one network share one."""


def fit(runs: Sequence[Run], *, free: tuple[str, ...] = (), provenance: Mapping[str, Any] | None = None) -> Law:
    """The law whose relative errors on the runs have the least squares.

    Args:
        free: exponents that are fitted too; the others stay the paper's.
        provenance: kept with it.
    Raises:
        ValueError: fewer runs than constants.
    """
    names = sorted({block_name(run.point.block) for run in runs} - {"1x1"})
    size, worth = 3 + len(names) + len(free), sum(run.weight for run in runs)
    if worth < size + 0.5:
        raise ValueError(f"{size} constants need more runs than {worth:.0f}, seeds aside")
    blocks = tuple(names)
    exponents = _search(runs, free, blocks)
    found, _ = _solve(runs, exponents, blocks)
    losses, weights = np.array([run.loss for run in runs]), np.array([run.weight for run in runs])
    errors = np.array([columns(run.point, exponents, blocks) for run in runs]) @ found / losses - 1
    spread = float(np.sqrt((weights * errors**2).sum() / (worth - size)))
    points = [run.point for run in runs]
    seen = {
        "nonzeros": [point.nonzeros for point in points],
        "tokens": [point.tokens for point in points],
        "density": [point.density for point in points],
        "layers": [float(point.layers) for point in points],
        "attention": [run.attention for run in runs],
        "tokens_per_step": [float(run.tokens_per_step) for run in runs],
    }
    E, A, B, *extras = map(float, found)
    return Law(
        E=E, A=A, B=B, exponents=exponents, blocks=dict(zip(names, extras, strict=True)), spread=spread,
        fitted_exponents=free, covariance=_covariance(runs, A, B, exponents, blocks, free, spread),
        covers={name: (min(values), max(values)) for name, values in seen.items()}, provenance=provenance or {},
    )  # fmt: skip


def relative_errors(law: Law, runs: Sequence[Run]) -> list[float]:
    """Prediction over loss, minus 1, of each run."""
    return [law.loss(run.point) / run.loss - 1 for run in runs]


def left_out(runs: Sequence[Run], free: tuple[str, ...]) -> list[float]:
    """Relative errors on the runs of each shape of a law fitted to the runs of all others, whatever found the pattern;
    none of blocks that no other shape has.

    Raises:
        ValueError: without one of the shapes there are too few runs.
    """
    errors = []
    for shape in dict.fromkeys(run.network[1:] for run in runs):
        law = fit([run for run in runs if run.network[1:] != shape], free=free)
        errors += relative_errors(law, [r for r in runs if r.network[1:] == shape and law.knows(r.point.block)])
    return errors


def _search(runs: Sequence[Run], free: tuple[str, ...], blocks: tuple[str, ...]) -> dict[str, float]:
    best = dict(PAPER)
    grids = {name: SEARCHED[name] for name in free}
    for _ in range(1 + REFINEMENTS if free else 0):
        tried = [{**PAPER, **dict(zip(free, values, strict=True))} for values in itertools.product(*grids.values())]
        best = min(tried, key=lambda exponents: _solve(runs, exponents, blocks)[1])
        for name, grid in grids.items():
            at = int(np.argmin(np.abs(grid - best[name])))
            low, high = grid[max(at - 1, 0)], grid[min(at + 1, len(grid) - 1)]
            grids[name] = np.linspace(low, high, 9)
    return {name: float(value) for name, value in best.items()}


def _solve(runs: Sequence[Run], exponents: Mapping[str, float], blocks: tuple[str, ...]) -> tuple[np.ndarray, float]:
    """Coefficients, and the sum of squared relative errors."""
    losses = np.array([run.loss for run in runs])
    weights = np.sqrt([run.weight for run in runs])
    relative = np.array([columns(run.point, exponents, blocks) for run in runs]) / losses[:, None] * weights[:, None]
    scale = relative.max(axis=0)
    found = nnls(relative / scale, weights)
    return found / scale, float(((relative / scale @ found - weights) ** 2).sum())


def _covariance(
    runs: Sequence[Run],
    A: float,
    B: float,
    exponents: Mapping[str, float],
    blocks: tuple[str, ...],
    free: tuple[str, ...],
    spread: float,
) -> tuple[tuple[float, ...], ...]:
    """Of the constants, as far as the law is straight around its best."""
    rows = [
        np.concatenate([columns(run.point, exponents, blocks), exponent_slopes(run.point, A, B, exponents, free)])
        / run.loss
        * math.sqrt(run.weight)
        for run in runs
    ]
    slopes = np.array(rows)
    scale = np.abs(slopes).max(axis=0)
    scale[scale == 0] = 1.0  # a constant that moves no run
    inverse = np.linalg.pinv((slopes / scale).T @ (slopes / scale), rcond=1e-12)
    covariance = spread**2 * inverse / np.outer(scale, scale)
    return tuple(tuple(map(float, row)) for row in covariance)
