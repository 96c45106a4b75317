"""When an optimizer step counts: once, and only if it was applied (rewiring rule 4.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class StepHooks:
    """Calls back after every applied step of an optimizer, until `remove`."""

    def __init__(self, optimizer: Optimizer, applied: Callable[[], None]) -> None:
        self._applied = applied
        self._inside = 0
        # On the optimizer, whose copies leave hooks behind; modules' copies would take the engine along.
        before, after = optimizer.register_step_pre_hook, optimizer.register_step_post_hook
        eager: Any = torch.compiler.disable  # a compiled optimizer step must not trace the engine
        self._hooks = [before(eager(self._before)), after(eager(self._after))]

    def remove(self) -> None:
        """Call back no more."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, optimizer: Optimizer, *_: object) -> None:
        """Torch runs the hooks for every class on the way whose `step` it wrapped, so twice where a subclass calls
        `super().step()`: only the outermost is a step.
        """
        wrapped = sum(getattr(vars(base).get("step"), "hooked", False) for base in type(optimizer).__mro__)
        self._inside = self._inside + 1 if wrapped > 1 else 1  # a step that raised must not count for ever

    def _after(self, optimizer: Optimizer, *_: object) -> None:
        """Fused optimizers run this even for a step that AMP's scaler had them skip."""
        self._inside -= 1
        found_inf = getattr(optimizer, "found_inf", None)
        if not self._inside and (found_inf is None or not bool(found_inf)):
            self._applied()
