"""What a plan decided for one layer, and what that costs in each precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rarefy.cost import LayerCost, layer_bytes, layer_flops
from rarefy.plan.precisions import Option, best, options


@dataclass(frozen=True)
class Decision:
    """What happens to one layer, and what it costs."""

    name: str
    shape: tuple[int, int]
    why_dense: str
    """Why it stays dense; empty: it becomes sparse."""
    block: tuple[int, int]
    units: int | None
    """K; None for a dense layer."""
    tokens: int | None
    """Rows of the layer's input in the sample, or those that its time is for; None without either."""
    cost: LayerCost | None
    """Times on this machine, forward and backward together, measured or predicted; None: not asked for."""
    asked_density: float | None = None
    """What the plan's distribution asks for, before it is rounded to units; None: a dense or adopted layer."""

    @property
    def is_sparse(self) -> bool:
        return not self.why_dense

    @property
    def nnz(self) -> int:
        """Weights that exist."""
        if self.units is None or not self.is_sparse:
            return self.shape[0] * self.shape[1]
        return self.units * self.block[0] * self.block[1]

    @property
    def density(self) -> float:
        size = self.shape[0] * self.shape[1]
        units = self.units or 0
        return (units * self.block[0] * self.block[1] if units else self.nnz) / size if size else 0.0

    @property
    def speedup(self) -> float | None:
        """Dense time over sparse time."""
        return None if self.cost is None else self.cost.speedup

    @property
    def options(self) -> list[Option]:
        """The layer sparse, if it has units, and dense, in each precision: time and bytes."""
        return options(self.shape, self.units, self.block, self.cost)

    def row(self) -> dict[str, Any]:
        """Plain data for tables, JSON and reports."""
        units = self.units if self.is_sparse else None
        dense_flops = layer_flops(self.shape[0] * self.shape[1])
        found = self.options
        return {
            "name": self.name,
            "shape": list(self.shape),
            "kind": "sparse" if self.is_sparse else "dense",
            "reason": self.why_dense,
            "density": self.density if self.is_sparse else 1.0,
            "asked_density": self.asked_density if self.is_sparse else None,
            "block": list(self.block),
            "units": units,
            "nnz": self.nnz,
            "bytes": layer_bytes(self.shape, units, self.block),
            "dense_bytes": layer_bytes(self.shape, None, (1, 1)),
            "flops": layer_flops(self.nnz),
            "dense_flops": dense_flops,
            "tokens": self.tokens,
            "sparse_ms": None if self.cost is None else self.cost.sparse_ms,
            "dense_ms": None if self.cost is None else self.cost.dense_ms,
            "speedup": self.speedup,
            "times": None if self.cost is None else self.cost.source,
            "precision": None if self.cost is None else self.cost.precision,
            "options": [option.row() for option in found],
            "best": best(found),
        }
