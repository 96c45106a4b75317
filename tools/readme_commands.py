"""Run what README.md tells people to run: every ```sh block, in order, in one shell, in a copy of the tree.

A block whose info string has `no-ci` is left out: ```sh no-ci. ```python blocks run as programs of their own.
Usage: python tools/readme_commands.py [--list] [README.md]
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

FENCE = re.compile(r"^```(?P<info>[^\n`]+)\n(?P<code>.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """One fenced block."""

    line: int
    """Line of its first command in the file, from 1."""
    language: str
    """sh or python."""
    code: str
    skipped: bool


def blocks(markdown: str) -> list[Block]:
    """The sh and python blocks of a Markdown text, in order."""
    found = []
    for match in FENCE.finditer(markdown):
        language, *flags = match["info"].split() or [""]
        if language in ("sh", "python"):
            line = markdown.count("\n", 0, match.start("code")) + 1
            found.append(Block(line, language, match["code"], "no-ci" in flags))
    return found


def script(chosen: list[Block], readme: str, folder: Path) -> str:
    """One bash program for all blocks, so that `cd` and an activated environment last as they do for a reader.

    It stops at the first command that fails and names its block; Python blocks are written to `folder`.
    """
    lines = ["set -euo pipefail", "block=", "trap '[ $? = 0 ] || echo \"failed: $block\" >&2' EXIT"]
    for block in chosen:
        name = f"{readme}:{block.line}"
        lines += [f"block={shlex.quote(name)}", f"echo {shlex.quote(f'-- {name}')}"]
        if block.language == "python":
            program = folder / f"line_{block.line}.py"
            program.write_text(block.code)
            lines += [f"python {shlex.quote(str(program))}"]
        else:
            lines += [*(f"echo {shlex.quote('$ ' + line)}" for line in block.code.splitlines()), block.code]
    return "\n".join(lines) + "\n"


def copy_tree(source: Path, target: Path) -> None:
    """What git would hand to someone who clones: all files of `source` that git tracks or does not ignore.

    Modification times are kept and .venv is linked, so that a `make` in the copy sees a set-up that is up to date.
    """
    command = ["git", "-C", str(source), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0"):
        if name and (source / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, target / name)
    (target / ".venv").symlink_to(source / ".venv")


def main() -> int:
    """Run or list the blocks; the exit status is that of the first command that failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readme", nargs="?", default="README.md", help="Markdown file inside the repository")
    parser.add_argument("--list", action="store_true", help="print the blocks instead of running them")
    options = parser.parse_args()

    found = blocks(Path(options.readme).read_text(encoding="utf-8"))
    if options.list:
        for block in found:
            print(f"-- {options.readme}:{block.line} {block.language}{' (skipped)' if block.skipped else ''}")
            print(block.code)
        return 0
    chosen = [block for block in found if not block.skipped]
    if not chosen:
        print(f"{options.readme} has no ```sh or ```python block to run", file=sys.stderr)
        return 1

    source = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory(prefix="rarefy-readme-") as folder:
        tree, programs = Path(folder, "rarefy"), Path(folder, "programs")
        tree.mkdir()
        programs.mkdir()
        copy_tree(source, tree)
        environment = {**os.environ, "PATH": f"{source / '.venv/bin'}{os.pathsep}{os.environ.get('PATH', '')}"}
        text = script(chosen, options.readme, programs)
        done = subprocess.run(["bash", "-c", text], cwd=tree, env=environment, stdin=subprocess.DEVNULL)
    if done.returncode == 0:
        print(f"{options.readme}: {len(chosen)} blocks ran, {len(found) - len(chosen)} marked no-ci")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
