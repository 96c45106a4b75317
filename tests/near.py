"""Float64 numbers with a bound on how far what was computed may be off: errors derived, operation by operation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = torch.finfo(torch.float32).eps
BF16 = torch.finfo(torch.bfloat16).eps


@dataclass(frozen=True)
class Near:
    """Something computed in fp32 is within `off` of `exact`, entry by entry."""

    exact: Tensor
    off: Tensor

    @classmethod
    def of(cls, given: Tensor) -> Near:
        """What is given without an error."""
        return cls(given.double(), torch.zeros_like(given, dtype=torch.float64))

    @property
    def size(self) -> Tensor:
        """The largest that the computed magnitude may be."""
        return self.exact.abs() + self.off

    @property
    def T(self) -> Near:
        return Near(self.exact.T, self.off.T)

    def __matmul__(self, other: Near) -> Near:
        """Sums of products in any order, each of at most as many terms as there are columns."""
        both = self.size @ other.size
        spread = both - self.exact.abs() @ other.exact.abs()
        return Near(self.exact @ other.exact, spread + (self.exact.shape[1] + 2) * EPS * both)

    def __mul__(self, other: Near) -> Near:
        both = self.size * other.size
        return Near(self.exact * other.exact, both - (self.exact * other.exact).abs() + EPS * both)

    def __add__(self, other: Near) -> Near:
        total = self.exact + other.exact
        return Near(total, self.off + other.off + EPS * (self.size + other.size))

    def sum(self) -> Near:
        """Over the rows."""
        terms = self.exact.shape[0]
        return Near(self.exact.sum(0), self.off.sum(0) + (terms + 2) * EPS * self.size.sum(0))

    def stored(self, dtype: torch.dtype) -> Near:
        """Rounded to a narrower dtype: by half a unit in the last place, of at most `eps` of the magnitude."""
        if dtype not in (torch.bfloat16, torch.float16):
            return self
        kind = torch.finfo(dtype)
        return Near(self.exact, self.off + kind.eps / 2 * self.size + kind.eps * kind.tiny / 2)

    def admits(self, found: Tensor) -> None:
        """Fails where `found` is further off than it may be."""
        error = (found.double() - self.exact).abs()
        worst = (error - self.off).max().item() if error.numel() else 0.0
        assert worst <= 1e-30, f"off by {error.max():.3g}, past what is allowed by {worst:.3g}"


ROUNDING = 8 * EPS
"""Of an activation's own arithmetic, as a part of 1 + |z|: gelu's erf is good to 1.5e-7, the rest to a few units."""

LIPSCHITZ = {"gelu": 1.13, "gelu_tanh": 1.13, "silu": 1.1, "relu": 1.0}
"""The largest |act'|."""

CURVATURE = {"gelu": 0.8, "gelu_tanh": 0.85, "silu": 0.5, "squared_relu": 2.0}
"""The largest |act''|; relu has none but a step at 0."""


def dense_activation(z: Tensor, name: str) -> Tensor:
    """In plain torch, and apart from the library's own."""
    if name.startswith("gelu"):
        return F.gelu(z, approximate="tanh" if name == "gelu_tanh" else "none")
    return {"silu": F.silu, "relu": torch.relu, "squared_relu": lambda z: torch.relu(z) ** 2}[name](z)


def activated(z: Near, name: str) -> tuple[Near, Near]:
    """act(z) and act'(z)."""
    at = z.exact.detach().requires_grad_()
    value = dense_activation(at, name)
    (slope,) = torch.autograd.grad(value.sum(), at)
    steepest = 2 * z.size if name == "squared_relu" else LIPSCHITZ[name]
    own = ROUNDING * (1 + z.size)
    if name == "relu":
        change = (z.exact.abs() <= z.off).double()
    else:
        change = CURVATURE[name] * z.off
    return Near(value.detach(), steepest * z.off + own * (1 + value.detach().abs())), Near(slope, change + own)
