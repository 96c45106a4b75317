"""What may grow at a rewire, and how a method asks for the best of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rarefy.sampling import keyed_generator
from rarefy.selection import highest, random_absent


@dataclass(frozen=True)
class Choice:
    """Which units a rewire swaps."""

    drop: Tensor
    """Positions among the layer's K active units, ascending int64."""
    grow: Tensor
    """Units to grow, ascending int64 row-major indices: none that stays active. One that is also dropped returns."""


class Candidates(Protocol):
    """The units that may grow: absent before the rewire, and, if the method lets them return, just dropped."""

    def best(self, k: int, dropped: Tensor) -> Tensor | None:
        """(k,) or fewer, if there are not so many, ascending units; None: a score is not finite, so no rewire (8.3).

        Args:
            dropped: positions of the units that this rewire drops, ascending.
        """
        ...

    def part(self, first: int, last: int) -> Candidates:
        """Those of units [first, last), counted from `first`; so are the positions of active ones."""
        ...


@dataclass(frozen=True)
class AtRandom:
    """Growth that is uniform over the candidates (6.5)."""

    active: Tensor
    """(K,) ascending active units."""
    num_all: int
    """n, the units of the matrix."""
    key: tuple[object, ...]
    """Of the draw: (seed, step, layer)."""
    may_return: bool

    def best(self, k: int, dropped: Tensor) -> Tensor:
        """See `Candidates`."""
        present = self.active
        if self.may_return:
            stays = torch.ones(present.numel(), dtype=torch.bool, device=present.device)
            stays[dropped] = False
            present = present[stays]
        return random_absent(present, self.num_all, min(k, self.num_all - present.numel()), keyed_generator(*self.key))

    def part(self, first: int, last: int) -> AtRandom:
        """See `Candidates`."""
        mine = self.active[(self.active >= first) & (self.active < last)]
        return AtRandom(mine - first, last - first, (*self.key, first), self.may_return)


@dataclass(frozen=True)
class Scored:
    """Growth by the highest score (6.2)."""

    active: Tensor
    """(K,) ascending active units."""
    units: Tensor
    """Absent units, in any order: all, or at least as many of the best as may be asked for."""
    scores: Tensor
    """Theirs."""
    returning: Tensor | None
    """(K,) scores of the active units, if they may return."""

    def best(self, k: int, dropped: Tensor) -> Tensor | None:
        """See `Candidates`."""
        units, scores = self.units, self.scores
        if self.returning is not None:
            units = torch.cat([units, self.active[dropped]])
            scores = torch.cat([scores, self.returning[dropped].to(scores)])
        return highest(scores, units, k) if bool(torch.isfinite(scores).all()) else None

    def part(self, first: int, last: int) -> Scored:
        """See `Candidates`."""
        here, active = (self.units >= first) & (self.units < last), (self.active >= first) & (self.active < last)
        returning = None if self.returning is None else self.returning[active]
        return Scored(self.active[active] - first, self.units[here] - first, self.scores[here], returning)
