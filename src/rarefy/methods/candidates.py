"""What may grow at a rewire, and how a method asks for the best of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rarefy.ops.rows import RowScores
from rarefy.sampling import keyed_generator
from rarefy.selection import all_finite, highest, places, random_absent


@dataclass(frozen=True)
class Choice:
    """Which units a rewire swaps."""

    drop: Tensor
    """Positions among the layer's K active units, ascending int64."""
    grow: Tensor
    """Units to grow, ascending int64 row-major indices: none that stays active. One that is also dropped returns."""
    settled: bool = False
    """The layer needs no further rewires."""


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
        return highest(scores, units, k) if all_finite(scores) else None

    def part(self, first: int, last: int) -> Scored:
        """See `Candidates`."""
        here, active = (self.units >= first) & (self.units < last), (self.active >= first) & (self.active < last)
        returning = None if self.returning is None else self.returning[active]
        return Scored(self.active[active] - first, self.units[here] - first, self.scores[here], returning)


@dataclass(frozen=True)
class BestInRows:
    """Growth by the highest score, of the layer or of each row (6.2); for methods with `row_candidates`."""

    active: Tensor
    """(K,) ascending active units."""
    found: RowScores
    """Of this step's gradient."""
    num_cols: int
    """C, unit columns."""
    may_return: bool

    @property
    def finite(self) -> bool:
        """Whether every score is."""
        return self.found.finite

    def best(self, k: int, dropped: Tensor) -> Tensor | None:
        """See `Candidates`."""
        returning = self.found.active if self.may_return else None
        scored = Scored(self.active, self.found.units, self.found.scores, returning)
        return scored.best(k, dropped) if self.finite else None

    def part(self, first: int, last: int) -> BestInRows:
        """See `Candidates`."""
        here, active = (self.found.units >= first) & (self.found.units < last), (self.active >= first)
        active &= self.active < last
        rows = slice(first // self.num_cols, last // self.num_cols)
        found = RowScores(
            self.found.units[here] - first,
            self.found.scores[here],
            self.found.active[active],
            self.found.row_cols[rows],
            self.found.row_scores[rows],
            self.found.finite,
        )
        return BestInRows(self.active[active] - first, found, self.num_cols, self.may_return)

    def best_of_all(self, k: int) -> Tensor:
        """(k,) ascending units of the highest scores, active ones competing too."""
        units = torch.cat([self.found.units, self.active])
        return highest(torch.cat([self.found.scores, self.found.active]), units, k)

    def best_in_rows(self, wanted: Tensor, dropped: Tensor) -> Tensor:
        """Ascending units: of each row its `wanted` best; fewer where a row has not so many.

        Args:
            wanted: (R,) numbers, none above what the rows' capacity allows.
            dropped: positions of the units that this rewire drops, ascending; if units may return, these compete.
        """
        cols, scores = self.found.row_cols, self.found.row_scores
        capacity = cols.shape[1]
        taken = torch.arange(capacity, device=cols.device) < wanted[:, None]
        taken &= scores > -torch.inf
        units = (torch.arange(cols.shape[0], device=cols.device)[:, None] * self.num_cols + cols)[taken]
        if not self.may_return or not dropped.numel():
            return torch.sort(units).values
        # The best of a row with the dropped ones in it are among the best without them and the dropped ones.
        units = torch.cat([units, self.active[dropped]])
        scores = torch.cat([scores[taken], self.found.active[dropped]])
        units, order = torch.sort(units)
        rows = units // self.num_cols
        return units[places(-scores[order], rows, cols.shape[0]) < wanted[rows]]
