"""Which patterns GPUs' sparse tensor cores multiply: single units, two in every aligned four of a row.

That is a property of a pattern and no structure of its own: a layer of single units at density 0.5 whose pattern has it
is computed so (`rarefy.ops.triton.two_four`), and any other pattern is not. Of values in row order, two in four, the
array is what such hardware calls the compressed matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.ops import triton
from rarefy.ops.derived import Derived
from rarefy.ops.index import Index

SIDE = 16
"""What both sides of the matrix must be a multiple of, in half precision."""


def _in_fours(pointers: Tensor, places: Tensor) -> bool:
    """Whether the lines that pointers delimit have two places in each aligned four. Reads one number back."""
    lines = pointers.shape[0] - 1
    length = 2 * places.shape[0] // lines  # of a line, if it is so
    fours = torch.arange(length // 4, device=places.device).repeat(lines)
    found = places.to(torch.int32).view(-1, 2) // 4
    return bool((found == fours[:, None]).all() & (torch.diff(pointers) == length // 2).all())


_known = Derived(_in_fours)


def may_be(index: Index) -> bool:
    """Whether a pattern's sizes allow it."""
    sides = (index.out_features, index.in_features)
    half = 2 * index.num_units == sides[0] * sides[1] > 0
    return index.block == [1, 1] and half and not index.expands and not any(side % SIDE for side in sides)


def by_row(index: Index) -> bool:
    """Whether every aligned four of a row holds two units: the forward product."""
    return may_be(index) and _known(index.crow, index.cols)


def by_column(index: Index) -> bool:
    """Whether every aligned four of a column does: the gradient of the input."""
    return may_be(index) and _known(index.t_crow, index.t_rows)


def refresh(index: Index) -> None:
    """Look again where somebody has asked before: after a rewire, outside of a captured graph."""
    if may_be(index):
        _known.refresh(index.crow, index.cols)
        _known.refresh(index.t_crow, index.t_rows)


def why_not(device: torch.device) -> str | None:
    """Why a machine cannot multiply such patterns; None if it can."""
    if device.type != "cuda" or not triton.usable():
        return "2:4 products need a GPU and triton"
    if not torch.backends.cusparselt.is_available() or not hasattr(torch, "_cslt_sparse_mm"):
        return "this torch comes without cuSPARSELt, whose kernels multiply 2:4 patterns"
    return None
