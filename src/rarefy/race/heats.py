"""Short races, from which the finalists are chosen: both sides are tuned with equal effort before they meet."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rarefy.compare.contenders import SMALL_DENSE, Contender, nonzeros
from rarefy.compare.records import FINISHED
from rarefy.recipes.task import Task


def finalists(
    task: Task, contenders: Sequence[Contender], records: Mapping[str, Mapping[str, Any]], each: int
) -> list[Contender]:
    """The best dense contenders, the best of fixed pattern, and the best that rewire, so many of each.

    Args:
        records: label -> record of its heat; who did not finish is out.
    """
    done = [one for one in contenders if records[one.label]["state"] == FINISHED]
    done.sort(key=lambda one: task.metric.sign * records[one.label]["final"])
    chosen = [one for one in done if one.dense][:each]
    sparse = [one for one in done if not one.dense]
    chosen += [one for one in sparse if not _rewires(one)][:each]
    return chosen + [one for one in sparse if _rewires(one)][:each]


def control(task: Task, chosen: Sequence[Contender], records: Mapping[str, Mapping[str, Any]]) -> list[Contender]:
    """A dense network of as many weights as the best sparse finalist, if there is one, with the rate that did best for
    dense ones.
    """
    sparse = [one for one in chosen if not one.dense]
    if not sparse:
        return []
    best = min(sparse, key=lambda one: task.metric.sign * records[one.label]["final"])
    rate = next((one.settings.dense_lr for one in chosen if one.dense), None)  # the best of them comes first
    return [_small_dense(task, best, best.settings.dense_lr if rate is None else rate)]


def _rewires(contender: Contender) -> bool:
    return contender.settings.plan.method.rewires


def _small_dense(task: Task, sparse: Contender, rate: float | None) -> Contender:
    """Dense, of as many weights as the sparse contender, and but for the rate with its settings."""
    narrow = task.narrowed(sparse.settings, nonzeros(task, sparse.settings))
    settings = dataclasses.replace(narrow, sparse_lr=None, dense_lr=rate)
    return Contender(f"{SMALL_DENSE} of {sparse.label}", True, settings, 1)
