"""The clock: pieces of work timed in turn, and what a training step asks of one layer."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rarefy.cost.precision import Precision, working_in
from rarefy.ops import backend, library, native

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


class LayerStep:
    """What a training step asks of one layer: forward, then the gradients of input, weights and bias, through autograd.

    The gradients of the step before are given back first, as `zero_grad` does in a loop: each layer allocates its own
    anew, the dense one a dense one, and pays for it.

    Args:
        precision: set around each pass, and put back; None: torch stays as it is. x and dy have its dtype already.
    """

    def __init__(self, layer: nn.Module, x: Tensor, dy: Tensor, precision: Precision | None = None) -> None:
        self.layer, self.x, self.dy = layer, x, dy
        self.precision: Precision | None = precision
        self._y: Tensor | None = None

    def _set(self, *, autocast: bool = True) -> contextlib.AbstractContextManager[None]:
        if self.precision is None:
            return contextlib.nullcontext()
        return working_in(self.precision, autocast=autocast)

    def forward(self) -> None:
        """x to y, remembered for `backward`."""
        with self._set():
            self._y = self.layer(self.x)

    def backward(self) -> None:
        """dy to the gradients of what `forward` computed."""
        assert self._y is not None
        self.layer.zero_grad(set_to_none=True)
        self.x.grad = None
        with self._set(autocast=False):
            self._y.backward(self.dy)
        self._y = None

    def __call__(self) -> None:
        self.forward()
        self.backward()


def kernels_for(block: tuple[int, int]) -> str:
    """What runs fp32 products of such blocks on the CPU here and now: an instruction set, "tiled" or "reference".

    Raises:
        ValueError: the user named a backend that cannot.
    """
    chosen = backend.choose(torch.float32, torch.device("cpu"), list(block))
    return library.isa() or "" if chosen is native else chosen.__name__.rpartition(".")[2]
