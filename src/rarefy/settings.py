"""Settings as plain data: frozen dataclasses to and from what YAML and JSON can hold, with errors that help.

An object whose class is one of a family (methods, schedules, growth signals) is written as {"name": class name in
lower case, fields...}.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Mapping
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from rarefy.growth import Signal
from rarefy.growth import registered as signals
from rarefy.methods import Method
from rarefy.methods import registered as methods
from rarefy.schedules import Constant, Cosine, Cubic, Linear, Schedule, Steps

T = TypeVar("T")

_UNIONS = (Union, UnionType)

_SCHEDULES: dict[str, type[Schedule]] = {
    "constant": Constant,
    "cosine": Cosine,
    "cubic": Cubic,
    "linear": Linear,
    "steps": Steps,
}


def to_plain(value: Any) -> Any:
    """Dicts, lists, strings, numbers, booleans and None that say the same."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        tagged = isinstance(value, Method | Schedule | Signal)
        return {"name": type(value).__name__.lower(), **fields} if tagged else fields
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value


def from_plain(cls: type[T], data: Mapping[str, Any], *, where: str = "") -> T:
    """The dataclass that `data` describes.

    Args:
        where: what is being read, for messages, such as a file name.
    Raises:
        ValueError: an unknown field (the nearest one is named), a value of the wrong type, or one the class refuses.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{where or cls.__name__}: expected fields of {cls.__name__}, got {data!r}")
    hints = get_type_hints(cls)
    known = {field.name: hints[field.name] for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {}
    for key, item in data.items():
        if key not in known:
            raise ValueError(f"{where or cls.__name__}: {unknown(key, known)}")
        values[key] = _value(known[key], item, f"{where}.{key}" if where else key)
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{where or cls.__name__}: {error}") from error


def unknown(name: str, known: Mapping[str, Any] | list[str] | tuple[str, ...]) -> str:
    """A message that names the nearest of what is known."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"there is no {name!r}" + (f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(known)}")


def _value(kind: Any, item: Any, where: str) -> Any:
    """The value of a field's type that `item` describes; what is not ours is pydantic's to read."""
    options = get_args(kind) if get_origin(kind) in _UNIONS else (kind,)
    if item is None and type(None) in options:
        return None
    ours = [part for part in options if inspect.isclass(part) and _is_ours(part)]
    plain = [part for part in options if part not in ours]
    for part in ours:
        if isinstance(item, part):
            return item
        if isinstance(item, Mapping) or plain in ([], [type(None)]):
            return _ours(part, item, where)
    kind = Union[tuple(plain)]  # noqa: UP007
    if get_origin(kind) is Mapping and get_origin(get_args(kind)[1]) in _UNIONS and isinstance(item, Mapping):
        return {str(key): _value(get_args(kind)[1], part, f"{where}.{key}") for key, part in item.items()}
    from pydantic import TypeAdapter, ValidationError  # not needed to import rarefy, and slow to load

    try:
        return TypeAdapter(kind).validate_python(item)
    except ValidationError as error:
        problem = error.errors()[0]
        raise ValueError(f"{where}: {problem['msg']}, got {problem['input']!r}") from None


def _ours(kind: Any, item: Any, where: str) -> Any:
    """A member of one of our families, or a dataclass."""
    for family, members in ((Method, methods()), (Schedule, _SCHEDULES), (Signal, signals())):
        if issubclass(kind, family):
            return _member(family, members, item, where)
    return from_plain(kind, item, where=where)


def _is_ours(kind: type) -> bool:
    """Whether `_value` reads the class itself, from a dict."""
    return issubclass(kind, Method | Schedule | Signal) or dataclasses.is_dataclass(kind)


def _member(family: type, members: Mapping[str, type], item: Any, where: str) -> Any:
    """A member of a family, from its name alone or a dict with "name" and fields; a number is a constant schedule."""
    if family is Schedule and isinstance(item, int | float) and not isinstance(item, bool):
        return Constant(float(item))
    if not isinstance(item, str | Mapping):
        raise ValueError(
            f"{where}: expected the name of a {family.__name__.lower()}, or its name and fields, got {item!r}"
        )
    item = {"name": item} if isinstance(item, str) else dict(item)
    name = str(item.pop("name", "")).lower()
    if name not in members:
        raise ValueError(f"{where}: {family.__name__.lower()}: {unknown(name, members)}")
    return from_plain(members[name], item, where=where)
