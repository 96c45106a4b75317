"""Nested state (of optimizers, the engine, a training loop) as JSON text plus tensors, exactly and without pickle.

None, booleans, numbers, strings, lists and dicts with plain string keys are JSON as they are. Everything else is an
object with one key: {"$tensor": name in the file}, {"$tuple": [items]}, {"$float": "nan" | "inf" | "-inf"},
{"$dict": [[key, value], ...]} for keys that are not strings, or begin with "$". Dicts are sorted by key, so that
equal states give equal text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def encode(tree: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """What JSON can say of `tree`; its tensors are added to `tensors` under `name` and their path, joined by dots.

    Raises:
        ValueError: an object that is none of those named above; says where.
    """
    if tree is None or isinstance(tree, bool | str):
        return tree
    if isinstance(tree, Tensor):
        while name in tensors:  # two paths may read alike, as ["a.b"] and ["a"]["b"] do
            name += "'"
        tensors[name] = tree
        return {"$tensor": name}
    if isinstance(tree, int):
        return int(tree)
    if isinstance(tree, float):
        return float(tree) if math.isfinite(tree) else {"$float": str(float(tree))}
    if isinstance(tree, list):
        return [encode(item, f"{name}.{i}", tensors) for i, item in enumerate(tree)]
    if isinstance(tree, tuple):
        return {"$tuple": [encode(item, f"{name}.{i}", tensors) for i, item in enumerate(tree)]}
    if isinstance(tree, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in tree):
            return {key: encode(tree[key], f"{name}.{key}", tensors) for key in sorted(tree)}
        for key in tree:
            if not isinstance(key, bool | int | float | str | tuple | None):
                raise ValueError(
                    f"{name} has a key of type {type(key).__name__}: {key!r}; only numbers and strings can be"
                )
        keys = sorted(tree, key=lambda key: (type(key).__name__, key))
        pairs = [[encode(key, name, tensors), encode(tree[key], f"{name}.{key}", tensors)] for key in keys]
        return {"$dict": pairs}
    raise ValueError(
        f"{name} is a {type(tree).__module__}.{type(tree).__qualname__}: only tensors, numbers, strings, None, "
        "and lists, tuples and dicts of them can be saved"
    )


def decode(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree that `encode` saw.

    Raises:
        ValueError: a tensor is missing, or the node is not of this form.
    """
    if isinstance(node, list):
        return [decode(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    if not any(key.startswith("$") for key in node):
        return {key: decode(item, tensors) for key, item in node.items()}
    match node:
        case {"$tensor": str(name)} if name in tensors:
            return tensors[name]
        case {"$tuple": list(items)}:
            return tuple(decode(item, tensors) for item in items)
        case {"$float": "nan" | "inf" | "-inf" as text}:
            return float(text)
        case {"$dict": list(pairs)}:
            return {decode(key, tensors): decode(item, tensors) for key, item in pairs}
    raise ValueError(f"saved state cannot be read at {str(node)[:80]}")


def tensor_names(node: Any) -> set[str]:
    """Names in the file of the tensors that a node holds."""
    if isinstance(node, list):
        return {name for item in node for name in tensor_names(item)}
    if isinstance(node, dict):
        if set(node) == {"$tensor"}:
            return {node["$tensor"]}
        return {name for item in node.values() for name in tensor_names(item)}
    return set()
