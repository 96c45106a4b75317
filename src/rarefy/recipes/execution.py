"""How a recipe's network runs: in which precision, and compiled or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rarefy.recipes.settings import RunSettings
from rarefy.rewiring import Rewirer
from rarefy.training.twin import Assess, Loss, Twin

T = TypeVar("T")


def make_twin(
    name: str,
    model: nn.Module,
    optimizer: Optimizer,
    rewirer: Rewirer | None,
    loss: Loss,
    settings: RunSettings,
    assess: Assess | None = None,
) -> Twin:
    """A network ready for its first step, run as settled settings say; the engine is attached already."""
    if settings.compile:
        model.compile(dynamic=False)
    if settings.precision == "bf16":
        loss, assess = _autocast(loss), None if assess is None else _autocast(assess)
    return Twin(name, model, optimizer, rewirer, loss, assess=assess, seed=settings.seed)


def _autocast(call: Callable[[nn.Module, Tensor, Tensor], T]) -> Callable[[nn.Module, Tensor, Tensor], T]:
    def cast(model: nn.Module, inputs: Tensor, targets: Tensor) -> T:
        with torch.autocast(inputs.device.type, torch.bfloat16):
            return call(model, inputs, targets)

    return cast
