"""The decisions of a plan on a model, as a table that explains them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rarefy.growth import Exact
from rarefy.methods import Method, Needs
from rarefy.plan.decision import Decision
from rarefy.plan.precisions import best, summed
from rarefy.plan.tables import layers_table, precisions_table, verdict
from rarefy.selection import num_to_replace


@dataclass(frozen=True)
class Explanation:
    """The decisions of a plan on a model, as text (`str`), as data (`rows`, `totals`, `to_json`)."""

    asked_density: float
    decisions: list[Decision]
    method: Method
    assumed_tokens: int | None = None
    """Rows of input that times are for where no sample said how many; None: it did, or there are no times."""
    asked_last: float | None = None
    """Density at the end, where it moves; None: it stays. Bytes and FLOPs are those of the start, times of the end."""
    balance: Mapping[str, int] = field(default_factory=dict)
    """Layer name -> groups of rows, each of which keeps its number of units."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One dict a layer: name, shape, kind, reason, density, last_density, block, units, nnz, bytes (with
        indices), dense_bytes, flops and dense_flops (per token, forward and both gradients), tokens, sparse_ms,
        dense_ms, speedup, times ("measured" or "predicted"), precision (of those times), options (the layer sparse and
        dense in each precision: ms, bytes, training_bytes) and best (names of the options that are least by each).
        """
        return [decision.row() for decision in self.decisions]

    @property
    def totals(self) -> dict[str, Any]:
        """Sums over all layers, and the density realised over the sparse ones.

        Times are of the layers that were timed (`timed_layers`), forward and backward: planned_ms takes each as it was
        decided, dense_ms all of them dense, speedup is their ratio; None where nothing was timed. `options` and `best`
        are a row's, for the whole network.
        """
        rows = self.rows
        sparse = [row for row in rows if row["kind"] == "sparse"]
        size = sum(row["shape"][0] * row["shape"][1] for row in sparse)
        sums = {key: sum(row[key] for row in rows) for key in ("nnz", "bytes", "dense_bytes", "flops", "dense_flops")}
        realised = sum(row["nnz"] for row in sparse) / size if size else 1.0
        timed = [row for row in rows if row["dense_ms"] is not None]
        planned_ms = sum(row["sparse_ms"] if row["kind"] == "sparse" else row["dense_ms"] for row in timed)
        dense_ms = sum(row["dense_ms"] for row in timed)
        found = summed([(decision.is_sparse, decision.options) for decision in self.decisions])
        return {
            **sums,
            "asked_density": self.asked_density,
            "density": realised,
            "last_density": sum(row["last_density"] * row["shape"][0] * row["shape"][1] for row in sparse) / size
            if size
            else 1.0,
            "sparse_layers": len(sparse),
            "layers": len(rows),
            "timed_layers": len(timed),
            "planned_ms": planned_ms if timed else None,
            "dense_ms": dense_ms if timed else None,
            "speedup": dense_ms / planned_ms if timed else None,
            "assumed_tokens": self.assumed_tokens,
            "options": [option.row() for option in found],
            "best": best(found),
        }

    @property
    def growth_bytes(self) -> int:
        """Most bytes that growth by gradient holds at one step, in fp32: what the method's signal keeps of the layers
        that rewire at it, or soon (rule 6.4).

        For the exact signal that is the dense gradient, with several micro-batches or ranks; with one of each it is
        streamed, and only a tile of it exists.
        """
        method = self.method
        if method.needs is not Needs.GRADIENT:
            return 0
        sizes = []
        for d in self.decisions:
            if d.is_sparse and d.units is not None:
                entries = d.block[0] * d.block[1]
                k = num_to_replace(method.fraction(0.0), d.units, d.shape[0] * d.shape[1] // entries)
                group = (d.shape[0] // d.groups, d.shape[1])
                sizes.append(d.groups * method.signal.held_bytes(group, -(-k // d.groups), entries))
        at_once = -(-len(sizes) * method.signal.lead // method.interval) if method.stagger else len(sizes)
        return sum(sorted(sizes, reverse=True)[:at_once])

    def to_json(self) -> dict[str, Any]:
        """{"layers": rows, "totals": totals}."""
        return {"layers": self.rows, "totals": {**self.totals, "growth_bytes": self.growth_bytes}}

    def __str__(self) -> str:
        rows, totals = self.rows, self.totals
        notes = [f"  {row['name']}: dense, {row['reason']}" for row in rows if row["kind"] == "dense"]
        parts = [layers_table(rows, totals), self._summary(totals), *notes]
        if totals["timed_layers"]:
            parts += ["", precisions_table(rows, totals), verdict(totals)]
        return "\n".join(parts)

    def _summary(self, totals: Mapping[str, Any]) -> str:
        lines = [
            f"{totals['sparse_layers']} of {totals['layers']} layers sparse, "
            f"density {totals['density']:.4f} (asked {self.asked_density:g})"
        ]
        if self.asked_last is not None:
            lines.append(
                f"density moves to {totals['last_density']:.4f} (asked {self.asked_last:g}) at the end of its "
                "schedule: bytes and FLOPs here are those of the start, times those of the end"
            )
        moved = [
            f"{row['name']} {row['density']:.4g} (asked {row['asked_density']:.4g})"
            for row in self.rows
            if row["asked_density"] and abs(row["density"] / row["asked_density"] - 1) > 0.005
        ]
        if moved:  # above all where rows have equal fan-in (rule 2.2)
            more = f" and {len(moved) - 5} more" if len(moved) > 5 else ""
            lines.append(f"densities rounded to whole units: {', '.join(moved[:5])}{more}")
        whole = [row["name"] for row in self.rows if row["kind"] == "sparse" and row["computes"] == "dense"]
        if whole:
            lines.append(f"multiplied as dense layers are, above dense_above, at first: {', '.join(whole)}")
        if totals["timed_layers"]:
            sources = {row["times"] for row in self.rows if row["times"]}
            how = "timed" if sources == {"measured"} else "predicted"
            lines.append(
                f"layers of one step, forward and backward: {totals['planned_ms']:.1f} ms as planned, "
                f"{totals['dense_ms']:.1f} ms if dense: {totals['speedup']:.2f}x ({totals['timed_layers']} {how})"
            )
        if self.assumed_tokens is not None:
            lines.append(f"times are for {self.assumed_tokens} tokens a step, assumed, as no sample says how many")
        lines.append(self._rewiring())
        if self.balance:
            lines.append(
                "units kept equal between groups of rows: "
                + ", ".join(f"{name} ({groups})" for name, groups in self.balance.items())
            )
        if self.growth_bytes:
            exact = isinstance(self.method.signal, Exact)
            how = "streamed; with several micro-batches or ranks" if exact else type(self.method.signal).__name__ + ","
            lines.append(f"growth by gradient: {how} up to {self.growth_bytes:,} bytes held at a step that rewires")
        return "\n".join(lines)

    def _rewiring(self) -> str:
        """When the pattern changes, and from when on it is frozen."""
        method = self.method
        if not method.rewires:
            return f"{type(method).__name__.lower()}: the pattern is frozen from the first step"
        last = "75% of the run" if method.end is None else f"step {method.end:,}"
        order = ", the layers in turn" if method.stagger else ", all layers at once"
        return (
            f"{type(method).__name__.lower()}: each layer rewires every {method.interval} steps{order}, from step "
            f"{method.begin:,} to {last}; the pattern is frozen from then on"
        )
