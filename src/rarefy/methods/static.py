"""No rewiring: the first pattern stays. The control for every claim about finding a better one."""

from __future__ import annotations

from dataclasses import dataclass

from rarefy.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class Static(Method):
    """Keep the first pattern."""

    rewires = False
