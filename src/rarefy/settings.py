"""Settings as plain data: frozen dataclasses to and from what YAML and JSON can hold, with errors that help.

An object whose class is one of a family (methods, schedules, growth signals) is written as {"name": class name in
lower case, fields...}.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_type_hints

from rarefy.growth import Signal
from rarefy.growth import registered as signals
from rarefy.methods import Method
from rarefy.methods import registered as methods
from rarefy.schedules import Constant, Cosine, Linear, Schedule

T = TypeVar("T")

_SCHEDULES: dict[str, type[Schedule]] = {"constant": Constant, "cosine": Cosine, "linear": Linear}


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
    if type(None) in (options := get_args(kind)) and len(options) == 2:
        if item is None:
            return None
        kind = next(option for option in options if option is not type(None))
    for family, members in ((Method, methods()), (Schedule, _SCHEDULES), (Signal, signals())):
        if inspect.isclass(kind) and issubclass(kind, family):
            return item if isinstance(item, family) else _member(family, members, item, where)
    if inspect.isclass(kind) and dataclasses.is_dataclass(kind):
        return item if isinstance(item, kind) else from_plain(kind, item, where=where)
    from pydantic import TypeAdapter, ValidationError  # not needed to import rarefy, and slow to load

    try:
        return TypeAdapter(kind).validate_python(item)
    except ValidationError as error:
        problem = error.errors()[0]
        raise ValueError(f"{where}: {problem['msg']}, got {problem['input']!r}") from None


def _member(family: type, members: Mapping[str, type], item: Any, where: str) -> Any:
    """A member of a family, from its name alone or a dict with "name" and fields."""
    item = {"name": item} if isinstance(item, str) else dict(item)
    name = str(item.pop("name", "")).lower()
    if name not in members:
        raise ValueError(f"{where}: {family.__name__.lower()}: {unknown(name, members)}")
    return from_plain(members[name], item, where=where)
