"""Batch norm with what stands beside it in a network for images, for the network's own modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy.nn.conv import SparseConv2d
from rarefy.nn.mlp import has_hooks
from rarefy.ops import norm_convolution, operators
from rarefy.ops.norm import batch_norm, runs_kernel


def norm_relu(norm: nn.BatchNorm2d, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """relu(norm(x) + residual), (N, C, h, w).

    Parameters, running statistics and their updates are the module's. One operator with half the memory traffic where
    its kernel takes the images (channels_last, fp32 or bf16, on the CPU); else torch's own layers.

    Raises:
        ValueError: as the module; or a residual of another shape.
    """
    images = (x,) if residual is None else (x, residual)
    if not runs_kernel(*images) or not _known(norm, x):
        y = norm(x)
        return F.relu(y if residual is None else y + residual)
    y, mean, var = batch_norm(x, residual, norm.weight, norm.bias, *_given(norm), eps=norm.eps, relu=True)
    _keep(norm, x, mean, var)
    return y


def norm_relu_conv(norm: nn.BatchNorm2d, conv: nn.Module, x: Tensor) -> Tensor:
    """conv(relu(norm(x))).

    Where `conv` is a sparse convolution of several taps or strides and its kernels take the images (as `norm_relu`'s),
    they normalise while they read, and what lies between is never in memory: of the images x alone is kept for the
    backward pass, which normalises once more. Else `norm_relu`, then `conv`.
    """
    if isinstance(conv, SparseConv2d) and type(conv) is SparseConv2d and not has_hooks(conv) and _known(norm, x):
        geometry = conv.geometry
        same_dtype = not torch.is_autocast_enabled(x.device.type) or conv.cast(x).dtype is x.dtype
        if same_dtype and norm_convolution.runs_kernel(conv.values, conv.index, x, geometry):
            y, mean, var = operators.norm_conv2d(
                conv.values, *conv.index, x, norm.weight, norm.bias, *_given(norm), norm.eps, conv.bias, *geometry,
                conv.sink,
            )  # fmt: skip
            _keep(norm, x, mean, var)
            return y
    return conv(norm_relu(norm, x))


def _by_batch(norm: nn.BatchNorm2d) -> bool:
    return norm.training or not norm.track_running_stats


def _known(norm: nn.BatchNorm2d, x: Tensor) -> bool:
    """Statistics that are updated by a mean over all steps, or are of a single value, are the module's own business."""
    if has_hooks(norm):
        return False
    return not _by_batch(norm) or (norm.momentum is not None and x.numel() != x.shape[1])


def _given(norm: nn.BatchNorm2d) -> tuple[Tensor | None, Tensor | None]:
    """Mean and var, if they are not the batch's."""
    return (None, None) if _by_batch(norm) else (norm.running_mean, norm.running_var)


def _keep(norm: nn.BatchNorm2d, x: Tensor, mean: Tensor, var: Tensor) -> None:
    """Update the running statistics, as the module does."""
    if not (norm.training and norm.track_running_stats):
        return
    assert norm.running_mean is not None and norm.running_var is not None and norm.momentum is not None
    assert norm.num_batches_tracked is not None
    count = x.numel() // x.shape[1]
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
        norm.running_var.lerp_(var.to(norm.running_var.dtype) * (count / (count - 1)), norm.momentum)
