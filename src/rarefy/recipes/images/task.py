"""Images as a task: MLPs and convolutional networks that tell classes apart, judged by accuracy."""

from __future__ import annotations

import bisect
import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.recipes.images.batches import AllImages, ImageBatches
from rarefy.recipes.images.data import load_images
from rarefy.recipes.images.field import image_field
from rarefy.recipes.images.findings import connections, findings, in_words, write_findings
from rarefy.recipes.images.networks import flops_per_image, make, make_model, num_parameters
from rarefy.recipes.images.settings import ImageSettings
from rarefy.recipes.task import SPARSE, DataName, Ending, Task, name_of_data
from rarefy.rewiring import GuardWarning
from rarefy.training.calibrate import Trial
from rarefy.training.subject import IMAGES
from rarefy.training.twin import Twin

TRIED = 2000
"""Scales that a narrower network may have: so many, evenly spaced up to 1."""


class ImagesTask(Task[ImageSettings]):
    """See `Task`. Reads the images when it is made."""

    subject = IMAGES
    settings_class = ImageSettings

    def __init__(self, base: ImageSettings) -> None:
        self._set = load_images(base.data, image_column=base.image_column, label_column=base.label_column)
        count = len(self._set.train.labels)
        if base.batch > count:
            raise ValueError(f"batch must be at most the {count:,} training images, got {base.batch}")
        self.base = base.for_images(self._set.shape)
        self._scale = self._set.scale()
        self.data = DataName(name_of_data(base.data, "images"), self._set.digest())
        self.source = self._set.source

    def make(self, settings: ImageSettings, *, dense: bool) -> Twin:
        return make(settings, self._set.shape, dense)

    def feed(self, settings: ImageSettings) -> tuple[ImageBatches, AllImages]:
        training = ImageBatches(
            data=self._set.train,
            scale=self._scale,
            batch=settings.batch,
            seed=settings.seed,
            shift=settings.shift or 0,
            flip=bool(settings.flip),
        )
        return training, self._held_out(settings.eval_images)

    def _held_out(self, wanted: int | None) -> AllImages:
        return AllImages(data=self._set.valid, scale=self._scale, wanted=wanted)

    def all_held_out(self, settings: ImageSettings) -> AllImages | None:
        everything = self._held_out(None)
        return everything if self._held_out(settings.eval_images).count < everything.count else None

    def judged(self) -> str:
        some, everything = self._held_out(self.base.eval_images).count, self._held_out(None).count
        if some == everything:
            return ""
        return (
            f"At the end a network is judged by all {everything:,} held-out images; curves are of {some:,} of them, "
            "always the same."
        )

    def field(self, minutes: float) -> tuple[str, ...]:
        return image_field(self.base, minutes)

    def flops_per_token(self, model: nn.Module) -> int:
        return flops_per_image(model, self._set.shape)

    def narrowed(self, settings: ImageSettings, nonzeros: int) -> ImageSettings:
        """With all hidden layers, or numbers of channels, scaled alike, to the nearest number of parameters."""

        def size(part: int) -> int:
            return num_parameters(settings.scaled(part / TRIED), self._set.shape)

        parts = range(1, TRIED + 1)
        above = bisect.bisect_left(parts, nonzeros, key=size)  # a wider network is never smaller
        around = [parts[i] for i in (above - 1, above) if 0 <= i < TRIED]
        return settings.scaled(min(around, key=lambda part: abs(size(part) - nonzeros)) / TRIED)

    def sample(self, settings: ImageSettings) -> tuple[nn.Module, Tensor]:
        image = self._set.shape
        model = make_model(dataclasses.replace(settings, device="cpu"), image)
        return model, torch.zeros(settings.batch, image.channels, image.height, image.width)

    def eval_batches(self, settings: ImageSettings) -> float:
        return self.feed(settings)[1].count / settings.batch

    def ending_s(self, settings: ImageSettings, trials: Mapping[str, Trial]) -> float:
        """Every validation image once more."""
        share = len(self._set.valid.labels) / self.feed(settings)[1].count
        return share * sum(trial.eval_s for trial in trials.values())

    def end(self, settings: ImageSettings, folder: Path, twins: Sequence[Twin]) -> Ending:
        """images.json: what the networks confuse, what they look at, and where their connections went."""
        found = {twin.name: findings(twin, self._set.valid, self._scale, self._set.shape) for twin in twins}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GuardWarning)  # of a network that is not trained
            start = connections(self.make(settings, dense=False).model, self._set.shape)
        found[SPARSE]["start"] = start
        write_findings(folder, self._set, found)
        return Ending(
            heading=f"on all {len(self._set.valid.labels):,} validation images:",
            body="\n".join(f"{name}: {in_words(one, self._set.names)}" for name, one in found.items()),
            hint=f"use it: rarefy.recipes.images.load_classifier({str(folder)!r})",
        )

    def about(self) -> dict[str, Any]:
        mean, deviation = self._scale
        names = {"names": list(self._set.names), "mean": mean, "deviation": deviation}
        return {"task": self.name, "images": {**self._set.shape._asdict(), **names}}
