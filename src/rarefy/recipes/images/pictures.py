"""A folder of pictures: train/CLASS/* and test/CLASS/* (or valid, val), all of one size."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rarefy.recipes.images.cifar import read_picture

HELD_OUT = ("test", "valid", "val")

PASSED_OVER = {"thumbs.db", "desktop.ini"}
"""What systems leave in folders of pictures, besides hidden files."""

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"}


def is_pictures(folder: Path) -> bool:
    """Whether it looks like one."""
    return (folder / "train").is_dir()


def held_out(folder: Path) -> Path:
    """The folder of pictures to be judged by. Raises ValueError when there is none."""
    for name in HELD_OUT:
        if (folder / name).is_dir():
            return folder / name
    raise ValueError(f"{folder} has train, and none of {', '.join(HELD_OUT)} to be judged by")


def class_names(folder: Path) -> list[str]:
    """Of train's folders, in order.

    Raises:
        ValueError: fewer than two.
    """
    names = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
    if len(names) < 2:
        raise ValueError(f"{folder / 'train'} should have a folder of pictures for each class, and has {len(names)}")
    return names


def read_pictures(folder: Path, names: list[str]) -> tuple[Tensor, Tensor]:
    """(N, 3, H, W) uint8 and (N,) uint8 labels, the place of the class in `names`.

    Raises:
        ValueError: a class has no folder or no picture, there is a class that is not in `names`, or a file is no
            picture, cannot be read, or has another size than the first.
    """
    unknown = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name not in names)
    if unknown:
        raise ValueError(f"{folder} has a class {unknown[0]!r}, which train does not have")
    if len(names) > 256:
        raise ValueError(f"{folder} has {len(names)} classes, and at most 256 can be told apart here")
    images: list[Tensor] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        files = _files(folder / name)
        for path in files:
            pixels = read_picture(path).permute(2, 0, 1)
            if images and pixels.shape != images[0].shape:
                raise ValueError(
                    f"{path} has {pixels.shape[2]} x {pixels.shape[1]} pixels, and those before it "
                    f"{images[0].shape[2]} x {images[0].shape[1]}: bring all to one size first"
                )
            images.append(pixels)
            labels.append(label)
    return torch.stack(images), torch.tensor(labels, dtype=torch.uint8)


def _files(folder: Path) -> list[Path]:
    """The pictures of a class, in order. A file that is none is an error: it may be one that was meant to count."""
    there = [path for path in sorted(folder.glob("*")) if path.name[0] != "." and path.name.lower() not in PASSED_OVER]
    known = ", ".join(sorted(SUFFIXES))
    for path in there:
        if path.is_dir() or path.suffix.lower() not in SUFFIXES:
            what = "a folder" if path.is_dir() else "no picture by its name"
            raise ValueError(f"{path} is {what}, and {folder} should hold pictures alone ({known}): move it elsewhere")
    if not there:
        raise ValueError(f"{folder} has no picture ({known})")
    return there
