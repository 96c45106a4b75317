"""`rarefy generate --run DIR --prompt ...`: text from a trained network."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rarefy.models import generate
from rarefy.recipes.text import load_network


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Have the network of a run continue a text, from its last checkpoint."""

    run: Path
    """Folder of the run."""

    prompt: str = ""
    """Text to continue."""

    bytes: int = 300
    """How many bytes to add."""

    temperature: float = 0.8
    """Below 1 is safer, above 1 wilder; 0 always takes the likeliest byte."""

    top_k: int | None = None
    """Choose among the k likeliest bytes only. Without it: among all."""

    seed: int = 0
    """The same seed writes the same text."""

    twin: Literal["sparse", "dense"] = "sparse"
    """Which of the run's networks."""

    config: Path | None = None
    """YAML file that says the same as these options, which override it."""

    json: bool = False
    """Print prompt and text as JSON."""


def run(settings: Generate) -> None:
    """Print the prompt and what follows it."""
    model = load_network(settings.run, settings.twin)
    prompt = settings.prompt.encode("utf-8", errors="surrogateescape")
    written = generate(
        model, prompt, settings.bytes, temperature=settings.temperature, top_k=settings.top_k, seed=settings.seed
    )
    text = written.decode("utf-8", errors="replace")
    print(json.dumps({"prompt": settings.prompt, "text": text}) if settings.json else settings.prompt + text)
