"""A page of ours: one offline HTML file, from a template, figures, and the style and script that all pages share."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rarefy.report import numbers as say
from rarefy.report.plots import PALETTE, Figure


def render_page(template: str, figures: Sequence[Figure], **shown: Any) -> str:
    """The page as text.

    Scripts are inlined, and the page's own policy lists them by hash and forbids any other script and every request:
    what a run brought along could neither run nor fetch anything even if it were not escaped.

    Args:
        template: a file of this folder that extends base.html.j2.
        shown: what else the template speaks of; `title` is what the window says.
    """
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    room = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(room),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["unbroken"] = say.unbroken
    plotly_js, page_js = get_plotlyjs(), (room / "page.js").read_text(encoding="utf-8")
    drawn = {figure.id: [vars(view) for view in figure.views] for figure in figures}
    return environment.get_template(template).render(
        **shown,
        palette=PALETTE,
        figures={figure.id: figure for figure in figures},
        figures_json=Markup(_embeddable(drawn)),
        styles=Markup((room / "page.css").read_text(encoding="utf-8")),
        plotly_js=Markup(plotly_js),
        page_js=Markup(page_js),
        script_hashes=Markup(" ".join(f"'{_hash(script)}'" for script in (plotly_js, page_js))),
    )


def flat(tree: Mapping[Any, Any], above: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, value) pairs; what is null was not set, and is left out."""
    pairs: list[tuple[str, str]] = []
    for key, value in tree.items():
        name = f"{above}.{key}" if above else str(key)
        if isinstance(value, Mapping) and value:
            pairs += flat(value, name)
        elif isinstance(value, str | float):
            pairs.append((name, value if isinstance(value, str) else f"{value:.6g}"))
        elif value is not None:
            pairs.append((name, json.dumps(value, default=str, ensure_ascii=False)))
    return pairs


def _embeddable(data: object) -> str:
    """JSON for a script element: nothing in it can end the element, open a comment, or break an old parser's line."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"), ensure_ascii=True)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
