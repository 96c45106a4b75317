"""A plan's layers on hardware that is not at hand: where sparse would win, and below which density."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from rarefy.cost import tokens_per_layer
from rarefy.cost.hardware import Machine
from rarefy.plan.decision import Decision
from rarefy.plan.plan import Plan
from rarefy.plan.tables import columns
from rarefy.plan.times import ASSUMED_TOKENS


@dataclass(frozen=True)
class Elsewhere:
    """The layers that a plan makes sparse, as a machine's description predicts them."""

    machine: Machine
    decisions: Sequence[Decision]

    @classmethod
    def of(cls, machine: Machine, plan: Plan, model: nn.Module, sample: Any) -> Elsewhere:
        """What the plan means there; `sample` says how many tokens each layer sees. Nothing is timed."""
        decisions = plan.decide(model)
        if any(decision.rank for decision in decisions):
            raise ValueError(
                "a machine's description says where sparse alone would win, not beside a low-rank part: "
                "use a plan without low_rank"
            )
        tokens = tokens_per_layer(model, sample, [decision.name for decision in decisions])
        return cls(machine, [replace(decision, tokens=tokens[decision.name]) for decision in decisions])

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One dict a layer and structure: name, shape, tokens, density, structure, dtype, sparse_ms, dense_dtype,
        dense_ms, speedup, break_even (density below which sparse wins; None: nowhere).

        sparse_ms and break_even are None where the structure does not divide the matrix.
        """
        found = []
        for decision in self.decisions:
            if not decision.is_sparse:
                continue
            tokens = decision.tokens or ASSUMED_TOKENS
            dense_dtype, dense_ms = self.machine.best_dense(decision.shape, tokens)
            for structure in self.machine.structures:
                sparse_ms = self.machine.sparse_ms(structure, decision.shape, tokens, decision.density)
                row = {
                    "name": decision.name,
                    "shape": list(decision.shape),
                    "tokens": tokens,
                    "density": decision.density,
                    "structure": "x".join(map(str, structure.shape)),
                    "dtype": structure.dtype,
                    "sparse_ms": sparse_ms,
                    "dense_dtype": dense_dtype,
                    "dense_ms": dense_ms,
                    "speedup": None if sparse_ms is None else dense_ms / sparse_ms,
                    "break_even": self.machine.break_even(structure, decision.shape, tokens),
                }
                found.append(row)
        return found

    def to_json(self) -> dict[str, Any]:
        """{"title", "imagined", "estimates", "about", "layers": rows}."""
        machine = self.machine
        about = {"title": machine.title, "imagined": machine.imagined, "estimates": machine.estimates}
        return {**about, "about": machine.about, "layers": self.rows}

    def __str__(self) -> str:
        machine = self.machine
        lines = [machine.title + (" (imagined: no one makes it)" if machine.imagined else ""), machine.about, ""]
        head = [
            "layer",
            "shape",
            "tokens",
            "density",
            "structure",
            "sparse us",
            "dense us",
            "speed",
            "sparse wins below",
        ]
        table = []
        alike = Counter(map(_kind, self.rows))
        for row in {_kind(row): row for row in reversed(self.rows)}.values():
            fits = row["sparse_ms"] is not None
            table.append(
                [
                    row["name"] + (f" and {alike[_kind(row)] - 1} alike" if alike[_kind(row)] > 1 else ""),
                    "x".join(map(str, row["shape"])),
                    str(row["tokens"]),
                    f"{row['density']:.3f}",
                    f"{row['structure']} {row['dtype']}",
                    f"{row['sparse_ms'] * 1e3:,.1f}" if fits else "-",
                    f"{row['dense_ms'] * 1e3:,.1f} {row['dense_dtype']}",
                    f"{row['speedup']:.2f}x" if fits else "-",
                    _limit(row["break_even"], fits),
                ]
            )
        lines.append(columns(head, table[::-1]))
        estimates = {0: "every figure is published", 1: "1 of its figures is an estimate"}.get(
            machine.estimates, f"{machine.estimates} of its figures are estimates"
        )
        lines.append(
            f"predicted from the description, not measured: the longer of arithmetic and traffic; {estimates}, "
            "and its file names the source of each"
        )
        wins = sum(1 for row in self.rows if (row["speedup"] or 0) > 1)
        lines.append(f"sparse would be faster than the best dense dtype in {wins} of {len(self.rows)} cases")
        return "\n".join(lines)


def _kind(row: dict[str, Any]) -> tuple[Any, ...]:
    """What layers that are alike share."""
    return (*row["shape"], row["tokens"], row["density"], row["structure"], row["dtype"])


def _limit(break_even: float | None, fits: bool) -> str:
    if not fits:
        return "does not divide"
    return "nowhere" if break_even is None else f"density {break_even:.3g}"
