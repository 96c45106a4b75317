"""A network that could be trained, as numbers: what it has, counted, without making it."""

from __future__ import annotations

from dataclasses import dataclass

from rarefy.cost import Precision, Work, dense_work, layer_bytes
from rarefy.models.gpt import VOCABULARY


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A byte-level GPT (`rarefy.models.GPT`) with an MLP of four times its width, and how it is trained.

    All linear layers of its blocks have the same density and block; head and embeddings are dense.
    """

    width: int
    layers: int
    attention: int | None = None
    """Features of all heads together; None: the width."""
    heads: int = 4
    context: int = 256
    batch: int = 8
    """Windows a step."""
    density: float = 1.0
    """Share of the blocks' weights that exist; 1: dense layers."""
    block: tuple[int, int] = (1, 1)
    """Of a sparse network's units."""
    precision: Precision = "fp32"

    @property
    def dense(self) -> bool:
        """Whether its layers are dense ones."""
        return self.density >= 1.0

    @property
    def tokens(self) -> int:
        """Bytes that a step learns from."""
        return self.batch * self.context

    @property
    def attended(self) -> int:
        """Features of all heads together."""
        return self.width if self.attention is None else self.attention

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(out, in) of the linear layers of one block."""
        C, A = self.width, self.attended
        return ((3 * A, C), (C, A), (4 * C, C), (C, 4 * C))

    def units(self, shape: tuple[int, int]) -> int:
        """Units of a sparse layer."""
        rows, cols = shape[0] // self.block[0], shape[1] // self.block[1]
        return min(max(1, round(self.density * rows * cols)), rows * cols)

    def weights(self, shape: tuple[int, int]) -> int:
        """Weights of a layer that exist."""
        return shape[0] * shape[1] if self.dense else self.units(shape) * self.block[0] * self.block[1]

    @property
    def fits(self) -> bool:
        """Whether heads share attention's features, in pairs that rotary positions turn, and units divide layers."""
        divides = self.dense or all(not (out % self.block[0] or inp % self.block[1]) for out, inp in self.linears)
        return self.attended % (2 * self.heads) == 0 and divides

    def parameters(self) -> list[tuple[int, int]]:
        """(leading indices, numbers) of every trained tensor."""
        C = self.width
        block = [(C, C)] * 4  # two norms
        for shape in self.linears:
            leading = shape[0] if self.dense else self.units(shape)
            block += [(leading, self.weights(shape)), (shape[0], shape[0])]
        outside = [(VOCABULARY, VOCABULARY * C)] * 2 + [(C, C), (C, C)]
        return outside + block * self.layers

    @property
    def nonzeros(self) -> int:
        """Numbers that exist and train, N of the law."""
        return sum(numbers for _, numbers in self.parameters())

    def works(self) -> list[Work]:
        """What the linear layers do in a step, as the cost model of layers asks for it; a block's layers repeat."""
        block = None if self.dense else self.block
        inner = [Work(s, self.tokens, self.weights(s), block, self.precision) for s in self.linears]
        return inner * self.layers + [dense_work((VOCABULARY, self.width), self.tokens, self.precision)]

    def index_bytes(self) -> int:
        """Of all sparse layers."""
        if self.dense:
            return 0
        return self.layers * sum(layer_bytes(shape, self.units(shape), self.block, 0) for shape in self.linears)
