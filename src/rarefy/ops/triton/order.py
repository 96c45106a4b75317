"""The rows of a pattern, longest first: what starts first ends last, so that the GPU's processors end together.

The order is a hint: any permutation gives the same bits. So a captured CUDA graph stays right across rewires, though
its order may be that of an older pattern until `refresh`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_orders: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def longest_first(pointers: Tensor) -> Tensor:
    """(rows,) int32 numbers of the rows that (rows + 1,) pointers delimit.

    Sorted anew, into the same memory, when the pointers have changed; a call in between costs nothing on the GPU.
    """
    known = _orders.get(pointers)
    if known is not None and known[1] == _version(pointers):
        return known[0]
    sorted_rows = torch.sort(torch.diff(pointers), descending=True, stable=True).indices.to(torch.int32)
    if known is not None and known[0].shape == sorted_rows.shape:
        known[0].copy_(sorted_rows)
        sorted_rows = known[0]
    _orders[pointers] = (sorted_rows, _version(pointers))
    return sorted_rows


def refresh(*pointers: Tensor) -> None:
    """Sort anew where someone uses an order of these pointers: for graphs that were captured, after a rewire."""
    for each in pointers:
        if each in _orders:
            longest_first(each)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
