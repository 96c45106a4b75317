"""A sample of the step's rows: the exact scan, on fewer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rarefy.growth.condensed import Condensed
from rarefy.growth.signal import Request, Signal
from rarefy.sampling import Generator, integers, sample_without_replacement


@dataclass(frozen=True, kw_only=True)
class SampledTokens(Signal):
    """The gradient of a random part of the rows, which is unbiased. A step of no more rows is exact.

    Costs the exact scan's time times tokens / B, and tokens * (O + I) floats.
    """

    tokens: int = 256
    """Rows looked at in a step, over its backward calls and ranks."""

    by: Literal["chance", "norm"] = "chance"
    """Which rows: each alike, or more often those of large |dy| |x| (which count the less for it)."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {self.tokens}")
        if self.by not in ("chance", "norm"):
            raise ValueError(f"by must be 'chance' or 'norm', got {self.by!r}")

    def collector(self, request: Request) -> _Sample:
        """See `Signal`."""
        return _Sample(request, self)

    def held_bytes(self, shape: tuple[int, int], k: int, unit_entries: int) -> int:
        """See `Signal`."""
        return 4 * self.tokens * (shape[0] + shape[1])


class _Sample(Condensed):
    def __init__(self, request: Request, signal: SampledTokens) -> None:
        super().__init__(request)
        self._by_norm = signal.by == "norm"
        self._tokens = -(-signal.tokens // (request.ranks.world_size() * max(1, request.calls or 1)))

    def condense(self, dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        if dy.shape[0] <= self._tokens:
            return dy.clone(), x.clone()  # the loop may write to its batch before the rewire
        if self._by_norm:
            rows, weights = _by_norm(dy, x, self._tokens, self.generator())
            return dy[rows] * weights[:, None], x[rows]
        rows = sample_without_replacement(dy.shape[0], self._tokens, self.generator()).to(dy.device)
        return dy[rows] * (dy.shape[0] / self._tokens), x[rows]

    def combine(self, mine: Tensor, more: Tensor) -> Tensor:
        return torch.cat([mine, more])

    def over_ranks(self, rows: Tensor) -> Tensor:
        return self.request.ranks.rows_of_ranks(rows)


def _by_norm(dy: Tensor, x: Tensor, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Rows drawn in proportion to |dy| |x|, by one random offset and equal strides (systematic sampling, which varies
    less than independent draws), and the weights that make their sum unbiased.
    """
    share = dy.norm(dim=1).double() * x.norm(dim=1).double()
    total = share.sum()
    if not bool(torch.isfinite(total)) or not bool(total > 0):  # scores will be all zero, or not finite (8.3)
        return torch.arange(dy.shape[0], device=dy.device), dy.new_ones(dy.shape[0])
    offset = float(integers(1 << 52, 1, generator)) / (1 << 52)
    at = (torch.arange(count, dtype=torch.float64, device=dy.device) + offset) * (total / count)
    ends = share.cumsum(0)
    rows = torch.searchsorted(ends, at, right=True)
    last = int((share > 0).nonzero()[-1])  # rounding may put the last mark past the end
    rows = rows.clamp_(max=last)
    return rows, (total / (count * share[rows])).to(dy.dtype)
