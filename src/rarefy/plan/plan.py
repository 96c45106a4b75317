"""A plan: which layers become sparse, how dense each stays, in which blocks, and how its pattern is found.

`Plan.decide` turns the wish into one decision a layer; `sparsify` carries the decisions out and `explain` prints them.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import glob
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from rarefy.cost import CostModel, LayerCost, cost_model, load_model, measure, predict, tokens_per_layer
from rarefy.distributions import er, erk, exact_counts, uniform
from rarefy.init import PatternInit
from rarefy.methods import Method, RigL
from rarefy.nn import SparseLinear
from rarefy.pattern import as_block, check_density, unit_grid
from rarefy.plan.compute import check_dense_above
from rarefy.plan.decision import Decision
from rarefy.plan.explanation import Explanation
from rarefy.plan.filters import check_filters, why_left_dense
from rarefy.plan.layers import Layer, find_layers
from rarefy.plan.structure import choose_block
from rarefy.settings import from_plain, to_plain, unknown

ASSUMED_TOKENS = 2048
"""Rows of input that times are for where no sample says how many."""

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

    block: int | tuple[int, int] | Literal["auto"] = 1
    """Unit shape: 1 is unstructured, 4 is 4x4, (4, 1) four outputs of one input; "auto": each layer's by time."""

    include: tuple[str, ...] = ("*",)
    """Glob patterns over module names: the layers to make sparse."""

    keep_dense: tuple[str, ...] = ()
    """Glob patterns over module names: layers to leave dense; a container's name means all layers in it."""

    overrides: Mapping[str, float] = field(default_factory=dict)
    """Glob pattern -> density of its own, outside the shared budget; the first that matches counts."""

    block_overrides: Mapping[str, int | tuple[int, int]] = field(default_factory=dict)
    """Glob pattern -> unit shape of its own; the first that matches counts."""

    init: PatternInit = "random"
    """First pattern: random, balanced (equal rows and columns), or magnitude (largest present weights)."""

    rescale: bool = True
    """Scale kept values by 1/sqrt(row density), as fresh models need; False for trained weights."""

    dense_above: float | Literal["auto"] | None = None
    """Layers denser than this multiply by torch's dense matmul, their storage unchanged; "auto": denser than this
    machine's calibrated break-even; None: none do."""

    seed: int = 0
    """Of first patterns and random growth."""

    def __post_init__(self) -> None:
        check_density(self.density)
        check_dense_above(self.dense_above)
        object.__setattr__(self, "block", _plain_block(self.block))
        own = {pattern: _plain_block(block) for pattern, block in self.block_overrides.items()}
        object.__setattr__(self, "block_overrides", own)
        if isinstance(self.block, str) and self.block != "auto":
            raise ValueError(f'block must be a positive int, a pair of them, or "auto", got {self.block!r}')
        for block in (*([] if self.block == "auto" else [self.block]), *own.values()):
            as_block(block)  # type: ignore[arg-type]
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

    def decide(
        self,
        model: nn.Module,
        sample: Any = None,
        *,
        measure: bool | None = None,
        precisions: bool = False,
        costs: CostModel | None = None,
    ) -> list[Decision]:
        """One decision a layer, in the model's order. The model is not changed.

        With times, a layer that sparse would slow down is left dense and keeps both times. Of a layer that is dense
        anyway only the dense time is taken.

        Args:
            sample: an example input (a tensor, or a tuple or dict of arguments), which says how many tokens each layer
                sees. Without one, times are for `ASSUMED_TOKENS`.
            measure: True: each distinct shape is timed on the spot, sparse and dense, forward and backward. False: the
                cost model predicts the times. None: measured if there is a sample; else predicted where the plan needs
                times (`block="auto"`), and not asked for where it does not.
            precisions: also measure the layers in the other precisions (the model predicts them anyway).
            costs: the cost model; None: this machine's. It is calibrated if there is none yet, in under a minute.
        Raises:
            ValueError: no layer to convert, or a filter that matches nothing.

        Where the structure is open the model chooses it, measured or not: timing all six for every layer would take
        longer than the calibration.
        """
        layers = find_layers(model)
        globs = {"include": self.include, "overrides": self.overrides, "block_overrides": self.block_overrides}
        check_filters(globs, self.keep_dense, layers, model)
        why_dense = {
            name: why_left_dense(layer, self.include, self.keep_dense, self._asked_block(name) or (1, 1))
            for name, layer in layers.items()
        }
        measured = sample is not None if measure is None else measure
        open_ones = [n for n, why in why_dense.items() if not (why or layers[n].adopted or self._asked_block(n))]
        timed = measured or measure is not None or bool(open_ones)
        if costs is None and (open_ones or (timed and not measured)):
            costs = _machines_model()
        tokens = dict.fromkeys(layers, ASSUMED_TOKENS) if timed else {}
        if sample is not None:
            tokens = tokens_per_layer(model, sample, layers)

        def cost_of(layer: Layer, units: int | None, block: tuple[int, int]) -> LayerCost | None:
            if not tokens.get(layer.name) or min(layer.shape) < 1:
                return None
            if measured:
                return _measured(layer, units, block, tokens[layer.name], precisions)
            assert costs is not None
            return predict(costs, layer.shape, units, block, tokens[layer.name])

        found: dict[str, LayerCost | None] = {}
        # A layer that stays dense leaves the budget, which changes the others' densities: those are asked for anew.
        while True:
            sparse = {name: layers[name] for name, why in why_dense.items() if not why}
            blocks = self._blocks(layers, sparse, tokens, costs)
            counts = self._counts(sparse, blocks)
            decisions = []
            for name, layer in layers.items():
                units, block = counts.get(name), blocks[name]
                if name in counts or name not in found:
                    found[name] = cost_of(layer, units, block) if timed else None
                seen = tokens.get(name)
                decisions.append(Decision(name, layer.shape, why_dense[name], block, units, seen, found[name]))
            slower = [d for d in decisions if d.is_sparse and not layers[d.name].adopted and (d.speedup or 1) < 1]
            if not slower:
                return decisions
            for d in slower:
                assert d.cost is not None
                why_dense[d.name] = (
                    f"sparse would be slower here: {d.cost.sparse_ms:.2f} ms against {d.cost.dense_ms:.2f} ms dense"
                    f"{', predicted' if d.cost.source == 'predicted' else ''}, at density {d.density:.3g} and "
                    f"{d.tokens} tokens"
                )

    def explain(
        self,
        model: nn.Module,
        sample: Any = None,
        *,
        measure: bool | None = None,
        precisions: bool = True,
        costs: CostModel | None = None,
    ) -> Explanation:
        """What `sparsify(model, plan, sample)` would do: `print` it. Arguments and errors as for `decide`."""
        decisions = self.decide(model, sample, measure=measure, precisions=precisions, costs=costs)
        assumed = ASSUMED_TOKENS if sample is None and any(d.cost for d in decisions) else None
        return Explanation(self.density, decisions, self.method, assumed)

    def settled(self, layers: Sequence[Mapping[str, Any]]) -> Plan:
        """The plan with what was decided: what was found slower sparse is dense for good, structures are fixed.

        Args:
            layers: rows of an `Explanation`.
        """
        dense = [row["name"] for row in layers if row["kind"] == "dense"]
        changes: dict[str, Any] = {"keep_dense": tuple(dict.fromkeys((*self.keep_dense, *dense)))}
        if self.block == "auto":
            own = {glob.escape(row["name"]): tuple(row["block"]) for row in layers if row["kind"] == "sparse"}
            changes |= {"block": 1, "block_overrides": {**own, **self.block_overrides}}
        return dataclasses.replace(self, **changes)

    def _blocks(
        self,
        layers: Mapping[str, Layer],
        sparse: Mapping[str, Layer],
        tokens: Mapping[str, int],
        costs: CostModel | None,
    ) -> dict[str, tuple[int, int]]:
        """Each layer's unit shape: its own if it is sparse already, else as asked for, else the fastest."""
        fixed = {
            name: layer.module.block if isinstance(layer.module, SparseLinear) else self._asked_block(name)
            for name, layer in layers.items()
        }
        blocks = {name: block or (1, 1) for name, block in fixed.items()}
        undecided = [name for name in sparse if fixed[name] is None]
        if undecided:
            assert costs is not None
            densities = self._densities(sparse)
            for name in undecided:
                seen = tokens.get(name) or ASSUMED_TOKENS
                blocks[name] = choose_block(costs, layers[name].shape, densities[name], seen)
        return blocks

    def _asked_block(self, name: str) -> tuple[int, int] | None:
        """The unit shape that the plan names for a layer; None: it leaves it open."""
        for pattern, block in self.block_overrides.items():
            if fnmatch.fnmatch(name, pattern):
                return as_block(block)
        return None if isinstance(self.block, str) else as_block(self.block)

    def _densities(self, layers: Mapping[str, Layer]) -> dict[str, float]:
        """Real density per layer that is not sparse yet: its own if overridden, else its part of the shared budget."""
        fresh = {name: layer.shape for name, layer in layers.items() if not layer.adopted}
        own = {name: density for name in fresh if (density := self._override(name)) is not None}
        shared = {name: shape for name, shape in fresh.items() if name not in own}
        return {**own, **(_DISTRIBUTIONS[self.distribution](shared, self.density) if shared else {})}

    def _counts(self, layers: Mapping[str, Layer], blocks: Mapping[str, tuple[int, int]]) -> dict[str, int]:
        """Exact units per layer: adopted ones keep theirs, overridden ones have their own, the others share the
        budget (2.1). Layers with different units share it too, and round it within each kind of unit.
        """
        counts = {
            name: layer.module.num_units for name, layer in layers.items() if isinstance(layer.module, SparseLinear)
        }
        densities = self._densities(layers)
        sharing: dict[tuple[int, int], dict[str, int]] = {}
        for name, density in densities.items():
            rows, cols = unit_grid(layers[name].shape, blocks[name])
            if self._override(name) is not None:
                counts[name] = min(max(1, round(density * rows * cols)), rows * cols)
            else:
                sharing.setdefault(blocks[name], {})[name] = rows * cols
        for sizes in sharing.values():
            part = sum(densities[name] * size for name, size in sizes.items()) / sum(sizes.values())
            counts |= exact_counts(densities, sizes, self.density if len(sharing) == 1 else part)
        return counts

    def _override(self, name: str) -> float | None:
        return next((density for pattern, density in self.overrides.items() if fnmatch.fnmatch(name, pattern)), None)


def _plain_block(block: Any) -> Any:
    """An int, a pair, or a word, as a plan holds it."""
    return block if isinstance(block, int | str) else tuple(block)


def _measured(layer: Layer, units: int | None, block: tuple[int, int], tokens: int, precisions: bool) -> LayerCost:
    more = {"precisions": True} if precisions else {}
    return measure(layer.shape, units, block, tokens, bias=layer.bias, **more)


def _machines_model() -> CostModel:
    """This machine's cost model; says so before it spends a minute on calibrating it."""
    found = load_model()
    if found is None:
        warnings.warn("calibrating the cost model of this machine, once, in under a minute", stacklevel=4)
        found = cost_model()
    return found
