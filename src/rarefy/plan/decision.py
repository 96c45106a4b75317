"""What a plan decided for one layer, and what that costs in each precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rarefy.cost import Convolution, LayerCost, layer_bytes, layer_flops
from rarefy.nn.low_rank import low_rank_weights
from rarefy.plan.layers import dims
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
    """Times on this machine, forward and backward together, measured or predicted, with the last units; None: not asked
    for."""
    last_units: int | None = None
    """K at the end of a density that moves; None, or `units`: it stays."""
    rank: int = 0
    """Of the low-rank part beside the units; 0: none."""
    asked_density: float | None = None
    """What the plan's distribution asks for, before it is rounded to units; None: a dense or adopted layer."""
    kernel: tuple[int, ...] | None = None
    """Of a convolution."""
    computes_dense: bool = False
    """Whether it is dense enough to multiply as a dense layer does (`Plan.dense_above`); at its first density."""
    convolution: Convolution | None = None
    """What a convolution does in the sample; None: there is none, or it is a linear layer."""
    groups: int = 1
    """Of a convolution's channels."""

    @property
    def dims(self) -> tuple[int, ...]:
        """Of the dense weight: (out, in), or (out, in / groups, *kernel)."""
        return dims(self.shape, self.kernel)

    @property
    def is_sparse(self) -> bool:
        return not self.why_dense

    @property
    def nnz(self) -> int:
        """Weights that exist, those of a low-rank part included."""
        if self.units is None or not self.is_sparse:
            return self.shape[0] * self.shape[1]
        return self.units * self.block[0] * self.block[1] + low_rank_weights(self.shape, self.rank)

    @property
    def density(self) -> float:
        size, weights = self.shape[0] * self.shape[1], self.nnz
        if self.units:  # of a layer left dense: the density that it would have had
            weights = self.units * self.block[0] * self.block[1] + low_rank_weights(self.shape, self.rank)
        return weights / size if size else 0.0

    @property
    def last_density(self) -> float:
        """Density at the end of one that moves."""
        size = self.shape[0] * self.shape[1]
        if not self.is_sparse or self.last_units is None or not size:
            return self.density
        return self.last_units * self.block[0] * self.block[1] / size

    @property
    def speedup(self) -> float | None:
        """Dense time over sparse time."""
        return None if self.cost is None else self.cost.speedup

    @property
    def options(self) -> list[Option]:
        """The layer sparse, if it has units, and dense, in each precision: time and bytes."""
        return options(self.shape, self.units, self.block, self.cost, rank=self.rank, groups=self.groups)

    def row(self) -> dict[str, Any]:
        """Plain data for tables, JSON and reports."""
        units = self.units if self.is_sparse else None
        rank = self.rank if self.is_sparse else 0
        dense_flops = layer_flops(self.shape[0] * self.shape[1])
        found = self.options
        return {
            "name": self.name,
            "shape": list(self.shape),
            "kernel": None if self.kernel is None else list(self.kernel),
            "kind": "sparse" if self.is_sparse else "dense",
            "reason": self.why_dense,
            "density": self.density if self.is_sparse else 1.0,
            "last_density": self.last_density if self.is_sparse else 1.0,
            "asked_density": self.asked_density if self.is_sparse else None,
            "block": list(self.block),
            "units": units,
            "rank": rank,
            "nnz": self.nnz,
            "computes": "dense" if self.computes_dense or not self.is_sparse else "sparse",
            "bytes": layer_bytes(
                self.shape, units, self.block, rank=rank, computes_dense=self.computes_dense, groups=self.groups
            ),
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
