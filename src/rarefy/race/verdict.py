"""Who won a race, by how much, and when one side reached what the other ended with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rarefy.compare.records import FINISHED
from rarefy.compare.table import mean_and_spread
from rarefy.training.subject import Metric

Record = Mapping[str, Any]

SPARSE, DENSE, NEITHER, OPEN = "sparse", "dense", "neither", "open"
"""The winning side. `neither`: the difference is within its spread over seeds; `open`: one side is missing."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a race says."""

    winner: str
    best_dense: str | None
    """Label of the dense contender of the best mean at the end."""
    best_sparse: str | None
    difference: dict[str, Any] | None
    """Best sparse minus best dense at the end, seed by seed: `mean_and_spread`."""
    shares: dict[str, dict[str, Any] | None]
    """Sparse label -> time until it was as good as the best dense one at its end, over that one's time; None where it
    never was, with some seed."""
    reverse: dict[str, Any] | None
    """The same the other way round: when the best dense one was as good as the best sparse one at its end."""


def verdict(runs: Mapping[str, Sequence[Record]], metric: Metric) -> Verdict:
    """Of the records of each contender, seed by seed.

    Args:
        runs: label -> records, of any state.
        metric: what they are judged by.
    """
    done = {label: {r["seed"]: r for r in records if r["state"] == FINISHED} for label, records in runs.items()}
    done = {label: found for label, found in done.items() if found}
    best_dense = _best({label: found for label, found in done.items() if _dense(found)}, metric.sign)
    best_sparse = _best({label: found for label, found in done.items() if not _dense(found)}, metric.sign)
    if best_dense is None or best_sparse is None:
        return Verdict(
            winner=OPEN, best_dense=best_dense, best_sparse=best_sparse, difference=None, shares={}, reverse=None
        )
    dense, sparse = done[best_dense], done[best_sparse]
    shares = {label: _share(found, dense, metric) for label, found in done.items() if not _dense(found)}
    difference = mean_and_spread([sparse[seed]["final"] - dense[seed]["final"] for seed in sparse if seed in dense])
    return Verdict(
        winner=_winner(difference, metric.sign),
        best_dense=best_dense,
        best_sparse=best_sparse,
        difference=difference,
        shares=shares,
        reverse=_share(dense, sparse, metric),
    )


def reached_s(record: Record, metric: Metric, target: float) -> float | None:
    """Seconds of training until the metric was as good as `target`, on straight lines between evaluations; None: never.

    Where evaluations look at a part of what a run is judged by in the end, its curve is moved to end there: the part is
    as much easier or harder on the way as it is at the end.
    """
    curve = record["curve"][metric.key]
    beside = record["final"] - curve[-1]
    before: tuple[float, float] | None = None
    for at, found in zip(record["clock"]["curve_s"], curve, strict=True):
        if found is None:
            continue
        value = found + beside
        if metric.sign * value <= metric.sign * target:
            if before is None or value == before[1]:
                return at
            return before[0] + (at - before[0]) * (target - before[1]) / (value - before[1])
        before = (at, value)
    return None


def _dense(found: Mapping[int, Record]) -> bool:
    return next(iter(found.values()))["dense"]


def _best(done: Mapping[str, Mapping[int, Record]], sign: int) -> str | None:
    """By the mean over seeds; of contenders with different seeds those with the most count."""
    if not done:
        return None
    most = max(len(found) for found in done.values())
    full = {label: found for label, found in done.items() if len(found) == most}
    return min(full, key=lambda label: sign * sum(record["final"] for record in full[label].values()))


def _share(found: Mapping[int, Record], other: Mapping[int, Record], metric: Metric) -> dict[str, Any] | None:
    """Time until `found` was as good as `other` at its end, over the time of `other`, over the seeds of both."""
    shares = []
    for seed in found:
        if seed in other:
            reached = reached_s(found[seed], metric, other[seed]["final"])
            if reached is None:
                return None
            shares.append(reached / other[seed]["clock"]["train_s"])
    return mean_and_spread(shares)


def _winner(difference: Mapping[str, Any] | None, sign: int) -> str:
    if difference is None:
        return OPEN
    ahead = -sign * difference["mean"]
    if difference["spread"] is not None and abs(ahead) <= difference["spread"]:
        return NEITHER
    return SPARSE if ahead > 0 else DENSE if ahead < 0 else NEITHER
