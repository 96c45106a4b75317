"""Plans of fixed structure from the literature: the controls that a method which finds its pattern has to beat."""

from __future__ import annotations

from typing import Any

from rarefy.methods import Static
from rarefy.plan.plan import Plan


def pixelated_butterfly(
    density: float, *, block: int | tuple[int, int] = 16, low_rank: int | float = 0.25, **options: Any
) -> Plan:
    """A flat block butterfly that never changes, and a low-rank part beside it.

    Args:
        density: of both parts together.
        block: unit shape; layers that it does not divide stay dense, and are listed.
        low_rank: share of the budget, or a rank. The paper advises a quarter to a third.
        options: other fields of `Plan`.
    Source:
        Dao et al. 2022 (arXiv:2112.00029), section 3.
    Departures: blocks of 16 (theirs fit GPU tiles, 32); the same density in every layer (theirs from a cost model, by
    `overrides` here); the learned weight gamma between the parts is left out; B starts at zero; see also
    `rarefy.init.butterfly_pattern`.
    """
    return Plan(
        **{"density": density, "method": Static(), "init": "butterfly", "block": block, "low_rank": low_rank, **options}
    )


def sltrain(density: float, *, rank: int, alpha: float | None = None, **options: Any) -> Plan:
    """A random pattern that never changes, and a low-rank part beside it.

    Args:
        density: of both parts together. For a share d of S alone, as the paper counts (theirs is 0.03), it is
            d + rank * (1 / out_features + 1 / in_features), by layer: see `Plan.overrides`.
        rank: of the low-rank part. The paper's: 128 at width 512 up to 1024 at width 4096.
        alpha: the low-rank part is scaled by alpha / rank; the authors' script has 32 at rank 128. None: scale 1.
        options: other fields of `Plan`.
    Source:
        Han et al. 2024 (arXiv:2406.02214), section 3 and appendix on hyperparameters.
    Departures: forward and backward never form the dense sum; rows left empty by the draw are repaired (rewiring rule
    3.1); biases keep the model's own init. S keeps the dense model's weights unscaled, uniform in +-1/sqrt(in_features)
    for nn.Linear, as theirs; a model made on the meta device draws them by each row's fan-in instead.
    """
    return Plan(
        **{
            "density": density,
            "method": Static(),
            "init": "random",
            "rescale": False,
            "low_rank": rank,
            "low_rank_alpha": alpha,
            **options,
        }
    )
