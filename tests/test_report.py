"""The report: what it says about a run, what it survives, and that a browser opens it in silence and offline."""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import check_report  # pyright: ignore[reportMissingImports]  (tools/, which pytest puts on the path)
from rarefy.report import build_report
from rarefy.report import numbers as say
from rarefy.report.build import render
from rarefy.report.compare import Contender, contenders, interpolate, reading, steps_sentence, verdict
from rarefy.report.figures import all_figures
from rarefy.report.plots import MAX_POINTS
from rarefy.report.read import Run, Twin, read_run
from run_folder import write_run

# Contenders made by hand


def twin(
    name: str, evals: Sequence[tuple[int, float, float]], step_s: float = 0.1, density: float | None = None
) -> Twin:
    """A twin with evaluations (step, seconds, bits per byte) and a train record of every tenth step."""
    about = {"density": density if density is not None else 1.0 if name.startswith("dense") else 0.1}
    last = max((step for step, _, _ in evals), default=100)
    train = [
        {"step": s, "train_s": s * step_s, "tokens": 100 * s, "bits_per_byte": 3.0} for s in range(10, last + 1, 10)
    ]
    points = [{"step": step, "train_s": s, "flops": 1e6 * step, "bits_per_byte": bits} for step, s, bits in evals]
    return Twin(name=name, about=about, train=tuple(train), eval=tuple(points))


def field(*twins: Twin) -> list[Contender]:
    return contenders([Run(path=Path("run"), name="run", twins=twins)])


def figures_of(folder: Path) -> dict[str, Any]:
    return {figure.id: figure for figure in all_figures(contenders([read_run(folder)]))}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "one", steps=400)


@pytest.fixture(scope="module")
def page(run_dir: Path) -> str:
    return build_report(run_dir).read_text(encoding="utf-8")


# The verdict


def test_interpolation_is_linear_between_points_and_never_beyond():
    curve = [(0.0, 8.0), (10.0, 4.0), (20.0, 3.0)]
    assert interpolate(curve, 10) == 4.0
    assert interpolate(curve, 5) == pytest.approx(6.0)
    assert interpolate(curve, 12.5) == pytest.approx(3.75)
    assert interpolate(curve, 0) == 8.0
    assert math.isnan(interpolate(curve, -1))
    assert math.isnan(interpolate(curve, 20.1))
    assert math.isnan(interpolate([], 1))
    assert math.isnan(interpolate([(0, 1.0), (1, math.nan)], 0.5))


def test_sparse_ahead_at_equal_time():
    sparse = twin("sparse", [(100, 10, 3.0), (880, 88, 2.41)], step_s=0.21)
    dense = twin("dense", [(100, 44, 3.1), (880, 132, 2.16)], step_s=0.47)
    said = verdict(field(sparse, dense))
    assert said.text == (
        "At equal time (88 s) sparse reached 2.410 bits per byte, dense 2.630; "
        "a sparse step took 0.210 s, a dense one 0.470 s (2.2× faster)."
    )
    assert said.better is not None
    assert said.better.label == "sparse"


def test_dense_ahead_is_said_as_plainly():
    sparse = twin("sparse", [(100, 10, 3.0), (500, 60, 2.7)], step_s=0.12)
    dense = twin("dense", [(100, 10, 2.8), (500, 50, 2.4)], step_s=0.1)
    said = verdict(field(sparse, dense))
    assert said.text.startswith("At equal time (50 s) dense is ahead with 2.400 bits per byte, sparse reached 2.760")
    assert "(1.2× slower)" in said.text
    assert said.better is not None
    assert said.better.label == "dense"


@pytest.mark.parametrize("gap", [0.0, 0.0049, -0.0049])
def test_a_gap_below_half_a_hundredth_is_level(gap: float):
    sparse = twin("sparse", [(0, 0, 8.0), (100, 50, 2.5 + gap)], step_s=0.1)
    dense = twin("dense", [(0, 0, 8.0), (100, 50, 2.5)], step_s=0.102)
    said = verdict(field(sparse, dense))
    assert "are level at" in said.text
    assert "(about the same)" in said.text
    assert said.better is None


def test_what_does_not_overlap_is_not_compared():
    sparse = twin("sparse", [(100, 10, 3.0), (200, 20, 2.5)])
    dense = twin("dense", [(100, 30, 2.9), (200, 60, 2.4)])
    said = verdict(field(sparse, dense))
    assert "cannot be compared at equal time: sparse stops at 20 s, before the first evaluation of dense" in said.text
    assert said.better is None
    assert steps_sentence(field(sparse, dense)) == "At equal steps (200): dense 2.400, sparse 2.500 bits per byte."


def test_one_point_curves_compare_at_equal_steps_only():
    pair = field(twin("sparse", [(200, 20, 2.5)]), twin("dense", [(200, 60, 2.4)]))
    assert reading(pair, "train_s").at is None
    assert reading(pair, "step").at == 200


def test_a_twin_that_diverged_cannot_win():
    sparse = twin("sparse", [(0, 0, 8.0), (100, 10, 3.0), (200, 20, 2.8)])
    dense = twin("dense", [(0, 0, 8.0), (50, 10, math.nan), (100, 20, math.nan)])
    said = verdict(field(sparse, dense))
    assert "sparse reached 2.800 bits per byte; dense had diverged (step 50)" in said.text
    assert said.better is not None
    assert said.better.label == "sparse"
    assert "neither can be read" in verdict(field(dense, twin("sparse", [(0, 0, 8.0), (50, 20, math.nan)]))).text


def test_a_single_twin_has_nothing_to_be_compared_with():
    assert verdict(field(twin("sparse", [(200, 20, 2.5)], 0.1))).text == (
        "Only sparse was trained, so there is no dense twin to compare it with; "
        "it reached 2.500 bits per byte after 200 steps in 20 s, a sparse step took 0.100 s."
    )
    assert "no evaluations yet" in verdict(field(twin("sparse", []))).text
    assert "no sparse twin" in verdict(field(twin("dense", [(200, 20, 2.5)]))).text
    assert verdict([]).text == "Nothing has been recorded yet."


def test_missing_evaluations_are_the_reason():
    assert "dense has no evaluations" in verdict(field(twin("sparse", [(9, 9, 2.5)]), twin("dense", []))).text


def test_several_contenders_are_ranked(tmp_path: Path):
    runs = [
        read_run(write_run(tmp_path / name, name=name, steps=200, twins=twins, floor={"sparse": floor}))
        for name, twins, floor in (
            ("rigl", ("sparse", "dense"), 1.5),
            ("set", ("sparse",), 1.7),
            ("static", ("sparse",), 1.9),
        )
    ]
    said = verdict(contenders(runs))
    assert re.match(r"At equal time \(.*\) rigl sparse is ahead with [\d.]+ bits per byte; set [\d.]+, ", said.text)
    assert {part.label for part in said.parts if isinstance(part, Contender)} == {
        "rigl sparse", "rigl dense", "set", "static",
    }  # fmt: skip


def test_pace_is_the_median_and_tokens_follow_it():
    steady = [{"step": s, "train_s": s * 0.2, "tokens": s * 64} for s in range(1, 20)]
    stalled = [{"step": s, "train_s": s * 0.2 + 60, "tokens": s * 64} for s in range(20, 30)]
    (one,) = field(Twin(name="sparse", train=(*steady, *stalled)))
    assert one.step_s == pytest.approx(0.2)
    assert one.tokens_per_s == pytest.approx(320)
    assert one.mean_step_s == pytest.approx((29 * 0.2 + 60) / 29)


def test_uneven_steps_are_pointed_out(tmp_path: Path):
    def write(stall_s: float) -> str:
        records = [
            {"kind": "train", "twin": "sparse", "step": s, "train_s": s * 0.2 + (s > 15) * stall_s, "loss": 2.0}
            for s in range(1, 30)
        ]
        (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
        return render([read_run(tmp_path)])

    assert "Uneven steps" not in write(0.1)
    assert "Uneven steps: sparse took 0.200 s in the median and 2.27 s on average" in write(60)


@pytest.mark.parametrize(
    "form, value, text",
    [
        (say.count, 842, "842"), (say.count, 1234, "1.23 k"), (say.count, 999_999, "1.00 M"),
        (say.nbytes, 512, "512 B"), (say.nbytes, 1536, "1.50 KiB"), (say.nbytes, 14.3 * 2**20, "14.3 MiB"),
        (say.seconds, 0.0447, "44.7 ms"), (say.seconds, 88.4, "88 s"), (say.seconds, 185, "3 min 05 s"),
        (say.seconds, 7620, "2 h 07 min"), (say.percent, 0.1, "10%"), (say.percent, 0.0123, "1.23%"),
        (say.times, 2.238, "2.2×"), (say.times, 0.456, "0.46×"), (say.count, 4_560_000, "4.56 M"),
        (say.bits, 2.4104, "2.410"), (say.bits, math.nan, "–"), (say.count, None, "–"), (say.percent, math.inf, "–"),
    ],
)  # fmt: skip
def test_figures_are_written_for_people(form: Any, value: float, text: str):
    assert form(value) == text


# Reading what is there


def test_a_folder_that_is_no_run_says_what_to_give(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no metrics\.jsonl.*rarefy train --run"):
        build_report(tmp_path)
    with pytest.raises(ValueError, match="there is no such folder"):
        build_report(tmp_path / "absent")
    with pytest.raises(ValueError, match="at least one"):
        build_report([])


def test_several_runs_need_a_name_for_their_report(run_dir: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="out="):
        build_report([run_dir, run_dir])
    with pytest.raises(ValueError, match="no folder"):
        build_report(run_dir, tmp_path / "absent" / "report.html")
    out = build_report([run_dir, run_dir], tmp_path / "both.html")
    assert out == tmp_path / "both.html"
    assert "one (2) sparse" in out.read_text(encoding="utf-8")


def test_metrics_cut_anywhere_can_be_read(tmp_path: Path):
    folder = write_run(tmp_path / "run", steps=100)
    metrics = folder / "metrics.jsonl"
    whole = metrics.read_bytes()
    rng = random.Random(0)
    for cut in [0, 1, 100, *(rng.randrange(len(whole)) for _ in range(25))]:
        metrics.write_bytes(whole[:cut])
        run = read_run(folder)
        field_ = contenders([run])
        assert verdict(field_).text
        all_figures(field_)
        if cut and whole[cut - 1 : cut] != b"\n" and whole[cut : cut + 1] != b"\n":
            assert any("last line of metrics.jsonl is incomplete" in note for note in run.notes)


def test_damage_in_the_middle_is_counted(tmp_path: Path):
    folder = write_run(tmp_path / "run", steps=100)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[3:3] = ["{broken", "[1, 2]", '{"no": "kind"}', "null", '{"kind": "train", "twin": "sparse", "step": "x"}']
    (folder / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n" + lines[-1].encode() + b"\n")
    assert "5 unreadable lines of metrics.jsonl left out, the first is line 4." in read_run(folder).notes


@pytest.mark.parametrize(
    "kept", [(), ("run",), ("train",), ("eval",), ("run", "eval"), ("train", "rewire"), ("time", "end")]
)
def test_missing_kinds_and_files_are_named_not_fatal(kept: tuple[str, ...], tmp_path: Path):
    folder = write_run(tmp_path / "run", steps=100, kinds=kept)
    for name in ("plan.json", "summary.json", "sample.txt", "run.yaml"):
        (folder / name).unlink()
    page = build_report(folder).read_text(encoding="utf-8")
    assert "plan.json is missing" in page
    assert "summary.json is missing" in page
    assert "sample.txt is missing" in page
    assert ("Nothing has been recorded yet." in page) == (not kept)
    if "end" not in kept and kept:
        assert "not ended" in page


@pytest.mark.parametrize("text", ["{", "[]", '{"layers": 3}', '{"layers": [1]}', "\x00"])
def test_an_unreadable_plan_is_said(text: str, tmp_path: Path):
    folder = write_run(tmp_path / "run", steps=100)
    (folder / "plan.json").write_text(text)
    run = read_run(folder)
    assert run.plan is None
    assert any("plan.json" in note for note in run.notes)


def test_plan_rows_with_holes_are_shown(tmp_path: Path):
    folder = write_run(tmp_path / "run", steps=100)
    (folder / "plan.json").write_text(
        json.dumps({"layers": [{}, {"name": "a", "density": None, "shape": 3, "block": "x"}]})
    )
    assert "The plan" in build_report(folder).read_text(encoding="utf-8")


def test_a_resume_takes_back_what_came_after_its_checkpoint(tmp_path: Path):
    def record(kind: str, step: int, bits: float, layer: str | None = None) -> str:
        more = {"layer": layer} if layer else {}
        return json.dumps({"kind": kind, "twin": "sparse", "step": step, "bits_per_byte": bits, **more})

    lines = [record("eval", step, 1.0) for step in (10, 20, 30)]
    lines += [record("rewire", step, 1.0, layer) for step in (10, 20) for layer in "ab"]
    lines += [json.dumps({"kind": "end", "twin": "sparse", "step": 30, "reason": "interrupted"})]
    lines += [record("rewire", 20, 2.0, layer) for layer in "ab"] + [record("eval", step, 2.0) for step in (20, 40)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    (resumed,) = read_run(tmp_path).twins
    assert [(r["step"], r["bits_per_byte"]) for r in resumed.eval] == [(10, 1.0), (20, 2.0), (40, 2.0)]
    assert [(r["step"], r["layer"], r["bits_per_byte"]) for r in resumed.rewire] == [
        (10, "a", 1.0), (10, "b", 1.0), (20, "a", 2.0), (20, "b", 2.0),
    ]  # fmt: skip
    assert resumed.end is None


def test_static_is_not_missing_rewires(tmp_path: Path):
    for method, missed in (("static", False), ("rigl", True)):
        folder = write_run(tmp_path / method, method=method, steps=50, kinds=("run", "train", "eval", "end"))
        assert any("No rewires" in note for note in read_run(folder).notes) == missed


def test_runs_that_do_not_compare_are_said(tmp_path: Path, run_dir: Path):
    other = write_run(tmp_path / "other", steps=50)
    text = (
        (other / "metrics.jsonl")
        .read_text()
        .replace("python-stdlib", "wikitext")
        .replace("0123abcd", "4567")
        .replace('"threads": 2', '"threads": 8')
    )
    (other / "metrics.jsonl").write_text(text)
    page = build_report([run_dir, other], tmp_path / "both.html").read_text(encoding="utf-8")
    assert "their times do not compare" in page
    assert "different data (python-stdlib, wikitext)" in page
    assert "different data" not in build_report([run_dir, run_dir], tmp_path / "same.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("reason", ["interrupted", "diverged"])
def test_a_run_that_stopped_early_says_so(reason: str, tmp_path: Path):
    folder = write_run(tmp_path / "run", steps=50)
    metrics = folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"reason": "steps"', f'"reason": "{reason}"'))
    run = read_run(folder)
    assert run.state == reason
    assert f"{reason.capitalize()}: sparse (step 50), dense (step 50)." in run.notes
    assert read_run(write_run(tmp_path / "whole", steps=50)).state == ""


def test_control_characters_of_a_sample_are_replaced(tmp_path: Path):
    folder = write_run(tmp_path / "run", steps=50)
    (folder / "sample.txt").write_bytes(b"one\ttwo\n\x00\x1b[31m\xff")
    assert read_run(folder).sample == "one\ttwo\n\ufffd\ufffd[31m\ufffd"


# The figures


def light(value: Any, key: str = "") -> Any:
    """A figure with its colour names replaced, as the page does."""
    if isinstance(value, str):
        return "#123456" if value.startswith("@") and "color" in key else value
    if isinstance(value, list):
        return [light(item, key) for item in value]
    if isinstance(value, dict):
        return {inner: light(item, inner) for inner, item in value.items()}
    return value


@pytest.mark.parametrize(
    "wish",
    [
        {}, {"blocks": 1}, {"blocks": 50}, {"empties": True}, {"nan_from": {"dense": 60, "sparse": 60}},
        {"nan_from": {"sparse": 0}}, {"steps": 1}, {"twins": ("dense",)}, {"twins": [f"sparse-{i}" for i in range(10)]},
    ],
    ids=str,
)  # fmt: skip
def test_plotly_accepts_every_figure(wish: dict[str, Any], tmp_path: Path):
    import plotly.graph_objects as go

    figures = figures_of(write_run(tmp_path / "run", **{"steps": 300, **wish}))
    assert {"loss", "density", "memory", "time"} <= figures.keys()
    assert ("empty" in figures) == bool(wish.get("empties"))
    for figure in figures.values():
        for view in figure.views:
            json.dumps([view.data, view.layout], allow_nan=False)
            go.Figure(
                {"data": light(view.data), "layout": light(view.layout)}
            )  # raises on an unknown property or value


def test_many_layers_become_a_heatmap_in_the_order_of_the_network(tmp_path: Path):
    few = figures_of(write_run(tmp_path / "few", blocks=1, steps=600))["churn"]
    assert [view.label for view in few.views] == ["All layers", "By layer"]
    assert {trace["type"] for trace in few.views[1].data} == {"scatter"}
    many = figures_of(write_run(tmp_path / "many", blocks=50, steps=600))["churn"]
    (heatmap,) = many.views[1].data
    assert heatmap["type"] == "heatmap"
    assert [row[0] for row in heatmap["customdata"]][:4] == [
        "blocks.0.attn.qkv", "blocks.0.mlp.up", "blocks.0.mlp.down", "blocks.1.attn.qkv",
    ]  # fmt: skip
    assert len(heatmap["z"]) == 150


def test_dense_layers_are_hatched_and_say_why(run_dir: Path):
    (view,) = figures_of(run_dir)["density"].views
    (bars,) = view.data
    hatched = [shape == "/" for shape in bars["marker"]["pattern"]["shape"]]
    assert hatched == [value == 1.0 for value in bars["x"]]
    assert sum(hatched) == 6
    assert "sparse would be slower here" in bars["customdata"][2]


def test_parts_of_time_add_up_to_the_step(run_dir: Path):
    (view,) = figures_of(run_dir)["time"].views
    sparse = contenders([read_run(run_dir)])[0]
    assert sum(trace["x"][0] for trace in view.data) == pytest.approx(1e3 * sparse.mean_step_s, rel=0.02)
    assert "rewire" in [trace["name"] for trace in view.data]


def test_long_curves_are_thinned_and_keep_their_end(tmp_path: Path):
    records = [
        {"kind": "train", "twin": "sparse", "step": step, "train_s": step, "bits_per_byte": 1.0}
        for step in range(1, 10_001)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    (line,) = figures_of(tmp_path)["loss"].views[1].data
    assert len(line["x"]) <= MAX_POINTS + 1
    assert line["x"][-1] == 10_000


# The page


class Page(HTMLParser):
    """Counts elements and keeps what they refer to."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[str] = []
        self.references: list[str] = []
        self.handlers: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action", "data", "poster"):
                self.references.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)


HOSTILE = (
    """</script><script>alert(1)</script><img src=http://evil.invalid/x onerror="alert(2)"><!--'"{{ 7*7 }}&lt;\u2028"""
)


def test_the_page_holds_its_sections(page: str):
    for text in ("At equal time", "In numbers", "What the pattern did", "What it cost", "The plan", "What it writes"):
        assert text in page
    assert "kept dense by keep_dense" in page
    assert "rarefy train text --density 0.1" in page
    assert "plan.method.interval" in page
    assert 'class="notes"' not in page
    assert page.count("plotly.js v") == 1


def test_the_page_asks_for_nothing(page: str):
    from plotly.offline import get_plotlyjs

    seen = Page(page)
    assert seen.elements.count("script") == 3
    assert all(reference.startswith(("#", "data:")) for reference in seen.references), seen.references
    own = page.replace(get_plotlyjs(), "")
    assert len(own) < len(page) - 1_000_000
    assert re.findall(r"https?:|//[a-z]+\.|@import|url\(", own) == []
    assert "default-src 'none'" in own


def test_text_of_a_run_stays_text(tmp_path: Path):
    folder = write_run(tmp_path / "run", steps=50, name=HOSTILE, twins=("sparse" + HOSTILE, "dense"))
    (folder / "sample.txt").write_text(HOSTILE)
    plan = json.loads((folder / "plan.json").read_text())
    for layer in plan["layers"]:
        layer.update(name=layer["name"] + HOSTILE, reason=HOSTILE)
    (folder / "plan.json").write_text(json.dumps(plan))
    clean = Page(render([read_run(write_run(tmp_path / "clean", steps=50))]))
    page = render([read_run(folder)])
    seen = Page(page)
    assert seen.elements.count("script") == 3
    assert "img" not in seen.elements
    assert seen.handlers == []
    assert set(seen.elements) == set(clean.elements)
    assert "&lt;/script&gt;" in page
    assert "49" not in re.findall(r"{{.*?}}|\b49\b", page.split("<pre>")[1].split("</pre>")[0])


def test_an_older_report_survives_a_failed_write(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "report.html"
    out.write_text("the old one")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            with pytest.raises(OSError, match="cannot be written"):
                build_report(run_dir, out)
        assert out.read_text() == "the old one"
        assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    build_report(run_dir, out)
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_the_same_run_gives_the_same_page(run_dir: Path, page: str):
    assert render([read_run(run_dir)]) == page


def test_importing_the_report_loads_neither_plotly_nor_jinja():
    code = "import sys, rarefy.report; print([m for m in ('plotly', 'jinja2') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# In a browser

BROWSER = check_report.find_browser()
needs_browser = pytest.mark.skipif(BROWSER is None, reason=check_report.INSTALL)

NOISY = """<!doctype html><title>noisy</title><link rel="icon" href="data:,">
<button role="tab" onclick="fetch('http://late.invalid/on-click').catch(() => 0)">tab</button>
<img src="http://image.invalid/x.png"><script src="other.js"></script>
<script>
  console.log("ordinary");
  console.warn("a warning", 1);
  console.error("an error");
  setTimeout(() => { throw new Error("uncaught") }, 50);
</script>"""


@needs_browser
@pytest.mark.browser
def test_the_check_sees_console_and_network(tmp_path: Path):
    (tmp_path / "noisy.html").write_text(NOISY)
    assert BROWSER is not None
    with check_report.browser(BROWSER) as one:
        found = check_report.check_page(one, tmp_path / "noisy.html", looks=[("wide", "light")]).problems
    said = "\n".join(found)
    for expected in (
        "console warning: a warning 1", "console error: an error", "exception: Error: uncaught",
        "request: GET http://image.invalid/x.png", "request: GET http://late.invalid/on-click", "other.js",
    ):  # fmt: skip
        assert expected in said
    assert "ordinary" not in said


@needs_browser
@pytest.mark.browser
def test_a_browser_opens_reports_in_silence(run_dir: Path, tmp_path: Path):
    hostile = write_run(tmp_path / "run", steps=300, name=HOSTILE, blocks=20, nan_from={"dense": 200}, empties=True)
    (hostile / "sample.txt").write_text(HOSTILE)
    several = build_report([run_dir, hostile], tmp_path / "several.html")
    assert BROWSER is not None
    with check_report.browser(BROWSER) as one:
        for path, looks in (
            (build_report(run_dir, tmp_path / "one.html"), [("narrow", "light")]),
            (several, [("wide", "dark")]),
        ):
            findings = check_report.check_page(one, path, tmp_path, looks=looks)
            assert findings.problems == []
            assert findings.plots >= 7
            assert findings.tabs >= 9
            assert all(shot.stat().st_size > 20_000 for shot in findings.screenshots)


def test_without_a_browser_one_line_says_what_to_install(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], page: str
):
    monkeypatch.setenv("CHROMIUM", "no-such-browser")
    assert check_report.main([str(run_dir / "report.html")]) == 2
    assert capsys.readouterr().err.strip() == check_report.INSTALL
