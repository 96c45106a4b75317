"""Batch norm, a residual and ReLU in one go, for a network's own nn.BatchNorm2d."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy.ops.norm import batch_norm, runs_kernel


def norm_relu(norm: nn.BatchNorm2d, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """relu(norm(x) + residual), (N, C, h, w).

    Parameters, running statistics and their updates are the module's, and its hooks are not called. One operator with
    half the memory traffic where its kernel takes the images (channels_last, fp32 or bf16, on the CPU); else torch's
    own layers.

    Raises:
        ValueError: as the module; or a residual of another shape.
    """
    images = (x,) if residual is None else (x, residual)
    by_batch = norm.training or not norm.track_running_stats
    # Statistics that are updated by a running mean over all steps, or of a single value, are the module's own business.
    if not runs_kernel(*images) or (by_batch and (norm.momentum is None or x.numel() == x.shape[1])):
        y = norm(x)
        return F.relu(y if residual is None else y + residual)
    mean, var = (None, None) if by_batch else (norm.running_mean, norm.running_var)
    y, mean, var = batch_norm(x, residual, norm.weight, norm.bias, mean, var, eps=norm.eps, relu=True)
    if norm.training and norm.track_running_stats:
        assert norm.running_mean is not None and norm.running_var is not None and norm.momentum is not None
        assert norm.num_batches_tracked is not None
        count = x.numel() // x.shape[1]
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
            norm.running_var.lerp_(var.to(norm.running_var.dtype) * (count / (count - 1)), norm.momentum)
    return y
