"""What a signal is: which part of the dense gradient growth pays for, and how what was seen becomes scores.

A signal makes a collector for a layer that will rewire; backward passes feed it (`rarefy.ops.sink`), and at the rewire
it gives the best absent units. A new signal is a new file with a subclass of `Signal`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rarefy.groups import Group, groups_of, split_over
from rarefy.ops import tiled
from rarefy.ops.index import Index
from rarefy.ops.rows import RowScores
from rarefy.ops.spread import groups_in
from rarefy.pattern import Pattern

GrowScore = Callable[[Tensor], Tensor]
"""A method's own score: (units,) or (units, b_r, b_c) entries of a gradient -> (units,); the highest grow."""


class Ranks(Protocol):
    """What collectors ask of the ranks that train together."""

    def world_size(self) -> int: ...
    def rank(self) -> int: ...
    def mean_over_ranks(self, gradient: Tensor) -> Tensor: ...
    def rows_of_ranks(self, rows: Tensor) -> Tensor: ...
    def any_rank(self, flag: bool, device: torch.device) -> bool: ...


@dataclass(frozen=True)
class Request:
    """The layer and the rewire that a collector is made for."""

    name: str
    """The layer's."""
    step: int
    """Optimizer step after which it rewires."""
    seed: int
    """Of the run: whatever is drawn is keyed by it, the step and the name."""
    values: Tensor
    """The layer's parameter; its gradient tells where a step begins."""
    k: int
    """Units that may be wanted, at most."""
    returns: bool
    """Whether units that exist may be dropped and return, so that they are scored too."""
    calls: int | None
    """Backward calls of the layer in the step before; None: not known yet."""
    ranks: Ranks
    grow_score: GrowScore | None = None
    """The method's own, as of before the step; None: mean |g|, for which there is a native kernel."""
    groups: int = 1
    """Equal groups of unit rows, each of which grows its part of k alone."""
    row_capacity: int = 0
    """How many of the best of each row may be wanted too; 0: none."""


class Found(NamedTuple):
    """What may grow."""

    units: Tensor
    """Absent units, in any order: all, or at least the k best."""
    scores: Tensor
    """Theirs."""
    returning: Tensor | None
    """(K,) scores of the active units, if they may return."""
    rows: RowScores | None = None
    """The best of each row, if the request has a `row_capacity`."""


class Collector:
    """Receives the backward calls of one layer (`rarefy.ops.sink.Collector`) up to its rewire.

    Knows where a step begins, so that what a step left behind that was never applied (AMP) is forgotten: a step's first
    backward finds no gradient on the values and is another pass than the last; a layer that is used twice in one pass
    finds none the second time either, but in the same pass.
    """

    combines: bool = True
    """Whether it can use a step of several backward calls."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._pass = -1
        self.calls = 0
        """Backward calls in the present step."""

    def add(self, index: Index, dy: Tensor, x: Tensor) -> None:
        """One backward call of the layer: dy (B, O), x (B, I), at least fp32; of a convolution with groups the index is
        that of one group's inputs, and x (B, groups * I) has those of all (`rarefy.ops.spread`).
        """
        current = torch._C._current_graph_task_id()
        if self.request.values.grad is None and current != self._pass:
            self.calls = 0
        self._pass = current
        self.calls += 1
        self.see(index, dy, x)

    @abstractmethod
    def see(self, index: Index, dy: Tensor, x: Tensor) -> None:
        """The same, counted: at the first call of a step `self.calls` is 1, and what was before is to be forgotten."""

    def step_applied(self, index: Index) -> None:
        """An optimizer step was applied, and the rewire comes later. Only for signals that look at several steps."""

    @abstractmethod
    def found(self, index: Index, grow_score: GrowScore | None) -> Found:
        """What may grow, by what was seen. All ranks call it together, and all get the same."""

    def state_dict(self) -> dict[str, Any]:
        """What a bitwise resume between two steps needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a saved state."""


@dataclass(frozen=True, kw_only=True)
class Signal:
    """What growth by gradient looks at. Fields are its options."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        _registry[cls.__name__.lower()] = cls

    @property
    def lead(self) -> int:
        """Steps before and with the rewire that it looks at."""
        return 1

    @abstractmethod
    def collector(self, request: Request) -> Collector:
        """One for a layer that will rewire."""
        raise NotImplementedError(f"{type(self).__name__} must define collector(request)")

    @abstractmethod
    def held_bytes(self, shape: tuple[int, int], k: int, unit_entries: int) -> int:
        """Most bytes that a collector holds between a backward pass and the rewire, in fp32.

        Args:
            shape: (O, I) of the layer.
            k: units it looks for.
            unit_entries: b_r * b_c.
        """
        raise NotImplementedError(f"{type(self).__name__} must define held_bytes(shape, k, unit_entries)")


_registry: dict[str, type[Signal]] = {}


def registered() -> dict[str, type[Signal]]:
    """Every signal by its lower-case class name, users' own included."""
    return dict(_registry)


# -- scoring ----------------------------------------------------------------------------------------------------------


def unit_scores(entries: Tensor, grow_score: GrowScore | None) -> Tensor:
    """(units,) scores of (units,) or (units, b_r, b_c) entries of a gradient; without a score of the method's: mean
    |g|.
    """
    if grow_score is not None:
        return grow_score(entries)
    return entries.abs() if entries.dim() == 1 else entries.abs().mean(dim=(1, 2))


def grid_scores(gradient: Tensor, block: list[int], grow_score: GrowScore | None) -> Tensor:
    """(unit rows, unit columns) float32 scores of whole unit rows of a dense gradient (rows, I)."""
    if grow_score is None:
        return tiled.unit_scores(gradient, block)
    (b_r, b_c), (rows, cols) = block, gradient.shape
    units = gradient.reshape(rows // b_r, b_r, cols // b_c, b_c).transpose(1, 2).reshape(-1, b_r, b_c)
    scores = grow_score(units.flatten() if block == [1, 1] else units)
    return scores.to(torch.float32).view(rows // b_r, cols // b_c)


def scan(index: Index, dy: Tensor, x: Tensor, request: Request, grow_score: GrowScore | None) -> tuple[Tensor, Tensor]:
    """The best absent units of dy^T x that the request may want, streamed: (units, scores). Memory O(k + tile)."""
    if request.groups == 1:
        return _best_absent(index, dy, x, request.k, grow_score)
    groups = list(groups_of(pattern_of(index), request.groups))
    return _scan_groups(index, dy, x, groups, split_over(request.k, groups), grow_score)


def _scan_groups(
    index: Index, dy: Tensor, x: Tensor, groups: Sequence[Group], ks: Sequence[int], grow_score: GrowScore | None
) -> tuple[Tensor, Tensor]:
    """The best of each group of rows, as many as `ks` says: (units, scores)."""
    units, scores = [], []
    for at, (group, k) in enumerate(zip(groups, ks, strict=True)):
        seen = x[:, _inputs(at, len(groups), groups_in(index, x), index.in_features)]
        found = _best_absent(Index.of(group.pattern), dy[:, group.rows].contiguous(), seen, k, grow_score)
        units.append(found[0] + group.units.start)
        scores.append(found[1])
    return torch.cat(units), torch.cat(scores)


def _inputs(at: int, parts: int, groups: int, width: int) -> slice:
    """Columns of x that one of `parts` equal parts of the rows looks at, where each of `groups` has `width`."""
    first, last = at * groups // parts, -(-(at + 1) * groups // parts)
    return slice(first * width, last * width)


def pattern_of(index: Index) -> Pattern:
    """The pattern that an index lists."""
    shape, (b_r, b_c) = (index.out_features, index.in_features), index.block
    return Pattern(index.crow, index.cols.to(torch.int32), shape, (b_r, b_c))


def _best_absent(index: Index, dy: Tensor, x: Tensor, k: int, grow_score: GrowScore | None) -> tuple[Tensor, Tensor]:
    if (number := groups_in(index, x)) > 1:
        groups = list(groups_of(pattern_of(index), number))
        absent = [group.units.stop - group.units.start - group.pattern.num_units for group in groups]
        units, scores = _scan_groups(index, dy, x, groups, [min(k, some) for some in absent], grow_score)
        # Stable, so that of equal scores the earlier group's, which are the lower units, come first.
        best = torch.sort(scores, descending=True, stable=True).indices[:k]
        return units[best], scores[best]
    if grow_score is None:
        return torch.ops.rarefy.grow_candidates(*index, dy, x, k)
    return tiled.grow_candidates(index, dy, x, k, lambda tile: grid_scores(tile, index.block, grow_score))


def active_units(index: Index) -> Tensor:
    """(K,) ascending flat row-major indices of the units that exist."""
    return tiled.positions(index, tiled.Tile(0, index.crow.shape[0] - 1, 0, index.num_units))
