"""CIFAR-10 and folders of pictures: what is read, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rarefy.recipes.images import ImageBatches, ImageShape, load_images
from rarefy.recipes.images.data import Labelled

CIFAR = Path(__file__).parents[2] / "shared" / "data" / "cifar-10"


def write_binary(folder: Path, *, labels: int = 10) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for at in [*range(1, 6), 0]:
        records = rng.integers(256, size=(4, 3073), dtype=np.uint8)
        records[:, 0] = rng.integers(labels, size=4)
        records.tofile(folder / (f"data_batch_{at}.bin" if at else "test_batch.bin"))
    return folder


def write_pictures(folder: Path, size: tuple[int, int] = (6, 5)) -> Path:
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for part, count in (("train", 5), ("valid", 2)):
        for name in ("cat", "dog", "owl"):
            (folder / part / name).mkdir(parents=True)
            for at in range(count):
                pixels = rng.integers(256, size=(*size, 3), dtype=np.uint8)
                image.fromarray(pixels).save(folder / part / name / f"{at}.png")
    return folder


def test_the_binary_version_of_cifar(tmp_path):
    folder = write_binary(tmp_path / "cifar")
    found = load_images(str(folder))
    assert found.shape == ImageShape(3, 32, 32, 10)
    assert found.train.images.shape == (20, 3, 32, 32) and found.valid.images.shape == (4, 3, 32, 32)
    raw = (folder / "data_batch_2.bin").read_bytes()
    assert found.train.labels[4] == raw[0]
    assert bytes(found.train.images[4].flatten().tolist()) == raw[1:3073]


def test_a_wrong_binary_file_names_itself_and_the_offset(tmp_path):
    folder = write_binary(tmp_path / "cifar")
    path = folder / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:7000])
    with pytest.raises(ValueError, match=r"batch_3.bin ends at offset 7,000, inside the record that begins at 6,146"):
        load_images(str(folder))
    path.unlink()
    with pytest.raises(ValueError, match=r"data_batch_3.bin cannot be read"):
        load_images(str(folder))


def test_a_label_out_of_range_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"label \d+ of image \d+, and labels are 0 to 9"):
        load_images(str(write_binary(tmp_path / "cifar", labels=200)))


def test_a_folder_of_pictures(tmp_path):
    found = load_images(str(write_pictures(tmp_path / "a")))
    assert found.shape == ImageShape(3, 6, 5, 3) and found.train.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    image = pytest.importorskip("PIL.Image")
    exact = np.asarray(image.open(tmp_path / "a" / "train" / "dog" / "3.png"))
    assert np.array_equal(found.train.images[8].permute(1, 2, 0).numpy(), exact)


def test_wrong_folders_of_pictures(tmp_path):
    folder = write_pictures(tmp_path / "a")
    truncated = folder / "train" / "owl" / "2.png"
    whole = truncated.read_bytes()
    truncated.write_bytes(whole[:60])
    with pytest.raises(ValueError, match=r"2.png cannot be read as a picture"):
        load_images(str(folder))
    truncated.write_bytes(whole)
    pytest.importorskip("PIL.Image").new("RGB", (9, 9)).save(truncated)
    with pytest.raises(ValueError, match=r"2\.png has 9 x 9 pixels, and those before it 5 x 6"):
        load_images(str(folder))
    truncated.write_bytes(whole)
    (folder / "valid" / "fox").mkdir()
    with pytest.raises(ValueError, match="has a class 'fox', which train does not have"):
        load_images(str(folder))
    (folder / "valid" / "fox").rmdir()
    for path in (folder / "valid" / "cat").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="cat has no picture"):
        load_images(str(folder))


def test_what_is_no_picture_is_refused_unless_systems_leave_it(tmp_path):
    folder = write_pictures(tmp_path / "a")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (folder / "train" / "cat" / name).write_bytes(b"x")
    assert len(load_images(str(folder)).train.labels) == 15
    notes = folder / "train" / "cat" / "notes.txt"
    notes.write_text("a tabby")
    with pytest.raises(ValueError, match=r"notes\.txt is no picture by its name, and .*cat should hold pictures alone"):
        load_images(str(folder))
    notes.unlink()
    (folder / "valid" / "owl" / "barn").mkdir()
    with pytest.raises(ValueError, match=r"owl/barn is a folder, and .*owl should hold pictures alone"):
        load_images(str(folder))
    (folder / "valid" / "owl" / "barn").rmdir()
    (folder / "valid" / "owl" / "text.png").write_text("not a picture")
    with pytest.raises(ValueError, match=r"text\.png cannot be read as a picture"):
        load_images(str(folder))


def test_a_folder_without_held_out_pictures_or_classes(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="none of test, valid, val"):
        load_images(str(tmp_path))
    (tmp_path / "test").mkdir()
    with pytest.raises(ValueError, match="a folder of pictures for each class, and has 0"):
        load_images(str(tmp_path))


def test_colour_images_are_moved_as_a_whole():
    images = torch.randint(1, 256, (10, 3, 4, 5), dtype=torch.uint8)
    data = Labelled(images, torch.arange(10))
    plain = ImageBatches(data=data, scale=(0.0, 1 / 255), batch=10, seed=0).at(1)[0]
    moved = ImageBatches(data=data, scale=(0.0, 1 / 255), batch=10, seed=0, shift=1, flip=True).at(1)[0]
    for image, after in zip(plain, moved, strict=True):
        possible = []
        for mirrored in (image, image.flip(2)):
            padded = torch.nn.functional.pad(mirrored, (1, 1, 1, 1))
            possible += [padded[:, y : y + 4, x : x + 5] for y in range(3) for x in range(3)]
        assert any(torch.equal(after, one) for one in possible)


@pytest.mark.data
@pytest.mark.skipif(not CIFAR.is_dir(), reason="the CIFAR-10 sheets are not here")
def test_the_real_cifar():
    pytest.importorskip("PIL.Image")
    found = load_images(str(CIFAR))
    assert found.shape == ImageShape(3, 32, 32, 10)
    assert len(found.train.labels) == 50_000 and len(found.valid.labels) == 10_000
    assert torch.bincount(found.train.labels).tolist() == [5000] * 10
    means = found.train.images.float().mean(dim=(0, 2, 3)) / 255
    torch.testing.assert_close(means, torch.tensor([0.4914, 0.4822, 0.4465]), atol=5e-4, rtol=0)


def test_damaged_sheets(tmp_path):
    pytest.importorskip("PIL.Image")
    (tmp_path / "labels.npz").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(ValueError, match=r"labels.npz holds no array 'train'"):
        load_images(str(tmp_path))
    np.savez(tmp_path / "labels.npz", train=np.zeros(5, np.uint8), test=np.zeros(5, np.uint8))
    with pytest.raises(ValueError, match=r"has 0 sheets train_\*\.webp"):
        load_images(str(tmp_path))
    (tmp_path / "train_00.webp").write_bytes(b"RIFF")
    with pytest.raises(ValueError, match=r"train_00\.webp cannot be read as a picture"):
        load_images(str(tmp_path))
    pytest.importorskip("PIL.Image").new("RGB", (64, 32)).save(tmp_path / "train_00.webp")
    with pytest.raises(ValueError, match="should be a picture of 3200 x 1600 pixels, and is 64 x 32"):
        load_images(str(tmp_path))
