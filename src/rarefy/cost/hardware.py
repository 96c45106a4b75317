"""Hardware that is not at hand, as a description file: when sparse would win there.

A layer's training step is three products. Each takes the longer of its arithmetic (FLOPs that are there, over peak
times the structure's efficiency) and its traffic (weights, indices, input and output once, over the bandwidth of the
memory that holds them). That is a bound with efficiencies from publications in it, not a measurement.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from rarefy.cost.counting import layer_bytes
from rarefy.pattern import as_block
from rarefy.settings import unknown

DTYPE_BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2}
"""Dtypes that a description may name, and bytes of a weight or activation. Only those that layers are trained in."""

Shape = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A number and where it is from."""

    value: float
    """In FLOP/s, bytes, bytes/s, seconds, or a share of the peak."""

    source: str
    """A key of the description's `sources`, or "estimate"."""

    where: str = ""
    """Section, table or page of the source, and how the value follows from it; of an estimate its reason."""

    def __post_init__(self) -> None:
        if not 0 <= self.value < math.inf:
            raise ValueError(f"value must be a finite number that is not negative, got {self.value}")
        if self.source == "estimate" and not self.where:
            raise ValueError("an estimate needs its reason in `where`")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A publication."""

    title: str
    """Of the paper, manual or page."""

    url: str
    """Where it can be read."""

    checked: str
    """Which text the figures were compared with, or "not checked"."""


@dataclass(frozen=True, kw_only=True)
class At(Figure):
    """An efficiency that was published for one density."""

    density: float
    """Share of weights that exist, in (0, 1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.density <= 1:
            raise ValueError(f"density must lie in (0, 1], got {self.density}")


@dataclass(frozen=True, kw_only=True)
class Structure:
    """How well the machine multiplies one kind of unit."""

    block: int | tuple[int, int]
    """Unit shape; 1 is unstructured."""

    dtype: str
    """What it computes in; a peak must be given for it."""

    efficiency: tuple[At, ...]
    """Share of the dtype's dense peak that useful FLOPs reach, by density; between two densities on a line over the
    logarithm, constant beyond them."""

    def __post_init__(self) -> None:
        as_block(self.block)
        if not self.efficiency:
            raise ValueError("efficiency is empty: give it for one density at least")

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of a unit."""
        return as_block(self.block)

    def at(self, density: float) -> float:
        """The efficiency at a density."""
        known = sorted((point.density, point.value) for point in self.efficiency)
        for (low, below), (high, above) in itertools.pairwise(known):
            if low <= density <= high:
                part = (math.log(density) - math.log(low)) / (math.log(high) - math.log(low)) if high > low else 0.0
                return below + part * (above - below)
        return known[0][1] if density < known[0][0] else known[-1][1]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A description: `rarefy.cost.descriptions.load_machine` reads one."""

    title: str
    """Product and variant."""

    imagined: bool
    """Whether no one can buy it."""

    about: str
    """What the description covers and what it leaves out."""

    sources: Mapping[str, Source]
    """Key -> publication."""

    peak_flops_per_s: Mapping[str, Figure]
    """Dtype -> dense peak."""

    dense_efficiency: Mapping[str, Figure]
    """Dtype -> share of its peak that large dense products reach."""

    memory_bytes_per_s: Figure
    """Of the memory that holds a whole network's weights and activations."""

    on_chip_bytes: Figure
    """Cache or scratchpad that a layer's tensors may stay in."""

    on_chip_bytes_per_s: Figure | None = None
    """None: no faster than memory, as far as is known."""

    call_s: Figure | None = None
    """What starting one product takes; None: not counted."""

    structures: tuple[Structure, ...] = ()
    """Those that something is known of."""

    def __post_init__(self) -> None:
        if not self.peak_flops_per_s:
            raise ValueError("peak_flops_per_s is empty: give the peak of one dtype at least")
        for name, dtypes in (("peak_flops_per_s", self.peak_flops_per_s), ("dense_efficiency", self.dense_efficiency)):
            for dtype in dtypes:
                if dtype not in DTYPE_BYTES:
                    raise ValueError(f"{name}: {unknown(dtype, list(DTYPE_BYTES))}")
        if set(self.peak_flops_per_s) != set(self.dense_efficiency):
            raise ValueError("peak_flops_per_s and dense_efficiency must name the same dtypes")
        for figure in self._figures():
            if figure.source != "estimate" and figure.source not in self.sources:
                raise ValueError(f"source: {unknown(figure.source, [*self.sources, 'estimate'])}")
        if any(figure.value == 0 for figure in (*self.peak_flops_per_s.values(), self.memory_bytes_per_s)):
            raise ValueError("peaks and bandwidths must be positive")
        for structure in self.structures:
            if structure.dtype not in self.peak_flops_per_s:
                raise ValueError(f"structures: dtype: {unknown(structure.dtype, list(self.peak_flops_per_s))}")

    def _figures(self) -> list[Figure]:
        alone = (self.memory_bytes_per_s, self.on_chip_bytes, self.on_chip_bytes_per_s, self.call_s)
        found = [figure for figure in alone if figure is not None]
        found += [*self.peak_flops_per_s.values(), *self.dense_efficiency.values()]
        return found + [point for structure in self.structures for point in structure.efficiency]

    @cached_property
    def estimates(self) -> int:
        """How many figures are estimates."""
        return sum(figure.source == "estimate" for figure in self._figures())

    # -- asking ---------------------------------------------------------------------------------------------------

    def dense_ms(self, shape: Shape, tokens: int, dtype: str) -> float:
        """Milliseconds of a dense layer's training step in one dtype."""
        width = DTYPE_BYTES[dtype]
        rate = self.peak_flops_per_s[dtype].value * self.dense_efficiency[dtype].value
        return self._step_ms(shape, tokens, shape[0] * shape[1], shape[0] * shape[1] * width, width, rate)

    def best_dense(self, shape: Shape, tokens: int) -> tuple[str, float]:
        """The dtype in which the dense layer is fastest, and its milliseconds."""
        times = {dtype: self.dense_ms(shape, tokens, dtype) for dtype in self.peak_flops_per_s}
        best = min(times, key=lambda dtype: times[dtype])
        return best, times[best]

    def sparse_ms(self, structure: Structure, shape: Shape, tokens: int, density: float) -> float | None:
        """Milliseconds of a sparse layer's training step; None where the units do not divide the matrix."""
        block = structure.shape
        if shape[0] % block[0] or shape[1] % block[1]:
            return None
        units = max(1, round(density * shape[0] * shape[1] / (block[0] * block[1])))
        nnz, width = units * block[0] * block[1], DTYPE_BYTES[structure.dtype]
        rate = self.peak_flops_per_s[structure.dtype].value * structure.at(density)
        return self._step_ms(shape, tokens, nnz, layer_bytes(shape, units, block, width), width, rate)

    def break_even(self, structure: Structure, shape: Shape, tokens: int) -> float | None:
        """The density below which sparse beats the best dense dtype.

        None: at no density from 1e-4 to 1, or the units do not divide the matrix. 1.0: at every density.
        """
        dense = self.best_dense(shape, tokens)[1]
        best = None
        for step in range(401):  # 100 a decade
            density = 10 ** (-4 + step / 100)
            sparse = self.sparse_ms(structure, shape, tokens, density)
            if sparse is not None and sparse < dense:
                best = min(1.0, density)
        return best

    def _step_ms(self, shape: Shape, tokens: int, nnz: int, weight_bytes: int, width: int, rate: float) -> float:
        moved = weight_bytes + sum(shape) * tokens * width
        fast = self.on_chip_bytes_per_s
        near = fast is not None and moved <= self.on_chip_bytes.value
        bandwidth = fast.value if near and fast is not None else self.memory_bytes_per_s.value
        compute_s = 2 * nnz * tokens / rate if rate else math.inf
        return 3e3 * (max(compute_s, moved / bandwidth) + (self.call_s.value if self.call_s else 0.0))
