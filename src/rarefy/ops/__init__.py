"""The four operations and causal attention: schema, reference, plain torch and native kernels. `using("tiled")` names a
backend for tests.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from rarefy.ops import convolution, expanded, mlp, norm_convolution, reference, schema, sink, tiled
from rarefy.ops.attention import causal_attention
from rarefy.ops.backend import available, choose, names_plain_torch, using
from rarefy.ops.fp8 import fp8_products
from rarefy.ops.index import Index, index_dtype
from rarefy.ops.layer_norm import token_shift
from rarefy.ops.operator import implement, operators
from rarefy.ops.rotary import rotary_table, rotate

__all__ = [
    "Index",
    "available",
    "causal_attention",
    "convolution",
    "fp8_products",
    "index_dtype",
    "mlp",
    "norm_convolution",
    "operators",
    "rotary_table",
    "rotate",
    "sink",
    "token_shift",
    "using",
]


def _backend(values: Tensor, index: Index) -> ModuleType:
    """The module that runs an op on these values."""
    if index.expands and not names_plain_torch():
        return expanded
    return choose(values.dtype, values.device, index.block, index)


def _spmm(values, crow, cols, t_crow, t_rows, t_perm, block, x, bias=None, sink=None) -> Tensor:
    if x.dim() != 2 or x.shape[1] != (t_crow.shape[0] - 1) * block[1] or not x.dtype.is_floating_point:
        schema.check_spmm(crow, t_crow, block, x)  # says what is wrong; asking costs more than a small product
    index = Index(crow, cols, t_crow, t_rows, t_perm, list(block))
    return _backend(values, index).spmm(values, index, x, bias)


def _spmm_t(values, crow, cols, t_crow, t_rows, t_perm, block, dy) -> Tensor:
    schema.check_backward("spmm_t", crow, t_crow, block, dy, None)
    index = Index(crow, cols, t_crow, t_rows, t_perm, list(block))
    return _backend(values, index).spmm_t(values, index, dy)


def _sddmm(crow, cols, t_crow, t_rows, t_perm, block, dy, x) -> Tensor:
    schema.check_backward("sddmm", crow, t_crow, block, dy, x)
    index = Index(crow, cols, t_crow, t_rows, t_perm, list(block))
    return _backend(x, index).sddmm(index, dy, x)


def _grow_candidates(crow, cols, t_crow, t_rows, t_perm, block, dy, x, k) -> tuple[Tensor, Tensor]:
    schema.check_backward("grow_candidates", crow, t_crow, block, dy, x)
    index = Index(crow, cols, t_crow, t_rows, t_perm, list(block))
    return choose(x.dtype, x.device, index.block, index).grow_candidates(index, dy, x, k)


def _spmm_backward(values, crow, cols, t_crow, t_rows, t_perm, block, dy, x, needs, sink=None):
    index = Index(crow, cols, t_crow, t_rows, t_perm, list(block))
    if dy.shape != (x.shape[0], index.out_features) or x.shape != (x.shape[0], index.in_features):
        schema.check_backward("spmm_backward", crow, t_crow, block, dy, x)
    backend = _backend(values, index)
    if backend in (reference, tiled):
        wide = (dy.to(values.dtype), x.to(values.dtype))
        dx = backend.spmm_t(values, index, dy) if needs[0] else None
        dvalues = backend.sddmm(index, *wide) if needs[1] else None
        dbias = wide[0].sum(dim=0) if needs[2] else None
    else:
        dx, dvalues, dbias = backend.spmm_backward(values, index, dy, x, list(needs))
    if sink is not None:
        _feed(sink, index, dy, x)
    return (
        dy.new_empty(0) if dx is None else dx,
        values.new_empty(0) if dvalues is None else dvalues,
        values.new_empty(0) if dbias is None else dbias,
    )


_feed = sink.feed  # the ops' own argument is called sink too

for _name in ("spmm_t", "sddmm", "grow_candidates", "spmm_backward"):
    implement(_name, globals()[f"_{_name}"])
implement("spmm", _spmm, schema.backward, schema.setup_context)
