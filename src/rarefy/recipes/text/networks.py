"""The two networks of a text run: the same draw of weights, one made sparse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy.convert import sparsify
from rarefy.models import GPT
from rarefy.nn import SparseLinear, SparseLowRank
from rarefy.plan import Plan
from rarefy.recipes.execution import make_twin
from rarefy.recipes.optimizers import make_optimizer
from rarefy.recipes.text.settings import TextSettings
from rarefy.training.twin import Twin

SPARSE, DENSE = "sparse", "dense"


def text_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats a byte; inputs and targets (B, T) int64."""
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def make_model(settings: TextSettings) -> GPT:
    """The dense network with the first weights that the seed draws."""
    model = GPT(settings.gpt(), torch.Generator().manual_seed(settings.seed)).to(settings.device)
    model.recompute = settings.recompute
    return model


def make_twins(settings: TextSettings, plan: Plan) -> list[Twin]:
    """Both networks of a settled run, or the sparse one alone, ready for their first step."""
    return [make_sparse(settings, plan), make_dense(settings)] if settings.twin else [make_sparse(settings, plan)]


def make_sparse(settings: TextSettings, plan: Plan) -> Twin:
    """The sparse network, its optimizer, and the engine attached to it."""
    model = make_model(settings)
    rewirer = sparsify(model, plan)
    optimizer = make_optimizer(model, settings, sparse=True, mup=settings.gpt().supar())
    rewirer.attach(optimizer, total_steps=settings.steps)
    return make_twin(SPARSE, model, optimizer, rewirer, text_loss, settings)


def make_dense(settings: TextSettings) -> Twin:
    """The dense twin, as fast as torch makes it."""
    model = make_model(settings)
    optimizer = make_optimizer(model, settings, sparse=False, mup=settings.gpt().supar())
    return make_twin(DENSE, model, optimizer, None, text_loss, settings)


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
