"""All runs of a comparison: one after the other in this process, or several at once in processes of their own."""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

from rarefy.compare.jobs import Job
from rarefy.compare.records import DIVERGED, FINISHED, failed_record, find_record, write_record
from rarefy.compare.run import run_job
from rarefy.compare.task import Task
from rarefy.training.interrupt import Interrupted, StopRequest
from rarefy.training.twin import StepResult, Twin

INTERRUPTED = 130
"""Exit status of a process that was asked to stop and saved."""


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
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another rarefy compare is at work in {folder}: wait for it, or give another --out"
            ) from None
        yield


# -- several at once ------------------------------------------------------------------------------------------------


def _at_once(
    task: Task, missing: Sequence[Job], jobs: Sequence[Job], folder: Path, listener: Listener, at_once: int
) -> dict[str, dict[str, Any]]:
    """As many processes as asked for, each with one run, until all have been made or a signal has come."""
    context = multiprocessing.get_context("spawn")
    waiting, going, done = list(missing), {}, {}
    with StopRequest() as stop:
        while going or (waiting and not stop.asked):
            while waiting and len(going) < at_once and not stop.asked:
                job = waiting.pop(0)
                arguments = (type(task), task.base, job, folder, os.getpid())
                process = context.Process(target=_work, args=arguments)
                process.start()
                going[process.sentinel] = (process, job)
                listener.begin(job, jobs.index(job) + 1, len(jobs))
            ended = wait(list(going), timeout=0.5)
            if stop.asked:
                for process, _ in going.values():  # a Control-C has reached them already; a second asks no more of them
                    if process.pid and process.is_alive():
                        _ask_to_stop(process.pid)
            for sentinel in ended:
                process, job = going.pop(sentinel)
                process.join()
                if process.exitcode == INTERRUPTED and not stop.asked:
                    stop.asked = True
                if process.exitcode == INTERRUPTED:
                    continue
                record = find_record(folder, job.digest)
                if process.exitcode or record is None:
                    record = failed_record(task, job, f"its process ended with status {process.exitcode}")
                    write_record(folder, job, record)
                done[job.digest] = record
                listener.end(job, record)
    if waiting or stop.asked:
        raise Interrupted
    return done


def _ask_to_stop(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGUSR1)


class _Quiet:
    """Watches over a run in a process of its own, and ends it when its parent is gone: the parent's successor may be
    about to make the same run.
    """

    def __init__(self, parent: int) -> None:
        self._parent = parent

    def stepped(self, twin: Twin, result: StepResult) -> None:
        if os.getppid() != self._parent:
            os._exit(1)

    def evaluated(self, twin: Twin, loss: float) -> None:
        pass


def _work(kind: Any, base: Any, job: Job, folder: Path, parent: int) -> None:
    """What a process does: one run, whose record it writes."""
    with StopRequest() as stop:

        def asked(*_: object) -> None:
            stop.asked = True

        signal.signal(signal.SIGUSR1, asked)
        try:
            run_job(kind(base), job, folder, _Quiet(parent), stop)
        except Interrupted:
            os._exit(INTERRUPTED)
