"""One offline HTML file that shows what a run did: loss against time, time and memory by part, what the pattern did.

    from rarefy.report import build_report
    build_report("runs/2026-01-31-a")                                    # -> runs/2026-01-31-a/report.html
    build_report(["runs/rigl", "runs/set"], out="runs/comparison.html")  # runs overlaid

plotly and jinja2 are imported when a report is built, not before.
"""

from rarefy.report.build import build_report

__all__ = ["build_report"]
