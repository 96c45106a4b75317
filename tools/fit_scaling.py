"""Fit the scaling law of `rarefy plan --budget` to the records of comparisons and races on text.

    python tools/fit_scaling.py benchmarks/results/compare/wikitext-2/runs benchmarks/results/race/wikitext-2/runs

Without --write it says how well the law fits with which exponents free, and on runs that were left out: of each shape
in turn, and those of more bytes than --hold-out-from. With --write it puts the law into src/rarefy/foresight/law.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rarefy.files import atomic_write
from rarefy.foresight.fitting import Run, fit, left_out, relative_errors
from rarefy.foresight.law import Law, block_name
from rarefy.foresight.records import read_records, run_of, tuned

LAW = Path("src/rarefy/foresight/law.json")

FREE = ((), ("b",), ("g",), ("d",), ("b", "g"), ("g", "d"), ("b", "d"), ("b", "g", "d"), ("a", "b", "d"))
"""Exponents that are fitted; the others are the paper's."""

WORTH_IT = 0.9
"""One more free exponent must bring the error on runs left out below this share of it."""


def root_mean_square(errors: Sequence[float]) -> float:
    """Of relative errors; nan of none."""
    return float(np.sqrt(np.mean(np.square(errors)))) if len(errors) else float("nan")


def choose_free(scores: dict[tuple[str, ...], float]) -> tuple[str, ...]:
    """The fewest exponents that are worth it by their error on runs left out."""
    best: tuple[str, ...] = ()
    for free, score in scores.items():
        if score < scores[best] * WORTH_IT ** max(1, len(free) - len(best)):
            best = free
    return best


def errors_on_longer(runs: Sequence[Run], free: tuple[str, ...], most: float) -> list[float]:
    """Relative errors on the runs of more bytes of a law fitted to the others; none where there are too few."""
    short = [run for run in runs if run.point.tokens <= most]
    try:
        law = fit(short, free=free)
    except ValueError:
        return []
    return relative_errors(law, [run for run in runs if run.point.tokens > most and law.knows(run.point.block)])


def show(law: Law, runs: Sequence[Run]) -> None:
    """Every run beside what the law says of it."""
    print("\nfound by  width attention layers density block  parameters  bytes       nats    law     error")
    for run, error in zip(runs, relative_errors(law, runs), strict=True):
        method, width, _, attention, *_ = run.network
        point = run.point
        print(
            f"{method:9} {width:5} {attention:9} {point.layers:6} {point.density:7.3g} {block_name(point.block):5} "
            f"{point.nonzeros:10,} {point.tokens:10,}  {run.loss:.3f}  {law.loss(point):.3f}  {error:+.1%}"
        )


def judged_alike(found: Sequence[tuple[dict[str, Any], Run]]) -> list[tuple[dict[str, Any], Run]]:
    """Those of the held-out text that most were judged by: other bytes are easier or harder by more than what a fit is
    after. Says how many others there were.
    """
    held_out = [(record["data"]["digest"], record["settings"].get("eval_bytes")) for record, _ in found]
    most = Counter(held_out).most_common(1)
    kept = [one for one, text in zip(found, held_out, strict=True) if text == most[0][0]]
    if len(kept) < len(found):
        print(f"{len(found) - len(kept)} records were judged by other held-out bytes and are left out")
    return kept


def about(records: Sequence[dict[str, Any]], runs: Sequence[Run]) -> dict[str, Any]:
    """Where the law comes from."""
    clocks = [record["clock"] for record in records]
    machines = {json.dumps({k: clock["machine"][k] for k in ("cpu", "isa", "threads", "torch")}) for clock in clocks}
    return {
        "data": sorted({f"{record['data']['name']} {record['data']['digest']}" for record in records}),
        "machines": [json.loads(text) for text in sorted(machines)],
        "runs_made": sorted({clock["date"][:10] for clock in clocks}),
        "fitted": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "runs": len(runs),
    }


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, nargs="+", help="folders of records, or files")
    parser.add_argument("--from-bytes", type=float, default=0.0, help="bytes: shorter runs are left out altogether")
    parser.add_argument("--hold-out-from", type=float, default=None, help="bytes: longer runs are held out at first")
    parser.add_argument("--write", action="store_true", help=f"write {LAW}")
    asked = parser.parse_args()
    found = [(record, run) for record in read_records(asked.records) if (run := run_of(record)) is not None]
    found = [(record, run) for record, run in found if run.point.tokens >= asked.from_bytes]
    found = judged_alike(found)
    records = [record for record, _ in found]
    runs = tuned([run for _, run in found])
    print(f"{len(records)} records, {len(runs)} of a tuned rate")
    scores: dict[tuple[str, ...], float] = {}
    held: dict[str, float] = {}
    for free in FREE:
        try:
            law, errors = fit(runs, free=free), left_out(runs, free)
        except ValueError as error:
            print(f"free {free}: {error}")
            continue
        scores[free] = root_mean_square(errors)
        named = " ".join(f"{name}={law.exponents[name]:.3g}" for name in free) or "the paper's exponents"
        print(f"{named:32} spread {law.spread:.2%}, shapes left out {scores[free]:.2%}", end="")
        if asked.hold_out_from is not None:
            errors = errors_on_longer(runs, free, asked.hold_out_from)
            held["+".join(free) or "paper"] = root_mean_square(errors)
            print(f", {len(errors)} longer runs {root_mean_square(errors):.2%}", end="")
        print()
    free = choose_free(scores)
    errors = {"shapes_left_out": {"+".join(some) or "paper": round(score, 4) for some, score in scores.items()}}
    if held:
        errors["longer_runs_held_out"] = {name: round(score, 4) for name, score in held.items()}
    law = fit(runs, free=free, provenance={**about(records, runs), "relative_errors": errors})
    print(f"\ntaken: free {free}; E={law.E:.4g} A={law.A:.4g} B={law.B:.4g} {dict(law.exponents)} {dict(law.blocks)}")
    show(law, runs)
    if asked.write:
        atomic_write(LAW, (json.dumps(law.to_json(), indent=1) + "\n").encode())
        print(f"wrote {LAW}")


if __name__ == "__main__":
    main()
