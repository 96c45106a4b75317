"""ERK on the networks of the papers: densities worked out by hand, and the FLOPs that RigL's authors publish.

By hand: density_l = c * sum(shape) / prod(shape), and c follows from what must be kept once the full layers are known.
"""

from __future__ import annotations

import math

import pytest

from rarefy import erk
from rarefy.distributions import exact_counts


def resnet50() -> dict[str, tuple[tuple[int, ...], int]]:
    """Weight shape and side of the output of every convolution and of the classifier, for images of 224 x 224."""
    layers: dict[str, tuple[tuple[int, ...], int]] = {"conv1": ((64, 3, 7, 7), 112)}
    channels, side = 64, 56
    for stage, (blocks, width) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)]):
        for block in range(blocks):
            name = f"layer{stage + 1}.{block}"
            out_side = side // 2 if stage and not block else side
            layers[f"{name}.conv1"] = ((width, channels, 1, 1), side)
            layers[f"{name}.conv2"] = ((width, width, 3, 3), out_side)
            layers[f"{name}.conv3"] = ((4 * width, width, 1, 1), out_side)
            if not block:
                layers[f"{name}.downsample.0"] = ((4 * width, channels, 1, 1), out_side)
            channels, side = 4 * width, out_side
    layers["fc"] = ((1000, 2048), 1)
    return layers


RESNET50 = resnet50()

# 25,502,912 weights; the sums of the shapes add up to 52,321; c = (kept - full) / (52,321 - sums of the full layers).
# 5%: 1,275,145.6 / 52,321.
# 10%: (2,550,291.2 - 64^2) / (52,321 - 130).
# 20%: (5,100,582.4 - 64^2 - 6 * 64 * 256 - 128 * 256) / (52,321 - 130 - 6 * 322 - 386).
SCALES = {0.2: 4_965_414.4 / 49_873, 0.1: 2_546_195.2 / 52_191, 0.05: 1_275_145.6 / 52_321}
FULL = {
    0.2: {f"layer1.{block}.conv{i}" for block in range(3) for i in (1, 3)}
    | {"layer1.0.downsample.0", "layer2.0.conv1"},
    0.1: {"layer1.0.conv1"},
    0.05: set(),
}
SOME = {  # sum(shape) / prod(shape), by hand
    "conv1": 81 / 9408,  # (64 + 3 + 7 + 7) / (64 * 3 * 49)
    "layer1.0.conv2": 134 / 36_864,
    "layer2.0.conv2": 262 / 147_456,
    "layer3.5.conv3": 1282 / 262_144,
    "layer4.0.downsample.0": 3074 / 2_097_152,
    "layer4.2.conv2": 1030 / 2_359_296,
    "fc": 3048 / 2_048_000,
}


@pytest.mark.parametrize("density", SCALES)
def test_resnet50(density):
    found = erk({name: shape for name, (shape, _) in RESNET50.items()}, density)
    sizes = {name: math.prod(shape) for name, (shape, _) in RESNET50.items()}
    assert len(found) == 54 and sum(sizes.values()) == 25_502_912
    assert {name for name, d in found.items() if d == 1} == FULL[density]
    for name, share in SOME.items():
        assert found[name] == pytest.approx(SCALES[density] * share, rel=1e-12)
    assert sum(exact_counts(found, sizes, density).values()) == round(density * 25_502_912)


@pytest.mark.parametrize("density, published", [(0.2, 0.42), (0.1, 0.24)])
def test_resnet50_costs_the_flops_that_are_published(density, published):
    """Evci et al. 2020, ResNet-50 with ERK: test FLOPs over those of the dense network."""
    found = erk({name: shape for name, (shape, _) in RESNET50.items()}, density)
    dense = {name: math.prod(shape) * side**2 for name, (shape, side) in RESNET50.items()}
    assert sum(found[name] * flops for name, flops in dense.items()) / sum(dense.values()) == pytest.approx(
        published, abs=0.007
    )


@pytest.mark.parametrize("density", [0.2, 0.1, 0.05])
def test_gpt2(density):
    """A block keeps density * 7,077,888 = c * 12,288, so c = 576 * density: c_attn gets 576 * 3072 / (2304 * 768) = 1
    times the density, c_proj 576 * 1536 / 768^2 = 1.5, and both of the MLP 576 * 3840 / (3072 * 768) = 0.9375.
    """
    shapes = {
        f"h.{block}.{name}": shape
        for block in range(12)
        for name, shape in {
            "attn.c_attn": (2304, 768),
            "attn.c_proj": (768, 768),
            "mlp.c_fc": (3072, 768),
            "mlp.c_proj": (768, 3072),
        }.items()
    }
    factor = {"attn.c_attn": 1.0, "attn.c_proj": 1.5, "mlp.c_fc": 0.9375, "mlp.c_proj": 0.9375}
    found = erk(shapes, density)
    assert found == pytest.approx({name: density * factor[name.split(".", 2)[2]] for name in shapes})
