"""What layers take in a step, sparse and dense: timed on the spot, or predicted by the cost model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import nn

from rarefy.cost import (
    Convolution,
    CostModel,
    LayerCost,
    convolutions_per_layer,
    cost_model,
    load_model,
    measure,
    predict,
    tokens_per_layer,
)
from rarefy.nn import SparseConvolution
from rarefy.plan.layers import Layer
from rarefy.plan.structure import Block, choose_block

ASSUMED_TOKENS = 2048
"""Rows of input that times are for where no sample says how many. A convolution has no times then."""


@dataclass(frozen=True)
class Times:
    """Of the layers of one model."""

    tokens: Mapping[str, int]
    """Rows of input that each layer sees, of a convolution output pixels; empty: no one asked for times."""
    convolutions: Mapping[str, Convolution]
    """What each convolution does in the sample, at its first call; empty without one."""
    asked: bool
    """Whether there are times at all."""
    measured: bool
    """Or else predicted."""
    precisions: bool
    """Whether other precisions are measured too."""
    model: CostModel | None
    """None: nothing is predicted."""

    @classmethod
    def of_model(
        cls,
        model: nn.Module,
        sample: Any,
        layers: Mapping[str, Layer],
        is_open: Callable[[str], bool],
        *,
        measure: bool | None,
        precisions: bool,
        costs: CostModel | None,
    ) -> Self:
        """Arguments as `Plan.decide` has them.

        Args:
            is_open: whether the plan leaves the structure of the layer of a name open.
        """
        convs = [
            n for n, layer in layers.items() if isinstance(layer.module, nn.Conv1d | nn.Conv2d | SparseConvolution)
        ]
        seen = convolutions_per_layer(model, sample, convs) if convs and sample is not None else {}
        measured = sample is not None if measure is None else measure
        some_open = any(is_open(n) for n, layer in layers.items() if layer.kernel is None or n in seen)
        elsewhere = [name for name, conv in seen.items() if not conv.channels_last and not layers[name].why_dense]
        if measure is False and elsewhere:
            warnings.warn(
                "predicted times of convolutions are for images in channels_last, where a pixel's channels lie side by "
                f"side, and those of {elsewhere[0]} are not: the sparse layer converts them on the way, which costs "
                "more; convert the model and its images, or measure",
                stacklevel=4,
            )
        asked = measured or measure is not None or some_open
        if costs is None and (some_open or (asked and not measured)):
            costs = _machines_model()
        tokens = dict.fromkeys(layers, ASSUMED_TOKENS) if asked else {}
        if sample is not None:
            tokens = tokens_per_layer(model, sample, layers)
        return cls(tokens, seen, asked, measured, precisions, costs)

    def cost(self, layer: Layer, units: int | None, block: Block, rank: int) -> LayerCost | None:
        """None: not asked for, a layer that the sample does not reach, or one that the model does not know.

        Args:
            units: None: of the dense layer alone.
        """
        conv = self.convolutions.get(layer.name)
        tokens = self.tokens.get(layer.name) if conv is None else conv.pixels
        if not self.asked or not tokens or min(layer.shape) < 1 or (layer.kernel is not None and conv is None):
            return None
        more: dict[str, Any] = {"rank": rank} if rank else {}
        if conv is not None:
            more["conv"] = conv
        if self.measured:
            more |= {"precisions": True} if self.precisions else {}
            return measure(layer.shape, units, block, tokens, bias=layer.bias, **more)
        assert self.model is not None
        return predict(self.model, layer.shape, units, block, tokens, **more)

    def fastest_block(self, layer: Layer, density: float) -> Block:
        """The structure by prediction; unstructured for a convolution whose images are not known."""
        conv = self.convolutions.get(layer.name)
        if layer.kernel is not None and conv is None:
            return 1, 1
        assert self.model is not None
        tokens = self.tokens.get(layer.name) if conv is None else conv.pixels
        return choose_block(self.model, layer.shape, density, tokens or ASSUMED_TOKENS, conv)


def _machines_model() -> CostModel:
    """This machine's cost model; says so before it spends a minute on calibrating it."""
    found = load_model()
    if found is None:
        warnings.warn("calibrating the cost model of this machine, once, in about a minute", stacklevel=5)
        found = cost_model()
    return found
