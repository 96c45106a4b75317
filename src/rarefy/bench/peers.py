"""Other libraries' sparse layers, timed beside ours where they are installed.

An adapter gives laps, as `rarefy.cost.interleaved` times them. A peer that brings threads of its own is timed in rounds
of its own, after all others, and rests after each turn: threads that spin while they wait slow whoever comes next.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.cost import Lap, LayerStep
from rarefy.pattern import Pattern

REST_S = 0.02
"""Longer than an OpenMP thread spins before it sleeps (GNU's: a few milliseconds)."""


@dataclass(frozen=True)
class Entry:
    """A peer's layer, ready to be timed."""

    density: float
    laps: Mapping[str, Lap]
    """forward and, where it has one, backward (input, weight and bias gradient); what follows is not counted."""


@dataclass(frozen=True)
class Peer:
    """A library that can run the same layer."""

    name: str
    """With the version, if it is not torch itself."""

    kernels: str
    own_threads: bool
    """Whether it computes on threads that are not torch's."""

    enter: Callable[[Pattern, Tensor, Tensor], Entry]
    """A pattern, x (tokens, in) and dy (tokens, out) to its layer of that shape and density."""

    block: tuple[int, int] = (1, 1)
    """Of the pattern that it is given."""


def installed(threads: int, notes: list[str]) -> list[Peer]:
    """The peers that can be imported; `notes` is told of one that is there and cannot."""
    peers = [Peer("torch CSR", "torch", False, torch_csr), Peer("torch BSR", "torch", False, torch_bsr, (4, 4))]
    for name, title, own_threads, enter in (
        ("sparselab", "SparseLab", True, sparselab),
        ("sparseprop", "SparseProp", False, sparseprop),
    ):
        try:
            module = _import_with_threads(name, threads)
        except Exception as error:  # another library's import may fail in any way, and must not end our bench
            notes.append(f"{title} is installed, but cannot be imported: {error}")
            continue
        if module is not None:
            peers.append(Peer(f"{title} {_version(module)}", name, own_threads, _bound(enter, module)))
    return peers


def _bound(enter: Callable[[Any, Pattern, Tensor, Tensor], Entry], module: ModuleType) -> Callable[..., Entry]:
    return lambda *given: enter(module, *given)


def _version(module: ModuleType) -> str:
    """What the module says, else what was installed, else nothing that helps."""
    try:
        return str(getattr(module, "__version__", None) or metadata.version(module.__name__))
    except metadata.PackageNotFoundError:
        return "of unknown version"


def _import_with_threads(name: str, threads: int) -> ModuleType | None:
    """The module, its own OpenMP library (if it brings one) told how many threads to use; None if it is not installed.

    A library reads OMP_NUM_THREADS once, while it loads.
    """
    if name in sys.modules:
        return sys.modules[name]
    if find_spec(name) is None:
        return None
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        return importlib.import_module(name)
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def sparselab(module: Any, pattern: Pattern, x: Tensor, dy: Tensor) -> Entry:
    """`sparselab.SparseLinear`: it draws a random pattern of its own, of the same density but for chance."""
    rows, cols = pattern.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = module.SparseLinear(cols, rows, bias=True, sparsity=1 - pattern.density)
    step = LayerStep(layer, x, dy)
    laps = {"forward": step.forward, "backward": step.backward, "rest": lambda: time.sleep(REST_S)}
    return Entry(float(layer.density), laps)


LARGEST_EXACT = 1 << 24
"""Whole numbers up to here are exact in fp32."""


def sparseprop(module: Any, pattern: Pattern, x: Tensor, dy: Tensor) -> Entry:
    """`sparseprop.modules.SparseLinear`, made from a dense weight with zeros; Nikdan et al. 2023 (arXiv:2302.04852).

    It links the OpenMP library that torch has loaded, so it computes on torch's threads.

    Raises:
        ValueError: more weights than its constructor, which sends row pointers through fp32, gets right.
    """
    if pattern.nnz > LARGEST_EXACT:
        raise ValueError(f"its row pointers are wrong beyond {LARGEST_EXACT:,} weights")
    modules = importlib.import_module(f"{module.__name__}.modules")
    weight = torch.zeros(pattern.shape)
    weight[pattern.to_mask()] = _values(pattern).flatten()
    layer = modules.SparseLinear(weight, nn.Parameter(torch.zeros(pattern.shape[0])))
    step = LayerStep(layer, x, dy)
    return Entry(pattern.density, {"forward": step.forward, "backward": step.backward})


def torch_csr(pattern: Pattern, x: Tensor, dy: Tensor) -> Entry:
    """torch's CSR layout, forward alone: the gradient of its weight comes back dense.

    W x^T, whose transpose is the output, is its fastest way: `F.linear` with such a weight takes several times as long.
    """
    with _quiet():
        crow, cols = pattern.crow_indices, pattern.col_indices
        weight = torch.sparse_csr_tensor(crow, cols, _values(pattern), pattern.shape, check_invariants=True)
    return _forward_alone(pattern, weight, x)


def torch_bsr(pattern: Pattern, x: Tensor, dy: Tensor) -> Entry:
    """torch's BSR layout, forward alone: on the CPU it has no backward ("not implemented for SparseBsc @ Strided")."""
    with _quiet():
        crow, cols = pattern.crow_indices, pattern.col_indices
        weight = torch.sparse_bsr_tensor(crow, cols, _values(pattern), pattern.shape, check_invariants=True)
    return _forward_alone(pattern, weight, x)


def _forward_alone(pattern: Pattern, weight: Tensor, x: Tensor) -> Entry:
    bias, data = torch.zeros(pattern.shape[0]), x.detach()
    return Entry(pattern.density, {"forward": lambda: (weight @ data.T).T + bias})


def _values(pattern: Pattern) -> Tensor:
    """(nnz,) or, of blocks, (units, rows, cols) random numbers."""
    drawn = torch.randn(pattern.nnz, generator=torch.Generator().manual_seed(0))
    return drawn if pattern.block == (1, 1) else drawn.view(-1, *pattern.block)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remark that its compressed layouts are in beta."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CSR|BSR) tensor support is in beta")
        yield
