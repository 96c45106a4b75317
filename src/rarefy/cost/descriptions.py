"""Description files of machines: those that come with the package, and a user's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml

from rarefy.cost.hardware import At, Figure, Machine, Source, Structure
from rarefy.settings import from_plain, unknown

T = TypeVar("T")


def machine_names() -> list[str]:
    """Names of the descriptions that come with the package."""
    return sorted(file.name.removesuffix(".yaml") for file in _folder().iterdir() if file.name.endswith(".yaml"))


def load_machine(name: str | Path) -> Machine:
    """A description by the name of one that comes with the package, or from a file whose name ends with .yaml or .yml.

    Raises:
        ValueError: there is no such description, or it says something wrong: the field is named.
    """
    text = str(name)
    if text.endswith((".yaml", ".yml")):
        place: Any = Path(text)
    elif text in machine_names():
        place = _folder() / f"{text}.yaml"
    else:
        raise ValueError(f"machine: {unknown(text, machine_names())}; or name a file that ends with .yaml")
    try:
        data = yaml.safe_load(place.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{name} cannot be read as a machine description: {error}") from error
    return from_plain(_Described, data if data is not None else {}, where=text).machine(text)


@dataclass(frozen=True, kw_only=True)
class _Described:
    """A description as its file has it; turned into a `Machine` figure by figure, so that an error names the field."""

    title: str
    imagined: bool
    about: str
    sources: dict[str, dict[str, Any]]
    peak_flops_per_s: dict[str, dict[str, Any]]
    dense_efficiency: dict[str, dict[str, Any]]
    memory_bytes_per_s: dict[str, Any]
    on_chip_bytes: dict[str, Any]
    on_chip_bytes_per_s: dict[str, Any] | None = None
    call_s: dict[str, Any] | None = None
    structures: tuple[dict[str, Any], ...] = ()

    def machine(self, where: str) -> Machine:
        """The machine.

        Args:
            where: the file, for messages.
        """

        def figure(name: str) -> Any:
            given = getattr(self, name)
            return None if given is None else _read(Figure, given, f"{where}.{name}")

        def each(kind: type[T], name: str) -> dict[str, T]:
            return {key: _read(kind, value, f"{where}.{name}.{key}") for key, value in getattr(self, name).items()}

        values = {
            "title": self.title,
            "imagined": self.imagined,
            "about": self.about,
            "sources": each(Source, "sources"),
            "peak_flops_per_s": each(Figure, "peak_flops_per_s"),
            "dense_efficiency": each(Figure, "dense_efficiency"),
            "structures": tuple(_structure(s, f"{where}.structures[{at}]") for at, s in enumerate(self.structures)),
        }
        alone = ("memory_bytes_per_s", "on_chip_bytes", "on_chip_bytes_per_s", "call_s")
        try:
            return Machine(**values, **{name: figure(name) for name in alone})
        except ValueError as error:
            raise _named(error, where) from None


def _structure(data: Mapping[str, Any], where: str) -> Structure:
    points = data.get("efficiency")
    if not isinstance(points, list):
        raise ValueError(f"{where}.efficiency: expected a list, got {points!r}")
    read = tuple(_read(At, point, f"{where}.efficiency[{at}]") for at, point in enumerate(points))
    return _read(Structure, {**data, "efficiency": read}, where)


def _read(kind: type[T], data: Any, where: str) -> T:
    try:
        return from_plain(kind, data, where=where)
    except ValueError as error:
        raise _named(error, where) from None


def _named(error: ValueError, where: str) -> ValueError:
    """The same error, which says where even if the class that refused the value did not know."""
    text = str(error)
    return error if text.startswith(where) else ValueError(f"{where}: {text}")


def _folder() -> Any:
    return resources.files("rarefy.cost") / "machines"
