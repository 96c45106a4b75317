"""How many steps each contender gets: by steps, by a FLOP budget, or by time, rehearsed once for all in turn."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rarefy.compare.contenders import Contender
from rarefy.compare.jobs import make_job
from rarefy.compare.rehearsal import REHEARSAL, Pace, rehearse
from rarefy.files import atomic_write
from rarefy.recipes.task import Task
from rarefy.training.machine import machine

FILE = "pace.json"

REHEARSED, LEAST_S = 0.03, 3.0
"""Of a budget of time each contender rehearses so large a share, if it is so long: a machine is faster in one minute
than in the next, and 48 steps know one of them. A shorter run has one minute itself."""


@dataclass(frozen=True, kw_only=True)
class Equal:
    """What is equal between contenders."""

    by: Literal["steps", "minutes", "flops"]
    amount: float
    """Steps, minutes of training, or floating-point operations, of each run."""

    def __post_init__(self) -> None:
        if not self.amount > 0:
            raise ValueError(f"{self.by} must be positive, got {self.amount:g}")

    @property
    def rehearsed_s(self) -> float:
        """Seconds of each contender's rehearsal; 0: `REHEARSAL` steps, however long they take."""
        found = REHEARSED * 60 * self.amount if self.by == "minutes" else 0.0
        return found if found >= LEAST_S else 0.0


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


def paces(
    folder: Path, task: Task, contenders: Sequence[Contender], say: Callable[[str], None], *, seconds: float = 0.0
) -> dict[str, Pace]:
    """Label -> pace: what the folder has kept, and the others measured and kept now.

    Whoever joins later is measured in turn with the first that is known, and scaled by what that one was measured at:
    a machine that is busier today than then gives a newcomer neither more nor fewer steps. Rehearsals of different
    lengths are kept beside each other, so that a budget has the same steps whatever else the folder is used for.

    Args:
        seconds: about what each rehearsal is to take, `Equal.rehearsed_s`; 48 steps of everybody say how many steps
            that are, and are enough where it is 0.
    Raises:
        ValueError: pace.json is damaged.
    """
    kept = _Kept(folder / FILE, task)
    steps = kept.completed(contenders, say, f"timing {REHEARSAL} steps", "", lambda some: rehearse(task, some))
    if not seconds:
        return steps

    def at_length(some: Sequence[Contender]) -> dict[str, Pace]:
        wanted = {one.label: max(REHEARSAL, round(seconds / steps[one.label].step_s)) for one in some}
        return rehearse(task, some, wanted)

    return kept.completed(contenders, say, f"timing {seconds:.0f} s", f"-{seconds:g}s", at_length)


class _Kept:
    """pace.json: key -> pace. A key names what is timed and how long; the run's length and seed are no part of it."""

    def __init__(self, path: Path, task: Task) -> None:
        self._path, self._task = path, task
        self._machine: dict[str, Any] | None = None
        self._paces: dict[str, Pace] = {}
        if not path.is_file():
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            self._machine = found["machine"]
            self._paces = {key: Pace(**pace) for key, pace in found["paces"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error}): remove it, and everybody is timed again") from error

    def completed(
        self,
        contenders: Sequence[Contender],
        say: Callable[[str], None],
        what: str,
        length: str,
        measure: Callable[[Sequence[Contender]], dict[str, Pace]],
    ) -> dict[str, Pace]:
        """Label -> pace of rehearsals of a length, those that are missing measured and kept."""
        keys = {one.label: make_job(self._task, one, 0, REHEARSAL).digest + length for one in contenders}
        missing = [one for one in contenders if keys[one.label] not in self._paces]
        if missing:
            known = next((one for one in contenders if keys[one.label] in self._paces), None)
            say(f"{what} of {', '.join(one.label for one in missing)}, in turn ...")
            found = measure([*missing, *([known] if known else [])])
            scale = 1.0 if known is None else self._paces[keys[known.label]].step_s / found[known.label].step_s
            for one in missing:
                pace = found[one.label]
                scaled = dataclasses.replace(pace, step_s=scale * pace.step_s, rewire_s=scale * pace.rewire_s)
                self._paces[keys[one.label]] = scaled
            self._write()
        return {label: self._paces[key] for label, key in keys.items()}

    def _write(self) -> None:
        self._machine = self._machine or machine()
        plain = {"machine": self._machine, "paces": {k: dataclasses.asdict(p) for k, p in self._paces.items()}}
        atomic_write(self._path, (json.dumps(plain, indent=1) + "\n").encode())
