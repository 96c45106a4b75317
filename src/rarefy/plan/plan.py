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
from typing import Any, Literal, get_args

from torch import nn

from rarefy.budget import Budget, as_matrix, check_densities, moves
from rarefy.cost import CostModel, LayerCost
from rarefy.distributions import DISTRIBUTIONS
from rarefy.init import PatternInit, constant_fan_in
from rarefy.methods import Method, RigL, Static
from rarefy.nn.low_rank import check_alpha, low_rank_weights, no_room, units_beside
from rarefy.pattern import as_block, unit_grid
from rarefy.plan.compute import check_dense_above
from rarefy.plan.decision import Decision
from rarefy.plan.explanation import Explanation
from rarefy.plan.filters import check_filters, why_left_dense
from rarefy.plan.layers import Layer, find_layers
from rarefy.plan.times import ASSUMED_TOKENS, Times
from rarefy.schedules import Schedule
from rarefy.settings import from_plain, to_plain, unknown


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a model is made sparse and trained. Everything a run needs to be made again."""

    density: float | Schedule
    """Share of the weights of the sparse layers that exist, in (0, 1], those of a low-rank part among them; a schedule
    moves it from the method's begin to its end. A number is the last density of a method that moves it by itself, such
    as GMP."""

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

    overrides: Mapping[str, float | Schedule] = field(default_factory=dict)
    """Glob pattern -> density of its own, outside the shared budget, as `density`; the first that matches counts."""

    block_overrides: Mapping[str, int | tuple[int, int]] = field(default_factory=dict)
    """Glob pattern -> unit shape of its own; the first that matches counts."""

    init: PatternInit = "random"
    """First pattern: random, balanced (equal rows and columns), butterfly (flat block butterfly), magnitude (largest
    present weights), two_four (two single units in every four, along rows and columns: what GPUs call 2:4), or
    constant_fan_in: as many units in every row of a layer, which a method that needs it makes of random."""

    low_rank: int | float = 0
    """A dense part of low rank beside the sparse one, paid from the same density: an int is its rank in every layer, a
    share below 1 is of each layer's weights; 0: none."""

    low_rank_alpha: float | None = None
    """The low-rank part is scaled by this over its rank; None: scale 1."""

    balance: Mapping[str, int] = field(default_factory=dict)
    """Glob pattern -> equal groups of rows, each of which keeps its number of units: heads, say, 3 * heads for a
    projection to queries, keys and values; the first that matches counts."""

    rescale: bool = True
    """Scale kept values by 1/sqrt(row density), as fresh models need; False for trained weights."""

    dense_above: float | Literal["auto"] | None = 0.5
    """Layers denser than this multiply by torch's dense matmul, their storage unchanged; "auto": denser than this
    machine's calibrated break-even; None: none do."""

    seed: int = 0
    """Of first patterns and random growth."""

    def __post_init__(self) -> None:
        check_dense_above(self.dense_above)
        object.__setattr__(self, "block", _plain_block(self.block))
        own = {pattern: _plain_block(block) for pattern, block in self.block_overrides.items()}
        object.__setattr__(self, "block_overrides", own)
        if isinstance(self.block, str) and self.block != "auto":
            raise ValueError(f'block must be a positive int, a pair of them, or "auto", got {self.block!r}')
        for block in (*([] if self.block == "auto" else [self.block]), *own.values()):
            as_block(block)  # type: ignore[arg-type]
        object.__setattr__(self, "balance", dict(self.balance))
        for pattern, groups in self.balance.items():
            if not isinstance(groups, int) or groups < 1:
                raise ValueError(f"balance: the number of groups of {pattern!r} must be at least 1, got {groups!r}")
        for name in ("include", "keep_dense"):
            given = getattr(self, name)
            object.__setattr__(self, name, (given,) if isinstance(given, str) else tuple(given))
        object.__setattr__(self, "overrides", dict(self.overrides))
        for density in (self.density, *self.overrides.values()):
            check_densities(density)
            check_densities(self.method.densities(density))
        if self.distribution not in DISTRIBUTIONS:
            raise ValueError(f"distribution: {unknown(self.distribution, list(DISTRIBUTIONS))}")
        if self.init not in get_args(PatternInit):
            raise ValueError(f"init: {unknown(self.init, get_args(PatternInit))}")
        if self.method.needs_constant_fan_in and self.init not in ("random", "constant_fan_in"):
            raise ValueError(
                f"{type(self.method).__name__} keeps the rows of a layer equal: "
                f'use init="constant_fan_in", or leave it out, got init={self.init!r}'
            )
        if self.method.needs_constant_fan_in and self.balance:
            raise ValueError(
                f"{type(self.method).__name__} keeps the rows of a layer equal already: leave out balance="
            )
        if self.init == "two_four":
            self._check_two_four()
        self._check_low_rank()
        asked = [self.method.densities(density) for density in (self.density, *self.overrides.values())]
        fixed = self.keeps_sizes or bool(self.balance)
        if fixed and (self.method.redistribute is not None or any(moves(density) for density in asked)):
            raise ValueError(
                "low-rank parts, rows of equal fan-in and balanced groups keep their sizes, so low_rank=, "
                "constant_fan_in and balance= go with a density that stays: give a number, and a method that neither "
                "moves nor redistributes it"
            )

    @property
    def first_pattern(self) -> PatternInit:
        """`init`; where the method needs rows of equal fan-in, constant_fan_in in place of random."""
        return "constant_fan_in" if self.method.needs_constant_fan_in else self.init

    @property
    def keeps_sizes(self) -> bool:
        """Whether layers are rounded one by one, so that no budget can move between them or in time."""
        return bool(self.low_rank) or self.first_pattern == "constant_fan_in"

    def _check_two_four(self) -> None:
        half = all(density == 0.5 for density in (self.density, *self.overrides.values()))
        blocks = (self.block, *self.block_overrides.values())
        single = all(not isinstance(block, str) and as_block(block) == (1, 1) for block in blocks)
        if not half or not single or self.distribution != "uniform":
            raise ValueError(
                'init="two_four" is half of the single units of every layer: density=0.5, block=1, uniform'
            )
        if not isinstance(self.method, Static) or self.low_rank or self.balance:
            raise ValueError(
                'init="two_four" has two units in every four, which a rewire, low-rank parts and balanced groups would '
                "not keep: use method=Static(), and leave low_rank= and balance= out"
            )

    def _check_low_rank(self) -> None:
        if isinstance(self.low_rank, bool) or not (
            self.low_rank >= 0 if isinstance(self.low_rank, int) else 0 <= self.low_rank < 1
        ):
            raise ValueError(
                f"low_rank must be a rank (an int, at least 0) or a share of the weights in [0, 1), got {self.low_rank}"
            )
        check_alpha(self.low_rank_alpha)
        if self.low_rank and self.first_pattern == "constant_fan_in":
            raise ValueError(
                "low_rank= takes weights off each layer, and rows of equal fan-in then cannot be: leave one out"
            )
        if self.low_rank_alpha is not None and not self.low_rank:
            raise ValueError("low_rank_alpha scales a low-rank part, and there is none: give low_rank= too")

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
                sees, and how large a convolution's images are. Without one, times are for `ASSUMED_TOKENS`, and
                convolutions have none.
            measure: True: each distinct shape is timed on the spot, sparse and dense, forward and backward. False: the
                cost model predicts the times. None: measured if there is a sample; else predicted where the plan needs
                times (`block="auto"`), and not asked for where it does not.
            precisions: also measure the layers in the other precisions (the model predicts them anyway).
            costs: the cost model; None: this machine's. It is calibrated if there is none yet, in about a minute.
        Raises:
            ValueError: no layer to convert, or a filter that matches nothing.

        Where the structure is open the model chooses it, measured or not: timing all six for every layer would take
        longer than the calibration.
        """
        layers = find_layers(model)
        globs = {
            "include": self.include,
            "overrides": self.overrides,
            "block_overrides": self.block_overrides,
            "balance": self.balance,
        }
        check_filters(globs, self.keep_dense, layers, model)
        why_dense = {
            name: why_left_dense(layer, self.include, self.keep_dense, self._asked_block(name) or (1, 1))
            or ("" if layer.adopted else self._why_unfit(layer))
            for name, layer in layers.items()
        }
        times = Times.of_model(
            model,
            sample,
            layers,
            lambda name: not (why_dense[name] or layers[name].adopted or self._asked_block(name)),
            measure=measure,
            precisions=precisions,
            costs=costs,
        )
        found: dict[str, LayerCost | None] = {}
        # A layer that stays dense leaves the budget, which changes the others' densities: those are asked for anew.
        while True:
            sparse = {name: layers[name] for name, why in why_dense.items() if not why}
            blocks = self._blocks(layers, sparse, times)
            ranks = self._ranks(sparse)
            fresh = {name: layer.dims for name, layer in sparse.items() if not layer.adopted}
            densities = self.budget(fresh, {}).densities(0.0) if fresh else {}
            counts, last = self._counts(sparse, blocks, ranks), self._counts(sparse, blocks, ranks, 1.0)
            decisions = []
            for name, layer in layers.items():
                units, block, rank = counts.get(name), blocks[name], ranks.get(name, 0)
                if name in counts or name not in found:
                    # The last size counts: it is what most steps see, and the smallest where density falls.
                    found[name] = times.cost(layer, last.get(name), block, rank)
                seen, why = times.tokens.get(name), why_dense[name]
                asked = densities.get(name)
                whole = units is not None and not why and self._computes_dense(layer.shape, units, block)
                decisions.append(
                    Decision(
                        name,
                        layer.shape,
                        why,
                        block,
                        units,
                        seen,
                        found[name],
                        last.get(name),
                        rank,
                        asked,
                        layer.kernel,
                        whole,
                        times.convolutions.get(name),
                        layer.groups,
                    )
                )
            slower = [d for d in decisions if d.is_sparse and not layers[d.name].adopted and (d.speedup or 1) < 1]
            if not slower:
                self._warn_of_no_rank([d for d in decisions if d.is_sparse and not layers[d.name].adopted])
                for d in decisions:
                    if d.is_sparse:
                        self._check_groups(d)
                return decisions
            for d in slower:
                assert d.cost is not None
                why_dense[d.name] = (
                    f"sparse would be slower here: {d.cost.sparse_ms:.2f} ms against {d.cost.dense_ms:.2f} ms dense"
                    f"{', predicted' if d.cost.source == 'predicted' else ''}, at density {d.last_density:.3g} and "
                    f"{d.tokens} tokens"
                )

    def _warn_of_no_rank(self, fresh: Sequence[Decision]) -> None:
        without = [d.name for d in fresh if not d.rank]
        if self.low_rank and without:
            warnings.warn(
                f"low_rank: a share of {self.low_rank:g} is not enough for rank 1 in {len(without)} of {len(fresh)} "
                f"sparse layers (first: {without[0]}): they have a sparse part alone",
                stacklevel=4,
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
        first, last = self.density_at(0.0), self.density_at(1.0)
        groups = {d.name: self.groups(d.name) for d in decisions if d.is_sparse and self.groups(d.name) > 1}
        return Explanation(first, decisions, self.method, assumed, None if first == last else last, groups)

    def density_at(self, progress: float) -> float:
        """Density that the layers without one of their own are to share, at a progress of the schedule."""
        return self.method.densities(self.density)(progress)

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
        self, layers: Mapping[str, Layer], sparse: Mapping[str, Layer], times: Times
    ) -> dict[str, tuple[int, int]]:
        """Each layer's unit shape: its own if it is sparse already, else as asked for, else the fastest."""
        fixed = {
            name: self._asked_block(name) if layer.sparse is None else layer.sparse.block
            for name, layer in layers.items()
        }
        blocks = {name: block or (1, 1) for name, block in fixed.items()}
        undecided = [name for name in sparse if fixed[name] is None]
        if undecided:
            fresh = {name: layer.dims for name, layer in sparse.items() if not layer.adopted}
            densities, ranks = self.budget(fresh, {}).densities(1.0), self._ranks(sparse)
            for name in undecided:
                layer = layers[name]
                blocks[name] = times.fastest_block(layer, densities[name] - _share(layer.shape, ranks[name]))
        return blocks

    def _why_unfit(self, layer: Layer) -> str:
        """Why a layer cannot have the low-rank part or the first pattern that is asked for; empty: it can."""
        if self.low_rank and layer.kernel is not None:
            return _NO_LOW_RANK
        return _NO_FOURS if self.init == "two_four" and any(side % 4 for side in layer.shape) else ""

    def _asked_block(self, name: str) -> tuple[int, int] | None:
        """The unit shape that the plan names for a layer; None: it leaves it open."""
        for pattern, block in self.block_overrides.items():
            if fnmatch.fnmatch(name, pattern):
                return as_block(block)
        return None if isinstance(self.block, str) else as_block(self.block)

    def budget(self, layers: Mapping[str, tuple[int, ...]], blocks: Mapping[str, tuple[int, int]]) -> Budget:
        """What the layers of these dense shapes, none of them sparse before, share, and how it moves."""
        asked = {name: density for name in layers if (density := self._override(name)) is not None}
        return Budget(
            shapes=layers,
            blocks={name: blocks.get(name, (1, 1)) for name in layers},
            density=self.method.densities(self.density),
            distribution=self.distribution,
            own={name: self.method.densities(density) for name, density in asked.items()},
        )

    def groups(self, name: str) -> int:
        """Groups of rows of a layer that keep their number of units; 1: the layer as a whole does."""
        return next((groups for pattern, groups in self.balance.items() if fnmatch.fnmatch(name, pattern)), 1)

    def _check_groups(self, decision: Decision) -> None:
        groups, rows = self.groups(decision.name), decision.shape[0] // decision.block[0]
        if rows % groups:
            raise ValueError(
                f"balance: {decision.name} has {rows} rows of units, which {groups} equal groups cannot share: give a "
                f"number of groups that divides {rows}"
            )
        own = decision.groups
        if groups % own and own % groups:
            raise ValueError(
                f"balance: {groups} equal groups of rows cut across the {own} that {decision.name} has by itself: give "
                f"a multiple of {own} or a number that divides it"
            )

    def _ranks(self, layers: Mapping[str, Layer]) -> dict[str, int]:
        """Of each layer's low-rank part: adopted ones keep theirs, others have the rank asked for, or the largest that
        their share of the layer's weights allows.

        Raises:
            ValueError: a rank that leaves no weight to the sparse part.
        """
        ranks = {name: layer.rank for name, layer in layers.items() if layer.adopted}
        fresh = {name: layer.dims for name, layer in layers.items() if not layer.adopted}
        if not self.low_rank:
            return {**ranks, **dict.fromkeys(fresh, 0)}
        for name, density in (self.budget(fresh, {}).densities(0.0) if fresh else {}).items():
            rows, cols = as_matrix(fresh[name])
            rank = self.low_rank
            if isinstance(rank, float):
                rank = units_beside(rank * density * rows * cols, 0, (rows + cols, 1))
            if low_rank_weights((rows, cols), rank) >= density * rows * cols:
                raise ValueError(f"{name}: {no_room((rows, cols), rank, density * rows * cols)}")
            ranks[name] = rank
        return ranks

    def _counts(
        self,
        layers: Mapping[str, Layer],
        blocks: Mapping[str, tuple[int, int]],
        ranks: Mapping[str, int],
        progress: float = 0.0,
    ) -> dict[str, int]:
        """Exact units per layer: adopted ones keep theirs, the others have what the budget gives them (2.1).

        Rows of equal fan-in are rounded each (2.2).
        With a low-rank part, what it has is taken off each layer's own, and the rest is rounded down, so that both
        parts together stay within the density.
        """
        fresh = {name: layer.dims for name, layer in layers.items() if not layer.adopted}
        counts = {name: layer.sparse.num_units for name, layer in layers.items() if layer.sparse is not None}
        if not fresh:
            return counts
        budget = self.budget(fresh, blocks)
        if not self.keeps_sizes:
            return {**counts, **budget.counts(progress)}
        for name, density in budget.densities(progress).items():
            (rows, cols), rank = as_matrix(fresh[name]), ranks[name]
            if not self.low_rank:
                unit_rows, unit_cols = unit_grid((rows, cols), blocks[name])
                counts[name] = unit_rows * constant_fan_in(density, unit_cols)
                continue
            weights = density * rows * cols
            units = units_beside(weights, low_rank_weights((rows, cols), rank), blocks[name])
            if rank and units < 1:
                raise ValueError(f"{name}: {no_room((rows, cols), rank, weights)}")
            counts[name] = max(1, units)
        return counts

    def _computes_dense(self, shape: tuple[int, int], units: int, block: tuple[int, int]) -> bool:
        """As far as the plan itself says; under "auto" the cost model decides, when the layers are made."""
        above, size = self.dense_above, shape[0] * shape[1]
        return isinstance(above, int | float) and bool(size) and units * block[0] * block[1] / size > above

    def _override(self, name: str) -> float | Schedule | None:
        return next((density for pattern, density in self.overrides.items() if fnmatch.fnmatch(name, pattern)), None)


_NO_FOURS = "its sides are no multiples of 4, which two_four needs"

_NO_LOW_RANK = "it is a convolution, and low_rank= is for linear layers"


def _plain_block(block: Any) -> Any:
    """An int, a pair, or a word, as a plan holds it."""
    return block if isinstance(block, int | str) else tuple(block)


def _share(shape: tuple[int, int], rank: int) -> float:
    """Of a matrix's entries, what a low-rank part has as weights."""
    return low_rank_weights(shape, rank) / (shape[0] * shape[1])
