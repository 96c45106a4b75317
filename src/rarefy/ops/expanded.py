"""The operations of a layer that computes dense: its weight is expanded for each product and forgotten after it.

For densities at which torch's dense product is faster than any sparse one. Parameter, gradient and optimizer state
stay those of the units alone; a layer chooses it by holding no index by columns (`SparseLinear.set_compute`). At full
density the values are the weight and nothing is copied. Costs two dense products backward and one forward, and O * I
floats while they run.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn import functional as F

from rarefy.ops import native, reference
from rarefy.ops.index import Index
from rarefy.ops.library import call, isas
from rarefy.ops.memory import empty


def _is_whole(index: Index) -> bool:
    """Whether every entry exists, in the order of a dense weight."""
    return index.block == [1, 1] and index.num_units == index.out_features * index.in_features


def _has_kernel(tensor: Tensor) -> bool:
    return tensor.dtype is torch.float32 and tensor.device.type == "cpu" and bool(isas())


def weight(values: Tensor, index: Index) -> Tensor:
    """(O, I) with `values` at the units and zeros elsewhere. Shares the values' memory at full density."""
    if _is_whole(index):
        return values.detach().view(index.out_features, index.in_features)
    if not _has_kernel(values):
        return reference.dense(values, index)
    values, dense = values.detach().contiguous(), empty(index.out_features, index.in_features)
    pattern = native.c_pattern(index)
    call("rarefy_expand_f32", ctypes.byref(pattern), values.data_ptr(), dense.data_ptr(), torch.get_num_threads())
    return dense


def units(matrix: Tensor, index: Index) -> Tensor:
    """The values of a dense (O, I) matrix at the units. Shares its memory at full density."""
    if _is_whole(index):
        return matrix.reshape(-1)
    shape = (index.num_units,) if index.block == [1, 1] else (index.num_units, *index.block)
    if not _has_kernel(matrix):
        return reference.units_of(matrix, index)[reference.unit_indices(index)].view(shape)
    matrix, found = matrix.contiguous(), torch.empty(shape)
    pattern = native.c_pattern(index)
    call("rarefy_collect_f32", ctypes.byref(pattern), matrix.data_ptr(), found.data_ptr(), torch.get_num_threads())
    return found


def _product_dtype(values: Tensor, x: Tensor) -> torch.dtype:
    """What dense torch multiplies in: half activations as they are, else at least the values' precision."""
    return x.dtype if x.dtype in (torch.bfloat16, torch.float16) else torch.promote_types(values.dtype, x.dtype)


def spmm(values: Tensor, index: Index, x: Tensor, bias: Tensor | None) -> Tensor:
    """See `rarefy.ops.schema`."""
    dtype = _product_dtype(values, x)
    y = F.linear(x.to(dtype), weight(values, index).to(dtype), None if bias is None else bias.to(dtype))
    return y.to(x.dtype)


def spmm_t(values: Tensor, index: Index, dy: Tensor) -> Tensor:
    """See `rarefy.ops.schema`."""
    dtype = _product_dtype(values, dy)
    return (dy.to(dtype) @ weight(values, index).to(dtype)).to(dy.dtype)


def sddmm(index: Index, dy: Tensor, x: Tensor) -> Tensor:
    """See `rarefy.ops.schema`."""
    return units(dy.T @ x, index)


def spmm_backward(
    values: Tensor, index: Index, dy: Tensor, x: Tensor, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dvalues and dbias, each where `needs` asks for it."""
    dtype = _product_dtype(values, x)
    dx = spmm_t(values, index, dy) if needs[0] else None
    dvalues = units((dy.to(dtype).T @ x.to(dtype)).to(values.dtype), index) if needs[1] else None
    dbias = dy.to(values.dtype).sum(dim=0) if needs[2] else None
    return dx, dvalues, dbias
