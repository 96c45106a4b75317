"""A run from settings to what it leaves behind, fresh or resumed, whatever it is about."""

from __future__ import annotations

import dataclasses
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from rarefy.files import atomic_write, load_into, save
from rarefy.nn import SparseLayer, SparseLowRank
from rarefy.recipes.settings import RunSettings, check_same
from rarefy.recipes.settle import explain, settle
from rarefy.recipes.task import DENSE, Ending, Task
from rarefy.rewiring import GuardWarning
from rarefy.settings import from_plain, to_plain
from rarefy.training.checkpoint import latest, load_checkpoint
from rarefy.training.folder import SETTINGS, SUMMARY, read_plan, read_settings, write_plan, write_settings
from rarefy.training.interrupt import StopRequest
from rarefy.training.log import METRICS, MetricsLog, cut_log
from rarefy.training.loop import Loop, Watcher
from rarefy.training.machine import check_device, machine, peak_memory_bytes
from rarefy.training.subject import Subject, subject_of
from rarefy.training.twin import Diverged, Twin

S = TypeVar("S", bound=RunSettings)


class Listener(Watcher, Protocol):
    """Who is told how the run goes, besides the steps themselves."""

    def say(self, line: str) -> None:
        """A line for people."""
        ...

    def begin(self, twins: list[Twin], steps: int, tokens_per_step: int) -> None:
        """Training begins."""
        ...

    def end(self) -> None:
        """Training has ended, well or not."""
        ...


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished run."""

    folder: Path
    ending: Ending
    summary: dict[str, Any]
    """What summary.json says."""


def train(
    kind: type[Task[Any]],
    settings: RunSettings,
    folder: Path,
    listener: Listener,
    *,
    command: list[str] | None = None,
) -> Outcome:
    """A new run.

    Args:
        kind: of the task, which reads the data when it is made.
        folder: of the run; created once training can begin.
        command: the command line that asked for it, for the summary.
    Raises:
        ValueError: settings or data that cannot be used, or the training diverged.
        OSError: a file could not be written.
        Interrupted: asked to stop; everything is saved.
    """
    started = time.monotonic()
    check_device(settings.device)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    task = kind(settings)
    listener.say(f"{task.name}: {task.source}")
    explanation = explain(task, listener.say)
    settled, trials = settle(task, explanation["layers"], started, listener.say)
    twins = make_twins(task, settled, explanation["layers"])

    folder.mkdir(parents=True, exist_ok=True)
    write_plan(folder, explanation)
    with MetricsLog(folder) as log:
        log.write(
            "run",
            id=folder.name,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            machine=machine(),
            twins=[describe(task, twin, trials[twin.name].training_bytes) for twin in twins],
            data={"source": task.source, "digest": task.data.digest},
            command=command or [],
            settings=to_plain(settled),
            **task.about(),
        )
    write_settings(folder, to_plain(settled))
    return _go(task, settled, folder, twins, listener, started)


def resume(kind: type[Task[Any]], folder: Path, listener: Listener, *, asked: RunSettings | None = None) -> Outcome:
    """Go on with a run from its last checkpoint, or its start; on the CPU bit for bit as if it had never stopped.

    Args:
        asked: settings that the user insists on; they must be the run's.
    Raises:
        ValueError: no run, one about something else, other settings, other data, a damaged checkpoint, or the run is
            finished.
        OSError, Interrupted: as `train`.
    """
    started = time.monotonic()
    settings = read_run_settings(kind, folder)
    if asked is not None:
        check_same(settings, asked, str(folder))
    done = latest(folder)
    if done and all(entry["step"] == settings.steps for entry in done.values()) and (folder / SUMMARY).is_file():
        raise ValueError(f"{folder} has taken all of its {settings.steps:,} steps: there is nothing to go on with")
    assert settings.threads is not None
    check_device(settings.device)
    torch.set_num_threads(settings.threads)
    task = kind(settings)
    before = run_record(folder)["data"]
    if task.data.digest != before["digest"]:
        raise ValueError(
            f"the {task.name} {'are' if task.name.endswith('s') else 'is'} not what {folder} was started with: then "
            f"{before['source']}; now {task.source}. Put it back, or start a new run"
        )
    twins = make_twins(task, settings, read_plan(folder))
    load_checkpoint(folder, twins)
    cut_log(folder, {twin.name: twin.step for twin in twins})
    listener.say(f"{task.name}: {task.source}")
    listener.say(f"going on with {folder} after step {min(twin.step for twin in twins):,} of {settings.steps:,}")
    return _go(task, settings, folder, twins, listener, started)


def read_run_settings(kind: type[Task[Any]], folder: Path) -> Any:
    """The settings of a run. Raises ValueError when the folder is none, or one about something else, or damaged."""
    data = read_settings(folder, kind.subject.name)
    check_subject(folder, kind.subject)
    return from_plain(kind.settings_class, data, where=str(folder / SETTINGS))


def check_subject(folder: Path, subject: Subject) -> None:
    """Raises ValueError when the run in the folder is about something else, or its log is damaged."""
    found = subject_of(run_record(folder))
    if found is not subject:
        raise ValueError(f"{folder} is a run of rarefy train {found.name}, and one of {subject.name} is needed here")


def run_record(folder: Path) -> dict[str, Any]:
    """What the run said about itself when it began.

    Raises:
        ValueError: metrics.jsonl does not begin with it.
    """
    try:
        with (folder / METRICS).open(encoding="utf-8") as lines:
            record = json.loads(next(lines))
        if record["kind"] != "run" or not isinstance(record["data"]["digest"], str):
            raise ValueError("its first line is something else")
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise ValueError(f"{folder / METRICS} does not begin with the run's record: {error}") from error
    return record


def load_twin(folder: Path, settings: S, name: str, make: Callable[[S, bool], Twin]) -> Twin:
    """A run's network, with its engine, as its last checkpoint has it.

    Args:
        settings: the run's.
        make: settings, whether dense -> the network before its first step.
    Raises:
        ValueError: the run has no checkpoint of that network, or the file is damaged.
    """
    entries = latest(folder)
    if not entries:
        raise ValueError(f"{folder} has no checkpoint yet")
    if name not in entries:
        raise ValueError(f"{folder} has no {name} network; it has: {', '.join(entries)}")
    if name != DENSE:
        settings = _decided(settings, read_plan(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GuardWarning)  # of training, which is over
        twin = make(settings, name == DENSE)
    load_into(folder / entries[name]["file"], twin.model, rewirer=twin.rewirer)
    return twin


# -- steps of a run -------------------------------------------------------------------------------------------------


def make_twins(task: Task[S], settings: S, layers: Sequence[Mapping[str, Any]]) -> list[Twin]:
    """Both networks of a settled run, or the sparse one alone, ready for their first step.

    Args:
        layers: of plan.json: what was decided.
    """
    twins = [task.make(_decided(settings, layers), dense=False)]
    return [*twins, task.make(settings, dense=True)] if settings.twin else twins


def _decided(settings: S, layers: Sequence[Mapping[str, Any]]) -> S:
    return dataclasses.replace(settings, plan=settings.plan.settled(layers))


def describe(task: Task, twin: Twin, training_bytes: Mapping[str, int]) -> dict[str, Any]:
    """A twin's entry in the run record.

    parameters: entries of all weights as if dense; nonzeros: those that exist and train; density: of the sparse layers;
    flops_per_token: forward and backward, of a byte or an image. All before the first step: where the density
    moves, the log has how it goes on. frozen_from: the last step after which the pattern may change, 0 if never, None
    without a pattern.
    """
    modules = list(twin.model.modules())
    nonzeros = sum(p.numel() for p in twin.model.parameters())
    absent = sum(m.out_features * m.in_features - m.values.numel() for m in modules if isinstance(m, SparseLayer))
    absent -= sum(m.a.numel() + m.b.numel() for m in modules if isinstance(m, SparseLowRank))
    return {
        "name": twin.name,
        "parameters": nonzeros + absent,
        "nonzeros": nonzeros,
        "density": twin.density,
        "flops_per_token": task.flops_per_token(twin.model),
        "training_bytes": dict(training_bytes),
        "frozen_from": None if twin.rewirer is None else twin.rewirer.end if twin.rewirer.method.rewires else 0,
    }


def _go(
    task: Task[Any], settings: RunSettings, folder: Path, twins: list[Twin], listener: Listener, started: float
) -> Outcome:
    """Train to the end, then write what a finished run leaves."""
    data, valid = task.feed(settings)
    assert settings.steps is not None
    listener.begin(twins, settings.steps, settings.tokens_per_step)
    try:
        with MetricsLog(folder) as log, StopRequest() as stop:
            Loop(
                twins=twins,
                train_data=data,
                valid_data=valid,
                settings=settings.loop(),
                flops_per_token=lambda twin: task.flops_per_token(twin.model),
                folder=folder,
                log=log,
                watcher=listener,
                metric=task.metric,
            ).run(stop)
    except Diverged as error:
        raise Diverged(f"{error}, and training stopped. {_last_good(folder)}. {_advice(settings)}") from error
    except OSError as error:
        raise OSError(
            f"{error}. {_last_good(folder)}: rarefy train {task.name} --resume {folder} goes on from there"
        ) from error
    finally:
        listener.end()
    return _finish(task, settings, folder, twins, started)


def _last_good(folder: Path) -> str:
    entries = latest(folder)
    if not entries:
        return "There is no checkpoint yet"
    return f"The last checkpoint, of step {min(entry['step'] for entry in entries.values()):,}, is whole"


def _advice(settings: RunSettings) -> str:
    values = "" if settings.sparse_lr is None else f"{settings.sparse_lr:g} for sparse values, "
    return (
        f"Start again with a lower --lr (it was {settings.lr:g}, {values}"
        f"{settings.dense_lr:g} for the dense twin), "
        f"a longer --warmup ({settings.warmup} steps) or a smaller --clip ({settings.clip:g}); --resume would come "
        "to the same point"
    )


def _finish(task: Task[Any], settings: RunSettings, folder: Path, twins: list[Twin], started: float) -> Outcome:
    ending = task.end(_decided(settings, read_plan(folder)), folder, twins)
    save(twins[0].model, folder / "model.safetensors")
    summary = {
        "command": run_record(folder).get("command", []),
        "id": folder.name,
        "steps": settings.steps,
        "twins": {
            twin.name: {"step": twin.step, "train_s": twin.clock.train_s, "density": twin.density} for twin in twins
        },
        "model_bytes": (folder / "model.safetensors").stat().st_size,
        "peak_memory_bytes": peak_memory_bytes(),
        "wall_s": time.monotonic() - started,
    }
    atomic_write(folder / SUMMARY, (json.dumps(summary, indent=1) + "\n").encode())
    return Outcome(folder=folder, ending=ending, summary=summary)
