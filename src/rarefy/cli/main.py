"""`rarefy COMMAND ...`: finds the command, reads its options, and turns errors that the user can mend into one line.

A command is a module here with a frozen dataclass of settings, named after it (`bench.Bench`), and `run(settings)`. A
command that does several things has `TASKS` instead: name -> (settings class, run), and may have `USUAL`, the name of
the one that need not be named. Only the module of the command asked for is loaded.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from rarefy.ops.memory import keep_freed
from rarefy.settings import unknown

COMMANDS = {
    "train": "train a network sparse from its first step: rarefy train text|images",
    "compare": "ways of finding the pattern, seed by seed, at equal steps, time or FLOPs: rarefy compare text|images",
    "race": "dense and sparse networks under one clock, who wins here, and by how much: rarefy race [text|images]",
    "generate": "have a trained network write text",
    "report": "one HTML file about a run, or several beside each other",
    "plan": "what would become sparse, and what that costs and saves, before anything is trained",
    "bench": "sparse against dense on this machine, per shape and density",
    "export": "write a trained network for other tools",
}

Task = tuple[type[Any], Callable[[Any], None]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (None: this process's). Exit status: 0, 2 for what the user can mend, 130 for a stop."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    keep_freed()
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            return _dispatch(arguments)
        except SystemExit as done:
            return done.code if isinstance(done.code, int) else int(done.code is not None)
        except KeyboardInterrupt:
            print("rarefy: stopped", file=sys.stderr)
            return 130
        except BrokenPipeError:  # whoever read our output has enough
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  so that nothing is flushed into the pipe at exit
            return 0
        except (ValueError, OSError) as error:
            if os.environ.get("RAREFY_TRACEBACK"):
                raise
            print(f"rarefy: {_one_line(error)}", file=sys.stderr)
            return 2


def _dispatch(arguments: list[str]) -> int:
    present = {name: about for name, about in COMMANDS.items() if importlib.util.find_spec(f"rarefy.cli.{name}")}
    command, *rest = arguments or ["--help"]
    if command in ("-h", "--help"):
        width = max(map(len, present))
        lines = [f"  {name.ljust(width)}  {about}" for name, about in present.items()]
        print(
            "usage: rarefy COMMAND [OPTIONS]\n\nTrain neural networks sparse from the first step.\n", *lines, sep="\n"
        )
        print("\nrarefy COMMAND --help lists a command's options; rarefy --version names the version.")
        return 0
    if command == "--version":
        from rarefy import __version__

        print(f"rarefy {__version__}")
        return 0
    if command not in present:
        raise ValueError(f"command: {unknown(command, list(present))}; rarefy --help lists them")
    cls, run, name, rest = _task(command, rest)
    from rarefy.cli.options import parse

    run(parse(cls, rest, prog=f"rarefy {name}"))
    return 0


def _task(command: str, rest: list[str]) -> tuple[type[Any], Callable[[Any], None], str, list[str]]:
    """The settings and function of a command, its whole name, and the arguments left."""
    module = importlib.import_module(f"rarefy.cli.{command}")
    tasks: dict[str, Task] | None = getattr(module, "TASKS", None)
    if tasks is None:
        return getattr(module, command.capitalize()), module.run, command, rest
    usual: str | None = getattr(module, "USUAL", None)
    if rest[:1] in (["-h"], ["--help"]) or (not rest and usual is None):
        _list_tasks(command, tasks, usual)
        if usual is None:
            raise SystemExit(0 if rest else 2)
    if usual is not None and (not rest or rest[0].startswith("-")):
        return *tasks[usual], command, rest
    if rest[0] not in tasks:
        raise ValueError(f"{command}: {unknown(rest[0], list(tasks))}; rarefy {command} --help lists them")
    return *tasks[rest[0]], f"{command} {rest[0]}", rest[1:]


def _list_tasks(command: str, tasks: dict[str, Task], usual: str | None) -> None:
    """What a command can be about; of the usual one all options follow."""
    width = max(map(len, tasks))
    what = "WHAT" if usual is None else "[WHAT]"
    print(f"usage: rarefy {command} {what} [OPTIONS]\n")
    for name, (cls, _) in tasks.items():
        about = " ".join((cls.__doc__ or "").split("\n\n")[0].split())
        print(f"  {name.ljust(width)}  {about}{' The usual one.' if name == usual else ''}")
    print(f"\nrarefy {command} WHAT --help lists the options.")
    if usual is not None:
        print(f"Those of {usual}:\n")


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    print(f"rarefy: warning: {' '.join(str(message).split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
