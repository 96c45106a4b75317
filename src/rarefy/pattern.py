"""Where the units of a sparse matrix are: one small immutable value object.

Shapes: O x I the dense matrix, b_r x b_c a unit (1 x 1 = unstructured), R = O / b_r unit rows, C = I / b_c unit
columns, n = R * C units in all, K of them active.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rarefy.sampling import repair_empty_rows, sample_without_replacement

Block = int | Sequence[int]


def as_block(block: Block) -> tuple[int, int]:
    """`block` as (rows, columns); an int means square.

    Raises:
        ValueError: not a positive int or a pair of positive ints.
    """
    if isinstance(block, str) and block == "auto":
        raise ValueError(
            'block="auto" is for rarefy.Plan, which knows what a layer computes: '
            'use rarefy.sparsify(model, rarefy.Plan(density=..., block="auto")), or name a block here'
        )
    sides = (block, block) if isinstance(block, int) else tuple(block)
    if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
        raise ValueError(f"block must be a positive int or a pair (rows, columns) of them, got {block!r}")
    return sides[0], sides[1]


def unit_grid(shape: Sequence[int], block: tuple[int, int]) -> tuple[int, int]:
    """Unit rows and unit columns of a matrix.

    Raises:
        ValueError: `shape` is not two non-negative ints, or the block does not divide it.
    """
    if len(shape) != 2 or any(side < 0 for side in shape):
        raise ValueError(f"shape must be (out_features, in_features), got {tuple(shape)}")
    if shape[0] % block[0] or shape[1] % block[1]:
        raise ValueError(
            f"a block of {block[0]}x{block[1]} does not divide a {shape[0]}x{shape[1]} matrix: "
            "choose a block that divides both sides, or block=1"
        )
    return shape[0] // block[0], shape[1] // block[1]


def check_density(density: float) -> float:
    """`density` itself, if it lies in (0, 1].

    Raises:
        ValueError: it does not.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must lie in (0, 1], got {density}; 0.1 keeps 10% of the weights")
    return density


def transpose_indices(crow: Tensor, cols: Tensor, num_cols: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same units ordered by column: pointers (num_cols + 1,), rows (K,), permutation (K,), all int32.

    The permutation says where a unit of the transposed order stands in row order: values_t[j] = values[perm[j]].
    Costs one stable sort of K keys.
    """
    counts = torch.diff(crow.long())
    rows = torch.repeat_interleave(torch.arange(counts.numel(), device=crow.device), counts)
    perm = torch.sort(cols.to(torch.int32), stable=True).indices
    t_crow = torch.zeros(num_cols + 1, dtype=torch.int32, device=crow.device)
    t_crow[1:] = torch.bincount(cols.long(), minlength=num_cols).cumsum(0)
    return t_crow, rows[perm].int(), perm.int()


class Pattern:
    """The active units of a matrix, sorted by unit row, then unit column, without duplicates.

    Args:
        crow_indices: (R + 1,) start of each unit row, as torch's CSR and BSR layouts have it; any integer dtype.
        col_indices: (K,) unit column of each unit; any integer dtype.
        shape: (out_features, in_features) in entries, not units.
        block: unit shape, an int (square) or (rows, columns).
    Raises:
        ValueError: the arrays do not describe a pattern of that shape (which row, which value).

    The arrays are int32 and must not be written to: `SparseLinear` copies what it needs.
    """

    __slots__ = ("_units", "block", "col_indices", "crow_indices", "shape")

    shape: tuple[int, int]
    block: tuple[int, int]
    crow_indices: Tensor
    col_indices: Tensor
    _units: Tensor | None

    def __init__(self, crow_indices: Tensor, col_indices: Tensor, shape: Sequence[int], block: Block = 1) -> None:
        block = as_block(block)
        rows, cols = unit_grid(shape, block)
        if max(rows, cols, col_indices.numel()) > 2**31 - 1:
            raise ValueError(
                f"a pattern holds at most 2**31 - 1 units, rows and columns, got {col_indices.numel()} units"
            )
        check_indices(crow_indices, col_indices, rows, cols)
        self._hold(crow_indices.to(torch.int32), col_indices.to(torch.int32), shape, block)

    def _hold(self, crow: Tensor, cols: Tensor, shape: Sequence[int], block: tuple[int, int]) -> None:
        object.__setattr__(self, "shape", (int(shape[0]), int(shape[1])))
        object.__setattr__(self, "block", block)
        object.__setattr__(self, "crow_indices", crow)
        object.__setattr__(self, "col_indices", cols)
        object.__setattr__(self, "_units", None)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Pattern is immutable: build a new one instead of setting {name}")

    # -- making one ------------------------------------------------------------------------------------------------

    @classmethod
    def trusted(
        cls, crow_indices: Tensor, col_indices: Tensor, shape: Sequence[int], block: tuple[int, int]
    ) -> Pattern:
        """From int32 arrays that follow from a pattern, or are one's own: nothing is checked, and nothing copied."""
        pattern = cls.__new__(cls)
        pattern._hold(crow_indices, col_indices, shape, block)
        return pattern

    @classmethod
    def from_units(cls, units: Tensor, shape: Sequence[int], block: Block = 1) -> Pattern:
        """From flat row-major unit indices in any order, without duplicates.

        Raises:
            ValueError: an index is out of range or appears twice.
        """
        block = as_block(block)
        rows, cols = unit_grid(shape, block)
        units = torch.sort(units.long()).values
        if units.numel() and (units[0] < 0 or units[-1] >= rows * cols):
            raise ValueError(f"unit indices must lie in [0, {rows * cols}), got {int(units[0])} to {int(units[-1])}")
        ordered = cls.from_sorted_units(units, shape, block)
        return cls(ordered.crow_indices, ordered.col_indices, shape, block)  # a unit may be there twice

    @classmethod
    def from_sorted_units(cls, units: Tensor, shape: Sequence[int], block: Block = 1) -> Pattern:
        """From flat row-major unit indices that are known to be in range and to ascend: they are not checked."""
        block = as_block(block)
        rows, cols = unit_grid(shape, block)
        crow = torch.zeros(rows + 1, dtype=torch.int32, device=units.device)
        if units.numel():
            crow[1:] = torch.bincount(units // cols, minlength=rows).cumsum(0)
        return cls.trusted(crow, (units % max(cols, 1)).int(), shape, block)

    @classmethod
    def from_mask(cls, mask: Tensor, block: Block = 1) -> Pattern:
        """From a dense (O, I) mask: a unit is active where any of its entries is nonzero."""
        block = as_block(block)
        rows, cols = unit_grid(mask.shape, block)
        active = (mask != 0).reshape(rows, block[0], cols, block[1]).any(dim=3).any(dim=1)
        return cls.from_units(active.flatten().nonzero().flatten(), mask.shape, block)

    @classmethod
    def random(
        cls, shape: Sequence[int], density: float, block: Block = 1, generator: torch.Generator | None = None
    ) -> Pattern:
        """round(density * n) units, at least one; see `with_units`.

        Raises:
            ValueError: density outside (0, 1], or the block does not divide the shape.
        """
        rows, cols = unit_grid(shape, as_block(block))
        num_units = min(max(1, round(check_density(density) * rows * cols)), rows * cols)
        return cls.with_units(shape, num_units, block, generator)

    @classmethod
    def with_units(
        cls, shape: Sequence[int], num_units: int, block: Block = 1, generator: torch.Generator | None = None
    ) -> Pattern:
        """Exactly `num_units` units, uniform without replacement; rows left empty are repaired (rewiring rule 3.1)."""
        rows, cols = unit_grid(shape, as_block(block))
        units = sample_without_replacement(rows * cols, num_units, generator)
        return cls.from_units(repair_empty_rows(units, rows, cols, generator), shape, block)

    # -- what it is --------------------------------------------------------------------------------------------------

    @property
    def num_unit_rows(self) -> int:
        """R."""
        return self.shape[0] // self.block[0]

    @property
    def num_unit_cols(self) -> int:
        """C."""
        return self.shape[1] // self.block[1]

    @property
    def num_units(self) -> int:
        """K, the active units."""
        return self.col_indices.numel()

    @property
    def nnz(self) -> int:
        """Active entries: K times the entries of a unit."""
        return self.num_units * self.block[0] * self.block[1]

    @property
    def density(self) -> float:
        """nnz over all entries; 0 for an empty matrix."""
        size = self.shape[0] * self.shape[1]
        return self.nnz / size if size else 0.0

    def row_indices(self) -> Tensor:
        """(K,) int64 unit row of each unit."""
        counts = torch.diff(self.crow_indices.long())
        if counts.device.type == "cpu":  # torch would list the places beside them
            return torch.from_numpy(np.repeat(np.arange(self.num_unit_rows), counts.numpy()))
        rows = torch.arange(self.num_unit_rows, device=counts.device)
        return torch.repeat_interleave(rows, counts, output_size=self.num_units)

    def unit_indices(self) -> Tensor:
        """(K,) int64 flat row-major index of each unit, ascending; made once, and not to be written to."""
        units = self._units
        if units is None:
            units = self.row_indices().mul_(self.num_unit_cols).add_(self.col_indices)
            object.__setattr__(self, "_units", units)
        return units

    def transposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pointers (C + 1,), unit rows (K,) and permutation (K,) of the units in column order; see
        `transpose_indices`.
        """
        return transpose_indices(self.crow_indices, self.col_indices, self.num_unit_cols)

    def to_mask(self) -> Tensor:
        """Dense boolean (O, I); for tests and plots, never for compute."""
        mask = torch.zeros(self.num_unit_rows * self.num_unit_cols, dtype=torch.bool, device=self.col_indices.device)
        mask[self.unit_indices()] = True
        mask = mask.view(self.num_unit_rows, 1, self.num_unit_cols, 1)
        return mask.expand(-1, self.block[0], -1, self.block[1]).reshape(self.shape)

    def digest(self) -> str:
        """Hex SHA-256 of shape, block and indices: equal exactly for equal patterns, on any machine."""
        text = f"{self.shape} {self.block}".encode()
        arrays = (self.crow_indices.cpu().numpy(), self.col_indices.cpu().numpy())
        return hashlib.sha256(b"".join([text, *(array.astype("<i4").tobytes() for array in arrays)])).hexdigest()

    def to(self, device: torch.device | str) -> Pattern:
        """The same pattern with its arrays on `device`."""
        return Pattern.trusted(self.crow_indices.to(device), self.col_indices.to(device), self.shape, self.block)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Pattern):
            return NotImplemented
        return (
            (self.shape, self.block) == (other.shape, other.block)
            and torch.equal(self.crow_indices, other.crow_indices.to(self.crow_indices.device))
            and torch.equal(self.col_indices, other.col_indices.to(self.col_indices.device))
        )

    def __hash__(self) -> int:
        return hash((self.shape, self.block, self.digest()))

    def __reduce__(self) -> tuple[object, ...]:
        return Pattern, (self.crow_indices, self.col_indices, self.shape, self.block)

    def __repr__(self) -> str:
        return (
            f"Pattern(shape={self.shape}, block={self.block}, units={self.num_units}, nnz={self.nnz}, "
            f"density={self.density:.4g})"
        )


def check_indices(crow: Tensor, cols: Tensor, num_rows: int, num_cols: int) -> None:
    """Whether pointers and columns describe a pattern of `num_rows` x `num_cols` units.

    Raises:
        ValueError: a wrong length, pointers that do not run from 0 to K, or columns out of range, unsorted or repeated.
    """
    if crow.dim() != 1 or crow.numel() != num_rows + 1:
        raise ValueError(
            f"crow_indices must have {num_rows + 1} entries for {num_rows} unit rows, got {tuple(crow.shape)}"
        )
    if cols.dim() != 1:
        raise ValueError(f"col_indices must be one-dimensional, got shape {tuple(cols.shape)}")
    if crow.is_floating_point() or cols.is_floating_point():
        raise ValueError(f"indices must be integers, got {crow.dtype} and {cols.dtype}")
    crow, cols = crow.long(), cols.long()
    counts = torch.diff(crow)
    if int(crow[0]) != 0 or int(crow[-1]) != cols.numel() or bool((counts < 0).any()):
        raise ValueError(
            f"crow_indices must rise from 0 to the number of units ({cols.numel()}), "
            f"got {int(crow[0])} to {int(crow[-1])}" + (", falling in between" if bool((counts < 0).any()) else "")
        )
    if not cols.numel():
        return
    if int(cols.min()) < 0 or int(cols.max()) >= num_cols:
        raise ValueError(f"col_indices must lie in [0, {num_cols}), got {int(cols.min())} to {int(cols.max())}")
    rows = torch.repeat_interleave(torch.arange(num_rows, device=cols.device), counts)
    steps = torch.diff(rows * num_cols + cols)
    if bool((steps <= 0).any()):
        where = int((steps <= 0).nonzero()[0]) + 1
        raise ValueError(f"col_indices must rise strictly inside a row; unit row {int(rows[where])} does not")
