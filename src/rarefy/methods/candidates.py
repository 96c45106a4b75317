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
    barred: Tensor | None = None
    """Ascending units, none of them active, that a change of density dropped at this step; None: none."""

    def best(self, k: int, dropped: Tensor) -> Tensor:
        """See `Candidates`."""
        present = self.active
        if self.may_return:
            stays = torch.ones(present.numel(), dtype=torch.bool, device=present.device)
            stays[dropped] = False
            present = present[stays]
        elif self.barred is not None:
            present = torch.cat([present, self.barred]).sort().values
        return random_absent(present, self.num_all, min(k, self.num_all - present.numel()), keyed_generator(*self.key))


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
