"""The rows of a pattern, longest first: what starts first ends last, so that the GPU's processors end together.

The order is a hint: any permutation gives the same bits. So a captured CUDA graph stays right across rewires, though
its order may be that of an older pattern until `refresh`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.ops.derived import Derived


def _sorted(pointers: Tensor) -> Tensor:
    return torch.sort(torch.diff(pointers), descending=True, stable=True).indices.to(torch.int32)


_orders = Derived(_sorted)


def longest_first(pointers: Tensor) -> Tensor:
    """(rows,) int32 numbers of the rows that (rows + 1,) pointers delimit.

    Sorted anew, into the same memory, when the pointers have changed; a call in between costs nothing on the GPU.
    """
    return _orders(pointers)


def refresh(*pointers: Tensor) -> None:
    """Sort anew where someone uses an order of these pointers: for graphs that were captured, after a rewire."""
    for each in pointers:
        _orders.refresh(each)
