"""Other libraries' block-sparse products on a GPU, of the same pattern, timed beside ours where they are installed."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rarefy.cost import Lap
from rarefy.pattern import Pattern

STK_SIDE = 128
"""The blocks that stk's kernels are written for."""


@dataclass(frozen=True)
class GpuPeer:
    """A library that can run the same products."""

    name: str
    kernels: str
    dtype: torch.dtype
    """Of values and activations."""

    enter: Callable[[Pattern, Tensor, Tensor], Mapping[str, Lap]]
    """A pattern, x (tokens, in) and dy (tokens, out) to laps: forward and, where it has one, backward."""

    sides: tuple[int, ...] = (16, 32, 64, 128)
    """Square blocks that it takes."""

    def takes(self, block: tuple[int, int]) -> bool:
        """Whether it can run such blocks."""
        return block[0] == block[1] and block[0] in self.sides


def installed_for_gpu(notes: list[str]) -> list[GpuPeer]:
    """torch itself, and what else can be imported; `notes` is told of what is there and cannot."""
    peers = [GpuPeer("torch BSR", "torch", torch.bfloat16, torch_bsr)]
    for module_name, package, title, dtype, enter, sides in (
        ("blksprs", "blksprs", "blksprs", torch.bfloat16, blksprs, (16, 32, 64, 128)),
        ("stk", "stanford-stk", "stk", torch.float16, stk, (STK_SIDE,)),
    ):
        if find_spec(module_name) is None:
            continue
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # another library's import may fail in any way
            notes.append(f"{title} is installed, but cannot be imported: {error}")
            continue
        peers.append(GpuPeer(f"{title} {_version(package)}", title, dtype, _bound(enter, module), sides))
    return peers


def _bound(enter: Callable[[Any, Pattern, Tensor, Tensor], Mapping[str, Lap]], module: ModuleType) -> Any:
    return lambda *given: enter(module, *given)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "of unknown version"


def _values(pattern: Pattern, like: Tensor) -> Tensor:
    """(units, rows, cols) random numbers, of the activations' device and dtype."""
    drawn = torch.randn(pattern.nnz, generator=torch.Generator().manual_seed(0))
    return drawn.view(-1, *pattern.block).to(like)


def torch_bsr(pattern: Pattern, x: Tensor, dy: Tensor) -> Mapping[str, Lap]:
    """`F.linear` with a weight in torch's BSR layout, forward alone: there is no gradient of such a weight."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse BSR tensor support is in beta")
        crow, cols = pattern.crow_indices.to(x.device), pattern.col_indices.to(x.device)
        weight = torch.sparse_bsr_tensor(crow, cols, _values(pattern, x), pattern.shape, check_invariants=True)
    bias = x.new_zeros(pattern.shape[0])
    return {"forward": lambda: F.linear(x, weight, bias)}


def blksprs(module: Any, pattern: Pattern, x: Tensor, dy: Tensor) -> Mapping[str, Lap]:
    """Its matmul, of operands that are in its compressed form already, activations too: their conversion is not timed.

    Forward y = x W^T; backward through its own autograd, which copies transposes.
    """
    side, (out, width), tokens = pattern.block[0], pattern.shape, x.shape[0]
    mask = torch.zeros(out // side, width // side, dtype=torch.bool)
    units = pattern.unit_indices().cpu()
    mask[units // (width // side), units % (width // side)] = True
    layouts = [
        torch.ones(1, tokens // side, width // side, dtype=torch.bool, device=x.device),
        mask.T[None].contiguous().to(x.device),
        torch.ones(1, tokens // side, out // side, dtype=torch.bool, device=x.device),
    ]
    dense = torch.randn(1, width, out, generator=torch.Generator().manual_seed(0)).to(x)
    a = module.ops.to_sparse(x[None].contiguous(), layouts[0], side).detach().requires_grad_()
    w = module.ops.to_sparse(dense, layouts[1], side).detach().requires_grad_()
    g = module.ops.to_sparse(dy[None].contiguous(), layouts[2], side).detach()
    cache: dict[str, Any] = {}
    held: list[Tensor] = []

    def forward() -> None:
        held[:] = [module.ops.matmul(a, layouts[0], w, layouts[1], layouts[2], side, layout_cache=cache)]

    def backward() -> object:
        return torch.autograd.grad(held[0], (a, w), g, retain_graph=True)

    return {"forward": forward, "backward": backward}


def stk(module: Any, pattern: Pattern, x: Tensor, dy: Tensor) -> Mapping[str, Lap]:
    """Its three products, of float16: y = x W^T, dx = dy W, and dW = dy^T x at the blocks."""
    rows = pattern.row_indices().to(x.device, torch.int16)
    cols = pattern.col_indices.to(x.device, torch.int16)
    offsets = pattern.crow_indices.to(x.device, torch.int32)
    weight = module.Matrix(pattern.shape, _values(pattern, x), rows, cols, offsets)
    return {
        "forward": lambda: module.ops.dds(x, weight.t()),
        "backward": lambda: (module.ops.dds(dy, weight), module.ops.sdd(dy.t(), x, weight)),
    }
