"""How many units each layer has while the density moves (rewiring rules 2.1 and 2.5 to 2.7)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from rarefy.distributions import DISTRIBUTIONS, exact_counts
from rarefy.pattern import check_density, unit_grid
from rarefy.schedules import Constant, Schedule

_LOOKED_AT = 100
"""Progress is tried at so many points and one to see whether a schedule is sound and moves."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Units of the sparse layers of a plan, at any progress of its schedules.

    Layers with a density of their own keep to it; the others share what `density` allows. Layers whose units have
    different sizes share it too, and round it within each kind of unit.
    """

    shapes: Mapping[str, tuple[int, ...]]
    """Layer name -> (out, in), or of a convolution (out, in, kh, kw), in the model's order."""
    blocks: Mapping[str, tuple[int, int]]
    """Layer name -> unit shape."""
    density: Schedule
    """Of the layers that share the budget."""
    distribution: str
    """How it is spread: a name in `DISTRIBUTIONS`."""
    own: Mapping[str, Schedule]
    """Layers with a density of their own."""

    @cached_property
    def moves(self) -> bool:
        """Whether any layer ever has another number of units than at first."""
        schedules = [*self.own.values(), *([self.density] if len(self.own) < len(self.shapes) else [])]
        return any(moves(schedule) for schedule in schedules)

    def sizes(self) -> dict[str, int]:
        """n of each layer."""
        return {name: math.prod(unit_grid(as_matrix(s), self.blocks[name])) for name, s in self.shapes.items()}

    def groups(self) -> Iterator[list[str]]:
        """Layers whose units are spread together: each with a density of its own alone, the others by kind of unit."""
        yield from ([name] for name in self.shapes if name in self.own)
        kinds: dict[tuple[int, int], list[str]] = {}
        for name in self.shapes:
            if name not in self.own:
                kinds.setdefault(self.blocks[name], []).append(name)
        yield from kinds.values()

    def densities(self, progress: float) -> dict[str, float]:
        """Real density per layer, before rounding."""
        shared = {name: shape for name, shape in self.shapes.items() if name not in self.own}
        own = {name: schedule(progress) for name, schedule in self.own.items()}
        return {**own, **(DISTRIBUTIONS[self.distribution](shared, self.density(progress)) if shared else {})}

    def counts(self, progress: float, now: Mapping[str, int] | None = None) -> dict[str, int]:
        """Exact units per layer (2.1).

        Args:
            now: units that the layers have. Where a group's total falls, none of its layers grows; where it rises, none
                shrinks (2.6).
        """
        densities, sizes = self.densities(progress), self.sizes()
        kinds = len(set(self.blocks[name] for name in self.shapes if name not in self.own))
        counts: dict[str, int] = {}
        for names in self.groups():
            n = {name: sizes[name] for name in names}
            if names[0] in self.own:
                counts[names[0]] = min(max(1, round(densities[names[0]] * n[names[0]])), n[names[0]])
                continue
            part = sum(densities[name] * n[name] for name in names) / max(sum(n.values()), 1)
            density = self.density(progress) if kinds == 1 else part
            least, most = None, None
            if now is not None:
                if round(density * sum(n.values())) <= sum(now[name] for name in names):
                    most = {name: now[name] for name in names}
                else:
                    least = {name: now[name] for name in names}
            counts |= exact_counts(densities, n, density, least=least, most=most)
        return counts


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """(out, in) of a weight's matrix: a convolution's is (out, in * kh * kw)."""
    return shape[0], math.prod(shape[1:])


def moves(schedule: Schedule) -> bool:
    """Whether a schedule has more than one value."""
    if isinstance(schedule, Constant):
        return False
    return len({schedule(i / _LOOKED_AT) for i in range(_LOOKED_AT + 1)}) > 1


def check_densities(schedule: float | Schedule) -> None:
    """Raises ValueError unless every value is a density, in (0, 1]."""
    if not isinstance(schedule, Schedule):
        check_density(schedule)
        return
    for i in range(_LOOKED_AT + 1):
        check_density(schedule(i / _LOOKED_AT))
