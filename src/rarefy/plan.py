"""A plan: which layers become sparse, how dense each stays, in which blocks, and how its pattern is found.

`Plan.decide` turns the wish into one decision a layer; `sparsify` carries the decisions out and `explain` prints them.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from rarefy.cost import LayerCost, layer_bytes, layer_flops, measure, tokens_per_layer
from rarefy.distributions import er, erk, exact_counts, uniform
from rarefy.init import PatternInit
from rarefy.methods import Method, RigL
from rarefy.nn import SparseLinear
from rarefy.pattern import as_block, check_density, unit_grid
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
    """Glob patterns over module names: layers to leave dense."""

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
            sample: an example input (a tensor, or a tuple or dict of arguments). With it each distinct shape is timed, sparse
                and dense, forward and backward, on the spot; a layer that sparse would slow down is left dense.
        Raises:
            ValueError: no layer to convert, or a filter that matches nothing.
        """
        layers = find_layers(model)
        self._check_filters(layers)
        wanted = {name: self._why_dense(layer) for name, layer in layers.items()}
        tokens = {} if sample is None else tokens_per_layer(model, sample, [n for n, why in wanted.items() if not why])
        while True:
            counts = self._counts({name: layers[name] for name, why in wanted.items() if not why})
            decisions = [self._decision(layers[name], why, counts.get(name), tokens.get(name)) for name, why in wanted.items()]
            slower = [d for d in decisions if not d.why_dense and not layers[d.name].adopted and d.speedup is not None and d.speedup < 1]
            if not slower:
                return decisions
            for d in slower:
                assert d.cost is not None
                wanted[d.name] = (
                    f"sparse would be slower here: {d.cost.sparse_ms:.2f} ms against {d.cost.dense_ms:.2f} ms dense, "
                    f"at density {d.density:.3g} and {d.tokens} tokens"
                )

    def explain(self, model: nn.Module, sample: Any = None) -> Explanation:
        """What `sparsify(model, plan, sample)` would do: `print` it. Arguments and errors as for `decide`."""
        return Explanation(self.density, self.decide(model, sample))

    def _check_filters(self, layers: Mapping[str, Layer]) -> None:
        if not layers:
            raise ValueError("the model has no layer that rarefy could make sparse: no nn.Linear, Conv1D or SparseLinear")
        for option, patterns in (("include", self.include), ("overrides", self.overrides)):
            for pattern in patterns:
                if not fnmatch.filter(layers, pattern):
                    raise ValueError(f"{option}: {pattern!r} matches no layer; {_some(layers)}")
        for pattern in self.keep_dense:
            if not fnmatch.filter(layers, pattern):
                warnings.warn(f"keep_dense: {pattern!r} matches no layer, so it keeps nothing dense; {_some(layers)}", stacklevel=4)

    def _why_dense(self, layer: Layer) -> str:
        """Why a layer is left dense before anything is timed; empty: it is not."""
        for pattern in self.keep_dense:
            if fnmatch.fnmatch(layer.name, pattern):
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
        """Exact units per layer: adopted ones keep theirs, overridden ones have their own, the others share the budget (2.1)."""
        units = {}
        for name, layer in layers.items():
            if not layer.adopted:
                rows, cols = unit_grid(layer.shape, as_block(self.block))
                units[name] = rows * cols
        counts = {name: layer.module.num_units for name, layer in layers.items() if isinstance(layer.module, SparseLinear)}
        own = {name: density for name in units if (density := self._override(name)) is not None}
        counts |= {name: min(max(1, round(density * units[name])), units[name]) for name, density in own.items()}
        shared = {name: n for name, n in units.items() if name not in own}
        if shared:
            densities = _DISTRIBUTIONS[self.distribution]({name: layers[name].shape for name in shared}, self.density)
            counts |= exact_counts(densities, shared, self.density)
        return counts

    def _override(self, name: str) -> float | None:
        return next((density for pattern, density in self.overrides.items() if fnmatch.fnmatch(name, pattern)), None)

    def _decision(self, layer: Layer, why: str, count: int | None, tokens: int | None) -> Decision:
        block = layer.module.block if isinstance(layer.module, SparseLinear) else as_block(self.block)
        cost = None
        if count is not None and tokens:
            cost = measure(layer.shape, count, block, tokens, bias=layer.bias)
        return Decision(name=layer.name, shape=layer.shape, why_dense=why, block=block, units=count, tokens=tokens, cost=cost)


def _some(layers: Iterable[str]) -> str:
    names = list(layers)
    return "there are: " + ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


# -- what a model has -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A layer that could be sparse, or whose reason not to be is worth listing."""

    name: str
    module: nn.Module
    shape: tuple[int, int]
    """(out_features, in_features)."""
    bias: bool
    why_dense: str
    """Why it cannot be converted; empty: it can."""
    adopted: bool = False
    """It is sparse already."""


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is Hugging Face's Conv1D: a linear layer whose weight is stored (in, out)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers")


def find_layers(model: nn.Module) -> dict[str, Layer]:
    """Every linear layer of the model by its first name, in order, with the reason why it must stay dense, if any."""
    parents = dict(model.named_modules())
    owners: dict[int, list[str]] = {}
    for name, module in parents.items():
        for key, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{name}.{key}".lstrip("."))
    layers = {}
    for name, module in parents.items():
        if isinstance(module, SparseLinear):
            shape = (module.out_features, module.in_features)
            layers[name] = Layer(name, module, shape, module.bias is not None, "", adopted=True)
        elif isinstance(module, nn.Linear) or is_conv1d(module):
            parent = parents[name.rpartition(".")[0]] if name else None
            why = _why_not_convertible(name, module, parent, owners)
            weight = module.weight if isinstance(getattr(module, "weight", None), torch.Tensor) else None
            shape = (0, 0) if weight is None or weight.dim() != 2 else (int(weight.shape[0]), int(weight.shape[1]))
            shape = shape[::-1] if is_conv1d(module) else shape
            layers[name] = Layer(name, module, shape, getattr(module, "bias", None) is not None, why)
        elif isinstance(module, nn.MultiheadAttention):
            shape = (3 * module.embed_dim, module.embed_dim)
            why = "nn.MultiheadAttention reads its weights itself, without calling a layer"
            layers[f"{name}.in_proj".lstrip(".")] = Layer(f"{name}.in_proj".lstrip("."), module, shape, True, why)
    return layers


def _why_not_convertible(name: str, module: nn.Module, parent: nn.Module | None, owners: Mapping[int, list[str]]) -> str:
    weight = getattr(module, "weight", None)
    if parent is None:
        return "it is the model itself: put it into a module, as it is replaced in its parent"
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weights itself, without calling the layer"
    if isinstance(parent, nn.TransformerEncoderLayer):
        return "nn.TransformerEncoderLayer's fused path reads its weights itself, without calling the layer"
    if hasattr(module, "parametrizations"):
        return "its weight is computed by a parametrization"
    if type(module) is not nn.Linear and not is_conv1d(module):
        return f"{type(module).__name__} is a subclass of nn.Linear that may compute something else"
    if not isinstance(weight, nn.Parameter) or isinstance(weight, nn.parameter.UninitializedParameter):
        return "its weight is not an initialised parameter"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    others = [owner for owner in owners[id(weight)] if owner != f"{name}.weight"]
    if others:
        return f"its weight is tied to {others[0]}"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return "it has hooks, which a replacement would lose"
    return ""


# -- what was decided -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decision:
    """What happens to one layer, and what it costs."""

    name: str
    shape: tuple[int, int]
    why_dense: str
    """Why it stays dense; empty: it becomes sparse."""
    block: tuple[int, int]
    units: int | None
    """K; None for a dense layer."""
    tokens: int | None
    """Rows of the layer's input in the sample, None without one."""
    cost: LayerCost | None
    """Times measured on this machine, forward and backward together, None without a sample."""

    @property
    def is_sparse(self) -> bool:
        return not self.why_dense

    @property
    def nnz(self) -> int:
        """Weights that exist."""
        if self.units is None or not self.is_sparse:
            return self.shape[0] * self.shape[1]
        return self.units * self.block[0] * self.block[1]

    @property
    def density(self) -> float:
        size = self.shape[0] * self.shape[1]
        units = self.units or 0
        return (units * self.block[0] * self.block[1] if units else self.nnz) / size if size else 0.0

    @property
    def speedup(self) -> float | None:
        """Dense time over sparse time."""
        return None if self.cost is None else self.cost.dense_ms / self.cost.sparse_ms

    def row(self) -> dict[str, Any]:
        """Plain data for tables, JSON and reports."""
        units = self.units if self.is_sparse else None
        dense_flops = layer_flops(self.shape[0] * self.shape[1])
        return {
            "name": self.name,
            "shape": list(self.shape),
            "kind": "sparse" if self.is_sparse else "dense",
            "reason": self.why_dense,
            "density": self.density if self.is_sparse else 1.0,
            "block": list(self.block),
            "units": units,
            "nnz": self.nnz,
            "bytes": layer_bytes(self.shape, units, self.block),
            "dense_bytes": layer_bytes(self.shape, None, (1, 1)),
            "flops": layer_flops(self.nnz),
            "dense_flops": dense_flops,
            "tokens": self.tokens,
            "sparse_ms": None if self.cost is None else self.cost.sparse_ms,
            "dense_ms": None if self.cost is None else self.cost.dense_ms,
            "speedup": self.speedup,
        }


@dataclass(frozen=True)
class Explanation:
    """The decisions of a plan on a model, as text (`str`), as data (`rows`, `totals`, `to_json`)."""

    asked_density: float
    decisions: list[Decision]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One dict a layer: name, shape, kind, reason, density, block, units, nnz, bytes (indices included), dense_bytes, flops
        and dense_flops (per token, forward and both gradients), tokens, sparse_ms, dense_ms, speedup."""
        return [decision.row() for decision in self.decisions]

    @property
    def totals(self) -> dict[str, Any]:
        """Sums over all layers, and the density realised over the sparse ones."""
        rows = self.rows
        sparse = [row for row in rows if row["kind"] == "sparse"]
        size = sum(row["shape"][0] * row["shape"][1] for row in sparse)
        sums = {key: sum(row[key] for row in rows) for key in ("nnz", "bytes", "dense_bytes", "flops", "dense_flops")}
        realised = sum(row["nnz"] for row in sparse) / size if size else 1.0
        return {**sums, "asked_density": self.asked_density, "density": realised, "sparse_layers": len(sparse), "layers": len(rows)}

    def to_json(self) -> dict[str, Any]:
        """{"layers": rows, "totals": totals}."""
        return {"layers": self.rows, "totals": self.totals}

    def __str__(self) -> str:
        head = ["layer", "shape", "density", "nnz", "bytes", "of dense", "FLOPs/token", "of dense", "sparse ms", "dense ms", "speed"]
        rows, totals = self.rows, self.totals
        table = [head, *(_cells(row) for row in rows)]
        total = {**totals, "kind": "sparse", "name": "all", "shape": None, "sparse_ms": None, "dense_ms": None, "speedup": None}
        table.append(_cells(total))
        widths = [max(len(line[column]) for line in table) for column in range(len(head))]
        lines = [
            "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(zip(line, widths, strict=True)))
            for line in table
        ]
        lines.insert(1, "-" * len(lines[0]))
        lines.insert(-1, "-" * len(lines[0]))
        notes = [f"  {row['name']}: dense, {row['reason']}" for row in rows if row["kind"] == "dense"]
        summary = f"{totals['sparse_layers']} of {totals['layers']} layers sparse, density {totals['density']:.4f} (asked {self.asked_density:g})"
        return "\n".join([*lines, summary, *notes])


def _cells(row: Mapping[str, Any]) -> list[str]:
    def ms(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    return [
        row["name"],
        "" if row["shape"] is None else f"{row['shape'][0]}x{row['shape'][1]}",
        f"{row['density']:.4f}" if row["kind"] == "sparse" else "dense",
        f"{row['nnz']:,}",
        f"{row['bytes']:,}",
        f"{row['bytes'] / row['dense_bytes']:.3f}" if row["dense_bytes"] else "-",
        f"{row['flops']:,}",
        f"{row['flops'] / row['dense_flops']:.3f}" if row["dense_flops"] else "-",
        ms(row["sparse_ms"]),
        ms(row["dense_ms"]),
        "-" if row["speedup"] is None else f"{row['speedup']:.2f}x",
    ]


def replace(plan: Plan, **changes: Any) -> Plan:
    """The plan with some fields changed."""
    return dataclasses.replace(plan, **changes)
