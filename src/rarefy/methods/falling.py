"""What methods share whose density falls by a cubic, with one threshold for all layers."""

from __future__ import annotations

from collections.abc import Sequence

from rarefy.methods.base import LayerView, Method
from rarefy.methods.redistribution import by_global_score
from rarefy.schedules import Constant, Cubic, Schedule


def falling(start: float, asked: float | Schedule, method: str) -> Schedule:
    """A cubic from `start` to a number (Zhu & Gupta 2017); a schedule as it is.

    Raises:
        ValueError: it would rise.
    """
    if isinstance(asked, Schedule):
        return asked
    if not asked <= start <= 1:
        raise ValueError(
            f"{method}: start must lie between the plan's density and 1, got start={start} for density {asked}"
        )
    return Constant(asked) if start == asked else Cubic(start, asked)


def kept_by_score(method: Method, views: Sequence[LayerView], total: int) -> dict[str, int]:
    """Units that each layer has among the `total` of highest drop score over all of them."""
    counts = by_global_score([method.drop_score(view) for view in views], total)
    return {view.name: count for view, count in zip(views, counts, strict=True)}
