"""Convolutions in the cost model: what they do in numbers, and plans that are made by prediction."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from rarefy import Plan, SparseConv2d, sparsify
from rarefy.cost import (
    CALIBRATED_BLOCKS,
    PRECISIONS,
    Convolution,
    CostModel,
    Work,
    convolutions_per_layer,
    dense_work,
    predict,
)
from rarefy.cost.batching import Batching
from rarefy.cost.host import batching
from rarefy.cost.layers import dense_layer, random_batch, sparse_layer
from rarefy.cost.terms import terms
from rarefy.cost.work import PASSES
from rarefy.ops import available, using
from rarefy.pattern import Pattern
from rarefy.plan import thresholds, times
from rarefy.plan.structure import choose_block

L2 = 10240

# -- what a convolution does ------------------------------------------------------------------------------------------

CONVS = [
    nn.Conv2d(4, 8, 3),
    nn.Conv2d(4, 8, (5, 3), stride=(2, 1), padding=(2, 0), dilation=(1, 2)),
    nn.Conv2d(4, 8, (1, 2), stride=3, padding=1),
    nn.Conv2d(4, 8, 4, padding="same"),
    nn.Conv2d(4, 8, (3, 5), padding="same", dilation=2),
    nn.Conv2d(4, 8, 3, padding="valid", groups=4),
]


@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_sizes_are_those_of_torch(conv):
    seen = Convolution.of(conv, (3, 4, 11, 12))
    y = conv(torch.randn(3, 4, 11, 12))
    assert seen.size == tuple(y.shape[2:]) and seen.pixels == 3 * seen.size[0] * seen.size[1]
    assert seen.matrix(8) == (8, conv.weight[0].numel())
    again = dense_layer(seen.matrix(8), conv=seen)
    assert again(torch.randn(3, 4, 11, 12)).shape == y.shape
    assert Convolution.of(conv, (4, 11, 12)).images == (1, 4, 11, 12)


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "contiguous"])
def test_layers_are_timed_on_images_as_they_come(axes, last):
    dense = nn.Conv1d(4, 8, 3, padding=1) if axes == 1 else nn.Conv2d(4, 8, 3, padding=1)
    seen = Convolution.of(dense, (5, 4, 9, 9)[: 2 + axes], last)
    x, dy = random_batch(seen.matrix(8), seen.pixels, torch.Generator().manual_seed(0), seen)
    again = dense_layer(seen.matrix(8), conv=seen)
    assert type(again) is type(dense) and x.is_contiguous() != last and dy.shape == again(x).shape
    model = nn.Sequential(dense)
    assert convolutions_per_layer(model, x.detach(), ["0"]) == {"0": seen}
    assert convolutions_per_layer(model, x.detach()[0], ["0"])["0"].channels_last == last


def test_images_without_memory_are_taken_for_channels_last():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)).to("meta")
    found = convolutions_per_layer(model, torch.zeros(2, 4, 9, 9, device="meta"), ["0", "2"])
    assert found["2"].images == (2, 8, 7, 7) and all(conv.channels_last for conv in found.values())


def test_a_kernel_that_does_not_fit_has_no_output():
    assert Convolution((1, 2, 2, 9), (3, 3)).size == (0, 7)


def test_layers_to_time_have_the_geometry_and_channels_last_images():
    conv = Convolution((2, 4, 7, 9), (3, 2), (2, 1), (2, 0), (1, 2))
    generator = torch.Generator().manual_seed(0)
    layer = sparse_layer(Pattern.with_units((8, 24), 12, (4, 1), generator), generator, False, conv)
    x, dy = random_batch((8, 24), conv.pixels, generator, conv)
    assert isinstance(layer, SparseConv2d) and layer.bias is None and layer.block == (4, 1)
    assert Convolution.of(layer, x.shape) == conv
    assert layer(x).shape == dy.shape and x.requires_grad
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (x, dy))


# -- groups of images -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, images, precision, lanes, whole, panel",
    [
        (Batching(1, 16), 1, "fp32", 16, 16, 4),  # most lanes are empty, and cost as much
        (Batching(1, 16), 33, "fp32", 16, 48, 4),
        (Batching(2, 16), 33, "fp32", 16, 64, 4),  # three groups: one thread has two
        (Batching(4, 16), 16, "bf16", 16, 64, 4),
        (Batching(1, 8), 12, "medium", 8, 16, 4),
        (Batching(1, 16, True), 33, "fp32", 16, 48, 4),
        (Batching(1, 16, True), 33, "bf16", 32, 64, 2),
        (Batching(1, 16, True), 16, "medium", 16, 16, 4),  # too few for pairs
        (Batching(2, 16, True), 17, "medium", 32, 64, 2),
    ],
)
def test_images_are_shared_out_in_whole_groups(given, images, precision, lanes, whole, panel):
    assert given.side_by_side(images, precision) == lanes
    assert given.whole(images, precision) == whole
    assert given.panel(images, precision) == panel


@pytest.mark.parametrize("change", [{"threads": 0}, {"lanes": True}, {"lanes": 1.5}, {"dots": 1}], ids=str)
def test_batchings_that_cannot_be_are_refused(change: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(change))):
        Batching(**change)


@pytest.mark.parametrize("kernels", [name for name in available() if name not in ("reference", "tiled")])
def test_this_machines_batching_is_that_of_the_kernels_in_use(kernels):
    with using(kernels):
        found = batching()
    assert found.threads == torch.get_num_threads() and found.dots == (kernels == "avx512bf16")
    assert found.lanes == (16 if "512" in kernels or kernels == "amx" else 8 if kernels == "avx2" else 4)


# -- terms, by hand ---------------------------------------------------------------------------------------------------

ACROSS = Convolution((20, 4, 5, 6), (3, 3), border=(2, 2))  # to 8 channels of 5x6, on two threads: 32 images, rows of 8
STRIDED = Convolution((16, 4, 8, 8), (3, 3), (2, 2), (2, 2))  # to 8 channels of 4x4


def amounts(conv: Convolution, block, which, given: Batching, precision: Any = "fp32", nnz: int = 32) -> dict:
    return terms(Work((8, 36), conv.pixels, nnz, block, precision, conv), which, L2, given)


def test_terms_of_a_forward_pass():
    places = 32 * 5 * 8
    assert amounts(ACROSS, (1, 1), "forward", Batching(2, 16)) == {
        "call": 1.0,
        "pack_in": 32 * 4 * 5 * 6,
        "pack_out": 8 * places,
        "far_packed": 32 * 4 * 5 * 6 * 0.5,  # 4 channels of 4 rows of 10 pixels of 64 bytes: twice half of L2
        "cut": 4 * places * 3,  # 4 rows of 6 pixels for two rows of 4
        "places": 0,
        "products": 32 * places,
        "unpaired_products": 0,
        "scattered_products": 0,
        "segments": 8 * 36 * places,
        "pattern": 32,
        "parts": 0,
        "beyond_cache": 0,
    }


def test_gradients_of_stride_one_are_a_convolution_of_dy():
    forward, step = (amounts(ACROSS, (1, 1), which, Batching(2, 16)) for which in PASSES)
    assert step["products"] == 3 * forward["products"]
    assert step["cut"] == forward["cut"] + 8 * 32 * 5 * 8 * 3 and step["places"] == step["scattered_products"] == 0
    assert step["far_packed"] == forward["far_packed"] + 8 * 32 * 5 * 8 * 0.75, "dy's band is twice as large"
    assert step["parts"] == 2 * 32


def test_strides_touch_the_taps_one_by_one():
    step, places = amounts(STRIDED, (1, 1), "step", Batching()), 16 * 4 * 4
    assert step["cut"] == 4 * places * (5 * 9) / 8, "5 rows of 5 pixels of the even taps and 4 of the odd, for 8 pixels"
    assert step["places"] == 4 * 9 * places and step["scattered_products"] == 32 * places
    assert step["products"] == 3 * 32 * places


def test_so_do_tall_units_in_float32():
    step, places = amounts(ACROSS, (8, 1), "step", Batching(2, 16)), 32 * 5 * 8
    assert step["cut"] == 4 * places * 3 and step["places"] == 4 * 9 * places
    assert step["scattered_products"] == 32 * places


def test_square_units_have_an_input_for_each_column():
    step = amounts(STRIDED, (4, 4), "step", Batching())
    assert step["cut"] == step["places"] == 4 * 9 * 16 * 4 * 4 and step["scattered_products"] == 0
    assert step["segments"] == 8 * 36 / 16 * 3 * 16 * 4 * 4


def test_bfloat16_in_pairs_wants_more_images():
    few, many = (amounts(STRIDED, (4, 1), "forward", Batching(dots=dots), "bf16") for dots in (True, False))
    assert few["unpaired_products"] == many["products"] == 32 * 16 * 4 * 4
    assert few["products"] == many["unpaired_products"] == 0
    paired = amounts(ACROSS, (4, 1), "step", Batching(dots=True), "bf16")
    assert paired["scattered_products"] == 0, "tall units go the way of dy's convolution, too"
    assert paired["pack_out"] == 8 * 32 * 5 * 6, "panels of two pixels"


def test_terms_of_dense_convolutions():
    sizes = 16 * 8 * 4 * 4, 16 * 4 * 8 * 8
    products = 8 * 36 * 16 * 16
    work = dense_work((8, 36), STRIDED.pixels, "fp32", STRIDED)
    found = terms(work, "step", 2000)
    assert (found["move_out"], found["move_in"], found["weights"]) == (*sizes, 8 * 36)
    assert found["strided_products"] == products and found["products"] == found["point_products"] == 0
    assert found["rows"] == products / 4 and found["fresh"] == 0
    assert found["beyond_cache"] == 4 * sizes[0] - 4000 + 4 * sizes[1] - 4000
    point = Convolution((128, 64, 32, 32), (1, 1))
    found = terms(dense_work((64, 64), point.pixels, "fp32", point), "step", 2000)
    assert found["point_products"] == 64 * 64 * 128 * 1024 and found["rows"] == found["products"] == 0
    assert found["fresh"] == 2 * (32 << 20), "y and dx are mapped anew"


def test_what_shares_coefficients():
    point, grouped = Convolution((2, 8, 4, 4), (1, 1)), Convolution((2, 8, 4, 4), (3, 3), groups=8)
    assert Work((8, 36), 9, 9, (4, 1), "bf16", STRIDED).kind == "bf16 conv 4x1"
    assert dense_work((8, 36), 9, "medium", STRIDED).kind == "medium conv dense"
    assert Work((8, 8), 32, 9, (1, 1), "fp32", point).kind == "fp32 1x1", "a linear layer on pixels"
    assert dense_work((8, 8), 32, "fp32", point).kind == "fp32 conv dense"
    assert dense_work((8, 9), 32, "fp32", grouped).kind == "fp32 grouped conv dense", "never timed"
    paired = Convolution((2, 8, 4, 4), (1, 1), groups=2)
    assert Work((8, 4), 32, 9, (1, 1), "fp32", paired).kind == "fp32 grouped conv 1x1", "nor is this"
    linear, pixels = Work((8, 8), 32, 9, (1, 1)), Work((8, 8), 32, 9, (1, 1), "fp32", point)
    assert terms(pixels, "step", L2) == terms(linear, "step", L2)


# -- plans ------------------------------------------------------------------------------------------------------------


def costs(**per_product: float) -> CostModel:
    """A model in which only products take time: picoseconds of one, by kind such as `conv_4x4` or `conv_dense`.

    A kind that is not named takes 10.
    """
    found = {}
    for precision, family, which in itertools.product(PRECISIONS, ("", "conv "), PASSES):
        for kind in ("dense", *(f"{rows}x{cols}" for rows, cols in CALIBRATED_BLOCKS)):
            ms = 1e-9 * per_product.get(f"{family}{kind}".replace(" ", "_"), 10.0)
            named = ("products", "strided_products", "point_products") if kind == "dense" else ("products",)
            found[f"{precision} {family}{kind} {which}"] = dict.fromkeys(named, ms)
    return CostModel(found, 0, {}, {"date": "today"})


class Net(nn.Module):
    """A first convolution, one of several taps, one of one tap, one with groups, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.conv = nn.Conv2d(64, 128, 3, padding=1, bias=False)
        self.point = nn.Conv2d(128, 64, 1)
        self.depth = nn.Conv2d(64, 64, 3, padding=1, groups=64)
        self.head = nn.Linear(64, 64)

    def forward(self, x):
        return self.head(self.depth(self.point(self.conv(self.stem(x)))).mean(dim=(2, 3)))


SAMPLE = torch.zeros(16, 3, 8, 8).contiguous(memory_format=torch.channels_last)


def test_a_plan_is_explained_by_prediction():
    found = Plan(density=0.25).explain(Net(), SAMPLE, measure=False, costs=costs(conv_dense=4.0, dense=100.0))
    rows = {row["name"]: row for row in found.rows}
    pixels = 16 * 8 * 8
    assert rows["conv"]["dense_ms"] == pytest.approx(4e-9 * 128 * 576 * pixels)
    assert rows["conv"]["sparse_ms"] == pytest.approx(1e-8 * 128 * 144 * 3 * pixels)
    assert rows["point"]["dense_ms"] == pytest.approx(4e-9 * 64 * 128 * pixels)
    assert rows["point"]["sparse_ms"] == pytest.approx(1e-8 * 64 * 32 * pixels), "as a linear layer"
    assert {name: row["times"] for name, row in rows.items()} == {
        "stem": "predicted", "conv": "predicted", "point": "predicted", "depth": None, "head": "predicted"
    }  # fmt: skip
    assert "sparse would be slower here" in rows["conv"]["reason"] and "predicted" in rows["conv"]["reason"]
    assert rows["point"]["kind"] == "sparse" and rows["point"]["speedup"] == pytest.approx(4 / 2.5)
    assert "64 groups (depthwise)" in rows["depth"]["reason"], "and no time: they were never calibrated"
    options = {option["name"]: option["ms"] for option in rows["conv"]["options"]}
    assert options["dense bf16"] == pytest.approx(rows["conv"]["dense_ms"])
    assert "(4 predicted)" in str(found)


def test_a_convolution_that_is_called_twice_is_priced_for_one_call():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x):
            return self.conv(self.conv(x))

    x = torch.zeros(16, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    (found,) = Plan(density=0.25).decide(Twice(), x, measure=False, costs=costs())
    assert found.tokens == 2 * 1024 and found.cost is not None
    assert found.cost.dense_ms == pytest.approx(1e-8 * 16 * 144 * 1024)


def test_other_layouts_than_the_predicted_are_said():
    plan = Plan(density=0.25)
    with pytest.warns(UserWarning, match="are for images in channels_last.* and those of conv are not"):
        plan.decide(Net(), SAMPLE.contiguous(), measure=False, costs=costs())


def test_sparsify_leaves_dense_what_the_model_says_is_slower(monkeypatch):
    monkeypatch.setattr(times, "load_model", lambda: costs(conv_dense=1e4, conv_1x1=1e5, dense=1e4))
    monkeypatch.setattr(times, "measure", lambda *_, **__: pytest.fail("timed"))
    model: Any = Net()
    rewirer = sparsify(model, Plan(density=0.25), SAMPLE, measure=False)
    assert isinstance(model.point, SparseConv2d) and isinstance(model.conv, nn.Conv2d)
    assert "sparse would be slower here" in rewirer.left_dense["conv"]
    assert {"stem", "conv", "depth"} == set(rewirer.left_dense)


def test_each_convolution_gets_the_fastest_structure():
    model = costs(**{"conv_4x1": 1.0, "8x8": 1.0, "conv_dense": 100.0, "dense": 100.0})
    plan = Plan(density=0.5, block="auto")
    blocks = {d.name: d.block for d in plan.decide(Net(), SAMPLE, measure=False, costs=model) if d.is_sparse}
    assert blocks == {"conv": (4, 1), "point": (8, 8), "head": (8, 8)}, "a point is a linear layer"
    settled = plan.settled([d.row() for d in plan.decide(Net(), SAMPLE, measure=False, costs=model)])
    rewirer = sparsify(Net(), settled)
    assert {name: layer.block for name, layer in rewirer.layers.items()} == blocks


def test_without_a_sample_convolutions_have_no_times_and_no_block(monkeypatch):
    monkeypatch.setattr(times, "load_model", lambda: pytest.fail("asked"))
    plan = Plan(density=0.5, block="auto", block_overrides={"head": 4})
    decisions = {d.name: d for d in plan.decide(Net())}
    assert decisions["conv"].block == (1, 1) and decisions["conv"].is_sparse and decisions["conv"].cost is None
    model = costs(**{"8x8": 1.0, "conv_8x8": 1.0})
    decisions = {d.name: d for d in Plan(density=0.5, block="auto").decide(Net(), costs=model)}
    assert decisions["head"].block == (8, 8) and decisions["conv"].block == (1, 1)
    assert decisions["head"].cost is not None and decisions["conv"].cost is None


def test_choices_and_break_even_are_the_convolutions_own():
    conv = Convolution((16, 64, 8, 8), (3, 3), border=(2, 2))
    model = costs(**{"conv_4x4": 1.0, "8x1": 1.0, "conv_dense": 12.0})
    assert choose_block(model, (64, 576), 0.5, conv.pixels, conv) == (4, 4)
    assert choose_block(model, (64, 576), 0.5, conv.pixels) == (8, 1)
    layer = SparseConv2d(64, 64, 3, padding=1, density=0.1)
    found = thresholds({"conv": layer}, "auto", {"conv": conv.pixels}, lambda: model, convolutions={"conv": conv})
    assert found["conv"] == pytest.approx(12 / 30, abs=0.006), "ten picoseconds a product, three products a weight"
    assert thresholds({"conv": layer}, "auto", {"conv": 2048}, lambda: model) == {}, "no one knows its images"


def test_a_model_without_convolutions_predicts_none():
    whole = costs()
    linear = CostModel({key: given for key, given in whole.coefficients.items() if "conv" not in key}, 0)
    assert predict(linear, (8, 36), 9, (1, 1), STRIDED.pixels, conv=STRIDED) is None
    assert linear.ms(Work((8, 36), 9, 9, (1, 1), "fp32", STRIDED)) is None
    decisions = {d.name: d for d in Plan(density=0.25).decide(Net(), SAMPLE, measure=False, costs=linear)}
    assert decisions["conv"].is_sparse and decisions["conv"].cost is None, "what is not known is not refused"
