"""Folders of pictures made up from a formula: each class has a colour, in a place of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

CLASSES = ("moss", "rust", "slate")


def pixels_of(label: int, count: int, side: int = 8, seed: int = 0) -> np.ndarray:
    """(count, side, side, 3) uint8: noise, and a bright quarter in the class's channel."""
    rng = np.random.default_rng([seed, label])
    pixels = rng.integers(90, size=(count, side, side, 3), dtype=np.uint8)
    pixels[:, : side // 2, : side // 2, label] += 150
    return pixels


def write_pictures(folder: Path, *, side: int = 8, seed: int = 0, held_out: str = "test") -> Path:
    """train/CLASS/*.png and test/CLASS/*.png, 16 and 5 of each class; skips where there is no Pillow."""
    image = pytest.importorskip("PIL.Image")
    for part, count in (("train", 16), (held_out, 5)):
        for label, name in enumerate(CLASSES):
            (folder / part / name).mkdir(parents=True)
            for at, pixels in enumerate(pixels_of(label, count, side, seed + (part != "train"))):
                image.fromarray(pixels).save(folder / part / name / f"{at:02}.png")
    return folder
