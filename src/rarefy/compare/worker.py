"""A run in a process of its own, which reads what to do from its input as JSON.

It is no part of its starter's session, so that a Control-C reaches the starter alone, which asks it to stop; and it
ends when its starter is gone, whose successor may be about to make the same run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rarefy.compare.jobs import Job
from rarefy.compare.run import run_job
from rarefy.ops.memory import keep_freed
from rarefy.recipes.images import ImagesTask
from rarefy.recipes.task import Task
from rarefy.recipes.text import TextTask
from rarefy.settings import from_plain, to_plain
from rarefy.training.interrupt import Interrupted, StopRequest
from rarefy.training.twin import StepResult, Twin

INTERRUPTED = 130
"""Exit status of a worker that was asked to stop and has saved."""

TASKS: dict[str, type[Any]] = {"text": TextTask, "images": ImagesTask}


def start(task: Task, job: Job, folder: Path) -> subprocess.Popen[str]:
    """Start one."""
    wish = {
        "parent": os.getpid(),
        "folder": str(folder),
        "task": task.name,
        "base": to_plain(task.base),
        "job": {
            "label": job.label,
            "seed": job.seed,
            "dense": job.dense,
            "settings": to_plain(job.settings),
            "defines": job.defines,
        },
    }
    command = [sys.executable, "-c", "from rarefy.compare.worker import main; raise SystemExit(main())"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdin is not None
    process.stdin.write(json.dumps(wish))
    process.stdin.close()
    return process


class Orphan:
    """Watches over a run, and ends it when the process that wanted it is gone."""

    def __init__(self, parent: int) -> None:
        self._parent = parent

    def stepped(self, twin: Twin, result: StepResult) -> None:
        if os.getppid() != self._parent:
            os._exit(1)

    def evaluated(self, twin: Twin, loss: float) -> None:
        pass


def main() -> int:
    """Make the run that the input describes. Exit status: 0 with a record written, `INTERRUPTED`, or 1."""
    keep_freed()
    with StopRequest() as stop:
        wish = json.load(sys.stdin)
        kind = TASKS[wish["task"]]
        settings = kind.settings_class
        task = kind(from_plain(settings, wish["base"], where="base"))
        about = wish["job"]
        job = Job(**{**about, "settings": from_plain(settings, about["settings"], where="settings")})
        try:
            run_job(task, job, Path(wish["folder"]), Orphan(wish["parent"]), stop)
        except Interrupted:
            return INTERRUPTED
    return 0
