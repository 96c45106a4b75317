"""One network in training: model, optimizer, engine if it is sparse, and a clock of its own training time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rarefy.nn import SparseLowRank
from rarefy.rewiring import Rewirer
from rarefy.sampling import keyed_generator

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Model, inputs, targets -> mean loss, a scalar."""

Assess = Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]]
"""Model, inputs, targets -> means over the targets by name, "loss" among them."""


NORM_EPS = 1e-6
"""What torch adds to a norm before it divides by it."""


class StepData(Protocol):
    """What a step trains on follows from the step alone: see `rarefy.training.batches.Batches`."""

    def at(self, step: int, micro: int = 0) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step's micro-batch."""
        ...


@dataclass
class Clock:
    """Seconds of training so far, by part. Evaluation and checkpoints are not training."""

    data_s: float = 0.0
    forward_s: float = 0.0
    backward_s: float = 0.0
    """Gradients, the scan for growth candidates included."""
    optimizer_s: float = 0.0
    """Clipping and the update."""
    rewire_s: float = 0.0

    @property
    def train_s(self) -> float:
        """All parts together."""
        return self.data_s + self.forward_s + self.backward_s + self.optimizer_s + self.rewire_s

    def parts(self) -> dict[str, float]:
        """Name -> seconds."""
        return asdict(self)

    @contextmanager
    def counting(self, part: str, device: torch.device) -> Iterator[None]:
        """Add the time of the block to one part; on an accelerator, after its work is done."""
        started = time.perf_counter()
        yield
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        setattr(self, part, getattr(self, part) + time.perf_counter() - started)


@dataclass(frozen=True)
class StepResult:
    """What a training step reports."""

    loss: float
    """Mean over micro-batches, before the update, in nats."""
    grad_norm: float
    """Of all gradients together, before clipping."""
    churn: float
    """Units changed over units of the layers that rewired after this step; 0 when none did."""
    rewires: list[dict[str, Any]]
    """The engine's records of this step."""
    guards: list[dict[str, Any]] = field(default_factory=list)
    """What the engine's guards said since the last step (`Rewirer.warnings`); of the first step, since the start."""


class Diverged(ValueError):
    """The loss or the gradient is not a number any more."""


class Twin:
    """A network in training.

    Args:
        name: "sparse" or "dense", or whatever a run calls it.
        model, optimizer: of each group, "lr" at the time of the call is its full rate; `step` scales it.
        rewirer: attached to the optimizer; None for a dense network.
        loss: how far the model is off.
        assess: what an evaluation reports; None: the loss alone.
        seed: of whatever the model draws while it trains (dropout): each step draws from its own seed, so that a
            resumed run and a network trained alone see the same.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        optimizer: Optimizer,
        rewirer: Rewirer | None,
        loss: Loss,
        *,
        assess: Assess | None = None,
        seed: int = 0,
    ) -> None:
        self.name = name
        self.model = model
        self.optimizer = optimizer
        self.rewirer = rewirer
        self.loss = loss
        self._assess = assess if assess is not None else lambda *batch: {"loss": loss(*batch)}
        self.seed = seed
        self.step = 0
        """Optimizer steps applied."""
        self.flops = 0
        """Of training so far, as the loop counts them; they follow the weights that exist at each step."""
        self.clock = Clock()
        self.assessed: dict[str, float] = {}
        """What the last evaluation found; empty before the first."""
        self.rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.device = next(model.parameters()).device

    @property
    def density(self) -> float:
        """Of the sparse layers together, with what they have of low rank; 1 without any."""
        layers = list(self.rewirer.layers.values()) if self.rewirer else []
        entries = sum(layer.out_features * layer.in_features for layer in layers)
        weights = sum(layer.values.numel() for layer in layers)
        weights += sum(m.a.numel() + m.b.numel() for m in self.model.modules() if isinstance(m, SparseLowRank))
        return weights / entries if entries else 1.0

    def train_step(self, data: StepData, *, rate: float = 1.0, accumulate: int = 1, clip: float = 0.0) -> StepResult:
        """One optimizer step on the data of the step after `self.step`.

        Args:
            rate: factor on the learning rates.
            accumulate: micro-batches whose gradients are averaged.
            clip: largest norm of all gradients together; 0: not clipped.
        Raises:
            Diverged: the loss or the gradient is not finite. Parameters and optimizer state are as before the step.
        """
        step, device, total = self.step + 1, self.device, 0.0
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        for micro in range(accumulate):
            with self.clock.counting("data_s", device):
                inputs, targets = (part.to(device) for part in data.at(step, micro))
                torch.manual_seed(int(keyed_generator(self.seed, "step", step, micro).integers(2**62)))
            with self.clock.counting("forward_s", device):
                loss = self.loss(self.model, inputs, targets) / accumulate
                total += loss.item()
            with self.clock.counting("backward_s", device):
                loss.backward()
        with self.clock.counting("optimizer_s", device):
            grad_norm = self._clip(clip)
            for group, full in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = full * rate
            self._check_finite(total, grad_norm, step)
            known = len(self.rewirer.history) if self.rewirer else 0
            said = len(self.rewirer.warnings) if self.rewirer and self.step else 0
            if self.rewirer:
                self.rewirer.observe(total)
            self.optimizer.step()
        guards = self.rewirer.warnings[said:] if self.rewirer else []
        rewires = self.rewirer.history[known:] if self.rewirer else []
        rewire_s = sum(record["seconds"] for record in rewires)  # the engine works inside the optimizer's hook
        self.clock.optimizer_s -= rewire_s
        self.clock.rewire_s += rewire_s
        self.step = step
        swaps = [record for record in rewires if record["kind"] == "rewire"]
        units = sum(record["num_units"] for record in swaps)
        churn = sum(record["changed"] for record in swaps) / units if units else 0.0
        return StepResult(total, grad_norm, churn, rewires, guards)

    def _clip(self, most: float) -> float:
        """The norm of all gradients together; where it is above `most` (0: none), they are scaled down to it."""
        parameters = list(self.model.parameters())
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if 0 < most < float(norm) + NORM_EPS:  # else its factor is 1, and a pass over all gradients is spared
            nn.utils.clip_grads_with_norm_(parameters, most, norm)
        return float(norm)

    def _check_finite(self, loss: float, grad_norm: float, step: int) -> None:
        for what, value in (("loss", loss), ("gradient", grad_norm)):
            if not math.isfinite(value):
                self.optimizer.zero_grad(set_to_none=True)
                raise Diverged(f"the {what} of the {self.name} network is {value} at step {step:,}")

    def evaluate(self, windows: Iterable[tuple[Tensor, Tensor]]) -> float:
        """Mean loss over the windows, each target counting alike. The clock stands still."""
        return self.assess(windows)["loss"]

    @torch.no_grad()
    def assess(self, windows: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """As `evaluate`, all that this network is judged by: name -> mean."""
        self.model.eval()
        totals: dict[str, float] = {}
        count = 0
        for inputs, targets in windows:
            for name, mean in self._assess(self.model, inputs.to(self.device), targets.to(self.device)).items():
                totals[name] = totals.get(name, 0.0) + mean.item() * targets.numel()
            count += targets.numel()
        self.assessed = {name: total / count for name, total in totals.items()}
        return self.assessed

    def is_finite(self) -> bool:
        """Whether every parameter is a number."""
        return all(bool(torch.isfinite(p).all()) for p in self.model.parameters())
