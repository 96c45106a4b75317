"""What is measured at each rewire (rewiring rule 10), in memory that follows the nonzeros."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rarefy.pattern import Pattern
from rarefy.sampling import keyed_generator, sample_without_replacement
from rarefy.selection import contains


class Tracker:
    """Exploration and newborn survival of one layer.

    Exploration R_s (ITOP, Liu et al. 2021): units ever active over all units, estimated on a fixed sample of unit
    rows that holds about as many positions as the layer has units.
    """

    def __init__(self, name: str, pattern: Pattern) -> None:
        rows, cols = pattern.num_unit_rows, pattern.num_unit_cols
        sampled = min(rows, max(1, pattern.num_units // max(cols, 1)))
        self.rows = sample_without_replacement(rows, sampled, keyed_generator("exploration", name))
        self.seen = torch.zeros(sampled, cols, dtype=torch.bool)
        self._kind = torch.int32 if rows * cols <= torch.iinfo(torch.int32).max else torch.int64
        self.newborns = torch.empty(0, dtype=self._kind)
        self._see(pattern)

    def _see(self, pattern: Pattern) -> None:
        for at, row in enumerate(self.rows.tolist()):
            begin, end = pattern.crow_indices[row : row + 2].tolist()
            self.seen[at, pattern.col_indices[begin:end].long().cpu()] = True

    @property
    def exploration(self) -> float:
        """Share of the sampled positions that were ever active."""
        return float(self.seen.float().mean()) if self.seen.numel() else 0.0

    def rewired(self, pattern: Pattern, grown: Tensor, *, keep: bool = False) -> dict[str, Any]:
        """Figures of a rewire that grew units `grown` and led to `pattern`.

        Args:
            keep: the newborns whose survival is asked for next are those of the rewire before, and `grown` as well.
        """
        survival = None
        if self.newborns.numel():
            survival = float(contains(pattern.unit_indices().cpu(), self.newborns.long()).float().mean())
        born = torch.cat([self.newborns, grown.cpu()]).unique() if keep else grown.cpu()
        self.newborns = born.to(self._kind)
        self._see(pattern)
        used_cols = torch.zeros(pattern.num_unit_cols, dtype=torch.bool)
        used_cols[pattern.col_indices.long().cpu()] = True
        return {
            "exploration": self.exploration,
            "newborn_survival": survival,
            "empty_rows": int((torch.diff(pattern.crow_indices) == 0).sum()),
            "empty_cols": int((~used_cols).sum()),
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors only; the sampled rows follow from the layer's name."""
        return {"seen": self.seen.clone(), "newborns": self.newborns.clone()}

    def check(self, state: dict[str, Tensor]) -> None:
        """Raises ValueError when the state is of another layer."""
        if tuple(state["seen"].shape) != tuple(self.seen.shape):
            raise ValueError(
                f"exploration was tracked on {tuple(state['seen'].shape)} positions, here {tuple(self.seen.shape)}"
            )

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises as `check`, with nothing changed."""
        self.check(state)
        self.seen = state["seen"].bool().clone()
        self.newborns = state["newborns"].to(self._kind, copy=True)
