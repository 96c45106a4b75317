"""Convolutions, and whole training steps of networks for images; dense and sparse in the same rounds, channels_last."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy import ops
from rarefy.bench.contender import FUSED_NORMS, Contender, rows, time_in_turn
from rarefy.bench.gpt import TrainingStep, density_of
from rarefy.bench.layers import compiled, layer_compiled
from rarefy.bench.results import DENSE, Row
from rarefy.bench.settings import Conv, Pair, Settings
from rarefy.convert import sparsify
from rarefy.cost import LayerStep, Precision, dense_precisions, in_precision
from rarefy.methods import Static
from rarefy.models import WRN, ResNet, ResNetConfig, WRNConfig
from rarefy.nn import SparseConv2d
from rarefy.optim import param_groups
from rarefy.pattern import Pattern
from rarefy.plan import Plan
from rarefy.recipes.images import ImageShape, flops_per_image

SIDE, CLASSES = 32, 10
"""Of the images that networks are timed on."""


def bench_conv(
    conv: Conv, settings: Settings, kernels: Mapping[Pair, str], notes: list[str], *, budget_s: float
) -> list[Row]:
    """Rows of a convolution without bias, as networks with batch norm have them: dense, and ours."""
    generator = torch.Generator().manual_seed(0)
    side = (conv.side + 2 * conv.padding - conv.kernel) // conv.stride + 1
    x, dy = (
        torch.randn(settings.images, channels, size, size, generator=generator).contiguous(
            memory_format=torch.channels_last
        )
        for channels, size in ((conv.inputs, conv.side), (conv.outputs, side))
    )
    geometry = (conv.kernel, conv.stride, conv.padding)
    dense = nn.Conv2d(conv.inputs, conv.outputs, *geometry, groups=conv.groups, bias=False)
    dense = dense.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    per_weight = 6 * settings.images * side * side
    whole = dense.weight.numel() * per_weight
    contenders = [_layer(DENSE, dense, x, dy, dtype, "torch", whole) for dtype in dense_precisions()]
    if settings.compiled:
        torch.compiler.reset()
        for dtype in dense_precisions():
            step = compiled(lambda dtype=dtype: _step(layer_compiled(dense), x, dy, dtype), notes)
            if step is not None:
                laps = {"forward": step.forward, "backward": step.backward}
                contenders.append(
                    Contender(name=DENSE, dtype=dtype, compiled=True, kernels="torch", laps=laps, flops=whole)
                )
    for block in settings.blocks:
        for density in settings.densities:
            pattern = Pattern.random(conv.matrix, density, block, generator)
            layer = SparseConv2d.from_dense(dense, pattern=pattern, block=block)
            for dtype in settings.dtypes:
                flops = layer.values.numel() * per_weight
                contenders.append(_layer("rarefy", layer, x, dy, dtype, kernels[block], flops))
    times = time_in_turn(contenders, budget_s=budget_s, rounds=settings.rounds)
    what = f"{conv.name}, {settings.images} images"
    return rows("conv", (conv.outputs, conv.inputs), settings.images * side * side, contenders, times, what)


def _step(layer: nn.Module, x: Tensor, dy: Tensor, dtype: Precision) -> LayerStep:
    return LayerStep(layer, *in_precision(x, dy, dtype), dtype)


def _layer(name: str, layer: nn.Module, x: Tensor, dy: Tensor, dtype: Precision, kernels: str, flops: int) -> Contender:
    step = _step(layer, x, dy, dtype)
    sparse = isinstance(layer, SparseConv2d)
    return Contender(
        name=name,
        dtype=dtype,
        kernels=kernels,
        density=layer.density if sparse else 1.0,
        block=layer.block if sparse else (1, 1),
        laps={"forward": step.forward, "backward": step.backward},
        flops=flops,
    )


# -- networks ----------------------------------------------------------------------------------------------------------


def network(name: str) -> nn.Module:
    """The network of that name (`rarefy.bench.settings.CNNS`) with weights of its own, channels_last."""
    generator = torch.Generator().manual_seed(0)
    if name == "resnet18":
        model: nn.Module = ResNet(ResNetConfig(classes=CLASSES), generator)
    else:
        depth, width = name.removeprefix("wrn").split("x")
        model = WRN(WRNConfig(depth=int(depth), width=int(width), classes=CLASSES), generator)
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


class ImageStep(TrainingStep):
    """A step on images."""

    plain = False
    """Whether torch's own layers do all of it."""

    def objective(self) -> Tensor:
        with ops.using("tiled") if self.plain else nullcontext():
            return F.cross_entropy(self.model(self.inputs), self.targets)


def bench_cnn(
    name: str, settings: Settings, kernels: Mapping[Pair, str], notes: list[str], *, budget_s: float
) -> list[Row]:
    """Rows of a network: forward, loss, backward, clipping and SGD with momentum. Its first convolution and its head
    stay dense. The dense one is timed with torch's own batch norms, and with ours (`rarefy.nn.norm_relu`).
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(settings.images, 3, SIDE, SIDE, generator=generator)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (settings.images,), generator=generator)

    def step(model: nn.Module, dtype: Precision) -> ImageStep:
        optimizer = torch.optim.SGD(param_groups(model, lr=1e-3, weight_decay=5e-4), momentum=0.9)
        return ImageStep(model, optimizer, images, labels, dtype)

    def flops(model: nn.Module) -> int:
        return flops_per_image(model, ImageShape(3, SIDE, SIDE)) * settings.images

    dense = network(name)
    steps: dict[tuple[str, Precision], ImageStep] = {}
    contenders = []
    for norms in ("torch", FUSED_NORMS):
        for dtype in dense_precisions():
            one = steps[norms, dtype] = step(dense, dtype)
            one.plain = norms == "torch"
            contenders.append(Contender(name=DENSE, dtype=dtype, kernels=norms, laps=one.laps(), flops=flops(dense)))
    for block in settings.blocks:
        for density in settings.densities:
            sparse = network(name)
            rewirer = sparsify(sparse, Plan(density=density, block=block, method=Static(), keep_dense=("head",)))
            left = [layer for layer in rewirer.left_dense if layer not in ("head", "stem")]
            if left:
                notes.append(f"{name}, {block[0]}x{block[1]}: left dense: {', '.join(left)}")
            for dtype in settings.dtypes:
                one = steps[f"{block} {density}", dtype] = step(sparse, dtype)
                contenders.append(
                    Contender(
                        name="rarefy",
                        dtype=dtype,
                        kernels=kernels[block],
                        density=density_of(sparse),
                        block=block,
                        laps=one.laps(),
                        flops=flops(sparse),
                    )
                )
    times = time_in_turn(contenders, budget_s=budget_s, rounds=settings.rounds)
    if not all(math.isfinite(one.loss) for one in steps.values()):
        notes.append(f"{name}: a loss is no number any more; its times may not be those of a real one")
    return rows("cnn", (0, 0), settings.images, contenders, times, f"{name}, {settings.images} images")
