"""Whole training steps of a GPT: forward, loss, backward, clipping, optimizer; dense and sparse in the same rounds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rarefy.bench.contender import Contender, rows, time_in_turn
from rarefy.bench.layers import compiled, layer_compiled
from rarefy.bench.results import DENSE, Row
from rarefy.bench.settings import Pair, Settings, gpt_config
from rarefy.convert import sparsify
from rarefy.cost import Lap, Precision, dense_precisions, working_in
from rarefy.methods import Static
from rarefy.models import GPT
from rarefy.models.gpt import VOCABULARY
from rarefy.nn import SparseLayer
from rarefy.optim import AdamW, param_groups
from rarefy.plan import Plan
from rarefy.recipes.text.networks import flops_per_token, text_loss

CLIP, LEARNING_RATE = 1.0, 1e-4

CPU = torch.device("cpu")

GPU_PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
"""In which the dense network is timed on a GPU."""


def bench_gpt(
    size: Pair,
    settings: Settings,
    kernels: Mapping[Pair, str],
    notes: list[str],
    *,
    budget_s: float,
    device: torch.device = CPU,
) -> list[Row]:
    """Rows of a GPT. Memory: one dense network with its optimizer, and a sparse one for each density and block; the
    dtypes share them.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (settings.step_tokens // settings.context, settings.context)
    inputs, targets = (torch.randint(0, VOCABULARY, shape, generator=generator).to(device) for _ in range(2))
    config = gpt_config(*size, settings.context)

    def network() -> GPT:
        return GPT(config, torch.Generator().manual_seed(0)).to(device)

    model = network()
    optimizer = torch.optim.AdamW(param_groups(model, lr=LEARNING_RATE, weight_decay=0.1), fused=True)
    precisions = dense_precisions() if device.type == "cpu" else GPU_PRECISIONS
    steps = {dtype: TrainingStep(model, optimizer, inputs, targets, dtype) for dtype in precisions}
    flops = flops_per_token(model) * settings.step_tokens
    contenders = [
        Contender(name=DENSE, dtype=dtype, kernels="torch", laps=step.laps(), flops=flops)
        for dtype, step in steps.items()
    ]
    if settings.compiled:
        torch.compiler.reset()
    for dtype in precisions if settings.compiled else ():
        step = compiled(
            lambda dtype=dtype: TrainingStep(layer_compiled(model), optimizer, inputs, targets, dtype), notes
        )
        if step is not None:
            contenders.append(
                Contender(name=DENSE, dtype=dtype, compiled=True, kernels="torch", laps=step.laps(), flops=flops)
            )
    for block in settings.blocks:
        for density in settings.densities:
            sparse = network()
            plan = Plan(density=density, block=block, method=Static(), keep_dense=("head",))
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="no layer became sparse")  # a note will say so
                rewirer = sparsify(sparse, plan)
            left = [name for name in rewirer.left_dense if name != "head"]
            if left:
                notes.append(f"GPT {size[0]}x{size[1]}, {block[0]}x{block[1]}: left dense: {', '.join(left)}")
            if density_of(sparse) == 1.0 and density < 1.0:
                continue
            own = AdamW(param_groups(sparse, lr=LEARNING_RATE, weight_decay=0.1))
            rewirer.attach(own, total_steps=1_000_000)
            for dtype in settings.dtypes:
                step = TrainingStep(sparse, own, inputs, targets, dtype)
                contenders.append(
                    Contender(
                        name="rarefy",
                        dtype=dtype,
                        kernels=kernels[block],
                        density=density_of(sparse),
                        block=block,
                        laps=step.laps(),
                        flops=flops_per_token(sparse) * settings.step_tokens,
                    )
                )
                steps[f"{block} {density} {dtype}"] = step
    times = time_in_turn(contenders, budget_s=budget_s, rounds=settings.rounds)
    if not all(math.isfinite(step.loss) for step in steps.values()):
        notes.append(f"GPT {size[0]}x{size[1]}: a loss is no number any more; its times may not be those of a real one")
    return rows("gpt", size, settings.step_tokens, contenders, times)


def density_of(model: nn.Module) -> float:
    """Of the sparse layers together."""
    layers = [module for module in model.modules() if isinstance(module, SparseLayer)]
    entries = sum(layer.out_features * layer.in_features for layer in layers)
    return sum(layer.values.numel() for layer in layers) / entries if entries else 1.0


def waited_for(device: torch.device, lap: Lap) -> Lap:
    """The lap, and what it left an accelerator to do."""
    if device.type == "cpu":
        return lap

    def whole() -> None:
        lap()
        torch.accelerator.synchronize(device)

    return whole


class TrainingStep:
    """A step of training in three laps. Data stay the same; weights move on from step to step."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor, dtype: Precision
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.dtype: Precision = dtype
        self.inputs, self.targets = inputs, targets
        self.loss = 0.0
        """Of the last step, in nats."""
        self._loss: Tensor | None = None

    def forward(self) -> None:
        """The loss, to be remembered for `backward`."""
        with working_in(self.dtype, device=self.inputs.device.type):
            self._loss = self.objective()

    def objective(self) -> Tensor:
        """The loss of a forward pass."""
        return text_loss(self.model, self.inputs, self.targets)

    def backward(self) -> None:
        """The gradients; those of the step before are given back first."""
        assert self._loss is not None
        self.optimizer.zero_grad(set_to_none=True)
        with working_in(self.dtype, autocast=False):
            self._loss.backward()
        self.loss, self._loss = float(self._loss.detach()), None

    def update(self) -> None:
        """Clip and step."""
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()

    def laps(self) -> dict[str, Lap]:
        """By the names of `rarefy.bench.contender.COUNTED`; on a GPU each ends when its work is done."""
        laps = {"forward": self.forward, "backward": self.backward, "optimizer": self.update}
        return {name: waited_for(self.inputs.device, lap) for name, lap in laps.items()}

    def __call__(self) -> None:
        self.forward()
        self.backward()
        self.update()
