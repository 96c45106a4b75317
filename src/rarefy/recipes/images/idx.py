"""IDX files, the format of MNIST and its kin (LeCun, Cortes & Burges, "The MNIST database"), read whole and checked.

Two zero bytes, the type, the number of dimensions, each dimension as a big-endian 32-bit integer, then the entries in
row-major order. Only unsigned bytes (type 0x08) are read: images and labels have no other.
"""

from __future__ import annotations

import gzip
import lzma
import math
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

UNSIGNED_BYTE = 0x08

MOST_DIMENSIONS = 4

CHUNK_BYTES = 1 << 20


def read_idx(path: Path) -> Tensor:
    """The entries of a plain, .gz or .xz file: uint8, in the file's shape.

    Reads no more than the header promises and one byte, so that a damaged or hostile file costs no more memory.

    Raises:
        ValueError: it cannot be read or unpacked, is no IDX file of unsigned bytes, ends early, or goes on after its
            last entry; with the file and the offset, counted in unpacked bytes.
    """
    with _opened(path) as file:
        head = _take(file, 4, path, 0)
        if len(head) < 4 or head[:2] != b"\0\0":
            raise ValueError(f"{path} is no IDX file: at offset 0 it has {_hex(head)}, and should have 00 00")
        if head[2] != UNSIGNED_BYTE:
            raise ValueError(f"{path}: type 0x{head[2]:02x} at offset 2, and only unsigned bytes (0x08) can be read")
        if not 1 <= head[3] <= MOST_DIMENSIONS:
            raise ValueError(f"{path}: {head[3]} dimensions at offset 3, and 1 to {MOST_DIMENSIONS} can be read")
        sizes = _take(file, 4 * head[3], path, 4)
        begin = 4 + 4 * head[3]
        if len(sizes) < 4 * head[3]:
            raise ValueError(f"{path} ends at offset {4 + len(sizes)}, inside its header of {begin} bytes")
        shape = tuple(int(size) for size in np.frombuffer(sizes, dtype=">u4"))
        wanted = math.prod(shape)
        entries = _take(file, wanted + 1, path, begin)
    if len(entries) < wanted:
        raise ValueError(
            f"{path} ends at offset {begin + len(entries):,}: its header says {'x'.join(map(str, shape))} entries, so "
            f"it should have {begin + wanted:,} bytes; it is truncated"
        )
    if len(entries) > wanted:
        raise ValueError(
            f"{path} goes on after offset {begin + wanted:,}, where the {'x'.join(map(str, shape))} entries of its "
            "header end"
        )
    return torch.from_numpy(np.frombuffer(entries, dtype=np.uint8).copy()).view(shape)


def _opened(path: Path) -> BinaryIO:
    try:
        if path.suffix == ".gz":
            return cast(BinaryIO, gzip.open(path, "rb"))
        if path.suffix == ".xz":
            return cast(BinaryIO, lzma.open(path, "rb"))
        return path.open("rb")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error


def _take(file: BinaryIO, count: int, path: Path, offset: int) -> bytearray:
    """Up to `count` further bytes; fewer at the end of the file."""
    taken = bytearray()
    try:
        while len(taken) < count:
            part = file.read(min(CHUNK_BYTES, count - len(taken)))
            if not part:
                break
            taken += part
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} cannot be unpacked beyond offset {offset + len(taken):,}: {reason}") from error
    return taken


def _hex(head: bytes | bytearray) -> str:
    return bytes(head[:2]).hex(" ") or "nothing"
