"""A classifier of plain layers: linear, ReLU, ..., linear.

Layer names, for the globs of a plan: layers.N, head. Shape letters: B examples, I inputs, K classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """The shape of an MLP."""

    inputs: int
    """Numbers of an example, I."""

    hidden: tuple[int, ...] = (1000, 1000, 1000)
    """Features of each hidden layer."""

    classes: int = 10
    """K."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        for name, size in (("inputs", self.inputs), ("classes", self.classes), *(("hidden", h) for h in self.hidden)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")


class MLP(nn.Module):
    """Examples to the logits of their classes.

    Args:
        config: the shape.
        generator: draws the first weights; None: torch's global one.
    """

    def __init__(self, config: MLPConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        sizes = (config.inputs, *config.hidden)
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes))
        self.head = nn.Linear(sizes[-1], config.classes)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Fresh weights as in He et al. 2015 (arXiv:1502.01852): normal, of variance 2 / fan-in before a ReLU, and
        1 / fan-in before the logits; biases 0. Made for the dense model: `sparsify` rescales.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                gain = 1.0 if module is self.head else math.sqrt(2)
                nn.init.normal_(module.weight, std=gain / math.sqrt(module.in_features), generator=generator)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) of I numbers each -> (B, K) logits."""
        x_BI = x.flatten(1)
        for layer in self.layers:
            x_BI = F.relu(layer(x_BI))
        return self.head(x_BI)
