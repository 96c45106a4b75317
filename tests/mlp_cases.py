"""An MLP's operands, gated or not, and the dense truth to hold every implementation against."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cases import gather, scatter
from near import Near, activated
from rarefy import Pattern
from rarefy.ops import Index, library
from rarefy.ops.backend import names_plain_torch

OPS = torch.ops.rarefy
IN, HIDDEN, OUT = 48, 64, 32


@dataclass(frozen=True, eq=False)
class Problem:
    """The operands of an MLP: patterns, values and biases of gate (if any), up and down."""

    patterns: list[Pattern]
    values: list[Tensor]
    biases: list[Tensor | None]
    x: Tensor
    dy: Tensor

    @property
    def op(self) -> str:
        return "mlp" if len(self.values) == 2 else "gated_mlp"

    @property
    def matrices(self) -> list[Any]:
        flat: list[Any] = []
        for values, pattern in zip(self.values, self.patterns, strict=True):
            flat += [values, *Index.of(pattern)]
        return flat

    def forward(self, activation: str, saved: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        return getattr(OPS, self.op)(*self.matrices, self.x, *self.biases, activation, saved or self.x.dtype)

    def backward(self, z: Tensor, activation: str, needs: list[bool] | None = None) -> tuple[Tensor, ...]:
        needs = needs or [True] * (1 + 2 * len(self.values))
        return getattr(OPS, f"{self.op}_backward")(*self.matrices, self.dy, self.x, z, activation, needs)

    @functools.cache  # noqa: B019  (the problems of `shared` live as long anyway)
    def exact(self, activation: str, saved: torch.dtype, rounds: bool = False) -> list[Near]:
        """y and every gradient, in the order of the ops. In bf16 every result of a step may be rounded.

        Args:
            rounds: every factor of a product may be rounded to bf16 besides.
        """

        def factor(given: Near) -> Near:
            return given.stored(torch.bfloat16) if rounds else given

        weights = [factor(Near.of(scatter(v, p))) for v, p in zip(self.values, self.patterns, strict=True)]
        biases = [None if bias is None else Near.of(bias) for bias in self.biases]
        x, dy, rows = Near.of(self.x), Near.of(self.dy), self.x.dtype

        def linear(x: Near, at: int) -> Near:
            y, bias = factor(x) @ weights[at].T, biases[at]
            return y if bias is None else y + Near(bias.exact.expand(y.exact.shape), bias.off.expand(y.off.shape))

        inner = [linear(x, at).stored(saved) for at in range(len(weights) - 1)]
        act, slope = activated(inner[0], activation)
        act = act.stored(rows)
        h = (factor(act) * inner[1]).stored(rows) if inner[1:] else act
        y = linear(h, len(weights) - 1).stored(rows)
        dh = (factor(dy) @ weights[-1]).stored(rows)
        outer = (dh * inner[1]).stored(rows) if inner[1:] else dh
        dz = [(outer * slope).stored(rows), *([(dh * act).stored(rows)] if inner[1:] else [])]
        dx = (factor(dz[0]) @ weights[0]).stored(rows)
        if inner[1:]:
            dx = (dx + (factor(dz[1]) @ weights[1]).stored(rows)).stored(rows)
        found = [y, dx]
        for at, (gradient, source) in enumerate([*((d, x) for d in dz), (dy, h)]):
            whole = factor(gradient).T @ factor(source)
            found.append(Near(gather(whole.exact, self.patterns[at]), gather(whole.off, self.patterns[at])))
            found.append(gradient.sum())
        return found

    def check(self, activation: str, saved: torch.dtype | None = None) -> None:
        """Forward and backward on the backend in use."""
        y, z = self.forward(activation, saved)
        gradients = self.backward(z, activation)
        assert y.dtype == gradients[0].dtype == self.x.dtype and z.dtype == (saved or self.x.dtype)
        assert all(gradient.dtype == torch.float32 for gradient in gradients[1:])
        dots = not names_plain_torch() and library.isa() == "avx512bf16"  # whose products take bf16 alone
        rounds = dots and z.dtype == torch.bfloat16 and self.x.shape[0] >= 64
        for exact, found in zip(self.exact(activation, z.dtype, rounds), (y, *gradients), strict=True):
            exact.admits(found)


def problem(
    batch: int,
    *,
    gated: bool = False,
    blocks: tuple = ((1, 1), (1, 1)),
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    values_dtype: torch.dtype = torch.float32,
    sizes: tuple[int, int, int] = (IN, HIDDEN, OUT),
    density: float = 0.3,
) -> Problem:
    generator = torch.Generator().manual_seed(batch)
    features, hidden, out = sizes
    shapes = [(hidden, features)] * (1 + gated) + [(out, hidden)]
    blocks = (*[blocks[0]] * (1 + gated), blocks[1])
    patterns = [Pattern.random(s, density, b, generator=generator) for s, b in zip(shapes, blocks, strict=True)]

    def draw(*size: int, dtype: torch.dtype = values_dtype) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    values = []
    for p in patterns:
        size = (p.num_units,) if p.block == (1, 1) else (p.num_units, *p.block)
        values.append(draw(*size) / (density * p.shape[1]) ** 0.5)
    biases = [draw(p.shape[0]) if bias else None for p in patterns]
    return Problem(patterns, values, biases, draw(batch, features, dtype=dtype), draw(batch, out, dtype=dtype))


@functools.cache
def with_bf16_values(batch: int, block: tuple[int, int], gated: bool) -> Problem:
    """bf16 throughout: values that rounding to bf16, as AMX does, leaves alone."""
    p = problem(batch, gated=gated, blocks=(block, block), dtype=torch.bfloat16)
    return dataclasses.replace(p, values=[values.bfloat16().float() for values in p.values])
