"""What a layer costs: bytes and FLOPs by counting, milliseconds by timing sparse beside dense, interleaved, on the spot."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.nn import SparseLinear
from rarefy.ops import index_dtype
from rarefy.pattern import Pattern, unit_grid
from rarefy.sampling import keyed_generator


@dataclass(frozen=True)
class LayerCost:
    """Median milliseconds of one forward and backward (input, weight and bias gradient), fp32, on this machine."""

    sparse_ms: float
    dense_ms: float


def layer_flops(nnz: int) -> int:
    """FLOPs a token of training: forward, input gradient, weight gradient, a multiply and an add each."""
    return 6 * nnz


def layer_bytes(shape: tuple[int, int], units: int | None, block: tuple[int, int], value_bytes: int = 4) -> int:
    """Bytes of a layer's weights; `units` None: dense. Of a sparse layer: values and every index tensor it holds."""
    if units is None:
        return shape[0] * shape[1] * value_bytes
    rows, cols = unit_grid(shape, block)
    narrow = index_dtype(rows, cols).itemsize
    return units * (block[0] * block[1] * value_bytes + 2 * narrow + 4) + (rows + cols + 2) * 4


def tokens_per_layer(model: nn.Module, sample: Any, names: Iterable[str]) -> dict[str, int]:
    """Rows of input that each named layer sees in one forward of `sample`; 0 for a layer that is not called.

    Args:
        sample: a tensor, or a tuple or dict of the model's arguments. Runs without gradient, in the model's present mode, and
            puts torch's random state back.
    """
    names = list(names)
    tokens = dict.fromkeys(names, 0)
    modules = dict(model.named_modules())

    def count(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            x = arguments[0] if arguments else next(iter(keywords.values()))
            tokens[name] += x.numel() // x.shape[-1]

        return hook

    handles = [modules[n].register_forward_pre_hook(count(n), with_kwargs=True) for n in names]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            if isinstance(sample, Mapping):
                model(**sample)
            else:
                model(*(sample if isinstance(sample, tuple) else (sample,)))
    finally:
        for handle in handles:
            handle.remove()
    return tokens


@functools.lru_cache(maxsize=512)
def measure(shape: tuple[int, int], units: int, block: tuple[int, int], tokens: int, *, bias: bool = True) -> LayerCost:
    """Time a layer of this shape, sparse and dense in turn, in this process with torch's threads. About 0.3 s a shape.

    The pattern is random, as at the start of training. Each distinct question is asked once a process.
    """
    generator = torch.Generator().manual_seed(int(keyed_generator(*shape, units).integers(2**62)))
    pattern = Pattern.with_units(shape, units, block, generator)
    sparse = SparseLinear.from_pattern(pattern, bias, generator=generator)
    dense = nn.Linear(shape[1], shape[0], bias)
    x = torch.randn(tokens, shape[1], generator=generator, requires_grad=True)
    dy = torch.randn(tokens, shape[0], generator=generator)

    def step(layer: nn.Module) -> None:
        layer.zero_grad()
        x.grad = None
        layer(x).backward(dy)

    sparse_ms, dense_ms = interleaved_ms([lambda: step(sparse), lambda: step(dense)])
    return LayerCost(sparse_ms, dense_ms)


def interleaved_ms(contenders: list[Callable[[], None]], *, budget_s: float = 0.3, rounds: int = 25) -> list[float]:
    """Median milliseconds of each callable, timed in turn round by round, so that noise hits all alike.

    At least three rounds after one to warm up, then until the budget or the rounds are spent.
    """
    for contender in contenders:
        contender()
    times: list[list[float]] = [[] for _ in contenders]
    started = time.perf_counter()
    while len(times[0]) < 3 or (len(times[0]) < rounds and time.perf_counter() - started < budget_s):
        for contender, taken in zip(contenders, times, strict=True):
            begun = time.perf_counter()
            contender()
            taken.append((time.perf_counter() - begun) * 1e3)
    return [statistics.median(taken) for taken in times]


def training_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, int]:
    """Bytes of parameters, gradients, optimizer state and indices as they are now, each counted once."""

    def size(tensors: Iterable[Tensor]) -> int:
        return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())

    parameters = list(model.parameters())
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)] if optimizer else []
    return {
        "parameters": size(parameters),
        "gradients": size(p for p in parameters if p.requires_grad),
        "optimizer": size(state),
        "indices": sum(m.index_bytes() for m in model.modules() if isinstance(m, SparseLinear)),
    }
