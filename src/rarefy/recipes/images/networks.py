"""The networks of an image run, with what trains them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy.convert import sparsify
from rarefy.models import MLP
from rarefy.nn import SparseLayer
from rarefy.plan import Plan
from rarefy.recipes.execution import make_twin
from rarefy.recipes.images.settings import ImageSettings
from rarefy.recipes.optimizers import make_optimizer
from rarefy.training.twin import Twin


def image_loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats an image; images (B, H, W) float, labels (B,) int64."""
    return F.cross_entropy(model(images), labels)


def assess(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Mean loss, and accuracy, the share of images whose likeliest class is their label."""
    logits = model(images)
    return {"loss": F.cross_entropy(logits, labels), "accuracy": (logits.argmax(1) == labels).float().mean()}


def make_model(settings: ImageSettings, pixels: int) -> MLP:
    """The dense network with the first weights that the seed draws."""
    return MLP(settings.mlp(pixels), torch.Generator().manual_seed(settings.seed)).to(settings.device)


def make_sparse(settings: ImageSettings, plan: Plan, pixels: int) -> Twin:
    """The sparse network of settled settings, its optimizer, and the engine attached to it."""
    model = make_model(settings, pixels)
    rewirer = sparsify(model, plan)
    optimizer = make_optimizer(model, settings, sparse=True)
    rewirer.attach(optimizer, total_steps=settings.steps)
    return make_twin("sparse", model, optimizer, rewirer, image_loss, settings, assess)


def make_dense(settings: ImageSettings, pixels: int) -> Twin:
    """The dense network of settled settings."""
    model = make_model(settings, pixels)
    optimizer = make_optimizer(model, settings, sparse=False)
    return make_twin("dense", model, optimizer, None, image_loss, settings, assess)


def flops_per_image(model: nn.Module) -> int:
    """FLOPs of training on one image: a multiply and an add a weight, forward and twice backward."""
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    return 6 * (weights + sum(m.values.numel() for m in model.modules() if isinstance(m, SparseLayer)))
