"""The operation that gives layers other numbers of units, apart from rewires (rewiring rules 2.5 to 2.8)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from rarefy.methods import Choice, LayerView, Needs
from rarefy.rewiring import density, ranks
from rarefy.rewiring.carry import BeforeChange, check_carried
from rarefy.selection import all_finite, lowest

if TYPE_CHECKING:
    from rarefy.rewiring.engine import Rewirer


@torch.no_grad()
def change_density(engine: Rewirer) -> None:
    """All layers at once to the figures that the schedules and the method say (2.5, 2.6); frozen ones stay."""
    budget = engine.budget
    assert budget is not None
    views = {name: engine._view(name, engine.t) for name in budget.shapes if engine.layers[name].values.requires_grad}
    if _finite(engine, views):
        ranks.refuse_ddp(engine.layers)
        num_units = density.targets(engine.method, budget, views, engine._progress(engine.t))
        _resize(engine, {n: view for n, view in views.items() if num_units[n] != view.pattern.num_units}, num_units)


@torch.no_grad()
def resize(engine: Rewirer, num_units: Mapping[str, int]) -> None:
    """Exactly so many units in each layer, or, where a value or score is not finite, no change of any (8.3)."""
    views = {n: engine._view(n, engine.t) for n, k in num_units.items() if k != engine.layers[n].num_units}
    if _finite(engine, views):
        _resize(engine, views, num_units, kind="resize")


def _resize(
    engine: Rewirer, views: Mapping[str, LayerView], num_units: Mapping[str, int], kind: str = "density"
) -> None:
    """Of the layers in `views`.

    Args:
        kind: for the history; "density" may grow by the gradient of this step, where the method does.
    """
    optimizer = engine._optimizer
    assert optimizer is not None
    for name in views:
        check_carried(optimizer, name, engine.layers[name].values)
    for name, view in views.items():
        started, layer = time.perf_counter(), engine.layers[name]
        more = num_units[name] - layer.num_units
        drop = lowest(engine.method.drop_score(view), max(-more, 0))
        grow, grown_by = drop[:0], "nothing"
        if more > 0:
            at_random = engine.method.needs is not Needs.GRADIENT or kind != "density" or engine._unused(name)
            best = engine._candidates(view, at_random=at_random).best(more, drop)
            if ranks.any_rank(best is None or best.numel() < more, layer.values.device):
                # The figure must be met (2.5), if not by a signal.
                at_random, best = True, engine._candidates(view, at_random=True).best(more, drop)
            assert best is not None
            grow, grown_by = best, "random" if at_random else "gradient"
        gradient = layer.values.grad
        exchanged = engine._exchange(view, Choice(drop, grow), kind, grown_by, started)
        engine._before[name] = BeforeChange(view.pattern, gradient, exchanged)


def _finite(engine: Rewirer, views: Mapping[str, LayerView]) -> bool:
    """Whether values and drop scores allow a change on every rank; counts a skip if not."""
    if not views:
        return True
    fine = all(
        all_finite(view.values) and not bool(engine.method.drop_score(view).isnan().any()) for view in views.values()
    )
    if not ranks.any_rank(not fine, next(iter(views.values())).values.device):
        return True
    engine._skip("", f"the change of sizes at step {engine.t} was skipped: its values or scores are not all finite")
    return False
