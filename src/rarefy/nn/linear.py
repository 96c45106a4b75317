"""A linear layer that holds, computes and trains only the units of its pattern."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from rarefy.init import magnitude_pattern
from rarefy.nn.layer import SparseLayer, gather_units
from rarefy.ops import operators
from rarefy.pattern import Block, Pattern, as_block, check_density, unit_grid


class SparseLinear(SparseLayer):
    """y = x W^T + bias, where W (out_features, in_features) has `values` at its units and nothing elsewhere.

    Args:
        density: share of units that exist, in (0, 1]; round(density * n) of them, at least one.
        block: unit shape, an int (square) or (rows, columns); it must divide the matrix. 1 is unstructured.
        generator: draws the first pattern and values; None: torch's global one.
        device, dtype: as for nn.Linear. On the meta device nothing is drawn until `reset_parameters`.
    Attributes:
        values: Parameter, (nnz,) for block 1, else (num_units, block rows, block columns), in row order of units.
        bias: Parameter (out_features,) or None.
    Raises:
        ValueError: density outside (0, 1], or a block that does not divide the matrix.

    Fresh values follow each neuron's actual fan-in. Forward, input gradient and value gradient cost O(nnz * batch);
    memory is the values' and at most 12 bytes of index a unit. Under autocast activations are cast, values and
    gradient are not.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        density: float,
        block: Block = 1,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        rows, cols = unit_grid((out_features, in_features), as_block(block))
        num_units = min(max(1, round(check_density(density) * rows * cols)), rows * cols)
        self._allocate((out_features, in_features), as_block(block), num_units, bias, device, dtype)
        if self.values.device.type != "meta":
            self.reset_parameters(generator)

    # -- making one ------------------------------------------------------------------------------------------------

    @classmethod
    def from_pattern(
        cls,
        pattern: Pattern,
        bias: bool = True,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A layer with this pattern and fresh values."""
        layer = cls.__new__(cls)
        layer._allocate(pattern.shape, pattern.block, pattern.num_units, bias, device, dtype)
        layer.set_pattern(pattern)
        layer.reset_parameters(generator)
        return layer

    @classmethod
    def from_dense(
        cls, linear: nn.Linear, *, density: float | None = None, pattern: Pattern | None = None, block: Block = 1
    ) -> Self:
        """The layer whose values are the dense layer's at the units of `pattern`, never rescaled.

        Args:
            density: without a pattern, the share of units to keep: those of largest mean magnitude.
            pattern: which units to keep; its block counts.
        Raises:
            ValueError: neither or both of density and pattern, or a pattern of another shape.
        """
        weight = linear.weight.detach()
        if (density is None) == (pattern is None):
            raise ValueError("from_dense needs either density= or pattern=, and not both")
        if pattern is None:
            rows, cols = unit_grid(weight.shape, as_block(block))
            assert density is not None
            pattern = magnitude_pattern(weight, max(1, round(check_density(density) * rows * cols)), block)
        if pattern.shape != tuple(weight.shape):
            raise ValueError(
                f"the pattern is for a {pattern.shape} matrix, the layer's weight is {tuple(weight.shape)}"
            )
        layer = cls.__new__(cls)
        has_bias = linear.bias is not None
        layer._allocate(pattern.shape, pattern.block, pattern.num_units, has_bias, weight.device, weight.dtype)
        layer.set_pattern(pattern)
        with torch.no_grad():
            layer.values.copy_(gather_units(weight, pattern))
            if layer.bias is not None:
                layer.bias.copy_(linear.bias)
        layer.train(linear.training)
        layer.values.requires_grad_(linear.weight.requires_grad)
        return layer

    # -- use ----------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        x = self.cast(x)
        # Buffers by their dictionary: through attributes they cost as much as a small product at one token.
        index = self._buffers
        y = operators.spmm(
            self.values,
            index["crow_indices"],
            index["col_indices"],
            index["t_crow"],
            index["t_rows"],
            index["t_perm"],
            self.block,
            x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1]),  # -1 is ambiguous without inputs
            self.bias,
            index["sink"],
        )
        return y if x.dim() == 2 else y.view(*x.shape[:-1], self.out_features)

    def to_dense(self) -> nn.Linear:
        """The nn.Linear that computes the same, with its own memory."""
        weight = self.dense_weight()
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta", dtype=weight.dtype
        )
        linear.weight = nn.Parameter(weight, requires_grad=self.values.requires_grad)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        block = "" if self.block == (1, 1) else f", block={self.block[0]}x{self.block[1]}"
        bias = "" if self.bias is not None else ", bias=False"
        how = "" if self.compute == "sparse" else ", computes dense"
        return f"{self.in_features}, {self.out_features}, density={self.density:.4g}{block}{bias}{how}"
