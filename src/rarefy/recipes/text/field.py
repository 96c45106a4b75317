"""Who races on text, unless the user says: a ladder of dense networks with their rates, and as many sparse ones."""

from __future__ import annotations

WIDTHS = (
    (2.0, (96, 128, 192)),
    (6.0, (128, 192, 256)),
    (20.0, (192, 256, 384)),
    (float("inf"), (256, 384, 512)),
)
"""(minutes, widths of the dense ladder for budgets up to that): the best is to be among them, not at an end of them."""

DENSE_RATES = (1.5e-3, 3e-3)
"""Peak rates of each width of dense networks: what is best falls with the width."""

DEPTH = 2
"""Of all but a few: in heats of half a minute two layers beat four and six (docs/log.md)."""

DEPTHS = (3, 4)
"""Of the network of the middle width, besides."""

SPARSE = (
    f"width={{wide}},layers={DEPTH}",
    f"width={{wider}},layers={DEPTH}",
    f"width={{wide}},layers={DEPTH},density=0.2",
    "width={wide},layers=4",
)
"""What each pattern method runs with, in blocks of 4x4: with two methods as many heats as dense networks have."""

METHODS = ("static", "set")


def text_field(minutes: float) -> tuple[str, ...]:
    """Contenders of the heats for a budget of so many minutes each, as `rarefy compare` writes them."""
    widths = next(found for most, found in WIDTHS if minutes <= most)
    dense = [f"dense:width={width},layers={DEPTH},dense_lr={rate:g}" for width in widths for rate in DENSE_RATES]
    dense += [f"dense:width={widths[1]},layers={depth},dense_lr={DENSE_RATES[0]:g}" for depth in DEPTHS]
    shapes = [text.format(wide=2 * widths[0], wider=2 * widths[1]) for text in SPARSE]
    return (*dense, *(f"{method}:{shape},block=4" for method in METHODS for shape in shapes))
