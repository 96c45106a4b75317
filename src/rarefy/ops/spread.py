"""Equal groups of rows that look at inputs of their own, as those of a convolution with groups.

Such a matrix is kept narrow, (O, I), its columns those of any one group; x has G I columns, group after group. What a
matrix of one group has kernels for, they do on the spread one, (O, G I): each group's columns moved to its inputs, and
the same units in the same order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.ops.derived import Derived
from rarefy.ops.index import Index, index_dtype
from rarefy.pattern import Pattern


def groups_in(index: Index, x: Tensor) -> int:
    """G, of x (B, G I)."""
    return x.shape[1] // index.in_features if index.in_features else 1


def spread(index: Index, groups: int) -> Index:
    """The index of the spread matrix; kept until the narrow one is written."""
    if groups == 1:
        return index
    return _spread(index.crow, index.cols, groups, *_sizes(index))


def _make(crow: Tensor, cols: Tensor, groups: int, shape: tuple[int, int], block: tuple[int, int]) -> Index:
    narrow = Pattern.trusted(crow, cols.to(torch.int32), shape, block)
    group = narrow.row_indices() // max(1, narrow.num_unit_rows // groups)
    moved = (narrow.col_indices + group * narrow.num_unit_cols).to(torch.int32)
    return Index.of(Pattern.trusted(crow, moved, (shape[0], groups * shape[1]), block))


_spread: Derived[Index] = Derived(_make)


def refresh(index: Index, groups: int) -> None:
    """Spread anew where somebody has asked before: for graphs that were captured, after a rewire."""
    if groups > 1 and not index.expands:
        _spread.refresh(index.crow, index.cols, groups, *_sizes(index))


def _sizes(index: Index) -> tuple[tuple[int, int], tuple[int, int]]:
    return (index.out_features, index.in_features), (index.block[0], index.block[1])


def num_bytes(index: Index, groups: int) -> int:
    """What is kept beside the index itself: another one, with a column for each group's inputs."""
    if groups == 1:
        return 0
    rows, cols = index.crow.shape[0] - 1, groups * (index.t_crow.shape[0] - 1)
    narrow = index_dtype(rows, cols).itemsize
    return index.num_units * (2 * narrow + 4) + (rows + cols + 2) * 4


def dense_gradient(dy: Tensor, x: Tensor, groups: int) -> Tensor:
    """dy^T x within the groups, (O, I) from dy (B, O) and x (B, G I)."""
    if groups == 1:
        return dy.T @ x
    batch = dy.shape[0]
    outputs, inputs = dy.reshape(batch, groups, -1).permute(1, 2, 0), x.reshape(batch, groups, -1).transpose(0, 1)
    return (outputs @ inputs).reshape(dy.shape[1], -1)


def sddmm(index: Index, dy: Tensor, x: Tensor) -> Tensor:
    """The entries of `dense_gradient` at the units, in the shape of values."""
    return torch.ops.rarefy.sddmm(*spread(index, groups_in(index, x)), dy, x)
