"""Rows of equal fan-in, and neurons that may go. Lasby et al. 2023, "Dynamic Sparse Training with Structured Sparsity",
arXiv:2305.02299, section 3 and Algorithm 1.

A unit is salient if it is among the K - k largest values, or among the k largest gradients of the whole layer, units
that exist included. A neuron (unit row) with fewer than max(1, floor(gamma * fan-in)) salient units is ablated, where
the fan-in is that of the layer with all its neurons; one without units comes back once it has enough. The neurons that
are left share the layer's units: as many to each, rounded to the nearest, never above the columns. The K - k largest
values of these neurons stay, at most a fan-in of each; each grows by its own largest gradients what it lacks.

Departs from the paper and the authors' code in these: the fan-in is rounded to the nearest, not down; of values beyond
a full row the smallest go, not those at its end; at one rewire at most half of a layer's living neurons are ablated,
the least salient first, so that growth streams in memory of the layer's own size; just-dropped units return only where
`may_return` says so (6.1), a row that lacks candidates drops fewer; layers take turns. `SRigL.paper()` restores the
last two. An ablated neuron keeps its bias.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from rarefy.growth import Exact
from rarefy.methods.base import LayerView, Method, Needs, unit_mean
from rarefy.methods.candidates import BestInRows, Candidates, Choice
from rarefy.selection import contains, lowest, places, positions


@dataclass(frozen=True, kw_only=True)
class SRigL(Method):
    """RigL with rows of equal fan-in, without the neurons that hold too few salient units."""

    gamma: float = 0.3
    """Part of a fan-in that must be salient for a neuron to live; 0.95 for vision transformers, as the authors have
    it (`SRigL.vit()`)."""

    ablate: bool | tuple[str, ...] = True
    """Whose neurons may go: of all layers but the last, as the authors have it (True), of none, or of those whose names
    match one of these globs. Leave out layers whose every output is needed, such as a classifier's."""

    needs = Needs.GRADIENT
    keeps_counts = False
    needs_constant_fan_in = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must lie in [0, 1], got {self.gamma}; the authors' is 0.3")
        if not isinstance(self.signal, Exact):
            raise ValueError(f"SRigL grows row by row, for which signal must be Exact(), not {self.signal!r}")
        if not isinstance(self.ablate, bool):
            globs = (self.ablate,) if isinstance(self.ablate, str) else tuple(self.ablate)
            object.__setattr__(self, "ablate", globs)

    @classmethod
    def paper(cls, *, interval: int = 100, end: int | None = None) -> Self:
        """The authors' way: dropped units may return at once, and all layers rewire together."""
        return cls(interval=interval, end=end, may_return=True, stagger=False)

    @classmethod
    def vit(cls, *, interval: int = 100, end: int | None = None) -> Self:
        """The authors' gamma for vision transformers, 0.95; with a uniform distribution."""
        return cls(interval=interval, end=end, gamma=0.95)

    @property
    def expects_empty_rows(self) -> bool:
        """Ablated neurons have none."""
        return self.ablate not in (False, ())

    @property
    def resizes(self) -> bool:
        """Only by ablation: rows of equal fan-in hold what was planned."""
        return self.expects_empty_rows

    def may_ablate(self, view: LayerView) -> bool:
        """Whether neurons of this layer may go."""
        if isinstance(self.ablate, bool):
            return self.ablate and not view.last
        return any(fnmatch.fnmatch(view.name, glob) for glob in self.ablate)

    def row_candidates(self, view: LayerView) -> int:
        """The fan-in of the fewest neurons that one rewire may leave."""
        return _fan_in(view, self._fewest(view)) if self.may_ablate(view) else _fan_in(view, view.pattern.num_unit_rows)

    def choose(self, view: LayerView, k: int, candidates: Candidates) -> Choice | None:
        """See `Method.choose`. O(K log K + rows * candidates)."""
        assert isinstance(candidates, BestInRows)
        magnitude = unit_mean(view.values.abs())
        if not candidates.finite or bool(magnitude.isnan().any()):
            return None
        num_rows, num_cols = view.pattern.num_unit_rows, view.pattern.num_unit_cols
        rows, had = view.pattern.row_indices(), torch.diff(view.pattern.crow_indices.long())
        lives = self._living(view, magnitude, k, candidates)
        fan_in = _fan_in(view, int(lives.sum()))

        goes = torch.zeros_like(rows, dtype=torch.bool)
        goes[lowest(magnitude.masked_fill(~lives[rows], -torch.inf), k)] = True
        # Its place in its row matters to a unit of one that has too many, or could not be filled without it.
        least = fan_in - (num_cols - had) if not self.may_return else torch.zeros_like(had)
        ranked = positions(((had > fan_in) | (least > 0))[rows])
        if ranked.numel():
            row = rows[ranked]
            from_the_top = had[row] - 1 - places(magnitude[ranked], row, num_rows)
            goes[ranked] = (goes[ranked] & (from_the_top >= least[row])) | (from_the_top >= fan_in)
        drop = positions(goes | ~lives[rows])
        lacks = fan_in - had + torch.bincount(rows[drop], minlength=num_rows)
        return Choice(drop, candidates.best_in_rows(lacks.masked_fill(~lives, 0), drop))

    def _living(self, view: LayerView, magnitude: Tensor, k: int, candidates: BestInRows) -> Tensor:
        """(R,) boolean: the neurons that stay or come back."""
        num_rows, num_cols = view.pattern.num_unit_rows, view.pattern.num_unit_cols
        if not self.may_ablate(view):
            return torch.ones(num_rows, dtype=torch.bool, device=magnitude.device)
        stays = torch.ones_like(magnitude, dtype=torch.bool)
        stays[lowest(magnitude, k)] = False
        largest, steepest = candidates.active[stays], candidates.best_of_all(k)
        salient = torch.cat([largest, steepest[~contains(largest, steepest)]])
        counts = torch.bincount(salient // num_cols, minlength=num_rows)
        lives = counts >= max(1, int(self.gamma * (view.planned_units // num_rows)))
        lives[lowest(-counts, self._fewest(view))] = True
        return lives

    def _fewest(self, view: LayerView) -> int:
        """Neurons that live after a rewire at least: half of those that do, and enough to hold the layer's units."""
        living = int((torch.diff(view.pattern.crow_indices) > 0).sum())
        return max(-(-living // 2), -(-view.planned_units // view.pattern.num_unit_cols), 1)


def _fan_in(view: LayerView, num_living: int) -> int:
    """Units of each living neuron, so that the layer has as many as planned, to the nearest."""
    nearest = (2 * view.planned_units + num_living) // (2 * num_living)
    return min(max(nearest, 1), view.pattern.num_unit_cols)
