"""Comparisons on text: byte-level GPTs, judged by bits per byte."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from rarefy.compare.task import DataName, Metric, name_of_data
from rarefy.models import GPT
from rarefy.recipes.text.networks import flops_per_token, make_dense, make_sparse
from rarefy.recipes.text.settings import TextSettings
from rarefy.recipes.text.settle import batches
from rarefy.training.data import load_corpus
from rarefy.training.twin import StepData, Twin

WIDTHS = 8
"""The width of a narrower network is a multiple of this, and of its heads."""


class TextTask:
    """See `Task`. Reads the text when it is made."""

    name = "text"
    metric = Metric("bits_per_byte", "bits per byte", higher_is_better=False)

    def __init__(self, base: TextSettings) -> None:
        self.base = base
        self._corpus = load_corpus(base.data, context=base.context)
        self.data = DataName(name_of_data(base.data, "standard library"), self._corpus.digest())
        self.source = self._corpus.source

    def make(self, settings: TextSettings, *, dense: bool) -> Twin:
        return make_dense(settings) if dense else make_sparse(settings, settings.plan)

    def feed(self, settings: TextSettings) -> tuple[StepData, Iterable[tuple[Tensor, Tensor]]]:
        return batches(settings, self._corpus)

    def flops_per_token(self, model: nn.Module) -> int:
        assert isinstance(model, GPT)
        return flops_per_token(model)

    def narrowed(self, settings: TextSettings, nonzeros: int) -> TextSettings:
        """Of the width whose number of parameters is nearest; an MLP of a size of its own shrinks along."""
        every = math.lcm(settings.heads, WIDTHS)

        def at(width: int) -> TextSettings:
            mlp = None if settings.mlp is None else max(1, round(settings.mlp * width / settings.width))
            return dataclasses.replace(settings, width=width, mlp=mlp)

        widths = range(every, max(every, settings.width) + 1, every)
        return at(min(widths, key=lambda width: abs(num_parameters(at(width)) - nonzeros)))


def num_parameters(settings: TextSettings) -> int:
    """Entries of all weights of the dense network."""
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(settings.gpt()).parameters())
