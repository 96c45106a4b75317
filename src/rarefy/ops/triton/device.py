"""What kernels need to know of the GPU they run on."""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager

import torch
from torch import Tensor


@functools.cache
def _num_processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def num_processors(tensor: Tensor) -> int:
    """Streaming multiprocessors of the tensor's GPU; a few where the kernels are interpreted."""
    return _num_processors(tensor.device.index or 0) if tensor.is_cuda else 4


def guard(tensor: Tensor) -> AbstractContextManager[object]:
    """Kernels launched inside run on the tensor's GPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def precision(dtype: torch.dtype) -> str:
    """How a product of fp32 factors is computed: in full, unless torch is allowed TF32."""
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"
