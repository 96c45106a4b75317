"""Norms of what flows in and out of a layer, without which row met which."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rarefy.growth.condensed import Condensed
from rarefy.growth.signal import Request, Signal


@dataclass(frozen=True, kw_only=True)
class NormProduct(Signal):
    """|dy_i| |x_j| over the step's rows, in the place of |dy_i . x_j|: the largest that it can be (Cauchy-Schwarz).

    Rank one, so it sees which outputs and inputs are busy, and nothing of how they go together. Costs a pass over dy
    and x and a scan of one row, and O + I floats; calls and ranks add up exactly, as the squares do.
    """

    def collector(self, request: Request) -> _Norms:
        """See `Signal`."""
        return _Norms(request)

    def held_bytes(self, shape: tuple[int, int], k: int, unit_entries: int) -> int:
        """See `Signal`."""
        return 4 * (shape[0] + shape[1])


class _Norms(Condensed):
    def condense(self, dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return dy.square().sum(dim=0, keepdim=True), x.square().sum(dim=0, keepdim=True)

    def combine(self, mine: Tensor, more: Tensor) -> Tensor:
        return mine.add_(more)

    def over_ranks(self, rows: Tensor) -> Tensor:
        return self.request.ranks.mean_over_ranks(rows)  # orders as the sum does

    def finish(self, rows: Tensor) -> Tensor:
        return rows.sqrt()
