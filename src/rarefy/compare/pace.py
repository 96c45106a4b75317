"""How many steps each contender gets: by steps, by a FLOP budget, or by time, measured once for all in turn.

A rehearsal is a contender's whole run in `REHEARSAL` steps, so that one whose density moves passes through all of its
densities. Rehearsals take their steps in turn, so that whatever disturbs the machine disturbs all alike.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from rarefy.compare.contenders import Contender
from rarefy.compare.jobs import make_job
from rarefy.files import atomic_write
from rarefy.recipes.task import Task
from rarefy.training.calibrate import lower_quartile
from rarefy.training.machine import machine
from rarefy.training.twin import Diverged, Twin

FILE = "pace.json"

REHEARSAL = 48
"""Steps of a rehearsal; its layers rewire together after every `REWIRE_EVERY`."""
REWIRE_EVERY = 4
WARM_UP = 3
"""First steps, which allocate and warm caches up: not timed."""
PARTS = 4
"""A rehearsal's time is the mean over so many parts of the lower quartile in each."""


@dataclass(frozen=True, kw_only=True)
class Equal:
    """What is equal between contenders."""

    by: Literal["steps", "minutes", "flops"]
    amount: float
    """Steps, minutes of training, or floating-point operations, of each run."""

    def __post_init__(self) -> None:
        if not self.amount > 0:
            raise ValueError(f"{self.by} must be positive, got {self.amount:g}")


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What a rehearsal found. FLOPs follow from the settings alone, times from the machine."""

    step_s: float
    """Mean seconds of a step without a rewire."""
    rewire_s: float
    """Mean seconds that the rewire of one layer adds, growth scan included."""
    step_flops: float
    """Mean FLOPs of a step without a rewire."""
    rewire_flops: float
    """Mean FLOPs of the dense gradient that the rewire of one layer scans; 0 where growth needs none."""
    layers: int
    """Sparse layers."""


def steps_of(budget: Equal, paces: Mapping[str, Pace], contender: Contender) -> int:
    """Optimizer steps of a contender's runs, at least one.

    Args:
        paces: label -> pace; not looked at for a budget of steps.
    """
    if budget.by == "steps":
        return int(budget.amount)
    pace = paces[contender.label]
    if budget.by == "minutes":
        each, rewire, amount = pace.step_s, pace.rewire_s, 60 * budget.amount
    else:
        each, rewire, amount = pace.step_flops, pace.rewire_flops, budget.amount
    low, high = 1, max(2, int(amount / each) + 2)
    while high - low > 1:  # low fits, or is 1; high does not
        middle = (low + high) // 2
        fits = middle * each + num_rewires(contender, middle, pace.layers) * rewire <= amount
        low, high = (middle, high) if fits else (low, middle)
    return low


def num_rewires(contender: Contender, steps: int, layers: int) -> int:
    """Rewires of single layers in a run of so many steps, if the method rewires; of one that moves its density alone,
    the changes of single layers. What they cost is 0 where a rehearsal saw none.
    """
    method = contender.settled(0, steps).plan.method
    if contender.dense:
        return 0
    end = min(method.end if method.end is not None else int(0.75 * steps), steps)
    return layers * max(0, end - method.begin) // method.interval


# -- kept ---------------------------------------------------------------------------------------------------------


def paces(folder: Path, task: Task, contenders: Sequence[Contender], say: Callable[[str], None]) -> dict[str, Pace]:
    """Label -> pace: what the folder has kept, and the others measured and kept now.

    Whoever joins later is measured in turn with the first that is known, and scaled by what that one was measured at:
    a machine that is busier today than then gives a newcomer neither more nor fewer steps.

    Raises:
        ValueError: pace.json is damaged.
    """
    kept = _read(folder / FILE)
    keys = {contender.label: _key(task, contender) for contender in contenders}
    missing = [contender for contender in contenders if keys[contender.label] not in kept["paces"]]
    if missing:
        known = next((c for c in contenders if keys[c.label] in kept["paces"]), None)
        say(f"timing {REHEARSAL} steps of {', '.join(c.label for c in missing)}, in turn ...")
        found = rehearse(task, [*missing, *([known] if known else [])])
        scale = 1.0
        if known is not None:
            scale = kept["paces"][keys[known.label]].step_s / found[known.label].step_s
        for contender in missing:
            pace = found[contender.label]
            scaled = dataclasses.replace(pace, step_s=scale * pace.step_s, rewire_s=scale * pace.rewire_s)
            kept["paces"][keys[contender.label]] = scaled
        kept["machine"] = kept["machine"] or machine()
        plain = {"machine": kept["machine"], "paces": {k: dataclasses.asdict(p) for k, p in kept["paces"].items()}}
        atomic_write(folder / FILE, (json.dumps(plain, indent=1) + "\n").encode())
    return {label: kept["paces"][key] for label, key in keys.items()}


def _key(task: Task, contender: Contender) -> str:
    """Names what is timed; the length of the run and the seed are no part of it."""
    return make_job(task, contender, 0, REHEARSAL).digest


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {"machine": None, "paces": {}}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {"machine": found["machine"], "paces": {key: Pace(**pace) for key, pace in found["paces"].items()}}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and everybody is timed again") from error


# -- measured -----------------------------------------------------------------------------------------------------


class _Rehearsal:
    """One contender's, step by step."""

    def __init__(self, task: Task, contender: Contender) -> None:
        settings = contender.settled(0, REHEARSAL)
        if not contender.dense:
            method = dataclasses.replace(settings.plan.method, interval=REWIRE_EVERY, begin=0, end=None, stagger=False)
            settings = dataclasses.replace(settings, plan=dataclasses.replace(settings.plan, method=method))
        self.task, self.loop = task, settings.loop()
        self.twin: Twin = task.make(settings, dense=contender.dense)
        self.data, _ = task.feed(settings)
        self.plain: list[tuple[int, float]] = []
        self.rewired: list[tuple[int, float, int]] = []
        """(step, seconds, layers)."""
        self.scans = False
        """Whether growth looked at dense gradients."""
        self.flops: list[int] = []
        self.over = False

    def step(self) -> None:
        if self.over:
            return
        before = self.twin.clock.train_s
        self.flops.append(self.loop.tokens_per_step * self.task.flops_per_token(self.twin.model))
        try:
            result = self.twin.train_step(
                self.data, rate=self.loop.rate(self.twin.step + 1), accumulate=self.loop.accumulate, clip=self.loop.clip
            )
        except Diverged:  # its runs will say so; what it took until then is its pace
            self.over = True
            return
        taken, step = self.twin.clock.train_s - before, self.twin.step
        if result.rewires:
            self.rewired.append((step, taken, len(result.rewires)))
            self.scans |= any(record.get("grown_by") == "gradient" for record in result.rewires)
        else:
            self.plain.append((step, taken))

    def pace(self) -> Pace:
        timed = [(step, taken) for step, taken in self.plain if step > WARM_UP] or self.plain or [(1, 1.0)]
        size = -(-REHEARSAL // PARTS)
        parts = [[taken for step, taken in timed if (step - 1) // size == part] for part in range(PARTS)]
        by_part = [lower_quartile(times) for times in parts]
        step_s = fmean(time for time in by_part if time)
        extra = [(t - (by_part[(step - 1) // size] or step_s)) / n for step, t, n in self.rewired if step > WARM_UP]
        layers = list(self.twin.rewirer.layers.values()) if self.twin.rewirer else []
        scanned = 0.0
        if self.scans:
            size_all = fmean(layer.out_features * layer.in_features for layer in layers)
            scanned = 2 * size_all * self.loop.tokens_per_step
        return Pace(
            step_s=step_s,
            rewire_s=max(0.0, lower_quartile(extra)),
            step_flops=fmean(self.flops),
            rewire_flops=scanned,
            layers=len(layers),
        )


def rehearse(task: Task, contenders: Sequence[Contender]) -> dict[str, Pace]:
    """Label -> pace, all measured in turn, a step each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is wrong with so short a run says nothing of the real one
        rehearsals = {contender.label: _Rehearsal(task, contender) for contender in contenders}
        for _ in range(REHEARSAL):
            for rehearsal in rehearsals.values():
                rehearsal.step()
    return {label: rehearsal.pace() for label, rehearsal in rehearsals.items()}
