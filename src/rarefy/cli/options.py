"""Options of a command: flags over a YAML file over the defaults, into one frozen dataclass."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
import yaml

from rarefy.settings import from_plain

T = TypeVar("T")

CONFIG = "--config"

METAVARS = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}

registry = tyro.constructors.ConstructorRegistry()


@registry.primitive_rule
def _optional(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """`X | None` is an X that may be left out, and reads so in --help; None itself needs no spelling."""
    if get_origin(info.type) not in (Union, types.UnionType):
        return None
    kinds = [kind for kind in get_args(info.type) if kind is not type(None)]
    if kinds == [bool]:
        return _SWITCH
    if len(kinds) != 1 or kinds[0] not in METAVARS or len(get_args(info.type)) != 2:
        return None
    (kind,) = kinds
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=METAVARS[kind],
        instance_from_str=lambda words: kind(words[0]),
        is_instance=lambda value: value is None or isinstance(value, kind | int if kind is float else kind),
        str_from_instance=lambda value: ["none" if value is None else str(value)],
    )


def _on_or_off(words: list[str]) -> bool:
    if words and words[0].lower() not in ("true", "false"):
        raise ValueError(f"true or false, or nothing for true; got {words[0]}")
    return not words or words[0].lower() == "true"


_SWITCH = tyro.constructors.PrimitiveConstructorSpec(
    nargs=(0, 1),
    metavar="[true|false]",
    instance_from_str=_on_or_off,
    is_instance=lambda value: value is None or isinstance(value, bool),
    str_from_instance=lambda value: ["none" if value is None else str(value).lower()],
)
"""`bool | None`: --flip and --no-flip, as for a plain bool, but it may be left open."""


def parse(cls: type[T], arguments: Sequence[str], *, prog: str) -> T:
    """Read a command's options.

    Args:
        cls: a dataclass with a docstring under each field. If it has a classmethod `starting_point(data, option)`, that
            makes what the flags change of `data`, which the YAML file says; `option(flag)` is a flag's text or None.
    Raises:
        ValueError: the YAML file cannot be read or says something wrong, or the settings refuse a value.
        SystemExit: after --help (0), or after tyro explained a flag that it does not understand (2).
    """
    arguments = _spelt_out(cls, arguments)
    data: dict[str, Any] = {}
    file = None
    if "-h" not in arguments and "--help" not in arguments:
        file = option(arguments, CONFIG)
        data = dict(read_yaml(Path(file))) if file is not None else {}
        if hasattr(cls, "starting_point"):
            data = cls.starting_point(data, lambda flag: option(arguments, flag))  # type: ignore[attr-defined]
    described: dict[str, Any] = {}
    if "config" not in {field.name for field in dataclasses.fields(cls)}:  # type: ignore[arg-type]
        arguments = _without(arguments, CONFIG)
        about = (cls.__doc__ or "").strip()
        described["description"] = (
            f"{about}\n\n{CONFIG} FILE reads a YAML file that says the same as these options, which override it."
        )
    default: dict[str, Any] = {"default": _starting_point(cls, data, file or prog)} if data else {}
    return tyro.cli(cls, prog=prog, args=arguments, registry=registry, **described, **default)


def _starting_point(cls: type[T], data: Mapping[str, Any], where: str) -> T:
    """An instance that says what `data` says; what has no default and is not said is left to the flags."""
    hints = get_type_hints(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    given = dataclasses.make_dataclass(
        "Given", [(f.name, hints[f.name], dataclasses.field(default=None)) for f in fields]
    )
    read = from_plain(given, data, where=where)
    required = {f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING}
    missing = dict.fromkeys(required - set(data), tyro.MISSING)
    return cls(**{name: getattr(read, name) for name in data}, **missing)


def _spelt_out(cls: type[Any], arguments: Sequence[str]) -> list[str]:
    """The same with `--flip false` for the `--no-flip` of a field that may be left open."""
    hints = get_type_hints(cls)
    open_ = {f"--no-{name.replace('_', '-')}": f"--{name}" for name, kind in hints.items() if kind == bool | None}
    return [word for given in arguments for word in ([open_[given], "false"] if given in open_ else [given])]


def option(arguments: Sequence[str], flag: str) -> str | None:
    """The text after `flag` or `flag=`; None when it is not there. The last one counts."""
    found = None
    for at, argument in enumerate(arguments):
        if argument == flag and at + 1 < len(arguments):
            found = arguments[at + 1]
        elif argument.startswith(f"{flag}="):
            found = argument.partition("=")[2]
    return found


def _without(arguments: Sequence[str], flag: str) -> list[str]:
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if not skip and argument != flag and not argument.startswith(f"{flag}="):
            kept.append(argument)
        skip = argument == flag
    return kept


def read_yaml(path: Path) -> Mapping[str, Any]:
    """A YAML file of settings; names may be written with - or _.

    Raises:
        ValueError: it cannot be read, or is no mapping.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{CONFIG} {path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{CONFIG} {path} is no YAML: {error}") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"{CONFIG} {path} should say `name: value` for each setting, got {found!r}")
    return {str(key).replace("-", "_"): value for key, value in found.items()}
