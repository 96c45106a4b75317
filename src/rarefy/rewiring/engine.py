"""The engine: decides when, asks the method for scores, replaces exactly k units, and moves what belongs to them.

Numbers in parentheses are the rewiring rules (docs/rewiring.md).
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rarefy.budget import Budget
from rarefy.growth import Request
from rarefy.growth.signal import GrowScore
from rarefy.methods import Candidates, Choice, LayerView, Method, Needs
from rarefy.methods.candidates import AtRandom, BestInRows, Scored
from rarefy.nn import SparseLayer
from rarefy.ops import memory
from rarefy.pattern import Pattern
from rarefy.rewiring import density, ranks, resizing
from rarefy.rewiring.balance import choose_in_groups
from rarefy.rewiring.carry import (
    BeforeChange,
    Exchanged,
    check_carried,
    check_optimizer,
    exchange,
    warn_about_decay,
)
from rarefy.rewiring.collectors import Collectors
from rarefy.rewiring.compute import choose_compute
from rarefy.rewiring.guards import GUARDS, SKIPPED, Guard, RunView, Watch
from rarefy.rewiring.hooks import StepHooks
from rarefy.rewiring.track import Tracker
from rarefy.selection import all_finite, num_to_replace
from rarefy.settings import unknown

TRIMMED_UNITS = 1 << 15
"""Holes that rewires of smaller layers leave are not worth the millisecond that returning them takes."""


class Rewirer:
    """Rewires the sparse layers of a model while it trains.

    Args:
        layers: name -> layer, in the model's order.
        method: scores and options.
        seed: of random growth.
        plan: the plan it came from, if any; kept for reports.
        budget: how many units the layers have while the density moves; None: it stays.
        left_dense: module name -> why `sparsify` left it dense.
        fused: names of the modules that `sparsify` made run as one call (`rarefy.fuse`).
        balance: layer name -> equal groups of unit rows, each of which keeps its number of units.
        pairs: (up, down) names of layers with hidden neurons between them, of which dead ones are warned of.
        guards: who looks on and warns (`rarefy.rewiring.guards`).
        dense_above: layer name -> the density above which it computes dense (`rarefy.rewiring.choose_compute`).

    Attributes:
        t: optimizer steps applied so far (4.1).
        history: one record a change of a layer (10): step, layer, kind ("rewire"; "density" or "resize" where its size
            changed, 2.5), num_units, changed, churn, exploration, newborn_survival, empty_rows, empty_cols, seconds,
            grown_by.
        skipped: rewires skipped because values or scores were not finite, or a gradient could not be combined (8.3,
            6.4).
    """

    def __init__(
        self,
        layers: Mapping[str, SparseLayer],
        method: Method,
        *,
        seed: int = 0,
        plan: Any = None,
        budget: Budget | None = None,
        left_dense: Mapping[str, str] | None = None,
        fused: Sequence[str] = (),
        balance: Mapping[str, int] | None = None,
        pairs: Sequence[tuple[str, str]] = (),
        guards: Sequence[Guard] = GUARDS,
        dense_above: Mapping[str, float] | None = None,
    ) -> None:
        self.layers = dict(layers)
        self.method = method
        self.seed = seed
        self.plan = plan
        self.budget = budget
        self.left_dense = dict(left_dense or {})
        self.fused = list(fused)
        self.balance = {name: groups for name, groups in (balance or {}).items() if groups > 1}
        self.dense_above = dict(dense_above or {})
        self.t = 0
        self.history: list[dict[str, Any]] = []
        self.skipped = 0
        self.total_steps: int | None = None
        self._optimizer: Optimizer | None = None
        self._hooks: StepHooks | None = None
        self._companions: dict[str, list[SparseLayer]] = {name: [] for name in self.layers}
        self._collectors = Collectors(self.layers)
        self._before: dict[str, BeforeChange] = {}  # of layers whose size changed after this very step
        self._planned_units = {name: layer.num_units for name, layer in self.layers.items()}
        self._settled: set[str] = set()
        self._watch = Watch(guards, pairs)
        self._trackers = {
            name: Tracker(name, layer.pattern) for name, layer in self.layers.items() if layer.has_pattern
        }

    # -- set-up -------------------------------------------------------------------------------------------------------

    def attach(self, optimizer: Optimizer, *, total_steps: int | None = None, hook: bool = True) -> Self:
        """Rewire after the optimizer steps that call for it; nothing else in the training loop changes.

        Args:
            optimizer: holds the layers' values; any whose state is one entry a unit, or scalars.
            total_steps: optimizer steps of the whole run; `end` is 75% of it unless the method says.
            hook: False: nothing is installed, and the loop calls `step()` after each applied `optimizer.step()`.
        Raises:
            ValueError: the optimizer's state cannot be carried, it lacks a layer's values, the end cannot be known, or
                sizes will change under DistributedDataParallel.
        """
        check_optimizer(optimizer)
        held = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for name, layer in self.layers.items():
            if layer.values.requires_grad and id(layer.values) not in held:
                raise ValueError(
                    f"the optimizer does not hold the values of {name}: "
                    "create it after sparsify(), from model.parameters()"
                )
            check_carried(optimizer, name, layer.values)
        if (self.method.rewires or self.resizes) and self.method.end is None and total_steps is None:
            raise ValueError("attach() needs total_steps= to know when to stop rewiring, or the method an end=")
        if self.resizes:
            ranks.refuse_ddp(self.layers)
        warn_about_decay(self.layers, held)
        self.detach()
        self._optimizer, self.total_steps = optimizer, total_steps
        self._hooks = StepHooks(optimizer, self._step) if hook else None
        self._arm()
        known = {name: self._seen(name) for name, layer in self.layers.items() if layer.has_pattern}
        sizes = [(layer.num_units, _num_all(layer)) for layer in self.layers.values()]
        self._watch.attached(self.t, RunView(self.method, self.end, total_steps, sizes), known)
        return self

    @property
    def warnings(self) -> list[dict[str, Any]]:
        """What the guards said, once a guard and layer: step, layer ("" for the whole network), guard, message."""
        return self._watch.warnings

    def observe(self, loss: float | Tensor) -> None:
        """Tell the training loss of a step, before `optimizer.step()`: a spike after a rewire is then warned of.

        Optional; nothing but the warnings depends on it.
        """
        self._watch.observe(self.t, float(loss))

    def _seen(self, name: str) -> tuple[Pattern, Tensor]:
        layer = self.layers[name]
        return layer.pattern, layer.values.detach()

    def detach(self) -> None:
        """Undo `attach`: nothing rewires any more."""
        if self._hooks is not None:
            self._hooks.remove()
        self._hooks, self._optimizer = None, None
        self._collectors.keep({})

    def register_companion(self, model: nn.Module) -> None:
        """Keep a copy of the model (EMA, SWA) in step: layers of the same name rewire with this one's (7.4).

        Raises:
            ValueError: a layer is missing in the copy or has another number of units.
        """
        modules = {name.removeprefix("module."): module for name, module in model.named_modules()}
        found: dict[str, SparseLayer] = {}
        for name, layer in self.layers.items():
            copy = modules.get(name)
            if not isinstance(copy, SparseLayer) or copy.values.shape != layer.values.shape:
                raise ValueError(
                    f"the companion has no sparse layer {name!r} of {layer.num_units} units: copy the sparsified model"
                )
            found[name] = copy
        for name, copy in found.items():
            self._companions[name].append(copy)

    # -- when ---------------------------------------------------------------------------------------------------------

    @property
    def end(self) -> int:
        """Last step after which a layer may rewire (4.3)."""
        if self.method.end is not None:
            return self.method.end
        return int(0.75 * self.total_steps) if self.total_steps is not None else 0

    @property
    def resizes(self) -> bool:
        """Whether layers ever get another number of units, by a moving density or by the method's choice."""
        return self.method.resizes or density.changes(self.method, self.budget)

    def is_due(self, position: int, t: int) -> bool:
        """Whether the layer at this position rewires after step t (4.2)."""
        method = self.method
        offset = position * method.interval // len(self.layers) if method.stagger else 0
        return (
            method.rewires
            and method.begin <= t <= self.end
            and t > 0
            and (t - method.begin - offset) % method.interval == 0
        )

    def due(self, t: int) -> list[str]:
        """Names of the layers that rewire after step t; a frozen or settled layer never does."""
        layers = enumerate(self.layers.items())
        active = [(at, name) for at, (name, layer) in layers if layer.values.requires_grad]
        return [name for at, name in active if self.is_due(at, t) and name not in self._settled]

    def _progress(self, t: int) -> float:
        """How far the rewiring has come at step t, clipped to [0, 1] (4.3)."""
        span = self.end - self.method.begin
        return min(max((t - self.method.begin) / span, 0.0), 1.0) if span else 1.0

    def _fraction(self, t: int) -> float:
        return self.method.replaced(self._progress(t))

    def density_is_due(self, t: int) -> bool:
        """Whether the numbers of units change after step t (2.5)."""
        return density.is_due(self.method, self.budget, t, self.end)

    def _arm(self) -> None:
        """Have the backward passes before step t + 1 keep what the layers due then, or soon, will need (6.2 to 6.4,
        6.7).
        """
        wanted = self._next_growth()
        self._collectors.keep({name: step for name, (step, _) in wanted.items()})
        for name, (step, k) in wanted.items():
            if name not in self._collectors:
                self._collectors.arm(self._request(name, step, k), self.method.signal)

    def _request(self, name: str, step: int, k: int | None) -> Request:
        """What the rewire after a step will want to know; k None: who knows how much of it."""
        layer = self.layers[name]
        return Request(
            name=name,
            step=step,
            seed=self.seed,
            values=layer.values,
            k=_num_all(layer) if k is None else k,
            returns=self.method.may_return,
            calls=None if k is None else self._collectors.calls_per_step.get(name),
            ranks=ranks,
            grow_score=self._grow_score(name, self.t + 1),
            groups=self.balance.get(name, 1),
            row_capacity=self.method.row_candidates(self._view(name, self.t + 1)),
        )

    def _next_growth(self) -> dict[str, tuple[int, int | None]]:
        """Layer -> the step after which it grows and how many it may want, if the method's signal looks at step t + 1
        for it.
        """
        if self._optimizer is None or self.method.needs is not Needs.GRADIENT:
            return {}
        found: dict[str, tuple[int, int | None]] = {}
        for step in range(self.t + 1, self.t + 1 + self.method.signal.lead):
            for name, k in self._wanted(step).items():
                found.setdefault(name, (step, k))
        return found

    def _wanted(self, step: int) -> dict[str, int | None]:
        """For the layers that grow after a step, how many candidates may be asked for at most; None: who knows."""
        now = {name: layer.num_units for name, layer in self.layers.items()}
        most: dict[str, int | None] = {**now}
        if self.budget is not None and self.density_is_due(step):
            moving = {name: now[name] for name in self.budget.shapes if self.layers[name].values.requires_grad}
            most |= density.upper_bounds(self.method, self.budget, moving, self._progress(step))
        sizes = {name: _num_all(layer) for name, layer in self.layers.items()}
        shares = {name: self._fraction(step) for name in self.due(step)}
        return density.wanted(now, most, sizes, shares, may_return=self.method.may_return)

    def _grow_score(self, name: str, step: int) -> GrowScore | None:
        """The method's score of gradients; None: the default, mean |g|, which has a kernel."""
        if type(self.method).grow_score is Method.grow_score:
            return None
        view = self._view(name, step)
        return lambda tile: self.method.grow_score(tile, view)

    # -- stepping -----------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Count one applied optimizer step and rewire what is due; after `attach(hook=True)` that is done already.

        Raises:
            ValueError: `attach` was not called.
        """
        if self._optimizer is None:
            raise ValueError(
                "call rewirer.attach(optimizer, total_steps=...) first: rewiring moves the optimizer's state too"
            )
        if self._hooks is None:
            self._step()

    def _step(self) -> None:
        self.t += 1
        known = len(self.history)
        if self.density_is_due(self.t):
            resizing.change_density(self)
        for name in self.due(self.t):
            self._rewire(name)
        self._before = {}
        if any(record["num_units"] + record["changed"] > TRIMMED_UNITS for record in self.history[known:]):
            memory.trim()  # old indices and state leave holes of a layer's size, which the C library would keep
        if self.method.needs is Needs.GRADIENT:
            self._collectors.count_calls()
        self._collectors.step_applied(self.t)
        self._arm()

    def _view(self, name: str, step: int) -> LayerView:
        layer = self.layers[name]
        gradient, newborn, before = None, None, self._before.get(name)
        if step == self.t:
            gradient = layer.values.grad if before is None else before.gradient
            newborn = None if before is None else before.newborn
        return LayerView(
            name=name,
            pattern=layer.pattern,
            values=layer.values.detach(),
            step=step,
            progress=self._progress(step),
            gradient=gradient,
            newborn=newborn,
            seed=self.seed,
            planned_units=self._planned_units[name],
            last=name == next(reversed(self.layers)),
            pattern_of=self._pattern_of,
        )

    def _pattern_of(self, name: str) -> Pattern | None:
        return self.layers[name].pattern if name in self.layers else None

    # -- one rewire ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _rewire(self, name: str) -> None:
        started = time.perf_counter()
        layer = self.layers[name]
        by_gradient = self.method.needs is Needs.GRADIENT
        k = min(num_to_replace(self._fraction(self.t), layer.num_units, _num_all(layer)), self._room(name))
        if not k or (by_gradient and self._unused(name)):
            return
        assert self._optimizer is not None
        check_carried(self._optimizer, name, layer.values)
        view = self._view(name, self.t)
        groups, candidates = self.balance.get(name, 1), self._candidates(view)
        if self.method.needs is Needs.TOPOLOGY:  # the groups of a convolution are graphs of their own
            groups = math.lcm(groups, layer.groups)
        if groups > 1:
            choice = choose_in_groups(self.method, view, k, candidates, groups)
        else:
            choice = self.method.choose(view, k, candidates)
        finite = choice is not None and all_finite(layer.values.detach())
        if ranks.any_rank(not finite, layer.values.device) or choice is None:
            self._skip(
                name, f"the rewire of {name} at step {self.t} was skipped: its values or scores are not all finite"
            )
            return
        self._check_choice(choice)
        if choice.settled:
            self._settled.add(name)
        grown_by = "random" if self.method.needs is Needs.NOTHING else self.method.needs.value
        self._exchange(view, choice, "rewire", grown_by, started)

    def _room(self, name: str) -> int:
        """Candidates of a rewire: units that exist neither now nor before this step's change of density (6.1, 2.8)."""
        layer, before = self.layers[name], self._before.get(name)
        barred = 0 if before is None or self.method.may_return else before.num_barred
        return _num_all(layer) - layer.num_units - barred

    def _check_choice(self, choice: Choice) -> None:
        if self.method.keeps_counts and choice.drop.numel() != choice.grow.numel():
            raise ValueError(
                f"{type(self.method).__name__}.choose drops {choice.drop.numel()} units and grows "
                f"{choice.grow.numel()}: a rewire keeps their number, unless the method says keeps_counts = False"
            )

    def _unused(self, name: str) -> bool:
        """Whether this step left no gradient to grow by: the layer took no part, or one that cannot be used."""
        collector = self._collectors.get(name)
        if collector is not None and collector.calls > 1 and not collector.combines:
            self._skip(
                name,
                f"{name} was used {collector.calls} times in this step, after once in the one before: "
                f"its rewire at step {self.t} is left out, as what single calls kept cannot be combined any more",
            )
            return True
        unused = collector is None or collector.calls == 0
        return ranks.any_rank(unused, self.layers[name].values.device)

    def _candidates(self, view: LayerView, *, at_random: bool = False) -> Candidates:
        """What may grow now: by what the method's signal kept of the gradient, or at random."""
        layer, method = self.layers[view.name], self.method
        active, before = view.pattern.unit_indices(), self._before.get(view.name)
        if method.needs is not Needs.GRADIENT or at_random:
            key = (self.seed, self.t, view.name)
            barred = None if before is None or method.may_return else before.barred
            return AtRandom(active, _num_all(layer), key, method.may_return, barred)
        index = layer.index if before is None else before.index
        collector, score = self._collectors[view.name], self._grow_score(view.name, self.t)
        found = collector.found(index, score)
        if found.rows is not None:
            return BestInRows(active, found.rows, view.pattern.num_unit_cols, method.may_return)
        scored = Scored(active, found.units, found.scores, found.returning)
        return scored if before is None else before.candidates(scored)

    def _exchange(self, view: LayerView, choice: Choice, kind: str, grown_by: str, started: float) -> Exchanged:
        """Swap the chosen units, see that ranks agree, and write the record."""
        name, layer, num_before = view.name, self.layers[view.name], view.pattern.num_units
        changed = max(choice.drop.numel(), choice.grow.numel())
        grow = choice.grow.to(choice.drop.device)
        exchanged = exchange(layer, self._companions[name], self._optimizer, view.pattern, choice.drop, grow)
        pattern, newborn, _ = exchanged
        ranks.check_agreement(name, layer.values, pattern.digest() if ranks.world_size() > 1 else "")
        if kind == "rewire":
            changed = newborn.numel()
        if layer.num_units != num_before:
            self._after_resize(name)
        self.history.append(
            {
                "step": self.t,
                "layer": name,
                "kind": kind,
                "num_units": layer.num_units,
                "changed": changed,
                "churn": changed / max(num_before, 1),
                **self._tracker(name).rewired(pattern, newborn, layer.t_crow, keep=kind != "rewire"),
                "seconds": time.perf_counter() - started,
                "grown_by": grown_by,
            }
        )
        if kind == "rewire":
            survival = self.history[-1]["newborn_survival"]
            self._watch.rewired(self.t, name, self.method, self._seen, born=newborn.numel(), survival=survival)
        return exchanged

    def _after_resize(self, name: str) -> None:
        """What follows a change of a layer's number of units: it computes the faster way, and who watches its units for
        a later step begins anew.
        """
        choose_compute(self.layers[name], self.dense_above.get(name))
        if name in self._collectors and self._collectors[name].request.step > self.t:
            self._collectors.forget(name)

    # -- other sizes --------------------------------------------------------------------------------------------------

    def resize(self, num_units: Mapping[str, int]) -> None:
        """Give layers other numbers of units between two steps: the lowest drop scores go, random units come (2.7).

        Raises:
            ValueError: not attached, a layer that is not there, or a number of units that it cannot have.
        """
        if self._optimizer is None:
            raise ValueError("call rewirer.attach(optimizer, ...) first: resizing moves the optimizer's state too")
        for name, k in num_units.items():
            if name not in self.layers:
                raise ValueError(f"resize: {unknown(name, list(self.layers))}")
            if not 1 <= k <= _num_all(self.layers[name]):
                raise ValueError(f"resize: {name} can have 1 to {_num_all(self.layers[name])} units, not {k}")
        ranks.refuse_ddp(self.layers)
        resizing.resize(self, num_units)
        self._before = {}
        self._arm()

    def _tracker(self, name: str) -> Tracker:
        if name not in self._trackers:
            self._trackers[name] = Tracker(name, self.layers[name].pattern)
        return self._trackers[name]

    def _skip(self, name: str, message: str) -> None:
        """Count a rewire that did not happen; warn of the first."""
        self.skipped += 1
        self._watch.tell(self.t, name, SKIPPED, message, warn=False)
        if self.skipped == 1:
            warnings.warn(message + "; nothing was changed, and later skips are only counted", stacklevel=4)

    # -- resume -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings and tensors: with the model's and the optimizer's state, all that a bitwise resume needs
        (9.1).
        """
        return {
            "t": self.t,
            "seed": self.seed,
            "total_steps": self.total_steps,
            "skipped": self.skipped,
            "method": type(self.method).__name__.lower(),
            "layers": list(self.layers),
            "num_units": {name: layer.num_units for name, layer in self.layers.items()},
            "collectors": self._collectors.state_dict(),
            "planned_units": dict(self._planned_units),
            "settled": sorted(self._settled),
            "guards": self._watch.state_dict(),
            "dense_above": dict(self.dense_above),
            "trackers": {n: self._tracker(n).state_dict() for n, layer in self.layers.items() if layer.has_pattern},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; load model and optimizer too, after it, if layers change their size (9.4).

        Raises:
            ValueError: the state is of other layers, another method or another length of run. Nothing was changed.
        """
        mine = {"method": type(self.method).__name__.lower(), "layers": list(self.layers)}
        if self.total_steps is not None and state["total_steps"] is not None:
            mine["total_steps"] = self.total_steps
        for key, value in mine.items():
            if state[key] != value:
                raise ValueError(f"the saved rewiring state has {key} {state[key]!r}, this run has {value!r}")
        known = {n: self._tracker(n) for n, layer in self.layers.items() if layer.has_pattern}
        for name, tracked in state["trackers"].items():
            if name in known:
                known[name].check(tracked)
        if self.resizes:
            self._make_room(state["num_units"])
        for name, tracked in state["trackers"].items():
            if name in known:
                known[name].load_state_dict(tracked)
        self.t, self.seed, self.skipped = int(state["t"]), int(state["seed"]), int(state["skipped"])
        if self.total_steps is None:
            self.total_steps = state["total_steps"]
        self._watch.load_state_dict(state["guards"])
        # A calibration of today must not change how a run of yesterday computes.
        self.dense_above = {name: float(above) for name, above in state["dense_above"].items()}
        for name, above in self.dense_above.items():
            choose_compute(self.layers[name], above)
        self._planned_units |= {name: int(units) for name, units in state["planned_units"].items()}
        self._settled = set(state["settled"])
        self._collectors.keep({})
        self._collectors.load_calls(state["collectors"])
        self._arm()
        self._collectors.load_held(state["collectors"])

    def _make_room(self, num_units: Mapping[str, int]) -> None:
        """The sizes that layers had when they were saved, for a model's state that is loaded next (9.4)."""
        for name, k in num_units.items():
            if name in self.layers:
                for layer in (self.layers[name], *self._companions[name]):
                    layer.make_room(int(k))


def _num_all(layer: SparseLayer) -> int:
    """n, the units that the layer's matrix has."""
    return (layer.out_features // layer.block[0]) * (layer.in_features // layer.block[1])
