"""Who races on text, unless the user says: a ladder of dense networks with their rates, and as many sparse ones."""

from __future__ import annotations

WIDTHS = (
    (2.0, (64, 96, 144)),
    (6.0, (96, 144, 192)),
    (20.0, (144, 192, 256)),
    (float("inf"), (192, 256, 384)),
)
"""(minutes, widths of the dense ladder for budgets up to that): the best is to be among them, not at an end of them."""

DENSE_RATES = (1.5e-3, 3e-3)
"""Peak rates of each width of dense networks: what is best falls with the width."""

DEPTH = 4
"""Of all but a few: in 3,000 steps four narrow layers gain more on two and three wider ones than they cost
(docs/log.md)."""

DEEPER = 6
"""Layers of the network of the middle width, besides."""

NARROW = 0.45
"""Features of attention over the width, of the dense network of the middle width, besides: four heads of 16 features
are as good as two of 48 and take 4% less of a step (docs/log.md)."""

SPARSE_ATTENTION = 0.31
"""The same of sparse networks, which are wider: all of them."""

SPARSE = (
    (0, 2.0, 0.2, "[4,1]"),
    (1, 2.0, 0.15, "[4,1]"),
    (1, 2.0, 0.1, "[4,1]"),
    (1, 1.45, 0.48, "4"),
)
"""What each pattern method runs with: how many times as wide as which dense width, density, and block. What a network
costs beside its products goes with its width, so one of them is hardly wider and has half of its weights.
"""

METHODS = ("static", "set")


def text_field(minutes: float, heads: int) -> tuple[str, ...]:
    """Contenders of the heats for a budget of so many minutes each, as `rarefy compare` writes them."""
    even = 2 * heads  # rotary positions turn pairs of features of a head

    def multiple(features: float) -> int:
        return even * max(1, round(features / even))

    widths = [multiple(width) for width in next(found for most, found in WIDTHS if minutes <= most)]
    dense = [f"dense:width={width},layers={DEPTH},dense_lr={rate:g}" for width in widths for rate in DENSE_RATES]
    middle, rate = widths[1], f"dense_lr={DENSE_RATES[0]:g}"
    dense.append(f"dense:width={middle},layers={DEEPER},{rate}")
    dense.append(f"dense:width={middle},attention={multiple(NARROW * middle)},layers={DEPTH},{rate}")
    shapes = []
    for which, times, density, block in SPARSE:
        width = multiple(times * widths[which])
        attention = multiple(SPARSE_ATTENTION * width)
        shapes.append(f"width={width},attention={attention},layers={DEPTH},density={density:g},block={block}")
    sparse = [f"{method}:{shape}" for method in METHODS for shape in shapes]
    return tuple(dict.fromkeys([*dense, *sparse]))  # with many heads two of them may be the same
