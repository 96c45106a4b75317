"""Other libraries' sparse layers, timed beside ours where they are installed.

An adapter gives laps, as `rarefy.cost.interleaved` times them. A peer that brings threads of its own is timed in rounds
of its own, after all others, and rests after each turn: threads that spin while they wait slow whoever comes next.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rarefy.cost import Lap, LayerStep
from rarefy.pattern import Pattern

REST_S = 0.02
"""Longer than an OpenMP thread spins before it sleeps (GNU's: a few milliseconds)."""


@dataclass(frozen=True)
class Entry:
    """A peer's layer, ready to be timed."""

    density: float
    laps: list[Lap]
    """forward, then backward (input, weight and bias gradient) if `has_backward`; what follows is not counted."""
    has_backward: bool


@dataclass(frozen=True)
class Peer:
    """A library that can run the same layer."""

    name: str
    """With the version, if it is not torch itself."""

    kernels: str
    own_threads: bool
    """Whether it computes on threads that are not torch's."""

    enter: Callable[[Pattern, Tensor, Tensor], Entry]
    """An unstructured pattern, x (tokens, in) and dy (tokens, out) to its layer of that shape and density."""


def installed(threads: int, notes: list[str]) -> list[Peer]:
    """The peers that can be imported; `notes` is told of one that is there and cannot."""
    peers = [Peer("torch CSR", "torch", False, torch_csr)]
    try:
        module = _import_with_threads("sparselab", threads)
    except Exception as error:  # another library's import may fail in any way, and must not end our bench
        notes.append(f"SparseLab is installed, but cannot be imported: {error}")
        module = None
    if module is not None:
        version = getattr(module, "__version__", "of unknown version")
        peers.append(Peer(f"SparseLab {version}", "sparselab", True, lambda *given: sparselab(module, *given)))
    return peers


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
    return Entry(float(layer.density), [step.forward, step.backward, lambda: time.sleep(REST_S)], True)


def torch_csr(pattern: Pattern, x: Tensor, dy: Tensor) -> Entry:
    """torch's CSR layout, forward alone: the gradient of its weight comes back dense.

    W x^T, whose transpose is the output, is its fastest way: `F.linear` with such a weight takes several times as long.
    """
    values = torch.randn(pattern.nnz, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        crow, cols = pattern.crow_indices, pattern.col_indices
        weight = torch.sparse_csr_tensor(crow, cols, values, pattern.shape, check_invariants=True)
    bias = torch.zeros(pattern.shape[0])
    return Entry(pattern.density, [lambda: (weight @ x.T).T + bias], False)
