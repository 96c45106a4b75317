"""Labelled images of the Hugging Face hub, through `datasets`, from its cache where that has them.

`datasets` 4 and newer runs no code that a data set brings along; older ones are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

HELD_OUT = ("test", "validation", "valid", "val")

LEAST_VERSION = 4

GREY = ("1", "L")
"""Pillow's modes of images without colour."""

NAMED = {"image": ("image", "img"), "label": ("label", "labels")}
"""What a column is usually called; the first that is there is taken where several would do."""


def read(
    name: str, image_column: str | None = None, label_column: str | None = None
) -> tuple[dict[str, tuple[Tensor, Tensor]], tuple[str, ...]]:
    """Train and held-out parts, and the names of the classes.

    Args:
        name: of the data set, or NAME:CONFIGURATION.
        image_column, label_column: None: the only one, or the one with the usual name.
    Returns:
        split -> (N, H, W) or (N, 3, H, W) uint8 images and (N,) int64 labels; the first split is train.
    Raises:
        ValueError: `datasets` is missing or too old, the data set cannot be loaded, it has no such split or column, or
            images differ in size.
    """
    datasets = _library(name)
    repository, _, configuration = name.partition(":")
    try:
        found = dict(datasets.load_dataset(repository, configuration or None))
    except Exception as error:  # it raises what its many readers raise
        raise ValueError(f"--data hf:{name} could not be loaded: {_reason(error)}") from error
    held_out = next((split for split in HELD_OUT if split in found), None)
    if "train" not in found or held_out is None:
        raise ValueError(
            f"--data hf:{name} should have a split train and one of {', '.join(HELD_OUT)} to be judged by; it has: "
            f"{', '.join(found)}"
        )
    features = found["train"].features
    images = _column(name, "image", image_column, features, _is_image)
    labels = _column(name, "label", label_column, features, _is_label)
    parts = {split: _part(found[split], images, labels, f"hf:{name}, {split}") for split in ("train", held_out)}
    names = getattr(features[labels], "names", None)
    if not names:
        names = [str(label) for label in range(1 + max(int(part[1].max()) for part in parts.values()))]
    return parts, tuple(str(one) for one in names)


def _library(name: str) -> ModuleType:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(f"--data hf:{name} needs the datasets package: pip install datasets") from None
    version = str(datasets.__version__)
    if int(version.partition(".")[0]) < LEAST_VERSION:
        raise ValueError(
            f"--data hf:{name} needs datasets {LEAST_VERSION} or newer, which runs no code of a data set; {version} is "
            "installed: pip install -U datasets"
        )
    return datasets


def _reason(error: Exception) -> str:
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, ConnectionError):
        return f"it is not in the cache, and the hub cannot be reached ({said}): connect once, or give a folder"
    return said


def _is_image(kind: Any) -> bool:
    return type(kind).__name__ == "Image"


def _is_class(kind: Any) -> bool:
    return type(kind).__name__ == "ClassLabel"


def _is_label(kind: Any) -> bool:
    return _is_class(kind) or "int" in str(getattr(kind, "dtype", ""))


def _column(name: str, what: str, asked: str | None, features: Mapping[str, Any], fits: Callable[[Any], bool]) -> str:
    """The column to read: the one asked for, or the obvious one.

    Plain integers may be anything: without being asked for, they are labels only where they are called so.
    """
    fit, known = [column for column, kind in features.items() if fits(kind)], ", ".join(features)
    if asked is not None:
        if asked not in features:
            raise ValueError(f"--data hf:{name} has no column {asked!r} (--{what}-column); it has: {known}")
        if asked not in fit:
            raise ValueError(
                f"--data hf:{name}: column {asked!r} holds no {what}s; these do: {', '.join(fit) or 'none'}"
            )
        return asked
    usual = [column for column in NAMED[what] if column in fit]
    sure = [column for column in fit if _is_image(features[column]) or _is_class(features[column])]
    if usual or len(sure) == 1:
        return (usual or sure)[0]
    which = f"several columns of {what}s ({', '.join(sure)}): say which" if sure else f"no column of {what}s"
    raise ValueError(f"--data hf:{name} has {which}; --{what}-column names one of: {known}")


def _part(rows: Any, image_column: str, label_column: str, where: str) -> tuple[Tensor, Tensor]:
    """All of a split. Grey where its first image is, else in colour."""
    images: list[np.ndarray] = []
    grey = False
    for at, image in enumerate(rows[image_column]):
        if not at:
            grey = image.mode in GREY
        if grey and image.mode not in GREY:
            raise ValueError(f"{where}: image {at:,} has colours (mode {image.mode}), and those before it are grey")
        pixels = np.asarray(image.convert("L" if grey else "RGB"))
        if images and pixels.shape != images[0].shape:
            (height, width), (rows_, cols) = pixels.shape[:2], images[0].shape[:2]
            raise ValueError(
                f"{where}: image {at:,} has {width} x {height} pixels, and those before it {cols} x {rows_}: bring all "
                "to one size first"
            )
        images.append(pixels)
    if not images:
        raise ValueError(f"{where} holds no image")
    pixels = torch.from_numpy(np.stack(images))
    labels = torch.tensor([-1 if label is None else int(label) for label in rows[label_column]])
    return (pixels if grey else pixels.permute(0, 3, 1, 2).contiguous()), labels
