"""Figures for people: 1.23 M, 12.3 MiB, 3 min 05 s. Anything that is not a finite number is a dash."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable

DASH = "–"


def _significant(value: float, digits: int = 3) -> str:
    """Significant digits without exponent: 0.212, 2.41, 24.1, 241, 2,410."""
    if value == 0:
        return "0"
    value = float(f"{value:.{digits}g}")  # first, so that 0.9999 gets the decimals of 1.00
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 6)}f}"


def _scaled(value: float | None, base: float, units: tuple[str, ...]) -> str:
    if value is None or not math.isfinite(value):
        return DASH
    power = 0
    # The next unit begins where three digits would round up to it.
    while abs(value) >= base * 0.9995 and power < len(units) - 1:
        value, power = value / base, power + 1
    text = f"{value:,.0f}" if power == 0 and float(value).is_integer() else _significant(value)
    return f"{text} {units[power]}".strip()


def count(value: float | None) -> str:
    """842, 1.23 k, 4.56 M, 7.89 G."""
    return _scaled(value, 1000, ("", "k", "M", "G", "T", "P", "E"))


def nbytes(value: float | None) -> str:
    """512 B, 1.50 KiB, 12.3 MiB."""
    return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def seconds(value: float | None) -> str:
    """A duration: 0.85 ms, 212 ms, 1.23 s, 88 s, 3 min 05 s, 2 h 07 min."""
    if value is None or not math.isfinite(value):
        return DASH
    if 0 < value < 1:
        return f"{_significant(value * 1e3)} ms"
    if value < 10:
        return f"{_significant(value)} s"
    whole = round(value)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def step_times(values: Iterable[float]) -> Callable[[float], str]:
    """A form for times that stand beside each other, in one unit: seconds if any reaches a tenth, else milliseconds."""
    in_s = any(value >= 0.0995 for value in values)

    def form(value: float) -> str:
        if not math.isfinite(value):
            return DASH
        return f"{_significant(value)} s" if in_s else f"{_significant(value * 1e3)} ms"

    return form


def bits(value: float | None) -> str:
    return DASH if value is None or not math.isfinite(value) else f"{value:.3f}"


def milliseconds(value: float | None) -> str:
    return DASH if value is None or not math.isfinite(value) else _significant(value)


def percent(value: float | None, digits: int = 3) -> str:
    """0.1 -> 10%, 0.0123 -> 1.23%."""
    if value is None or not math.isfinite(value):
        return DASH
    text = _significant(value * 100, digits)
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text}%"


def times(value: float | None) -> str:
    """A ratio: 2.2×, 0.45×, 12×."""
    if value is None or not math.isfinite(value):
        return DASH
    return f"{_significant(value, 2)}×"


def unbroken(text: str) -> str:
    """The same with no line break between a figure and its unit."""
    return re.sub(r"(?<=\d) (?=(ms|s|min|h|B|KiB|MiB|GiB|TiB|[kMGTPE])\b)", "\u00a0", text)
