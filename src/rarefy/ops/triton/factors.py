"""The two factors of a product as its kernel reads them: in the activations' dtype, or in 8-bit floats with a scale."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rarefy.ops import fp8

HALVES = (torch.bfloat16, torch.float16)


class Factors(NamedTuple):
    """What is multiplied, and what sums are multiplied by after."""

    rows: Tensor
    """(tokens, features) contiguous rows."""
    values: Tensor
    """(units, b_r, b_c), or turned (units, b_c, b_r): contiguous."""
    scale: Tensor | None
    """() float32; None: 1."""
    turned: bool
    """Whether each unit of `values` is transposed."""


def factors(rows: Tensor, values: Tensor, *, gradient: bool) -> Factors:
    """Of x W^T, or of dy W where `rows` are a gradient.

    Args:
        rows: in the dtype of the product.
        values: (units, b_r, b_c) in any.
    """
    values = values.detach()
    if not fp8.wanted() or rows.dtype not in HALVES or values.shape[2] == 1:
        return Factors(rows, values.to(rows.dtype).contiguous(), None, False)
    # Tensor cores take 8-bit factors with what is summed over side by side, so for dy W units are turned on the way.
    x, x_scale = fp8.scaled(rows, torch.float8_e5m2 if gradient else torch.float8_e4m3fn)
    w, w_scale = fp8.scaled(values.transpose(1, 2) if gradient else values, torch.float8_e4m3fn)
    return Factors(x, w, x_scale * w_scale, gradient)
