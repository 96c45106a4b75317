"""Which bytes a step trains on, and which an evaluation looks at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.sampling import keyed_generator


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Random windows of a text. Those of a step follow from seed and step alone, so there is nothing to save."""

    text: Tensor
    """(bytes,) uint8, at least context + 1 of them."""
    context: int
    """Bytes of a window, T."""
    batch: int
    """Windows of a micro-batch, B."""
    seed: int
    """Of the positions."""

    def at(self, step: int, micro: int = 0) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each (B, T) int64, of a step's micro-batch; the target of a byte is the next one."""
        generator = keyed_generator(self.seed, "batch", step, micro)
        starts = torch.from_numpy(generator.integers(self.text.numel() - self.context, size=self.batch))
        return _windows(self.text, starts, self.context)


@dataclass(frozen=True, kw_only=True)
class Windows:
    """The same windows at every evaluation: without overlap, spread evenly over a text."""

    text: Tensor
    """(bytes,) uint8, at least context + 1 of them."""
    context: int
    """Bytes of a window, T."""
    batch: int
    """Windows that are looked at together."""
    wanted_bytes: int
    """Bytes to predict an evaluation, rounded down to whole windows, of which there is at least one."""

    @property
    def num_windows(self) -> int:
        return max(1, min(self.wanted_bytes // self.context, (self.text.numel() - 1) // self.context))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets, each (up to batch, T) int64."""
        there = (self.text.numel() - 1) // self.context
        windows = torch.arange(self.num_windows) * there // self.num_windows
        for part in torch.split(windows, self.batch):
            yield _windows(self.text, part * self.context, self.context)


def _windows(text: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    both = text[starts[:, None] + torch.arange(context + 1)].long()
    return both[:, :-1], both[:, 1:]
