"""A linear layer whose weight is the sum of a sparse and a low-rank matrix, neither of them ever dense."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn

from rarefy.nn.linear import SparseLinear
from rarefy.pattern import Block, as_block, check_density, unit_grid


class SparseLowRank(nn.Module):
    """y = x (S + scale B A)^T + bias, with S sparse, A (rank, in_features) and B (out_features, rank) dense.

    Args:
        density: share of the matrix's entries that both parts together may have as weights, in (0, 1]: S has as many
            units as fit beside rank * (in_features + out_features).
        rank: of B A, at least 1.
        alpha: scale is alpha / rank, as in LoRA and SLTrain; None: scale is 1.
        block: unit shape of S, as for `SparseLinear`.
        generator: draws pattern and values; None: torch's global one.
        device, dtype: as for nn.Linear. On the meta device nothing is drawn until `reset_parameters`.
    Attributes:
        sparse: the `SparseLinear` that holds S and the bias; methods rewire it like any other.
        a, b: Parameters (rank, in_features) and (out_features, rank).
    Raises:
        ValueError: a setting out of range, or the low-rank part leaves no unit to the sparse one.

    Costs one `spmm` and two thin matmuls a pass: 6 FLOPs a token of training for each weight of either part, and an
    activation of `rank` numbers a token.

    Source:
        Han et al. 2024 (arXiv:2406.02214), section 3: W = B A + S, A Kaiming-uniform, B zero. Their forward adds up
        the dense weight; this one never does.
    """

    transposed: bool = False
    """As `SparseLinear.transposed`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        density: float,
        rank: int,
        alpha: float | None = None,
        block: Block = 1,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_rank(rank)
        shape, sides = (out_features, in_features), as_block(block)
        rows, cols = unit_grid(shape, sides)
        budget = check_density(density) * in_features * out_features
        units = units_beside(budget, low_rank_weights(shape, rank), sides)
        if units < 1:
            raise ValueError(no_room(shape, rank, budget))
        sparse = SparseLinear.__new__(SparseLinear)
        sparse._allocate(shape, sides, min(units, rows * cols), bias, device, dtype)
        self._set_up(sparse, rank, alpha)
        if self.a.device.type != "meta":
            self.reset_parameters(generator)

    def _set_up(self, sparse: SparseLinear, rank: int, alpha: float | None) -> None:
        check_rank(rank)
        check_alpha(alpha)
        super().__init__()
        self.in_features, self.out_features = sparse.in_features, sparse.out_features
        self.rank = rank
        self.alpha = alpha
        self.sparse = sparse
        options = {"device": sparse.values.device, "dtype": sparse.values.dtype}
        self.a = nn.Parameter(torch.empty(rank, self.in_features, **options))
        self.b = nn.Parameter(torch.empty(self.out_features, rank, **options))

    @classmethod
    def around(
        cls, sparse: SparseLinear, *, rank: int, alpha: float | None = None, generator: torch.Generator | None = None
    ) -> Self:
        """`sparse` itself, with a low-rank part that is still zero beside it: it computes what it did.

        On the meta device nothing is drawn.
        """
        layer = cls.__new__(cls)
        layer._set_up(sparse, rank, alpha)
        layer.transposed = sparse.transposed
        if layer.a.device.type != "meta":
            layer.reset_low_rank(generator)
        layer.train(sparse.training)
        return layer

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw both parts anew; see `SparseLinear.reset_parameters`."""
        self.sparse.reset_parameters(generator)
        self.reset_low_rank(generator)

    def reset_low_rank(self, generator: torch.Generator | None = None) -> None:
        """A uniform in +-1/sqrt(in_features), which is Kaiming-uniform as nn.Linear has it, and B zero.

        Draws on the CPU, from `generator`, the sparse layer's own seed if it has one, or torch's global generator.
        """
        if generator is None and self.sparse.pattern_seed is not None:
            generator = torch.Generator().manual_seed(self.sparse.pattern_seed + 1)
        bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
        with torch.no_grad():
            self.a.copy_((torch.rand(self.a.shape, generator=generator) * 2 - 1) * bound)
            self.b.zero_()

    # -- what it is ---------------------------------------------------------------------------------------------------

    @property
    def scale(self) -> float:
        """Factor of B A."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def bias(self) -> nn.Parameter | None:
        """The sparse part's, which adds it."""
        return self.sparse.bias

    @property
    def density(self) -> float:
        """Weights of both parts over the matrix's entries."""
        size = self.out_features * self.in_features
        return (self.sparse.values.numel() + self.a.numel() + self.b.numel()) / size if size else 0.0

    # -- use ----------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        x = SparseLinear.cast(x)
        flat = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
        y = self.sparse(flat)
        # Weights follow the activations, as they do inside spmm: half-precision inputs need no autocast.
        a, b = self.a.to(x.dtype), self.b.to(x.dtype)
        y = torch.addmm(y, flat @ a.T, b.T, alpha=self.scale)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], self.out_features)

    def dense_weight(self) -> Tensor:
        """(out_features, in_features), S + scale B A; for export and tests."""
        return add_low_rank(self.sparse.dense_weight(), self.a.detach(), self.b.detach(), self.scale)

    def to_dense(self) -> nn.Linear:
        """The nn.Linear that computes the same, with its own memory."""
        linear = self.sparse.to_dense()
        with torch.no_grad():
            linear.weight.copy_(self.dense_weight())
        return linear.train(self.training)

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(
                "SparseLowRank has no dense weight: use .sparse.values, .a and .b (what trains), or .to_dense()"
            )
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        scale = "" if self.alpha is None else f", scale={self.scale:.4g}"
        return f"{self.in_features}, {self.out_features}, density={self.density:.4g}, rank={self.rank}{scale}"


def add_low_rank(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """weight + scale B A, in place of `weight` (out, in), which is returned."""
    return weight.addmm_(b, a, alpha=scale)


def low_rank_weights(shape: tuple[int, int], rank: int) -> int:
    """Weights of A and B together."""
    return rank * (shape[0] + shape[1])


def units_beside(budget: float, low_rank: int, block: tuple[int, int]) -> int:
    """Units of S that fit into a budget of weights beside those of the low-rank part; not positive: none do."""
    return math.floor((budget - low_rank) / (block[0] * block[1]) + 1e-9)  # 0.1 * 30 is 3, and not less


def check_rank(rank: int) -> None:
    """Raises ValueError for what is no rank."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a positive int, got {rank!r}; without a low-rank part use SparseLinear")


def check_alpha(alpha: float | None) -> None:
    """Raises ValueError for what is no scale."""
    if alpha is not None and not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha must be a positive number, or None for scale 1, got {alpha!r}")


def no_room(shape: tuple[int, int], rank: int, budget: float) -> str:
    """Why a layer cannot have such a low-rank part."""
    return (
        f"a low-rank part of rank {rank} has {low_rank_weights(shape, rank)} weights in a {shape[0]}x{shape[1]} "
        f"matrix, and the density gives {budget:.0f} to both parts: no unit is left for the sparse one. "
        "Lower the rank, or raise the density"
    )
