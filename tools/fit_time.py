"""Fit loss against time, dense and sparse, to the records of races of several budgets, and say what it predicts.

    python tools/fit_time.py benchmarks/results/race/wikitext-2/runs --layers 4

For each budget of `rarefy race` the network of either side that ended best counts, as the mean of its seeds:
L(t) = E + A (t / 10 min)^-b, with one floor E for both sides, which learn the same text, and A and b for each. What is
uncertain comes from fits to points moved at random, by the spread of seeds.

Another machine learns the same text: with --floor E SPREAD, of a fit that had more budgets, two are enough.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, variance
from typing import Any

import numpy as np

from rarefy.foresight.records import NETWORK, read_records

UNIT_S = 600.0
"""t of L = E + A."""
NEAR = 1.25
"""A run belongs to a budget if its time is at most so many times longer or shorter."""
FLOORS = 400
"""Values of E that are tried, from 0 to below the best run."""
DRAWS = 200
"""Refits."""
DAY_S = 86_400.0
SIDES = ("dense", "sparse")


@dataclass(frozen=True)
class Point:
    """The best network of one side in one budget."""

    side: str
    seconds: float
    bits: float
    """Mean over seeds of bits per byte at the end."""
    seeds: int = 1
    label: str = ""


@dataclass(frozen=True)
class Curves:
    """L(t) = floor + A (t / UNIT_S)^-b of both sides."""

    floor: float
    sides: Mapping[str, tuple[float, float]]
    """Side -> (A, b)."""

    def bits(self, side: str, seconds: float) -> float:
        """Bits per byte after so long a run."""
        A, b = self.sides[side]
        return self.floor + A * (seconds / UNIT_S) ** -b

    def share(self, seconds: float) -> float:
        """The time in which sparse is as good as dense after `seconds`, over these."""
        A, b = self.sides["sparse"]
        return ((self.bits("dense", seconds) - self.floor) / A) ** (-1 / b) * UNIT_S / seconds


def of_budget(records: Sequence[Mapping[str, Any]], minutes: float) -> dict[str, list[Mapping[str, Any]]]:
    """Label -> runs of about so long."""
    networks: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        if 1 / NEAR <= record["clock"]["train_s"] / (60 * minutes) <= NEAR:
            networks.setdefault(record["label"], []).append(record)
    return networks


def best_points(records: Sequence[Mapping[str, Any]], budgets_min: Sequence[float]) -> list[Point]:
    """Of each side and budget the network of the least mean loss over its seeds."""
    found = []
    for minutes in budgets_min:
        networks = of_budget(records, minutes)
        for side in SIDES:
            mine = {label: runs for label, runs in networks.items() if runs[0]["dense"] == (side == "dense")}
            if mine:
                label, runs = min(mine.items(), key=lambda item: fmean(run["final"] for run in item[1]))
                seconds = fmean(run["clock"]["train_s"] for run in runs)
                found.append(Point(side, seconds, fmean(run["final"] for run in runs), len(runs), label))
    return found


def spread_over_seeds(records: Sequence[Mapping[str, Any]], budgets_min: Sequence[float]) -> float:
    """Standard deviation of a run's end around its network's mean; nan where no network has two seeds."""
    networks = [runs for minutes in budgets_min for runs in of_budget(records, minutes).values() if len(runs) > 1]
    squares = sum((len(runs) - 1) * variance(run["final"] for run in runs) for runs in networks)
    return math.sqrt(squares / sum(len(runs) - 1 for runs in networks)) if networks else math.nan


def fit(points: Sequence[Point], floor: float | None = None) -> Curves:
    """The curves of least squares; for every floor a straight line in logarithms a side.

    Args:
        floor: E, where it is known.
    Raises:
        ValueError: a side has fewer than two budgets, both together fewer than five points and no floor is given, or
            it is not below all of them.
    """
    for side in SIDES:
        if sum(point.side == side for point in points) < 2:
            raise ValueError(f"a curve needs runs of two budgets, and {side} has fewer")
    lowest = min(point.bits for point in points)
    if floor is None and len(points) < 5:
        raise ValueError(f"five constants need five points, got {len(points)}")
    if floor is not None and floor >= lowest:
        raise ValueError(f"a floor of {floor:.3f} is not below the best run, {lowest:.3f}")
    floors = np.linspace(0, lowest, FLOORS, endpoint=False) if floor is None else np.array([floor])
    lines = {side: _lines([point for point in points if point.side == side], floors) for side in SIDES}
    best = int(np.argmin(sum(error for _, _, error in lines.values())))
    return Curves(float(floors[best]), {side: (float(A[best]), float(b[best])) for side, (A, b, _) in lines.items()})


def resampled(
    points: Sequence[Point],
    spread: float,
    draws: int,
    seed: int = 0,
    floor: tuple[float, float] | None = None,
) -> list[Curves]:
    """Fits to points that are moved by the spread of a run, less for means of several seeds.

    Args:
        floor: E and its own spread, where it is known; drawn anew for each, and kept below the points.
    """
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        moves = generator.normal(0, spread, len(points))
        moved = [
            Point(point.side, point.seconds, point.bits + move / math.sqrt(point.seeds), point.seeds)
            for point, move in zip(points, moves, strict=True)
        ]
        drawn = None
        if floor is not None:
            drawn = min(float(generator.normal(*floor)), 0.999 * min(point.bits for point in moved))
        found.append(fit(moved, drawn))
    return found


def _lines(points: Sequence[Point], floors: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of one side, for each floor: A, b, and the sum of squared errors in bits."""
    bits, seeds = np.array([p.bits for p in points]), np.array([p.seeds for p in points], dtype=float)
    weights, x = seeds / seeds.sum(), np.log([p.seconds / UNIT_S for p in points])
    y = np.log(bits - floors[:, None])
    x_off = x - weights @ x
    middle = y @ weights
    slope = (y @ (weights * x_off)) / (weights @ x_off**2)
    found = np.exp(middle[:, None] + slope[:, None] * x_off) + floors[:, None]
    return np.exp(middle - slope * (weights @ x)), -slope, ((found - bits) ** 2 @ seeds)


def _counts(record: Mapping[str, Any]) -> bool:
    """Whether a run ended, and is of a network as races make them now: those before learned at another speed."""
    network = {name: record["settings"].get(name) for name in NETWORK}
    return record["task"] == "text" and record["state"] == "finished" and network == NETWORK


def _interval(values: Sequence[float]) -> str:
    low, high = np.nanpercentile(values, [10, 90])
    return f"{low:.3f} to {high:.3f}"


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, nargs="+", help="folders of records, or files")
    parser.add_argument("--budgets", type=float, nargs="+", default=[3, 10, 30, 90], help="minutes")
    parser.add_argument("--layers", type=int, default=None, help="only networks of so many")
    parser.add_argument("--hold-out", type=float, default=None, help="minutes: this budget is predicted, not fitted")
    parser.add_argument("--spread", type=float, default=None, help="bits per byte of a run; by default of the seeds")
    parser.add_argument("--floor", type=float, nargs=2, metavar=("E", "SPREAD"), help="of another fit to the same text")
    parser.add_argument("--cores", type=int, nargs=2, default=[2, 64], help="of these runs, and of a day's")
    parser.add_argument("--scaling", type=float, nargs="+", default=[1.0, 0.5], help="shares of the cores' speed")
    asked = parser.parse_args()
    records = [record for record in read_records(asked.records) if _counts(record)]
    if asked.layers is not None:
        records = [record for record in records if record["settings"]["layers"] == asked.layers]
    spread = asked.spread if asked.spread is not None else spread_over_seeds(records, asked.budgets)
    if math.isnan(spread):
        parser.error("no network has two seeds: say --spread")
    kept = [minutes for minutes in asked.budgets if minutes != asked.hold_out]
    points = best_points(records, kept)
    for point in points:
        print(f"{point.side:6} {point.seconds:7.0f} s {point.bits:.4f} ({point.seeds} seeds) {point.label}")
    try:
        curves = fit(points, None if asked.floor is None else asked.floor[0])
    except ValueError as error:
        parser.error(f"{error}: run `rarefy race` with another budget, or leave more of --budgets in")
    others = resampled(points, spread, DRAWS, floor=None if asked.floor is None else tuple(asked.floor))
    apart = float(np.std([one.floor for one in others]))
    print(f"\nspread of a run {spread:.4f}; L = {curves.floor:.3f} (spread {apart:.3f}) + A (t / 10 min)^-b")
    for side, (A, b) in curves.sides.items():
        print(f"{side:6} A = {A:.3f}, b = {b:.3f}")
    print("\n80% of the refits within the range given")
    held = [] if asked.hold_out is None else best_points(records, [asked.hold_out])
    for point in held:
        found = [one.bits(point.side, point.seconds) for one in others]
        print(
            f"held out: {point.side} {point.bits:.4f}, predicted {curves.bits(point.side, point.seconds):.4f}", end=""
        )
        print(f" ({_interval(found)})")
    few, many = asked.cores
    for what, seconds in [
        (f"a day on {few} cores", DAY_S),
        *[(f"a day on {many} cores at {share:g} of {many // few} times the speed", DAY_S * many / few * share)
          for share in asked.scaling],
    ]:  # fmt: skip
        ends = "; ".join(
            f"{side} {curves.bits(side, seconds):.3f} ({_interval([one.bits(side, seconds) for one in others])})"
            for side in SIDES
        )
        print(f"{what}: {ends}; sparse in {curves.share(seconds):.2f} of the time", end=" ")
        print(f"({_interval([one.share(seconds) for one in others])})")


if __name__ == "__main__":
    main()
