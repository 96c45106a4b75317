"""`rarefy bench`: a table of sparse against dense on this machine."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from rich.console import Console
from rich.text import Text

from rarefy.bench import Results, Settings
from rarefy.bench import run as run_bench
from rarefy.bench.results import DISTURBED
from rarefy.bench.settings import Conv
from rarefy.cli.bench_networks import CONVS
from rarefy.cli.bench_tables import show
from rarefy.cost import Precision
from rarefy.files import atomic_write

RESULTS = Path("benchmarks/results")
"""Where --save collects results of machines and dates, from the folder in which the command runs."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Time sparse against dense on this machine, interleaved in one process: layers and convolutions forward and
    backward, whole training steps of GPTs and of networks for images; against dense fp32, against the
    fastest dense that the machine has, and against what it can do at most.
    """

    shapes: tuple[str, ...] = ("512x512", "1024x1024", "4096x1024", "1024x4096")
    """Layers, as OUTxIN. Nothing after it: none."""

    densities: tuple[float, ...] = (0.1, 0.2, 0.5)
    """Shares of the weights that exist, in (0, 1]."""

    blocks: tuple[int | str, ...] = (1, 4)
    """Unit shapes: 1 is unstructured, 4 is 4x4, 4x1 is four outputs of one input."""

    dtypes: tuple[str, ...] = ("fp32", "medium")
    """In what the sparse side computes: fp32; medium, where products may use bf16 inside; bf16, under autocast."""

    tokens: tuple[int, ...] = (2048,)
    """Rows of a layer's input."""

    gpt: tuple[str, ...] = ()
    """GPTs whose training steps are timed, as WIDTHxLAYERS: 512x6."""

    convs: tuple[str, ...] = ()
    """Convolutions, as OUTxINxKERNELxSIDE, with the stride after a slash if it is not 1: 64x64x3x32, 128x64x3x32/2.
    Or all that a network has: resnet18, wrn22x2 (of 32x32 pixels), resnet50, mobilenet (of 224x224; give few --images).
    """

    cnns: tuple[str, ...] = ()
    """Networks for images of 32x32 whose training steps are timed: wrn16x2, wrn22x2, wrn28x10, resnet18."""

    images: int = 128
    """Images of a step, for convolutions and networks for images."""

    context: int = 256
    """Bytes that a GPT sees at once."""

    step_tokens: int = 2048
    """Bytes of a GPT's training step."""

    compile: bool = False
    """Also time dense torch under torch.compile; compiling is not counted."""

    device: str = "cpu"
    """Where to time: cpu, or cuda for an NVIDIA GPU (docs/gpu.md)."""

    threads: int | None = None
    """CPU threads. Default: what torch takes."""

    rounds: int = 25
    """The most rounds; a slow machine gets fewer, at least three."""

    isa: str = "auto"
    """Instruction set of the kernels (amx, avx512bf16, avx512, avx2, neon, portable), or tiled or reference: plain
    torch."""

    seconds: float = 40.0
    """About how long it may take; longer where three rounds do not fit."""

    peers: bool = True
    """Also time torch's CSR and BSR layouts and, if installed, SparseLab and SparseProp; on a GPU blksprs and stk."""

    json: bool = False
    """Print JSON, and nothing else, to stdout."""

    out: Path | None = None
    """Also write the JSON to this file."""

    save: bool = False
    """Also write the JSON to benchmarks/results/, named by date, processor and instruction set."""

    html: Path | None = None
    """Also write a page with plots to this file; it opens without a network."""


def run(settings: Bench) -> None:
    """Measure, then print a table or JSON."""
    wanted = wish(settings)
    for path in (settings.out, settings.html):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"cannot write {str(path)!r}: there is no folder {str(path.parent)!r}; create it first")
    console = Console(stderr=True)
    with console.status("") as status:
        results = run_bench(wanted, progress=lambda text: status.update(f"timing {text}"))
    data = results.to_json()
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    saved = [settings.out] if settings.out is not None else []
    if settings.save:
        RESULTS.mkdir(parents=True, exist_ok=True)
        saved.append(unused(RESULTS / name_of(results)))
    for path in saved:
        atomic_write(path, text.encode())
    if settings.html is not None:
        from rarefy.report.bench import bench_page

        atomic_write(settings.html, bench_page(data).encode())
        saved.append(settings.html)
    if settings.json:
        sys.stdout.write(text)
    else:
        show(results, Console())
    for path in saved:
        console.print(Text(f"written: {path}", style="dim"), soft_wrap=True)
    if results.check.disturbed:
        console.print(Text(_disturbed(results), style="yellow"), soft_wrap=True)


def wish(settings: Bench) -> Settings:
    """What the options ask for.

    Raises:
        ValueError: they ask for what cannot be.
    """

    def pairs(given: tuple[int | str, ...], option: str) -> tuple[tuple[int, int], ...]:
        return tuple(dict.fromkeys(sides(text, option) for text in given))

    return Settings(
        shapes=pairs(settings.shapes, "shapes"),
        gpt=pairs(settings.gpt, "gpt"),
        convs=tuple(dict.fromkeys(conv_of(text) for given in settings.convs for text in CONVS.get(given, (given,)))),
        cnns=tuple(dict.fromkeys(settings.cnns)),
        images=settings.images,
        blocks=pairs(settings.blocks, "blocks"),
        densities=tuple(dict.fromkeys(settings.densities)),
        dtypes=cast(tuple[Precision, ...], tuple(dict.fromkeys(settings.dtypes))),  # Settings checks them
        tokens=tuple(dict.fromkeys(settings.tokens)),
        context=settings.context,
        step_tokens=settings.step_tokens,
        compiled=settings.compile,
        peers=settings.peers,
        device=settings.device,
        threads=settings.threads,
        rounds=settings.rounds,
        isa=settings.isa,
        seconds=settings.seconds,
    )


EXAMPLES = {
    "shapes": "4096x1024 (out_features x in_features)",
    "blocks": "4 or 4x1 (outputs x inputs)",
    "gpt": "512x6 (width x layers)",
}


def sides(text: int | str, option: str) -> tuple[int, int]:
    """Text such as "4096x1024" to (4096, 1024); for a block also 4, a square.

    Raises:
        ValueError: it says something else.
    """
    parts = str(text).lower().split("x")
    square = option == "blocks" and len(parts) == 1
    parts = parts * 2 if square else parts
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{option}: {text!r} is none; write them like {EXAMPLES[option]}")
    return int(parts[0]), int(parts[1])


_CONV = re.compile(r"(\d+)x(\d+)x(\d+)x(\d+)(?:/(\d+))?(?:g(\d+))?")


def conv_of(text: str) -> Conv:
    """Text such as "128x64x3x32/2", or "128x128x3x56g32" with groups, to a convolution.

    Raises:
        ValueError: it says something else.
    """
    found = _CONV.fullmatch(text.lower())
    numbers = [int(part or 1) for part in found.groups()] if found else [0]
    if min(numbers) < 1:
        raise ValueError(
            f"convs: {text!r} is none; write them like 64x64x3x32, 128x64x3x32/2 (out, in, kernel, side / stride) or "
            f"128x128x3x56g32 (groups), or name a network: {', '.join(CONVS)}"
        )
    return Conv(*numbers)


def name_of(results: Results) -> str:
    """A file name made of date, processor, instruction set and threads."""
    about = results.machine
    on_gpu = results.settings.get("device", "cpu") != "cpu"
    name = about["gpu"] if on_gpu else about["cpu"].replace("(R)", "").replace("(TM)", "")
    slug = "-".join("".join(c if c.isalnum() else " " for c in name).lower().split())
    if on_gpu:
        return f"{about['date'][:10]}-{slug}.json"
    return f"{about['date'][:10]}-{slug}-{about['isa'].replace(' ', '-')}-{about['threads']}t.json"


def unused(path: Path) -> Path:
    """The path, or the first of NAME-2, NAME-3, ... that does not exist."""
    tried, count = path, 1
    while tried.exists():
        count += 1
        tried = path.with_name(f"{path.stem}-{count}{path.suffix}")
    return tried


def _disturbed(results: Results) -> str:
    check = results.check
    first, last = check.readings()[check.worst]
    what, unit = ("the dense reference took", " ms") if check.worst == "dense reference" else (check.worst, "")
    return (
        f"rarefy: warning: {what} {first:.3g}{unit} before and {last:.3g}{unit} after, {check.moved:.0%} apart (more "
        f"than {DISTURBED:.0%}): something else used the machine; repeat on an idle one"
    )
