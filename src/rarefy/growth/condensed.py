"""Signals that put a few rows in the place of the step's many: dy (B, O) and x (B, I) become (m, O) and (m, I) whose
product estimates dy^T x, and the exact scan runs on those, at 1/B-th of m times its price.
"""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from rarefy.growth.signal import Collector, Found, GrowScore, Request, scan, unit_scores
from rarefy.ops.index import Index
from rarefy.ops.spread import sddmm
from rarefy.sampling import Generator, keyed_generator


class Condensed(Collector):
    """Holds m (O + I) floats between the backward passes and the rewire. Calls and ranks combine."""

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self._rows: tuple[Tensor, Tensor] | None = None

    @abstractmethod
    def condense(self, dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Few rows of one call's many."""

    @abstractmethod
    def combine(self, mine: Tensor, more: Tensor) -> Tensor:
        """The rows of two calls as one."""

    @abstractmethod
    def over_ranks(self, rows: Tensor) -> Tensor:
        """The rows of all ranks as one, the same on each."""

    def finish(self, rows: Tensor) -> Tensor:
        """What is scanned."""
        return rows

    def generator(self) -> Generator:
        """Draws for the present call, on this rank alone: what each rank draws is independent of the others."""
        request = self.request
        return keyed_generator(request.seed, request.step, request.name, "rows", request.ranks.rank(), self.calls)

    def see(self, index: Index, dy: Tensor, x: Tensor) -> None:
        rows = self.condense(dy, x)
        if self.calls == 1 or self._rows is None:
            self._rows = rows
        else:
            self._rows = self.combine(self._rows[0], rows[0]), self.combine(self._rows[1], rows[1])

    def found(self, index: Index, grow_score: GrowScore | None) -> Found:
        assert self._rows is not None
        dy, x = (self.finish(self.over_ranks(rows)) for rows in self._rows)
        returning = None
        if self.request.returns:
            returning = unit_scores(sddmm(index, dy, x), grow_score)
        return Found(*self.best(index, dy, x, grow_score), returning)

    def best(self, index: Index, dy: Tensor, x: Tensor, grow_score: GrowScore | None) -> tuple[Tensor, Tensor]:
        """At least the k best absent units of dy^T x, and their scores."""
        return scan(index, dy, x, self.request, grow_score)
