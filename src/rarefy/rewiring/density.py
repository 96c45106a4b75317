"""When layers change their numbers of units, and to what (rewiring rules 2.5 to 2.8)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rarefy.budget import Budget
from rarefy.methods import LayerView, Method
from rarefy.selection import round_half_up


def changes(method: Method, budget: Budget | None) -> bool:
    """Whether the numbers of units are ever looked at again."""
    return budget is not None and (budget.moves or redistributes(method))


def redistributes(method: Method) -> bool:
    """Whether the method has a say in how the total is spread."""
    return method.redistribute is not None or type(method).budget is not Method.budget


def is_due(method: Method, budget: Budget | None, t: int, end: int) -> bool:
    """Whether the numbers of units change after step t: every so many steps, and at the end (2.5)."""
    if budget is None or not changes(method, budget) or not (t > 0 and method.begin <= t <= end):
        return False
    return (t - method.begin) % (method.density_interval or method.interval) == 0 or (t == end and budget.moves)


def targets(method: Method, budget: Budget, views: Mapping[str, LayerView], progress: float) -> dict[str, int]:
    """Units that each of the layers shall have at this progress, the totals exact (2.5, 2.6).

    Raises:
        ValueError: the method's `budget` gives other layers, another total, or more units than a layer has room for.
    """
    planned = _planned(budget, {name: view.pattern.num_units for name, view in views.items()}, progress)
    sizes = budget.sizes()
    for names in budget.groups():
        names = [name for name in names if name in views]
        total = sum(planned[name] for name in names)
        if not names or total > sum(views[name].pattern.num_units for name in names):
            continue
        given = method.budget([views[name] for name in names], total)
        if given is None:
            continue
        fits = set(given) == set(names) and all(0 <= given[name] <= sizes[name] for name in names)
        if not fits or sum(given.values()) != total:
            raise ValueError(
                f"{type(method).__name__}.budget must spread {total} units over {names}, at most {sizes}, got {given}"
            )
        planned |= given
    return planned


def upper_bounds(method: Method, budget: Budget, counts: Mapping[str, int], progress: float) -> dict[str, int | None]:
    """The most units that each layer may have after a change of density; None: nothing is known before it."""
    planned = _planned(budget, counts, progress)
    if method.redistribute is not None:
        return {name: max(planned[name], math.ceil((1 + method.redistribute.most) * k)) for name, k in counts.items()}
    if redistributes(method) and method.budget_grows:
        return dict.fromkeys(counts)
    return {**planned}


def wanted(
    now: Mapping[str, int],
    most: Mapping[str, int | None],
    sizes: Mapping[str, int],
    shares: Mapping[str, float],
    *,
    may_return: bool,
) -> dict[str, int | None]:
    """How many candidates for growth each layer may be asked for at a step; layers that need none are left out.

    A change of density comes first, and the rewire is of what it leaves (2.8).

    Args:
        now: units of each layer.
        most: `upper_bounds`, or the units it has where its number does not change; None: give all candidates.
        sizes: n of each layer.
        shares: layers that rewire then -> the part of their units that is replaced.
    """
    found: dict[str, int | None] = {}
    for name, count in now.items():
        bound, absent = most[name], sizes[name] - count
        if bound is None:
            found[name] = None
            continue
        # The rewire is of at most so many units, and may find the room for them that a shrinking layer leaves.
        k = round_half_up(shares[name], max(bound, count)) if name in shares else 0
        k = min(k, absent + max(count - bound, 0))
        if (k and may_return) or min(k, absent) or bound > count:
            found[name] = min(k + max(bound - count, 0), absent)
    return found


def _planned(budget: Budget, now: Mapping[str, int], progress: float) -> dict[str, int]:
    """By the plan's distribution; layers that are not in `now` are frozen, and keep their part of the budget."""
    planned = budget.counts(progress, {**budget.counts(progress), **now})
    return {name: planned[name] for name in now}
