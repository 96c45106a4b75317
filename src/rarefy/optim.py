"""AdamW whose newborns are treated as newborns, and the usual parameter groups."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rarefy.nn import SparseLayer
from rarefy.ops import adamw, backend
from rarefy.rounding import key_of, to_bfloat16
from rarefy.supar import SuPar


class AdamW(Optimizer):
    """AdamW (Loshchilov & Hutter 2019) with an age for every leading index of a parameter, so for every unit of a
    sparse layer.

    After a rewire a newborn's moments are zero. Plain AdamW corrects their bias by the step count of the whole
    tensor, which makes the first update up to (1 - beta1) / sqrt(1 - beta2), 3.2 times, too large; here the
    correction uses the unit's own age, and the update of a unit born after the first step ramps up over its first
    `ramp` steps (Xiao et al. 2026, arXiv:2606.00888). For parameters that never rewire this is AdamW.

    Args:
        params: parameters or groups, as for torch.optim.AdamW.
        lr, betas, eps, weight_decay: as for torch.optim.AdamW.
        ramp: steps over which a newborn's update grows to full size; 0: none.
    Raises:
        ValueError: a setting out of range.

    Parameters in bf16 are updated in fp32 and, with their moments, rounded stochastically (`rarefy.rounding`): rounded
    to the nearest, most of them would not move. In fp32 on the CPU a step is one kernel, on an NVIDIA GPU with triton
    one a parameter; nothing waits for a GPU.

    State per parameter: exp_avg, exp_avg_sq, one int32 age a leading index; 12 bytes a nonzero in fp32 for
    unstructured layers.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        ramp: int = 100,
    ) -> None:
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and ramp >= 0):
            raise ValueError(
                f"lr, eps, weight_decay and ramp must not be negative, got {lr}, {eps}, {weight_decay}, {ramp}"
            )
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must lie in [0, 1), got {betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "ramp": ramp})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient.

        Raises:
            ValueError: one of the gradients is a sparse tensor; nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = [(group, p) for group in self.param_groups for p in group["params"]]
        if any(p.grad is not None and p.grad.is_sparse for _, p in parameters):
            raise ValueError(
                "rarefy.AdamW takes dense gradients; a sparse layer's values have one, of the values' own shape"
            )
        tables: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
        together: list[adamw.Update] = []
        for ordinal, (group, p) in enumerate(parameters):
            if p.grad is not None:
                self._update(p, p.grad, group, ordinal, tables, together)
        if together:
            adamw.update(together)
            for one in together:  # written where autograd does not see it (rewiring rule 7.5)
                torch.autograd.graph.increment_version((one.p, one.average, one.square))
        return loss

    def _update(
        self,
        p: Tensor,
        grad: Tensor,
        group: dict[str, Any],
        ordinal: int,
        tables: dict[tuple[Any, ...], tuple[Tensor, Tensor]],
        together: list[adamw.Update],
    ) -> None:
        """Updates p, or puts it with those that a compiled kernel updates together."""
        state = self.state[p]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
            state["age"] = torch.zeros(p.shape[:1], dtype=torch.int32, device=p.device)
        state["step"] += 1
        stored = (p, state["exp_avg"], state["exp_avg_sq"])
        if _runs_cpu_kernel(stored):
            together.append(self._one_of_many(stored, grad, group, state, tables))
            return
        keys = [key_of(state["step"], ordinal, place) for place in range(3)]
        if _kernel(stored) is not None:
            self._update_by_kernel(stored, grad, group, state, keys, tables)
        elif p.dtype != torch.bfloat16:
            _update_in_place(*stored, grad, group, state)
        else:
            wide = (p.float(), state["exp_avg"].float(), state["exp_avg_sq"].float())
            _update_in_place(*wide, grad.float(), group, state)
            for tensor, exact, key in zip(stored, wide, keys, strict=True):
                tensor.copy_(to_bfloat16(exact, key))

    def _one_of_many(
        self,
        stored: tuple[Tensor, Tensor, Tensor],
        grad: Tensor,
        group: dict[str, Any],
        state: dict[str, Any],
        tables: dict[tuple[Any, ...], tuple[Tensor, Tensor]],
    ) -> adamw.Update:
        p, step, age = stored[0], state["step"], state["age"].add_(1)
        newborns = p.numel() > 0 and int(age.min()) != step
        key = (step, id(group), newborns)
        if key not in tables:
            tables[key] = _by_age(step, group, p.device, torch.float32, first=0 if newborns else step)
        return adamw.Update(p, grad, *stored[1:], age if newborns else None, tables[key], **_constants(group))

    def _update_by_kernel(
        self,
        stored: tuple[Tensor, Tensor, Tensor],
        grad: Tensor,
        group: dict[str, Any],
        state: dict[str, Any],
        keys: list[int],
        tables: dict[tuple[Any, ...], tuple[Tensor, Tensor]],
    ) -> None:
        p, kernel = stored[0], _kernel(stored)
        assert kernel is not None
        key = (state["step"], id(group), p.device)
        if key not in tables:
            tables[key] = _by_age(state["step"], group, p.device, torch.float32)
        kernel.update(
            p,
            grad,
            *stored[1:],
            state["age"].add_(1),
            tables[key],
            **_constants(group),
            keys=tuple(keys),
        )
        torch.autograd.graph.increment_version(stored)  # written where autograd does not see it (rewiring rule 7.5)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimizer's, but ages stay integers: torch casts all state to the parameter's dtype."""
        super().load_state_dict(state_dict)
        saved = [state_dict["state"].get(key, {}) for group in state_dict["param_groups"] for key in group["params"]]
        mine = [p for group in self.param_groups for p in group["params"]]
        for state, p in zip(saved, mine, strict=True):
            if "age" in state:
                self.state[p]["age"] = state["age"].to(p.device, torch.int32, copy=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("ramp", 100)


def _constants(group: dict[str, Any]) -> dict[str, Any]:
    """What a kernel is told of a step besides tensors and ages."""
    return {"decay": 1 - group["lr"] * group["weight_decay"], "betas": group["betas"], "eps": group["eps"]}


def _runs_cpu_kernel(tensors: tuple[Tensor, ...]) -> bool:
    """Whether the compiled kernel updates such a parameter and moments."""
    device = tensors[0].device
    return device.type == "cpu" and not backend.names_plain_torch() and adamw.loaded() and adamw.runs(*tensors)


def _kernel(tensors: tuple[Tensor, ...]) -> ModuleType | None:
    """The kernel that updates such a parameter and moments; None: plain torch does."""
    if not backend.runs_triton(tensors[0].device):
        return None
    kernel = importlib.import_module("rarefy.ops.triton.adamw")
    return kernel if kernel.runs(*tensors) else None


def _update_in_place(
    p: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, group: dict[str, Any], state: dict[str, Any]
) -> None:
    beta1, beta2 = group["betas"]
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    age = state["age"].add_(1)
    p.mul_(1 - group["lr"] * group["weight_decay"])
    if not p.dim() or not p.numel() or int(age.min()) == state["step"]:
        # No newborn, so one correction for all: torch's own arithmetic.
        scale1, scale2 = 1 - beta1 ** state["step"], (1 - beta2 ** state["step"]) ** 0.5
        denominator = (exp_avg_sq.sqrt() / scale2).add_(group["eps"])
        p.addcdiv_(exp_avg, denominator, value=-group["lr"] / scale1)
        return
    tables = _by_age(state["step"], group, p.device, p.dtype)
    size, root = (factor[age].view(-1, *[1] * (p.dim() - 1)) for factor in tables)
    denominator = exp_avg_sq.sqrt().mul_(root).add_(group["eps"])
    p.sub_((exp_avg / denominator).mul_(size))


def _by_age(
    step: int, group: dict[str, Any], device: torch.device, dtype: torch.dtype, *, first: int = 0
) -> tuple[Tensor, Tensor]:
    """Tables over age first .. step: the update's factor lr * ramp / (1 - beta1^age), and 1 / sqrt(1 - beta2^age).

    In float64, then `dtype`: a table of `step` entries is cheaper than powers of K ages.
    """
    beta1, beta2 = group["betas"]
    ages = torch.arange(first, step + 1, dtype=torch.float64, device=device).clamp(min=1)
    size = group["lr"] / (1 - beta1**ages)
    if group["ramp"]:
        size[:-1] *= (ages[:-1] / group["ramp"]).clamp(
            max=1
        )  # the last entry is for those that were there from the start
    return size.to(dtype), (1 - beta2**ages).rsqrt().to(dtype)


def param_groups(model: nn.Module, *, lr: float, weight_decay: float, mup: SuPar | None = None) -> list[dict[str, Any]]:
    """Groups for an optimizer: weights with decay, and biases, norms and embeddings without.

    Values of sparse layers are weights, though one-dimensional, so they decay; "decay if dim >= 2" recipes miss them.

    Args:
        model: after `sparsify`.
        lr, weight_decay: as for the optimizer; groups may be edited before it is made.
        mup: the base model whose rate `lr` is: then the weights of a linear layer that is m times as wide and dense
            have lr / m and weight_decay * m, a group for each m (rule 3.3; for Adam and its kin).
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    values = {id(m.values) for m in model.modules() if isinstance(m, SparseLayer)}
    trained = [p for p in model.parameters() if p.requires_grad]
    decays = [p for p in trained if id(p) in values or (p.dim() >= 2 and id(p) not in embeddings)]
    decayed = {id(p) for p in decays}
    spared = [p for p in trained if id(p) not in decayed]
    multipliers = {} if mup is None else _multipliers(model, mup)
    by_multiplier: dict[float, list[nn.Parameter]] = {}
    for p in decays:
        by_multiplier.setdefault(multipliers.get(id(p), 1.0), []).append(p)
    groups: list[dict[str, Any]] = [
        {"params": params, "lr": lr / multiplier, "weight_decay": weight_decay * multiplier}
        for multiplier, params in by_multiplier.items()
    ]
    groups.append({"params": spared, "lr": lr, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def _multipliers(model: nn.Module, mup: SuPar) -> dict[int, float]:
    """Of each linear layer's weights, by id."""
    return {
        id(layer.values if isinstance(layer, SparseLayer) else layer.weight): multiplier
        for _, layer, multiplier in mup.layers(model)
    }
