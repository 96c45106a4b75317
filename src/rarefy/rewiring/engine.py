"""The engine: decides when, asks the method for scores, replaces exactly k units, and moves what belongs to them.

Numbers in parentheses are the rewiring rules (docs/rewiring.md).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rarefy.methods import LayerView, Method, Needs
from rarefy.nn import SparseLinear
from rarefy.ops import sink as sinks
from rarefy.pattern import Pattern
from rarefy.rewiring import ranks
from rarefy.rewiring.carry import check_carried, check_optimizer, move_units, per_unit_tensors
from rarefy.rewiring.select import contains, highest, lowest, num_to_replace, random_absent
from rarefy.rewiring.track import Tracker
from rarefy.sampling import keyed_generator


class Rewirer:
    """Rewires the sparse layers of a model while it trains.

    Args:
        layers: name -> layer, in the model's order.
        method: scores and options.
        seed: of random growth.
        plan: the plan it came from, if any; kept for reports.
        left_dense: module name -> why `sparsify` left it dense.
        fused: names of the modules that `sparsify` made run as one call (`rarefy.fuse`).
        dense_above: layer name -> the density above which it computes dense (`rarefy.rewiring.choose_compute`).

    Attributes:
        t: optimizer steps applied so far (4.1).
        history: one record a rewire (10): step, layer, num_units, changed, churn, exploration, newborn_survival,
            empty_rows, empty_cols, seconds, grown_by.
        skipped: rewires skipped because values or scores were not finite, or a gradient could not be combined (8.3,
            6.4).
    """

    def __init__(
        self,
        layers: Mapping[str, SparseLinear],
        method: Method,
        *,
        seed: int = 0,
        plan: Any = None,
        left_dense: Mapping[str, str] | None = None,
        fused: Sequence[str] = (),
        dense_above: Mapping[str, float] | None = None,
    ) -> None:
        self.layers = dict(layers)
        self.method = method
        self.seed = seed
        self.plan = plan
        self.left_dense = dict(left_dense or {})
        self.fused = list(fused)
        self.dense_above = dict(dense_above or {})
        self.t = 0
        self.history: list[dict[str, Any]] = []
        self.skipped = 0
        self.total_steps: int | None = None
        self._optimizer: Optimizer | None = None
        self._hooks: list[Any] = []
        self._steps_inside = 0
        self._companions: dict[str, list[SparseLinear]] = {name: [] for name in self.layers}
        self._collectors: dict[str, sinks.BestUnits | sinks.DenseGradient] = {}
        self._calls_per_step: dict[str, int] = {}
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
            ValueError: the optimizer's state cannot be carried, it lacks a layer's values, or the end cannot be known.
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
        if self.method.rewires and self.method.end is None and total_steps is None:
            raise ValueError("attach() needs total_steps= to know when to stop rewiring, or the method an end=")
        self._warn_about_decay(held)
        self.detach()
        self._optimizer, self.total_steps = optimizer, total_steps
        if hook:
            # On the optimizer, whose copies leave hooks behind; modules' copies would take the engine along.
            before, after = optimizer.register_step_pre_hook, optimizer.register_step_post_hook
            eager: Any = torch.compiler.disable  # a compiled optimizer step must not trace the engine
            self._hooks = [before(eager(self._before_step)), after(eager(self._after_step))]
        self._arm()
        return self

    def detach(self) -> None:
        """Undo `attach`: nothing rewires any more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._optimizer = [], None
        self._disarm()

    def _warn_about_decay(self, held: Mapping[int, dict[str, Any]]) -> None:
        decays = {bool(group.get("weight_decay")) for group in held.values()}
        spared = [
            name
            for name, layer in self.layers.items()
            if id(layer.values) in held and not held[id(layer.values)].get("weight_decay")
        ]
        if decays == {True, False} and spared:
            warnings.warn(
                f"weight decay is on for some parameters, but off for the values of {len(spared)} sparse layers "
                f"(first: {spared[0]}): values are one-dimensional, which 'decay if dim >= 2' recipes skip. "
                "rarefy.param_groups(model, lr=..., weight_decay=...) gives the usual groups",
                stacklevel=3,
            )

    def register_companion(self, model: nn.Module) -> None:
        """Keep a copy of the model (EMA, SWA) in step: layers of the same name rewire with this one's (7.4).

        Raises:
            ValueError: a layer is missing in the copy or has another number of units.
        """
        modules = {name.removeprefix("module."): module for name, module in model.named_modules()}
        found: dict[str, SparseLinear] = {}
        for name, layer in self.layers.items():
            copy = modules.get(name)
            if not isinstance(copy, SparseLinear) or copy.values.shape != layer.values.shape:
                raise ValueError(
                    f"the companion has no SparseLinear {name!r} of {layer.num_units} units: copy the sparsified model"
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
        """Names of the layers that rewire after step t; a frozen layer never does."""
        layers = enumerate(self.layers.items())
        return [name for at, (name, layer) in layers if self.is_due(at, t) and layer.values.requires_grad]

    def _k(self, layer: SparseLinear, t: int) -> int:
        span = self.end - self.method.begin
        progress = (t - self.method.begin) / span if span else 1.0
        return num_to_replace(self.method.fraction(progress), layer.num_units, _num_all(layer))

    def _arm(self) -> None:
        """Have the backward passes before step t + 1 keep what the layers due then will need (6.2 to 6.4, 6.7)."""
        self._disarm()
        if self._optimizer is None or self.method.needs is not Needs.GRADIENT:
            return
        for name in self.due(self.t + 1):
            layer = self.layers[name]
            k = self._k(layer, self.t + 1)
            if not k:
                continue
            alone = ranks.world_size() == 1 and self._calls_per_step.get(name) == 1
            if alone:
                score, active = self._score(name, layer), self.method.may_return
                collector = sinks.BestUnits(layer.values, k, score, active=active)
            else:
                collector = sinks.DenseGradient(layer.values)
            self._collectors[name] = collector
            sinks.arm(layer.sink, collector)

    def _disarm(self) -> None:
        for name in self._collectors:
            sinks.disarm(self.layers[name].sink)
        self._collectors = {}

    def _score(self, name: str, layer: SparseLinear) -> sinks.Score | None:
        """The method's score on tiles of the dense gradient; None: the default, mean |g|, which has a kernel."""
        if type(self.method).grow_score is Method.grow_score:
            return None
        view = self._view(name, self.t + 1)
        return lambda gradient: self._scores_of(gradient, layer, view)

    def _scores_of(self, gradient: Tensor, layer: SparseLinear, view: LayerView) -> Tensor:
        """(unit rows, unit columns) scores of whole unit rows of a dense gradient (rows, I)."""
        (b_r, b_c), (rows, cols) = layer.block, gradient.shape
        tile = gradient.reshape(rows // b_r, b_r, cols // b_c, b_c).transpose(1, 2).reshape(-1, b_r, b_c)
        scores = self.method.grow_score(tile.flatten() if layer.block == (1, 1) else tile, view)
        return scores.to(torch.float32).view(rows // b_r, cols // b_c)

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
        if not self._hooks:
            self._step()

    def _before_step(self, optimizer: Optimizer, *_: object) -> None:
        """The pre-step hook. Torch runs the hooks for every class on the way whose `step` it wrapped, so twice where a
        subclass calls `super().step()`: only the outermost is a step (4.1).
        """
        wrapped = sum(getattr(vars(base).get("step"), "hooked", False) for base in type(optimizer).__mro__)
        self._steps_inside = self._steps_inside + 1 if wrapped > 1 else 1  # a step that raised must not count for ever

    def _after_step(self, optimizer: Optimizer, *_: object) -> None:
        """The post-step hook, which fused optimizers run even for a step that AMP's scaler had them skip (4.1)."""
        self._steps_inside -= 1
        if self._steps_inside:
            return
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None or not bool(found_inf):
            self._step()

    def _step(self) -> None:
        self.t += 1
        for name in self.due(self.t):
            self._rewire(name)
        if self.method.needs is Needs.GRADIENT:
            for name, layer in self.layers.items():
                calls = sinks.take_calls(layer.sink)
                if calls:
                    self._calls_per_step[name] = calls
        self._arm()

    def _view(self, name: str, step: int) -> LayerView:
        layer = self.layers[name]
        return LayerView(name=name, pattern=layer.pattern, values=layer.values.detach(), step=step)

    # -- one rewire ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _rewire(self, name: str) -> None:
        started = time.perf_counter()
        layer = self.layers[name]
        k = self._k(layer, self.t)
        by_gradient = self.method.needs is Needs.GRADIENT
        if not k or (by_gradient and self._unused(name)):
            return
        assert self._optimizer is not None
        check_carried(self._optimizer, name, layer.values)
        view = self._view(name, self.t)
        active = view.pattern.unit_indices()
        score = self.method.drop_score(view)
        if tuple(score.shape) != (layer.num_units,):
            raise ValueError(
                f"{type(self.method).__name__}.drop_score must give one score a unit, ({layer.num_units},), "
                f"got {tuple(score.shape)}"
            )
        drop = lowest(score.masked_fill(score.isnan(), torch.inf), k)  # refused below, all ranks together
        grown = (
            self._grow_by_gradient(view, active, drop, k)
            if by_gradient
            else self._grow_at_random(name, active, drop, k)
        )
        finite = grown is not None and bool(torch.isfinite(layer.values).all()) and not bool(score.isnan().any())
        if ranks.any_rank(not finite, layer.values.device) or grown is None:
            self._skip(
                f"the rewire of {name} at step {self.t} was skipped: its values or growth scores are not all finite"
            )
            return
        newborn = self._replace(name, active, drop, grown.to(active.device))
        pattern = layer.pattern
        ranks.check_agreement(name, layer.values, pattern.digest() if ranks.world_size() > 1 else "")
        self.history.append(
            {
                "step": self.t,
                "layer": name,
                "num_units": layer.num_units,
                "changed": newborn.numel(),
                "churn": newborn.numel() / layer.num_units,
                **self._tracker(name).rewired(pattern, newborn),
                "seconds": time.perf_counter() - started,
                "grown_by": "gradient" if by_gradient else "random",
            }
        )

    def _unused(self, name: str) -> bool:
        """Whether this step left no gradient to grow by: the layer took no part, or one that cannot be used."""
        collector = self._collectors.get(name)
        if isinstance(collector, sinks.BestUnits) and collector.calls > 1:
            self._skip(
                f"{name} was used {collector.calls} times in this step, after once in the one before: "
                f"its rewire at step {self.t} is left out, as what single calls kept cannot be combined any more"
            )
            return True
        unused = collector is None or collector.calls == 0
        return ranks.any_rank(unused, self.layers[name].values.device)

    def _grow_at_random(self, name: str, active: Tensor, drop: Tensor, k: int) -> Tensor:
        """Uniform over the candidates, keyed by seed, step and name (6.1, 6.5)."""
        present = active
        if self.method.may_return:
            stays = torch.ones(active.numel(), dtype=torch.bool, device=active.device)
            stays[drop] = False
            present = active[stays]
        return random_absent(present, _num_all(self.layers[name]), k, keyed_generator(self.seed, self.t, name))

    def _grow_by_gradient(self, view: LayerView, active: Tensor, drop: Tensor, k: int) -> Tensor | None:
        """The k candidates of highest score (6.2); None when a score is not finite (8.3)."""
        layer, collector = self.layers[view.name], self._collectors[view.name]
        if isinstance(collector, sinks.BestUnits):
            units, scores = collector.units, collector.scores
            returning = (
                self.method.grow_score(collector.active_gradient, view)[drop] if self.method.may_return else None
            )
        else:
            assert collector.gradient is not None
            gradient = ranks.mean_over_ranks(collector.gradient)  # a sum over micro-batches orders as their mean does
            everywhere = self._scores_of(gradient, layer, view).flatten()
            absent = torch.ones_like(everywhere, dtype=torch.bool)
            absent[active] = False
            units = absent.nonzero().flatten()
            scores, returning = everywhere[units], everywhere[active[drop]]
        if self.method.may_return and returning is not None:
            units, scores = torch.cat([units, active[drop]]), torch.cat([scores, returning.to(scores)])
        return highest(scores, units, k) if bool(torch.isfinite(scores).all()) else None

    def _replace(self, name: str, active: Tensor, drop: Tensor, grown: Tensor) -> Tensor:
        """Swap the units at positions `drop` for units `grown`, both ascending; returns those that are new, ascending
        (7).

        A grown unit that was just dropped never left: it stays a survivor.
        """
        layer = self.layers[name]
        leaving, newborn = active[drop], grown
        if self.method.may_return:
            newborn, drop = grown[~contains(leaving, grown)], drop[~contains(grown, leaving)]
        stays = torch.ones(active.numel(), dtype=torch.bool, device=active.device)
        stays[drop] = False
        survivors = active[stays]
        # Two ascending runs merge: a newborn's place is its rank among newborns plus the survivors before it.
        born_at = torch.searchsorted(survivors, newborn) + torch.arange(newborn.numel(), device=active.device)
        survives = torch.ones_like(stays)
        survives[born_at] = False
        units = torch.empty_like(active)
        units[born_at], units[survives] = newborn, survivors
        pattern = Pattern.from_sorted_units(units, (layer.out_features, layer.in_features), layer.block)
        for owner in (layer, *self._companions[name]):
            for tensor in per_unit_tensors(self._optimizer if owner is layer else None, owner.values):
                move_units(tensor, stays, survives)
            owner.set_pattern(pattern)
        layer.values.grad = None
        return newborn

    def _tracker(self, name: str) -> Tracker:
        if name not in self._trackers:
            self._trackers[name] = Tracker(name, self.layers[name].pattern)
        return self._trackers[name]

    def _skip(self, message: str) -> None:
        """Count a rewire that did not happen; warn of the first."""
        self.skipped += 1
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
            "calls_per_step": dict(self._calls_per_step),
            "dense_above": dict(self.dense_above),
            "compute": {name: layer.compute for name, layer in self.layers.items()},
            "trackers": {n: self._tracker(n).state_dict() for n, layer in self.layers.items() if layer.has_pattern},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; load model and optimizer too.

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
        for name, tracked in state["trackers"].items():
            if name in known:
                known[name].load_state_dict(tracked)
        self.t, self.seed, self.skipped = int(state["t"]), int(state["seed"]), int(state["skipped"])
        if self.total_steps is None:
            self.total_steps = state["total_steps"]
        # A calibration of today must not change how a run of yesterday computes.
        self.dense_above = {name: float(density) for name, density in state.get("dense_above", {}).items()}
        for name, compute in state.get("compute", {}).items():
            self.layers[name].set_compute(compute)
        self._calls_per_step = {name: int(calls) for name, calls in state["calls_per_step"].items()}
        self._arm()


def _num_all(layer: SparseLinear) -> int:
    """n, the units that the layer's matrix has."""
    return (layer.out_features // layer.block[0]) * (layer.in_features // layer.block[1])
