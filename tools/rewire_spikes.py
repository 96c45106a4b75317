"""Training loss around rewires, runs side by side on the same data order.

For every step at which any layer rewired, the loss of the steps after it minus that of the step itself, averaged over
rewires; with several runs also the paired difference to the first at the first's rewires, in which the noise of the
batches cancels.
Usage: python tools/rewire_spikes.py RUN [RUN ...] [--after 10]
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path


def read(run: Path) -> tuple[dict[int, float], list[int]]:
    """Step -> training loss of the sparse network, and the steps after which something rewired."""
    losses, rewired = {}, set()
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record.get("twin") == "sparse" and record["kind"] == "train":
            losses[record["step"]] = record["loss"]
        elif record.get("twin") == "sparse" and record["kind"] == "rewire" and record["changed"]:
            rewired.add(record["step"])
    return losses, sorted(rewired)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--after", type=int, default=10, help="steps after a rewire to show")
    options = parser.parse_args()
    first, at = read(options.runs[0])
    for run in options.runs:
        losses, rewired = read(run)
        usable = [step for step in rewired if all(step + d in losses for d in range(options.after + 1))]
        print(f"{run.name}: {len(usable)} rewires, last loss {losses[max(losses)]:.3f} nats/byte")
        for d in range(1, options.after + 1):
            change = [losses[step + d] - losses[step] for step in usable]
            line = (
                f"  +{d:<3d} loss {statistics.mean(change):+.4f} +- {statistics.stdev(change) / len(change) ** 0.5:.4f}"
            )
            both = [s for s in at if all(s + d in losses and s + d in first for d in range(options.after + 1))]
            if run != options.runs[0] and len(both) > 1:
                paired = [(losses[s + d] - losses[s]) - (first[s + d] - first[s]) for s in both]
                line += f"   against {options.runs[0].name} {statistics.mean(paired):+.4f}"
                line += f" +- {statistics.stdev(paired) / len(paired) ** 0.5:.4f}"
            print(line)


if __name__ == "__main__":
    main()
