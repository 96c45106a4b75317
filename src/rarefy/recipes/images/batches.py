"""Which images a step trains on, and which an evaluation looks at.

Shape letters: B images of a batch, C channels, H and W rows and columns of pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rarefy.recipes.images.data import Labelled
from rarefy.sampling import keyed_generator

EVAL_BATCH = 1000
"""Images that an evaluation looks at together, or fewer where they are larger than `EVAL_NUMBERS` allows."""

EVAL_NUMBERS = EVAL_BATCH * 3 * 32 * 32
"""Pixels, a number a channel, of so many images: what activations take follows from it."""


@dataclass(frozen=True, kw_only=True)
class ImageBatches:
    """Every image once an epoch, in an order of its own. A step's images follow from seed and step alone."""

    data: Labelled
    scale: tuple[float, float]
    """Mean and deviation of pixels."""
    batch: int
    """Images of a step, B; what does not fill one at the end of an epoch is left out of it."""
    seed: int
    """Of orders, shifts and flips."""
    shift: int = 0
    """Pixels that an image is moved at most, up or down and left or right; 0: not at all."""
    flip: bool = False
    """Whether half of the images, at random, are mirrored left to right."""
    _order: dict[int, Tensor] = field(default_factory=dict, repr=False)
    """Of the present epoch, as drawing it takes longer than a step of a small network."""

    def at(self, step: int, micro: int = 0) -> tuple[Tensor, Tensor]:
        """Float images of the set's shape, scaled, and (B,) int64 labels, of step 1, 2, ... ."""
        per_epoch = len(self.data.labels) // self.batch
        epoch, place = divmod(step - 1, per_epoch)
        if epoch not in self._order:
            self._order.clear()
            drawn = keyed_generator(self.seed, "epoch", epoch).permutation(len(self.data.labels))
            self._order[epoch] = torch.from_numpy(drawn)
        chosen = self._order[epoch][place * self.batch : (place + 1) * self.batch]
        images = self.data.images[chosen]
        if self.shift or self.flip:
            images = self._moved(images, step)
        return scaled(images, self.scale), self.data.labels[chosen]

    def _moved(self, images: Tensor, step: int) -> Tensor:
        """Each image moved and mirrored by a draw of its own; what comes in from the edge is 0."""
        draws = keyed_generator(self.seed, "move", step)
        B, (H, W), shape = images.shape[0], images.shape[-2:], images.shape
        x_BCHW = images.reshape(B, -1, H, W)
        if self.flip:
            mirrored = torch.from_numpy(draws.integers(2, size=B)).bool()
            x_BCHW = torch.where(mirrored[:, None, None, None], x_BCHW.flip(3), x_BCHW)
        if self.shift:
            s = self.shift
            down, right = torch.from_numpy(draws.integers(2 * s + 1, size=(2, B, 1)))
            padded = torch.nn.functional.pad(x_BCHW, (s, s, s, s))
            rows, cols = (down + torch.arange(H))[:, :, None], (right + torch.arange(W))[:, None, :]
            moved = padded.permute(0, 2, 3, 1)[torch.arange(B)[:, None, None], rows, cols]
            x_BCHW = moved.permute(0, 3, 1, 2)
        return x_BCHW.reshape(shape)


@dataclass(frozen=True, kw_only=True)
class AllImages:
    """All images of a part, or some of them, the same at every evaluation."""

    data: Labelled
    scale: tuple[float, float]
    wanted: int | None = None
    """How many, drawn once and for all; None: all."""

    @property
    def count(self) -> int:
        there = len(self.data.labels)
        return there if self.wanted is None else min(self.wanted, there)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Float images, scaled, and their labels, as many together as an evaluation looks at."""
        there = len(self.data.labels)
        chosen = torch.arange(there)
        if self.count < there:  # at random: files are often sorted by class, or by turns
            drawn = keyed_generator(0, "evaluated").permutation(there)[: self.count]
            chosen = torch.from_numpy(drawn).sort().values
        together = max(1, min(EVAL_BATCH, EVAL_NUMBERS // self.data.images[0].numel()))
        for part in torch.split(chosen, together):
            yield scaled(self.data.images[part], self.scale), self.data.labels[part]


def scaled(images: Tensor, scale: tuple[float, float]) -> Tensor:
    """uint8 pixels to float32 of mean 0 and deviation 1 over the training images."""
    mean, deviation = scale
    return images.float().div_(255).sub_(mean).div_(deviation)
