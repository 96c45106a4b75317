"""A device that says it is not the CPU, and holds its numbers there: whoever mixes both up is told, as on a GPU.

Importing this gives torch a device type "pretend" for the rest of the process, so tests run it in one of their own. As
a script it trains a small network there with every method and growth signal, and exits with 1 unless all ends as on
the CPU, bit for bit.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

OPERATORS: dict[str, Callable[..., Any]] = {}
"""The package's own, by name: they run on these tensors themselves, not on what they hold."""

_register = torch.library.impl


def _recording(name: Any, key: Any, *rest: Any, **more: Any) -> Any:
    if isinstance(name, str) and name.startswith("rarefy::") and rest:
        OPERATORS[name.removeprefix("rarefy::")] = rest[0]
    return _register(name, key, *rest, **more)


torch.library.impl = _recording
import rarefy  # noqa: E402
from rarefy import growth  # noqa: E402
from rarefy.ops import using  # noqa: E402

_setup_privateuseone_for_python_backend("pretend")
DEVICE = torch.device("pretend", 0)
COPIES = ("copy_", "_to_copy")
INDEXING = ("index", "index_put_", "_index_put_impl_")
"""What torch lets positions on the CPU into."""


class Elsewhere(Tensor):
    """A tensor of that device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    def tolist(self) -> Any:
        return self.held.tolist()

    @property
    def data(self) -> Tensor:
        return torch._C.TensorBase.data.__get__(self)  # pyright: ignore[reportAttributeAccessIssue]

    @data.setter
    def data(self, other: Elsewhere) -> None:
        torch._C.TensorBase.data.__set__(self, other)  # pyright: ignore[reportAttributeAccessIssue]
        self.held = other.held

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), func.overloadpacket.__name__
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        foreign = [each for each in given if not isinstance(each, Elsewhere) and each.dim()]
        if func.namespace == "rarefy":  # sinks are on the CPU wherever the layer is
            foreign = [each for each in foreign if each.dtype != torch.int64 or each.shape != (2,)]
        if name in INDEXING:
            foreign = [each for each in foreign if each.dtype not in (torch.int64, torch.bool)]
        if foreign and name not in COPIES:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, found pretend:0 and cpu")
        if func.namespace == "rarefy":
            return OPERATORS[name](*args, **kwargs)
        to = kwargs.get("device")
        if to is not None:
            kwargs["device"] = torch.device("cpu")
        out = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        if name == "copy_":
            return args[0]
        if name in ("_local_scalar_dense", "equal") or (to is not None and torch.device(to).type == "cpu"):
            return out
        known = {id(each.held): each for each in given if isinstance(each, Elsewhere)}

        def there(each: Any) -> Any:
            if not isinstance(each, Tensor):
                return each
            return known[id(each)] if id(each) in known else Elsewhere(each)

        return tree_map(there, out)


def _held(each: Any) -> Any:
    return each.held if isinstance(each, Elsewhere) else each


def _copied(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _held(target).copy_(_held(source))
    return target


def _maker(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(*args: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return Elsewhere(make(*args, dtype=dtype))

    return made


LIBRARY = torch.library.Library("aten", "IMPL")
LIBRARY.impl("empty.memory_format", _maker(torch.empty), "PrivateUse1")
LIBRARY.impl("empty_strided", _maker(torch.empty_strided), "PrivateUse1")
LIBRARY.impl("_copy_from", _copied, "PrivateUse1")
for overload in ("arange", "arange.start", "arange.start_step"):
    LIBRARY.impl(overload, _maker(torch.arange), "PrivateUse1")


def moved(model: nn.Module) -> nn.Module:
    """The model there, as `model.cuda()` would have it."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not isinstance(parameter, Elsewhere):
                module._parameters[name] = nn.Parameter(Elsewhere(parameter.detach().clone()))
        for name, buffer in module._buffers.items():
            if buffer is not None and name != "sink":
                module._buffers[name] = Elsewhere(buffer.clone())
    return model


def trained(plan: rarefy.Plan, *, there: bool, before: bool = True, ours: bool = True, steps: int = 25) -> nn.Module:
    """A small network after so many steps.

    Args:
        before: moved before it is made sparse, else after.
        ours: trained by `rarefy.AdamW`, else by torch's.
    """
    torch.manual_seed(0)
    layers = [nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)]
    model: nn.Module = nn.Sequential(*layers)
    if there and before:
        moved(model)
    rewirer = rarefy.sparsify(model, plan)
    if there and not before:
        moved(model)
    optimizer = (rarefy.AdamW if ours else torch.optim.AdamW)(model.parameters(), lr=1e-2)
    rewirer.attach(optimizer, total_steps=steps)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x, y = torch.randn(16, 32, generator=generator), torch.randint(0, 8, (16,), generator=generator)
        if there:
            x, y = Elsewhere(x), Elsewhere(y)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def check(plan: rarefy.Plan, *, before: bool, ours: bool) -> str:
    """What went wrong; empty: nothing."""
    here, there = (trained(plan, there=there, before=before, ours=ours) for there in (False, True))
    mine, theirs = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (here, there))
    left = [name for name, each in theirs.items() if not isinstance(each, Elsewhere) and not name.endswith("sink")]
    other = [name for name in mine if name not in left and not torch.equal(mine[name], _held(theirs[name]))]
    return "; ".join([*(f"{name} is on the CPU" for name in left), *(f"{name} differs" for name in other)])


def main() -> int:
    warnings.simplefilter("ignore")
    kinds = (rarefy.SET, rarefy.MEST, rarefy.SRigL, rarefy.GraNet, rarefy.GMP, rarefy.CHT, rarefy.CHTs)
    methods = [rarefy.Static(), *(kind(interval=5) for kind in kinds)]
    signals = (growth.Exact(), growth.Momentum(), growth.NormProduct(), growth.SampledTokens())
    methods += [rarefy.RigL(interval=5, signal=signal) for signal in signals]
    failed = 0
    with using("tiled"):  # what runs on a GPU where there is no kernel
        for method in methods:
            for block, before, ours in ((1, True, True), ((4, 1), False, True), (4, True, False)):
                plan = rarefy.Plan(density=0.3, block=block, method=method, keep_dense=("4",))
                try:
                    wrong = check(plan, before=before, ours=ours)
                except RuntimeError as error:
                    wrong = str(error)
                failed += bool(wrong)
                name = f"{type(method).__name__} by {type(method.signal).__name__}, block {block}"
                print(f"{name}: {wrong or 'as on the CPU'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
