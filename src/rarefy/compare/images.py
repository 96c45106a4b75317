"""Comparisons on labelled images: MLPs and convolutional networks, judged by accuracy."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable

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
    num_parameters,
)
from rarefy.training.twin import StepData, Twin

TRIED = 2000
"""Scales that a narrower network may have: so many, evenly spaced up to 1."""


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
            return make_dense(settings, self._set.shape)
        return make_sparse(settings, settings.plan, self._set.shape)

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
        return flops_per_image(model, self._set.shape)

    def narrowed(self, settings: ImageSettings, nonzeros: int) -> ImageSettings:
        """With all hidden layers, or numbers of channels, scaled alike, to the nearest number of parameters."""

        def at(scale: float) -> ImageSettings:
            if settings.model != "mlp":
                return dataclasses.replace(settings, width=settings.width * scale)
            return dataclasses.replace(settings, hidden=tuple(max(1, round(size * scale)) for size in settings.hidden))

        def size(part: int) -> int:
            return num_parameters(at(part / TRIED), self._set.shape)

        parts = range(1, TRIED + 1)
        above = bisect.bisect_left(parts, nonzeros, key=size)  # a wider network is never smaller
        around = [parts[i] for i in (above - 1, above) if 0 <= i < TRIED]
        return at(min(around, key=lambda part: abs(size(part) - nonzeros)) / TRIED)
