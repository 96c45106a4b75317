"""A plan: which layers become sparse, how dense each stays, in which blocks, and how its pattern is found.

`Plan.decide` turns the wish into one decision a layer; `sparsify` carries the decisions out and `explain` prints them.
"""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from rarefy.cost import LayerCost, measure, measure_dense, tokens_per_layer
from rarefy.distributions import er, erk, exact_counts, uniform
from rarefy.init import PatternInit
from rarefy.methods import Method, RigL
from rarefy.nn import SparseLinear
from rarefy.pattern import as_block, check_density, unit_grid
from rarefy.plan.decision import Decision, Explanation
from rarefy.plan.layers import Layer, find_layers
from rarefy.settings import from_plain, to_plain, unknown

_DISTRIBUTIONS = {"uniform": uniform, "er": er, "erk": erk}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a model is made sparse and trained. Everything a run needs to be made again."""

    density: float
    """Share of the units of the sparse layers that exist, in (0, 1]."""

    method: Method = field(default_factory=RigL)
    """How the pattern is found during training."""

    distribution: Literal["uniform", "er", "erk"] = "uniform"
    """How the density is spread over layers."""

    block: int | tuple[int, int] = 1
    """Unit shape: 1 is unstructured, 4 is 4x4, (4, 1) four outputs of one input."""

    include: tuple[str, ...] = ("*",)
    """Glob patterns over module names: the layers to make sparse."""

    keep_dense: tuple[str, ...] = ()
    """Glob patterns over module names: layers to leave dense; a container's name means all layers in it."""

    overrides: Mapping[str, float] = field(default_factory=dict)
    """Glob pattern -> density of its own, outside the shared budget; the first that matches counts."""

    init: PatternInit = "random"
    """First pattern: random, balanced (equal rows and columns), or magnitude (largest present weights)."""

    rescale: bool = True
    """Scale kept values by 1/sqrt(row density), as fresh models need; False for trained weights."""

    seed: int = 0
    """Of first patterns and random growth."""

    def __post_init__(self) -> None:
        check_density(self.density)
        object.__setattr__(self, "block", self.block if isinstance(self.block, int) else tuple(self.block))
        as_block(self.block)
        for name in ("include", "keep_dense"):
            given = getattr(self, name)
            object.__setattr__(self, name, (given,) if isinstance(given, str) else tuple(given))
        object.__setattr__(self, "overrides", dict(self.overrides))
        for density in self.overrides.values():
            check_density(density)
        if self.distribution not in _DISTRIBUTIONS:
            raise ValueError(f"distribution: {unknown(self.distribution, list(_DISTRIBUTIONS))}")
        if self.init not in ("random", "balanced", "magnitude"):
            raise ValueError(f"init: {unknown(self.init, ['random', 'balanced', 'magnitude'])}")

    # -- as data ------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads back."""
        return to_plain(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str = "plan") -> Plan:
        """Raises ValueError naming the field that is wrong, and the nearest right one."""
        return from_plain(cls, data, where=where)

    def to_yaml(self) -> str:
        """The plan as a YAML file's text."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Plan:
        """Raises ValueError with the file's name when it is not a plan."""
        import yaml

        try:
            data = yaml.safe_load(Path(path).read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"{path} cannot be read as a plan: {error}") from error
        return cls.from_dict(data or {}, where=str(path))

    # -- decisions ----------------------------------------------------------------------------------------------------

    def decide(self, model: nn.Module, sample: Any = None) -> list[Decision]:
        """One decision a layer, in the model's order. The model is not changed.

        Args:
            sample: an example input (a tensor, or a tuple or dict of arguments). With it each distinct shape is
                timed, sparse and dense, forward and backward, on the spot; a layer that sparse would slow down is
                left dense and keeps both times. Of a layer that is dense anyway only the dense time is taken.
        Raises:
            ValueError: no layer to convert, or a filter that matches nothing.
        """
        layers = find_layers(model)
        self._check_filters(layers, model)
        why_dense = {name: self._why_dense(layer) for name, layer in layers.items()}
        tokens = {} if sample is None else tokens_per_layer(model, sample, layers)
        costs: dict[str, LayerCost] = {}
        while (
            True
        ):  # a layer that stays dense leaves the budget, which changes the others' densities, so time those anew
            counts = self._counts({name: layers[name] for name, why in why_dense.items() if not why})
            decisions = []
            for name, layer in layers.items():
                block = layer.module.block if isinstance(layer.module, SparseLinear) else as_block(self.block)
                if name in counts and tokens.get(name):
                    costs[name] = measure(layer.shape, counts[name], block, tokens[name], bias=layer.bias)
                elif name not in costs and tokens.get(name) and min(layer.shape) > 0:
                    costs[name] = LayerCost(None, measure_dense(layer.shape, tokens[name], bias=layer.bias))
                why, units, cost = why_dense[name], counts.get(name), costs.get(name)
                decisions.append(Decision(name, layer.shape, why, block, units, tokens.get(name), cost))
            slower = [d for d in decisions if d.is_sparse and not layers[d.name].adopted and (d.speedup or 1) < 1]
            if not slower:
                return decisions
            for d in slower:
                why_dense[d.name] = (
                    f"sparse would be slower here: {costs[d.name].sparse_ms:.2f} ms against "
                    f"{costs[d.name].dense_ms:.2f} ms dense, at density {d.density:.3g} and {d.tokens} tokens"
                )

    def explain(self, model: nn.Module, sample: Any = None) -> Explanation:
        """What `sparsify(model, plan, sample)` would do: `print` it. Arguments and errors as for `decide`."""
        return Explanation(self.density, self.decide(model, sample), self.method)

    def _check_filters(self, layers: Mapping[str, Layer], model: nn.Module) -> None:
        if not layers:
            raise ValueError(
                "the model has no layer that rarefy could make sparse: no nn.Linear, Conv1D or SparseLinear"
            )
        for option, patterns in (("include", self.include), ("overrides", self.overrides)):
            for pattern in patterns:
                if not fnmatch.filter(layers, pattern):
                    raise ValueError(f"{option}: {pattern!r} matches no layer; {_some(layers)}")
        everything = [*layers, *(name for name, _ in model.named_modules())]
        for pattern in self.keep_dense:
            if not fnmatch.filter(everything, pattern):
                warnings.warn(
                    f"keep_dense: {pattern!r} matches no layer, so it keeps nothing dense; {_some(layers)}",
                    stacklevel=4,
                )

    def _why_dense(self, layer: Layer) -> str:
        """Why a layer is left dense before anything is timed; empty: it is not."""
        for pattern in self.keep_dense:
            if any(fnmatch.fnmatch(name, pattern) for name in _with_ancestors(layer.name)):
                return f"kept dense as asked (keep_dense {pattern!r})"
        if not any(fnmatch.fnmatch(layer.name, pattern) for pattern in self.include):
            return "not included (include " + ", ".join(map(repr, self.include)) + ")"
        if layer.why_dense or layer.adopted:
            return layer.why_dense
        try:
            unit_grid(layer.shape, as_block(self.block))
        except ValueError as error:
            return str(error)
        return "" if min(layer.shape) > 0 else "it has no weights"

    def _counts(self, layers: Mapping[str, Layer]) -> dict[str, int]:
        """Exact units per layer: adopted ones keep theirs, overridden ones have their own, the others share the
        budget (2.1).
        """
        units = {}
        for name, layer in layers.items():
            if not layer.adopted:
                rows, cols = unit_grid(layer.shape, as_block(self.block))
                units[name] = rows * cols
        counts = {
            name: layer.module.num_units for name, layer in layers.items() if isinstance(layer.module, SparseLinear)
        }
        own = {name: density for name in units if (density := self._override(name)) is not None}
        counts |= {name: min(max(1, round(density * units[name])), units[name]) for name, density in own.items()}
        shared = {name: n for name, n in units.items() if name not in own}
        if shared:
            densities = _DISTRIBUTIONS[self.distribution]({name: layers[name].shape for name in shared}, self.density)
            counts |= exact_counts(densities, shared, self.density)
        return counts

    def _override(self, name: str) -> float | None:
        return next((density for pattern, density in self.overrides.items() if fnmatch.fnmatch(name, pattern)), None)


def _with_ancestors(name: str) -> list[str]:
    """a.b.c -> a.b.c, a.b, a."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)]


def _some(layers: Iterable[str]) -> str:
    names = list(layers)
    return "there are: " + ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
