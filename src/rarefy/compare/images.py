"""Comparisons on labelled images: MLPs, judged by accuracy."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from itertools import pairwise

from torch import Tensor, nn

from rarefy.compare.task import DataName, Metric, name_of_data
from rarefy.recipes.images import (
    AllImages,
    ImageBatches,
    ImageSettings,
    flops_per_image,
    load_images,
    make_dense,
    make_sparse,
)
from rarefy.training.twin import StepData, Twin

TRIED = 2000
"""Scales of the hidden layers that are tried for a narrower network."""


class ImagesTask:
    """See `Task`. Reads the images when it is made."""

    name = "images"
    metric = Metric("accuracy", "accuracy", higher_is_better=True, percent=True)

    def __init__(self, base: ImageSettings) -> None:
        self.base = base
        self._set = load_images(base.data)
        count = len(self._set.train.labels)
        if base.batch > count:
            raise ValueError(f"batch must be at most the {count:,} training images, got {base.batch}")
        self._scale = self._set.scale()
        self.data = DataName(name_of_data(base.data, "images"), self._set.digest())
        self.source = self._set.source

    def make(self, settings: ImageSettings, *, dense: bool) -> Twin:
        if dense:
            return make_dense(settings, self._set.pixels)
        return make_sparse(settings, settings.plan, self._set.pixels)

    def feed(self, settings: ImageSettings) -> tuple[StepData, Iterable[tuple[Tensor, Tensor]]]:
        training = ImageBatches(
            data=self._set.train,
            scale=self._scale,
            batch=settings.batch,
            seed=settings.seed,
            shift=settings.shift,
            flip=settings.flip,
        )
        return training, AllImages(data=self._set.valid, scale=self._scale)

    def flops_per_token(self, model: nn.Module) -> int:
        return flops_per_image(model)

    def narrowed(self, settings: ImageSettings, nonzeros: int) -> ImageSettings:
        """With all hidden layers scaled alike, to the nearest number of parameters."""

        def at(scale: float) -> ImageSettings:
            return dataclasses.replace(settings, hidden=tuple(max(1, round(size * scale)) for size in settings.hidden))

        def miss(scale: float) -> int:
            sizes = (self._set.pixels, *at(scale).hidden, at(scale).mlp(1).classes)
            return abs(sum((i + 1) * o for i, o in pairwise(sizes)) - nonzeros)

        return at(min((part / TRIED for part in range(1, TRIED + 1)), key=miss))
