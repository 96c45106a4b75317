"""The tool that runs README.md: which blocks it takes, and that a failing command does not pass."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from readme_commands import blocks, script

MARKDOWN = """# Title
```sh
cd sub
```
text
```sh no-ci
exit 7
```
```text
exit 8
```
```
exit 9
```
```python
print("from python")
```
```sh
pwd
```
"""


def run(markdown: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "sub").mkdir()
    chosen = [block for block in blocks(markdown) if not block.skipped]
    return subprocess.run(
        ["bash", "-c", script(chosen, "README.md", folder)], cwd=folder, capture_output=True, text=True
    )


def test_blocks_are_found_with_their_lines():
    assert [(block.line, block.language, block.skipped) for block in blocks(MARKDOWN)] == [
        (3, "sh", False),
        (7, "sh", True),
        (16, "python", False),
        (19, "sh", False),
    ]


def test_blocks_run_in_order_in_one_shell(tmp_path: Path):
    done = run(MARKDOWN, tmp_path)
    assert done.returncode == 0, done.stderr
    output = done.stdout.splitlines()
    assert "from python" in output
    assert output[-1] == str((tmp_path / "sub").resolve())


@pytest.mark.parametrize("command", ["false", "false | true", "exit 3", "no-such-command", "echo $UNSET_VARIABLE"])
def test_a_failing_command_stops_and_is_named(command: str, tmp_path: Path):
    done = run(f"```sh\n{command}\n```\n```sh\necho went on\n```\n", tmp_path)
    assert done.returncode != 0
    assert "went on" not in done.stdout
    assert "failed: README.md:2" in done.stderr


def test_a_failing_python_block_stops(tmp_path: Path):
    done = run("```python\nraise SystemExit(4)\n```\n", tmp_path)
    assert done.returncode == 4
