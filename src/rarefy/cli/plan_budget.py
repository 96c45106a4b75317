"""`rarefy plan --budget`: what to train in a given time, what loss to expect of it, and the race that checks it."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

from rarefy.cli import plan_words as words
from rarefy.cli.race import minutes_of
from rarefy.cost import CostModel
from rarefy.foresight import Choice, Law, StepModel, Wish, choose, load_steps, shipped_law, step_model
from rarefy.foresight.timing import step_precisions
from rarefy.training.data import Corpus, load_corpus
from rarefy.training.machine import machine


def bytes_of(name: str, text: str) -> int:
    """8G, 500M, 1.5GiB, or a number of bytes; K, M, G and T are powers of 1024. Raises ValueError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if found is None:
        raise ValueError(f"{name} must be a size such as 8G, 500M or 2GiB, got {text!r}")
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " "))


def wish_of(budget: str, memory: str | None, *, context: int, heads: int) -> Wish:
    """Raises ValueError for a time or a size that cannot be read."""
    return Wish(
        minutes=minutes_of("budget", budget),
        memory_bytes=None if memory is None else bytes_of("memory", memory),
        context=context,
        heads=heads,
    )


def read(data: str | None, context: int) -> Corpus:
    """The text, first of all: a wrong path is to be said before anything is timed."""
    return load_corpus(data, context=context)


def steps_of(costs: CostModel) -> StepModel:
    """The step model of this machine; says on stderr what takes so long, if it does."""
    return load_steps(costs) or step_model(costs, progress=lambda text: print(f"rarefy: {text}", file=sys.stderr))


def run(
    wish: Wish, corpus: Corpus, costs: CostModel, *, budget: str, data: str | None, method: str | None, as_json: bool
) -> None:
    """Print the choice, or JSON."""
    law, steps = shipped_law(), steps_of(costs)
    choice = choose(wish, law, lambda shape: steps.ms(shape, costs) if shape.precision in step_precisions() else None)
    method = words.usual_method(choice) if method is None else method
    commands = {
        "race": words.race_command(choice, data=data, budget=budget, method=method),
        "train": words.train_command(choice, data=data, method=method),
    }
    if as_json:
        found = _plain(choice, law, steps, costs, corpus, commands)
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
        return
    about = machine()
    threads = f"{about['threads']} thread{'' if about['threads'] == 1 else 's'}"
    print(f"{budget} of training on {about['cpu']}, {threads}, kernels {about['isa']}")
    print(f"data: {corpus.source}")
    print(f"{choice.considered:,} networks compared, of which none was trained\n")
    print(f"{words.table(choice)}\n\n{words.sentence(choice)}")
    for line in words.doubts(choice, law, data_bytes=corpus.train.numel()):
        print(f"- {line}")
    for title, command in (("\ncheck it:", commands["race"]), ("train the sparse one:", commands["train"])):
        if command is not None:
            print(f"{title}\n  {command}")


def _plain(
    choice: Choice, law: Law, steps: StepModel, costs: CostModel, corpus: Corpus, commands: dict[str, str | None]
) -> dict[str, Any]:
    scale = words.BITS
    return {
        "machine": machine(),
        "budget_minutes": choice.wish.minutes,
        "memory_bytes": choice.wish.memory_bytes,
        "data": {"source": corpus.source, "bytes": corpus.train.numel()},
        "considered": choice.considered,
        "too_large": choice.too_large,
        "dense": words.plain(choice.dense),
        "sparse": words.plain(choice.sparse),
        "winner": choice.winner,
        "difference": None if choice.difference is None else choice.difference * scale,
        "difference_sigma": None if choice.difference_sigma is None else choice.difference_sigma * scale,
        "sentence": words.sentence(choice),
        "doubts": words.doubts(choice, law, data_bytes=corpus.train.numel()),
        "commands": commands,
        "law": law.to_json(),
        "cost_model": dict(costs.fitted),
        "step_model": dict(steps.fitted),
    }
