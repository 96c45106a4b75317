"""Who did better, at equal time and at equal steps, in numbers and in one sentence.

A contender is a twin of a run. Evaluations happen at different moments for different contenders, so their curves are
interpolated linearly, and only as far as all of them reach: nothing is extrapolated, and what cannot be compared says
why.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from rarefy.report import numbers as say
from rarefy.report.read import Run, Twin, number
from rarefy.training.subject import BITS_PER_BYTE, Metric

Axis = Literal["train_s", "step"]

SAME_PACE = 1.05
"""Step times within this factor are called about the same."""


@dataclass(frozen=True, eq=False)
class Contender:
    """A twin of a run under the name, and the colour, that it has throughout the report."""

    label: str
    colour: int
    """Index into the palette."""
    run: Run
    twin: Twin

    @property
    def dense(self) -> bool:
        return self.twin.dense

    @property
    def metric(self) -> Metric:
        """What it is judged by."""
        return self.run.subject.metric

    @cached_property
    def step_s(self) -> float:
        """Median seconds of a training step, NaN when unknown."""
        return _median(seconds / steps for steps, seconds, _ in self._intervals)

    @cached_property
    def mean_step_s(self) -> float:
        """All training seconds over all steps, rewires included; evaluations are not training."""
        known = [r for r in self.twin.train if math.isfinite(number(r, "train_s")) and r["step"] > 0]
        return number(known[-1], "train_s") / known[-1]["step"] if known else math.nan

    @cached_property
    def tokens_per_s(self) -> float:
        """Median over the log, as logged where the log does not say seconds and tokens."""
        pace = _median(tokens / seconds for _, seconds, tokens in self._intervals)
        return pace if math.isfinite(pace) else _median(number(record, "tokens_per_s") for record in self.twin.train)

    @property
    def training_bytes(self) -> dict[str, float]:
        """Bytes by part: parameters, gradients, optimizer, indices; empty when unknown."""
        parts = self.twin.about.get("training_bytes")
        if not isinstance(parts, dict):
            return {}
        return {str(part): number(parts, part) for part in parts if math.isfinite(number(parts, part))}

    @property
    def total_bytes(self) -> float:
        return sum(self.training_bytes.values()) if self.training_bytes else math.nan

    @property
    def nonzeros(self) -> float:
        return number(self.twin.about, "nonzeros")

    @property
    def parameters(self) -> float:
        return number(self.twin.about, "parameters")

    @cached_property
    def diverged_at(self) -> int | None:
        """Step of the first record whose loss is not a number."""
        records = sorted((*self.twin.train, *self.twin.eval), key=lambda record: record["step"])
        return next((record["step"] for record in records if not math.isfinite(BITS_PER_BYTE.of(record))), None)

    def curve(self, axis: str) -> list[tuple[float, float]]:
        """Evaluations as (seconds, steps or FLOPs; the metric), the latter NaN where the loss was."""
        points = [(number(record, axis), self.metric.of(record)) for record in self.twin.eval]
        return [point for point in points if math.isfinite(point[0])]

    @cached_property
    def _intervals(self) -> list[tuple[int, float, float]]:
        """(steps, seconds, tokens) between consecutive train records, from the beginning of training."""
        found, before = [], (0, 0.0, 0.0)
        for record in self.twin.train:
            now = (record["step"], number(record, "train_s"), number(record, "tokens"))
            steps, seconds = now[0] - before[0], now[1] - before[1]
            if steps > 0 and seconds > 0:
                found.append((steps, seconds, now[2] - before[2]))
            before = now
        return found


@dataclass(frozen=True)
class Reading:
    """The metric of every contender at one moment that all of them have reached."""

    at: float | None
    """The moment, in seconds or steps; None when there is none."""
    values: dict[Contender, float]
    """Only contenders with evaluations; NaN for one that had diverged by then."""
    why_not: str = ""
    """A sentence, when `at` is None."""


@dataclass(frozen=True)
class Verdict:
    """The headline. `parts` is the sentence with contenders in it, so that a page can colour their names."""

    parts: tuple[str | Contender, ...]
    better: Contender | None = None
    """Who was better at equal time; None for level or unknown."""

    @property
    def text(self) -> str:
        return "".join(part if isinstance(part, str) else part.label for part in self.parts)


def interpolate(curve: Sequence[tuple[float, float]], x: float) -> float:
    """The curve's value at x, linear between its points; NaN outside them and beside a NaN.

    Args:
        curve: (x, y), x ascending; of points with equal x the first counts.
    """
    if not curve or not curve[0][0] <= x <= curve[-1][0]:
        return math.nan
    right = bisect_left(curve, x, key=lambda point: point[0])
    x1, y1 = curve[right]
    if x1 == x:
        return y1
    x0, y0 = curve[right - 1]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def contenders(runs: Sequence[Run]) -> list[Contender]:
    """One per twin: named after the twin, or after its run too when there are several."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [f"{run.path.resolve().parent.name}/{run.path.resolve().name}" for run in runs]
    if len(set(names)) < len(names):
        names = [f"{name} ({place})" for place, name in enumerate(names, start=1)]
    labels: list[tuple[str, Run, Twin]] = []
    for name, run in zip(names, runs, strict=True):
        for twin in run.twins:
            label = twin.name if len(runs) == 1 else name if len(run.twins) == 1 else f"{name} {twin.name}"
            labels.append((label, run, twin))
    return [Contender(label, colour, run, twin) for colour, (label, run, twin) in enumerate(labels)]


def reading(field: Sequence[Contender], axis: Axis) -> Reading:
    """Where everyone stood at the last moment that all had reached."""
    curves = {contender: curve for contender in field if (curve := contender.curve(axis))}
    absent = [contender.label for contender in field if contender not in curves]
    if len(curves) < 2 <= len(field):
        return Reading(None, {}, f"{listed(absent)} {'has' if len(absent) == 1 else 'have'} no evaluations.")
    if not curves:
        return Reading(None, {}, "There are no evaluations.")
    at = min(curve[-1][0] for curve in curves.values())
    late = max(curves, key=lambda contender: curves[contender][0][0])
    if curves[late][0][0] > at:
        moment = say.seconds(at) if axis == "train_s" else f"{at:,.0f} steps"
        early = min(curves, key=lambda contender: curves[contender][-1][0])
        return Reading(None, {}, f"{early.label} stops at {moment}, before the first evaluation of {late.label}.")
    return Reading(at, {contender: interpolate(curve, at) for contender, curve in curves.items()})


def verdict(field: Sequence[Contender]) -> Verdict:
    """The headline: one sentence that follows from the data, whoever it favours."""
    if not field:
        return Verdict(("Nothing has been recorded yet.",))
    if len(field) == 1:
        return _alone(field[0])
    pair = pair_of(field)
    return _duel(*pair) if pair else _ranking(field)


def pair_of(field: Sequence[Contender]) -> tuple[Contender, Contender] | None:
    """The sparse contender and its dense control, when there are exactly these two."""
    if len(field) == 2 and field[0].dense != field[1].dense:
        return (field[0], field[1]) if field[1].dense else (field[1], field[0])
    return None


def steps_sentence(field: Sequence[Contender]) -> str:
    """The second line: the same question at equal steps, where speed does not count."""
    if len(field) < 2:
        return ""
    at_steps = reading(field, "step")
    if at_steps.at is None:
        return f"They cannot be compared at equal steps: {at_steps.why_not}"
    known = {c: value for c, value in at_steps.values.items() if math.isfinite(value)}
    metric = field[0].metric
    ranked = sorted(known.items(), key=lambda item: metric.sign * item[1])
    figures = ", ".join(f"{c.label} {metric.show(value)}" for c, value in ranked)
    gone = [c.label for c in at_steps.values if c not in known]
    tail = f"; {listed(gone)} had diverged" if gone else ""
    return f"At equal steps ({at_steps.at:,.0f}): {figures or 'none'} {metric.title}{tail}."


def _alone(one: Contender) -> Verdict:
    what = "dense" if one.dense else "sparse"
    begin = ("Only ", one, f" was trained, so there is no {'sparse' if one.dense else 'dense'} twin to compare it with")
    if one.diverged_at is not None:
        return Verdict((*begin, f"; its loss stopped being a number at step {one.diverged_at:,}."))
    pace = f", a {what} step took {say.step_times([one.step_s])(one.step_s)}" if math.isfinite(one.step_s) else ""
    if not one.twin.eval:
        return Verdict((*begin, f"; it has no evaluations yet{pace}."))
    last = one.twin.eval[-1]
    spent = number(last, "train_s")
    when = f"{last['step']:,} steps" + (f" in {say.seconds(spent)}" if math.isfinite(spent) else "")
    reached = f"{one.metric.show(one.metric.of(last))} {one.metric.title}"
    return Verdict((*begin, f"; it reached {reached} after {when}{pace}."))


def _duel(sparse: Contender, dense: Contender) -> Verdict:
    at_time = reading((sparse, dense), "train_s")
    pace = _pace(sparse, dense)
    if at_time.at is None:
        why = at_time.why_not.rstrip(".")
        return Verdict((sparse, " and ", dense, f" cannot be compared at equal time: {why}", *pace, "."))
    begin = f"At equal time ({say.seconds(at_time.at)}) "
    ours, theirs = at_time.values[sparse], at_time.values[dense]
    if not (math.isfinite(ours) and math.isfinite(theirs)):
        return _diverged(begin, sparse, dense, at_time, pace)
    metric = sparse.metric
    show, unit = metric.show, metric.title
    if abs(ours - theirs) < metric.level:
        both = f" are level at {show(ours)} and {show(theirs)} {unit}"
        return Verdict((begin, sparse, " and ", dense, both, *pace, "."))
    if metric.sign * ours < metric.sign * theirs:
        parts = (begin, sparse, f" reached {show(ours)} {unit}, ", dense, f" {show(theirs)}")
        return Verdict((*parts, *pace, "."), better=sparse)
    parts = (begin, dense, f" is ahead with {show(theirs)} {unit}, ", sparse, f" reached {show(ours)}")
    return Verdict((*parts, *pace, "."), better=dense)


def _diverged(
    begin: str, sparse: Contender, dense: Contender, at: Reading, pace: tuple[str | Contender, ...]
) -> Verdict:
    gone = [contender for contender in (sparse, dense) if not math.isfinite(at.values[contender])]
    if len(gone) == 2:
        return Verdict(
            (begin, "neither can be read: the losses of ", sparse, " and ", dense, " were not numbers", *pace, ".")
        )
    (lost,) = gone
    held = dense if lost is sparse else sparse
    since = f" (step {lost.diverged_at:,})" if lost.diverged_at is not None else ""
    parts = (
        begin,
        held,
        f" reached {held.metric.show(at.values[held])} {held.metric.title}; ",
        lost,
        f" had diverged{since}",
    )
    return Verdict((*parts, *pace, "."), better=held)


def _pace(sparse: Contender, dense: Contender) -> tuple[str | Contender, ...]:
    if not (math.isfinite(sparse.step_s) and math.isfinite(dense.step_s)):
        return ()
    factor = dense.step_s / sparse.step_s
    if max(factor, 1 / factor) < SAME_PACE:
        how = "about the same"
    else:
        how = f"{say.times(max(factor, 1 / factor))} {'faster' if factor > 1 else 'slower'}"
    form = say.step_times((sparse.step_s, dense.step_s))
    return (f"; a sparse step took {form(sparse.step_s)}, a dense one {form(dense.step_s)} ({how})",)


def _ranking(field: Sequence[Contender]) -> Verdict:
    at_time = reading(field, "train_s")
    if at_time.at is None:
        return Verdict((f"These {len(field)} cannot be compared at equal time: {at_time.why_not}",))
    metric, values = field[0].metric, at_time.values
    ranked = sorted((c for c in values if math.isfinite(values[c])), key=lambda c: metric.sign * values[c])
    begin = f"At equal time ({say.seconds(at_time.at)}) "
    gone = [contender for contender in field if contender not in ranked]
    if not ranked:
        return Verdict((begin, "none can be read: their losses were not numbers."))
    best = values[ranked[0]]
    ahead = len(ranked) == 1 or abs(values[ranked[1]] - best) >= metric.level
    parts: list[str | Contender] = [begin, ranked[0]]
    parts.append(f" {'is ahead with' if ahead else 'reached'} {metric.show(best)} {metric.title}")
    for place, contender in enumerate(ranked[1:], start=1):
        between = "; " if place == 1 else " and " if place == len(ranked) - 1 else ", "
        parts += [between, contender, f" {metric.show(values[contender])}"]
    if gone:
        parts.append("; without " + listed([contender.label for contender in gone]) + ", diverged or not evaluated")
    return Verdict((*parts, "."), better=ranked[0] if ahead else None)


def listed(names: Sequence[str]) -> str:
    """a; a and b; a, b and c."""
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


def _median(values: Iterable[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.median(finite) if finite else math.nan
