"""Text as bytes: where it comes from and how it is split into training and validation.

    load_corpus(None)                     the standard library of the Python that runs, split by file
    load_corpus("shelf/books.txt.xz")     one file, plain, .gz or .xz; its sibling valid.* if it is called train.*
    load_corpus("shelf/")                 the text files of a folder, split by file
    load_corpus("hf:roneneldan/TinyStories")   a data set of the Hugging Face hub, through `datasets`

Everything is deterministic: the same files give the same bytes in the same order.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import platform
import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

VALID_SHARE = 0.1
"""Of the files, or of the bytes of a single file, kept for validation."""

NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
"""Folders of the standard library that are left out: what others installed, and tests, which repeat themselves."""

BINARY_PROBE_BYTES = 8192
"""A file of a folder with a zero byte in its first so many is no text and is passed over."""


@dataclass(frozen=True)
class Corpus:
    """Text to learn from and text to be judged by."""

    train: Tensor
    """(bytes,) uint8."""
    valid: Tensor
    """(bytes,) uint8; none of it is in `train`."""
    source: str
    """What was read and how it was split, in a sentence for people."""

    def digest(self) -> str:
        """Names the bytes: the same for the same text and split."""
        hashed = hashlib.sha256(str(self.train.numel()).encode())
        for part in (self.train, self.valid):
            hashed.update(part.numpy().data)
        return hashed.hexdigest()[:16]


def load_corpus(data: str | None = None, *, context: int = 1) -> Corpus:
    """Read the text that `data` names.

    Args:
        data: None for the standard library's source, "hf:NAME" or "hf:NAME:CONFIGURATION", or the path of a file or
            folder.
        context: bytes that a prediction sees; both parts must have at least one more.
    Raises:
        ValueError: missing, empty, not UTF-8 (the file and the byte offset are named), or too small for the context.
    """
    if data is None:
        corpus = _standard_library()
    elif data.startswith("hf:"):
        corpus = _hugging_face(data.removeprefix("hf:"))
    elif Path(data).is_dir():
        corpus = _folder(Path(data))
    elif Path(data).is_file():
        corpus = _file(Path(data))
    else:
        raise ValueError(
            f"--data {data}: there is no such file or folder; give a text file, a folder of them, or hf:NAME"
        )
    for part, tensor in (("training", corpus.train), ("validation", corpus.valid)):
        if tensor.numel() < context + 1:
            raise ValueError(
                f"{data or 'the standard library'}: the {part} text has {tensor.numel():,} bytes, and a context of "
                f"{context:,} needs at least {context + 1:,}: give more text or a smaller --context"
            )
    return corpus


# -- sources --------------------------------------------------------------------------------------------------------


def _standard_library() -> Corpus:
    """The .py files of the standard library, by relative path; those that are not UTF-8 are left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: dict[str, bytes] = {}
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        name = path.relative_to(root).as_posix()
        if NOT_LIBRARY.isdisjoint(name.split("/")[:-1]):
            raw = path.read_bytes()
            if _utf8_fault(raw) is None:
                parts[name] = raw
    if len(parts) < 2:
        raise ValueError(
            f"this Python has no source of its standard library in {root}: give text with --data FILE or DIRECTORY"
        )
    return _split_by_file(parts, f"the source of Python {platform.python_version()}'s standard library")


def _folder(root: Path) -> Corpus:
    """A folder of train.* and perhaps valid.*, else its text files at any depth, hidden and binary ones left out."""
    named = [path for path in sorted(root.iterdir()) if path.is_file() and path.name.startswith("train.")]
    if len(named) == 1:
        return _file(named[0])
    parts: dict[str, bytes] = {}
    passed = 0
    for path in sorted(root.rglob("*"), key=lambda path: path.relative_to(root).as_posix()):
        name = path.relative_to(root).as_posix()
        if path.is_file() and not any(piece.startswith(".") for piece in name.split("/")):
            raw = _read(path)
            if b"\0" in raw[:BINARY_PROBE_BYTES]:
                passed += 1
            elif raw:
                parts[name] = _checked(raw, path)
    if not parts:
        raise ValueError(
            f"{root} holds no text: "
            + (f"all of its {passed} files are binary" if passed else "it has no files, or empty ones")
        )
    note = f" ({passed} binary file{'s' if passed > 1 else ''} left out)" if passed else ""
    if len(parts) == 1:
        ((name, raw),) = parts.items()
        return _split_tail(raw, f"{root / name}{note}")
    return _split_by_file(parts, f"{root}{note}")


def _file(path: Path) -> Corpus:
    """One file, and its sibling valid.* (validation, dev, test) if it is called train.*, else its own last tenth."""
    raw = _checked(_read(path), path)
    if path.name.startswith("train."):
        for stem in ("valid", "validation", "dev", "test"):
            for suffix in dict.fromkeys((path.name.removeprefix("train"), ".txt", ".txt.xz", ".txt.gz")):
                sibling = path.with_name(stem + suffix)
                if sibling.is_file():
                    valid = _checked(_read(sibling), sibling)
                    return _corpus(raw, valid, f"{path}, validation on {sibling.name} beside it")
    return _split_tail(raw, str(path))


def _hugging_face(name: str) -> Corpus:
    """The text column of a data set's train split, rows joined by line feeds."""
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(f"--data hf:{name} needs the datasets package: pip install datasets") from None
    repository, _, configuration = name.partition(":")
    try:
        found = datasets.load_dataset(repository, configuration or None)
    except Exception as error:  # it raises what its many readers raise, network errors among them
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"--data hf:{name} could not be loaded: {reason}") from error
    splits = dict(found)
    if "train" not in splits:
        raise ValueError(f"--data hf:{name} has no split called train; it has: {', '.join(splits)}")
    texts = {}
    for split, rows in splits.items():
        strings = [
            column
            for column, kind in rows.features.items()
            if getattr(kind, "dtype", None) in ("string", "large_string")
        ]
        if split in ("train", "validation", "valid", "test"):
            if not strings:
                raise ValueError(f"--data hf:{name} has no column of text; it has: {', '.join(rows.features)}")
            column = "text" if "text" in strings else strings[0]
            texts[split] = "\n".join(rows[column]).encode()
    for split in ("validation", "valid", "test"):
        if texts.get(split):
            return _corpus(texts["train"], texts[split], f"hf:{name}, validation on its split {split}")
    return _split_tail(texts["train"], f"hf:{name}")


# -- splits ---------------------------------------------------------------------------------------------------------


def _split_by_file(parts: dict[str, bytes], what: str) -> Corpus:
    """A tenth of the files for validation: those whose names hash lowest, which looks random and never moves."""
    ranked = sorted(parts, key=lambda name: (hashlib.sha256(name.encode()).digest(), name))
    chosen = set(ranked[: max(1, round(VALID_SHARE * len(parts)))])
    train = b"".join(raw for name, raw in parts.items() if name not in chosen)
    valid = b"".join(raw for name, raw in parts.items() if name in chosen)
    return _corpus(
        train, valid, f"{what}: {len(parts):,} files, validation on the {len(chosen):,} whose names hash lowest"
    )


def _split_tail(raw: bytes, what: str) -> Corpus:
    at = len(raw) - round(VALID_SHARE * len(raw))
    return _corpus(raw[:at], raw[at:], f"{what}, validation on its last {VALID_SHARE:.0%}")


def _corpus(train: bytes, valid: bytes, source: str) -> Corpus:
    tensors = [torch.from_numpy(np.frombuffer(part, dtype=np.uint8).copy()) for part in (train, valid)]
    return Corpus(tensors[0], tensors[1], f"{source} ({len(train):,} and {len(valid):,} bytes)")


# -- files ----------------------------------------------------------------------------------------------------------


def _read(path: Path) -> bytes:
    """A file's bytes, unpacked if its name ends in .gz or .xz.

    Raises:
        ValueError: it cannot be read or unpacked.
    """
    try:
        if path.suffix == ".gz":
            return gzip.decompress(path.read_bytes())
        if path.suffix == ".xz":
            return lzma.decompress(path.read_bytes())
        return path.read_bytes()
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _checked(raw: bytes, path: Path) -> bytes:
    """`raw` itself, if it is text.

    Raises:
        ValueError: it is empty or not UTF-8.
    """
    if not raw:
        raise ValueError(f"{path} is empty")
    fault = _utf8_fault(raw)
    if fault is not None:
        raise ValueError(
            f"{path} is not UTF-8: byte 0x{raw[fault]:02x} at offset {fault:,}; convert it first, for example with "
            "iconv -f latin1 -t utf-8"
        )
    return raw


def _utf8_fault(raw: bytes) -> int | None:
    """Offset of the first byte that is not UTF-8; None: all of it is."""
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return None
