"""What a method is: scores for dropping and growing, and when. A new method is a new file with a subclass of
`Method`.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from rarefy.growth import Exact, Signal
from rarefy.methods.candidates import Candidates, Choice
from rarefy.methods.redistribution import Redistribution
from rarefy.pattern import Pattern
from rarefy.schedules import Cosine, Schedule, as_schedule
from rarefy.selection import lowest


class Needs(enum.Enum):
    """What a method's growth looks at."""

    NOTHING = "nothing"
    """Growth is uniform at random."""
    GRADIENT = "gradient"
    """Growth takes the units of the highest `grow_score` of the dense gradient, which is streamed, not stored."""
    TOPOLOGY = "topology"
    """Growth follows from the pattern alone, and `choose` finds it by itself."""


def _no_other(name: str) -> Pattern | None:
    return None


@dataclass(frozen=True)
class LayerView:
    """What a method sees of a layer at a rewire; nothing in it may be written to."""

    name: str
    """The layer's name in the model."""
    pattern: Pattern
    """Where its K units are."""
    values: Tensor
    """(K,) for block 1, else (K, b_r, b_c), after the optimizer's step."""
    step: int
    """t, the optimizer steps applied so far."""
    progress: float = 0.0
    """Of the rewiring, from 0 at its begin to 1 at its end."""
    gradient: Tensor | None = None
    """Of the values, as the optimizer saw it (clipped, if the loop clips); None before the step."""
    newborn: Tensor | None = None
    """(K,) boolean, units that a change of density grew at this step, which may not go at once (2.8)."""
    seed: int = 0
    """Of the run: whatever a method draws is keyed by it, the step and the name (`rarefy.sampling`)."""
    planned_units: int = 0
    """How many units the layer had before any rewire."""
    last: bool = False
    """Whether it is the last of the layers that rewire."""
    pattern_of: Callable[[str], Pattern | None] = _no_other
    """Another layer's present pattern by its name; None: there is none of that name."""


def unit_mean(entries: Tensor) -> Tensor:
    """Mean over the entries of each unit: (units,) or (units, b_r, b_c) -> (units,)."""
    return entries if entries.dim() == 1 else entries.mean(dim=(1, 2))


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a pattern is found. Fields are the engine's options; subclasses add their own and say how units score."""

    interval: int = 100
    """Optimizer steps between two rewires of a layer."""

    fraction: Schedule = field(default_factory=lambda: Cosine(start=0.3))
    """Part of a layer's active units replaced at one rewire, over the progress from `begin` to `end`."""

    begin: int = 0
    """First step after which layers may rewire."""

    end: int | None = None
    """Last step after which layers may rewire; None: 75% of the run's steps."""

    stagger: bool = True
    """Spread the layers evenly over the interval, so that costs are flat; False: all at once, as in the papers."""

    may_return: bool = False
    """Whether units dropped in a rewire are candidates for its growth; one that returns keeps value and state."""

    density_interval: int | None = None
    """Optimizer steps between two changes of density; None: `interval`."""

    redistribute: Redistribution | None = None
    """Move units between layers by salience, at each of those steps, with the total as it is; None: do not."""

    signal: Signal = field(default_factory=Exact)
    """What growth by gradient looks at: the exact dense gradient, or something cheaper; random growth ignores it."""

    needs: ClassVar[Needs] = Needs.NOTHING
    rewires: ClassVar[bool] = True
    keeps_counts: ClassVar[bool] = True
    """Whether `choose` grows as many units as it drops. Of one that does not, layers change their size (2.2, 2.3)."""
    needs_constant_fan_in: ClassVar[bool] = False
    """Whether a plan must start with rows of equal fan-in."""

    budget_grows: ClassVar[bool] = True
    """Whether a `budget` of its own may give a layer more units than it has: growth by gradient must know in time."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        _registry[cls.__name__.lower()] = cls

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ValueError(f"interval must be at least 1 step, got {self.interval}")
        if self.density_interval is not None and self.density_interval < 1:
            raise ValueError(f"density_interval must be at least 1 step, got {self.density_interval}")
        if self.begin < 0 or (self.end is not None and self.end < self.begin):
            raise ValueError(f"begin and end must satisfy 0 <= begin <= end, got begin={self.begin}, end={self.end}")

    @property
    def resizes(self) -> bool:
        """Whether a rewire may give a layer another number of units, which DistributedDataParallel cannot follow."""
        return not self.keeps_counts

    @property
    def expects_empty_rows(self) -> bool:
        """Whether neurons without inputs are the method's own doing, and no sign of trouble."""
        return False

    def drop_score(self, view: LayerView) -> Tensor:
        """(K,) scores of the active units; the lowest go. Here: mean magnitude of the values."""
        return unit_mean(view.values.abs())

    def grow_score(self, tile: Tensor, view: LayerView) -> Tensor:
        """(units,) scores of a tile of the dense gradient; the highest come. Here: mean magnitude (has a fast kernel).

        Args:
            tile: (units,) for block 1, else (units, b_r, b_c): whole unit rows of the layer's dense gradient.
        """
        return unit_mean(tile.abs())

    def densities(self, asked: float | Schedule) -> Schedule:
        """The schedule that a density asked for in a plan means. Here: a number stays, a schedule is what it says.

        Methods that move the density by themselves take a number as the last one, and a schedule as it is.
        """
        return as_schedule(asked)

    def replaced(self, progress: float) -> float:
        """Part of a layer's units that a rewire replaces. Here: `fraction`."""
        return self.fraction(progress)

    def budget(self, views: Sequence[LayerView], total: int) -> dict[str, int] | None:
        """How many units each of these layers shall have, `total` together; None: as the plan distributes them.

        Called at each change of density where the total does not rise, of layers whose units have one size and whose
        drop scores are none of them NaN. Here: None, or what `redistribute` says.
        """
        if self.redistribute is None:
            return None
        scores = [self.drop_score(view) for view in views]
        counts = self.redistribute.counts(
            scores, [view.pattern.num_unit_rows * view.pattern.num_unit_cols for view in views], total
        )
        return {view.name: count for view, count in zip(views, counts, strict=True)}

    def row_candidates(self, view: LayerView) -> int:
        """How many of the best units of each row `choose` may ask for; 0: it only asks for the best of the layer.

        With more than 0 the engine hands `choose` a `BestInRows`, which costs that many scores and columns a row.
        """
        return 0

    def choose(self, view: LayerView, k: int, candidates: Candidates) -> Choice | None:
        """Which units go and which come; None: scores are not finite, and nothing changes.

        Here: the k of lowest `drop_score` go, and as many of the best candidates come. Most methods only say how
        units score; override this where the choice has a structure of its own, such as equal counts a row.
        """
        score = self.drop_score(view)
        if tuple(score.shape) != (view.pattern.num_units,):
            raise ValueError(
                f"{type(self).__name__}.drop_score must give one score a unit, ({view.pattern.num_units},), "
                f"got {tuple(score.shape)}"
            )
        if bool(score.isnan().any()):
            return None
        if view.newborn is not None:
            score = score.masked_fill(view.newborn, math.inf)
            k = min(k, int((~view.newborn).sum()))
        drop = lowest(score, k)
        grow = candidates.best(k, drop)
        return None if grow is None else Choice(drop, grow)


_registry: dict[str, type[Method]] = {}


def registered() -> dict[str, type[Method]]:
    """Every method by its lower-case class name, users' own included."""
    return dict(_registry)
