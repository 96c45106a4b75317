"""The report of runs of images: what it shows, what it survives, what it refuses to compare."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import check_report  # pyright: ignore[reportMissingImports]  (tools/, which pytest puts on the path)
from pictures import CLASSES, write_pictures
from rarefy.cli.main import main
from rarefy.report import build_report
from rarefy.report.compare import Contender, contenders, reading, steps_sentence, verdict
from rarefy.report.courses import courses
from rarefy.report.figures import all_figures
from rarefy.report.image_figures import filters, image_figures, mistakes
from rarefy.report.plots import Figure, gain_range
from rarefy.report.png import data_uri
from rarefy.report.read import Run, Twin, read_run
from rarefy.training.subject import ACCURACY, BITS_PER_BYTE, IMAGES, TEXT, subject_of
from run_folder import write_run
from tiny import one_thread, write_images

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

COMMON = ["--no-report", "--no-measure", "--threads", "1", "--interval", "4", "--lr", "0.01"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """wrn: a convolutional network with its twin, so short that it is wrong about much; mlp: sparse, on grey images."""
    folder = tmp_path_factory.mktemp("runs")
    pictures, grey = write_pictures(folder / "pictures"), write_images(folder / "grey")
    threads = torch.get_num_threads()
    network = ["--depth", "10", "--width", "0.5", "1", "1", "--density", "0.3", "--batch", "12", "--steps", "8"]
    assert main(["train", "images", "--data", str(pictures), "--run", str(folder / "wrn"), *COMMON, *network]) == 0
    network = ["--hidden", "32", "--density", "0.3", "--batch", "16", "--steps", "30", "--no-twin", "--method", "set"]
    assert main(["train", "images", "--data", str(grey), "--run", str(folder / "mlp"), *COMMON, *network]) == 0
    torch.set_num_threads(threads)
    return {"wrn": folder / "wrn", "mlp": folder / "mlp"}


def copied(run: Path, to: Path) -> Path:
    shutil.copytree(run, to / run.name)
    return to / run.name


def field_of(*folders: Path) -> list[Contender]:
    return contenders([read_run(folder) for folder in folders])


def figures_of(*folders: Path) -> dict[str, Figure]:
    field = field_of(*folders)
    return {figure.id: figure for figure in (*all_figures(field), *image_figures(field))}


# -- the sentences -------------------------------------------------------------------------------------------------


def twin(name: str, evals: list[tuple[int, float, float]], step_s: float = 0.1) -> Twin:
    about = {"density": 1.0 if name.startswith("dense") else 0.1}
    points = [{"step": s, "train_s": at, "loss": 1.0, "accuracy": value} for s, at, value in evals]
    train = [{"step": s, "train_s": s * step_s, "tokens": 100 * s, "loss": 1.0} for s in range(10, 201, 10)]
    return Twin(name=name, about=about, train=tuple(train), eval=tuple(points))


def duel(*twins: Twin) -> list[Contender]:
    return contenders([Run(path=Path("run"), name="run", subject=IMAGES, twins=twins)])


def test_more_accurate_is_better():
    field = duel(twin("sparse", [(0, 0, 0.1), (200, 20, 0.9)]), twin("dense", [(0, 0, 0.1), (200, 20, 0.6)]))
    said = verdict(field)
    assert said.better is field[0]
    assert said.text.startswith("At equal time (20 s) sparse reached 90.00% accuracy, dense 60.00%; a sparse step")
    assert steps_sentence(field) == "At equal steps (200): sparse 90.00%, dense 60.00% accuracy."
    turned = duel(twin("sparse", [(0, 0, 0.1), (200, 20, 0.5)]), twin("dense", [(0, 0, 0.1), (200, 20, 0.6)]))
    assert verdict(turned).better is turned[1]
    assert "dense is ahead with 60.00% accuracy, sparse reached 50.00%" in verdict(turned).text


def test_half_a_point_is_level():
    field = duel(twin("sparse", [(200, 20, 0.604)]), twin("dense", [(200, 20, 0.6)]))
    assert "are level at 60.40% and 60.00% accuracy" in verdict(field).text


def test_a_loss_that_is_no_number_makes_an_accuracy_none():
    broken = Twin(name="sparse", eval=({"step": 9, "train_s": 1.0, "loss": None, "accuracy": 0.1},))
    (one,) = duel(broken)
    assert one.diverged_at == 9
    assert "its loss stopped being a number at step 9" in verdict([one]).text
    found = reading(duel(broken, twin("dense", [(0, 0, 0.1), (200, 20, 0.6)])), "train_s")
    assert [value != value for value in found.values.values()] == [True, False]


def test_a_metric_reads_records_and_speaks():
    assert BITS_PER_BYTE.of({"loss": 0.6931471805599453}) == pytest.approx(1.0)
    assert BITS_PER_BYTE.of({"loss": 5.0, "bits_per_byte": 2.0}) == 2.0
    assert ACCURACY.of({"loss": 1.0, "accuracy": 0.5}) == 0.5
    assert ACCURACY.of({"accuracy": 0.5}) != ACCURACY.of({"accuracy": 0.5})  # no loss: NaN
    assert (BITS_PER_BYTE.show(2.4104), ACCURACY.show(0.9123), ACCURACY.show(float("nan"))) == ("2.410", "91.23%", "–")
    assert (BITS_PER_BYTE.gap(-0.1), ACCURACY.gap(0.012)) == ("-0.100", "+1.20")
    assert BITS_PER_BYTE.logged(0.6931471805599453) == {"bits_per_byte": pytest.approx(1.0)}
    assert ACCURACY.logged(1.0) == {}
    assert subject_of({}) is TEXT and subject_of({"task": "images"}) is IMAGES


def test_the_best_values_have_the_room():
    low, high = gain_range([0.1, *[0.8 + 0.01 * n for n in range(10)]]) or [0, 0]
    assert 0.7 < low < 0.81 and 0.89 < high < 0.92
    assert gain_range([]) is None


# -- the figures ---------------------------------------------------------------------------------------------------


def light(value: Any, key: str = "") -> Any:
    """A figure with its colour names replaced, as the page does."""
    if isinstance(value, str):
        return "#123456" if value.startswith("@") and "color" in key else value
    if isinstance(value, list):
        return [light(item, key) for item in value]
    return {inner: light(item, inner) for inner, item in value.items()} if isinstance(value, dict) else value


def test_plotly_accepts_every_figure(runs: dict[str, Path]):
    import plotly.graph_objects as go

    wrn, mlp = figures_of(runs["wrn"]), figures_of(runs["mlp"])
    assert {"accuracy", "loss", "confusion", "connections", "taps"} <= wrn.keys() and "inputs" not in wrn
    assert {"accuracy", "loss", "confusion", "connections", "inputs"} <= mlp.keys() and "taps" not in mlp
    for figure in (*wrn.values(), *mlp.values(), *figures_of(runs["wrn"], runs["mlp"]).values()):
        for view in figure.views:
            json.dumps([view.data, view.layout], allow_nan=False)
            go.Figure({"data": light(view.data), "layout": light(view.layout)})  # raises on an unknown property


def test_accuracy_is_drawn_against_time_steps_and_flops(runs: dict[str, Path]):
    accuracy = figures_of(runs["wrn"])["accuracy"]
    assert [view.label for view in accuracy.views] == ["Time", "Steps", "FLOPs"]
    evals = [record for record in read_run(runs["wrn"]).twins[0].eval]
    drawn = accuracy.views[1].data[0]
    assert drawn["x"] == [record["step"] for record in evals]
    assert drawn["y"] == pytest.approx([record["accuracy"] for record in evals], rel=1e-5)


def test_evaluations_that_part_from_training_stay_in_view():
    evals = [{"step": s, "train_s": s / 10, "loss": 0.2 + s / 100, "accuracy": 0.5} for s in range(10, 101, 10)]
    train = [{"step": s, "train_s": s / 10, "loss": 0.5 - s / 250} for s in range(1, 101)]
    (one,) = duel(Twin(name="sparse", train=tuple(train), eval=tuple(evals)))
    _, loss = courses([one])
    low, high = loss.views[0].layout["yaxis"]["range"]
    assert low < 0.2 and high > 1.2


def test_a_confusion_matrix_is_drawn_by_shares_of_its_rows(runs: dict[str, Path]):
    found = json.loads((runs["wrn"] / "images.json").read_text())
    sparse, dense = figures_of(runs["wrn"])["confusion"].views
    assert (sparse.label, dense.label) == ("sparse", "dense")
    exact = torch.tensor(found["twins"]["sparse"]["confusion"]) / 5
    torch.testing.assert_close(torch.tensor(sparse.data[0]["z"]) ** 2, exact, atol=1e-5, rtol=0)
    assert list(sparse.layout["yaxis"]["ticktext"]) == [f"{name}\u2002" for name in CLASSES]


def test_kernels_stand_where_their_names_do(runs: dict[str, Path]):
    found = json.loads((runs["wrn"] / "images.json").read_text())["twins"]["sparse"]["layers"]
    kernels = [layer for layer in found if "taps" in layer]
    view = figures_of(runs["wrn"])["taps"].views[0]
    (cells,) = view.data
    at = {note["text"]: (int(note["x"]), int(note["y"])) for note in view.layout["annotations"]}
    assert len(at) == len(kernels)
    for layer in kernels:
        (x, y), even = at[layer["name"]], sum(map(sum, layer["taps"])) / 9
        square = [row[x - 1 : x + 2] for row in cells["z"][y + 1 : y + 4]]
        for row, counts in zip(square, layer["taps"], strict=True):
            assert row == pytest.approx([count / even for count in counts], rel=1e-5)


@pytest.mark.parametrize("shape", [(1, 3, 5), (3, 4, 2)])
def test_a_picture_is_what_it_was_made_of(shape: tuple[int, int, int]):
    image = pytest.importorskip("PIL.Image")
    pixels = torch.randint(256, shape, dtype=torch.uint8)
    uri = data_uri(pixels.numpy().tobytes(), shape)
    head, _, text = uri.partition(",")
    assert head == "data:image/png;base64"
    with image.open(io.BytesIO(base64.b64decode(text))) as read:
        read.verify()
    with image.open(io.BytesIO(base64.b64decode(text))) as read:
        assert (read.width, read.height) == (shape[2], shape[1])
        back = torch.from_numpy(np.array(read)).view(shape[1], shape[2], -1)
    assert torch.equal(back.permute(2, 0, 1), pixels)


def test_mistakes_and_filters_are_pictures(runs: dict[str, Path]):
    found = json.loads((runs["wrn"] / "images.json").read_text())["twins"]
    field = field_of(runs["wrn"])
    for strip in mistakes(field):
        wrong = found[strip.contender.label]["wrong"]
        assert len(strip.pictures) == min(16, len(wrong))
        assert [one.lines for one in strip.pictures] == [
            (CLASSES[one["true"]], CLASSES[one["predicted"]]) for one in wrong[: len(strip.pictures)]
        ]
        sure = [one["confidence"] for one in wrong]
        assert sure == sorted(sure, reverse=True)
    assert [len(strip.pictures) for strip in filters(field)] == [16, 16]
    assert filters(field_of(runs["mlp"])) == []


# -- the page ------------------------------------------------------------------------------------------------------


def test_the_page_holds_its_sections(runs: dict[str, Path]):
    page = build_report(runs["wrn"]).read_text(encoding="utf-8")
    for text in ("Accuracy", "What it sees", "Confusion", "Mistakes", "First filters", "Kernels", "moss", "per use"):
        assert text in page
    assert "bits per byte" not in page and "What it writes" not in page and "sample.txt" not in page
    own = re.sub(r"<script.*?</script>", "", page, flags=re.S)
    assert own.count("<img ") == own.count('<img src="data:image/png;base64,') > 32
    for notes in re.findall(r'<div class="notes">.*?</div>', own, flags=re.S):
        assert re.findall(r"<li>([^:]*)", notes) == ["Uneven steps"]  # which a busy machine has


def test_a_report_is_redrawn_without_the_data(runs: dict[str, Path], tmp_path: Path):
    folder = copied(runs["mlp"], tmp_path)
    first = build_report(folder).read_text(encoding="utf-8")
    text = (folder / "metrics.jsonl").read_text().replace(str(runs["mlp"].parent / "grey"), str(tmp_path / "gone"))
    (folder / "metrics.jsonl").write_text(text)
    assert main(["report", str(folder)]) == 0
    assert "What the first layer looks at" in first
    assert (folder / "report.html").read_text(encoding="utf-8").count("heatmap") == first.count("heatmap")


def test_a_run_that_has_not_ended_has_the_figures_that_it_can(runs: dict[str, Path], tmp_path: Path):
    folder = copied(runs["wrn"], tmp_path)
    for name in ("images.json", "summary.json"):
        (folder / name).unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    for kept in (1, len(lines) // 2, len(lines) - 3):
        (folder / "metrics.jsonl").write_text("".join(lines[:kept]) + '{"kind": "tr')
        page = build_report(folder).read_text(encoding="utf-8")
        assert "images.json is missing" in page and "What it sees" not in page
        assert ('id="accuracy"' in page) == any('"kind": "eval"' in line for line in lines[:kept])


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: "{",
        lambda data: "[]",
        lambda data: json.dumps({**data, "format": 99}),
        lambda data: json.dumps({**data, "names": data["names"][:-1]}),
        lambda data: json.dumps({**data, "twins": {"sparse": {**data["twins"]["sparse"], "confusion": [[1]]}}}),
        lambda data: json.dumps({**data, "twins": {"sparse": {**data["twins"]["sparse"], "inputs": "x"}}}),
        lambda data: json.dumps(data).replace('"pixels": "', '"pixels": "!'),
        lambda data: json.dumps(data).replace('"shape": [3', '"shape": [4'),
        lambda data: json.dumps(data).replace('"predicted": ', '"predicted": 9'),
    ],
)
def test_a_damaged_file_is_said(runs: dict[str, Path], tmp_path: Path, damage: Any):
    folder = copied(runs["wrn"], tmp_path)
    data = json.loads((folder / "images.json").read_text())
    (folder / "images.json").write_text(damage(data))
    run = read_run(folder)
    assert run.found is None
    assert any(note.startswith("images.json cannot be read: ") for note in run.notes)
    assert "What it sees" not in build_report(folder).read_text(encoding="utf-8")


def test_names_of_classes_stay_text(runs: dict[str, Path], tmp_path: Path):
    folder = copied(runs["wrn"], tmp_path)
    data = json.loads((folder / "images.json").read_text())
    data["names"] = ["<b>moss</b>", '"><script>alert(1)</script>', "slate"]
    (folder / "images.json").write_text(json.dumps(data))
    page = build_report(folder).read_text(encoding="utf-8")
    assert "<b>moss" not in page and "<script>alert" not in page and "&lt;script&gt;alert" in page


def test_runs_of_images_are_laid_over_each_other(runs: dict[str, Path], tmp_path: Path):
    out = tmp_path / "both.html"
    assert main(["report", str(runs["wrn"]), str(runs["mlp"]), "--out", str(out)]) == 0
    page = out.read_text(encoding="utf-8")
    assert "wrn sparse" in page and "These runs saw different data" in page


def test_text_and_images_are_not_compared(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text = write_run(tmp_path / "text", steps=20)
    assert main(["report", str(text), str(runs["wrn"]), "--out", str(tmp_path / "both.html")]) == 2
    said = capsys.readouterr().err
    assert "is a run of text and" in said and "do not compare; give runs of one kind" in said
    assert not (tmp_path / "both.html").exists()


def test_a_log_without_its_first_line_is_still_of_images(runs: dict[str, Path], tmp_path: Path):
    folder = copied(runs["mlp"], tmp_path)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[1:]))
    assert read_run(folder).subject is IMAGES


def test_many_warnings_are_folded(runs: dict[str, Path], tmp_path: Path):
    folder = copied(runs["mlp"], tmp_path)
    with (folder / "metrics.jsonl").open("a") as log:
        for step in range(1, 20):
            said = {"twin": "sparse", "step": step, "layer": "layers.0", "guard": f"made up {step}", "message": "!"}
            log.write(json.dumps({"kind": "guard", **said}) + "\n")
    own = re.sub(r"<script.*?</script>", "", build_report(folder).read_text(encoding="utf-8"), flags=re.S)
    shown, folded = own.split('id="warnings"')[1].split("<details>")[:2]
    assert shown.count("<li>") == 12 and folded.split("</details>")[0].count("<li>") >= 7


@pytest.mark.skipif(check_report.find_browser() is None, reason=check_report.INSTALL)
@pytest.mark.browser
def test_a_browser_opens_the_page_in_silence(runs: dict[str, Path], tmp_path: Path):
    path = check_report.find_browser()
    assert path is not None
    with check_report.browser(path) as one:
        for name, plots in (("wrn", 9), ("mlp", 8)):
            page = build_report(runs[name], tmp_path / f"{name}.html")
            findings = check_report.check_page(one, page, tmp_path, looks=[("narrow", "light"), ("wide", "dark")])
            assert findings.problems == []
            assert findings.plots >= plots
