"""Labelled images, from folders of several layouts and from the Hugging Face hub.

The layout of MNIST:

    train-images-idx3-ubyte, train-labels-idx1-ubyte      what is learned from
    t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte        what is judged by

each plain, .gz or .xz, with classes.txt, a name a line, where the classes have names. CIFAR-10 in its binary version or
in sheets (`cifar`), folders of pictures (`pictures`), and data sets of the Hugging Face hub (`hugging_face`).
Shape letters: N images, C channels, H and W rows and columns of pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rarefy.recipes.images import cifar, hugging_face, pictures
from rarefy.recipes.images.idx import read_idx

CLASSES = 10

LAYOUTS = (
    "the files of MNIST or Fashion-MNIST, CIFAR-10's binary version, or pictures as train/CLASS/* and test/CLASS/*"
)

KNOWN = {
    "1fe12880064e21a1": (  # Fashion-MNIST, whose files do not say what its classes are
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    ),
}  # fmt: skip
"""Digest -> names of the classes."""

CLASS_NAMES = "classes.txt"


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
    given_names: tuple[str, ...] = ()
    """Of the classes, where the data says; see `names`."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes, in order of their labels."""
        known = self.given_names or KNOWN.get(self.digest(), ())
        return known or tuple(str(label) for label in range(self.classes))

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


def load_images(data: str | None, *, image_column: str | None = None, label_column: str | None = None) -> ImageSet:
    """Read a folder, of whichever layout it has, or a data set of the Hugging Face hub.

    Args:
        data: a folder, hf:NAME or hf:NAME:CONFIGURATION.
        image_column, label_column: with hf:NAME, which columns to read; None: the obvious ones.
    Raises:
        ValueError: no folder, a file is missing, truncated, of another format or another size than its partner, or a
            label is out of range; with the file.
    """
    if data is None:
        raise ValueError(f"which images? give a folder with --data FOLDER: {LAYOUTS}; or hf:NAME")
    if data.startswith("hf:"):
        parts, names = hugging_face.read(data.removeprefix("hf:"), image_column, label_column)
        return _image_set(data, parts, len(names), names)
    if image_column is not None or label_column is not None:
        raise ValueError("--image-column and --label-column are for --data hf:NAME: a folder has no columns")
    folder = Path(data)
    if not folder.is_dir():
        raise ValueError(f"--data {data}: there is no such folder; give one of these: {LAYOUTS}; or hf:NAME")
    if cifar.is_binary(folder) or cifar.is_sheets(folder):
        read = cifar.read_binary if cifar.is_binary(folder) else cifar.read_sheets
        return _image_set(data, {part: read(folder, part) for part in ("train", "test")}, CLASSES, cifar.NAMES)
    if pictures.is_pictures(folder):
        test, names = pictures.held_out(folder), pictures.class_names(folder)
        parts = {part.name: pictures.read_pictures(part, names) for part in (folder / "train", test)}
        return _image_set(data, parts, len(names), tuple(names))
    if not any(folder.glob("*-ubyte*")):
        raise ValueError(f"--data {data}: the folder holds no images of a layout that is known: {LAYOUTS}")
    return _image_set(data, {part: _idx_pair(folder, part) for part in ("train", "t10k")}, CLASSES, _names_in(folder))


def _image_set(data: str, parts: Mapping[str, tuple[Tensor, Tensor]], classes: int, names: tuple[str, ...]) -> ImageSet:
    """Of a part called train and one that is judged by, whose names are said."""
    (_, train), (held_out, valid) = (
        (name, _checked(*part, f"{data}, {name}", classes)) for name, part in parts.items()
    )
    if train.images.shape[1:] != valid.images.shape[1:]:
        raise ValueError(
            f"{data}: training images have {tuple(train.images.shape[1:])} pixels and those of {held_out} "
            f"{tuple(valid.images.shape[1:])}: bring all to one size and number of channels first"
        )
    counts = f"{len(train.labels):,} and {len(valid.labels):,} images"
    what = f"its split {held_out}" if data.startswith("hf:") else f"its {held_out} files"
    return ImageSet(train, valid, f"{data}, judged by {what} ({counts})", classes, names)


def _checked(images: Tensor, labels: Tensor, where: str, classes: int) -> Labelled:
    wrong = ((labels < 0) | (labels >= classes)).nonzero().flatten()
    if len(wrong):
        at = int(wrong[0])
        raise ValueError(f"{where}: label {int(labels[at])} of image {at:,}, and labels are 0 to {classes - 1}")
    return Labelled(images, labels.long())


def _names_in(folder: Path) -> tuple[str, ...]:
    """Of classes.txt, if there is one."""
    path = folder / CLASS_NAMES
    if not path.is_file():
        return ()
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if len(names) != CLASSES:
        raise ValueError(f"{path} should name {CLASSES} classes, a line each, and names {len(names)}")
    return names


def _idx_pair(folder: Path, part: str) -> tuple[Tensor, Tensor]:
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
    return images, labels


def _find(folder: Path, name: str) -> Path:
    for suffix in ("", ".gz", ".xz"):
        path = folder / (name + suffix)
        if path.is_file():
            return path
    raise ValueError(f"{folder} has no {name}, plain, .gz or .xz")
