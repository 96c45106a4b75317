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
    """The method of that name, with the options that the old one was given where it has the same ones.

    Raises:
        ValueError: there is none of that name; the nearest is named.
    """
    members = registered()
    if name.lower() not in members:
        raise ValueError(f"method: {unknown(name.lower(), [key for key in members if key != 'method'])}")
    cls = members[name.lower()]
    if type(old) is cls:
        return old
    fields = [field for field in dataclasses.fields(old) if field.init]
    given = {field.name: getattr(old, field.name) for field in fields if getattr(old, field.name) != _default(field)}
    return cls(**{field.name: given[field.name] for field in dataclasses.fields(cls) if field.name in given})


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def short_interval(steps: int) -> int:
    """Steps between two rewires of a layer in a run of `steps`: a short run needs them closer together."""
    return max(10, min(100, steps // 20))
