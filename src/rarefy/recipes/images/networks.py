"""The networks of an image run, with what trains them."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy.convert import sparsify
from rarefy.cost import tokens_per_layer
from rarefy.models import MLP, WRN, MLPConfig, ResNet, ResNetConfig, WRNConfig
from rarefy.nn import SparseLayer
from rarefy.plan import Plan
from rarefy.recipes.execution import make_twin
from rarefy.recipes.images.data import ImageShape
from rarefy.recipes.images.settings import ImageSettings
from rarefy.recipes.optimizers import make_optimizer
from rarefy.recipes.task import DENSE, SPARSE
from rarefy.training.twin import Twin


@dataclass(frozen=True)
class ImageLoss:
    """Mean cross-entropy in nats an image; images float, labels (B,) int64."""

    label_smoothing: float = 0.0

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(images), labels, label_smoothing=self.label_smoothing)


def assess(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Mean loss, and accuracy, the share of images whose likeliest class is their label."""
    logits = model(images)
    return {"loss": F.cross_entropy(logits, labels), "accuracy": (logits.argmax(1) == labels).float().mean()}


def make_model(settings: ImageSettings, image: ImageShape) -> nn.Module:
    """The dense network with the first weights that the seed draws."""
    model = _network(settings.network(image), torch.Generator().manual_seed(settings.seed))
    model = model.to(settings.device)
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  (matrices stay as they are)


def num_parameters(settings: ImageSettings, image: ImageShape) -> int:
    """Of the dense network, which is not made."""
    with torch.device("meta"):
        return sum(p.numel() for p in _network(settings.network(image), None).parameters())


def _network(config: MLPConfig | WRNConfig | ResNetConfig, generator: torch.Generator | None) -> nn.Module:
    if isinstance(config, MLPConfig):
        return MLP(config, generator)
    return WRN(config, generator) if isinstance(config, WRNConfig) else ResNet(config, generator)


def make_sparse(settings: ImageSettings, plan: Plan, image: ImageShape) -> Twin:
    """The sparse network of settled settings, its optimizer, and the engine attached to it."""
    model = make_model(settings, image)
    rewirer = sparsify(model, plan)
    optimizer = make_optimizer(model, settings, sparse=True)
    rewirer.attach(optimizer, total_steps=settings.steps)
    return make_twin(SPARSE, model, optimizer, rewirer, ImageLoss(settings.label_smoothing), settings, assess)


def make_dense(settings: ImageSettings, image: ImageShape) -> Twin:
    """The dense network of settled settings."""
    model = make_model(settings, image)
    optimizer = make_optimizer(model, settings, sparse=False)
    return make_twin(DENSE, model, optimizer, None, ImageLoss(settings.label_smoothing), settings, assess)


def make(settings: ImageSettings, image: ImageShape, dense: bool) -> Twin:
    """Either network of settled settings, whose plan says which layers are sparse."""
    return make_dense(settings, image) if dense else make_sparse(settings, settings.plan, image)


_uses: WeakKeyDictionary[nn.Module, dict[str, int]] = WeakKeyDictionary()


def flops_per_image(model: nn.Module, image: ImageShape) -> int:
    """FLOPs of training on one image: a multiply and an add each time a weight is used, forward and twice backward."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | SparseLayer)}
    if model not in _uses:  # how often does not change with the pattern
        training = model.training
        sample = torch.zeros(1, image.channels, image.height, image.width, device=next(model.parameters()).device)
        _uses[model] = tokens_per_layer(model.eval(), sample, layers)
        model.train(training)
    weights = {n: m.values if isinstance(m, SparseLayer) else m.weight for n, m in layers.items()}
    return 6 * sum(weight.numel() * _uses[model][name] for name, weight in weights.items())
