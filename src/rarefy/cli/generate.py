"""`rarefy generate --run DIR --prompt ...`: text from a trained network."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rarefy.models import Generation, timed_generate
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
    """Print prompt, text and times as JSON."""


def run(settings: Generate) -> None:
    """Print the prompt and what follows it, and to the standard error how fast that went."""
    model = load_network(settings.run, settings.twin)
    prompt = settings.prompt.encode("utf-8", errors="surrogateescape")
    options = {"temperature": settings.temperature, "top_k": settings.top_k, "seed": settings.seed}
    made = timed_generate(model, prompt, settings.bytes, **options)
    text = made.text.decode("utf-8", errors="replace")
    if settings.json:
        rates = {"prompt_bytes_per_s": made.prompt_bytes_per_s, "decode_bytes_per_s": made.decode_bytes_per_s}
        took = {"prompt_bytes": made.prompt_bytes, "prompt_s": made.prompt_s, "decode_s": made.decode_s}
        print(json.dumps({"prompt": settings.prompt, "text": text, **took, **rates}))
        return
    print(settings.prompt + text, flush=True)
    print(_speed(made), file=sys.stderr)  # apart from the text, which may go to a file


def _speed(made: Generation) -> str:
    """Reading the prompt and writing, apart: the first is many positions at once, the second one at a time."""
    said = f"read {made.prompt_bytes:,} bytes in {made.prompt_s:.3f} s"
    if made.decode_bytes_per_s is not None:
        said += f", then wrote {made.decode_bytes_per_s:,.0f} bytes/s"
    return said
