"""`rarefy report RUN...`: one HTML file about a run, or several beside each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from rarefy.report import build_report
from rarefy.report.comparison import is_comparison, rebuild_comparison
from rarefy.report.race import is_race, rebuild_race


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write one offline HTML file: losses, churn, exploration, time, memory, plan; of a run, or of several overlaid.

    Of a folder that `rarefy compare` made: its page, again.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs, or of one comparison."""

    out: Path | None = None
    """The file to write. Without it: report.html in the folder of the run; needed for several runs."""


def run(settings: Report) -> None:
    """Build the report and print where it is."""
    if not settings.runs:
        raise ValueError("which run? for example: rarefy report runs/*")
    if len(settings.runs) == 1 and is_race(settings.runs[0]):
        print(rebuild_race(settings.runs[0], settings.out))
        return
    if len(settings.runs) == 1 and is_comparison(settings.runs[0]):
        print(rebuild_comparison(settings.runs[0], settings.out))
        return
    print(build_report(list(settings.runs), out=settings.out))
