"""What a rarefy file says, checked whole before anything is believed."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from rarefy.files import container, tree
from rarefy.pattern import Pattern

VERSION = 1
"""Of the format; raised when a reader of the last one would misread a file."""

ARRAYS = ("values", "crow_indices", "col_indices")
"""What a sparse layer has in a file, after its name and a dot."""


def key(layer: str, part: str) -> str:
    """Name of a layer's part; a model that is itself a sparse layer has the empty name."""
    return f"{layer}.{part}" if layer else part


@dataclass(frozen=True)
class Checkpoint:
    """The content of a file."""

    path: Path
    tensors: dict[str, Tensor]
    """The model's parameters and buffers by state_dict name, but for index arrays; tied ones under all their names."""
    patterns: dict[str, Pattern] = field(default_factory=dict)
    """Of the sparse layers, by layer name."""
    transposed: frozenset[str] = frozenset()
    """Sparse layers that took the place of one whose dense weight is stored (in, out)."""
    kernels: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Of the sparse convolutions, by layer name."""
    low_rank: dict[str, float] = field(default_factory=dict)
    """Layers with a low-rank part -> its scale; their sparse part is in `patterns` as `{name}.sparse`."""
    architecture: dict[str, Any] | None = None
    """{"class": the model's, as "rarefy.GPT", "config": its settings as plain data, or None}."""
    optimizer: dict[str, Any] | None = None
    """The optimizer's state_dict."""
    optimizer_of: dict[str, Any] | None = None
    """{"class": the optimizer's, "names": parameter names by group, None for one that is not the model's}."""
    rewirer: dict[str, Any] | None = None
    """`Rewirer.state_dict`."""
    extra: Any = None
    """What the caller of `save` added."""

    def state_dict(self) -> dict[str, Tensor]:
        """The model's state_dict, index arrays included. Shares memory with `tensors` and `patterns`."""
        state = dict(self.tensors)
        for name, pattern in self.patterns.items():
            state[key(name, "crow_indices")] = pattern.crow_indices
            state[key(name, "col_indices")] = pattern.col_indices
        return state


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a file whole and check it whole: digests, patterns, counts.

    A safetensors file that rarefy did not write is read as plain tensors, unless it has the arrays of a sparse layer:
    without the metadata their pattern cannot be checked.

    Raises:
        ValueError: what is wrong, with file and layer: not safetensors, a pickle, truncated, changed after it was
            saved, a newer format, or a pattern that is missing or impossible.
        OSError: the file cannot be opened.
    """
    found = container.read(path)
    try:
        return _checked(Path(path), found)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from None


def _checked(path: Path, found: container.Container) -> Checkpoint:
    metadata = {name: text for name, text in found.metadata.items() if name.startswith("rarefy.")}
    if not metadata:
        for name in found.tensors:
            if name.endswith("crow_indices"):
                layer = name.removesuffix("crow_indices").rstrip(".")
                raise ValueError(
                    f"{layer or 'the model'}: arrays of a sparse layer without its shape and pattern digest: rarefy "
                    "did not write this file. Load it with safetensors.torch.load_file and model.load_state_dict, "
                    "then rarefy.save"
                )
        return Checkpoint(path, dict(found.tensors))
    _check_version(metadata.get("rarefy.version"))
    try:
        parts = {name: json.loads(text) for name, text in metadata.items() if name != container.DIGEST}
        return _assemble(path, found, parts)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its metadata cannot be read: {type(error).__name__} {error}") from None


def _check_version(version: str | None) -> None:
    if version is None or not version.isdecimal():
        raise ValueError(f"its metadata name no format version (found {version!r})")
    if int(version) > VERSION:
        raise ValueError(f"format version {version}, and this rarefy reads up to {VERSION}: upgrade rarefy")


def _assemble(path: Path, found: container.Container, parts: dict[str, Any]) -> Checkpoint:
    tensors, damaged = found.tensors, found.damaged
    layers, aliases = parts["rarefy.layers"], parts.get("rarefy.aliases", {})
    trees = {
        part: parts.get(f"rarefy.{part}") for part in ("architecture", "optimizer", "optimizer_of", "rewirer", "extra")
    }
    theirs = set().union(*(tree.tensor_names(node) for node in trees.values()))
    model = {name: tensor for name, tensor in tensors.items() if name not in theirs}
    for name, stored in aliases.items():
        if stored not in model:
            raise ValueError(f"{name}: is stored as {stored}, which the file does not have")
        model[name] = model[stored]
    patterns = {}
    for name, layer in layers.items():
        altered = [part for part in ARRAYS if aliases.get(key(name, part), key(name, part)) in damaged]
        patterns[name] = _pattern(name or "the model", layer, [model.get(key(name, part)) for part in ARRAYS], altered)
    for name in sorted(damaged):
        raise ValueError(f"{name}: damaged or tampered with: its bytes do not match their digest")
    missing = sorted(set(parts[container.TENSORS]) - set(tensors)) if container.TENSORS in parts else []
    if missing:
        raise ValueError(f"{missing[0]}: missing, though the file has its digest")
    for name in layers:
        for part in ARRAYS[1:]:
            del model[key(name, part)]
    decoded = {part: tree.decode(node, tensors) for part, node in trees.items()}
    transposed = frozenset(name for name, layer in layers.items() if layer.get("transposed"))
    kernels = {name: _kernel(name, layer) for name, layer in layers.items() if "kernel" in layer}
    low_rank = {
        name.rpartition(".")[0]: _scale(name, layer["low_rank"], model)
        for name, layer in layers.items()
        if "low_rank" in layer
    }
    return Checkpoint(path, model, patterns, transposed, kernels, low_rank, **decoded)


def _kernel(name: str, layer: dict[str, Any]) -> tuple[int, ...]:
    """Of a convolution's entry in the metadata."""
    kernel, shape = layer["kernel"], layer["shape"]
    sound = isinstance(kernel, list) and len(kernel) in (1, 2) and all(type(n) is int and n > 0 for n in kernel)
    if not sound or shape[1] % math.prod(kernel):
        raise ValueError(f"{name or 'the model'}: a kernel of {kernel!r} does not fit a matrix of {shape}")
    return tuple(kernel)


def _scale(name: str, low_rank: dict[str, Any], model: dict[str, Tensor]) -> float:
    """The scale of the low-rank part beside a sparse one, if that is all there.

    Args:
        name: of the sparse part.
    """
    parent, rank, scale = name.rpartition(".")[0], low_rank["rank"], low_rank["scale"]
    for part, side in (("a", 0), ("b", 1)):
        tensor = model.get(key(parent, part))
        if tensor is None or tensor.dim() != 2 or tensor.shape[side] != rank:
            found = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
            raise ValueError(f"{parent or 'the model'}: {part} of its low-rank part of rank {rank} is {found}")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise ValueError(f"{parent or 'the model'}: the scale of its low-rank part is {scale!r}")
    return float(scale)


def _pattern(name: str, layer: dict[str, Any], arrays: list[Tensor | None], altered: list[str]) -> Pattern:
    """The layer's pattern, if its arrays are all there and are those that the metadata describe."""
    values, crow, cols = arrays
    if values is None:
        raise ValueError(f"{name}: its values are missing")
    if crow is None or cols is None:
        raise ValueError(f"{name}: its pattern is missing ({'crow' if crow is None else 'col'}_indices)")
    block = tuple(layer["block"])
    try:
        pattern = Pattern(crow, cols, layer["shape"], block)
        expected = (pattern.num_units,) if block == (1, 1) else (pattern.num_units, *block)
        if pattern.num_units != layer["units"]:
            raise ValueError(f"{pattern.num_units} units, and {layer['units']} were saved")
        if tuple(values.shape) != expected:
            raise ValueError(f"values of shape {tuple(values.shape)}, and its pattern needs {expected}")
        if pattern.digest() != layer["digest"]:
            raise ValueError("its pattern does not match the digest that was saved")
    except ValueError as error:
        note = f" ({', '.join(altered)} changed after the file was saved)" if altered else ""
        raise ValueError(f"{name}: {error}{note}") from None
    return pattern
