"""Where a command that runs for a while speaks."""

from __future__ import annotations

from rich.console import Console


def plain_console(*, json: bool) -> Console:
    """Of stdout, or of stderr where stdout is for JSON. Text stands as it is: brackets in labels are no markup."""
    return Console(stderr=json, highlight=False, markup=False)
