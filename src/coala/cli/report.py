"""`coala report`: the page of a finished run, made again from its saved values."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder made by `coala align`.")]) -> None:
    """Write RUN/report.html and RUN/report.json again and print the summary.

    Example: `coala report runs/demo`
    """
    from coala.align import make_report, summary_rows
    from coala.cli.screen import emit, table
    from coala.store import Run

    opened = Run.open(run)
    content = make_report(opened)
    table(summary_rows(content))
    emit({"report": opened.path / "report.html", **content["summary"]})
