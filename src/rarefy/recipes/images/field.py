"""Who races on images, unless the user says: a ladder of dense networks with their rates, and as many sparse ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rarefy.recipes.images.settings import ImageSettings

METHODS = ("static", "set")
"""What sparse networks find their pattern by: with four networks each as many heats as the ladder's eight. RigL's dense
gradients of small convolutions take longer than all else in a step."""

SGD_RATE = 0.1
"""Peak rate of SGD, for which the ladders' rates, of AdamW, are far too low."""


@dataclass(frozen=True, kw_only=True)
class Rung:
    """Dense networks for a budget: the best is to be among them, not at an end of them."""

    up_to: float
    """Minutes."""
    widths: tuple[float, float, float]
    depth: int
    """Of all but two."""
    more: tuple[str, str]
    """Two other shapes, as settings."""


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """A kind of network, as it is raced."""

    shape: Callable[[float, int], str]
    """Width and depth as settings."""
    rungs: tuple[Rung, ...]
    """By budget."""
    rates: tuple[float, float]
    """Peak rates of each dense network: what is best falls with the width and with the steps."""
    sparse_rate: float
    """Peak rate of a sparse network; its sparse values have twice that at 10%, as `--sparse-lr` says."""
    sparse: tuple[tuple[str, float, str], ...]
    """(shape, density, block): "wide" or "wider", twice as wide as the narrowest or as the middle dense one, or the
    settings of another shape. Units of 4x1 take less time than single ones, which may lie anywhere and so learn more a
    step: the race is to say what that is worth."""


def _hidden(width: float, depth: int) -> str:
    return f"hidden=[{','.join([str(round(width))] * depth)}]"


def _wide(width: float, depth: int) -> str:
    return f"width={width:g},depth={depth}"


def _stages(width: float, depth: int) -> str:
    return f"width={width:g},blocks=[{','.join([str(depth)] * 4)}]"


FOREVER = float("inf")

LATE_DENSE, LATE_SPARSE = "width=[1,1,2],depth=10", "width=[1,2,4],depth=10,keep_dense=[head,groups.0]"
"""Wide where the pixels are few: what a wide layer costs besides its products goes with them (docs/log.md)."""

LADDERS = {
    # An mlp reads Fashion-MNIST a dozen times in three minutes: width is soon of no more use.
    "mlp": Ladder(
        shape=_hidden,
        rungs=(
            Rung(up_to=2, widths=(128, 256, 512), depth=3, more=(_hidden(256, 2), _hidden(256, 4))),
            Rung(up_to=10, widths=(256, 512, 1024), depth=3, more=(_hidden(512, 2), _hidden(512, 4))),
            Rung(up_to=FOREVER, widths=(512, 1024, 2048), depth=3, more=(_hidden(1024, 2), _hidden(1024, 4))),
        ),
        rates=(1e-3, 3e-3),
        sparse_rate=2e-3,
        sparse=(("wide", 0.1, "[4,1]"), ("wide", 0.1, "1"), ("wider", 0.1, "[4,1]"), ("wider", 0.05, "1")),
    ),
    # A wrn of 22 layers sees CIFAR-10 once in three minutes on two cores, one of 10 some four times. In 400 steps
    # dense ones want 1e-2, in 1,200 rather 2e-2; sparse ones 2e-2, in 1,600 rather 2.5e-2 (docs/log.md).
    "wrn": Ladder(
        shape=_wide,
        rungs=(
            Rung(up_to=6, widths=(0.5, 1, 2), depth=10, more=(_wide(1, 16), LATE_DENSE)),
            Rung(up_to=30, widths=(1, 1.5, 2), depth=16, more=(_wide(1.5, 10), LATE_DENSE)),
            Rung(up_to=FOREVER, widths=(1, 2, 4), depth=22, more=(_wide(2, 16), LATE_DENSE)),
        ),
        rates=(1e-2, 2e-2),
        sparse_rate=2.5e-2,
        sparse=(("wide", 0.1, "[4,1]"), ("wide", 0.1, "1"), (LATE_SPARSE, 0.2, "1"), ("wide", 0.2, "[4,1]")),
    ),
    # Its narrowest stage has 64 channels times the width: a ResNet-18 of full width takes seconds a step on two cores.
    "resnet": Ladder(
        shape=_stages,
        rungs=(
            Rung(up_to=6, widths=(0.125, 0.25, 0.5), depth=1, more=(_stages(0.25, 2), _stages(0.25, 3))),
            Rung(up_to=30, widths=(0.25, 0.375, 0.5), depth=1, more=(_stages(0.375, 2), _stages(0.375, 3))),
            Rung(up_to=FOREVER, widths=(0.25, 0.5, 1), depth=2, more=(_stages(0.5, 1), _stages(0.5, 3))),
        ),
        rates=(1e-3, 3e-3),
        sparse_rate=3e-3,
        sparse=(("wide", 0.1, "[4,1]"), ("wide", 0.1, "1"), ("wider", 0.1, "[4,1]"), ("wide", 0.2, "[4,1]")),
    ),
}


def image_field(settings: ImageSettings, minutes: float) -> tuple[str, ...]:
    """Contenders of the heats for a budget of so many minutes each, as `rarefy compare` writes them.

    Args:
        settings: those of the race; the kind of network is filled in. A rate that the user gave is everybody's, and the
            dense ladder's other one is half of it.
    """
    assert settings.model is not None, "filled in by the task"
    ladder = LADDERS[settings.model]
    rung = next(one for one in ladder.rungs if minutes <= one.up_to)
    rates, sparse_rate = _rates(settings, ladder)
    narrowest, middle, _ = rung.widths
    shapes = [ladder.shape(width, rung.depth) for width in rung.widths]
    dense = [f"dense:{shape},dense_lr={rate:g}" for shape in shapes for rate in rates]
    dense += [f"dense:{shape},dense_lr={rates[0]:g}" for shape in rung.more]
    wide = {"wide": ladder.shape(2 * narrowest, rung.depth), "wider": ladder.shape(2 * middle, rung.depth)}
    rate_said = "" if sparse_rate == settings.lr else f",lr={sparse_rate:g}"
    sparse = [
        f"{wide.get(shape, shape)},density={density:g},block={block}{rate_said}"
        for shape, density, block in ladder.sparse
    ]
    return (*dense, *(f"{method}:{shape}" for method in METHODS for shape in sparse))


def _rates(settings: ImageSettings, ladder: Ladder) -> tuple[tuple[float, float], float]:
    """Of dense and of sparse networks."""
    given = settings.lr if settings.lr != ImageSettings.lr else SGD_RATE if settings.optimizer == "sgd" else None
    return (ladder.rates, ladder.sparse_rate) if given is None else ((given / 2, given), given)
