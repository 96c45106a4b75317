"""Norms of what flows in and out of a layer, without which row met which."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.growth.condensed import Condensed
from rarefy.growth.signal import GrowScore, Request, Signal
from rarefy.ops import tiled
from rarefy.ops.index import Index
from rarefy.ops.spread import groups_in

QUANTILES = 128
"""Of rows and of columns, from which the threshold is read."""

SQUARED_ROWS = 32
"""Rows squared at a time: squaring all of them first wrote and read them once more, and took ten times as long."""


@dataclass(frozen=True, kw_only=True)
class NormProduct(Signal):
    """|dy_i| |x_j| over the step's rows, in the place of |dy_i . x_j|: the most that it can be (Cauchy-Schwarz).

    Rank one, so it sees which outputs and inputs are busy, and nothing of how they go together. Costs a pass over dy
    and x, and one comparison a unit; O + I floats. Calls and ranks add up exactly, as squares do.
    """

    def collector(self, request: Request) -> _Norms:
        """See `Signal`."""
        return _Norms(request)

    def held_bytes(self, shape: tuple[int, int], k: int, unit_entries: int) -> int:
        """See `Signal`."""
        return 4 * (shape[0] + shape[1])


class _Norms(Condensed):
    def condense(self, dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return squares(dy), squares(x)

    def combine(self, mine: Tensor, more: Tensor) -> Tensor:
        return mine.add_(more)

    def over_ranks(self, rows: Tensor) -> Tensor:
        return self.request.ranks.mean_over_ranks(rows)  # orders as the sum does

    def best(self, index: Index, dy: Tensor, x: Tensor, grow_score: GrowScore | None) -> tuple[Tensor, Tensor]:
        if grow_score is None and self.request.groups == groups_in(index, x) == 1:
            (b_r, b_c), wide = index.block, torch.promote_types(dy.dtype, torch.float32)
            rows, cols = dy.to(wide).view(-1, b_r).mean(dim=1), x.to(wide).view(-1, b_c).mean(dim=1)
            found = large_products(index, rows, cols, self.request.k)
            if found is not None:
                return found
        return super().best(index, dy, x, grow_score)

    def finish(self, rows: Tensor) -> Tensor:
        return rows.sqrt()


def squares(rows: Tensor) -> Tensor:
    """(1, F) sums of squares over the rows of (B, F), by a few rows at a time, which stay in the cache."""
    sums = rows.new_zeros(SQUARED_ROWS, rows.shape[1])
    for part in rows.split(SQUARED_ROWS):
        sums[: part.shape[0]].addcmul_(part, part)
    return sums.sum(dim=0, keepdim=True)


def large_products(index: Index, rows: Tensor, cols: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """Absent units of large rows[i] * cols[j] and these products: at least the k largest, and what ties with them.

    None where a threshold tells too little: products that are not finite, or fewer than k that are above zero.

    Args:
        rows, cols: (R,) and (C,), not negative.

    The threshold comes from the products of quantiles, a small picture of all of them, and is lowered until enough lie
    above it. So no score is sorted or kept that is not wanted; memory O(k + tile).
    """
    num_absent = rows.numel() * cols.numel() - index.num_units
    k = min(k, num_absent)
    if not k or not bool(torch.isfinite(rows.max() * cols.max())):
        return None
    picture = torch.sort(torch.outer(_quantiles(rows), _quantiles(cols)).flatten(), descending=True).values
    share = k / num_absent
    while share < 1:
        share *= 1.25
        threshold = picture[min(int(share * picture.numel()), picture.numel() - 1)]
        if not bool(threshold > 0):
            return None
        units, scores = _above(index, rows, cols, threshold)
        if units.numel() >= k:
            return units, scores
    return None


def _quantiles(norms: Tensor) -> Tensor:
    """At most `QUANTILES` of the norms, evenly spread over their ranks."""
    count = min(QUANTILES, norms.numel())
    at = (torch.arange(count, device=norms.device) * 2 + 1) * norms.numel() // (2 * count)
    return torch.sort(norms).values[at]


def _above(index: Index, rows: Tensor, cols: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Absent units whose product is at least the threshold, ascending, and their products in float32."""
    units, scores = [], []
    for tile in tiled.tiles(index):
        products = torch.outer(rows[tile.first : tile.last], cols).flatten()
        wanted = products >= threshold
        wanted[tiled.positions(index, tile)] = False
        found = wanted.nonzero().flatten()
        units.append(found + tile.first * cols.numel())
        scores.append(products[found].to(torch.float32))
    return torch.cat(units), torch.cat(scores)
