"""A run folder as data, however much of it is there.

Only `metrics.jsonl` is needed. Whatever else is absent, cut short or unreadable becomes a line in `Run.notes`, so that
a report can be built from a run that is still going, was killed, or was written by another version.
"""

from __future__ import annotations

import json
import math
import shlex
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from rarefy.report.found import Found, read_found
from rarefy.rewiring.guards import guard_line
from rarefy.training.folder import IMAGES as IMAGES_FILE
from rarefy.training.subject import IMAGES, TEXT, Subject, subject_of

Record = Mapping[str, Any]

OF_A_TWIN = ("train", "eval", "rewire", "guard", "time", "end")
"""Kinds of records that belong to a twin and a step."""

SAMPLE_CHARACTERS = 20_000
"""A longer sample is cut: the report shows a taste, the folder keeps the rest."""


@dataclass(frozen=True, kw_only=True)
class Twin:
    """One network of a run: its description and its records, by kind, in order of steps."""

    name: str
    about: Record = field(default_factory=dict)
    """Its entry in the run record: parameters, nonzeros, density, flops_per_token, training_bytes."""
    train: tuple[Record, ...] = ()
    eval: tuple[Record, ...] = ()
    rewire: tuple[Record, ...] = ()
    guard: tuple[Record, ...] = ()
    """What the engine warned of: layer, guard, message."""
    time: tuple[Record, ...] = ()
    end: Record | None = None

    @property
    def dense(self) -> bool:
        """Whether this is a control without a pattern: by its density, or by its name where none is given."""
        density = number(self.about, "density")
        return density >= 1 if math.isfinite(density) else self.name.startswith("dense")

    @property
    def stopped(self) -> str:
        """Why it ended before its last step, "" if it did not."""
        reason = str(self.end.get("reason") or "") if self.end else ""
        return "" if reason == "steps" else reason

    @property
    def last_step(self) -> int:
        """The last step of which anything is known; 0 for a twin that has not begun."""
        last = [records[-1] for records in (self.train, self.eval, self.time) if records]
        return max((int(record["step"]) for record in last), default=0)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run folder holds. `notes` says, a sentence each, what is missing or was left out."""

    path: Path
    name: str
    subject: Subject = TEXT
    created: str = ""
    command: str = ""
    machine: Record = field(default_factory=dict)
    settings: Record = field(default_factory=dict)
    data: tuple[str, str] | None = None
    """What it was trained on: what tells it from other data (a digest, or its name), and its name."""
    twins: tuple[Twin, ...] = ()
    plan: Record | None = None
    sample: str = ""
    found: Found | None = None
    """What images.json says."""
    notes: tuple[str, ...] = ()

    @property
    def state(self) -> str:
        """What a run is, or was stopped by: "not ended", "interrupted", "diverged"; "" for one that came to its end."""
        if not self.twins or any(twin.end is None for twin in self.twins):
            return "not ended"
        return next((reason for twin in self.twins if (reason := twin.stopped)), "")


def read_run(folder: Path | str) -> Run:
    """Read a run folder.

    Raises:
        ValueError: the folder or its metrics.jsonl does not exist.
    """
    folder = Path(folder)
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        what = "it has no metrics.jsonl" if folder.is_dir() else "there is no such folder"
        raise ValueError(
            f"{str(folder)!r} is not a run folder: {what}. Expected what a training run writes; "
            "give the folder that `rarefy train --run DIR` named, usually runs/<id>."
        )
    notes: list[str] = []
    records = _records(metrics, notes)
    about: dict[str, Any] = {}
    subject = IMAGES if any("accuracy" in record for record in records) else TEXT  # where no record says
    for record in records:  # a resumed run may say again what it is: the last word counts
        if record["kind"] == "run":
            about.update(record)
            subject = subject_of(about)
    twins = _twins(about, records)
    plan = _plan(folder / "plan.json", notes)
    settings = about.get("settings")
    if not isinstance(settings, Mapping):
        settings = _settings(folder / "run.yaml", notes)
    summary = _mapping(folder / "summary.json", notes, absent="it is written when a run ends")
    if not about:
        notes.append("metrics.jsonl has no run record: parameters, memory and the machine are unknown.")
    if not twins:
        notes.append("Nothing has been recorded yet.")
    rewires = "static" not in str(find(settings, "method")).lower()
    stops = dict.fromkeys(twin.stopped for twin in twins if twin.stopped)
    for lack, lacking in (
        ("not ended", [f"{twin.name} (step {twin.last_step:,})" for twin in twins if twin.end is None]),
        *((reason, [f"{t.name} (step {t.last_step:,})" for t in twins if t.stopped == reason]) for reason in stops),
        ("no evaluations", [twin.name for twin in twins if not twin.eval]),
        ("no rewires on record", [twin.name for twin in twins if rewires and not twin.dense and not twin.rewire]),
        ("no record of where the time went", [twin.name for twin in twins if not twin.time]),
    ):
        if lacking:
            notes.append(f"{lack[0].upper()}{lack[1:]}: {', '.join(lacking)}.")
    return Run(
        path=folder,
        name=str(about.get("id") or folder.resolve().name),
        subject=subject,
        created=str(about.get("created") or ""),
        command=_command(about, summary or {}),
        machine=about["machine"] if isinstance(about.get("machine"), Mapping) else {},
        settings=settings,
        data=_data(about, settings),
        twins=twins,
        plan=plan,
        sample=_sample(folder / "sample.txt", notes) if subject is TEXT else "",
        found=read_found(folder / IMAGES_FILE, notes) if subject is IMAGES else None,
        notes=tuple(notes),
    )


def number(record: Record, key: str) -> float:
    """A finite float, or NaN for anything else: absent, null, text, infinite."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if math.isfinite(value) else math.nan


def numbers(records: Iterable[Record], key: str) -> list[float]:
    return [number(record, key) for record in records]


def guard_lines(twin: Twin) -> list[str]:
    """A sentence a guard that spoke, with the first layer that it spoke of and how many more there were."""
    by_guard: dict[str, list[Record]] = {}
    for record in twin.guard:
        if record.get("guard") and record.get("message"):
            by_guard.setdefault(str(record["guard"]), []).append(record)
    return [f"step {records[0]['step']:,}, {guard_line(records)}" for records in by_guard.values()]


def _records(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Every line that is a JSON object with a kind; the others are counted in a note.

    The last line of a run that is being written, or was killed, is often half a line: that is ordinary and said apart.
    """
    good: list[dict[str, Any]] = []
    bad: list[int] = []
    last = 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for last, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                bad.append(last)
                continue
            if isinstance(record, dict) and isinstance(record.get("kind"), str):
                good.append(record)
            else:
                bad.append(last)
    if bad and bad[-1] == last:
        bad.pop()
        notes.append("The last line of metrics.jsonl is incomplete and was left out.")
    if bad:
        lines_ = "line" if len(bad) == 1 else "lines"
        notes.append(f"{len(bad)} unreadable {lines_} of metrics.jsonl left out, the first is line {bad[0]}.")
    return good


def _twins(about: Record, records: list[dict[str, Any]]) -> tuple[Twin, ...]:
    """Those the run record lists, then any that only left records; sparse ones first."""
    listed = about.get("twins")
    described: dict[str, Record] = {}
    for entry in listed if isinstance(listed, list) else []:
        if isinstance(entry, Mapping) and entry.get("name"):
            described[str(entry["name"])] = entry
    by_twin: dict[str, dict[str, list[Record]]] = {name: {} for name in described}
    for record in records:
        name, step = record.get("twin"), record.get("step")
        if (
            record["kind"] in OF_A_TWIN
            and isinstance(name, str)
            and isinstance(step, int)
            and not isinstance(step, bool)
        ):
            by_twin.setdefault(name, {}).setdefault(record["kind"], []).append(record)
    twins = []
    for name, kinds in by_twin.items():
        kept = {kind: _as_kept(kind, kinds.get(kind, [])) for kind in OF_A_TWIN if kind != "end"}
        twin = Twin(
            name=name,
            about=described.get(name, {}),
            train=kept["train"],
            eval=kept["eval"],
            rewire=kept["rewire"],
            guard=kept["guard"],
            time=kept["time"],
        )
        # A run that was stopped and then resumed has an end on record that is no longer its end.
        ends = [record for record in kinds.get("end", []) if record["step"] >= twin.last_step]
        twins.append(replace(twin, end=ends[-1]) if ends else twin)
    return tuple(sorted(twins, key=lambda twin: twin.dense))


def _as_kept(kind: str, records: list[Record]) -> tuple[Record, ...]:
    """Records of one kind without those that a resume took back.

    A run killed at step 530 goes on from its checkpoint of step 500 and logs 501 to 530 again: a record that does not
    come after the one before it takes back all that reached its step. Layers rewire at the same step, and guards speak
    of several, so these may be equal.
    """
    parts = {"rewire": ("layer",), "guard": ("layer", "guard")}.get(kind)
    kept: list[Record] = []
    for record in records:
        step = record["step"]
        while kept and (
            kept[-1]["step"] > step
            or (kept[-1]["step"] == step and (parts is None or all(kept[-1].get(p) == record.get(p) for p in parts)))
        ):
            kept.pop()
        kept.append(record)
    if parts is None:
        return tuple(kept)
    # Several at one step: a resume exactly there repeats each of them; the later one is what the run kept.
    return tuple({(record["step"], *(str(record.get(p)) for p in parts)): record for record in kept}.values())


def _plan(path: Path, notes: list[str]) -> Record | None:
    plan = _mapping(path, notes, absent="the plan is not shown")
    if plan is None:
        return None
    layers = plan.get("layers")
    if not isinstance(layers, list) or not all(isinstance(layer, Mapping) for layer in layers):
        notes.append("plan.json lists no layers: the plan is not shown.")
        return None
    totals = plan.get("totals")
    return {"layers": layers, "totals": totals if isinstance(totals, Mapping) else {}}


def _mapping(path: Path, notes: list[str], absent: str) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        notes.append(f"{path.name} is missing: {absent}.")
        return None
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.name} cannot be read: {error}.")
        return None
    if not isinstance(found, dict):
        notes.append(f"{path.name} cannot be read: it holds no JSON object.")
        return None
    return found


def _settings(path: Path, notes: list[str]) -> Record:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        notes.append("Neither the run record nor run.yaml has the settings.")
        return {}
    except (OSError, yaml.YAMLError):
        notes.append("run.yaml cannot be read: the settings are not shown.")
        return {}
    return found if isinstance(found, dict) else {}


def find(tree: Any, key: str) -> Any:
    """The value of a key anywhere in nested mappings, None if absent."""
    if not isinstance(tree, Mapping):
        return None
    if key in tree:
        return tree[key]
    return next((found for branch in tree.values() if (found := find(branch, key)) is not None), None)


def _sample(path: Path, notes: list[str]) -> str:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        notes.append("sample.txt is missing: no sample text.")
        return ""
    # A network of bytes may write control characters, which no page can show.
    text = "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)
    return text if len(text) <= SAMPLE_CHARACTERS else text[:SAMPLE_CHARACTERS] + "\n…"


def _data(about: Record, settings: Record) -> tuple[str, str] | None:
    data = about.get("data")
    if isinstance(data, Mapping) and data.get("source"):
        return str(data.get("digest") or data["source"]), str(data["source"])
    named = find(settings, "data")
    return None if named is None else (str(named), str(named))


def _command(about: Record, summary: Record) -> str:
    command = about.get("command") or summary.get("command") or ""
    return shlex.join(str(part) for part in command) if isinstance(command, list) else str(command)
