"""Who competes: what the user wrote for a contender, and the settings that this means."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rarefy.methods import Method, registered
from rarefy.plan import Plan
from rarefy.recipes.plans import short_interval
from rarefy.recipes.task import Task
from rarefy.settings import from_plain, to_plain, unknown

DENSE, SMALL_DENSE = "dense", "small-dense"

PLAN_FILES = (".yaml", ".yml")

COMMON = ("data", "steps", "minutes", "seed", "plan", "method", "threads", "twin", "measure")
"""Settings that a contender cannot have for itself."""


@dataclass(frozen=True)
class Contender:
    """One competitor of a comparison, for any seed and length."""

    label: str
    dense: bool
    settings: Any
    """The recipe's, with this contender's plan in them."""
    interval: int | None
    """Steps between two rewires of a layer; None: by the length of the run."""

    def settled(self, seed: int, steps: int) -> Any:
        """Settings with nothing left open."""
        interval = self.interval if self.interval is not None else short_interval(steps)
        return dataclasses.replace(self.settings, seed=seed, interval=interval).settled(steps)


def parse_contenders(texts: Sequence[str], task: Task) -> list[Contender]:
    """Contenders from what the user wrote, each a plan file, or a name with settings of its own.

    Raises:
        ValueError: none given, one twice, no such file, method or setting (the nearest is named), or a bad value.
    """
    if not texts:
        raise ValueError("which plans? for example --plans static set rigl dense, or plan files")
    found = [parse_contender(text, task) for text in texts]
    for contender in found:
        if sum(other.label == contender.label for other in found) > 1:
            raise ValueError(f"plans: {contender.label!r} is there twice")
    return found


def parse_contender(text: str, task: Task) -> Contender:
    """One of them: `plan.yaml`, `rigl`, `set.itop:interval=200`, `dense:width=128`, `small-dense`."""
    if Path(text).suffix in PLAN_FILES:
        return _from_file(text, task)
    name, _, said = text.partition(":")
    own = _read_settings(said, text)
    if name in (DENSE, SMALL_DENSE):
        return _dense(text, name, own, task)
    method = _method(name, task)
    return _sparse(text, dataclasses.replace(task.base.folded_plan(), method=method), own, task, preset="." in name)


def _from_file(text: str, task: Task) -> Contender:
    base = dataclasses.replace(task.base, plan=Plan.from_yaml(text))
    plan = base.folded_plan()
    return Contender(Path(text).stem, False, base.with_plan(plan), plan.method.interval)


def _dense(text: str, name: str, own: Mapping[str, Any], task: Task) -> Contender:
    settings = task.base
    if name == SMALL_DENSE:
        plan = dataclasses.replace(settings.folded_plan(), method=registered()["static"]())
        settings = task.narrowed(settings, nonzeros(task, settings.with_plan(plan)))
    return Contender(text, True, _changed(settings, own, text), 1)


def nonzeros(task: Task, settings: Any) -> int:
    """Trained numbers of the sparse network of these settings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those who train such a network say what is wrong with it
        return sum(p.numel() for p in task.make(settings.settled(1), dense=False).model.parameters())


def _method(name: str, task: Task) -> Method:
    """By class name, or class name and preset: `set.itop` is SET.itop()."""
    name, _, preset = name.lower().partition(".")
    members = {key: cls for key, cls in registered().items() if cls is not Method}
    if name not in members:
        known = [*members, DENSE, SMALL_DENSE]
        raise ValueError(f"plans: {unknown(name, known)}. A plan file ends in .yaml")
    cls = members[name]
    if not preset:
        old = task.base.folded_plan().method
        return cls() if task.base.interval is None else dataclasses.replace(cls(), interval=old.interval)
    presets = [key for key in dir(cls) if isinstance(inspect.getattr_static(cls, key), classmethod) and key[0] != "_"]
    if preset not in presets:
        raise ValueError(f"plans: {name}: {unknown(preset, presets) if presets else 'it has no presets'}")
    return getattr(cls, preset)()


def _sparse(text: str, plan: Plan, own: Mapping[str, Any], task: Task, *, preset: bool) -> Contender:
    """A contender with a plan, on top of which `own` says fields of the method, the plan, or the recipe's settings."""
    method = plan.method
    for_method, for_plan, for_settings = {}, {}, {}
    fields = {
        "method": {f.name for f in dataclasses.fields(method) if f.init},
        "plan": {f.name for f in dataclasses.fields(plan)} - set(COMMON),
        "settings": {f.name for f in dataclasses.fields(task.base)} - set(COMMON),
    }
    for key, value in own.items():
        if key in fields["method"]:
            for_method[key] = value
        elif key in fields["plan"]:
            for_plan[key] = value
        elif key in fields["settings"]:
            for_settings[key] = value
        else:
            raise ValueError(f"plans: {text}: {unknown(key, sorted(set().union(*fields.values())))}")
    if for_method:
        plain = {key: value for key, value in to_plain(method).items() if key != "name"}
        method = from_plain(type(method), {**plain, **for_method}, where=f"plans: {text}")
    plan = from_plain(Plan, {**to_plain(plan), **for_plan, "method": method}, where=f"plans: {text}")
    settings = _changed(task.base, for_settings, text).with_plan(plan)
    fixed = preset or "interval" in for_method or task.base.interval is not None
    return Contender(text, False, settings, method.interval if fixed else None)


def _changed(settings: Any, own: Mapping[str, Any], text: str) -> Any:
    allowed = {f.name for f in dataclasses.fields(settings)} - set(COMMON)
    for key in own:
        if key not in allowed:
            raise ValueError(f"plans: {text}: {unknown(key, sorted(allowed))}")
    if not own:
        return settings
    read = from_plain(type(settings), {**to_plain(settings), **own}, where=f"plans: {text}")  # together: they must fit
    return dataclasses.replace(settings, **{key: getattr(read, key) for key in own})


def _read_settings(said: str, text: str) -> dict[str, Any]:
    """`a=1,b={name=cosine,start=0.5}` as data: a YAML mapping on one line, with = for a colon."""
    if not said:
        return {}
    try:
        found = yaml.safe_load("{" + said.replace("=", ": ") + "}")
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict) or any(value is None for value in found.values()):
        raise ValueError(f"plans: {text}: write settings like {text.partition(':')[0]}:interval=200,density=0.05")
    return {str(key): value for key, value in found.items()}
