"""The two networks of a text run: the same draw of weights, one made sparse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from rarefy.convert import sparsify
from rarefy.models import GPT
from rarefy.nn import SparseLinear, SparseLowRank
from rarefy.optim import AdamW, param_groups
from rarefy.plan import Plan
from rarefy.recipes.text.settings import TextSettings
from rarefy.training.twin import Loss, Twin

SPARSE, DENSE = "sparse", "dense"


def text_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats a byte; inputs and targets (B, T) int64."""
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def bf16_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """The same under bf16 autocast."""
    with torch.autocast(inputs.device.type, torch.bfloat16):
        return text_loss(model, inputs, targets)


def _loss(settings: TextSettings) -> Loss:
    return bf16_loss if settings.precision == "bf16" else text_loss


def make_model(settings: TextSettings) -> GPT:
    """The dense network with the first weights that the seed draws."""
    return GPT(settings.gpt(), torch.Generator().manual_seed(settings.seed)).to(settings.device)


def make_twins(settings: TextSettings, plan: Plan) -> list[Twin]:
    """Both networks of a settled run, or the sparse one alone, ready for their first step."""
    return [make_sparse(settings, plan), make_dense(settings)] if settings.twin else [make_sparse(settings, plan)]


def make_sparse(settings: TextSettings, plan: Plan) -> Twin:
    """The sparse network, its optimizer, and the engine attached to it."""
    model = make_model(settings)
    rewirer = sparsify(model, plan)
    optimizer = _optimizer(model, settings, sparse=True)
    rewirer.attach(optimizer, total_steps=settings.steps)
    return Twin(SPARSE, model, optimizer, rewirer, _loss(settings), seed=settings.seed)


def make_dense(settings: TextSettings) -> Twin:
    """The dense twin, as fast as torch makes it."""
    model = make_model(settings)
    return Twin(DENSE, model, _optimizer(model, settings, sparse=False), None, _loss(settings), seed=settings.seed)


def _optimizer(model: nn.Module, settings: TextSettings, *, sparse: bool) -> Optimizer:
    lr = settings.lr if sparse else settings.dense_lr
    assert lr is not None, "settled"
    groups = param_groups(model, lr=lr, weight_decay=settings.weight_decay, mup=settings.gpt().supar())
    values = {id(layer.values) for layer in model.modules() if isinstance(layer, SparseLinear)}
    if values and settings.sparse_lr is not None:
        faster = dict(groups[0], params=[p for p in groups[0]["params"] if id(p) in values], lr=settings.sparse_lr)
        groups[0]["params"] = [p for p in groups[0]["params"] if id(p) not in values]
        groups = [group for group in (faster, *groups) if group["params"]]
    betas = (0.9, settings.beta2)
    if sparse and settings.optimizer == "rarefy":
        return AdamW(groups, betas=betas)
    return torch.optim.AdamW(groups, betas=betas, fused=True)


def settled_plan(plan: Plan, layers: Sequence[Mapping[str, Any]]) -> Plan:
    """The plan with what was decided, so that nothing is timed again: see `Plan.settled`.

    Args:
        layers: rows of an `Explanation`, as plan.json has them.
    """
    return plan.settled(layers)


def describe(twin: Twin, model: GPT, training_bytes: Mapping[str, int]) -> dict[str, Any]:
    """A twin's entry in the run record.

    parameters: entries of all weights as if dense; nonzeros: those that exist and train; density: of the sparse layers;
    flops_per_token: forward and backward, of linear layers and attention. All before the first step: where the density
    moves, the log has how it goes on. frozen_from: the last step after which the pattern may change, 0 if never, None
    without a pattern.
    """
    nonzeros = sum(p.numel() for p in model.parameters())
    sparse = [m for m in model.modules() if isinstance(m, SparseLinear)]
    absent = sum(m.out_features * m.in_features - m.values.numel() for m in sparse) - _low_rank(model)
    return {
        "name": twin.name,
        "parameters": nonzeros + absent,
        "nonzeros": nonzeros,
        "density": twin.density,
        "flops_per_token": flops_per_token(model),
        "training_bytes": dict(training_bytes),
        "frozen_from": None if twin.rewirer is None else twin.rewirer.end if twin.rewirer.method.rewires else 0,
    }


def flops_per_token(model: GPT) -> int:
    """FLOPs of training on one byte: a multiply and an add a weight, forward and twice backward, and attention."""
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    weights += sum(m.values.numel() for m in model.modules() if isinstance(m, SparseLinear)) + _low_rank(model)
    return 6 * weights + model.config.attention_flops()


def _low_rank(model: nn.Module) -> int:
    """Weights of low-rank parts."""
    return sum(m.a.numel() + m.b.numel() for m in model.modules() if isinstance(m, SparseLowRank))
