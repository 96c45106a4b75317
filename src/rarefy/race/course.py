"""All runs on their way together: whoever has come least far takes the next slice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rarefy.compare.jobs import Job
from rarefy.compare.records import DIVERGED, FINISHED, find_record
from rarefy.compare.run import Run
from rarefy.compare.schedule import Listener
from rarefy.recipes.task import Task
from rarefy.training.interrupt import Interrupted, StopRequest

SLICES = 200
"""Slices of a run. Each is a two-hundredth of its steps, so also of its time: contenders are as far as each other."""


def run_together(task: Task, jobs: Sequence[Job], folder: Path, listener: Listener) -> dict[str, dict[str, Any]]:
    """Digest -> record of every run; those that have been made are read, those that broke are tried again.

    Raises:
        Interrupted: asked to stop; all are saved.
        ValueError: a record is damaged.
        OSError: a file could not be written.
    """
    known = {job.digest: find_record(folder, job.digest) for job in jobs}
    done = {digest: found for digest, found in known.items() if found and found["state"] in (FINISHED, DIVERGED)}
    on_the_way: list[Run] = []
    with StopRequest() as stop:
        for place, job in enumerate(jobs, 1):
            if job.digest not in done:
                listener.begin(job, place, len(jobs))
                on_the_way.append(Run(task, job, folder, listener, slice_steps=max(1, round(job.steps / SLICES))))
        try:
            while on_the_way:
                run = min(on_the_way, key=lambda one: one.progress)
                if run.record is None:
                    run.go_on(stop)
                if run.record is not None:
                    on_the_way.remove(run)
                    done[run.job.digest] = run.record
                    listener.end(run.job, run.record)
        except Interrupted:
            for other in on_the_way:
                if other is not run:
                    other.save()
            raise
    return done
