"""Which structure a layer gets where the plan leaves it open (`block="auto"`)."""

from __future__ import annotations

from collections.abc import Mapping

from rarefy.cost import CALIBRATED_BLOCKS, Convolution, CostModel, Work, precision_now

MARGIN = 0.1
"""How much slower than the fastest a less constrained structure may be and still be preferred."""

LEAST_UNITS = 4
"""Units that an output block and an input block must keep on average; with fewer there is hardly a pattern to find."""

Block = tuple[int, int]


def fastest_block(times: Mapping[Block, float]) -> Block:
    """The fastest structure, unless a smaller unit is within `MARGIN` of it: then the smallest such.

    Blocks tie weights together that training would rather choose one by one, which costs a little quality at equal
    density. So a block has to pay for itself in time; unstructured, the smallest unit, wins whatever is nearly a tie.

    Args:
        times: milliseconds of each structure; not empty.
    """
    limit = min(times.values()) * (1 + MARGIN)
    return min((block for block in times if times[block] <= limit), key=lambda block: (_entries(block), times[block]))


def possible_blocks(shape: tuple[int, int], density: float, groups: int = 1) -> list[Block]:
    """The structures that have kernels, divide the matrix, and leave at least `LEAST_UNITS` a row and column of units.

    Unstructured is always one.

    Args:
        groups: equal groups of rows, which no unit may be of two of.
    """
    shape = (shape[0] // groups, shape[1])

    def fits(block: Block) -> bool:
        rows, cols = shape[0] // block[0], shape[1] // block[1]
        divides = shape[0] % block[0] == 0 and shape[1] % block[1] == 0
        return divides and density * min(rows, cols) >= LEAST_UNITS

    return [block for block in CALIBRATED_BLOCKS if block == (1, 1) or fits(block)]


def choose_block(
    model: CostModel, shape: tuple[int, int], density: float, tokens: int, conv: Convolution | None = None
) -> Block:
    """The structure for a layer of this density, by predicted time of a training step in torch's present precision.

    Args:
        conv: a convolution; None: a linear layer.
    """
    times = {}
    for block in possible_blocks(shape, density, 1 if conv is None else conv.groups):
        nnz = round(density * shape[0] * shape[1] / _entries(block)) * _entries(block)
        ms = model.ms(Work(shape, tokens, max(nnz, _entries(block)), block, precision_now(), conv))
        if ms is not None:
            times[block] = ms
    return fastest_block(times) if times else (1, 1)


def _entries(block: Block) -> int:
    return block[0] * block[1]
