"""`rarefy export RUN_OR_FILE --to dense|scipy|hf`: a trained network for other tools."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from rarefy.export import export_dense, export_hf, export_scipy
from rarefy.training.checkpoint import latest

EXPORTS = {"dense": (export_dense, "dense.safetensors"), "scipy": (export_scipy, "scipy"), "hf": (export_hf, "hf")}
"""Name -> function, and what --out is called when it is not given."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a trained network as dense safetensors, SciPy sparse matrices, or a Hugging Face folder."""

    source: tyro.conf.Positional[Path]
    """Folder of a run, or a file of rarefy.save."""

    to: Literal["dense", "scipy", "hf"]
    """dense: one safetensors file with dense weights; scipy: a folder of CSR and BSR matrices; hf: a folder with
    model.safetensors (dense) and config.json for from_pretrained."""

    out: Path | None = None
    """File or folder to write. Without it: a name that says what it is, beside the source."""

    config: Path | None = None
    """YAML file that says the same as these options, which override it."""


def run(settings: Export) -> None:
    """Export and print where it is."""
    export, default = EXPORTS[settings.to]
    file = network_file(settings.source)
    out = settings.out
    if out is None:
        out = settings.source / default if settings.source.is_dir() else file.with_name(f"{file.stem}-{default}")
    print(export(file, out))


def network_file(source: Path) -> Path:
    """The file itself, or that of a run: model.safetensors, or, before the run has ended, its last sparse checkpoint.

    Raises:
        ValueError: there is none.
    """
    if not source.exists():
        raise ValueError(f"{source}: there is no such file or folder; give a run's folder or a file of rarefy.save")
    if not source.is_dir():
        return source
    if (source / "model.safetensors").is_file():
        return source / "model.safetensors"
    entries = latest(source)
    if not entries:
        raise ValueError(f"{source} holds no network: neither model.safetensors nor a checkpoint")
    return source / entries.get("sparse", next(iter(entries.values())))["file"]
