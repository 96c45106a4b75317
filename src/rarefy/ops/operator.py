"""The operators of this package: how torch knows them, and how the package itself calls them.

Each is registered with torch, under `torch.ops.rarefy`: the compiler, modes, tracers and profilers see it there. For an
operator in Python the way through torch's dispatcher and its generic autograd costs as much as a small product, every
time (docs/log.md). So `operators.NAME(...)` takes it only where someone is watching; in plain eager execution it runs
the very same functions, forward and backward, in a `torch.autograd.Function`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import NoneType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

operators = SimpleNamespace()
"""By name; called with the schema's arguments by position, all of them where the operator has a gradient."""

_ORDINARY = frozenset((Tensor, nn.Parameter, NoneType, bool, int, float, str, list, tuple, torch.dtype))
"""Types of arguments that nobody has overridden: a subclass of Tensor wants to see the operator."""


def implement(
    name: str,
    run: Callable[..., Any],
    gradient: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> None:
    """Let `run` be the operator on every device, as the choice between implementations depends on more than that.

    Args:
        gradient: (ctx, gradients of the results) -> one gradient or None for each argument; None: it has none.
        setup_context: (ctx, arguments, results); the arguments of the schema, all of them.
    """
    torch.library.impl(f"rarefy::{name}", "CompositeExplicitAutograd", run)
    differentiable = run
    if gradient is not None and setup_context is not None:
        torch.library.register_autograd(f"rarefy::{name}", gradient, setup_context=setup_context)
        differentiable = _function(name, run, gradient, setup_context).apply
    dispatched = getattr(torch.ops.rarefy, name)

    def call(*arguments):
        if torch.compiler.is_compiling() or _observed(arguments):
            return dispatched(*arguments)
        return differentiable(*arguments) if torch.is_grad_enabled() else run(*arguments)

    setattr(operators, name, call)


def _function(
    name: str, run: Callable[..., Any], gradient: Callable[..., Any], setup_context: Callable[..., None]
) -> type[torch.autograd.Function]:
    def forward(ctx, *arguments):
        results = run(*arguments)
        setup_context(ctx, arguments, results)
        return results

    # Not by Function.setup_context: with it every call looks at the signature of forward.
    methods = {"forward": staticmethod(forward), "backward": staticmethod(gradient)}
    return type(name.title().replace("_", ""), (torch.autograd.Function,), methods)


def _observed(arguments: Sequence[Any]) -> bool:
    """Whether anyone but autograd wants to know of a call: a mode, a transform, a tracer, a profiler, a subclass.

    Meta tensors go the same way, as they have no numbers.
    """
    c = torch._C
    return bool(
        c._len_torch_dispatch_stack()
        or c._is_torch_function_mode_enabled()
        or c._are_functorch_transforms_active()
        or c._get_tracing_state()
        or c._autograd._profiler_enabled()  # pyright: ignore[reportAttributeAccessIssue]
        or not _ORDINARY.issuperset(map(type, arguments))
        or arguments[0].is_meta  # the first is a tensor of each operator
    )
