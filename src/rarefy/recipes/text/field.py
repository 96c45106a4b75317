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
"""Of all but a few: in three minutes four narrow layers beat two and three wider ones (docs/log.md)."""

DEPTHS = (2, 6)
"""Of the network of the middle width, besides."""

SPARSE = (
    ("narrow", DEPTH, 0.2),
    ("middle", DEPTH, 0.15),
    ("middle", DEPTH, 0.1),
    ("middle", 2, 0.2),
)
"""What each pattern method runs with: a network twice as wide as one of the dense ladder, layers, and density.
Attention has half of its features, which costs less than it saves; units of 4x1 lose less than blocks of 4x4 do."""

METHODS = ("static", "set")


def text_field(minutes: float) -> tuple[str, ...]:
    """Contenders of the heats for a budget of so many minutes each, as `rarefy compare` writes them."""
    widths = next(found for most, found in WIDTHS if minutes <= most)
    narrow, middle, _ = widths
    dense = [f"dense:width={width},layers={DEPTH},dense_lr={rate:g}" for width in widths for rate in DENSE_RATES]
    dense += [f"dense:width={middle},layers={depth},dense_lr={DENSE_RATES[0]:g}" for depth in DEPTHS]
    shapes = [
        f"width={2 * half},attention={half},layers={layers},density={density:g},block=[4,1]"
        for half, layers, density in ((narrow if which == "narrow" else middle, *rest) for which, *rest in SPARSE)
    ]
    return (*dense, *(f"{method}:{shape}" for method in METHODS for shape in shapes))
