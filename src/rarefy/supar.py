"""Widths and densities that share a learning rate (rewiring rule 3.3).

SμPar: Dey et al. 2024, "Sparse maximal update parameterization", arXiv:2405.15743, table 1; at density 1 it is μP (Yang
et al. 2022, arXiv:2203.03466). A hidden layer that is m_d times as wide as the base and m_rho times as dense sums
m_d * m_rho times as many terms: its first variance and its Adam rate are divided by that. Embeddings, norms and biases
keep theirs. Logits are divided by m_d: here in the output layer's weights and rate, whose steps under Adam are of the
same size, so that no model needs another forward pass for it.

Two departures: rates follow the density of the layer, not the fan-in of each neuron, which a rewire changes while the
layer's density stays (a paper of static patterns need not choose); and weight decay is multiplied by what the rate is
divided by, so that what a step takes away is the base's (as in the authors' mup package).

Scores of attention: the paper divides by d instead of sqrt(d). Widen by more heads of the same size, and nothing
changes; `rarefy.models.GPT` has `base_head` for the other case.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from rarefy.nn import SparseLinear


@dataclass(frozen=True, kw_only=True)
class SuPar:
    """How layers relate to those of the base model, whose rate is known."""

    base_width: int
    """Input features of the base model's layers."""

    base_fan_in: Mapping[str, int] = field(default_factory=dict)
    """Glob pattern over layer names -> input features in the base model, where they are not the base width: of an
    MLP's last layer, say; the first that matches counts."""

    base_density: float = 1.0
    """Of the base model's hidden layers."""

    output: tuple[str, ...] = ("head", "*.head", "lm_head", "*.lm_head")
    """Glob patterns over names: layers that give the logits."""

    inputs: tuple[str, ...] = ()
    """Glob patterns over names: layers whose inputs do not grow with the width, as of an MLP over pixels; they keep
    their rate, as embeddings do, but for the density."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "base_fan_in", dict(self.base_fan_in))
        for name in ("output", "inputs"):
            given = getattr(self, name)
            object.__setattr__(self, name, (given,) if isinstance(given, str) else tuple(given))
        for name, size in (("base_width", self.base_width), *self.base_fan_in.items()):
            if size < 1:
                raise ValueError(f"SuPar: the input features of a base layer must be at least 1, got {size} ({name})")
        if not 0 < self.base_density <= 1:
            raise ValueError(f"SuPar: base_density must lie in (0, 1], got {self.base_density}")

    def width(self, name: str, fan_in: int) -> float:
        """m_d of a layer: its input features over those in the base model."""
        if _matches(name, self.inputs):
            return 1.0
        base = next((size for glob, size in self.base_fan_in.items() if fnmatch.fnmatch(name, glob)), self.base_width)
        return fan_in / base

    def multiplier(self, name: str, layer: nn.Linear | SparseLinear) -> float:
        """m_d * m_rho, which the Adam rate of the layer's weights is divided by. The base's output layers are dense."""
        density = layer.density if isinstance(layer, SparseLinear) else 1.0
        base = 1.0 if _matches(name, self.output) else self.base_density
        return self.width(name, layer.in_features) * density / base

    def layers(self, model: nn.Module) -> Iterator[tuple[str, nn.Linear | SparseLinear, float]]:
        """(name, layer, multiplier) of every linear layer, dense or sparse."""
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | SparseLinear):
                yield name, module, self.multiplier(name, module)

    @torch.no_grad()
    def init_(self, model: nn.Module, std: float, *, generator: torch.Generator | None = None) -> None:
        """Fresh normal weights for every linear layer, in place; biases, embeddings and norms stay.

        Args:
            model: after `sparsify`, which has no say in the values then.
            std: deviation of a base layer's weights; hidden layers get std / sqrt(m_d m_rho), output layers std / m_d.
        """
        for name, layer, multiplier in self.layers(model):
            weight = layer.values if isinstance(layer, SparseLinear) else layer.weight
            scale = multiplier if _matches(name, self.output) else math.sqrt(multiplier)
            weight.copy_(torch.randn(weight.shape, generator=generator) * (std / scale))


def _matches(name: str, globs: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, glob) for glob in globs)
