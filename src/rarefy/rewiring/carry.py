"""What survives a rewire: values, every per-unit optimizer tensor, companions (rewiring rules 7.1 to 7.5)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rarefy.methods.candidates import Scored
from rarefy.nn import SparseLayer
from rarefy.nn.layer import resize
from rarefy.ops import Index
from rarefy.pattern import Pattern
from rarefy.selection import contains

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


def warn_about_decay(layers: Mapping[str, SparseLayer], held: Mapping[int, dict[str, Any]]) -> None:
    """Warn where weight decay spares the sparse values alone, as they are one-dimensional.

    Args:
        held: id of each parameter of the optimizer -> its group.
    """
    decays = {bool(group.get("weight_decay")) for group in held.values()}
    spared = [
        name
        for name, layer in layers.items()
        if id(layer.values) in held and not held[id(layer.values)].get("weight_decay")
    ]
    if decays == {True, False} and spared:
        warnings.warn(
            f"weight decay is on for some parameters, but off for the values of {len(spared)} sparse layers "
            f"(first: {spared[0]}): values are one-dimensional, which 'decay if dim >= 2' recipes skip. "
            "rarefy.param_groups(model, lr=..., weight_decay=...) gives the usual groups",
            stacklevel=3,
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
    resize(tensor, moved)


def exchange(
    layer: SparseLayer,
    companions: Sequence[SparseLayer],
    optimizer: Optimizer | None,
    drop: Tensor,
    grown: Tensor,
) -> Tensor:
    """Swap the units at positions `drop` for units `grown`, both ascending; returns those that are new, ascending (7).

    A grown unit that was just dropped never left: it stays a survivor. Where more or fewer come than go, the layer's
    tensors and the optimizer's get another size; the parameter stays the same object.
    """
    active = layer.pattern.unit_indices()
    leaving = active[drop]
    newborn, drop = grown[~contains(leaving, grown)], drop[~contains(grown, leaving)]
    stays = torch.ones(active.numel(), dtype=torch.bool, device=active.device)
    stays[drop] = False
    survivors = active[stays]
    # Two ascending runs merge: a newborn's place is its rank among newborns plus the survivors before it.
    born_at = torch.searchsorted(survivors, newborn) + torch.arange(newborn.numel(), device=active.device)
    survives = torch.ones(survivors.numel() + newborn.numel(), dtype=torch.bool, device=active.device)
    survives[born_at] = False
    units = torch.empty(survives.numel(), dtype=active.dtype, device=active.device)
    units[born_at], units[survives] = newborn, survivors
    pattern = Pattern.from_sorted_units(units, (layer.out_features, layer.in_features), layer.block)
    layer.values.grad = None
    for owner in (layer, *companions):
        for tensor in per_unit_tensors(optimizer if owner is layer else None, owner.values):
            move_units(tensor, stays, survives)
        owner.set_pattern(pattern)
    return newborn


class BeforeChange:
    """What a layer was when the last backward pass saw it, while a change of density and a rewire follow it (2.8).

    The backward pass kept scores and a gradient for that pattern, and the rewire is of another one.
    """

    def __init__(self, layer: SparseLayer) -> None:
        self.units = layer.pattern.unit_indices()
        """(K,) active then, ascending."""
        self.index = Index.of(layer.pattern)
        self._gradient = layer.values.grad

    def gradient_of(self, layer: SparseLayer) -> Tensor | None:
        """The gradient of the units that are active now; 0 of those that were not."""
        if self._gradient is None:
            return None
        active = layer.pattern.unit_indices()
        known = contains(self.units, active)
        gradient = torch.zeros_like(layer.values)
        gradient[known] = self._gradient[torch.searchsorted(self.units, active[known])]
        return gradient

    def newborn_in(self, layer: SparseLayer) -> Tensor | None:
        """(K,) boolean, units that are active now and were not; None: there are none."""
        born = ~contains(self.units, layer.pattern.unit_indices())
        return born if bool(born.any()) else None

    def barred_in(self, layer: SparseLayer) -> Tensor:
        """Units that were active and are not now, ascending."""
        return self.units[~contains(layer.pattern.unit_indices(), self.units)]

    def candidates(self, seen: Scored) -> Scored:
        """What may grow now.

        Args:
            seen: what was found of the pattern as it was, but `active`, the units that exist now.
        """
        active, free = seen.active, ~contains(seen.active, seen.units)
        units, scores = seen.units[free], seen.scores[free]
        if seen.returning is None:
            return Scored(active, units, scores, None)
        gone = ~contains(active, self.units)
        units, scores = torch.cat([units, self.units[gone]]), torch.cat([scores, seen.returning[gone].to(scores)])
        # Units born at this step are not dropped at it, so no one asks for their score.
        returning = seen.returning.new_zeros(active.numel())
        known = contains(self.units, active)
        returning[known] = seen.returning[torch.searchsorted(self.units, active[known])]
        return Scored(active, units, scores, returning)
