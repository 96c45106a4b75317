"""Images: IDX files and what is wrong with them, batches, the MLP, and the recipe."""

from __future__ import annotations

import gzip
import lzma
import struct
from pathlib import Path

import pytest
import torch

from rarefy.models import MLP, MLPConfig
from rarefy.recipes.images import (
    AllImages,
    ImageBatches,
    ImageSettings,
    ImageShape,
    load_images,
    make_dense,
    make_sparse,
)
from rarefy.recipes.images.batches import scaled
from rarefy.recipes.images.data import Labelled
from rarefy.recipes.images.idx import read_idx
from rarefy.recipes.images.networks import assess, flops_per_image
from tiny import one_thread, write_images

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = ImageShape(1, 6, 6)

FASHION = Path(__file__).parents[2] / "shared" / "data" / "fashion-mnist"


def idx(entries: bytes, *shape: int, kind: int = 8, zeros: bytes = b"\0\0") -> bytes:
    return zeros + bytes([kind, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + entries


@pytest.mark.parametrize("pack, suffix", [(bytes, ""), (gzip.compress, ".gz"), (lzma.compress, ".xz")])
def test_idx_files_are_read_plain_and_packed(tmp_path, pack, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(pack(idx(bytes(range(24)), 2, 3, 4)))
    assert torch.equal(read_idx(path), torch.arange(24, dtype=torch.uint8).view(2, 3, 4))


@pytest.mark.parametrize(
    "raw, said",
    [
        (b"", "no IDX file: at offset 0 it has nothing"),
        (b"\x1f\x8b\x08\x00", "at offset 0 it has 1f 8b"),
        (idx(b"1234", 4, kind=0x0D), "type 0x0d at offset 2"),
        (idx(b"", *[1] * 5), "5 dimensions at offset 3"),
        (b"\0\0\x08\x00", "0 dimensions at offset 3"),
        (idx(b"", 2, 3)[:9], "ends at offset 9, inside its header of 12 bytes"),
        (idx(b"12345", 2, 3), "ends at offset 17: its header says 2x3 entries, so it should have 18 bytes"),
        (idx(b"1234567", 2, 3), "goes on after offset 18"),
        (idx(b"", 2**32 - 1, 2**32 - 1), "ends at offset 12"),
    ],
)
def test_a_wrong_idx_file_names_itself_and_the_offset(tmp_path, raw, said):
    path = tmp_path / "images"
    path.write_bytes(raw)
    with pytest.raises(ValueError) as raised:
        read_idx(path)
    assert str(path) in str(raised.value) and said in str(raised.value)


@pytest.mark.parametrize("pack, suffix", [(gzip.compress, ".gz"), (lzma.compress, ".xz")])
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_packed_file_names_itself(tmp_path, pack, suffix, damage):
    packed = bytearray(pack(idx(torch.randint(256, (4000,)).to(torch.uint8).numpy().tobytes(), 4000)))
    if damage == "cut":
        packed = packed[: len(packed) // 2]
    else:
        packed[len(packed) // 2] ^= 0xFF
    path = tmp_path / f"x{suffix}"
    path.write_bytes(packed)
    with pytest.raises(ValueError, match=r"cannot be unpacked beyond offset|ends at offset"):
        read_idx(path)


def test_a_folder_is_read_whole_and_has_a_digest_of_its_content(tmp_path):
    found = load_images(str(write_images(tmp_path / "a")))
    assert found.train.images.shape == (64, 6, 6) and found.valid.labels.shape == (20,)
    assert "64 and 20 images" in found.source
    assert found.digest() == load_images(str(write_images(tmp_path / "b", suffix=".gz"))).digest()
    assert found.digest() != load_images(str(write_images(tmp_path / "c", seed=1))).digest()


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    with pytest.raises(ValueError, match="which images"):
        load_images(None)
    with pytest.raises(ValueError, match="no such folder"):
        load_images(str(tmp_path / "nowhere"))
    folder = write_images(tmp_path / "images")
    labels = folder / "train-labels-idx1-ubyte"
    good = labels.read_bytes()
    labels.write_bytes(good[:8] + bytes([3, 10]) + good[10:])
    with pytest.raises(ValueError, match="label 10 of image 1, at offset 9, and labels are 0 to 9"):
        load_images(str(folder))
    labels.write_bytes(idx(bytes(63), 63))
    with pytest.raises(ValueError, match=r"labels of shape \(63,\) for the 64 images"):
        load_images(str(folder))
    labels.unlink()
    with pytest.raises(ValueError, match=r"has no train-labels-idx1-ubyte, plain, \.gz or \.xz"):
        load_images(str(folder))


def batches(**changes) -> ImageBatches:
    images = torch.arange(10 * 4, dtype=torch.uint8).view(10, 2, 2)
    data = Labelled(images, torch.arange(10) % 10)
    return ImageBatches(**{"data": data, "scale": (0.0, 1 / 255), "batch": 3, "seed": 0, **changes})


def test_an_epoch_shows_every_image_at_most_once_and_follows_from_the_step():
    data = batches()
    epoch = [data.at(step)[1] for step in (1, 2, 3)]
    assert len(torch.cat(epoch).unique()) == 9
    assert not torch.equal(torch.cat(epoch), torch.cat([data.at(step)[1] for step in (4, 5, 6)]))
    assert torch.equal(batches().at(2)[0], data.at(2)[0])
    assert not torch.equal(batches(seed=1).at(1)[1], data.at(1)[1]) or not torch.equal(
        batches(seed=1).at(2)[1], data.at(2)[1]
    )
    images, labels = data.at(5)
    torch.testing.assert_close(images[:, 0, 0], 4.0 * labels)  # an image goes with its label


def test_shift_and_flip_move_each_image_by_its_own_draw():
    plain, moved = batches(batch=10), batches(batch=10, shift=1, flip=True)
    images, labels = plain.at(1)
    shifted, same_labels = moved.at(1)
    assert torch.equal(labels, same_labels)
    for image, after in zip(images, shifted, strict=True):
        possible = []
        for mirrored in (image, image.flip(1)):
            padded = torch.nn.functional.pad(mirrored, (1, 1, 1, 1))
            possible += [padded[y : y + 2, x : x + 2] for y in range(3) for x in range(3)]
        assert any(torch.equal(after, one) for one in possible)
    assert not torch.equal(images, shifted)


def test_scaling_gives_mean_zero_and_deviation_one(tmp_path):
    found = load_images(str(write_images(tmp_path / "a")))
    pixels = scaled(found.train.images, found.scale())
    assert abs(float(pixels.mean())) < 1e-5 and abs(float(pixels.std()) - 1) < 1e-3


def test_an_mlp_is_what_its_layers_say():
    model = MLP(MLPConfig(inputs=6, hidden=(5, 4), classes=3), torch.Generator().manual_seed(0))
    x = torch.randn(7, 2, 3)
    first, second = model.layers
    assert isinstance(first, torch.nn.Linear) and isinstance(second, torch.nn.Linear)
    hidden = torch.relu(torch.relu(x.flatten(1) @ first.weight.T + first.bias) @ second.weight.T + second.bias)
    torch.testing.assert_close(model(x), hidden @ model.head.weight.T + model.head.bias)
    assert [name for name, _ in model.named_modules() if name.count(".") or name == "head"] == [
        "layers.0", "layers.1", "head",
    ]  # fmt: skip


@pytest.mark.parametrize("changes", [{"inputs": 0}, {"hidden": (3, 0)}, {"classes": 0}])
def test_an_impossible_mlp_is_refused(changes):
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        MLPConfig(**{"inputs": 4, **changes})


def test_assess_counts_loss_and_accuracy():
    class Fixed(torch.nn.Module):
        def forward(self, x):
            return x

    logits = torch.tensor([[2.0, 0, 0], [0, 3, 0], [1, 0, 0], [0, 0, 5]])
    labels = torch.tensor([0, 1, 2, 2])
    found = assess(Fixed(), logits, labels)
    assert found["accuracy"].item() == 0.75
    exact = -logits.double().log_softmax(1)[torch.arange(4), labels].mean()
    assert found["loss"].item() == pytest.approx(exact.item(), rel=1e-6)


def test_flops_count_what_exists(tmp_path):
    settings = ImageSettings(hidden=(8, 8), density=0.25).settled(10)
    sparse, dense = make_sparse(settings, settings.plan, SHAPE), make_dense(settings, SHAPE)
    assert flops_per_image(dense.model, SHAPE) == 6 * (36 * 8 + 8 * 8 + 8 * 10)
    assert flops_per_image(sparse.model, SHAPE) == 6 * (36 * 8 // 4 + 8 * 8 // 4 + 8 * 10)


@pytest.mark.parametrize("optimizer", ["rarefy", "torch", "sgd"])
def test_a_network_learns_what_can_be_learned(tmp_path, optimizer):
    found = load_images(str(write_images(tmp_path / "a")))
    lr = 0.05 if optimizer == "sgd" else 3e-3
    settings = ImageSettings(hidden=(64,), density=0.5, batch=16, optimizer=optimizer, lr=lr, sparse_lr=lr).settled(60)
    twin = make_sparse(settings, settings.plan, found.shape)
    data = ImageBatches(data=found.train, scale=found.scale(), batch=16, seed=0)
    for _ in range(60):
        twin.train_step(data)
    seen = twin.assess(AllImages(data=found.train, scale=found.scale()))
    assert seen["accuracy"] > 0.9
    assert seen["loss"] == twin.evaluate(AllImages(data=found.train, scale=found.scale()))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"batch": 0}, "batch must be at least 1"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"momentum": 1.0}, "momentum must be below 1"),
        ({"shift": -1}, "shift must not be negative"),
        ({"density": 1.5}, "density"),
        ({"method": "rigll"}, "did you mean 'rigl'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        ImageSettings(**changes)


@pytest.mark.data
@pytest.mark.skipif(not FASHION.is_dir(), reason="needs ../shared/data/fashion-mnist")
def test_fashion_mnist_itself():
    found = load_images(str(FASHION))
    assert found.train.images.shape == (60000, 28, 28) and found.valid.images.shape == (10000, 28, 28)
    assert torch.equal(found.train.labels.bincount(), torch.full((10,), 6000))
    settings = ImageSettings(hidden=(128,), density=0.1, lr=3e-3).settled(200)
    twin = make_sparse(settings, settings.plan, found.shape)
    data = ImageBatches(data=found.train, scale=found.scale(), batch=128, seed=0)
    for _ in range(200):
        twin.train_step(data)
    assert twin.assess(AllImages(data=found.valid, scale=found.scale()))["accuracy"] > 0.75
