"""`coala report`: the page of a finished run, made again from its saved values."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder made by `coala align`.")]) -> None:
    """Rewrite RUN/report.html and RUN/report.json with all evaluations of the run, and print the summary.

    Example: `coala report runs/demo`
    """
    from coala.alignment import make_report, summary_rows
    from coala.cli.output import emit, table
    from coala.report.evaluations import saved_evaluations
    from coala.store import RunFolder, StoreError

    opened = RunFolder.open(run)
    if not (opened.path / "head" / "fit.json").is_file():
        raise StoreError(
            f"{run}: has no fitted head yet, so there is nothing to report. Fix: finish it with `coala align`."
        )
    content = make_report(opened)
    table(summary_rows(content))
    kept = saved_evaluations(opened)
    table([["evaluations", str(len(kept))], *([f"  {row['kind']}", str(row["title"])] for row in kept)])
    emit({"report": opened.path / "report.html", "evaluations": len(kept), **content["summary"]})
