"""All runs of a comparison: one after the other in this process, or several at once in processes of their own."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from rarefy.compare.jobs import Job
from rarefy.compare.records import DIVERGED, FINISHED, failed_record, find_record, write_record
from rarefy.compare.run import PARTIAL, run_job
from rarefy.compare.worker import INTERRUPTED, start
from rarefy.recipes.task import Task
from rarefy.training.interrupt import Interrupted, StopRequest
from rarefy.training.twin import StepResult, Twin

POLL_S = 0.1
"""Between two looks at what the processes do."""


class Listener(Protocol):
    """Who is told how the comparison goes."""

    def begin(self, job: Job, place: int, count: int) -> None:
        """A run begins or goes on: the one at this place, from 1, of so many."""
        ...

    def stepped(self, twin: Twin, result: StepResult) -> None:
        """After every step of a run in this process."""
        ...

    def evaluated(self, twin: Twin, loss: float) -> None:
        """After every evaluation of one; nats."""
        ...

    def end(self, job: Job, record: dict[str, Any]) -> None:
        """A run has its record."""
        ...


def make_all(
    task: Task, jobs: Sequence[Job], folder: Path, listener: Listener, *, at_once: int = 1
) -> dict[str, dict[str, Any]]:
    """Digest -> record of every run; those that have been made are read, those that broke are tried again.

    Raises:
        Interrupted: asked to stop; the runs that were going are saved.
        ValueError: a record is damaged.
        OSError: a file could not be written.
    """
    found = {job.digest: record for job in jobs if (record := find_record(folder, job.digest)) is not None}
    done = {digest: record for digest, record in found.items() if record["state"] in (FINISHED, DIVERGED)}
    missing = [job for job in jobs if job.digest not in done]
    for digest in done:  # a kill may have come between a record and the end of what it was made from
        shutil.rmtree(folder / PARTIAL / digest, ignore_errors=True)
    if at_once == 1 or len(missing) < 2:
        with StopRequest() as stop:
            for job in missing:
                listener.begin(job, jobs.index(job) + 1, len(jobs))
                done[job.digest] = run_job(task, job, folder, listener, stop)
                listener.end(job, done[job.digest])
                if stop.asked:
                    raise Interrupted
        return done
    return done | _at_once(task, missing, jobs, folder, listener, at_once)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Two comparisons in one folder at the same time would write over each other.

    Raises:
        ValueError: there is another.
    """
    (folder / PARTIAL).mkdir(exist_ok=True)
    with (folder / PARTIAL / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another comparison or race is at work in {folder}: wait for it, or give another --out"
            ) from None
        yield


# -- several at once ------------------------------------------------------------------------------------------------


def _at_once(
    task: Task, missing: Sequence[Job], jobs: Sequence[Job], folder: Path, listener: Listener, at_once: int
) -> dict[str, dict[str, Any]]:
    """As many processes as asked for, each with one run, until all have been made or a signal has come."""
    waiting, going, done = list(missing), list[tuple[subprocess.Popen[str], Job]](), dict[str, dict[str, Any]]()
    with StopRequest() as stop:
        told = False
        while going or (waiting and not stop.asked):
            while waiting and len(going) < at_once and not stop.asked:
                job = waiting.pop(0)
                going.append((start(task, job, folder), job))
                listener.begin(job, jobs.index(job) + 1, len(jobs))
            if stop.asked and not told:
                told = True
                for process, _ in going:
                    process.terminate()
            time.sleep(POLL_S)
            for process, job in [one for one in going if one[0].poll() is not None]:
                going.remove((process, job))
                record = find_record(folder, job.digest)
                made = process.returncode == 0 and record is not None
                if not made and (stop.asked or process.returncode == INTERRUPTED):
                    stop.asked = True
                    continue
                if not made or record is None:
                    record = failed_record(task, job, f"its process ended with status {process.returncode}")
                    write_record(folder, job, record)
                done[job.digest] = record
                listener.end(job, record)
    if waiting or stop.asked:
        raise Interrupted
    return done
