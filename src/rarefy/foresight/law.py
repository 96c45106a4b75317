"""What a network will have learned after so many bytes: a scaling law in weights that exist, density, depth and bytes.

    L = E + A f(s)^g / (N^a (l / 4)^d) + B / D^b + (extra of the block),     f(s) = s^-0.0097 - 0.273 (1 - s)^0.847

N trained numbers, s density of the sparse layers, l transformer blocks, D bytes trained on, L nats a byte on held-out
text.

Source:
    Wu et al. 2026, "When Data Is Scarce", arXiv:2606.01155, with a = b = 0.327 and g = 1. Depth is ours: of as many
    weights in two blocks and in four, four learned more in minutes (docs/log.md, 2026-11-28). Which of the exponents
    are the paper's here, and which were fitted because its own did not hold for small networks and minutes of training,
    is in the fit's `fitted_exponents`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import numpy as np

PAPER = {"a": 0.327, "b": 0.327, "g": 1.0, "d": 0.0}
"""Exponents of N, of D, the power of the density factor, and the exponent of depth, of which the paper says nothing."""

USUAL_LAYERS = 4
"""Depth at which A is what it says."""

FORMAT = 2
"""Of the JSON."""


@dataclass(frozen=True)
class Point:
    """What the law is asked about."""

    nonzeros: float
    """N."""
    tokens: float
    """D, bytes trained on, repeated ones included."""
    density: float = 1.0
    """s, in (0, 1]."""
    block: tuple[int, int] = (1, 1)
    """Unit shape; of a dense network (1, 1)."""
    layers: float = USUAL_LAYERS
    """Transformer blocks."""


def density_factor(density: float) -> float:
    """f(s): 1 for a dense network, below it for a sparse one of as many nonzeros.

    Raises:
        ValueError: density outside (0, 1].
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must lie in (0, 1], got {density}")
    return density**-0.0097 - 0.273 * (1 - density) ** 0.847


def block_name(block: tuple[int, int]) -> str:
    """As in the coefficients: 4x4."""
    return f"{block[0]}x{block[1]}"


def columns(point: Point, exponents: Mapping[str, float], blocks: tuple[str, ...]) -> np.ndarray:
    """(3 + blocks,) what E, A, B and the blocks' extras are multiplied with."""
    extras = [float(block_name(point.block) == name) for name in blocks]
    return np.array([1.0, _of_nonzeros(point, exponents), point.tokens ** -exponents["b"], *extras])


def _of_nonzeros(point: Point, exponents: Mapping[str, float]) -> float:
    """What A is multiplied with."""
    weights = point.nonzeros ** exponents["a"] * (point.layers / USUAL_LAYERS) ** exponents["d"]
    return density_factor(point.density) ** exponents["g"] / weights


@dataclass(frozen=True, kw_only=True)
class Law:
    """A fitted law.

    Raises:
        ValueError: coefficients that are negative or not finite, or a covariance of another size.
    """

    E: float
    A: float
    B: float
    exponents: Mapping[str, float] = field(default_factory=lambda: dict(PAPER))
    """a, b, g and d."""
    blocks: Mapping[str, float] = field(default_factory=dict)
    """"4x4" -> nats a byte that such units cost beside single ones. 1x1 costs nothing; others are not known."""
    spread: float = 0.0
    """Standard deviation of loss / prediction - 1 over the runs of the fit."""
    fitted_exponents: tuple[str, ...] = ()
    """Those that were fitted; the others are the paper's."""
    covariance: tuple[tuple[float, ...], ...] | None = None
    """Of E, A, B, the blocks' extras and the fitted exponents, in this order; None: taken as exact."""
    covers: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """"nonzeros", "tokens", "density", "layers", "attention" (its features, as a share of the width), "tokens_per_step"
    -> least and most among the runs."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Where it comes from: data, machines, date, command, runs, and errors on runs that it was not fitted on."""

    def __post_init__(self) -> None:
        for name, value in {"E": self.E, "A": self.A, "B": self.B, **self.exponents, **self.blocks}.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a finite number that is not negative, got {value!r}")
        size = 3 + len(self.blocks) + len(self.fitted_exponents)
        if self.covariance is not None and np.shape(self.covariance) != (size, size):
            raise ValueError(f"covariance must be {size} x {size}, got {np.shape(self.covariance)}")

    def knows(self, block: tuple[int, int]) -> bool:
        """Whether runs with such units are in the fit."""
        return block == (1, 1) or block_name(block) in self.blocks

    def loss(self, point: Point) -> float:
        """Nats a byte.

        Raises:
            ValueError: a block that the fit knows nothing of, or a density outside (0, 1].
        """
        if not self.knows(point.block):
            raise ValueError(f"the law has no runs with blocks of {block_name(point.block)}")
        return float(columns(point, self.exponents, tuple(self.blocks)) @ self._coefficients)

    def sigma(self, point: Point) -> float:
        """Standard deviation of a run's loss around `loss`, nats a byte: of runs, and of the fit, which grows with the
        distance from them.
        """
        slope = self._slope(point)
        return math.sqrt(self._variance(slope) + (self.spread * self.loss(point)) ** 2)

    def sigma_between(self, one: Point, other: Point) -> float:
        """The same of the difference of two runs: what moves both predictions alike counts for nothing."""
        slope = self._slope(one) - self._slope(other)
        own = (self.spread * self.loss(one)) ** 2 + (self.spread * self.loss(other)) ** 2
        return math.sqrt(self._variance(slope) + own)

    def outside(self, **values: float) -> list[str]:
        """Which of the values, named as in `covers`, lie beyond what the fit has seen."""
        found = []
        for name, value in values.items():
            low, high = self.covers.get(name, (-math.inf, math.inf))
            if not low * (1 - 1e-3) <= value <= high * (1 + 1e-3):
                found.append(name)
        return found

    @property
    def _coefficients(self) -> np.ndarray:
        return np.array([self.E, self.A, self.B, *self.blocks.values()])

    def _variance(self, slope: np.ndarray) -> float:
        return 0.0 if self.covariance is None else max(0.0, float(slope @ np.asarray(self.covariance) @ slope))

    def _slope(self, point: Point) -> np.ndarray:
        return np.concatenate(
            [
                columns(point, self.exponents, tuple(self.blocks)),
                exponent_slopes(point, self.A, self.B, self.exponents, self.fitted_exponents),
            ]
        )

    # -- as data ------------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` reads back."""
        return {
            "format": FORMAT, "E": self.E, "A": self.A, "B": self.B, "exponents": dict(self.exponents),
            "fitted_exponents": list(self.fitted_exponents), "blocks": dict(self.blocks), "spread": self.spread,
            "covers": {name: list(ends) for name, ends in self.covers.items()},
            "covariance": None if self.covariance is None else [list(row) for row in self.covariance],
            "provenance": dict(self.provenance),
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Any) -> Law:
        """Raises ValueError for what is not one."""
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise ValueError(f"not a scaling law of format {FORMAT}")
        try:
            rows = data["covariance"]
            return cls(
                E=data["E"],
                A=data["A"],
                B=data["B"],
                exponents=dict(data["exponents"]),
                blocks=dict(data["blocks"]),
                spread=data["spread"],
                fitted_exponents=tuple(data["fitted_exponents"]),
                covariance=None if rows is None else tuple(tuple(row) for row in rows),
                covers={name: (low, high) for name, (low, high) in data["covers"].items()},
                provenance=data["provenance"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a scaling law: {error!r}") from error


def exponent_slopes(
    point: Point, A: float, B: float, exponents: Mapping[str, float], names: tuple[str, ...]
) -> np.ndarray:
    """(names,) derivatives of the loss by these exponents."""
    of_nonzeros = A * _of_nonzeros(point, exponents)
    of_tokens = B * point.tokens ** -exponents["b"]
    slopes = {
        "a": -of_nonzeros * math.log(point.nonzeros),
        "b": -of_tokens * math.log(point.tokens),
        "g": of_nonzeros * math.log(density_factor(point.density)),
        "d": -of_nonzeros * math.log(point.layers / USUAL_LAYERS),
    }
    return np.array([slopes[name] for name in names])


def shipped_law() -> Law:
    """The law that comes with the package, fitted to byte-level runs."""
    text = resources.files("rarefy.foresight").joinpath("law.json").read_text(encoding="utf-8")
    return Law.from_json(json.loads(text))
