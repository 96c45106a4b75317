"""Keys and values of the positions that a model has seen, so that the next one costs one position.

Keys are kept as they are at their positions, turned or with learned vectors in them, so a cache holds for the positions
it was made at: when the text outgrows the context, every position changes, and a new cache is needed
(`rarefy.models.generate`). Shape letters as in `rarefy.models.gpt`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.ops import token_shift


class LayerCache:
    """One attention layer's keys and values, in memory for `context` positions that is taken at the first ones."""

    def __init__(self, context: int) -> None:
        self.context = context
        self.length = 0
        self._both_2BHTc: Tensor | None = None
        self._last: dict[str, Tensor] = {}

    def append(self, k_BHTc: Tensor, v_BHTc: Tensor) -> tuple[Tensor, Tensor]:
        """Add further positions; all keys and all values so far, as views.

        Raises:
            ValueError: more positions than the context.
        """
        B, H, T, c = k_BHTc.shape
        end = self.length + T
        if end > self.context:
            raise ValueError(f"{end} positions do not fit a cache for {self.context}")
        if self._both_2BHTc is None:
            self._both_2BHTc = k_BHTc.new_empty(2, B, H, self.context, c)
        torch.stack((k_BHTc, v_BHTc), out=self._both_2BHTc[:, :, :, self.length : end])
        self.length = end
        return self._both_2BHTc[0, :, :, :end], self._both_2BHTc[1, :, :, :end]

    def shifted(self, reader: str, x_BTC: Tensor) -> Tensor:
        """`rarefy.ops.token_shift` of what `reader` reads of further positions, after those read before."""
        before = self._last.get(reader)
        self._last[reader] = x_BTC[:, -1:]
        if before is None:
            return token_shift(x_BTC)
        return token_shift(torch.cat([before, x_BTC], dim=1))[:, 1:]

    def clear(self) -> None:
        """Forget all positions, and keep the memory."""
        self.length = 0
        self._last.clear()


class Cache:
    """A `LayerCache` for each of a model's layers. 2 * layers * context * C numbers a sequence."""

    def __init__(self, layers: int, context: int) -> None:
        self.layers = [LayerCache(context) for _ in range(layers)]

    @property
    def length(self) -> int:
        """Positions seen."""
        return self.layers[0].length

    def clear(self) -> None:
        """Forget them, and keep the memory."""
        for layer in self.layers:
            layer.clear()
