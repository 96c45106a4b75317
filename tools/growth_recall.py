"""How well cheaper growth signals find what the dense gradient would grow, and what they cost.

A small GPT trains on real text with RigL. Just before some of its rewires, on the weights and the batch that the rewire
would see, every signal chooses k absent units of every sparse layer. Its choice is held against the k best by
- "batch": the exact gradient of the same batch, which is what exact growth goes by;
- "truth": the exact gradient of many other batches together, which is what any of them would like to know.
Recall is the share of the best k that was chosen; mass is the sum of |gradient| over the chosen k, as a share of the
most that k units can have. Cost is the time of seeing one batch and choosing, over the time of a dense weight gradient
of the same layer, in turn, median over rounds; for signals that look at several steps, the sum over them.
Usage: python tools/growth_recall.py --data TEXT [--points 50 200 400] [--batches 16] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.files import atomic_write
from rarefy.growth import Collector, Exact, Momentum, NormProduct, Request, SampledTokens, Signal
from rarefy.methods import RigL
from rarefy.nn import SparseLayer, SparseLinear
from rarefy.ops import Index, sink
from rarefy.plan import Plan
from rarefy.recipes.text.networks import make_sparse, text_loss
from rarefy.recipes.text.settings import TextSettings
from rarefy.rewiring import ranks
from rarefy.selection import highest
from rarefy.training.batches import Batches
from rarefy.training.data import load_corpus
from rarefy.training.machine import machine

SIGNALS: dict[str, Signal] = {
    "exact": Exact(),
    "tokens 256": SampledTokens(tokens=256),
    "tokens 256 by norm": SampledTokens(tokens=256, by="norm"),
    "tokens 128 by norm": SampledTokens(tokens=128, by="norm"),
    "norms": NormProduct(),
    "momentum": Momentum(),
    "momentum of norms": Momentum(source=NormProduct()),
    "2 steps, 4k of norms": Momentum(source=NormProduct(), steps=2, pool=4),
    "4 steps, 4k of norms": Momentum(source=NormProduct(), steps=4, pool=4),
}
FRACTIONS = (0.3, 0.1)
"""k as a share of the units that exist."""
INTERVAL = 100
"""Steps between two rewires of a layer, for the share of training time: RigL's default."""

Seen = dict[str, tuple[Index, Tensor, Tensor]]
"""Layer -> what its backward pass had."""


class Keep:
    """A collector that keeps what it is given."""

    def add(self, index: Index, dy: Tensor, x: Tensor) -> None:
        """See `rarefy.ops.sink.Collector`."""
        self.given = index, dy.clone(), x.clone()


def look(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Seen:
    """One batch through a copy of the model, which trains on."""
    model = copy.deepcopy(model)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SparseLinear)}
    kept = {name: Keep() for name in layers}
    for name, layer in layers.items():
        sink.arm(layer.sink, kept[name])
    text_loss(model, *batch).backward()
    return {name: keep.given for name, keep in kept.items()}


def absent_scores(gradient: Tensor, index: Index) -> tuple[Tensor, Tensor]:
    """Absent units and |g| of each."""
    everywhere = gradient.abs().flatten()
    rows = torch.repeat_interleave(torch.arange(index.out_features), torch.diff(index.crow.long()))
    absent = torch.ones_like(everywhere, dtype=torch.bool)
    absent[rows * index.in_features + index.cols.long()] = False
    units = absent.nonzero().flatten()
    return units, everywhere[units]


def judge(chosen: Tensor, units: Tensor, scores: Tensor) -> tuple[float, float]:
    """Recall and mass of `chosen`, against the best as many by `scores`."""
    most, best = scores.topk(chosen.numel())
    taken = torch.zeros(int(units[-1]) + 1, dtype=torch.bool)
    taken[chosen] = True
    taken = taken[units]
    return float(taken[best].float().mean()), float(scores[taken].sum() / most.sum())


def request(name: str, layer: SparseLayer, step: int, k: int) -> Request:
    """As the engine asks, in a run of one micro-batch on one rank."""
    return Request(
        name=name, step=step, seed=0, values=layer.values, k=k, returns=False, calls=1, ranks=ranks, grow_score=None
    )


class Study:
    """The run, and what was found at its points."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.batches, self.rounds = arguments.batches, arguments.rounds
        self.signals = {label: SIGNALS[label] for label in arguments.signals}
        self.points = sorted(arguments.points)
        steps = self.points[-1]
        plan = Plan(
            density=arguments.density,
            keep_dense=("head",),
            method=RigL(interval=50, end=steps, stagger=False, signal=Exact()),
        )
        settings = TextSettings(data=arguments.data, plan=plan, width=arguments.width, layers=arguments.layers)
        settings = settings.settled(steps)
        corpus = load_corpus(settings.data, context=settings.context)
        self.data = Batches(text=corpus.train, seed=0, context=settings.context, batch=settings.batch)
        self.others = Batches(text=corpus.train, seed=12345, context=settings.context, batch=settings.batch)
        self.twin = make_sparse(settings, settings.plan)
        self.settings = settings
        assert self.twin.rewirer is not None
        self.layers = self.twin.rewirer.layers
        self.step_s: list[float] = []
        self.found: list[dict[str, Any]] = []

    def run(self) -> None:
        """Train, and look at the points."""
        lead = max(signal.lead for signal in self.signals.values())
        for point in self.points:
            self.train(point - lead)
            watched = {
                (label, fraction, name): signal.collector(request(name, layer, point, self.k(layer, fraction)))
                for label, signal in self.signals.items()
                for fraction in FRACTIONS
                for name, layer in self.layers.items()
                if signal.lead > 1
            }
            while self.twin.step < point - 1:
                seen = look(self.twin.model, self.data.at(self.twin.step + 1))
                for (label, _, name), collector in watched.items():
                    if self.twin.step + 1 > point - self.signals[label].lead:
                        collector.add(*seen[name])
                        collector.step_applied(seen[name][0])
                self.train(self.twin.step + 1)
            self.study(point, watched)
            print(f"until step {point}:")
            self.report({})

    def train(self, until: int) -> None:
        """Steps of the run as it is."""
        assert self.settings.warmup is not None
        while self.twin.step < until:
            started = time.perf_counter()
            self.twin.train_step(self.data, rate=min(1.0, (self.twin.step + 1) / self.settings.warmup), clip=1.0)
            self.step_s.append(time.perf_counter() - started)

    @staticmethod
    def k(layer: SparseLayer, fraction: float) -> int:
        """Units wanted."""
        return round(fraction * layer.num_units)

    def truth(self, first: int) -> dict[str, Tensor]:
        """The dense gradient of each layer over other batches, summed."""
        total: dict[str, Tensor] = {}
        for at in range(first, first + self.batches):
            for name, (_, dy, x) in look(self.twin.model, self.others.at(at)).items():
                total[name] = total[name] + dy.T @ x if name in total else dy.T @ x
        return total

    def study(self, point: int, watched: dict[tuple[str, float, str], Collector]) -> None:
        """Every signal on the batch of the step to come."""
        seen = look(self.twin.model, self.data.at(point))
        truth, again = self.truth(1000 * point), self.truth(1000 * point + self.batches)
        for name, layer in self.layers.items():
            index, dy, x = seen[name]
            by = {"batch": absent_scores(dy.T @ x, index), "truth": absent_scores(truth[name], index)}
            for fraction in FRACTIONS:
                k, row = self.k(layer, fraction), {"step": point, "layer": name, "fraction": fraction}
                choices = {"random": random_choice(by["truth"][0], k)}
                choices["as many other batches"] = highest(absent_scores(again[name], index)[1], by["truth"][0], k)
                for label, signal in self.signals.items():
                    collector = watched.get((label, fraction, name))
                    collector = collector or signal.collector(request(name, layer, point, k))
                    collector.add(index, dy, x)
                    found = collector.found(index, None)
                    choices[label] = highest(found.scores, found.units, k)
                for label, chosen in choices.items():
                    for against, (units, scores) in by.items():
                        recall, mass = judge(chosen, units, scores)
                        self.found.append({**row, "signal": label, "against": against, "recall": recall, "mass": mass})

    def costs(self) -> dict[str, dict[str, float]]:
        """Signal -> time over that of the dense weight gradients of all layers, and share of the training time."""
        seen = look(self.twin.model, self.data.at(1))
        spent: dict[str, list[float]] = defaultdict(list)
        for round_ in range(self.rounds + 1):
            total: dict[str, float] = defaultdict(float)
            contenders = ["dense", *self.signals]
            for label in contenders if round_ % 2 else contenders[::-1]:
                for name, layer in self.layers.items():
                    index, dy, x = seen[name]
                    if label == "dense":
                        total[label] += timed(lambda dy=dy, x=x: dy.T @ x)
                    else:
                        total[label] += self.one(self.signals[label], name, layer, index, dy, x)
            if round_:
                for label, seconds in total.items():
                    spent[label].append(seconds)
        step_s = statistics.median(self.step_s)
        return {
            label: {
                "over_dense_gradient": statistics.median(a / b for a, b in zip(times, spent["dense"], strict=True)),
                "ms": statistics.median(times) * 1e3,
                "share_of_training": statistics.median(times) / (INTERVAL * step_s),
            }
            for label, times in spent.items()
        }

    def one(self, signal: Signal, name: str, layer: SparseLayer, index: Index, dy: Tensor, x: Tensor) -> float:
        """Seconds that a rewire of one layer spends on its signal."""
        collector = signal.collector(request(name, layer, 1, self.k(layer, FRACTIONS[0])))
        seconds = 0.0
        for _ in range(signal.lead - 1):
            seconds += timed(lambda: (collector.add(index, dy, x), collector.step_applied(index)))
        return seconds + timed(lambda: (collector.add(index, dy, x), collector.found(index, None)))

    def summary(self) -> dict[str, Any]:
        """Means over layers and points."""
        sums: dict[tuple[str, float, str], list[tuple[float, float]]] = defaultdict(list)
        for row in self.found:
            sums[row["signal"], row["fraction"], row["against"]].append((row["recall"], row["mass"]))
        table: dict[str, dict[str, float]] = defaultdict(dict)
        for (label, fraction, against), pairs in sums.items():
            for what, values in zip(("recall", "mass"), zip(*pairs, strict=True), strict=True):
                table[label][f"{what} of {against} at {fraction:g}"] = statistics.fmean(values)
        return dict(table)

    def report(self, costs: dict[str, dict[str, float]]) -> None:
        """The table for people: each cell k = 30% / 10% of the units."""
        heads = f"{'recall of batch':>18}{'recall of truth':>18}{'mass of truth':>16}{'cost':>8}{'of training':>13}"
        print(f"{'signal':26}{heads}")
        for label, row in self.summary().items():
            cells = [
                "/".join(f"{100 * row[f'{what} at {f:g}']:.1f}" for f in FRACTIONS)
                for what in ("recall of batch", "recall of truth", "mass of truth")
            ]
            cost = costs.get(label)
            last = f"{cost['over_dense_gradient']:8.2f}{cost['share_of_training']:13.2%}" if cost else ""
            print(f"{label:26}{cells[0]:>18}{cells[1]:>18}{cells[2]:>16}{last}")
        print(f"a step: {1e3 * statistics.median(self.step_s):.0f} ms", flush=True)


def random_choice(units: Tensor, k: int) -> Tensor:
    """What chance finds."""
    return units[torch.randperm(units.numel(), generator=torch.Generator().manual_seed(0))[:k]].sort().values


def timed(work: Callable[[], Any]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    """The study that the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", help="text, as for rarefy train text")
    parser.add_argument("--points", type=int, nargs="+", default=[50, 200, 400], help="steps, multiples of 50")
    parser.add_argument("--batches", type=int, default=16, help="batches of the true gradient")
    parser.add_argument("--rounds", type=int, default=5, help="of timing")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--signals", nargs="+", choices=list(SIGNALS), default=list(SIGNALS))
    parser.add_argument("--json", type=Path, help="where the figures go")
    arguments = parser.parse_args()
    study = Study(arguments)
    study.run()
    costs = study.costs()
    study.report(costs)
    if arguments.json:
        record = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "settings": {key: value for key, value in vars(arguments).items() if key not in ("json", "data")},
            "step_ms": 1e3 * statistics.median(study.step_s),
            "fractions": FRACTIONS,
            "interval": INTERVAL,
            "costs": costs,
            "table": study.summary(),
            "by_layer": study.found,
        }
        atomic_write(arguments.json, (json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
