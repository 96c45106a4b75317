"""`rarefy train images`: what people type, what a run leaves, that it resumes bit for bit, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import rarefy
from pictures import CLASSES, pixels_of, write_pictures
from rarefy.cli.main import main
from rarefy.cli.options import parse
from rarefy.cli.train import Images
from rarefy.recipes.images import ImagesTask, load_classifier
from rarefy.recipes.text import load_network
from tiny import flags, one_thread, records, start, write_images, write_text

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

DATA = Path(__file__).parents[2] / "shared" / "data"

CLOCKED = {"train_s", "tokens_per_s", "seconds"}
"""Fields of records that follow the clock."""

NETWORK = ["--model", "wrn", "--depth", "10", "--width", "0.5", "--density", "0.3", "--batch", "12", "--lr", "0.01"]


def arguments(data: Path, run: Path, *more: str, steps: int | None = 24) -> list[str]:
    given = ["train", "images", "--data", str(data), "--run", str(run), "--no-report", "--no-measure", "--threads", "1"]
    return [*given, *(["--steps", str(steps)] if steps else []), *more]


def failure(capsys: pytest.CaptureFixture[str], given: list[str]) -> str:
    """What a command that cannot be carried out says, in one line, with exit status 2."""
    assert main(given) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("rarefy: ") and "warning" not in line]
    return line


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures") / "set")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """A convolutional run that went to its end."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    threads = torch.get_num_threads()
    assert main(arguments(pictures, folder, *NETWORK, "--interval", "4", "--report", "--eval-images", "10")) == 0
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an mlp on grey images, sparse layers alone."""
    folder = tmp_path_factory.mktemp("plain")
    data = write_images(folder / "set")
    threads = torch.get_num_threads()
    given = ["--hidden", "32", "--density", "0.3", "--batch", "16", "--lr", "0.01", "--no-twin", "--method", "set"]
    assert main(arguments(data, folder / "run", *given, "--interval", "4", "--report", steps=60)) == 0
    torch.set_num_threads(threads)
    return folder / "run"


# -- a run ---------------------------------------------------------------------------------------------------------


def test_a_run_leaves_what_it_should(finished: Path):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "run.yaml", "plan.json", "metrics.jsonl", "summary.json", "images.json", "latest.json", "model.safetensors",
        "report.html", "checkpoint-sparse-24.safetensors", "checkpoint-dense-24.safetensors",
    }  # fmt: skip
    run = records(finished)[0]
    assert run["task"] == "images" and run["settings"]["steps"] == 24
    assert run["images"]["names"] == list(CLASSES) and run["images"]["classes"] == 3
    sparse, dense = run["twins"]
    assert sparse["parameters"] == dense["parameters"] == dense["nonzeros"] > sparse["nonzeros"]
    assert sparse["flops_per_token"] < dense["flops_per_token"]
    saved = rarefy.load(finished / "model.safetensors")
    assert isinstance(saved["groups.0.0.conv1.pattern"], rarefy.Pattern)


def test_the_log_has_accuracies_and_no_bits(finished: Path):
    for record in records(finished):
        assert "bits_per_byte" not in record
        assert ("accuracy" in record) == (record["kind"] == "eval")
    last = [record for record in records(finished, "train") if record["twin"] == "sparse"][-1]
    assert last["tokens"] == 24 * 12
    for record in records(finished, "eval"):
        assert record["accuracy"] * 10 == pytest.approx(round(record["accuracy"] * 10), abs=1e-5)  # --eval-images 10


def test_the_summary_has_both_networks_and_the_comparison(finished: Path):
    summary = json.loads((finished / "summary.json").read_text())
    for twin in ("sparse", "dense"):
        found = [record for record in records(finished, "eval") if record["twin"] == twin]
        assert summary["twins"][twin]["accuracy"] == found[-1]["accuracy"]
        assert summary["at_equal_steps"]["accuracy"][twin] == found[-1]["accuracy"]
    assert "accuracy" in summary["verdict"]


def test_networks_learn(finished: Path, plain: Path):
    for folder in (finished, plain):
        for twin in json.loads((folder / "images.json").read_text())["twins"].values():
            confusion = torch.tensor(twin["confusion"])
            assert confusion.diagonal().sum() / confusion.sum() > 0.7


def test_what_was_found_is_what_the_networks_say(finished: Path, pictures: Path):
    found = json.loads((finished / "images.json").read_text())
    task = ImagesTask(parse(Images, ["--data", str(pictures), *NETWORK], prog="").settings())  # type: ignore[arg-type]
    _, valid = task.feed(task.base)
    images, labels = next(iter(valid))
    for name, twin in found["twins"].items():
        predicted = load_classifier(finished, name).model(images).argmax(1)
        exact = torch.zeros(3, 3, dtype=torch.int64)
        for label, guess in zip(labels.tolist(), predicted.tolist(), strict=True):
            exact[label, guess] += 1
        assert twin["confusion"] == exact.tolist()
        assert len(twin["wrong"]) == int(exact.sum() - exact.diagonal().sum())
        for one in twin["wrong"]:
            assert int(labels[one["image"]]) == one["true"] and int(predicted[one["image"]]) == one["predicted"]
    layers = rarefy.load(finished / "model.safetensors")
    for layer in found["twins"]["sparse"]["layers"]:
        pattern = layers[f"{layer['name']}.pattern"]
        assert isinstance(pattern, rarefy.Pattern) and layer["density"] == pytest.approx(pattern.density)
        if "taps" in layer:
            assert torch.tensor(layer["taps"]).sum() == pattern.nnz
            mask = pattern.to_mask().view(pattern.shape[0], -1, 3, 3)
            assert layer["taps"] == mask.sum((0, 1)).tolist()
    start = found["twins"]["sparse"]["start"]["layers"]
    assert [layer["name"] for layer in start] == [layer["name"] for layer in found["twins"]["sparse"]["layers"]]
    assert found["twins"]["sparse"]["first_layer"]["shape"] == [16, 3, 3, 3]
    assert found["twins"]["dense"]["layers"] == []


def test_what_an_mlp_reads_is_counted_by_pixel(plain: Path):
    twin = json.loads((plain / "images.json").read_text())["twins"]["sparse"]
    pattern = rarefy.load(plain / "model.safetensors")["layers.0.pattern"]
    assert isinstance(pattern, rarefy.Pattern)
    assert twin["inputs"] == pattern.to_mask().sum(0).view(6, 6).tolist()
    assert twin["start"]["inputs"] != twin["inputs"]
    assert torch.tensor(twin["start"]["inputs"]).sum() == torch.tensor(twin["inputs"]).sum()
    assert twin["first_layer"] is None


def test_the_screen_speaks_of_images(capsys: pytest.CaptureFixture[str], tmp_path: Path, pictures: Path):
    assert main(arguments(pictures, tmp_path / "run", *NETWORK, steps=6)) == 0
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if line.startswith("step 6/6")]
    assert "images/s" in line and "% " in line and "accuracy" in line and "bits" not in line
    for row in ("accuracy at equal time", "accuracy at equal steps", "images per second", "nonzeros"):
        assert row in said
    assert "on all 15 validation images:" in said and "load_classifier(" in said and "% right" in said


def test_json_alone_goes_to_stdout(capsys: pytest.CaptureFixture[str], tmp_path: Path, pictures: Path):
    assert main(arguments(pictures, tmp_path / "run", *NETWORK, "--no-twin", "--json", steps=4)) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["twins"]) == ["sparse"] and 0 <= result["twins"]["sparse"]["accuracy"] <= 1


def test_a_settings_file_and_a_plan_file(tmp_path: Path, pictures: Path):
    plan = {"density": 0.4, "method": {"name": "set", "interval": 3}, "keep_dense": ["head", "stem"]}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    network = ["--depth", "10", "--width", "0.5", "--batch", "12"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(arguments(pictures, first, *network, "--plan", str(tmp_path / "plan.yaml"), "--no-twin", steps=4)) == 0
    rows = {row["name"]: row for row in json.loads((first / "plan.json").read_text())["layers"]}
    assert rows["stem"]["kind"] == "dense" and rows["groups.0.0.conv1"]["kind"] == "sparse"
    again = ["train", "images", "--config", str(first / "run.yaml"), "--run", str(second), "--no-report"]
    assert main(again) == 0
    name = "checkpoint-sparse-4.safetensors"
    assert (first / name).read_bytes() == (second / name).read_bytes()


def test_minutes_become_steps(tmp_path: Path, pictures: Path):
    assert main(arguments(pictures, tmp_path / "run", *NETWORK, "--minutes", "0.12", steps=None)) == 0
    saved = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert saved["minutes"] is None and saved["steps"] > 1
    assert {record["step"] for record in records(tmp_path / "run", "end")} == {saved["steps"]}


@pytest.mark.parametrize("optimizer", ["rarefy", "torch", "sgd"])
def test_every_recipe_setting_reaches_the_run(tmp_path: Path, pictures: Path, optimizer: str):
    more = ["--optimizer", optimizer, "--shift", "1", "--flip", "--label-smoothing", "0.1", "--momentum", "0.8"]
    assert main(arguments(pictures, tmp_path / "run", *NETWORK, *more, "--block", "2", steps=3)) == 0
    said = records(tmp_path / "run")[0]["settings"]
    assert (said["optimizer"], said["shift"], said["flip"], said["label_smoothing"]) == (optimizer, 1, True, 0.1)


# -- going on ------------------------------------------------------------------------------------------------------


def unclocked(folder: Path, twin: str) -> list[dict[str, Any]]:
    mine = [record for record in records(folder) if record.get("twin") == twin and record["kind"] != "time"]
    return [{name: value for name, value in record.items() if name not in CLOCKED} for record in mine]


def assert_same_run(folder: Path, straight: Path, twins: tuple[str, ...], steps: int) -> None:
    for twin in twins:
        name = f"checkpoint-{twin}-{steps}.safetensors"
        assert (folder / name).read_bytes() == (straight / name).read_bytes()
        assert unclocked(folder, twin) == unclocked(straight, twin)
    for name in ("images.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (straight / name).read_bytes()


@pytest.mark.parametrize(
    "more, twins",
    [
        (("--method", "rigl", "--shift", "2", "--flip"), ("sparse", "dense")),
        (("--method", "granet", "--no-twin", "--optimizer", "sgd"), ("sparse",)),
    ],
    ids=["rigl", "granet"],
)
def test_rule_9_1_a_killed_run_resumes_bit_for_bit(tmp_path: Path, pictures: Path, more: tuple[str, ...], twins):
    given = [*NETWORK, "--interval", "4", "--checkpoint-s", "0", "--seed", "3", *more]
    straight, folder = tmp_path / "straight", tmp_path / "run"
    assert main(arguments(pictures, straight, *given, steps=40)) == 0
    process = start(arguments(pictures, folder, *given, steps=40), tmp_path)
    while not (folder / "metrics.jsonl").is_file() or '"step": 17,' not in (folder / "metrics.jsonl").read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert 0 < json.loads((folder / "latest.json").read_text())["twins"]["sparse"]["step"] < 40
    assert not (folder / "images.json").exists()
    assert main(["train", "images", "--resume", str(folder), "--no-report"]) == 0
    assert_same_run(folder, straight, twins, 40)


def test_control_c_says_how_to_go_on(tmp_path: Path, pictures: Path):
    process = start(arguments(pictures, tmp_path / "run", *NETWORK, "--checkpoint-s", "0", steps=4000), tmp_path)
    while not (tmp_path / "run" / "latest.json").is_file():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"rarefy train images --resume {tmp_path / 'run'}" in out + err


@pytest.fixture
def half(tmp_path: Path, finished: Path) -> Path:
    """A run whose end has not been written yet."""
    shutil.copytree(finished, tmp_path / "half")
    for name in ("summary.json", "images.json", "report.html"):
        (tmp_path / "half" / name).unlink()
    return tmp_path / "half"


def test_other_images_are_refused(capsys: pytest.CaptureFixture[str], half: Path, tmp_path: Path):
    other = write_pictures(tmp_path / "other", seed=5)
    settings = yaml.safe_load((half / "run.yaml").read_text())
    (half / "run.yaml").write_text(yaml.safe_dump({**settings, "data": str(other)}))
    assert "the images are not what" in failure(capsys, ["train", "images", "--resume", str(half)])


def test_other_settings_are_refused(capsys: pytest.CaptureFixture[str], half: Path):
    said = failure(capsys, ["train", "images", "--resume", str(half), "--batch", "6"])
    assert "batch 12, and 6" in said
    assert "24 steps, and its schedules depend" in failure(
        capsys, ["train", "images", "--resume", str(half), "--steps", "30"]
    )


def test_a_run_of_something_else_is_refused(capsys: pytest.CaptureFixture[str], half: Path, tmp_path: Path):
    text = write_text(tmp_path / "text.txt")
    assert main(flags(text, "--run", str(tmp_path / "text"), steps=2)) == 0
    capsys.readouterr()
    said = failure(capsys, ["train", "text", "--resume", str(half)])
    assert "is a run of rarefy train images" in said
    said = failure(capsys, ["train", "images", "--resume", str(tmp_path / "text")])
    assert "is a run of rarefy train text" in said
    with pytest.raises(ValueError, match="is a run of rarefy train images, and one of text is needed"):
        load_network(half)
    with pytest.raises(ValueError, match="is a run of rarefy train text, and one of images is needed"):
        load_classifier(tmp_path / "text")
    said = failure(capsys, ["train", "images", "--resume", str(tmp_path / "nowhere")])
    assert "rarefy train images --run" in said


def test_a_loss_that_is_no_number_says_what_to_try(capsys: pytest.CaptureFixture[str], tmp_path: Path, plain: Path):
    data = write_images(tmp_path / "set")
    given = ["--hidden", "32", "--batch", "16", "--lr", "1e30", "--clip", "0"]
    said = failure(capsys, arguments(data, tmp_path / "run", *given))
    assert "lower --lr" in said and "at step" in said


# -- using it ------------------------------------------------------------------------------------------------------


def test_a_classifier_names_classes(finished: Path):
    classifier = load_classifier(finished)
    assert classifier.names == CLASSES and not classifier.model.training
    right = 0
    for label, name in enumerate(CLASSES):
        pixels = torch.from_numpy(pixels_of(label, 10, seed=9)).permute(0, 3, 1, 2)
        right += classifier(pixels).count(name)
    assert right > 20
    with pytest.raises(ValueError, match=r"uint8 of shape \(N, 3, 8, 8\), as in training; got float32"):
        classifier(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match="has no other network"):
        load_classifier(finished, "other")


def test_an_export_is_the_same_network(finished: Path, tmp_path: Path):
    assert main(["export", str(finished), "--to", "dense", "--out", str(tmp_path / "dense.safetensors")]) == 0
    dense = rarefy.load(tmp_path / "dense.safetensors")
    assert "groups.0.0.conv1.weight" in dense


def test_the_snippet_of_the_docs_runs(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """The block below "Use a network" of docs/images.md, with a run and a picture where it says they are."""
    image = pytest.importorskip("PIL.Image")
    docs = (Path(__file__).parents[1] / "docs" / "images.md").read_text()
    code = docs.split("## Use a network")[1].split("```python")[1].partition("\n")[2].split("```")[0]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "runs" / "mine")
    image.fromarray(pixels_of(1, 1, seed=3)[0]).save(tmp_path / "picture.png")
    exec(compile(code, "docs/images.md", "exec"), {})
    assert capsys.readouterr().out.strip() in {f"['{name}']" for name in CLASSES}


# -- real data -----------------------------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "fashion-mnist").is_dir(), reason="needs ../shared/data/fashion-mnist")
def test_fashion_mnist_itself(tmp_path: Path):
    given = ["--hidden", "128", "--density", "0.1", "--lr", "3e-3", "--no-twin", "--report"]
    assert main(arguments(DATA / "fashion-mnist", tmp_path / "run", *given, steps=200)) == 0
    found = json.loads((tmp_path / "run" / "images.json").read_text())
    confusion = torch.tensor(found["twins"]["sparse"]["confusion"])
    assert confusion.sum(1).tolist() == [1000] * 10
    assert confusion.diagonal().sum() > 7500
    assert found["names"][9] == "Ankle boot"
    inputs = torch.tensor(found["twins"]["sparse"]["inputs"])
    assert inputs.shape == (28, 28)
    assert "Ankle boot" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "cifar-10").is_dir(), reason="needs ../shared/data/cifar-10")
def test_cifar_itself(tmp_path: Path):
    pytest.importorskip("PIL.Image")
    given = ["--depth", "10", "--no-twin", "--lr", "3e-3", "--report"]
    assert main(arguments(DATA / "cifar-10", tmp_path / "run", *given, steps=60)) == 0
    settings = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert (settings["model"], settings["shift"], settings["flip"], settings["plan"]["density"]) == (
        "wrn",
        4,
        True,
        0.1,
    )
    found = json.loads((tmp_path / "run" / "images.json").read_text())
    confusion = torch.tensor(found["twins"]["sparse"]["confusion"])
    assert confusion.sum(1).tolist() == [1000] * 10
    assert confusion.diagonal().sum() / confusion.sum() > 0.2  # chance is a tenth
    last = records(tmp_path / "run", "eval")[-1]["accuracy"]
    exact = float(confusion.diagonal().sum() / confusion.sum())
    assert abs(last - exact) < 4 * math.sqrt(exact * (1 - exact) / 2000)  # of 2,000 images, drawn at random
