"""Precision as part of the choice: a layer sparse and dense in each precision, by time and by bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rarefy.cost import PRECISIONS, LayerCost, layer_bytes
from rarefy.nn.low_rank import low_rank_weights

STATE_BYTES = 12
"""Of training a weight with Adam beside the weight itself: gradient and two moments in fp32."""

WEIGHT_BYTES = {"fp32": 4, "medium": 4, "bf16": 2, "int8": 1}
"""Of a weight as it is held to compute with; "medium" rounds on the fly."""

INT8_TRAINING = "torch does not train dense layers in int8: bytes only"


@dataclass(frozen=True)
class Option:
    """One way to hold and compute a layer."""

    storage: Literal["sparse", "dense"]
    precision: str
    """fp32, medium, bf16 or int8."""
    ms: float | None
    """A training step, forward and backward; None: not known, or not possible."""
    bytes: int
    """Weights as they are held to compute with, and indices: what inference needs."""
    training_bytes: int | None
    """With the fp32 weights that training keeps, their gradient and two moments; None: it cannot be trained."""

    @property
    def name(self) -> str:
        """Such as "dense bf16"."""
        return f"{self.storage} {self.precision}"

    def row(self) -> dict[str, Any]:
        """Plain data."""
        return {"name": self.name, **asdict(self)}


def options(
    shape: tuple[int, int],
    units: int | None,
    block: tuple[int, int],
    cost: LayerCost | None,
    *,
    rank: int = 0,
    groups: int = 1,
) -> list[Option]:
    """Sparse and dense in every precision, and dense int8.

    Args:
        units: None: the layer could not be sparse; only the dense ones.
        rank: of a low-rank part beside the units.
        groups: of a convolution.
        cost: times, if any are known.
    """
    found = []
    for precision in PRECISIONS:
        width = WEIGHT_BYTES[precision]
        copy = width if width < 4 else 0  # beside the fp32 weights, which the optimizer needs
        if units is not None:
            ms = None if cost is None else cost.ms("sparse", precision)
            values = units * block[0] * block[1] + low_rank_weights(shape, rank)
            held, whole = (layer_bytes(shape, units, block, size, rank=rank, groups=groups) for size in (width, 4))
            found.append(Option("sparse", precision, ms, held, whole + (copy + STATE_BYTES) * values))
        ms = None if cost is None else cost.ms("dense", precision)
        weights = shape[0] * shape[1]
        found.append(Option("dense", precision, ms, width * weights, (4 + copy + STATE_BYTES) * weights))
    found.append(Option("dense", "int8", None, WEIGHT_BYTES["int8"] * shape[0] * shape[1], None))
    return found


def best(found: Sequence[Option]) -> dict[str, str | None]:
    """Names of the options that are least by time, by bytes and by bytes in training; of equals the first.

    None by time where no time is known.
    """

    def least(key: str) -> str | None:
        known = [option for option in found if getattr(option, key) is not None]
        return min(known, key=lambda option: getattr(option, key)).name if known else None

    return {"time": least("ms"), "bytes": least("bytes"), "training_bytes": least("training_bytes")}


def summed(layers: Sequence[tuple[bool, Sequence[Option]]]) -> list[Option]:
    """The same for a whole network: "sparse" takes each layer as it was decided, "dense" all of them dense.

    Times are those of the layers that were timed; bytes are of all.

    Args:
        layers: of each layer, whether it becomes sparse, and its options.
    """
    totals = []
    timed = [entry for entry in layers if any(option.ms is not None for option in entry[1])]
    for storage in ("sparse", "dense"):
        for precision in (*PRECISIONS, "int8"):
            if storage == "sparse" and (precision == "int8" or not any(sparse for sparse, _ in layers)):
                continue
            chosen = [_one(found, storage if sparse else "dense", precision) for sparse, found in layers]
            times = [_one(found, storage if sparse else "dense", precision).ms for sparse, found in timed]
            known = [ms for ms in times if ms is not None]
            training = [option.training_bytes for option in chosen if option.training_bytes is not None]
            totals.append(
                Option(
                    storage,
                    precision,
                    sum(known) if known and len(known) == len(times) else None,
                    sum(option.bytes for option in chosen),
                    sum(training) if training and len(training) == len(chosen) else None,
                )
            )
    return totals


def _one(found: Sequence[Option], storage: str, precision: str) -> Option:
    return next(option for option in found if (option.storage, option.precision) == (storage, precision))
