"""A sketch of the product: rows added up in groups, with random signs, so that in the mean only products of a row with
itself remain. Charikar, Chen & Farach-Colton 2002, "Finding Frequent Items in Data Streams", applied to a product of
matrices as in Clarkson & Woodruff 2009, "Numerical Linear Algebra in the Streaming Model", section 2.

Departs from both in groups of equal size, a permutation cut into pieces, instead of independent ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rarefy.growth.condensed import Condensed
from rarefy.growth.signal import Request, Signal


@dataclass(frozen=True, kw_only=True)
class Sketch(Signal):
    """The gradient from `size` signed sums of rows, which is unbiased. A step of one call and no more rows is exact.

    Costs the exact scan's time times size / B and a pass over dy and x, and size * (O + I) floats, however many
    backward calls a step has: the sketches of calls and ranks add up.
    """

    size: int = 64
    """Sums of rows that are kept."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")

    def collector(self, request: Request) -> _Sketch:
        """See `Signal`."""
        return _Sketch(request, self.size)

    def held_bytes(self, shape: tuple[int, int], k: int, unit_entries: int) -> int:
        """See `Signal`."""
        return 4 * self.size * (shape[0] + shape[1])


class _Sketch(Condensed):
    def __init__(self, request: Request, size: int) -> None:
        super().__init__(request)
        self._size = size

    def condense(self, dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = dy.shape[0]
        group = -(-rows // self._size)
        generator = self.generator()
        assert isinstance(generator, np.random.Generator)
        order = torch.from_numpy(generator.permutation(rows)).to(dy.device)
        signs = torch.from_numpy(generator.integers(2, size=group * self._size)).to(dy) * 2 - 1
        return _sums(dy, order, signs, group), _sums(x, order, signs, group)

    def combine(self, mine: Tensor, more: Tensor) -> Tensor:
        return mine.add_(more)

    def over_ranks(self, rows: Tensor) -> Tensor:
        ranks = self.request.ranks
        return ranks.mean_over_ranks(rows) * ranks.world_size()


def _sums(rows: Tensor, order: Tensor, signs: Tensor, group: int) -> Tensor:
    """(groups, features): signed sums of `group` rows each, in that order; the last groups may have fewer, or none."""
    mixed = F.pad(rows[order], (0, 0, 0, signs.numel() - rows.shape[0]))
    return torch.bmm(signs.view(-1, 1, group), mixed.view(-1, group, rows.shape[1])).squeeze(1)
