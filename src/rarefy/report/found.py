"""images.json as the report reads it: what the networks of a run of images confuse, look at, and connect."""

from __future__ import annotations

import base64
import binascii
import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rarefy.recipes.images.findings import FORMAT


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Bytes with their shape."""

    shape: tuple[int, ...]
    pixels: str
    """Base64."""

    def __post_init__(self) -> None:
        if len(self.raw) != math.prod(self.shape):
            raise ValueError(f"{len(self.raw)} bytes are no {'x'.join(map(str, self.shape))} pixels")

    @cached_property
    def raw(self) -> bytes:
        try:
            return base64.b64decode(self.pixels, validate=True)
        except binascii.Error as error:
            raise ValueError(f"pixels are no base64: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Mistake(Packed):
    """An image, (C, H, W), that was taken for something else."""

    image: int
    true: int
    predicted: int
    confidence: float


@dataclass(frozen=True, kw_only=True)
class Filters(Packed):
    """Of a first convolution, (O, C, h, w); 128 is a weight of 0."""

    name: str


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A sparse layer."""

    name: str
    density: float
    taps: list[list[int]] | None = None
    """Weights at each place of a kernel."""


@dataclass(frozen=True, kw_only=True)
class Connections:
    """Where the units of a network are."""

    layers: list[Layer]
    inputs: list[list[int]] | None
    """How many weights of a sparse first layer read each pixel."""


@dataclass(frozen=True, kw_only=True)
class FoundTwin(Connections):
    """A network at its last step."""

    step: int
    confusion: list[list[int]]
    """Counts: a row a true class, a column a predicted one."""
    wrong: list[Mistake]
    first_layer: Filters | None
    start: Connections | None = None
    """Before its first step; None for a dense network."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """All of images.json."""

    format: int
    names: list[str]
    images: int
    """That the networks were judged by."""
    twins: dict[str, FoundTwin]

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"it is of format {self.format}, and {FORMAT} can be read")
        classes = len(self.names)
        for twin in self.twins.values():
            if [len(row) for row in twin.confusion] != [classes] * classes:
                raise ValueError(f"a confusion matrix is not {classes} x {classes}")
            if any(not 0 <= label < classes for one in twin.wrong for label in (one.true, one.predicted)):
                raise ValueError(f"a label is not among the {classes} classes")


def read_found(path: Path, notes: list[str]) -> Found | None:
    """What the file says, or None and a line in `notes` about why not."""
    from pydantic import TypeAdapter, ValidationError  # slow to load

    try:
        return TypeAdapter(Found).validate_python(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        notes.append(f"{path.name} is missing: what the networks confuse and look at is written when a run ends.")
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        notes.append(f"{path.name} cannot be read: {where + ': ' if where else ''}{problem['msg']}.")
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.name} cannot be read: {error}.")
    return None
