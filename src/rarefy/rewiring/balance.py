"""Groups of rows that keep their number of units (`Plan.balance`).

Every rewire of a layer is then a rewire of each group alone, by the method's own rule: k is split over the groups by
their units, and each drops and grows its part.
"""

from __future__ import annotations

import dataclasses

import torch

from rarefy.groups import groups_of, split_over
from rarefy.methods import Candidates, Choice, LayerView, Method


def choose_in_groups(method: Method, view: LayerView, k: int, candidates: Candidates, groups: int) -> Choice | None:
    """The method's choice in each group of rows alone; None if it has none in any of them."""
    parts = list(groups_of(view.pattern, groups))
    drop, grow = [], []
    for group, mine in zip(parts, split_over(k, parts), strict=True):
        gradient = None if view.gradient is None else view.gradient[group.positions]
        seen = dataclasses.replace(view, pattern=group.pattern, values=view.values[group.positions], gradient=gradient)
        choice = method.choose(seen, mine, candidates.part(group.units.start, group.units.stop))
        if choice is None:
            return None
        drop.append(choice.drop + group.positions.start)
        grow.append(choice.grow + group.units.start)
    return Choice(torch.cat(drop), torch.cat(grow))
