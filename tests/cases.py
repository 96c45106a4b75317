"""The shapes that every implementation of the operations is held to, and the dense truth to hold them against.

B rows of input, I in, O out, K units of b_r x b_c.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy import Pattern
from rarefy.ops import Index


@dataclass(frozen=True, kw_only=True)
class Case:
    """One sparse matrix and batch. Sizes in entries; `gaps` empties the second and last unit row and column."""

    out_features: int
    in_features: int
    density: float
    batch: int
    block: tuple[int, int] = (1, 1)
    bias: bool = True
    gaps: bool = False

    def __str__(self) -> str:
        block = "" if self.block == (1, 1) else f"-{self.block[0]}x{self.block[1]}"
        extras = ("-gaps" if self.gaps else "") + ("" if self.bias else "-nobias")
        return f"{self.out_features}x{self.in_features}-d{self.density:g}-b{self.batch}{block}{extras}"

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(str(self).encode()))

    def pattern(self) -> Pattern:
        """round(density * n) units at random, less those in the gaps."""
        rows, cols = self.out_features // self.block[0], self.in_features // self.block[1]
        pattern = Pattern.with_units(self.shape, round(self.density * rows * cols), self.block, self.generator())
        if not self.gaps:
            return pattern
        units = pattern.unit_indices()
        row, col = units // cols, units % cols
        return Pattern.from_units(
            units[(row != 1) & (row != rows - 1) & (col != 1) & (col != cols - 1)], self.shape, self.block
        )


CASES = [
    Case(out_features=7, in_features=5, density=0.5, batch=3),
    Case(out_features=33, in_features=17, density=0.2, batch=19, gaps=True),
    Case(out_features=64, in_features=48, density=0.1, batch=64, bias=False),
    Case(out_features=61, in_features=127, density=0.1, batch=65, gaps=True, bias=False),
    Case(out_features=130, in_features=259, density=0.05, batch=131),
    Case(out_features=19, in_features=23, density=0.3, batch=1),
    Case(out_features=19, in_features=23, density=0.3, batch=0),
    Case(out_features=16, in_features=16, density=0.0, batch=5),
    Case(out_features=16, in_features=16, density=0.0, batch=5, bias=False),
    Case(out_features=35, in_features=18, density=1.0, batch=17),
    Case(out_features=1, in_features=200, density=0.2, batch=9),
    Case(out_features=200, in_features=1, density=0.2, batch=9),
    Case(out_features=1, in_features=1, density=1.0, batch=1),
    Case(out_features=3, in_features=70_001, density=0.001, batch=4),
    Case(out_features=70_001, in_features=3, density=0.001, batch=4),
    Case(out_features=2, in_features=65_536, density=0.002, batch=2),
    Case(out_features=32, in_features=64, density=0.2, batch=33, block=(4, 4)),
    Case(out_features=68, in_features=132, density=0.1, batch=70, block=(4, 4), gaps=True, bias=False),
    Case(out_features=4, in_features=4, density=1.0, batch=1, block=(4, 4)),
    Case(out_features=24, in_features=12, density=0.0, batch=7, block=(4, 4)),
    Case(out_features=36, in_features=31, density=0.2, batch=21, block=(4, 1), gaps=True),
    Case(out_features=16, in_features=9, density=1.0, batch=2, block=(4, 1), bias=False),
    Case(out_features=72, in_features=31, density=0.2, batch=70, block=(8, 1), gaps=True),
    Case(out_features=64, in_features=96, density=0.2, batch=69, block=(8, 8), gaps=True),
    Case(out_features=24, in_features=16, density=0.5, batch=1, block=(8, 8), bias=False),
    Case(out_features=80, in_features=112, density=0.3, batch=67, block=(16, 16), gaps=True),
    Case(out_features=32, in_features=16, density=1.0, batch=18, block=(16, 16)),
    Case(out_features=14, in_features=27, density=0.3, batch=11, block=(2, 3), gaps=True),
    Case(out_features=6, in_features=6, density=1.0, batch=0, block=(2, 3)),
]


@dataclass(frozen=True)
class Problem:
    """The operands of one case, sparse and dense. `weight` is (O, I) float64, exactly what `values` say."""

    pattern: Pattern
    index: Index
    values: Tensor
    weight: Tensor
    bias: Tensor | None
    x: Tensor
    dy: Tensor

    @property
    def fan_in(self) -> Tensor:
        """(O,) products that each output sums."""
        return self.pattern.to_mask().sum(dim=1)

    @property
    def fan_out(self) -> Tensor:
        """(I,) products that each input's gradient sums."""
        return self.pattern.to_mask().sum(dim=0)

    def gather(self, matrix: Tensor) -> Tensor:
        """Entries of a dense (O, I) matrix at the units, in the shape of `values`."""
        return gather(matrix, self.pattern)


def problem(case: Case, dtype: torch.dtype = torch.float32, activations: torch.dtype | None = None) -> Problem:
    """Random operands of a case; `activations` is the dtype of x and dy where it is another than the values'."""
    pattern, generator = case.pattern(), case.generator()
    size = (pattern.num_units,) if case.block == (1, 1) else (pattern.num_units, *case.block)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    values = draw(*size).to(dtype)
    bias = draw(case.out_features).to(dtype) if case.bias else None
    x, dy = (draw(case.batch, n).to(activations or dtype) for n in (case.in_features, case.out_features))
    return Problem(pattern, Index.of(pattern), values, scatter(values, pattern).double(), bias, x, dy)


def scatter(values: Tensor, pattern: Pattern) -> Tensor:
    """(O, I) with `values` at the units, one unit at a time: slow, and sharing nothing with the library."""
    (b_r, b_c), dense = pattern.block, values.new_zeros(pattern.shape)
    crow, cols = pattern.crow_indices.tolist(), pattern.col_indices.tolist()
    for row in range(len(crow) - 1):
        for at in range(crow[row], crow[row + 1]):
            col = cols[at]
            dense[row * b_r : (row + 1) * b_r, col * b_c : (col + 1) * b_c] = values[at]
    return dense


def gather(matrix: Tensor, pattern: Pattern) -> Tensor:
    """The reverse of `scatter`."""
    (b_r, b_c), entries = pattern.block, []
    crow, cols = pattern.crow_indices.tolist(), pattern.col_indices.tolist()
    for row in range(len(crow) - 1):
        for at in range(crow[row], crow[row + 1]):
            col = cols[at]
            entries.append(matrix[row * b_r : (row + 1) * b_r, col * b_c : (col + 1) * b_c])
    size = (pattern.num_units,) if pattern.block == (1, 1) else (pattern.num_units, b_r, b_c)
    return torch.stack(entries).reshape(size) if entries else matrix.new_zeros(size)
