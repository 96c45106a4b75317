"""How a backward pass hands what growth looks at to its collectors (rewiring rules 6.2 to 6.4; `rarefy.growth`).

A layer's sink is an int64 tensor [slot, calls] that `spmm_backward` is given and writes: slot 0 means no one is
waiting; any other slot names a collector registered here. The tensor is all that a compiled graph sees, so arming a
layer recompiles nothing; what a collector needs is allocated for the layers that rewire at this step and freed with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from rarefy.ops.index import Index

SLOT, CALLS = 0, 1
"""Places in a sink. Every backward call of every layer reads and writes them, through numpy: indexing a tensor takes
microseconds each time."""


class Collector(Protocol):
    """Receives what a backward pass knows of the dense gradient."""

    def add(self, index: Index, dy: Tensor, x: Tensor) -> None:
        """One backward call of the layer: dy (B, O), x (B, I), or (B, G I) of groups (`rarefy.ops.spread`)."""
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
    return int(sink.numpy()[SLOT]) in _collectors


def count(sink: Tensor) -> None:
    """One more backward call, with no one waiting."""
    sink.numpy()[CALLS] += 1


def feed(sink: Tensor, index: Index, dy: Tensor, x: Tensor) -> None:
    """Called by `spmm_backward` on every backend: one backward call, dy (B, O) and x (B, I)."""
    feed_parts(sink, index, 1, lambda: [(dy, x)])


def feed_parts(sink: Tensor, index: Index, count: int, parts: Callable[[], Iterable[tuple[Tensor, Tensor]]]) -> None:
    """The same for `count` calls, whose dy and x are made only if someone waits for them. Gradients are computed in at
    least fp32, whatever autocast chose: in bf16 most of them would be equal.
    """
    numbers = sink.numpy()
    numbers[CALLS] += count
    collector = _collectors.get(int(numbers[SLOT]))
    if collector is not None:
        for dy, x in parts():
            wide = torch.promote_types(x.dtype, torch.float32)
            collector.add(index, dy.to(wide), x.to(wide))
