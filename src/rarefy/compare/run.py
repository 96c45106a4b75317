"""One run of a comparison, fresh or gone on with, from settings to its record."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rarefy.compare.jobs import Job
from rarefy.compare.records import DIVERGED, FINISHED, failed_record, make_record, start_of, write_record
from rarefy.files import save
from rarefy.recipes.task import Task
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
    run = Run(task, job, folder, watcher)
    while run.record is None:
        run.go_on(stop)
    return run.record


class Run:
    """One run on its way, in slices; each has a log and checkpoints of its own.

    Args:
        slice_steps: optimizer steps of a slice; None: as the settings say.

    Attributes:
        record: None until it has ended.
    """

    def __init__(self, task: Task, job: Job, folder: Path, watcher: Watcher, *, slice_steps: int | None = None) -> None:
        self.job = job
        self.record: dict[str, Any] | None = None
        self._task, self._folder, self._here = task, folder, folder / PARTIAL / job.digest
        self._loop: Loop | None = None
        self._saved_at = time.monotonic()
        with self._kept_if_it_breaks():
            self._here.mkdir(parents=True, exist_ok=True)
            if job.settings.threads is not None:
                torch.set_num_threads(job.settings.threads)
            twin, self._start = _where_it_was(task, job, self._here)
            data, valid = task.feed(job.settings)
            settings = job.settings.loop()
            if slice_steps is not None:
                settings = dataclasses.replace(settings, slice_steps=slice_steps)
            self._loop = Loop(
                twins=[twin],
                train_data=data,
                valid_data=valid,
                settings=settings,
                flops_per_token=lambda twin: task.flops_per_token(twin.model),
                folder=self._here,
                log=MetricsLog(self._here),
                watcher=watcher,
                metric=task.metric,
            )

    @property
    def progress(self) -> float:
        """Share of the steps that it has taken."""
        return 1.0 if self._loop is None else self._loop.twins[0].step / self.job.steps

    def go_on(self, stop: StopRequest) -> None:
        """One slice, with a checkpoint where it is time for one; after the last, the record is there.

        Raises:
            Interrupted: asked to stop; a checkpoint is saved.
            OSError: a file could not be written.
        """
        loop = self._loop
        assert loop is not None and self.record is None
        try:
            with self._kept_if_it_breaks(), loop.on_the_way():
                if not loop.done:
                    loop.take_slice(stop)
                if loop.done:
                    loop.finish()
                    self._ended(FINISHED)
                elif time.monotonic() - self._saved_at >= loop.settings.checkpoint_s:
                    self.save()
        except Interrupted:
            loop.log.close()
            raise

    def save(self) -> None:
        """A checkpoint. Raises OSError, or Diverged if a parameter is not a number."""
        assert self._loop is not None
        self._loop.save()
        self._saved_at = time.monotonic()

    @contextmanager
    def _kept_if_it_breaks(self) -> Iterator[None]:
        """Whatever a method or an optimizer raises must not end the other runs."""
        try:
            yield
        except (Interrupted, OSError):
            raise
        except Diverged as error:
            self._ended(DIVERGED, str(error))
        except Exception as error:
            self._keep(failed_record(self._task, self.job, f"{type(error).__name__}: {' '.join(str(error).split())}"))

    def _ended(self, state: str, message: str = "") -> None:
        assert self._loop is not None
        self._loop.log.close()
        twin, log = self._loop.twins[0], _read_log(self._here)
        everything = self._task.all_held_out(self.job.settings) if state == FINISHED else None
        judged = None if everything is None else twin.assess(everything)
        last = [record["loss"] for record in log if record["kind"] == "eval"][-1:]
        lost = last == [None] or (judged is not None and not math.isfinite(judged["loss"]))
        if state == FINISHED and lost:  # the log has no name for what is not a number
            state, message = DIVERGED, f"the loss on held-out data is not a number at step {twin.step:,}"
        network = self._here / "network.safetensors"
        save(twin.model, network)
        size = network.stat().st_size
        ended = {"state": state, "message": message, "file_bytes": size, "judged": judged}
        self._keep(make_record(self._task, self.job, self._start, log, twin, **ended))

    def _keep(self, record: dict[str, Any]) -> None:
        if self._loop is not None:
            self._loop.log.close()
        self._loop = None  # and the network with it
        write_record(self._folder, self.job, record)
        shutil.rmtree(self._here, ignore_errors=True)
        self.record = record


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
