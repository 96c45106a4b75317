"""What is measured at each rewire (rewiring rule 10), in memory that follows the nonzeros."""

from __future__ import annotations

from typing import Any

import numpy as np
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
        self._all_seen = False
        self._see(pattern)

    def _see(self, pattern: Pattern) -> None:
        if self._all_seen:
            return
        begins, ends = pattern.crow_indices[self.rows].cpu(), pattern.crow_indices[self.rows + 1].cpu()
        counts = (ends - begins).numpy()
        # Unit by unit of the sampled rows: where the row's stand among the pattern's, and where it is seen.
        offsets = begins.numpy() - (counts.cumsum() - counts)
        here = np.arange(counts.sum()) + np.repeat(offsets, counts)
        cols = pattern.col_indices.cpu().numpy()[here]
        self.seen.numpy()[np.repeat(np.arange(counts.size), counts), cols] = True
        self._all_seen = bool(self.seen.all())

    @property
    def exploration(self) -> float:
        """Share of the sampled positions that were ever active."""
        return int(np.count_nonzero(self.seen.numpy())) / max(self.seen.numel(), 1)

    def rewired(self, pattern: Pattern, grown: Tensor, t_crow: Tensor, *, keep: bool = False) -> dict[str, Any]:
        """Figures of a rewire that grew units `grown` and led to `pattern`.

        Args:
            t_crow: (C + 1,) pointers of the pattern's unit columns.
            keep: the newborns whose survival is asked for next are those of the rewire before, and `grown` as well.
        """
        survival = None
        if self.newborns.numel():
            survival = float(contains(pattern.unit_indices().cpu(), self.newborns.long()).float().mean())
        if not keep:
            self.newborns = grown.cpu().to(self._kind)
        elif grown.numel():
            self.newborns = torch.cat([self.newborns, grown.cpu()]).unique().to(self._kind)
        self._see(pattern)
        return {
            "exploration": self.exploration,
            "newborn_survival": survival,
            "empty_rows": int((torch.diff(pattern.crow_indices) == 0).sum()),
            "empty_cols": int((torch.diff(t_crow) == 0).sum()),
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
        self._all_seen = bool(self.seen.all())
