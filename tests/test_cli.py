"""What people type, what they see, and what they are told when it cannot be done."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import rarefy
from rarefy.cli.main import main
from rarefy.cli.options import parse
from rarefy.cli.train import Images, Text
from tiny import flags, one_thread, records, write_text

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run that went to its end."""
    folder = tmp_path_factory.mktemp("finished")
    threads = torch.get_num_threads()
    assert main(flags(write_text(folder / "text.txt"), "--run", str(folder / "run"), "--report")) == 0
    torch.set_num_threads(threads)
    return folder / "run"


def failure(capsys, arguments: list[str]) -> str:
    """What a command that cannot be carried out says, in one line, with exit status 2."""
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if not line.startswith("rarefy: warning")]
    assert len(lines) == 1 and lines[0].startswith("rarefy: "), said
    return lines[0]


# -- the frame ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(capsys, arguments):
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert all(command in said for command in ("train", "generate", "report"))


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"rarefy {rarefy.__version__}\n"


@pytest.mark.parametrize(
    "command",
    [
        ["train", "text"], ["train", "images"], ["compare", "text"], ["compare", "images"], ["generate"], ["report"],
        ["bench"], ["plan"], ["export"],
    ],
)  # fmt: skip
def test_every_command_has_help_that_names_the_settings_file(capsys, command):
    assert main([*command, "--help"]) == 0
    assert "--config" in capsys.readouterr().out


def test_an_unknown_command_names_the_nearest(capsys):
    assert "did you mean 'train'?" in failure(capsys, ["trian", "text"])
    assert "did you mean 'text'?" in failure(capsys, ["train", "txt"])


def test_an_unknown_option_names_the_nearest(capsys):
    assert main(["train", "text", "--densty", "0.1"]) == 2
    said = capsys.readouterr().err
    assert "--densty" in said and "--density" in said and "Traceback" not in said


def test_a_wrong_value_says_what_is_expected(capsys):
    for arguments, expected in (
        (["--density", "2"], "density must lie in (0, 1]"),
        (["--method", "rigll"], "did you mean 'rigl'?"),
        (["--steps", "5", "--minutes", "1"], "give one of them"),
        (["--width", "30"], "30 is no multiple of 4"),
    ):
        assert main(["train", "text", *arguments]) == 2
        said = " ".join(capsys.readouterr().err.replace("│", " ").split())
        assert expected in said and "Traceback" not in said


def test_a_command_loads_nothing_of_the_others():
    program = (
        "import sys; from rarefy.cli.main import main; main(['generate', '--run', 'nowhere']); print(*sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(rarefy.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert "nowhere is no run" in done.stderr
    assert "rarefy.cli.generate" in done.stdout.split()
    assert not {"plotly", "jinja2", "rarefy.cli.train", "rarefy.report", "transformers"} & set(done.stdout.split())


# -- a run -------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_what_it_should(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "run.yaml", "plan.json", "metrics.jsonl", "summary.json", "sample.txt", "latest.json", "model.safetensors",
        "report.html", "checkpoint-sparse-12.safetensors", "checkpoint-dense-12.safetensors",
    }  # fmt: skip
    run = records(finished)[0]
    assert run["kind"] == "run" and run["id"] == "run" and run["settings"]["steps"] == 12
    assert set(run["machine"]) >= {"cpu", "isa", "threads", "torch", "rarefy"}
    sparse, dense = run["twins"]
    assert (sparse["name"], dense["name"]) == ("sparse", "dense")
    for twin in (sparse, dense):
        assert set(twin["training_bytes"]) == {"parameters", "gradients", "optimizer", "indices"}
    assert sparse["parameters"] == dense["parameters"] == dense["nonzeros"] > sparse["nonzeros"]
    assert sparse["flops_per_token"] < dense["flops_per_token"]
    assert sparse["training_bytes"]["parameters"] == 4 * sparse["nonzeros"]
    assert dense["training_bytes"]["indices"] == 0 < sparse["training_bytes"]["indices"]
    weights = 256 * 32 + 12 * 32**2  # the head, and a block of width 32
    assert dense["flops_per_token"] == 6 * weights + 6 * 16 * 32

    plan = json.loads((finished / "plan.json").read_text())
    assert {row["name"]: row["kind"] for row in plan["layers"]}["head"] == "dense"
    assert plan["totals"]["asked_density"] == 0.1
    saved = rarefy.load(finished / "model.safetensors")
    assert isinstance(saved["blocks.0.mlp.up.pattern"], rarefy.Pattern)


def test_the_summary_has_both_networks_and_the_comparison(finished):
    summary = json.loads((finished / "summary.json").read_text())
    evals = {twin: [r for r in records(finished, "eval") if r["twin"] == twin] for twin in ("sparse", "dense")}
    for twin, found in evals.items():
        assert summary["twins"][twin]["bits_per_byte"] == found[-1]["bits_per_byte"]
        assert summary["at_equal_steps"]["bits_per_byte"][twin] == found[-1]["bits_per_byte"]
        assert summary["twins"][twin]["train_s"] == pytest.approx(found[-1]["train_s"])
    at = summary["at_equal_time"]
    assert at["at"] == pytest.approx(min(found[-1]["train_s"] for found in evals.values()))
    faster = min(evals, key=lambda twin: evals[twin][-1]["train_s"])
    assert at["bits_per_byte"][faster] == evals[faster][-1]["bits_per_byte"]
    assert summary["peak_memory_bytes"] > 10**7


def test_json_alone_goes_to_stdout(capsys, tmp_path, text):
    assert main(flags(text, "--run", str(tmp_path / "run"), "--json", "--no-twin")) == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert list(result["twins"]) == ["sparse"] and result["folder"] == str(tmp_path / "run")
    assert "bits per byte" in said.err


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys, tmp_path, text):
    assert main(flags(text, "--run", str(tmp_path / "run"))) == 0
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if line.startswith("step 12/12")]
    for part in ("loss", "bits/byte", "tokens/s", "density 0.1", "churn", "left"):
        assert part in line
    for row in ("equal time", "equal steps", "nonzeros", "training memory", "time per step", "tokens per second"):
        assert row in said
    assert "\x1b" not in said


@pytest.mark.parametrize(
    "given, flip",
    [([], None), (["--flip"], True), (["--no-flip"], False), (["--flip", "false"], False), (["--flip", "True"], True)],
)
def test_a_switch_that_may_be_left_open(given, flip):
    found = parse(Images, [*given, "--lr", "0.5"], prog="")
    assert (found.flip, found.lr, found.compile) == (flip, 0.5, None)


def test_a_switch_is_on_or_off(capsys):
    assert main(["train", "images", "--flip", "maybe"]) == 2
    assert "true or false, or nothing for true; got maybe" in " ".join(
        capsys.readouterr().err.replace("│", " ").split()
    )


def test_a_settings_file_says_the_same_as_flags_which_override_it(tmp_path, text):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(flags(text, "--run", str(first), "--density", "0.2", "--method", "set")) == 0
    config = ["--config", str(first / "run.yaml"), "--no-report", "--run", str(second)]
    assert main(["train", "text", *config, "--seed", "4"]) == 0  # in steps, as the file says
    one, two = (yaml.safe_load((folder / "run.yaml").read_text()) for folder in (first, second))
    assert one["plan"]["density"] == two["plan"]["density"] == 0.2 and two["plan"]["method"]["name"] == "set"
    assert (one.pop("seed"), two.pop("seed")) == (0, 4)
    assert (one["plan"].pop("seed"), two["plan"].pop("seed")) == (0, 4)
    assert one == two


def test_the_same_settings_train_the_same_network(tmp_path, text, finished):
    assert main(flags(text, "--run", str(tmp_path / "again"))) == 0
    for twin in ("sparse", "dense"):
        name = f"checkpoint-{twin}-12.safetensors"
        assert (tmp_path / "again" / name).read_bytes() == (finished / name).read_bytes()


def test_minutes_override_the_steps_of_a_settings_file(tmp_path, text):
    (tmp_path / "settings.yaml").write_text("steps: 7\n")
    config = ["--config", str(tmp_path / "settings.yaml")]
    assert parse(Text, [*config, "--minutes", "2"], prog="").minutes == 2
    assert parse(Text, [*config, "--minutes", "2"], prog="").steps is None
    assert parse(Text, config, prog="").steps == 7


def test_a_plan_file_is_used_and_flags_override_it(tmp_path, text):
    plan = {"density": 0.5, "method": {"name": "set", "interval": 3}, "keep_dense": ["head", "*.mlp.*"]}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    assert main(flags(text, "--run", str(tmp_path / "run"), "--plan", str(tmp_path / "plan.yaml"), "--block", "2")) == 0
    saved = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())["plan"]
    assert (saved["density"], saved["block"], saved["method"]["interval"]) == (0.5, 2, 3)
    rows = {row["name"]: row for row in json.loads((tmp_path / "run" / "plan.json").read_text())["layers"]}
    assert rows["blocks.0.mlp.up"]["kind"] == "dense" and rows["blocks.0.attention.qkv"]["block"] == [2, 2]


def test_minutes_become_steps_that_take_about_as_long(tmp_path, text):
    arguments = flags(text, "--run", str(tmp_path / "run"), "--minutes", "0.12", steps=None)
    assert main(arguments) == 0
    saved = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert saved["minutes"] is None and saved["steps"] > 1
    assert {record["step"] for record in records(tmp_path / "run", "end")} == {saved["steps"]}


# -- what cannot be done -----------------------------------------------------------------------------------------------


def test_a_folder_with_a_run_is_not_touched(capsys, text, finished):
    before = (finished / "metrics.jsonl").read_bytes()
    said = failure(capsys, flags(text, "--run", str(finished)))
    assert f"--resume {finished}" in said
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_bad_text_is_refused_before_anything_is_written(capsys, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"abc\xff" * 1000)
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "empty.txt").touch()
    for name, expected in (
        ("latin.txt", "not UTF-8: byte 0xff at offset 3"),
        ("short.txt", "needs at least 17"),
        ("empty.txt", "is empty"),
        ("nowhere.txt", "no such file"),
    ):
        said = failure(capsys, flags(tmp_path / name, "--run", str(tmp_path / "run")))
        assert expected in said and name in said
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_says_what_to_try(capsys, tmp_path, text):
    said = failure(capsys, flags(text, "--run", str(tmp_path / "run"), "--lr", "1e25", "--clip", "0"))
    assert "at step" in said and "lower --lr" in said
    assert all(torch.isfinite(t).all() for path in (tmp_path / "run").glob("*.safetensors") for t in tensors(path))
    assert {record["reason"] for record in records(tmp_path / "run", "end")} == {"diverged"}


def tensors(path: Path) -> list[torch.Tensor]:
    return [
        tensor
        for tensor in rarefy.load(path).values()
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
    ]


@pytest.mark.parametrize("device", ["gpu", "meta", "xpu:7"])
def test_a_device_that_is_not_there_is_refused(capsys, tmp_path, text, device):
    said = failure(capsys, flags(text, "--run", str(tmp_path / "run"), "--device", device))
    assert f"--device {device} cannot be used here" in said
    assert not (tmp_path / "run").exists()


def test_a_filter_that_matches_nothing_is_refused(capsys, tmp_path, text):
    (tmp_path / "plan.yaml").write_text("density: 0.1\ninclude: ['*.convolution']\n")
    said = failure(capsys, flags(text, "--plan", str(tmp_path / "plan.yaml"), "--run", str(tmp_path / "run")))
    assert "'*.convolution' matches no layer" in said and "blocks.0.attention.qkv" in said


def test_a_block_that_divides_no_layer_is_said_to_leave_it_dense(capsys, tmp_path, text):
    assert main(flags(text, "--run", str(tmp_path / "run"), "--block", "5")) == 0
    assert "does not divide" in (tmp_path / "run" / "plan.json").read_text()
    assert "no layer became sparse" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, expected",
    [
        ("densty: 0.1", "did you mean 'density'?"),
        ("density: lots", "density"),
        ("- 1", "should say `name: value`"),
        ("a: [", "is no YAML"),
    ],
)
def test_a_bad_settings_file_is_refused(capsys, tmp_path, content, expected):
    (tmp_path / "settings.yaml").write_text(content)
    assert expected in failure(capsys, ["train", "text", "--config", str(tmp_path / "settings.yaml")])


def test_a_missing_settings_or_plan_file_is_named(capsys, tmp_path):
    for option in ("--config", "--plan"):
        assert main(["train", "text", option, str(tmp_path / "nowhere.yaml")]) == 2
        assert "nowhere.yaml" in capsys.readouterr().err.replace("\n", "").replace("│", "").replace(" ", "")


# -- generate and report -----------------------------------------------------------------------------------------------


def test_generate_continues_a_prompt(capsys, finished):
    texts = []
    for seed, twin in (("1", "sparse"), ("1", "sparse"), ("2", "sparse"), ("1", "dense")):
        arguments = ["--prompt", "sparse ", "--bytes", "20", "--seed", seed, "--twin", twin]
        assert main(["generate", "--run", str(finished), *arguments]) == 0
        texts.append(capsys.readouterr().out)
    assert all(text.startswith("sparse ") for text in texts)
    assert texts[0] == texts[1] and len({texts[0], texts[2], texts[3]}) == 3


def test_generate_says_how_fast_apart_from_the_text(capsys, finished):
    arguments = ["generate", "--run", str(finished), "--prompt", "ab", "--bytes", "6"]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert "bytes/s" not in shown.out
    assert re.fullmatch(r"read 2 bytes in [0-9.]+ s, then wrote [0-9,]+ bytes/s", shown.err.strip())
    assert main([*arguments, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["prompt_bytes"] == 2
    assert said["decode_bytes_per_s"] == pytest.approx(5 / said["decode_s"])
    assert said["prompt_bytes_per_s"] == pytest.approx(2 / said["prompt_s"])


def test_generate_writes_the_sample_again(capsys, finished):
    sample = (finished / "sample.txt").read_bytes()
    prompt = sample[:-8].decode()
    assert main(["generate", "--run", str(finished), "--prompt", prompt, "--bytes", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == sample[-8:].decode(errors="replace")


def test_generate_needs_a_run_with_that_network(capsys, tmp_path, text):
    assert "no run" in failure(capsys, ["generate", "--run", str(tmp_path)])
    assert main(flags(text, "--run", str(tmp_path / "run"), "--no-twin")) == 0
    capsys.readouterr()
    assert "no dense network; it has: sparse" in failure(
        capsys, ["generate", "--run", str(tmp_path / "run"), "--twin", "dense"]
    )


def test_a_damaged_checkpoint_is_refused(capsys, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint-sparse-12.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "checkpoint-sparse-12.safetensors" in failure(capsys, ["generate", "--run", str(tmp_path / "run")])


def test_report_is_written_where_asked(capsys, finished, tmp_path):
    assert main(["report", str(finished), "--out", str(tmp_path / "page.html")]) == 0
    assert "page.html" in capsys.readouterr().out
    assert (tmp_path / "page.html").read_text().lstrip().lower().startswith("<!doctype html")
    assert "which run?" in failure(capsys, ["report"])
    assert "nowhere" in failure(capsys, ["report", str(tmp_path / "nowhere")])
