"""What a recipe's options say on top of a plan."""

from __future__ import annotations

import dataclasses
from typing import Any

from rarefy.methods import Method, registered
from rarefy.plan import Plan
from rarefy.settings import unknown


def folded(plan: Plan, *, method: str | None, interval: int | None, seed: int, **changes: Any) -> Plan:
    """The plan with a method by name, its interval, and other fields; None leaves what the plan says.

    Raises:
        ValueError: there is no such method, or the plan refuses a value.
    """
    chosen = plan.method if method is None else with_method(plan.method, method)
    if interval is not None:
        chosen = dataclasses.replace(chosen, interval=interval)
    said = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(plan, method=chosen, seed=seed, **said)


def with_method(old: Method, name: str) -> Method:
    """The method of that name, with the old one's options where it has the same ones.

    Raises:
        ValueError: there is none of that name; the nearest is named.
    """
    members = registered()
    if name.lower() not in members:
        raise ValueError(f"method: {unknown(name.lower(), [key for key in members if key != 'method'])}")
    cls = members[name.lower()]
    if type(old) is cls:
        return old
    return cls(**{f.name: getattr(old, f.name) for f in dataclasses.fields(cls) if f.init and hasattr(old, f.name)})


def short_interval(steps: int) -> int:
    """Steps between two rewires of a layer in a run of `steps`: a short run needs them closer together."""
    return max(10, min(100, steps // 20))
