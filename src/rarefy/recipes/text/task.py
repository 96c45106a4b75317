"""Text as a task: byte-level GPTs, judged by bits per byte."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rarefy.files import atomic_write
from rarefy.models import GPT, generate
from rarefy.recipes.run import load_twin, read_run_settings
from rarefy.recipes.task import SPARSE, DataName, Ending, Task, name_of_data
from rarefy.recipes.text.field import text_field
from rarefy.recipes.text.networks import flops_per_token, make_dense, make_sparse
from rarefy.recipes.text.settings import TextSettings
from rarefy.training.batches import Batches, Windows
from rarefy.training.calibrate import Trial
from rarefy.training.data import Corpus, load_corpus
from rarefy.training.folder import SAMPLE
from rarefy.training.subject import TEXT
from rarefy.training.twin import Twin

PROMPT_BYTES = 48
"""Of the validation text, to begin the sample with."""

TOKENS_TO_MEASURE = 2048
"""Layers are timed on so many rows of input, rounded up to whole windows, or on a micro-batch where that is smaller."""

WIDTHS = 8
"""The width of a narrower network is a multiple of this, and of twice its heads."""


class TextTask(Task[TextSettings]):
    """See `Task`. Reads the text when it is made."""

    subject = TEXT
    settings_class = TextSettings

    def __init__(self, base: TextSettings) -> None:
        self.base = base
        self._corpus = load_corpus(base.data, context=base.context)
        self.data = DataName(name_of_data(base.data, "standard library"), self._corpus.digest())
        self.source = self._corpus.source

    def make(self, settings: TextSettings, *, dense: bool) -> Twin:
        return make(settings, dense)

    def feed(self, settings: TextSettings) -> tuple[Batches, Windows]:
        return batches(settings, self._corpus)

    def flops_per_token(self, model: nn.Module) -> int:
        return flops_per_token(_gpt(model))

    def narrowed(self, settings: TextSettings, nonzeros: int) -> TextSettings:
        """Of the width whose number of parameters is nearest; MLP or attention of a size of their own shrink along."""
        heads = 2 * settings.heads  # pairs of features a head, as rotary positions need them
        every = math.lcm(heads, WIDTHS)

        def at(width: int) -> TextSettings:
            share = width / settings.width
            mlp = None if settings.mlp is None else max(1, round(settings.mlp * share))
            attention = settings.attention
            if attention is not None:
                attention = heads * max(1, round(attention * share / heads))
            return dataclasses.replace(settings, width=width, mlp=mlp, attention=attention)

        widths = range(every, max(every, settings.width) + 1, every)
        return at(min(widths, key=lambda width: abs(num_parameters(at(width)) - nonzeros)))

    def field(self, minutes: float) -> tuple[str, ...]:
        return text_field(minutes, self.base.heads)

    def sample(self, settings: TextSettings) -> tuple[nn.Module, Tensor]:
        rows = min(settings.batch, -(-TOKENS_TO_MEASURE // settings.context))
        return GPT(settings.gpt()), torch.zeros(rows, settings.context, dtype=torch.int64)

    def eval_batches(self, settings: TextSettings) -> int:
        return -(-self.feed(settings)[1].num_windows // settings.batch)

    def ending_s(self, settings: TextSettings, trials: Mapping[str, Trial]) -> float:
        """A forward pass of a window a byte of the sample."""
        return trials[SPARSE].eval_s * settings.sample_bytes * settings.context / settings.eval_bytes

    def end(self, settings: TextSettings, folder: Path, twins: Sequence[Twin]) -> Ending:
        """sample.txt: the first bytes of the validation text, and what the sparse network writes after them."""
        prompt = bytes(self._corpus.valid[: min(PROMPT_BYTES, settings.context)].tolist())
        written = generate(_gpt(twins[0].model), prompt, settings.sample_bytes, seed=settings.seed)
        atomic_write(folder / SAMPLE, prompt + written)
        return Ending(
            heading=f"sample, after the first {len(prompt)} bytes of the validation text:",
            body=(prompt + written).decode("utf-8", errors="replace"),
            hint=f"more text: rarefy generate --run {folder} --prompt ...",
        )


def make(settings: TextSettings, dense: bool) -> Twin:
    """Either network of settled settings, whose plan says which layers are sparse."""
    return make_dense(settings) if dense else make_sparse(settings, settings.plan)


def batches(settings: TextSettings, corpus: Corpus) -> tuple[Batches, Windows]:
    """What both networks train on, and what both are judged by."""
    shape = {"context": settings.context, "batch": settings.batch}
    return (
        Batches(text=corpus.train, seed=settings.seed, **shape),
        Windows(text=corpus.valid, wanted_bytes=settings.eval_bytes, **shape),
    )


def num_parameters(settings: TextSettings) -> int:
    """Entries of all weights of the dense network."""
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(settings.gpt()).parameters())


def load_network(folder: Path, name: str = SPARSE) -> GPT:
    """A run's network as its last checkpoint has it.

    Raises:
        ValueError: the folder is no run, or not of text, it has no checkpoint of that network, or the file is damaged.
    """
    return _gpt(load_twin(folder, read_run_settings(TextTask, folder), name, make).model)


def _gpt(model: nn.Module) -> GPT:
    assert isinstance(model, GPT)
    return model
