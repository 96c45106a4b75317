"""What tests of rewiring share: layers with a chosen gradient, optimizers, a check of what a rewire may change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import rarefy
from rarefy import Method, Pattern, Rewirer, SparseLinear
from rarefy.nn import SparseLayer


class Hoard(Optimizer):
    """Made up here, so that no one can have foreseen its state: tensors of many kinds, nested, and scalars and text."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["count"], state["label"], state["nothing"] = 0, "made up", None
                    state["single"] = torch.zeros(1, dtype=torch.float64)
                    state["slow"] = torch.zeros_like(p)
                    state["per unit"] = torch.zeros(p.shape[:1], dtype=torch.float64)
                    state["age"] = torch.zeros(p.shape[:1], dtype=torch.int64)
                    state["nested"] = {
                        "history": [torch.zeros(*p.shape[:1], 3), "two"],
                        "deep": ({"x": torch.zeros_like(p)},),
                    }
                    state["the same again"] = state["slow"]
                state["step"] += 1
                state["count"] += 1
                state["single"] += 1
                state["age"] += 1
                state["slow"].lerp_(p.grad, 0.5)
                flat = p.grad.reshape(p.shape[0], -1) if p.numel() else p.grad.new_zeros(p.shape[0], 1)
                state["per unit"] += flat.double().sum(dim=1) + 1
                past = state["nested"]["history"][0]
                past.copy_(past.roll(1, dims=1))
                past[:, 0] = flat.mean(dim=1)
                state["nested"]["deep"][0]["x"].add_(p.grad).mul_(1.5)
                p.add_(state["slow"], alpha=-group["lr"])


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "AdamW-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "AdamW-amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True, foreach=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "rarefy.AdamW": lambda p: rarefy.AdamW(p, lr=0.01),
    "Hoard": Hoard,
}


def state_tensors(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of an optimizer's state for one parameter, however deep."""
    for key, item in state.items():
        if isinstance(item, Tensor):
            yield f"{prefix}{key}", item
        elif isinstance(item, Mapping):
            yield from state_tensors(item, f"{prefix}{key}.")
        elif isinstance(item, list | tuple):
            yield from state_tensors(dict(enumerate(item)), f"{prefix}{key}.")  # type: ignore[arg-type]


def bits(tensor: Tensor) -> Tensor:
    """The same bytes as integers, so that -0.0 is not 0.0 and NaN is itself."""
    return tensor.detach().reshape(-1).clone().view(torch.uint8)


def rows_of(tensor: Tensor, num_units: int) -> np.ndarray:
    """(num_units, bytes of a row)."""
    return bits(tensor).numpy().reshape(num_units, -1) if tensor.numel() else np.empty((num_units, 0), np.uint8)


@dataclass
class Snapshot:
    """All that one layer and its optimizer hold."""

    pattern: Pattern
    units: np.ndarray
    rows: dict[str, np.ndarray]
    """Tensors with one row a unit, values among them, as bytes."""
    rest: dict[str, Tensor]
    """Everything else, as bytes."""
    values: nn.Parameter


def snapshot(layer: SparseLayer, optimizer: Optimizer) -> Snapshot:
    k = layer.num_units
    rows, rest = {"values": rows_of(layer.values, k)}, {}
    for name, tensor in state_tensors(optimizer.state.get(layer.values, {})):
        if tensor.dim() and tensor.shape[0] == k:
            rows[name] = rows_of(tensor, k)
        else:
            rest[name] = bits(tensor)
    if layer.bias is not None:
        rest["bias"] = bits(layer.bias)
        for name, tensor in state_tensors(optimizer.state.get(layer.bias, {})):
            rest[f"bias.{name}"] = bits(tensor)
        if layer.bias.grad is not None:
            rest["bias.grad"] = bits(layer.bias.grad)
    pattern = layer.pattern
    return Snapshot(pattern, pattern.unit_indices().numpy(), rows, rest, layer.values)


def check_index(layer: SparseLayer) -> None:
    """Exact count, sorted, unique, in range, pointers right, and the transposed index that of the pattern."""
    crow, cols, t_crow, t_rows, t_perm = (array.numpy().astype(np.int64) for array in layer.index[:5])
    num_rows, num_cols = layer.out_features // layer.block[0], layer.in_features // layer.block[1]
    assert crow.shape == (num_rows + 1,) and t_crow.shape == (num_cols + 1,) and crow[0] == t_crow[0] == 0
    assert crow[-1] == t_crow[-1] == len(cols) == layer.num_units == len(layer.values)
    counts = np.diff(crow)
    assert (counts >= 0).all() and ((cols >= 0) & (cols < num_cols)).all()
    rows = np.repeat(np.arange(num_rows), counts)
    assert (np.diff(rows * num_cols + cols) > 0).all()
    if layer.compute == "dense":
        assert len(t_rows) == len(t_perm) == 0
    else:
        order = np.lexsort((rows, cols))
        assert (t_perm == order).all() and (t_rows == rows[order]).all()
    assert (np.diff(t_crow) == np.bincount(cols, minlength=num_cols)).all()


def check_nothing_changed(before: Snapshot, layer: SparseLayer, optimizer: Optimizer) -> None:
    after = snapshot(layer, optimizer)
    assert after.pattern == before.pattern and after.values is before.values
    assert before.rows.keys() == after.rows.keys() and before.rest.keys() == after.rest.keys()
    assert all(np.array_equal(before.rows[name], after.rows[name]) for name in before.rows)
    assert all(torch.equal(before.rest[name], after.rest[name]) for name in before.rest)


def check_rewire(
    before: Snapshot, layer: SparseLayer, optimizer: Optimizer, *, keeps_counts: bool = True
) -> tuple[list[int], list[int]]:
    """Every invariant of a rewire; returns the units that went and those that came."""
    check_index(layer)
    after = snapshot(layer, optimizer)
    assert after.values is before.values, "the parameter object stays the same one"
    assert layer.values.grad is None
    assert after.rest.keys() == before.rest.keys()
    for name, old in before.rest.items():
        assert torch.equal(old, after.rest[name]), f"{name} changed, and is not of the units"
    assert len(after.units) == layer.num_units
    assert not keeps_counts or len(before.units) == layer.num_units
    old_stays, new_stays = np.isin(before.units, after.units), np.isin(after.units, before.units)
    assert after.rows.keys() == before.rows.keys()
    for name, old in before.rows.items():
        new = after.rows[name]
        assert np.array_equal(old[old_stays], new[new_stays]), f"{name} of a survivor changed"
        assert not new[~new_stays].any(), f"{name} of a newborn is not zero"
    return before.units[~old_stays].tolist(), after.units[~new_stays].tolist()


def layer_of(active: Mapping[int, float], shape: tuple[int, int], block: tuple[int, int] = (1, 1)) -> SparseLinear:
    """A layer without bias whose unit u is full of active[u]; `shape` is in units."""
    size = (shape[0] * block[0], shape[1] * block[1])
    layer = SparseLinear.from_pattern(Pattern.from_units(torch.tensor(list(active)), size, block), bias=False)
    with torch.no_grad():
        values = torch.tensor([active[unit] for unit in sorted(active)])
        layer.values.copy_(values.view(-1, *[1] * (layer.values.dim() - 1)).expand_as(layer.values))
    return layer


def values_of(layer: SparseLayer) -> dict[int, float]:
    """Unit -> its first entry."""
    first = layer.values.detach().reshape(layer.num_units, -1)[:, 0]
    return dict(zip(layer.pattern.unit_indices().tolist(), first.tolist(), strict=True))


def fit(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Give the sparse layers the sizes and patterns that a state dict of theirs has."""
    for name, layer in model.named_modules():
        if isinstance(layer, SparseLinear):
            layer.values.data = torch.empty_like(state[f"{name}.values"])
            crow, cols = (state[f"{name}.{array}"].to(torch.int32) for array in ("crow_indices", "col_indices"))
            layer.set_pattern(Pattern(crow, cols, (layer.out_features, layer.in_features), layer.block))


def units_of(layer: SparseLayer) -> list[int]:
    return layer.pattern.unit_indices().tolist()


def push(layer: SparseLayer, gradient: Tensor) -> None:
    """Backward such that the dense weight's gradient is exactly `gradient`, (O, I) or one entry a unit."""
    if gradient.numel() != layer.out_features * layer.in_features:
        grid = gradient.reshape(layer.out_features // layer.block[0], -1)
        gradient = grid.repeat_interleave(layer.block[0], 0).repeat_interleave(layer.block[1], 1)
    gradient = gradient.reshape(layer.out_features, layer.in_features).to(layer.values.dtype)
    x = torch.eye(layer.in_features, dtype=gradient.dtype)
    (layer(x) * gradient.T).sum().backward()


def engine(
    layers: SparseLayer | Mapping[str, SparseLayer],
    method: Method,
    optimizer: Callable[[Any], Optimizer] | None = None,
    *,
    total_steps: int | None = None,
    seed: int = 0,
    hook: bool = True,
) -> tuple[Rewirer, Optimizer]:
    """An engine attached to an optimizer of all the layers' parameters; by default SGD that moves nothing."""
    named = {"layer": layers} if isinstance(layers, SparseLayer) else dict(layers)
    parameters = [p for layer in named.values() for p in layer.parameters()]
    made = torch.optim.SGD(parameters, lr=0.0) if optimizer is None else optimizer(parameters)
    return Rewirer(named, method, seed=seed).attach(made, total_steps=total_steps, hook=hook), made


def step(optimizer: Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad()
