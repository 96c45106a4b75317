"""A text run from settings to what it leaves behind, fresh or resumed."""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import torch

from rarefy.files import atomic_write, load_into, save
from rarefy.models import GPT, generate
from rarefy.recipes.text.networks import (
    DENSE,
    SPARSE,
    describe,
    flops_per_token,
    make_dense,
    make_sparse,
    make_twins,
    settled_plan,
)
from rarefy.recipes.text.settings import TextSettings, check_same
from rarefy.recipes.text.settle import batches, explain, settle
from rarefy.rewiring import GuardWarning
from rarefy.settings import from_plain, to_plain
from rarefy.training.checkpoint import latest, load_checkpoint
from rarefy.training.data import Corpus, load_corpus
from rarefy.training.folder import SAMPLE, SETTINGS, SUMMARY, read_plan, read_settings, write_plan, write_settings
from rarefy.training.interrupt import StopRequest
from rarefy.training.log import METRICS, MetricsLog, cut_log
from rarefy.training.loop import Loop, Watcher
from rarefy.training.machine import check_device, machine, peak_memory_bytes
from rarefy.training.twin import Diverged, Twin

PROMPT_BYTES = 48
"""Of the validation text, to begin the sample with."""


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
    prompt: bytes
    sample: bytes
    """What the sparse network wrote after the prompt."""
    summary: dict[str, Any]
    """What summary.json says."""


def train_text(
    settings: TextSettings, folder: Path, listener: Listener, *, command: list[str] | None = None
) -> Outcome:
    """A new run.

    Args:
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
    corpus = load_corpus(settings.data, context=settings.context)
    listener.say(f"text: {corpus.source}")
    explanation = explain(settings, listener.say)
    settings, trials = settle(settings, explanation["layers"], corpus, started, listener.say)
    twins = make_twins(settings, settled_plan(settings.plan, explanation["layers"]))

    folder.mkdir(parents=True, exist_ok=True)
    write_plan(folder, explanation)
    with MetricsLog(folder) as log:
        about = [describe(twin, _gpt(twin), trials[twin.name].training_bytes) for twin in twins]
        log.write(
            "run",
            id=folder.name,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            machine=machine(),
            twins=about,
            data={"source": corpus.source, "digest": corpus.digest()},
            command=command or [],
            settings=to_plain(settings),
        )
    write_settings(folder, to_plain(settings))
    return _go(settings, folder, corpus, twins, listener, started)


def resume_text(folder: Path, listener: Listener, *, asked: TextSettings | None = None) -> Outcome:
    """Go on with a run from its last checkpoint, or its start; on the CPU bit for bit as if it had never stopped.

    Args:
        asked: settings that the user insists on; they must be the run's.
    Raises:
        ValueError: no run, other settings, other text, a damaged checkpoint, or the run is finished.
        OSError, Interrupted: as `train_text`.
    """
    started = time.monotonic()
    settings = read_run_settings(folder)
    if asked is not None:
        check_same(settings, asked, str(folder))
    done = latest(folder)
    if done and all(entry["step"] == settings.steps for entry in done.values()) and (folder / SUMMARY).is_file():
        raise ValueError(f"{folder} has taken all of its {settings.steps:,} steps: there is nothing to go on with")
    assert settings.threads is not None
    check_device(settings.device)
    torch.set_num_threads(settings.threads)
    corpus = load_corpus(settings.data, context=settings.context)
    before = run_record(folder)["data"]
    if corpus.digest() != before["digest"]:
        raise ValueError(
            f"the text is not what {folder} was started with: then {before['source']}; now {corpus.source}. "
            "Put it back, or start a new run"
        )
    twins = make_twins(settings, settled_plan(settings.plan, read_plan(folder)))
    load_checkpoint(folder, twins)
    cut_log(folder, {twin.name: twin.step for twin in twins})
    listener.say(f"text: {corpus.source}")
    listener.say(f"going on with {folder} after step {min(twin.step for twin in twins):,} of {settings.steps:,}")
    return _go(settings, folder, corpus, twins, listener, started)


def read_run_settings(folder: Path) -> TextSettings:
    """The settings of a run. Raises ValueError when the folder is none or they are damaged."""
    return from_plain(TextSettings, read_settings(folder), where=str(folder / SETTINGS))


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


def load_network(folder: Path, name: str = SPARSE) -> GPT:
    """A run's network as its last checkpoint has it.

    Raises:
        ValueError: the folder is no run, it has no checkpoint of that network, or the file is damaged.
    """
    settings = read_run_settings(folder)
    entries = latest(folder)
    if not entries:
        raise ValueError(f"{folder} has no checkpoint yet")
    if name not in entries:
        raise ValueError(f"{folder} has no {name} network; it has: {', '.join(entries)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GuardWarning)  # of training, which is over
        twin = (
            make_dense(settings)
            if name == DENSE
            else make_sparse(settings, settled_plan(settings.plan, read_plan(folder)))
        )
    load_into(folder / entries[name]["file"], twin.model, rewirer=twin.rewirer)
    return _gpt(twin)


# -- steps of a run -------------------------------------------------------------------------------------------------


def _gpt(twin: Twin) -> GPT:
    assert isinstance(twin.model, GPT)
    return twin.model


def _go(
    settings: TextSettings, folder: Path, corpus: Corpus, twins: list[Twin], listener: Listener, started: float
) -> Outcome:
    """Train to the end, then write what a finished run leaves."""
    data, windows = batches(settings, corpus)
    assert settings.steps is not None
    listener.begin(twins, settings.steps, settings.tokens_per_step)
    try:
        with MetricsLog(folder) as log, StopRequest() as stop:
            Loop(
                twins=twins,
                train_data=data,
                valid_data=windows,
                settings=settings.loop(),
                flops_per_token=lambda twin: flops_per_token(_gpt(twin)),
                folder=folder,
                log=log,
                watcher=listener,
            ).run(stop)
    except Diverged as error:
        raise Diverged(f"{error}, and training stopped. {_last_good(folder)}. {_advice(settings)}") from error
    except OSError as error:
        raise OSError(
            f"{error}. {_last_good(folder)}: rarefy train text --resume {folder} goes on from there"
        ) from error
    finally:
        listener.end()
    return _finish(settings, folder, corpus, twins, started)


def _last_good(folder: Path) -> str:
    entries = latest(folder)
    if not entries:
        return "There is no checkpoint yet"
    return f"The last checkpoint, of step {min(entry['step'] for entry in entries.values()):,}, is whole"


def _advice(settings: TextSettings) -> str:
    values = "" if settings.sparse_lr is None else f"{settings.sparse_lr:g} for sparse values, "
    return (
        f"Start again with a lower --lr (it was {settings.lr:g}, {values}"
        f"{settings.dense_lr:g} for the dense twin), "
        f"a longer --warmup ({settings.warmup} steps) or a smaller --clip ({settings.clip:g}); --resume would come "
        "to the same point"
    )


def _finish(settings: TextSettings, folder: Path, corpus: Corpus, twins: list[Twin], started: float) -> Outcome:
    model = _gpt(twins[0])
    prompt = bytes(corpus.valid[: min(PROMPT_BYTES, settings.context)].tolist())
    sample = generate(model, prompt, settings.sample_bytes, seed=settings.seed)
    atomic_write(folder / SAMPLE, prompt + sample)
    save(model, folder / "model.safetensors")
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
    return Outcome(folder=folder, prompt=prompt, sample=sample, summary=summary)
