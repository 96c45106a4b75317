"""Named tensors and text in one safetensors file: what is read is exactly what was written, or an error says where not.

Our own writer, because that of the safetensors package orders metadata by chance, so that equal states would give
unequal files; our own reader, because it checks every byte while it reads. Any safetensors reader reads the files.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from rarefy.files.atomic import atomic_write

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

DIGEST, TENSORS = "rarefy.digest", "rarefy.tensors"
"""Metadata keys: SHA-256 of the header, and of each tensor's bytes."""

_ZEROS = "0" * 64
"""Stands for a digest while the header is hashed that will hold it."""


@dataclass(frozen=True)
class Container:
    """What a file holds."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    damaged: frozenset[str]
    """Tensors whose bytes are not those that were saved; always empty for a file without digests."""


# -- writing ----------------------------------------------------------------------------------------------------------


def write(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, digests: bool = True
) -> None:
    """Write tensors and metadata; the bytes depend on them alone.

    Args:
        tensors: any strides, device and dtype of `DTYPES`. Copied one at a time, and only if not contiguous on the CPU.
        metadata: text; keys sorted in the file.
        digests: add `DIGEST` and `TENSORS`, by which `read` notices any change. False: a plain safetensors file.
    Raises:
        ValueError: a tensor without bytes of its own (sparse, meta, quantised) or of a dtype that no file has.
        OSError: see `atomic_write`.
    """
    for name, tensor in tensors.items():
        _check_storable(path, name, tensor)
    # Large items first keep every tensor aligned, as the safetensors package orders them too.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    hashes = dict.fromkeys(order, _ZEROS) if digests else {}
    placeholder = _header(tensors, order, metadata, hashes, _ZEROS)
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def content(file: BinaryIO) -> None:
        file.seek(len(placeholder))
        for name in order:
            raw = _bytes_of(tensors[name])
            file.write(raw)
            if digests:
                hashes[name] = hashlib.sha256(raw).hexdigest()
        header = _header(tensors, order, metadata, hashes, _ZEROS)
        if digests:
            header = _header(tensors, order, metadata, hashes, hashlib.sha256(header).hexdigest())
        assert len(header) == len(placeholder)
        file.seek(0)
        file.write(header)

    atomic_write(path, content, size=len(placeholder) + num_bytes)


def _header(
    tensors: Mapping[str, Tensor], order: list[str], metadata: Mapping[str, str], hashes: Mapping[str, str], digest: str
) -> bytes:
    """The file's start: length of the JSON text (8 bytes), and the text, padded so that the data begin at a multiple
    of 8.
    """
    if hashes:
        metadata = {**metadata, DIGEST: digest, TENSORS: compact(dict(sorted(hashes.items())))}
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    begin = 0
    for name in order:
        tensor = tensors[name]
        end = begin + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = compact(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def compact(value: Any) -> str:
    """JSON without spaces, in the order given."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _check_storable(path: str | os.PathLike[str], name: str, tensor: Tensor) -> None:
    problem = ""
    if tensor.layout is not torch.strided:
        problem = f"has the layout {tensor.layout}; save its parts"
    elif tensor.is_meta:
        problem = "is on the meta device and has no values yet"
    elif tensor.dtype not in _NAMES:
        problem = f"has the dtype {tensor.dtype}, which safetensors does not know; convert it first"
    elif name == "__metadata__":
        problem = "has a name that safetensors keeps for itself"
    if problem:
        raise ValueError(f"{os.fspath(path)} cannot be written: {name} {problem}")


def _bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's elements in row-major order, without a copy where they lie so already."""
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


# -- reading ----------------------------------------------------------------------------------------------------------


def read(path: str | os.PathLike[str]) -> Container:
    """Read a safetensors file whole, each tensor into memory of its own.

    Raises:
        ValueError: not safetensors (a pickle is named as such), truncated, malformed, or a header that was changed
            after it was saved. Names the file and the reason.
        OSError: the file cannot be opened.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            entries, metadata, expected = _read_header(file, size)
            tensors = {}
            damaged = set()
            for name, (dtype, shape, _) in sorted(entries.items(), key=lambda entry: entry[1][2]):
                tensors[name] = torch.empty(shape, dtype=dtype)
                raw = _bytes_of(tensors[name])
                if file.readinto(raw) != len(raw):  # type: ignore[attr-defined]
                    raise ValueError(f"truncated: it ends inside {name}")
                if expected is not None and hashlib.sha256(raw).hexdigest() != expected.get(name):
                    damaged.add(name)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from None
    return Container(tensors, metadata, frozenset(damaged))


_Entries = dict[str, tuple[torch.dtype, list[int], tuple[int, int]]]


def _read_header(file: BinaryIO, size: int) -> tuple[_Entries, dict[str, str], dict[str, str] | None]:
    """Entries, metadata, and the digest of each tensor (None in a file without digests), checked against each other
    and the file's size; leaves the file at the first tensor's data.
    """
    prefix = file.read(8)
    if len(prefix) < 8:
        raise ValueError("it is empty" if not prefix else "not a safetensors file: it is shorter than 8 bytes")
    length = int.from_bytes(prefix, "little")
    text = file.read(length) if length <= size - 8 else b""
    if not text.startswith(b"{"):  # only then: the length of a header may begin like a pickle
        _refuse_pickle(prefix)
    if length > size - 8:
        raise ValueError(
            f"not a safetensors file, or truncated: its header should have {length:,} bytes, and {size - 8:,} follow"
        )
    try:
        header = json.loads(text.decode(), object_pairs_hook=_without_repeats)
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(item, str) for item in metadata.values()):
            raise ValueError("metadata are text")
    except (ValueError, RecursionError, AttributeError, TypeError):
        raise ValueError("not a safetensors file, or damaged: its header is not the JSON text expected") from None
    entries = {name: _entry(name, entry) for name, entry in header.items()}
    end = 0
    for name, (_, _, (begin, stop)) in sorted(entries.items(), key=lambda entry: entry[1][2]):
        if begin != end:
            raise ValueError(f"damaged: the data of {name} begin at {begin:,} and not where the last ended, at {end:,}")
        end = stop
    if 8 + length + end > size:
        raise ValueError(f"truncated: it should have {8 + length + end:,} bytes and has {size:,}")
    if 8 + length + end < size:
        raise ValueError(f"damaged: {size - (8 + length + end):,} bytes follow after the last tensor")
    if DIGEST not in metadata and TENSORS not in metadata:
        return entries, metadata, None
    digest = metadata.get(DIGEST, "").encode()
    if len(digest) != 64 or (prefix + text).count(digest) != 1:
        raise ValueError("damaged or tampered with: its digest is missing")
    if hashlib.sha256((prefix + text).replace(digest, _ZEROS.encode())).hexdigest().encode() != digest:
        raise ValueError("damaged or tampered with: its header does not match its digest")
    return entries, metadata, json.loads(metadata[TENSORS])


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def _refuse_pickle(prefix: bytes) -> None:
    """Files of torch.save are zip archives of a pickle, or bare pickles (protocol 2 and later begin with 0x80)."""
    if prefix.startswith(b"PK\x03\x04") or (prefix[0] == 0x80 and 2 <= prefix[1] <= 5):
        raise ValueError(
            "a pickle or zip archive, as torch.save writes them: rarefy never loads pickles, which can run any code. "
            "Load one you trust with torch.load(..., weights_only=True) and model.load_state_dict, then rarefy.save"
        )


def _entry(name: str, entry: Any) -> tuple[torch.dtype, list[int], tuple[int, int]]:
    """dtype, shape and place of a tensor, which must agree."""
    try:
        dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the header's entry of {name} cannot be read: {type(error).__name__} {error}") from None
    if not whole or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"damaged: dtype, shape and place of {name} do not fit together")
    return dtype, shape, (begin, end)
