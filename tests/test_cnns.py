"""WRN and ResNet, and the image recipe that trains them."""

from __future__ import annotations

import copy

import pytest
import torch

import rarefy
from rarefy.compare import ImagesTask
from rarefy.models import WRN, ResNet, ResNetConfig, WRNConfig
from rarefy.recipes.images import (
    AllImages,
    ImageBatches,
    ImageSettings,
    ImageShape,
    load_images,
    make_dense,
    make_sparse,
)
from rarefy.recipes.images.networks import flops_per_image, num_parameters
from tiny import one_thread, write_images

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")


def test_published_numbers_of_parameters():
    with torch.device("meta"):
        wrn, resnet = WRN(WRNConfig(depth=28, width=10)), ResNet(ResNetConfig())
    assert sum(p.numel() for p in wrn.parameters()) == 36_479_194  # WRN-28-10 for ten classes: 36.5M
    assert sum(p.numel() for p in resnet.parameters()) == 11_173_962  # ResNet-18 for CIFAR-10: 11.17M


@pytest.mark.parametrize("model", [WRN(WRNConfig(depth=10, width=0.5)), ResNet(ResNetConfig(blocks=(1, 1), width=8))])
def test_sizes_and_names(model):
    assert model(torch.randn(2, 3, 12, 12)).shape == (2, 10)
    names = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)}
    first = "groups.0.0" if isinstance(model, WRN) else "stages.0.0"
    assert {"stem", f"{first}.conv1", f"{first}.conv2"} <= names
    gray = type(model)(type(model.config)(**{**vars(model.config), "channels": 1}))
    assert gray(torch.randn(2, 12, 12)).shape == (2, 10)


@pytest.mark.parametrize(
    ("network", "seed"),
    [(lambda: WRN(WRNConfig(depth=10, width=0.25)), 48), (lambda: ResNet(ResNetConfig(blocks=(1, 1), width=5)), 28)],
)
def test_gradients_of_narrow_networks(network, seed):
    """Their skips have fewer inputs than a vector has lanes, where oneDNN writes past its workspace."""
    # With these seeds no ReLU's input is within 3e-4 of zero, where rounding, of some 1e-6, may switch it over.
    torch.manual_seed(seed)
    model = network()
    exact = copy.deepcopy(model).double()
    images = torch.randn(16, 3, 8, 8)
    for _ in range(20):  # a damaged heap is noticed sooner or later
        model.zero_grad()
        model(images).square().mean().backward()
    exact(images.double()).square().mean().backward()
    for (name, found), wanted in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert found.grad is not None and wanted.grad is not None
        scale = wanted.grad.abs().max().item()
        torch.testing.assert_close(found.grad.double(), wanted.grad, rtol=1e-3, atol=1e-4 * scale, msg=name)


def test_a_width_for_each_group_or_stage():
    assert WRNConfig(width=2).group_channels() == WRNConfig(width=(2, 2, 2)).group_channels() == (32, 64, 128)
    assert WRNConfig(width=(1, 2, 4)).group_channels() == (16, 64, 256)
    assert ResNetConfig(width=16).stage_channels() == (16, 32, 64, 128)
    model = ResNet(ResNetConfig(blocks=(1, 1), width=(8, 40)))
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 10)
    assert model.state_dict()["stages.0.0.conv2.weight"].shape[0] == 8
    assert model.state_dict()["stages.1.0.conv2.weight"].shape[0] == 40
    image = ImageShape(3, 8, 8)
    settings = ImageSettings(model="resnet", blocks=(1, 1), width=(0.25, 0.5))
    assert settings.network(image) == ResNetConfig(blocks=(1, 1), width=(16, 64))
    assert settings.scaled(0.5).network(image) == ResNetConfig(blocks=(1, 1), width=(8, 32))
    assert ImageSettings(width=(2.0,)) == ImageSettings(width=2.0)  # as the command line says one number


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: WRNConfig(depth=23), "depth must be 6 n"),
        (lambda: WRNConfig(width=0), "width must be positive"),
        (lambda: WRNConfig(width=(1, 2, -1)), "width must be positive"),
        (lambda: WRNConfig(width=(1, 2)), "width must be one number or 3, one a stage, got 2"),
        (lambda: ResNetConfig(width=0), "width must be positive"),
        (lambda: ImageSettings(model="resnet", width=0), "width must be positive"),
        (lambda: ImageSettings(model="resnet", width=()), "width must be positive"),
        (lambda: ResNetConfig(width=0.5), "width of stage 0 must be at least 1"),  # pyright: ignore[reportArgumentType]
        (lambda: ResNetConfig(width=(64, 64)), "width must be one number or 4"),
        (lambda: ImageSettings(model="wrn", width=(1, 2)), "width must be one number or 3"),
        (lambda: ResNetConfig(blocks=(2, 0)), "blocks of stage 1 must be at least 1"),
        (lambda: ResNetConfig(blocks=()), "stages must be at least 1"),
        (lambda: ImageSettings(label_smoothing=1.0), "label_smoothing must lie in"),
        (lambda: ImageSettings(model="wrn", depth=9), "depth must be 6 n"),
    ],
)
def test_impossible_networks_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize("model", ["wrn", "resnet"])
@pytest.mark.parametrize("optimizer", ["rarefy", "sgd"])
def test_a_sparse_network_learns_what_can_be_learned(tmp_path, model, optimizer):
    found = load_images(str(write_images(tmp_path / "a")))
    shape = {"depth": 10, "width": 1.0} if model == "wrn" else {"blocks": (1, 1), "width": 0.25}
    settings = ImageSettings(
        model=model, density=0.3, batch=16, optimizer=optimizer, lr=0.01, sparse_lr=0.02, method="set", **shape
    ).settled(50)
    twin = make_sparse(settings, settings.plan, found.shape)
    assert twin.rewirer is not None and any("conv1" in name for name in twin.rewirer.layers)
    data = ImageBatches(data=found.train, scale=found.scale(), batch=16, seed=0)
    for _ in range(50):
        twin.train_step(data)
    assert twin.assess(AllImages(data=found.train, scale=found.scale()))["accuracy"] > 0.8


def test_flops_count_every_use_of_a_weight():
    image = ImageShape(3, 8, 8)
    settings = ImageSettings(model="resnet", blocks=(1, 1), width=0.125, density=0.25).settled(10)
    dense = make_dense(settings, image).model
    by_hand = 3 * 8 * 9 * 64 + 2 * (8 * 8 * 9 * 64) + (8 * 16 * 9 + 16 * 16 * 9 + 8 * 16) * 16 + 16 * 10
    assert flops_per_image(dense, image) == 6 * by_hand
    assert dense.training
    sparse = make_sparse(settings, settings.plan, image).model
    assert 0.25 * 6 * by_hand < flops_per_image(sparse, image) < 0.45 * 6 * by_hand


@pytest.mark.parametrize("model", ["mlp", "wrn", "resnet"])
def test_a_narrower_network_has_about_so_many_parameters(tmp_path, model):
    settings = ImageSettings(
        data=str(write_images(tmp_path / "a")),
        model=model,
        hidden=(50, 60),
        depth=10,
        blocks=(1, 1),
        width=2.0,
        batch=16,
    ).settled(10)
    task = ImagesTask(settings)
    image = ImageShape(1, 6, 6)
    wanted = num_parameters(settings, image) // 5
    narrow = task.narrowed(settings, wanted)
    assert num_parameters(narrow, image) == pytest.approx(wanted, rel=0.06)


def test_label_smoothing_spreads_the_label():
    settings = ImageSettings(hidden=(8,), label_smoothing=0.2).settled(10)
    twin = make_dense(settings, ImageShape(1, 2, 2))
    x, labels = torch.randn(5, 2, 2), torch.tensor([0, 1, 2, 3, 4])
    logits = twin.model(x)
    smooth = torch.full((5, 10), 0.02).scatter_(1, labels[:, None], 0.82)
    torch.testing.assert_close(twin.loss(twin.model, x, labels), -(smooth * logits.log_softmax(1)).sum(1).mean())


def test_a_whole_network_computes_what_its_masked_twin_does():
    torch.manual_seed(0)
    model = ResNet(ResNetConfig(blocks=(1, 1), width=8))
    rewirer = rarefy.sparsify(model, rarefy.Plan(density=0.3))
    masked = ResNet(ResNetConfig(blocks=(1, 1), width=8))
    state = {k: v for k, v in model.state_dict().items() if k in masked.state_dict()}
    for name, layer in rewirer.layers.items():
        dense = layer.to_dense()
        state[f"{name}.weight"] = dense.weight
    masked.load_state_dict(state)
    x = torch.randn(20, 3, 12, 12)
    torch.testing.assert_close(model(x), masked(x), rtol=1e-4, atol=1e-4)
