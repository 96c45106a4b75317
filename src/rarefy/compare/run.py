"""One run of a comparison, fresh or gone on with, from settings to its record."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rarefy.compare.jobs import Job
from rarefy.compare.records import DIVERGED, FINISHED, failed_record, make_record, start_of, write_record
from rarefy.compare.task import Task
from rarefy.training.checkpoint import load_checkpoint
from rarefy.training.interrupt import Interrupted, StopRequest
from rarefy.training.log import METRICS, MetricsLog, cut_log
from rarefy.training.loop import Loop, Watcher
from rarefy.training.twin import Diverged, Twin

PARTIAL = "partial"
"""Folder of runs that have begun and not ended, in the comparison's."""


def run_job(task: Task, job: Job, folder: Path, watcher: Watcher, stop: StopRequest) -> dict[str, Any]:
    """Make a run, or go on with what there is of it, and keep its record.

    On the CPU, with as many threads, the record is the same but for its times however often the run was interrupted. A
    run that diverges or breaks gets a record that says so.

    Raises:
        Interrupted: asked to stop; a checkpoint is saved.
        OSError: a file could not be written.
    """
    try:
        record = _run(task, job, folder, watcher, stop)
    except (Interrupted, OSError):
        raise
    except Exception as error:  # whatever a method or an optimizer raises must not end the other runs
        record = failed_record(task, job, f"{type(error).__name__}: {' '.join(str(error).split())}")
    write_record(folder, job, record)
    shutil.rmtree(folder / PARTIAL / job.digest, ignore_errors=True)
    return record


def _run(task: Task, job: Job, folder: Path, watcher: Watcher, stop: StopRequest) -> dict[str, Any]:
    if job.settings.threads is not None:
        torch.set_num_threads(job.settings.threads)
    here = folder / PARTIAL / job.digest
    here.mkdir(parents=True, exist_ok=True)
    twin, start = _where_it_was(task, job, here)
    data, valid = task.feed(job.settings)
    state, message = FINISHED, ""
    try:
        with MetricsLog(here) as log:
            Loop(
                twins=[twin],
                train_data=data,
                valid_data=valid,
                settings=job.settings.loop(),
                flops_per_token=lambda twin: task.flops_per_token(twin.model),
                folder=here,
                log=log,
                watcher=watcher,
            ).run(stop)
    except Diverged as error:
        state, message = DIVERGED, str(error)
    log = _read_log(here)
    last = [record["loss"] for record in log if record["kind"] == "eval"][-1:]
    if state == FINISHED and last == [None]:  # the log has no name for what is not a number
        state, message = DIVERGED, f"the loss on held-out data is not a number at step {twin.step:,}"
    return make_record(task, job, start, log, twin, state=state, message=message)


def _where_it_was(task: Task, job: Job, here: Path) -> tuple[Twin, Mapping[str, Any]]:
    """The network at its last checkpoint, if there is one that can be read, and what it was at its start."""
    twin = task.make(job.settings, dense=job.dense)
    start = start_of(task, twin)
    try:
        load_checkpoint(here, [twin])
    except ValueError:  # a disk that failed: nothing is lost but time
        shutil.rmtree(here)
        here.mkdir()
        return task.make(job.settings, dense=job.dense), start
    cut_log(here, {twin.name: twin.step})
    return twin, start


def _read_log(here: Path) -> list[dict[str, Any]]:
    with (here / METRICS).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
