"""The two networks of a text run: the same draw of weights, one made sparse."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy.convert import sparsify
from rarefy.models import GPT
from rarefy.nn import SparseLinear, SparseLowRank
from rarefy.plan import Plan
from rarefy.recipes.execution import make_twin
from rarefy.recipes.optimizers import make_optimizer
from rarefy.recipes.task import DENSE, SPARSE
from rarefy.recipes.text.settings import TextSettings
from rarefy.training.twin import Twin


def text_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats a byte; inputs and targets (B, T) int64."""
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def make_model(settings: TextSettings) -> GPT:
    """The dense network with the first weights that the seed draws."""
    model = GPT(settings.gpt(), torch.Generator().manual_seed(settings.seed)).to(settings.device)
    model.recompute = settings.recompute
    return model


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


def flops_per_token(model: GPT) -> int:
    """FLOPs of training on one byte: a multiply and an add a weight, forward and twice backward, and attention."""
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    weights += sum(m.values.numel() for m in model.modules() if isinstance(m, SparseLinear)) + _low_rank(model)
    return 6 * weights + model.config.attention_flops()


def _low_rank(model: nn.Module) -> int:
    """Weights of low-rank parts."""
    return sum(m.a.numel() + m.b.numel() for m in model.modules() if isinstance(m, SparseLowRank))
