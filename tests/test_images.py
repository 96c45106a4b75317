"""Images: IDX files and what is wrong with them, batches, the MLP, and the recipe."""

from __future__ import annotations

import gzip
import lzma
import math
import struct
from pathlib import Path

import pytest
import torch

from rarefy.compare.contenders import parse_contender
from rarefy.compare.jobs import make_job
from rarefy.models import MLP, MLPConfig
from rarefy.plan import Plan
from rarefy.recipes.images import (
    AllImages,
    ImageBatches,
    ImageSettings,
    ImageShape,
    ImagesTask,
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


# -- what follows from the images --------------------------------------------------------------------------------------


def test_colour_images_get_a_convolutional_network_and_explicit_options_win():
    colour, grey = ImageShape(3, 32, 32), ImageShape(1, 28, 28)
    found = ImageSettings().for_images(colour)
    plan = found.folded_plan()
    assert (found.model, found.shift, found.flip, plan.density) == ("wrn", 4, True, 0.1)
    assert type(plan.method).__name__ == "SET" and plan.keep_dense == ("head",)
    plain = ImageSettings().for_images(grey)
    assert (plain.model, plain.shift, plain.flip, plain.folded_plan().density) == ("mlp", 0, False, 0.02)
    assert type(plain.folded_plan().method).__name__ == "RigL"
    told = ImageSettings(model="mlp", shift=0, flip=False, density=0.3, method="rigl").for_images(colour)
    assert (told.model, told.shift, told.flip, told.folded_plan().density) == ("mlp", 0, False, 0.3)
    assert type(told.folded_plan().method).__name__ == "RigL"
    planned = ImageSettings(model="wrn", plan=Plan(density=0.5)).for_images(colour)
    assert planned.folded_plan().density == 0.5
    settled = found.settled(100)
    assert settled.for_images(colour) == settled and settled.settled(100) == settled


@pytest.mark.parametrize(
    "changes, image, said",
    [
        ({"shift": 6}, ImageShape(1, 6, 6), r"shift must be less than the images' 6 x 6 pixels.*got 6"),
        ({"model": "wrn", "batch": 1}, ImageShape(3, 4, 4), "a single number per channel in batches of 1"),
        ({"model": "resnet", "batch": 1}, ImageShape(3, 8, 8), "larger --batch, larger images, or --model mlp"),
    ],
)
def test_images_too_small_are_refused(changes, image, said):
    with pytest.raises(ValueError, match=said):
        ImageSettings(**changes).for_images(image)


@pytest.mark.parametrize("model, batch", [("wrn", 2), ("resnet", 2), ("wrn", 1)])
def test_images_that_are_just_large_enough_train(model, batch):
    side = {("wrn", 2): 1, ("resnet", 2): 1, ("wrn", 1): 5}[model, batch]
    image = ImageShape(3, side, side)
    settings = ImageSettings(model=model, depth=10, width=0.25, blocks=(1, 1), batch=batch, shift=0).for_images(image)
    data = Labelled(torch.randint(256, (4, 3, side, side), dtype=torch.uint8), torch.arange(4))
    twin = make_dense(settings.settled(4), image)
    result = twin.train_step(ImageBatches(data=data, scale=(0.5, 0.25), batch=batch, seed=0))
    assert math.isfinite(result.loss)


def test_some_of_the_images_are_drawn_once_and_for_all():
    data = Labelled(torch.zeros(1000, 2, 2, dtype=torch.uint8), torch.arange(1000) % 10)
    whole = AllImages(data=data, scale=(0.0, 1.0))
    assert torch.equal(torch.cat([labels for _, labels in whole]), data.labels)
    some = AllImages(data=data, scale=(0.0, 1.0), wanted=200)
    (_, labels), (_, again) = next(iter(some)), next(iter(some))
    assert some.count == len(labels) == 200 and torch.equal(labels, again)
    assert labels.bincount(minlength=10).min() > 5  # evenly spaced ones would be of two classes
    assert AllImages(data=data, scale=(0.0, 1.0), wanted=5000).count == 1000


def test_large_images_are_looked_at_few_at_a_time():
    data = Labelled(torch.zeros(7, 3, 1024, 1024, dtype=torch.uint8)[:, :, ::2, ::2], torch.arange(7))
    assert [len(labels) for _, labels in AllImages(data=data, scale=(0.0, 1.0))] == [3, 3, 1]


def test_names_of_classes(tmp_path):
    folder = write_images(tmp_path / "a")
    assert load_images(str(folder)).names == tuple("0123456789")
    names = [f"class {n}" for n in range(10)]
    (folder / "classes.txt").write_text("\n".join(names) + "\n")
    assert load_images(str(folder)).names == tuple(names)
    (folder / "classes.txt").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match=r"classes\.txt should name 10 classes, a line each, and names 2"):
        load_images(str(folder))


def test_a_folder_of_no_layout_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the folder holds no images of a layout that is known: the files of MNIST"):
        load_images(str(tmp_path))
    (tmp_path / "cat.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="pictures as train/CLASS"):
        load_images(str(tmp_path))


def test_parts_of_different_shapes_are_refused(tmp_path):
    folder = write_images(tmp_path / "a")
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx(bytes(20 * 5 * 6), 20, 5, 6))
    with pytest.raises(ValueError, match=r"training images have \(6, 6\) pixels and those of t10k \(5, 6\)"):
        load_images(str(folder))
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx(b"", 0, 6, 6))
    with pytest.raises(ValueError, match="should hold images x rows x columns"):
        load_images(str(folder))


def test_a_batch_larger_than_the_training_set_is_refused(tmp_path):
    folder = write_images(tmp_path / "a")
    with pytest.raises(ValueError, match="batch must be at most the 64 training images, got 65"):
        ImagesTask(ImageSettings(data=str(folder), batch=65))


def test_both_ways_to_train_fill_in_the_same(tmp_path):
    """A comparison's runs are named by what defines them, said or not."""
    folder = str(write_images(tmp_path / "a"))
    said = ImagesTask(ImageSettings(data=folder, batch=16, model="mlp", shift=0, flip=False))
    unsaid = ImagesTask(ImageSettings(data=folder, batch=16))
    assert said.base == unsaid.base
    contender = [make_job(task, parse_contender("set", task), 0, 20).digest for task in (said, unsaid)]
    assert contender[0] == contender[1]
