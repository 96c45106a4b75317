"""What a comparison found, contender by contender: means over seeds with their spread, as plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from rarefy.compare.jobs import Job
from rarefy.compare.records import DIVERGED, FAILED, FINISHED
from rarefy.settings import unknown

BASELINE = "static"
"""Whom the others are held against, unless the user names another."""

Record = Mapping[str, Any]


def mean_and_spread(values: Sequence[float]) -> dict[str, float | int | None] | None:
    """{"mean", "spread" (standard deviation of the sample; None of a single value), "count"}; None without values."""
    if not values:
        return None
    return {"mean": fmean(values), "spread": stdev(values) if len(values) > 1 else None, "count": len(values)}


def choose_baseline(labels: Sequence[str], asked: str | None) -> str | None:
    """The label that the others are held against; None: there is none.

    Raises:
        ValueError: the one asked for is not among the contenders.
    """
    if asked is not None and asked not in labels:
        raise ValueError(f"against: {unknown(asked, list(labels))}")
    return asked if asked is not None else BASELINE if BASELINE in labels else None


def make_table(
    jobs: Sequence[Job], records: Mapping[str, Record], *, key: str, against: str | None = None
) -> dict[str, Any]:
    """{"against": label or None, "rows": [...]}, a row a contender, in order.

    Figures are over the seeds that finished: `mean_and_spread`, or None. `difference` is to the baseline, seed by
    seed, and so has no part of the spread that both share. Nonzeros and density are at the start and at the end.

    Args:
        records: digest -> record; runs that are missing are left out.
        key: of the metric.
    """
    labels = list(dict.fromkeys(job.label for job in jobs))
    baseline = choose_baseline(labels, against)
    of = {label: {job.seed: records[job.digest] for job in jobs if job.label == label and job.digest in records}
          for label in labels}  # fmt: skip
    finished = {
        label: {seed: record for seed, record in runs.items() if record["state"] == FINISHED}
        for label, runs in of.items()
    }
    rows = []
    for label in labels:
        runs = finished[label]
        theirs = finished[baseline] if baseline is not None and baseline != label else {}
        pairs = [runs[seed]["final"] - theirs[seed]["final"] for seed in runs if seed in theirs]
        states = [record["state"] for record in of[label].values()]
        rows.append(
            {
                "label": label,
                "dense": next(job.dense for job in jobs if job.label == label),
                "seeds": sorted(runs),
                "diverged": states.count(DIVERGED),
                "failed": states.count(FAILED),
                "missing": sum(job.label == label for job in jobs) - len(states),
                "steps": next(job.steps for job in jobs if job.label == label),
                "nonzeros": _both(runs, "nonzeros"),
                "density": _both(runs, "density"),
                "flops": _over(runs, lambda record: record["flops"]),
                "rewire_flops": _over(runs, lambda record: record["rewire_flops"]),
                "train_s": _over(runs, lambda record: record["clock"]["train_s"]),
                "step_s": _over(runs, lambda record: record["clock"]["step_s"]),
                "rewire_share": _over(runs, lambda record: record["clock"]["rewire_share"]),
                "final": _over(runs, lambda record: record["final"]),
                "finals": {str(seed): record["final"] for seed, record in runs.items()},
                "difference": mean_and_spread(pairs),
                "exploration": _pattern(runs, "exploration"),
                "churn": _pattern(runs, "churn"),
                "empty_rows": _pattern(runs, "empty_rows"),
                "empty_cols": _pattern(runs, "empty_cols"),
                "warnings": sum(len(record["warnings"]) for record in runs.values()),
                "messages": [f"seed {seed}: {record['message']}" for seed, record in of[label].items()
                             if record["state"] != FINISHED],
            }
        )  # fmt: skip
    return {"metric": key, "against": baseline, "rows": rows}


def _over(runs: Mapping[int, Record], figure: Callable[[Record], float]) -> dict[str, Any] | None:
    return mean_and_spread([figure(record) for record in runs.values()])


def _both(runs: Mapping[int, Record], key: str) -> list[float] | None:
    """Means at the start and at the end."""
    return [fmean(record[key][at] for record in runs.values()) for at in (0, 1)] if runs else None


def _pattern(runs: Mapping[int, Record], key: str) -> dict[str, Any] | None:
    return mean_and_spread([record["pattern"][key] for record in runs.values() if record["pattern"] is not None])
