"""`--data hf:NAME`: which columns and splits are read, and what is said when they are not there.

`datasets` itself is not needed: a module of its name stands in for it, with the few things that are used of it.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pictures import CLASSES, pixels_of
from rarefy.cli.main import main
from rarefy.recipes.images import ImageShape, load_images
from tiny import one_thread

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

pil = pytest.importorskip("PIL.Image")


class Image:
    """A feature of that class name."""

    dtype = "PIL.Image.Image"


class ClassLabel:
    """A feature of that class name."""

    dtype = "int64"

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)


class Value:
    """A feature of plain values."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype


class Rows:
    """A split."""

    def __init__(self, features: dict[str, Any], columns: dict[str, list[Any]]) -> None:
        self.features = features
        self._columns = columns

    def __getitem__(self, column: str) -> list[Any]:
        return self._columns[column]


def split(count: int, *, grey: bool = False, names: Sequence[str] = CLASSES, **columns: Any) -> Rows:
    """`count` images of each class, and further columns: name -> (feature, values)."""
    made = [pil.fromarray(one) for label in range(len(CLASSES)) for one in pixels_of(label, count)]
    images = [one.convert("L") for one in made] if grey else made
    labels = [label for label in range(len(CLASSES)) for _ in range(count)]
    more = {name: feature for name, (feature, _) in columns.items()}
    values = {name: listed for name, (_, listed) in columns.items()}
    features = {"image": Image(), "label": ClassLabel(names), **more}
    return Rows(features, {"image": images, "label": labels, **values})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Name -> splits, or an error to raise; under "asked" the arguments of the calls."""
    known: dict[str, Any] = {"asked": []}

    def load_dataset(*given: Any, **named: Any) -> Any:
        known["asked"].append((given, named))
        found = known[given[0]]
        if isinstance(found, Exception):
            raise found
        return found

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    module.__version__ = "4.1.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return known


def test_colour_images_and_the_names_of_their_classes(hub: dict[str, Any]):
    hub["me/stones"] = {"train": split(4), "test": split(2), "unsupervised": None}
    found = load_images("hf:me/stones:small")
    assert hub["asked"] == [(("me/stones", "small"), {})]  # and nothing that would trust its code
    assert found.shape == ImageShape(3, 8, 8, 3) and found.names == CLASSES
    exact = torch.from_numpy(pixels_of(1, 4)).permute(0, 3, 1, 2)
    assert torch.equal(found.train.images[4:8], exact)
    assert found.valid.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert found.source == "hf:me/stones:small, judged by its split test (12 and 6 images)"


def test_grey_images_have_one_channel(hub: dict[str, Any]):
    hub["grey"] = {"train": split(4, grey=True), "validation": split(2, grey=True)}
    found = load_images("hf:grey")
    assert found.shape == ImageShape(1, 8, 8, 3) and found.train.images.shape == (12, 8, 8)
    exact = np.asarray(pil.fromarray(pixels_of(0, 4)[0]).convert("L"))
    assert np.array_equal(found.train.images[0].numpy(), exact)


def test_columns_by_their_usual_names_or_as_told(hub: dict[str, Any]):
    coarse = (ClassLabel(["rock", "metal"]), [1] * 12)
    mask = (Image(), [pil.new("L", (2, 2))] * 12)
    parts = {"train": split(4, coarse_label=coarse, mask=mask), "test": split(4, coarse_label=coarse, mask=mask)}
    hub["two"] = parts
    assert load_images("hf:two").names == CLASSES
    told = load_images("hf:two", image_column="mask", label_column="coarse_label")
    assert told.names == ("rock", "metal") and told.shape == ImageShape(1, 2, 2, 2)
    for said, given in (
        (
            "has no column 'lable' \\(--label-column\\); it has: image, label, coarse_label, mask",
            {"label_column": "lable"},
        ),
        ("column 'mask' holds no labels; these do: label, coarse_label", {"label_column": "mask"}),
        ("column 'label' holds no images; these do: image, mask", {"image_column": "label"}),
    ):
        with pytest.raises(ValueError, match=said):
            load_images("hf:two", **given)


def test_columns_that_are_not_there_or_not_told_apart(hub: dict[str, Any]):
    rows = split(2)
    for features, said in (
        (
            {"label": rows.features["label"], "text": Value("string")},
            "no column of images; --image-column names one of: ",
        ),
        ({"image": Image(), "text": Value("string")}, "no column of labels; --label-column names one of: image, text"),
        (
            {"image": Image(), "id": Value("int64"), "kind": Value("string")},
            "no column of labels; --label-column names one of: image, id, kind",
        ),
        (
            {"image": Image(), "id": Value("int64"), "fine": ClassLabel("ab"), "coarse": ClassLabel("ab")},
            r"several columns of labels \(fine, coarse\): say which; --label-column",
        ),
    ):
        hub["odd"] = {"train": Rows(features, {}), "test": Rows(features, {})}
        with pytest.raises(ValueError, match=said):
            load_images("hf:odd")


def test_plain_integers_are_labels_too(hub: dict[str, Any]):
    rows = split(2)
    rows.features["label"] = Value("int64")
    hub["plain"] = {"train": rows, "test": rows}
    assert load_images("hf:plain").names == ("0", "1", "2")
    only = split(2)
    only.features = {"image": Image(), "id": Value("int64"), "kind": ClassLabel(CLASSES)}
    only._columns = {"image": only["image"], "id": list(range(6)), "kind": only["label"]}
    hub["only"] = {"train": only, "test": only}
    assert load_images("hf:only").names == CLASSES  # and not the ids
    assert load_images("hf:only", label_column="id").classes == 6


def test_what_is_wrong_with_a_data_set_is_said(hub: dict[str, Any]):
    large, grey_first = split(2), split(2, grey=True)
    large["image"][3] = pil.new("RGB", (9, 7))
    grey_first["image"][2] = pil.new("RGB", (8, 8))
    hidden = split(2)
    hidden["label"][:] = [-1] * 6
    for data, said in (
        ({"train": split(2)}, "should have a split train and one of test, validation, valid, val"),
        ({"test": split(2)}, "should have a split train"),
        ({"train": large, "test": split(2)}, "hf:odd, train: image 3 has 9 x 7 pixels, and those before it 8 x 8"),
        (
            {"train": grey_first, "test": split(2)},
            r"train: image 2 has colours \(mode RGB\), and those before it are grey",
        ),
        ({"train": split(2), "test": hidden}, "hf:odd, test: label -1 of image 0, and labels are 0 to 2"),
        ({"train": split(0), "test": split(2)}, "hf:odd, train holds no image"),
        (
            {"train": split(2), "test": split(2, grey=True)},
            r"training images have \(3, 8, 8\) pixels and those of test",
        ),
        (RuntimeError("Dataset scripts are no longer supported"), "could not be loaded: Dataset scripts are no longer"),
        (
            ConnectionError("Couldn't reach 'odd' on the Hub (LocalEntryNotFoundError)"),
            r"it is not in the cache, and the hub cannot be reached \(Couldn't reach",
        ),
    ):
        hub["odd"] = data
        with pytest.raises(ValueError, match=said):
            load_images("hf:odd")


def test_without_the_package_it_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="--data hf:mnist needs the datasets package: pip install datasets"):
        load_images("hf:mnist")


def test_a_package_that_would_run_code_is_refused(hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules["datasets"], "__version__", "2.19.0")
    with pytest.raises(
        ValueError, match=r"datasets 4 or newer, which runs no code of a data set; 2\.19\.0 is installed"
    ):
        load_images("hf:mnist")


def test_columns_are_for_data_sets_of_the_hub(tmp_path: Path):
    with pytest.raises(ValueError, match="a folder has no columns"):
        load_images(str(tmp_path), image_column="image")


def test_a_run_from_the_hub(hub: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    hub["stones"] = {"train": split(16), "test": split(4)}
    given = ["--data", "hf:stones", "--run", str(tmp_path / "run"), "--steps", "4", "--batch", "12", "--depth", "10"]
    common = ["--width", "0.5", "--no-twin", "--no-measure", "--no-report", "--threads", "1"]
    assert main(["train", "images", *given, *common]) == 0
    assert "hf:stones, judged by its split test" in capsys.readouterr().out
    (tmp_path / "run" / "summary.json").unlink()
    assert main(["train", "images", "--resume", str(tmp_path / "run"), "--no-report"]) == 0


def test_datasets_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where the real package is: a folder of pictures, which it reads as a data set, without the hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    pytest.importorskip("datasets")
    from pictures import write_pictures

    folder = write_pictures(tmp_path / "set")
    found = load_images(f"hf:{folder}")
    assert found.names == CLASSES
    again = load_images(str(folder))
    assert torch.equal(found.train.images, again.train.images) and torch.equal(found.valid.labels, again.valid.labels)
