"""The optimizer of a recipe's network, by its settings."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from rarefy.nn import SparseLayer
from rarefy.optim import AdamW, param_groups
from rarefy.recipes.settings import RunSettings
from rarefy.supar import SuPar


def make_optimizer(model: nn.Module, settings: RunSettings, *, sparse: bool, mup: SuPar | None = None) -> Optimizer:
    """Of settled settings: weights decay, and the values of sparse layers have a rate of their own."""
    lr = settings.lr if sparse else settings.dense_lr
    assert lr is not None, "settled"
    groups = param_groups(model, lr=lr, weight_decay=settings.weight_decay, mup=mup)
    values = {id(layer.values) for layer in model.modules() if isinstance(layer, SparseLayer)}
    if values and settings.sparse_lr is not None:
        faster = dict(groups[0], params=[p for p in groups[0]["params"] if id(p) in values], lr=settings.sparse_lr)
        groups[0]["params"] = [p for p in groups[0]["params"] if id(p) not in values]
        groups = [group for group in (faster, *groups) if group["params"]]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=settings.momentum)
    betas = (0.9, settings.beta2)
    if sparse and settings.optimizer == "rarefy":
        return AdamW(groups, betas=betas, ramp=settings.ramp)
    return torch.optim.AdamW(groups, betas=betas, fused=True)
