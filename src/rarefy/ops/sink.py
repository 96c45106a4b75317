"""How a backward pass hands growth scores to the engine (rewiring rules 6.2 to 6.4).

A layer's sink is an int64 tensor [slot, calls] that `spmm_backward` is given and writes: slot 0 means no one is
waiting; any other slot names a collector registered here. The tensor is all that a compiled graph sees, so arming a
layer recompiles nothing; what a collector needs is allocated for the layers that rewire at this step and freed with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from rarefy.ops import tiled
from rarefy.ops.index import Index

SLOT, CALLS = 0, 1

Score = Callable[[Tensor], Tensor]
"""(rows, I) whole unit rows of a dense gradient -> (unit rows, unit columns) scores; the highest grow."""


class Collector(Protocol):
    """Receives what a backward pass knows of the dense gradient."""

    def add(self, index: Index, dy: Tensor, x: Tensor) -> None:
        """One backward call of the layer: dy (B, O), x (B, I)."""
        ...


# Weak: the engine owns its collectors, and what it kept goes with it.
_collectors: WeakValueDictionary[int, Collector] = WeakValueDictionary()
_slots = itertools.count(1)


def new_sink() -> Tensor:
    """A sink that no one waits at."""
    return torch.zeros(2, dtype=torch.int64, device="cpu")


def arm(sink: Tensor, collector: Collector) -> None:
    """The next backward calls of the layer go to `collector`, until `disarm`."""
    disarm(sink)
    slot = next(_slots)
    _collectors[slot] = collector
    sink[SLOT] = slot


def disarm(sink: Tensor) -> None:
    """Forget the collector, if any, and what it holds."""
    _collectors.pop(int(sink[SLOT]), None)
    sink[SLOT] = 0


def take_calls(sink: Tensor) -> int:
    """Backward calls since the last question."""
    calls = int(sink[CALLS])
    sink[CALLS] = 0
    return calls


def armed(sink: Tensor) -> bool:
    """Whether someone waits for the next backward calls."""
    return int(sink[SLOT]) in _collectors


def count(sink: Tensor) -> None:
    """One more backward call, with no one waiting."""
    sink[CALLS] += 1


def feed(sink: Tensor, index: Index, dy: Tensor, x: Tensor) -> None:
    """Called by `spmm_backward` on every backend. Gradients are computed in at least fp32, whatever autocast chose:
    in bf16 most of them would be equal.
    """
    count(sink)
    collector = _collectors.get(int(sink[SLOT]))
    if collector is not None:
        wide = torch.promote_types(x.dtype, torch.float32)
        collector.add(index, dy.to(wide), x.to(wide))


class _StepCollector:
    """Knows where a step begins, so that what a step left behind that was never applied (AMP) is forgotten.

    A step's first backward finds no gradient on the values and is another pass than the last; a layer that is used
    twice in one pass finds none the second time either, but in the same pass.
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._pass = -1
        self.calls = 0

    def count_call(self) -> None:
        """One more backward call, the first of a step or a further one."""
        current = torch._C._current_graph_task_id()
        if self._values.grad is None and current != self._pass:
            self.calls = 0
        self._pass = current
        self.calls += 1


class BestUnits(_StepCollector):
    """The k best absent units of one backward call, streamed: memory O(k + tile) (rule 6.3).

    Args:
        values: the layer's parameter.
        k: how many may be wanted.
        score: a method's own score of a gradient tile; None: mean |g|, for which there is a native kernel.
        active: also keep the gradient of the units that exist, O(nnz): they may be dropped and return.
    """

    def __init__(self, values: Tensor, k: int, score: Score | None = None, *, active: bool = False) -> None:
        super().__init__(values)
        self.k = k
        self.score = score
        self.active = active
        self.units = torch.empty(0, dtype=torch.int64)
        self.scores = torch.empty(0)
        self.active_gradient = torch.empty(0)

    def add(self, index: Index, dy: Tensor, x: Tensor) -> None:
        # Calls of one step cannot be combined: the engine then leaves the rewire out, and accumulates the next time.
        self.count_call()
        self.units, self.scores = self.best(index, dy, x, self.k)
        if self.active:
            self.active_gradient = torch.ops.rarefy.sddmm(*index, dy, x)

    def best(self, index: Index, dy: Tensor, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k best absent units of a matrix, and their scores."""
        if self.score is None:
            return torch.ops.rarefy.grow_candidates(*index, dy, x, k)
        return tiled.grow_candidates(index, dy, x, k, self.score)


class DenseGradient(_StepCollector):
    """The dense gradient of the layer, summed over the step's backward calls: O * I floats for this one step (rule
    6.4).
    """

    def __init__(self, values: Tensor) -> None:
        super().__init__(values)
        self.gradient: Tensor | None = None

    def add(self, index: Index, dy: Tensor, x: Tensor) -> None:
        self.count_call()
        gradient = dy.T @ x
        self.gradient = gradient if self.calls == 1 or self.gradient is None else self.gradient.add_(gradient)
