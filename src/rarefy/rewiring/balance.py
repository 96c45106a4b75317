"""Groups of rows that keep their number of units: an attention head's rows of a projection, for example.

The rows of a layer are cut into equal groups, one after the other. Every rewire is then a rewire of each group alone,
by the method's own rule: k is split over the groups by their units, and each drops and grows its part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from rarefy.growth import Request
from rarefy.growth.exact import BestUnits
from rarefy.growth.signal import scan
from rarefy.methods import Candidates, Choice, LayerView, Method
from rarefy.ops.index import Index
from rarefy.pattern import Pattern


@dataclasses.dataclass(frozen=True)
class Group:
    """Consecutive unit rows of a layer."""

    rows: slice
    """In entries, of the matrix."""
    units: slice
    """Their units, by row-major index."""
    positions: slice
    """Those that are active, by position in the pattern."""
    pattern: Pattern
    """Of these rows alone."""


def groups_of(pattern: Pattern, groups: int) -> Iterator[Group]:
    """The pattern in `groups` equal groups of rows, which must divide them."""
    rows, cols, b_r = pattern.num_unit_rows // groups, pattern.num_unit_cols, pattern.block[0]
    shape = (rows * b_r, pattern.shape[1])
    starts = pattern.crow_indices[::rows].tolist() if rows else [0] * (groups + 1)
    for at in range(groups):
        begin, end = starts[at], starts[at + 1]
        crow = pattern.crow_indices[at * rows : (at + 1) * rows + 1] - begin
        yield Group(
            slice(at * rows * b_r, (at + 1) * rows * b_r),
            slice(at * rows * cols, (at + 1) * rows * cols),
            slice(begin, end),
            Pattern(crow, pattern.col_indices[begin:end], shape, pattern.block),
        )


def split(k: int, active: list[int], every: list[int]) -> list[int]:
    """k over the groups: in proportion to their active units, by largest remainder (ties: the earlier group), and no
    more than a group has absent ones.

    Args:
        active, every: K and n of each group.
    """
    total = sum(active)
    parts = [k * mine // total if total else 0 for mine in active]
    order = sorted(range(len(active)), key=lambda at: -(k * active[at] % total if total else 0))
    for at in order[: k - sum(parts) if total else 0]:
        parts[at] += 1
    return [min(part, n - mine) for part, mine, n in zip(parts, active, every, strict=True)]


def _split(k: int, groups: list[Group]) -> list[int]:
    sizes = [group.units.stop - group.units.start for group in groups]
    return split(k, [group.pattern.num_units for group in groups], sizes)


def choose_in_groups(method: Method, view: LayerView, k: int, candidates: Candidates, groups: int) -> Choice | None:
    """The method's choice in each group of rows alone; None if it has none in any of them."""
    parts = list(groups_of(view.pattern, groups))
    drop, grow = [], []
    for group, mine in zip(parts, _split(k, parts), strict=True):
        gradient = None if view.gradient is None else view.gradient[group.positions]
        seen = dataclasses.replace(view, pattern=group.pattern, values=view.values[group.positions], gradient=gradient)
        choice = method.choose(seen, mine, candidates.part(group.units.start, group.units.stop))
        if choice is None:
            return None
        drop.append(choice.drop + group.positions.start)
        grow.append(choice.grow + group.units.start)
    return Choice(torch.cat(drop), torch.cat(grow))


class BestOfGroups(BestUnits):
    """The best absent units of each group of rows of one backward call, streamed group by group.

    Args:
        pattern: of the layer, which does not change before the call.
        groups: how many.
    """

    def __init__(self, request: Request, pattern: Pattern, groups: int) -> None:
        super().__init__(request)
        self._groups = list(groups_of(pattern, groups))

    def best(self, index: Index, dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `BestUnits`."""
        units, scores = [], []
        for group, k in zip(self._groups, _split(self.request.k, self._groups), strict=True):
            mine = Index.of(group.pattern)
            found = scan(mine, dy[:, group.rows].contiguous(), x, k, self.request.grow_score)
            units.append(found[0] + group.units.start)
            scores.append(found[1])
        return torch.cat(units), torch.cat(scores)
