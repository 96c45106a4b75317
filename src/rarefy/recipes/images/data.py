"""Labelled images: folders of several layouts, and which images a step or an evaluation sees.

The layout of MNIST:

    train-images-idx3-ubyte, train-labels-idx1-ubyte      what is learned from
    t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte        what is judged by

each plain, .gz or .xz. CIFAR-10 in its binary version or in sheets (`cifar`), and folders of pictures (`pictures`).
Shape letters: N images, B of a batch, C channels, H and W rows and columns of pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rarefy.recipes.images import cifar, pictures
from rarefy.recipes.images.idx import read_idx
from rarefy.sampling import keyed_generator

CLASSES = 10

LAYOUTS = (
    "the files of MNIST or Fashion-MNIST, CIFAR-10's binary version, or pictures as train/CLASS/* and test/CLASS/*"
)

EVAL_BATCH = 1000
"""Images that an evaluation looks at together."""


@dataclass(frozen=True)
class Labelled:
    """Images and what is on them."""

    images: Tensor
    """(N, H, W) or (N, C, H, W) uint8."""
    labels: Tensor
    """(N,) int64 in [0, classes)."""


class ImageShape(NamedTuple):
    """Of one image, and how many classes there are."""

    channels: int
    height: int
    width: int
    classes: int = CLASSES

    @property
    def numbers(self) -> int:
        """Of an image."""
        return self.channels * self.height * self.width


@dataclass(frozen=True)
class ImageSet:
    """Images to learn from and images to be judged by."""

    train: Labelled
    valid: Labelled
    source: str
    """What was read, in a sentence for people."""
    classes: int = CLASSES

    @property
    def shape(self) -> ImageShape:
        """Of an image."""
        height, width = self.train.images.shape[-2:]
        channels = self.train.images.shape[1] if self.train.images.dim() == 4 else 1
        return ImageShape(channels, height, width, self.classes)

    def scale(self) -> tuple[float, float]:
        """Mean and deviation of the training pixels, of which 255 is 1."""
        pixels = self.train.images.float() / 255
        deviation, mean = torch.std_mean(pixels)
        return float(mean), max(float(deviation), 1e-6)

    def digest(self) -> str:
        """Names the images and labels: the same for the same content and split."""
        hashed = hashlib.sha256(str((tuple(self.train.images.shape), tuple(self.valid.images.shape))).encode())
        for part in (self.train, self.valid):
            hashed.update(part.images.contiguous().numpy().data)
            hashed.update(part.labels.numpy().data)
        return hashed.hexdigest()[:16]


def load_images(data: str | None) -> ImageSet:
    """Read a folder, of whichever layout it has.

    Raises:
        ValueError: no folder, a file is missing, truncated, of another format or another size than its partner, or a
            label is out of range; with the file.
    """
    if data is None:
        raise ValueError(f"which images? give a folder with --data FOLDER: {LAYOUTS}")
    folder, classes = Path(data), CLASSES
    if not folder.is_dir():
        raise ValueError(f"--data {data}: there is no such folder; give one of these: {LAYOUTS}")
    if cifar.is_binary(folder) or cifar.is_sheets(folder):
        read = cifar.read_binary if cifar.is_binary(folder) else cifar.read_sheets
        held_out = "test"
        train, valid = (_checked(*read(folder, part), folder / part, classes) for part in ("train", held_out))
    elif pictures.is_pictures(folder):
        test, names = pictures.held_out(folder), pictures.class_names(folder)
        held_out, classes = test.name, len(names)
        train, valid = (_checked(*pictures.read_pictures(f, names), f, classes) for f in (folder / "train", test))
    else:
        held_out = "t10k"
        train, valid = (_labelled(folder, part) for part in ("train", held_out))
    if train.images.shape[1:] != valid.images.shape[1:]:
        raise ValueError(
            f"{folder}: training images have {tuple(train.images.shape[1:])} pixels and those of {held_out} "
            f"{tuple(valid.images.shape[1:])}"
        )
    counts = f"{len(train.labels):,} and {len(valid.labels):,} images"
    return ImageSet(train, valid, f"{folder}, judged by its {held_out} files ({counts})", classes)


def _checked(images: Tensor, labels: Tensor, where: Path, classes: int) -> Labelled:
    wrong = (labels >= classes).nonzero().flatten()
    if len(wrong):
        at = int(wrong[0])
        raise ValueError(f"{where}: label {int(labels[at])} of image {at:,}, and labels are 0 to {classes - 1}")
    return Labelled(images, labels.long())


def _labelled(folder: Path, part: str) -> Labelled:
    images_path, labels_path = (_find(folder, f"{part}-{what}-ubyte") for what in ("images-idx3", "labels-idx1"))
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.dim() != 3 or not images.numel():
        raise ValueError(f"{images_path} should hold images x rows x columns, and has shape {tuple(images.shape)}")
    if labels.dim() != 1 or len(labels) != len(images):
        raise ValueError(
            f"{labels_path} has labels of shape {tuple(labels.shape)} for the {len(images):,} images of {images_path}"
        )
    wrong = (labels >= CLASSES).nonzero().flatten()
    if len(wrong):
        at = int(wrong[0])
        raise ValueError(
            f"{labels_path}: label {int(labels[at])} of image {at:,}, at offset {8 + at:,}, and labels are 0 to "
            f"{CLASSES - 1}"
        )
    return Labelled(images, labels.long())


def _find(folder: Path, name: str) -> Path:
    for suffix in ("", ".gz", ".xz"):
        path = folder / (name + suffix)
        if path.is_file():
            return path
    raise ValueError(f"{folder} has no {name}, plain, .gz or .xz")


@dataclass(frozen=True, kw_only=True)
class ImageBatches:
    """Every image once an epoch, in an order of its own. A step's images follow from seed and step alone."""

    data: Labelled
    scale: tuple[float, float]
    """Mean and deviation of pixels."""
    batch: int
    """Images of a step, B; what does not fill one at the end of an epoch is left out of it."""
    seed: int
    """Of orders, shifts and flips."""
    shift: int = 0
    """Pixels that an image is moved at most, up or down and left or right; 0: not at all."""
    flip: bool = False
    """Whether half of the images, at random, are mirrored left to right."""
    _order: dict[int, Tensor] = field(default_factory=dict, repr=False)
    """Of the present epoch, as drawing it takes longer than a step of a small network."""

    def at(self, step: int, micro: int = 0) -> tuple[Tensor, Tensor]:
        """Float images of the set's shape, scaled, and (B,) int64 labels, of step 1, 2, ... ."""
        per_epoch = len(self.data.labels) // self.batch
        epoch, place = divmod(step - 1, per_epoch)
        if epoch not in self._order:
            self._order.clear()
            drawn = keyed_generator(self.seed, "epoch", epoch).permutation(len(self.data.labels))
            self._order[epoch] = torch.from_numpy(drawn)
        chosen = self._order[epoch][place * self.batch : (place + 1) * self.batch]
        images = self.data.images[chosen]
        if self.shift or self.flip:
            images = self._moved(images, step)
        return scaled(images, self.scale), self.data.labels[chosen]

    def _moved(self, images: Tensor, step: int) -> Tensor:
        """Each image moved and mirrored by a draw of its own; what comes in from the edge is 0."""
        draws = keyed_generator(self.seed, "move", step)
        B, (H, W), shape = images.shape[0], images.shape[-2:], images.shape
        x_BCHW = images.reshape(B, -1, H, W)
        if self.flip:
            mirrored = torch.from_numpy(draws.integers(2, size=B)).bool()
            x_BCHW = torch.where(mirrored[:, None, None, None], x_BCHW.flip(3), x_BCHW)
        if self.shift:
            s = self.shift
            down, right = torch.from_numpy(draws.integers(2 * s + 1, size=(2, B, 1)))
            padded = torch.nn.functional.pad(x_BCHW, (s, s, s, s))
            rows, cols = (down + torch.arange(H))[:, :, None], (right + torch.arange(W))[:, None, :]
            moved = padded.permute(0, 2, 3, 1)[torch.arange(B)[:, None, None], rows, cols]
            x_BCHW = moved.permute(0, 3, 1, 2)
        return x_BCHW.reshape(shape)


@dataclass(frozen=True, kw_only=True)
class AllImages:
    """All images of a part, the same at every evaluation."""

    data: Labelled
    scale: tuple[float, float]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Up to EVAL_BATCH float images, scaled, and their labels."""
        for images, labels in zip(
            torch.split(self.data.images, EVAL_BATCH), torch.split(self.data.labels, EVAL_BATCH), strict=True
        ):
            yield scaled(images, self.scale), labels


def scaled(images: Tensor, scale: tuple[float, float]) -> Tensor:
    """uint8 pixels to float32 of mean 0 and deviation 1 over the training images."""
    mean, deviation = scale
    return images.float().div_(255).sub_(mean).div_(deviation)
