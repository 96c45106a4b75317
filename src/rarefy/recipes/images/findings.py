"""What a trained network of images has to show: what it confuses, what its first layer looks at, where its connections
went. Kept in images.json, from which a report draws without the data.

Pixels and weights there are bytes, base64, with their shape beside them. Shape letters: N images, K classes, C
channels, H and W rows and columns of pixels, O outputs of a layer.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy.files import atomic_write
from rarefy.nn import SparseConv2d, SparseLayer
from rarefy.recipes.images.batches import AllImages
from rarefy.recipes.images.data import ImageSet, ImageShape, Labelled
from rarefy.training.folder import IMAGES
from rarefy.training.twin import Twin

FORMAT = 1

MOST_WRONG = 24
"""Images that are kept of those a network is wrong about."""

MOST_FILTERS = 64

LARGEST_SIDE = 96
"""Larger images are kept smaller."""


def findings(twin: Twin, data: Labelled, scale: tuple[float, float], image: ImageShape) -> dict[str, Any]:
    """What there is to show of a network, as plain data.

    confusion: (K, K) counts, a row a true class, a column a predicted one; wrong: the images that it is wrong about and
    surest of; first_layer: filters of a convolution, None for others; and what `connections` says.
    """
    probabilities = torch.cat([_probabilities(twin, images) for images, _ in AllImages(data=data, scale=scale)])
    confidence, predicted = probabilities.max(dim=1)
    pairs = data.labels * image.classes + predicted
    confusion = torch.bincount(pairs, minlength=image.classes**2).view(image.classes, image.classes)
    return {
        "step": twin.step,
        "confusion": confusion.tolist(),
        "wrong": _wrong(data, predicted, confidence),
        "first_layer": _filters(twin.model),
        **connections(twin.model, image),
    }


def connections(model: nn.Module, image: ImageShape) -> dict[str, Any]:
    """Where the units of a network are.

    layers: of each sparse one its name, density, kernel, and taps, the number of weights at each place of the kernel;
    inputs: (H, W), how many weights of a sparse first layer of an mlp read each pixel, over all channels, or None.
    """
    sparse = {name: module for name, module in model.named_modules() if isinstance(module, SparseLayer)}
    layers = [{"name": name, "density": layer.density, **_taps(layer)} for name, layer in sparse.items()]
    _, first = _first_layer(model)
    inputs = None
    if isinstance(first, SparseLayer) and not isinstance(first, SparseConv2d) and first.in_features == image.numbers:
        read = first.pattern.to_mask().sum(0).view(image.channels, image.height, image.width).sum(0)
        inputs = read.tolist()
    return {"layers": layers, "inputs": inputs}


def in_words(found: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """How often the network is right, and its commonest mistake."""
    confusion = torch.tensor(found["confusion"])
    right, total = int(confusion.diagonal().sum()), int(confusion.sum())
    said = f"{100 * right / total:.2f}% right"
    mistakes = confusion - torch.diag(confusion.diagonal())
    at = int(mistakes.argmax())
    true, predicted = divmod(at, len(names))
    if not mistakes[true, predicted]:
        return said
    share = 100 * int(mistakes[true, predicted]) / int(confusion[true].sum())
    return f"{said}; its commonest mistake is {names[predicted]} for {names[true]} ({share:.3g}% of these)"


def write_findings(folder: Path, images: ImageSet, found: Mapping[str, Mapping[str, Any]]) -> None:
    """images.json: the classes, and the findings of each network."""
    data = {"format": FORMAT, "names": list(images.names), "images": len(images.valid.labels), "twins": found}
    atomic_write(folder / IMAGES, (json.dumps(data) + "\n").encode())


@torch.no_grad()
def _probabilities(twin: Twin, images: Tensor) -> Tensor:
    """(B, K) of each class, on the CPU."""
    twin.model.eval()
    return twin.model(images.to(twin.device)).float().softmax(dim=1).cpu()


def _wrong(data: Labelled, predicted: Tensor, confidence: Tensor) -> list[dict[str, Any]]:
    """Of the images that were taken for something else, those whose class was surest; equal ones by place."""
    mistaken = (predicted != data.labels).nonzero().flatten()
    order = torch.sort(confidence[mistaken], descending=True, stable=True).indices[:MOST_WRONG]
    return [
        {
            "image": at,
            "true": int(data.labels[at]),
            "predicted": int(predicted[at]),
            "confidence": float(confidence[at]),
            **_packed(_small(data.images[at])),
        }
        for at in mistaken[order].tolist()
    ]


def _small(image: Tensor) -> Tensor:
    """(C, H, W) uint8, no side longer than LARGEST_SIDE."""
    image = image if image.dim() == 3 else image[None]
    longest = max(image.shape[1:])
    if longest <= LARGEST_SIDE:
        return image
    size = [max(1, round(side * LARGEST_SIDE / longest)) for side in image.shape[1:]]
    return F.interpolate(image[None].float(), size=size, mode="area")[0].round().to(torch.uint8)


def _first_layer(model: nn.Module) -> tuple[str, nn.Module]:
    """The first that has weights to look at, in the order of the network."""
    return next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | SparseLayer))


def _filters(model: nn.Module) -> dict[str, Any] | None:
    """(O, C, h, w) of a first convolution as bytes: 128 is 0, and 1 and 255 are the largest weight of each filter.

    C is 3 where the filter reads colours, else 1: the mean over channels.
    """
    name, first = _first_layer(model)
    if isinstance(first, SparseConv2d):
        weight = first.dense_weight().view(first.out_channels, -1, *first.kernel_size)
    elif isinstance(first, nn.Conv2d):
        weight = first.weight.detach()
    else:
        return None
    weight = weight.float().cpu()[:MOST_FILTERS]
    weight = weight if weight.shape[1] == 3 else weight.mean(1, keepdim=True)
    largest = weight.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)
    return {"name": name, **_packed((128 + 127 * weight / largest).round().to(torch.uint8))}


def _taps(layer: SparseLayer) -> dict[str, Any]:
    """Of a convolution whose kernel has several places: weights at each, (h, w)."""
    if not isinstance(layer, SparseConv2d) or layer.kernel_size == (1, 1):
        return {}
    mask = layer.pattern.to_mask().view(layer.out_channels, -1, *layer.kernel_size)
    return {"taps": mask.sum((0, 1)).tolist()}


def _packed(pixels: Tensor) -> dict[str, Any]:
    """uint8 as text, row-major."""
    raw = pixels.contiguous().numpy().tobytes()
    return {"shape": list(pixels.shape), "pixels": base64.b64encode(raw).decode()}
