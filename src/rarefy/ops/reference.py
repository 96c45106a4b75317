"""The specification: each op in a few lines over a dense matrix. Clear and slow, any device, any dtype.

Tests hold every other implementation against this; nothing else should run it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.ops.index import Index


def unit_indices(index: Index) -> Tensor:
    """(K,) int64 flat row-major unit index of each unit."""
    counts = torch.diff(index.crow.long())
    rows = torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)
    return rows * (index.t_crow.shape[0] - 1) + index.cols.long()


def dense(values: Tensor, index: Index) -> Tensor:
    """(O, I) with `values` at the units and zeros elsewhere."""
    rows, cols, (b_r, b_c) = index.crow.shape[0] - 1, index.t_crow.shape[0] - 1, index.block
    units = values.new_zeros(rows * cols, b_r * b_c)
    units[unit_indices(index)] = values.reshape(-1, b_r * b_c)
    return units.view(rows, cols, b_r, b_c).transpose(1, 2).reshape(rows * b_r, cols * b_c)


def units_of(matrix: Tensor, index: Index) -> Tensor:
    """(n, b_r * b_c) entries of every unit of a dense (O, I) matrix, in row-major order of units."""
    rows, cols, (b_r, b_c) = index.crow.shape[0] - 1, index.t_crow.shape[0] - 1, index.block
    return matrix.reshape(rows, b_r, cols, b_c).transpose(1, 2).reshape(rows * cols, b_r * b_c)


def spmm(values: Tensor, index: Index, x: Tensor, bias: Tensor | None) -> Tensor:
    y = x.to(values.dtype) @ dense(values, index).T
    return (y if bias is None else y + bias).to(x.dtype)


def spmm_t(values: Tensor, index: Index, dy: Tensor) -> Tensor:
    return (dy.to(values.dtype) @ dense(values, index)).to(dy.dtype)


def sddmm(index: Index, dy: Tensor, x: Tensor) -> Tensor:
    gradient = units_of(dy.T @ x, index)[unit_indices(index)]
    return gradient.flatten() if index.block == [1, 1] else gradient.view(-1, *index.block)


def grow_candidates(index: Index, dy: Tensor, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    score = units_of(dy.T @ x, index).abs().mean(dim=1).to(torch.float32)
    absent = torch.ones_like(score, dtype=torch.bool)
    absent[unit_indices(index)] = False
    units = absent.nonzero().flatten()
    best = torch.sort(score[units], descending=True, stable=True).indices[:k]
    return units[best], score[units[best]]
