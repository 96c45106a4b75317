"""CIFAR-10 (Krizhevsky 2009), in two layouts.

Its binary version: data_batch_1.bin ... data_batch_5.bin and test_batch.bin, of records of 3,073 bytes: the label, then
the red, green and blue planes of 32 x 32 pixels. Sheets: train_00.webp, ..., test_00.webp, ..., lossless pictures of 50
rows of 100 tiles of 32 x 32 pixels, and labels.npz with `train` and `test`.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SIDE = 32

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

RECORD = 1 + 3 * SIDE * SIDE
SHEET_ROWS, SHEET_COLS = 50, 100


def is_binary(folder: Path) -> bool:
    """Whether it looks like the binary version."""
    return (folder / "data_batch_1.bin").is_file() or (folder / "test_batch.bin").is_file()


def is_sheets(folder: Path) -> bool:
    """Whether it looks like sheets."""
    return (folder / "labels.npz").is_file()


def read_binary(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """(N, 3, 32, 32) uint8 images and (N,) uint8 labels of the part "train" or "test".

    Raises:
        ValueError: a file is missing, empty, or ends inside a record; with the file and the offset.
    """
    names = [f"data_batch_{at}.bin" for at in range(1, 6)] if part == "train" else ["test_batch.bin"]
    images, labels = [], []
    for name in names:
        path = folder / name
        try:
            raw = np.fromfile(path, dtype=np.uint8)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
        whole = raw.size // RECORD * RECORD
        if whole != raw.size or not whole:
            raise ValueError(
                f"{path} ends at offset {raw.size:,}, inside the record that begins at {whole:,}: a record has "
                f"{RECORD:,} bytes, so it is truncated or another format"
            )
        records = torch.from_numpy(raw).view(-1, RECORD)
        labels.append(records[:, 0])
        images.append(records[:, 1:].reshape(-1, 3, SIDE, SIDE))
    return torch.cat(images), torch.cat(labels)


def read_sheets(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """As `read_binary`.

    Raises:
        ValueError: Pillow is not installed, a sheet is missing or damaged, or there are more labels than tiles.
    """
    path = folder / "labels.npz"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            labels = torch.from_numpy(arrays[part].astype(np.uint8))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} holds no array {part!r} that can be read: {error}") from error
    sheets = sorted(folder.glob(f"{part}_*.webp"))
    per_sheet = SHEET_ROWS * SHEET_COLS
    if labels.dim() != 1 or len(sheets) * per_sheet < len(labels):
        raise ValueError(
            f"{folder} has {len(sheets)} sheets {part}_*.webp of {per_sheet:,} tiles each, and {path} labels of shape "
            f"{tuple(labels.shape)}"
        )
    return torch.cat([_tiles(sheet) for sheet in sheets])[: len(labels)], labels


def _tiles(path: Path) -> Tensor:
    pixels = read_picture(path)
    wanted = (SHEET_ROWS * SIDE, SHEET_COLS * SIDE, 3)
    if tuple(pixels.shape) != wanted:
        raise ValueError(f"{path} should be a picture of {wanted[1]} x {wanted[0]} pixels, and is {pixels.shape[1]} x "
                         f"{pixels.shape[0]}")  # fmt: skip
    tiles = pixels.view(SHEET_ROWS, SIDE, SHEET_COLS, SIDE, 3).permute(0, 2, 4, 1, 3)
    return tiles.reshape(-1, 3, SIDE, SIDE)


def read_picture(path: Path, mode: str = "RGB") -> Tensor:
    """(H, W, 3) uint8, of any format that Pillow reads.

    Args:
        mode: "L" for grey, (H, W).
    Raises:
        ValueError: Pillow is not installed, or the file cannot be read whole.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ValueError(f"{path} needs Pillow to be read: pip install 'rarefy[images]'") from error
    try:
        with Image.open(path) as picture:
            return torch.from_numpy(np.array(picture.convert(mode)))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error
