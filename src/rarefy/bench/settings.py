"""What a bench is asked to time."""

from __future__ import annotations

from dataclasses import dataclass

from rarefy.cost import PRECISIONS, Precision
from rarefy.models.gpt import GPTConfig
from rarefy.nn.conv import check_group_blocks, check_groups
from rarefy.pattern import check_density, unit_grid
from rarefy.settings import unknown

Pair = tuple[int, int]

HEAD_FEATURES = 64
"""Features of an attention head, where they divide the width."""


CNNS = ("wrn16x2", "wrn22x2", "wrn28x10", "resnet18")
"""Networks for images of 32 x 32 pixels: wide residual ones by depth and width, and a ResNet-18 with a 3x3 stem."""


@dataclass(frozen=True)
class Conv:
    """A convolution without bias, of square images."""

    outputs: int
    inputs: int
    kernel: int
    side: int
    stride: int = 1
    groups: int = 1

    @property
    def matrix(self) -> Pair:
        """Shape of the matrix that its weight is."""
        return self.outputs, self.inputs // self.groups * self.kernel**2

    @property
    def padding(self) -> int:
        """Keeps the size, but for the stride."""
        return self.kernel // 2

    @property
    def name(self) -> str:
        """As people write it."""
        stride = "" if self.stride == 1 else f", stride {self.stride}"
        groups = "" if self.groups == 1 else f", {self.groups} groups"
        shape = f"{self.outputs}x{self.inputs}x{self.kernel}x{self.kernel}"
        return f"conv {shape} at {self.side}x{self.side}{stride}{groups}"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that a bench can be asked. Refuses what cannot be timed."""

    shapes: tuple[Pair, ...] = ()
    """(out_features, in_features) of layers with bias."""

    gpt: tuple[Pair, ...] = ()
    """(width, layers) of GPTs whose whole training steps are timed."""

    convs: tuple[Conv, ...] = ()
    """Convolutions."""

    cnns: tuple[str, ...] = ()
    """Networks for images whose whole training steps are timed, of `CNNS`."""

    images: int = 128
    """Of a step, for convolutions and networks for images."""

    densities: tuple[float, ...] = (0.1,)
    """Shares of units that exist, in (0, 1]."""

    blocks: tuple[Pair, ...] = ((1, 1),)
    """Unit shapes; each must divide every shape."""

    dtypes: tuple[Precision, ...] = ("fp32",)
    """In what the sparse side computes: of `rarefy.cost.PRECISIONS`."""

    tokens: tuple[int, ...] = (2048,)
    """Rows of input of a layer."""

    context: int = 256
    """Bytes that a GPT sees at once."""

    step_tokens: int = 2048
    """Bytes of a GPT's training step, a multiple of the context."""

    compiled: bool = False
    """Also time dense torch compiled."""

    peers: bool = True
    """Also time other libraries that are installed, on unstructured layers in fp32."""

    device: str = "cpu"
    """Where it is timed: cpu, or cuda (`rarefy.bench.gpu`)."""

    threads: int | None = None
    """For torch and all kernels; None: what torch uses now."""

    rounds: int = 25
    """The most rounds; there are at least three."""

    isa: str = "auto"
    """Kernels: "auto", or a name of `rarefy.ops.available()`."""

    seconds: float = 30.0
    """About how long it may take. At least three rounds are timed, so a slow machine takes longer."""

    def __post_init__(self) -> None:
        if not (self.shapes or self.gpt or self.convs or self.cnns):
            raise ValueError("neither shapes nor GPTs, convolutions or CNNs are given: there is nothing to time")
        if self.device != "cpu" and (self.convs or self.cnns):
            raise ValueError("convolutions are timed on the CPU only: there is no GPU kernel for them yet")
        for name in ("densities", "blocks", "dtypes", "tokens"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: there is nothing to time")
        for rows, cols in self.shapes:
            if min(rows, cols) < 1:
                raise ValueError(f"a layer needs at least one row and one column, got {rows}x{cols}")
            for block in self.blocks:
                unit_grid((rows, cols), block)
        for conv in self.convs:
            check_groups(conv.groups, conv.inputs, conv.outputs)
            for block in self.blocks:
                unit_grid(conv.matrix, block)
                check_group_blocks(conv.groups, conv.outputs, block)
            if conv.side + 2 * conv.padding < conv.kernel or min(conv.side, conv.stride) < 1:
                raise ValueError(f"{conv.name} has no output")
        for name in self.cnns:
            if name not in CNNS:
                raise ValueError(f"cnns: {unknown(name, CNNS)}")
        for width, layers in self.gpt:
            gpt_config(width, layers, self.context)
        for density in self.densities:
            check_density(density)
        for dtype in self.dtypes:
            if dtype not in PRECISIONS:
                raise ValueError(f"dtypes: {unknown(dtype, PRECISIONS)}")
        counts = [("tokens", count) for count in self.tokens]
        counts += [("context", self.context), ("rounds", self.rounds), ("images", self.images)]
        counts += [("threads", self.threads)] if self.threads is not None else []
        for name, count in counts:
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        if self.step_tokens < 1 or self.step_tokens % self.context:
            raise ValueError(
                f"the {self.step_tokens} tokens of a step must be a multiple of the context, {self.context}"
            )
        if not self.seconds > 0:
            raise ValueError(f"seconds must be positive, got {self.seconds:g}")


def gpt_config(width: int, layers: int, context: int) -> GPTConfig:
    """The GPT of that size, with heads of HEAD_FEATURES where they fit."""
    heads = width // HEAD_FEATURES if width % HEAD_FEATURES == 0 else 1
    return GPTConfig(width=width, layers=layers, heads=max(1, heads), context=context)
