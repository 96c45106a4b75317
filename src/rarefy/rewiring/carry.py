"""What survives a rewire: values, every per-unit optimizer tensor, companions (rewiring rules 7.1 to 7.5)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

MATRIX_OPTIMIZERS = ("LBFGS", "Muon", "Shampoo", "SOAP", "KFAC")
"""Optimizers whose state mixes units, so that no unit's part of it can be moved."""

_INSTEAD = "use an elementwise optimizer such as rarefy.AdamW or torch.optim.SGD"

_TRIAL_UNITS = 211  # no other dimension of a state is likely to have this size


def check_carried(optimizer: Optimizer, name: str, values: nn.Parameter) -> None:
    """Whether the optimizer's state of `values` can move with the units (7.3).

    Raises:
        ValueError: a state tensor is neither a scalar nor one row a unit; nothing was changed.
    """
    num_units = values.shape[0]
    for key, tensor in _tensors(optimizer.state.get(values, {})):
        if tensor.dim() > 0 and tensor.numel() > 1 and tensor.shape[0] != num_units:
            raise ValueError(
                f"{type(optimizer).__name__} keeps {key!r} of shape {tuple(tensor.shape)} for the "
                f"{num_units} units of {name}: that cannot be moved with them; {_INSTEAD}"
            )


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuse, by name, an optimizer whose state cannot be carried (7.3), before a step is wasted.

    Raises:
        ValueError: it is a known matrix or whole-vector method, or a trial step on a tiny parameter shows such state.
    """
    kind = type(optimizer)
    if any(base.__name__ in MATRIX_OPTIMIZERS for base in kind.__mro__):
        raise ValueError(
            f"{kind.__name__} keeps state that mixes all weights of a layer, which cannot move with rewired units: "
            f"{_INSTEAD}"
        )
    trial = nn.Parameter(torch.ones(_TRIAL_UNITS))
    trial.grad = torch.ones(_TRIAL_UNITS)
    try:
        probe = kind([trial], **optimizer.defaults)
        probe.step()
    except Exception:  # its constructor wants more than its defaults: each rewire checks the real state anyway
        return
    check_carried(probe, "a trial parameter", trial)
    for key, tensor in _tensors(probe.state.get(trial, {})):
        if _TRIAL_UNITS in tensor.shape[1:]:  # a row a unit, and a column too: a matrix between units
            raise ValueError(
                f"{kind.__name__} keeps {key!r} of shape {tuple(tensor.shape)} for {_TRIAL_UNITS} units: "
                f"that pairs units, and cannot be moved with one; {_INSTEAD}"
            )


def _tensors(state: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of an optimizer's state for one parameter, those in nested dicts, lists and tuples too."""
    for key, item in state.items():
        if isinstance(item, Tensor):
            yield str(key), item
        elif isinstance(item, dict):
            yield from _tensors(item)
        elif isinstance(item, list | tuple):
            yield from _tensors({f"{key}[{i}]": part for i, part in enumerate(item)})


def per_unit_tensors(optimizer: Optimizer | None, values: nn.Parameter) -> list[Tensor]:
    """The values and every state tensor that has one row a unit, each once."""
    state = {} if optimizer is None else optimizer.state.get(values, {})
    num_units = values.shape[0]
    moved = {id(t): t for _, t in _tensors(state) if t.dim() > 0 and t.shape[0] == num_units}
    return [values, *moved.values()]


def move_units(tensor: Tensor, stays: Tensor, survives: Tensor) -> None:
    """Along the first dimension: survivors to their new rows bitwise, newborn rows zero (7.1, 7.2).

    In place where the number of rows stays; else the same tensor object gets new memory of the new size.

    Args:
        stays: (K,) boolean, which rows leave their value to a survivor, in order.
        survives: (K',) boolean, which rows hold a survivor afterwards; as many.
    """
    kept = tensor[stays]
    if survives.numel() == tensor.shape[0]:
        tensor.zero_()
        tensor[survives] = kept
        return
    moved = tensor.new_zeros((survives.numel(), *tensor.shape[1:]))
    moved[survives] = kept
    if tensor.requires_grad:
        # The last loss may still hold the node that accumulates gradients of the old size; torch makes a new one only
        # where the dtype changes.
        tensor.data = moved.to(torch.float64 if moved.dtype != torch.float64 else torch.float32)
    tensor.data = moved
    torch.autograd.graph.increment_version(tensor)  # a forward pass from before must not go backward now (7.5)
