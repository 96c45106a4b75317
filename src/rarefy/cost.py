"""What a layer costs: bytes and FLOPs by counting, milliseconds by timing sparse beside dense in turn, on the spot."""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.nn import SparseLinear
from rarefy.ops import backend, index_dtype, library, native
from rarefy.pattern import Pattern, unit_grid
from rarefy.sampling import keyed_generator


@dataclass(frozen=True)
class LayerCost:
    """Median milliseconds of one forward and backward (input, weight and bias gradient), fp32, on this machine."""

    sparse_ms: float | None
    """None: only the dense layer was timed, since nothing would make it sparse."""

    dense_ms: float

    @property
    def speedup(self) -> float | None:
        """Dense time over sparse time."""
        return None if self.sparse_ms is None else self.dense_ms / self.sparse_ms


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
    """Rows of input that each named layer sees in one forward of `sample`; 0 for a layer that is not called as one.

    Args:
        sample: a tensor, or a tuple or dict of the model's arguments. Runs without gradient, in the model's present
            mode, and puts torch's random state back.
    """
    names = list(names)
    tokens = dict.fromkeys(names, 0)
    modules = dict(model.named_modules())

    def count(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            x = arguments[0] if arguments else next(iter(keywords.values()), None)
            if isinstance(x, Tensor) and x.dim() and x.shape[-1]:
                tokens[name] += x.numel() // x.shape[-1]

        return hook

    handles = [modules[n].register_forward_pre_hook(count(n), with_kwargs=True) for n in names if n in modules]
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


def measure(shape: tuple[int, int], units: int, block: tuple[int, int], tokens: int, *, bias: bool = True) -> LayerCost:
    """Time a layer of this shape, sparse and dense in turn, in this process with torch's threads. From 0.3 s, by size.

    The pattern is random, as at the start of training. The same question under the same threads and kernels is timed
    once a process, with `units` rounded to three figures: layers that share a budget differ by one. Torch's random
    state is left as it is.
    """
    rows, cols = unit_grid(shape, block)
    rounded = min(int(float(f"{units:.3g}")), rows * cols)
    return _measure(shape, rounded, block, tokens, bias, torch.get_num_threads(), kernels_for(block))


def measure_dense(shape: tuple[int, int], tokens: int, *, bias: bool = True) -> float:
    """Median milliseconds of the dense layer alone, forward and backward: for layers that no plan would make sparse."""
    return _measure_dense(shape, tokens, bias, torch.get_num_threads())


@functools.lru_cache(maxsize=512)
def _measure(
    shape: tuple[int, int], units: int, block: tuple[int, int], tokens: int, bias: bool, *conditions: Any
) -> LayerCost:
    generator = torch.Generator().manual_seed(int(keyed_generator(*shape, units).integers(2**62)))
    pattern = Pattern.with_units(shape, units, block, generator)
    x, dy = random_batch(shape, tokens, generator)
    sparse = LayerStep(SparseLinear.from_pattern(pattern, bias, generator=generator), x, dy)
    dense = LayerStep(dense_layer(shape, bias), x, dy)
    sparse_ms, dense_ms = interleaved_ms([sparse, dense])
    return LayerCost(sparse_ms, dense_ms)


@functools.lru_cache(maxsize=512)
def _measure_dense(shape: tuple[int, int], tokens: int, bias: bool, *conditions: Any) -> float:
    x, dy = random_batch(shape, tokens, torch.Generator().manual_seed(0))
    return interleaved_ms([LayerStep(dense_layer(shape, bias), x, dy)], budget_s=0.15)[0]


def random_batch(shape: tuple[int, int], tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A layer's input x (tokens, in), which wants a gradient, and dy (tokens, out), the gradient of its output."""
    x = torch.randn(tokens, shape[1], generator=generator, requires_grad=True)
    return x, torch.randn(tokens, shape[0], generator=generator)


def dense_layer(shape: tuple[int, int], bias: bool = True) -> nn.Linear:
    """The dense layer of a shape (out, in), drawn without touching torch's random state."""
    with torch.random.fork_rng(devices=[]):
        return nn.Linear(shape[1], shape[0], bias)


class LayerStep:
    """What a training step asks of one layer: forward, then the gradients of input, weights and bias, through autograd.

    The gradients of the step before are given back first, as `zero_grad` does in a loop: each layer allocates its own
    anew, the dense one a dense one, and pays for it.
    """

    def __init__(self, layer: nn.Module, x: Tensor, dy: Tensor) -> None:
        self.layer, self.x, self.dy = layer, x, dy
        self._y: Tensor | None = None

    def forward(self) -> None:
        """x to y, remembered for `backward`."""
        self._y = self.layer(self.x)

    def backward(self) -> None:
        """dy to the gradients of what `forward` computed."""
        assert self._y is not None
        self.layer.zero_grad(set_to_none=True)
        self.x.grad = None
        self._y.backward(self.dy)
        self._y = None

    def __call__(self) -> None:
        self.forward()
        self.backward()


# -- timing ---------------------------------------------------------------------------------------------------------

Lap = Callable[[], object]
"""A piece of work that is timed by itself."""


def interleaved_ms(contenders: Sequence[Lap], *, budget_s: float = 0.3, rounds: int = 100) -> list[float]:
    """Median milliseconds of each callable, timed in turn; see `interleaved`."""
    return [
        statistics.median(laps[0]) for laps in interleaved([[c] for c in contenders], budget_s=budget_s, rounds=rounds)
    ]


def interleaved(
    groups: Sequence[Sequence[Lap]],
    *,
    budget_s: float,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[list[float]]]:
    """Milliseconds of every lap in every round: result[group][lap][round].

    A round runs every group once, so that what disturbs the machine disturbs all alike; every other round runs the
    groups in the opposite order, so that none always finds the caches as the same neighbour left them. The laps of a
    group keep their order. One round to warm up is not counted. Python's garbage collector waits meanwhile.

    Args:
        budget_s: seconds to spend, warming up included; no round begins that would be expected to pass them.
        rounds: the most rounds. At least three are run, whatever the budget.
        clock: seconds that only grow.
    """
    times: list[list[list[float]]] = [[[] for _ in group] for group in groups]
    collecting = gc.isenabled()
    gc.disable()
    try:
        started = clock()
        for group in groups:
            for lap in group:
                lap()
        for done in range(max(rounds, LEAST_ROUNDS)):
            spent = clock() - started
            if done >= LEAST_ROUNDS and spent * (done + 2) / (done + 1) > budget_s:
                break
            for at in range(len(groups)) if done % 2 == 0 else reversed(range(len(groups))):
                for lap, taken in zip(groups[at], times[at], strict=True):
                    begun = clock()
                    lap()
                    taken.append((clock() - begun) * 1e3)
    finally:
        if collecting:
            gc.enable()
    return times


LEAST_ROUNDS = 3
"""Fewer have no median worth the name."""


def kernels_for(block: tuple[int, int]) -> str:
    """What runs fp32 products of such blocks on the CPU here and now: an instruction set, "tiled" or "reference".

    Raises:
        ValueError: the user named a backend that cannot.
    """
    chosen = backend.choose(torch.float32, torch.device("cpu"), list(block))
    return library.isa() or "" if chosen is native else chosen.__name__.rpartition(".")[2]


# -- memory -----------------------------------------------------------------------------------------------------------


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
