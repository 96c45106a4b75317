"""What a plan decided for each layer, and the table that explains it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rarefy.cost import LayerCost, layer_bytes, layer_flops
from rarefy.methods import Method, Needs


@dataclass(frozen=True)
class Decision:
    """What happens to one layer, and what it costs."""

    name: str
    shape: tuple[int, int]
    why_dense: str
    """Why it stays dense; empty: it becomes sparse."""
    block: tuple[int, int]
    units: int | None
    """K; None for a dense layer."""
    tokens: int | None
    """Rows of the layer's input in the sample, None without one."""
    cost: LayerCost | None
    """Times measured on this machine, forward and backward together, None without a sample."""

    @property
    def is_sparse(self) -> bool:
        return not self.why_dense

    @property
    def nnz(self) -> int:
        """Weights that exist."""
        if self.units is None or not self.is_sparse:
            return self.shape[0] * self.shape[1]
        return self.units * self.block[0] * self.block[1]

    @property
    def density(self) -> float:
        size = self.shape[0] * self.shape[1]
        units = self.units or 0
        return (units * self.block[0] * self.block[1] if units else self.nnz) / size if size else 0.0

    @property
    def speedup(self) -> float | None:
        """Dense time over sparse time."""
        return None if self.cost is None else self.cost.speedup

    def row(self) -> dict[str, Any]:
        """Plain data for tables, JSON and reports."""
        units = self.units if self.is_sparse else None
        dense_flops = layer_flops(self.shape[0] * self.shape[1])
        return {
            "name": self.name,
            "shape": list(self.shape),
            "kind": "sparse" if self.is_sparse else "dense",
            "reason": self.why_dense,
            "density": self.density if self.is_sparse else 1.0,
            "block": list(self.block),
            "units": units,
            "nnz": self.nnz,
            "bytes": layer_bytes(self.shape, units, self.block),
            "dense_bytes": layer_bytes(self.shape, None, (1, 1)),
            "flops": layer_flops(self.nnz),
            "dense_flops": dense_flops,
            "tokens": self.tokens,
            "sparse_ms": None if self.cost is None else self.cost.sparse_ms,
            "dense_ms": None if self.cost is None else self.cost.dense_ms,
            "speedup": self.speedup,
        }


@dataclass(frozen=True)
class Explanation:
    """The decisions of a plan on a model, as text (`str`), as data (`rows`, `totals`, `to_json`)."""

    asked_density: float
    decisions: list[Decision]
    method: Method

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One dict a layer: name, shape, kind, reason, density, block, units, nnz, bytes (indices included),
        dense_bytes, flops and dense_flops (per token, forward and both gradients), tokens, sparse_ms, dense_ms,
        speedup.
        """
        return [decision.row() for decision in self.decisions]

    @property
    def totals(self) -> dict[str, Any]:
        """Sums over all layers, and the density realised over the sparse ones.

        Times are of the layers that were timed (`timed_layers`), forward and backward: planned_ms takes each as it was
        decided, dense_ms all of them dense, speedup is their ratio; None where nothing was timed.
        """
        rows = self.rows
        sparse = [row for row in rows if row["kind"] == "sparse"]
        size = sum(row["shape"][0] * row["shape"][1] for row in sparse)
        sums = {key: sum(row[key] for row in rows) for key in ("nnz", "bytes", "dense_bytes", "flops", "dense_flops")}
        realised = sum(row["nnz"] for row in sparse) / size if size else 1.0
        timed = [row for row in rows if row["dense_ms"] is not None]
        planned_ms = sum(row["sparse_ms"] if row["kind"] == "sparse" else row["dense_ms"] for row in timed)
        dense_ms = sum(row["dense_ms"] for row in timed)
        return {
            **sums,
            "asked_density": self.asked_density,
            "density": realised,
            "sparse_layers": len(sparse),
            "layers": len(rows),
            "timed_layers": len(timed),
            "planned_ms": planned_ms if timed else None,
            "dense_ms": dense_ms if timed else None,
            "speedup": dense_ms / planned_ms if timed else None,
        }

    @property
    def growth_bytes(self) -> int:
        """Most bytes of dense gradient held at one step that rewires, with several micro-batches or ranks (rule 6.4).

        With one of each the gradient is streamed, and only a tile of it exists.
        """
        if self.method.needs is not Needs.GRADIENT:
            return 0
        sizes = sorted((4 * d.shape[0] * d.shape[1] for d in self.decisions if d.is_sparse), reverse=True)
        at_once = -(-len(sizes) // self.method.interval) if self.method.stagger else len(sizes)
        return sum(sizes[:at_once])

    def to_json(self) -> dict[str, Any]:
        """{"layers": rows, "totals": totals}."""
        return {"layers": self.rows, "totals": {**self.totals, "growth_bytes": self.growth_bytes}}

    def __str__(self) -> str:
        head = ["layer", "shape", "density", "nnz", "bytes", "of dense", "FLOPs/token", "of dense"]
        head += ["sparse ms", "dense ms", "speed"]
        rows, totals = self.rows, self.totals
        table = [head, *(_cells(row) for row in rows)]
        total = {**totals, "shape": None, "kind": "sparse", "name": "all", "sparse_ms": totals["planned_ms"]}
        table.append(_cells(total))
        widths = [max(len(line[column]) for line in table) for column in range(len(head))]
        lines = [
            "  ".join(
                cell.ljust(width) if column == 0 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in table
        ]
        lines.insert(1, "-" * len(lines[0]))
        lines.insert(-1, "-" * len(lines[0]))
        notes = [f"  {row['name']}: dense, {row['reason']}" for row in rows if row["kind"] == "dense"]
        summary = (
            f"{totals['sparse_layers']} of {totals['layers']} layers sparse, "
            f"density {totals['density']:.4f} (asked {self.asked_density:g})"
        )
        if totals["timed_layers"]:
            summary += (
                f"\nlinear layers of one step, forward and backward: {totals['planned_ms']:.1f} ms as planned, "
                f"{totals['dense_ms']:.1f} ms if dense: {totals['speedup']:.2f}x ({totals['timed_layers']} timed)"
            )
        if self.growth_bytes:
            summary += (
                f"\ngrowth by gradient: streamed; with several micro-batches or ranks up to {self.growth_bytes:,} "
                "bytes of dense gradient at a step that rewires"
            )
        return "\n".join([*lines, summary, *notes])


def _cells(row: Mapping[str, Any]) -> list[str]:
    def ms(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    return [
        row["name"],
        "" if row["shape"] is None else f"{row['shape'][0]}x{row['shape'][1]}",
        f"{row['density']:.4f}" if row["kind"] == "sparse" else "dense",
        f"{row['nnz']:,}",
        f"{row['bytes']:,}",
        f"{row['bytes'] / row['dense_bytes']:.3f}" if row["dense_bytes"] else "-",
        f"{row['flops']:,}",
        f"{row['flops'] / row['dense_flops']:.3f}" if row["dense_flops"] else "-",
        ms(row["sparse_ms"]),
        ms(row["dense_ms"]),
        "-" if row["speedup"] is None else f"{row['speedup']:.2f}x",
    ]
