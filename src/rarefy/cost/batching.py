"""How the convolutions' kernels share out images: side by side in vectors, in groups, over threads."""

from __future__ import annotations

from dataclasses import dataclass

from rarefy.cost.precision import Precision

PANEL_VECTORS = 4
"""Of float32 sums in a panel: pixels of a row times images side by side."""


@dataclass(frozen=True)
class Batching:
    """Of one machine, instruction set and number of threads.

    Raises:
        ValueError: threads or lanes below 1.
    """

    threads: int = 1
    lanes: int = 16
    """Images that lie side by side in float32: numbers in a vector."""
    dots: bool = False
    """Whether bfloat16 is multiplied in pairs: then twice as many lie side by side, in batches of more than `lanes`."""

    def __post_init__(self) -> None:
        for name in ("threads", "lanes"):
            given = getattr(self, name)
            if isinstance(given, bool) or not isinstance(given, int) or given < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {given!r}")
        if not isinstance(self.dots, bool):
            raise ValueError(f"dots must be true or false, got {self.dots!r}")

    def pairs(self, images: int, precision: Precision) -> bool:
        """Whether a batch of so many takes the kernels that multiply bfloat16 in pairs."""
        return self.dots and precision != "fp32" and images > self.lanes

    def too_few(self, images: int, precision: Precision) -> bool:
        """Whether a batch is too small for them, so that it takes those of float32."""
        return self.dots and precision != "fp32" and images <= self.lanes

    def side_by_side(self, images: int, precision: Precision) -> int:
        """Images in a vector of cells."""
        return self.lanes * (2 if self.pairs(images, precision) else 1)

    def panel(self, images: int, precision: Precision) -> int:
        """Pixels of a row that are computed together."""
        return PANEL_VECTORS * self.lanes // self.side_by_side(images, precision)

    def whole(self, images: int, precision: Precision) -> int:
        """Images that would take as long with every lane and every thread in use: threads take whole groups."""
        each = self.side_by_side(images, precision)
        groups = -(-images // each)
        return -(-groups // self.threads) * self.threads * each


DEFAULT = Batching()
"""One thread with AVX-512."""
