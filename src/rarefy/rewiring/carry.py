"""What survives a rewire: values, every per-unit optimizer tensor, companions (rewiring rules 7.1 to 7.5)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rarefy.methods.candidates import Scored
from rarefy.nn import SparseLayer
from rarefy.nn.layer import resize
from rarefy.ops import Index
from rarefy.pattern import Pattern
from rarefy.selection import contains, num_below, positions, put

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


class Move(NamedTuple):
    """Which unit stands where after a change, in the order of the pattern; all ascending int64."""

    source: Tensor
    """(K',) position before, of each survivor; 0 of a newborn."""
    born: Tensor
    """Places of the newborns."""
    gone: Tensor
    """Positions before, of the units that left."""


class Exchanged(NamedTuple):
    """What a change of units led to."""

    pattern: Pattern
    newborn: Tensor
    """Units that are new, ascending."""
    move: Move


def moved_units(tensor: Tensor, move: Move) -> Tensor:
    """Along the first dimension, in memory of its own: survivors bitwise in their new rows, newborn rows zero (7.1,
    7.2).
    """
    if not tensor.shape[0]:
        return tensor.new_zeros(move.source.numel(), *tensor.shape[1:])
    moved = tensor.index_select(0, move.source)
    return moved.index_fill_(0, move.born, 0) if move.born.numel() else moved


def move_units(tensor: Tensor, move: Move) -> None:
    """The same to the tensor object itself: in place where the number of rows stays, else it gets other memory."""
    moved = moved_units(tensor, move)
    if moved.shape == tensor.shape:
        tensor.copy_(moved)
    else:
        resize(tensor, moved)


def exchange(
    layer: SparseLayer,
    companions: Sequence[SparseLayer],
    optimizer: Optimizer | None,
    pattern: Pattern,
    drop: Tensor,
    grown: Tensor,
) -> Exchanged:
    """Swap the units at positions `drop` for units `grown`, both ascending (7).

    A grown unit that was just dropped never left: it stays a survivor. Where more or fewer come than go, the layer's
    tensors and the optimizer's get another size; the parameter stays the same object.

    Args:
        pattern: the layer's present one.
    Raises:
        ValueError: units to grow that the matrix does not have, that stay active, or that do not ascend.
    """
    exchanged = exchanged_units(pattern, drop, grown)
    layer.values.grad = None
    for owner in (layer, *companions):
        for tensor in per_unit_tensors(optimizer if owner is layer else None, owner.values):
            move_units(tensor, exchanged.move)
        owner.set_pattern(exchanged.pattern)
    return exchanged


def exchanged_units(pattern: Pattern, drop: Tensor, grown: Tensor) -> Exchanged:
    """What `exchange` leads to; raises as it does. A gather over the units, and searches for what goes and comes."""
    _check_grown(grown, pattern)
    before, newborn = grown, grown  # active units before each newborn
    if grown.numel():
        active = pattern.unit_indices()
        before = num_below(active, grown)
        held = active[before.clamp(max=active.numel() - 1)] == grown if active.numel() else grown < 0
        if bool(held.any()):
            back = before[held]
            if not bool(contains(drop, back).all()):
                raise ValueError("units to grow must not be active, unless they are dropped: `choose` gave others")
            drop = drop[~contains(back, drop)]
            newborn, before = grown[~held], before[~held]
    stays = torch.ones(pattern.num_units, dtype=torch.bool, device=drop.device)
    stays[drop] = False
    survivors = positions(stays)
    # A newborn's place is its rank among newborns plus the survivors before it; so are the pointers of rows.
    born = before - num_below(drop, before) + torch.arange(newborn.numel(), device=drop.device)
    rows = torch.arange(pattern.num_unit_rows + 1, device=drop.device)
    crow = pattern.crow_indices - torch.searchsorted(drop, pattern.crow_indices.long())
    crow += torch.searchsorted(newborn, rows * pattern.num_unit_cols)
    source = survivors
    if newborn.numel():
        survives = torch.ones(survivors.numel() + newborn.numel(), dtype=torch.bool, device=drop.device)
        survives[born] = False
        source = put(survivors, survives)
    move = Move(source, born, drop)
    cols = moved_units(pattern.col_indices, move)
    cols[born] = (newborn % max(pattern.num_unit_cols, 1)).int()
    return Exchanged(Pattern.trusted(crow.int(), cols, pattern.shape, pattern.block), newborn, move)


def _check_grown(grown: Tensor, pattern: Pattern) -> None:
    num_all = pattern.num_unit_rows * pattern.num_unit_cols
    if grown.numel() and (int(grown[0]) < 0 or int(grown[-1]) >= num_all or bool((grown[1:] <= grown[:-1]).any())):
        raise ValueError(f"units to grow must ascend and lie in [0, {num_all}): `choose` gave others")


class BeforeChange:
    """What a layer was when the last backward pass saw it, while a change of density and a rewire follow it (2.8).

    The backward pass kept scores and a gradient for that pattern, and the rewire is of another one.
    """

    def __init__(self, pattern: Pattern, gradient: Tensor | None, exchanged: Exchanged) -> None:
        self._pattern, self._gradient, self._change = pattern, gradient, exchanged

    @property
    def index(self) -> Index:
        """Of the pattern that it was."""
        return Index.of(self._pattern)

    @property
    def gradient(self) -> Tensor | None:
        """Of the units that are active now; 0 of those that were not."""
        return None if self._gradient is None else moved_units(self._gradient, self._change.move)

    @property
    def newborn(self) -> Tensor | None:
        """(K,) boolean, units that are active now and were not; None: there are none."""
        move = self._change.move
        if not move.born.numel():
            return None
        born = torch.zeros(move.source.numel(), dtype=torch.bool, device=move.source.device)
        born[move.born] = True
        return born

    @property
    def num_barred(self) -> int:
        """How many units were active and are not now."""
        return self._change.move.gone.numel()

    @property
    def barred(self) -> Tensor:
        """These units, ascending."""
        return self._pattern.unit_indices()[self._change.move.gone]

    def candidates(self, seen: Scored) -> Scored:
        """What may grow now.

        Args:
            seen: what was found of the pattern as it was, but `active`, the units that exist now.
        """
        units, scores = seen.units, seen.scores
        if self._change.newborn.numel():
            free = ~contains(self._change.newborn, units)
            units, scores = units[free], scores[free]
        if seen.returning is None:
            return Scored(seen.active, units, scores, None)
        units = torch.cat([units, self.barred])
        scores = torch.cat([scores, seen.returning[self._change.move.gone].to(scores)])
        # Units born at this step are not dropped at it, so no one asks for their score.
        return Scored(seen.active, units, scores, moved_units(seen.returning, self._change.move))
