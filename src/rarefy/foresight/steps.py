"""Milliseconds of a GPT's whole training step: its linear layers by the cost model, and everything else by a few terms.

Terms: norms, additions, casts and activations by tokens x width x layers, attention's products by tokens x context x
its features x layers, its scores by tokens x context x heads x layers, embedding, head's softmax and loss by tokens,
clipping and optimizer by parameters. A dense and a sparse network have their own where they run other code (a sparse
one's activation is part of its MLP; its optimizer keeps ages). The linear layers count with a factor of their own, as
caches in a step are not what they are when a layer is timed alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rarefy.cost import CostModel
from rarefy.cost.model import fit_relative
from rarefy.foresight.shape import Shape

FORMAT = 2
"""Of the JSON; another one is not read."""


def linears_ms(costs: CostModel, shape: Shape) -> float | None:
    """Forward and backward of all linear layers, timed alone; None if the cost model does not know one of them."""
    found = [costs.ms(work) for work in shape.works()]
    known = [ms for ms in found if ms is not None]
    return sum(known) if len(known) == len(found) else None


def step_terms(shape: Shape, linears: float) -> dict[str, float]:
    """Name -> amount of work in a step.

    Args:
        linears: milliseconds of the linear layers.
    """
    kind = "dense" if shape.dense else "sparse"
    spread = shape.tokens * shape.width * shape.layers
    scores = shape.tokens * shape.context * shape.layers
    return {
        "blocks": float(shape.layers),
        "tokens": float(shape.tokens),
        "attention": float(scores * shape.attended),
        "scores": float(scores * shape.heads),
        f"features, {kind}": float(spread),
        f"parameters, {kind}": float(shape.nonzeros),
        f"linears, {kind}": linears,
    }


NAMES = (
    "blocks", "tokens", "attention", "scores", "features, dense", "features, sparse", "parameters, dense",
    "parameters, sparse", "linears, dense", "linears, sparse",
)  # fmt: skip
"""Of all terms, of either kind of network."""


@dataclass(frozen=True)
class TimedStep:
    """A network, and what its step took."""

    shape: Shape
    linears: float
    """Milliseconds of its linear layers by the cost model."""
    ms: float
    """Median of the whole step."""


@dataclass(frozen=True)
class StepModel:
    """Predicts a step under the conditions that it was fitted in.

    Raises:
        ValueError: coefficients that are negative or not finite.
    """

    coefficients: Mapping[str, Mapping[str, float]]
    """Precision -> term -> milliseconds a unit of it; of linears, milliseconds a millisecond."""
    conditions: Mapping[str, Any] = field(default_factory=dict)
    """What it holds for, among it the date of the cost model whose predictions it was fitted with."""
    fitted: Mapping[str, Any] = field(default_factory=dict)
    """date, seconds, points, median_error and worst_error on its own points."""

    def __post_init__(self) -> None:
        for precision, given in self.coefficients.items():
            for name, value in given.items():
                if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                    raise ValueError(f"{precision}: {name} must be finite and not negative, got {value!r}")

    def ms(self, shape: Shape, costs: CostModel) -> float | None:
        """Of a whole step; None for a precision, a structure or dense layers that were not timed."""
        linears = linears_ms(costs, shape)
        if linears is None or shape.precision not in self.coefficients:
            return None
        return self.of(shape, linears)

    def of(self, shape: Shape, linears: float) -> float:
        """The same with the linear layers' milliseconds given; of a precision that was timed."""
        given = self.coefficients[shape.precision]
        return sum(given.get(name, 0.0) * amount for name, amount in step_terms(shape, linears).items())

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` reads back."""
        return {
            "format": FORMAT,
            "conditions": dict(self.conditions),
            "fitted": dict(self.fitted),
            "coefficients": {key: dict(given) for key, given in self.coefficients.items()},
        }

    @classmethod
    def from_json(cls, data: Any) -> StepModel:
        """Raises ValueError for what is not one."""
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise ValueError(f"not a step model of format {FORMAT}")
        for name in ("conditions", "fitted", "coefficients"):
            if not isinstance(data.get(name), Mapping):
                raise ValueError(f"{name} should be a mapping, got {data.get(name)!r}")
        for key, given in data["coefficients"].items():
            if not isinstance(given, Mapping) or not set(given) <= set(NAMES):
                raise ValueError(f"{key} should be terms and their times, got {given!r}")
        return cls(data["coefficients"], data["conditions"], data["fitted"])


def fit_steps(
    timed: Sequence[TimedStep],
    *,
    conditions: Mapping[str, Any] | None = None,
    fitted: Mapping[str, Any] | None = None,
) -> StepModel:
    """The model whose relative errors on these steps are least, precision by precision; outliers count less."""
    coefficients: dict[str, dict[str, float]] = {}
    for precision in dict.fromkeys(step.shape.precision for step in timed):
        steps = [step for step in timed if step.shape.precision == precision]
        amounts = [step_terms(step.shape, step.linears) for step in steps]
        matrix = np.array([[amount.get(name, 0.0) for name in NAMES] for amount in amounts])
        found = fit_relative(matrix, np.array([step.ms for step in steps]))
        coefficients[precision] = {name: float(c) for name, c in zip(NAMES, found, strict=True) if c > 0}
    model = StepModel(coefficients, conditions or {}, {})
    errors = np.abs([model.of(step.shape, step.linears) / step.ms - 1 for step in timed]) if timed else np.zeros(1)
    about = {**(fitted or {}), "points": len(timed)}
    about |= {"median_error": float(np.median(errors)), "worst_error": float(errors.max())}
    return StepModel(coefficients, conditions or {}, about)
