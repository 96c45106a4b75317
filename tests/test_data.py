"""Where text comes from, how it is split, what is refused, and which bytes a step sees."""

from __future__ import annotations

import gzip
import lzma
import sys
from pathlib import Path

import pytest
import torch

from rarefy.training.batches import Batches, Windows
from rarefy.training.data import load_corpus
from tiny import write_text

SHARED = Path(__file__).parents[2] / "shared" / "data"


def as_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.tolist())


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix, pack", [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)])
def test_a_file_is_split_by_its_tail(tmp_path, suffix, pack):
    path = tmp_path / f"book.txt{suffix}"
    path.write_bytes(pack("äöü".encode() * 50))
    corpus = load_corpus(str(path))
    assert as_bytes(corpus.train) + as_bytes(corpus.valid) == "äöü".encode() * 50
    assert corpus.valid.numel() == 30
    assert "book.txt" in corpus.source and "last 10%" in corpus.source and "270 and 30 bytes" in corpus.source


def test_a_sibling_called_valid_is_the_validation_text(tmp_path):
    (tmp_path / "train.txt.xz").write_bytes(lzma.compress(b"learn this"))
    (tmp_path / "valid.txt.xz").write_bytes(lzma.compress(b"judge by this"))
    (tmp_path / "test.txt.xz").write_bytes(lzma.compress(b"leave alone"))
    for data in (tmp_path / "train.txt.xz", tmp_path):
        corpus = load_corpus(str(data))
        assert as_bytes(corpus.train) == b"learn this"
        assert as_bytes(corpus.valid) == b"judge by this"
        assert "valid.txt.xz" in corpus.source


def test_a_folder_is_split_by_file(tmp_path):
    for number in range(30):
        folder = tmp_path / f"part{number % 3}"
        folder.mkdir(exist_ok=True)
        (folder / f"{number:02}.txt").write_text(f"<{number:02}>")
    (tmp_path / ".hidden").write_text("never")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")

    corpus = load_corpus(str(tmp_path))

    train, valid = as_bytes(corpus.train).decode(), as_bytes(corpus.valid).decode()
    files = sorted(f"part{number % 3}/<{number:02}>" for number in range(30))
    order = [name.partition("/")[2] for name in files]
    assert sorted([*train.split(">")[:-1], *valid.split(">")[:-1]]) == [f"<{number:02}" for number in range(30)]
    assert len(valid) == 3 * len("<00>")
    assert [piece for piece in order if piece in train] == [piece + ">" for piece in train.split(">")[:-1]]
    assert "1 binary file left out" in corpus.source and "30 files" in corpus.source


def test_the_split_of_a_folder_does_not_depend_on_where_it_is(tmp_path):
    digests = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        for number in range(12):
            (tmp_path / place / f"{number}.txt").write_text(f"text {number}")
        digests.append(load_corpus(str(tmp_path / place)).digest())
    assert digests[0] == digests[1]


def test_a_folder_of_one_file_is_split_by_its_tail(tmp_path):
    write_text(tmp_path / "one.txt", 1000)
    corpus = load_corpus(str(tmp_path))
    assert (corpus.train.numel(), corpus.valid.numel()) == (900, 100)


def test_the_standard_library_is_source_code_without_overlap():
    corpus = load_corpus()
    again = load_corpus()
    train, valid = as_bytes(corpus.train), as_bytes(corpus.valid)
    assert corpus.digest() == again.digest()
    assert b"import" in train and b"import" in valid
    assert 0.02 < len(valid) / len(train) < 0.4
    library = Path(sys.modules["json"].__file__ or "").read_bytes()
    assert (library in train) != (library in valid)
    assert "standard library" in corpus.source


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.txt: there is no such file or folder"):
        load_corpus(str(tmp_path / "nowhere.txt"))


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"empty\.txt is empty"):
        load_corpus(str(tmp_path / "empty.txt"))
    with pytest.raises(ValueError, match="holds no text"):
        load_corpus(str(tmp_path))


def test_what_is_not_utf8_is_named_with_its_offset(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"abc\xe4def")
    for data in (tmp_path, tmp_path / "latin.txt"):
        with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8: byte 0xe4 at offset 3"):
            load_corpus(str(data))


def test_too_little_text_says_how_much_is_needed(tmp_path):
    write_text(tmp_path / "short.txt", 300)
    with pytest.raises(ValueError, match="validation text has 30 bytes, and a context of 64 needs at least 65"):
        load_corpus(str(tmp_path / "short.txt"), context=64)


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_a_damaged_archive_is_refused(tmp_path, suffix):
    (tmp_path / f"bad{suffix}").write_bytes(b"this is no archive")
    with pytest.raises(ValueError, match=rf"bad\{suffix} cannot be read"):
        load_corpus(str(tmp_path / f"bad{suffix}"))


def test_the_hub_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        load_corpus("hf:roneneldan/TinyStories")


def test_a_data_set_of_the_hub_gives_its_text(monkeypatch):
    class Rows:
        def __init__(self, rows: list[str]) -> None:
            self.rows = rows
            self.features = {
                "label": type("Value", (), {"dtype": "int64"}),
                "story": type("Value", (), {"dtype": "string"}),
            }

        def __getitem__(self, column: str) -> list[str]:
            assert column == "story"
            return self.rows

    asked = []

    def load_dataset(*name):
        asked.append(name)
        return {"train": Rows(["once", "upon"]), "validation": Rows(["a time"]), "other": Rows(["x"])}

    monkeypatch.setitem(sys.modules, "datasets", type("datasets", (), {"load_dataset": staticmethod(load_dataset)}))
    corpus = load_corpus("hf:some/thing:small")
    assert asked == [("some/thing", "small")]
    assert (as_bytes(corpus.train), as_bytes(corpus.valid)) == (b"once\nupon", b"a time")


@pytest.mark.data
@pytest.mark.skipif(not (SHARED / "wikitext-2").is_dir(), reason="needs ../shared/data/wikitext-2")
def test_wikitext_comes_with_its_own_validation_text():
    corpus = load_corpus(str(SHARED / "wikitext-2" / "train.txt.xz"))
    assert (corpus.train.numel(), corpus.valid.numel()) == (10_797_148, 1_121_681)
    assert as_bytes(corpus.valid[:40]).startswith(b" \n = Homarus gammarus")


@pytest.mark.data
@pytest.mark.skipif(not (SHARED / "tiny-shakespeare").is_dir(), reason="needs ../shared/data/tiny-shakespeare")
def test_shakespeare_is_split_by_its_tail():
    corpus = load_corpus(str(SHARED / "tiny-shakespeare"))
    assert (corpus.train.numel(), corpus.valid.numel()) == (1_115_394 - 111_539, 111_539)


# -- batches -----------------------------------------------------------------------------------------------------------

TEXT = torch.arange(200, dtype=torch.uint8)


def test_a_step_sees_windows_that_its_number_alone_decides():
    batches = Batches(text=TEXT, context=8, batch=4, seed=5)
    later = Batches(text=TEXT, context=8, batch=4, seed=5)
    for step in (9, 2, 7):  # in any order: nothing is carried from one to the next
        inputs, targets = batches.at(step)
        assert inputs.shape == targets.shape == (4, 8)
        assert torch.equal(targets, inputs + 1)
        assert torch.equal(later.at(step)[0], inputs)
    different = [
        batches.at(3),
        batches.at(4),
        batches.at(3, micro=1),
        Batches(text=TEXT, context=8, batch=4, seed=6).at(3),
    ]
    assert len({tuple(inputs.flatten().tolist()) for inputs, _ in different}) == 4


def test_every_window_can_be_drawn_and_none_leaves_the_text():
    batches = Batches(text=TEXT[:12], context=8, batch=64, seed=0)
    firsts = {int(start) for step in range(1, 5) for start in batches.at(step)[0][:, 0]}
    assert firsts == {0, 1, 2, 3}


@pytest.mark.parametrize("wanted, count", [(1, 1), (40, 5), (10_000, 24)])
def test_an_evaluation_looks_at_the_same_windows_without_overlap(wanted, count):
    windows = Windows(text=TEXT, context=8, batch=3, wanted_bytes=wanted)
    seen = torch.cat([inputs for inputs, _ in windows])
    again = torch.cat([inputs for inputs, _ in windows])
    assert seen.shape == (count, 8) and torch.equal(seen, again)
    assert seen.flatten().unique().numel() == seen.numel()
    assert torch.equal(torch.cat([targets for _, targets in windows]), seen + 1)
