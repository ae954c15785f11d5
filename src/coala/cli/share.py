"""`coala eval share`: a run's evaluations in the forms that others read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coala.messages import CoalaError


def share(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder with evaluations.")],
    model: Annotated[str, typer.Option(help="Name of the guided model on the Hub, owner/name.")],
    organisation: Annotated[str, typer.Option(help="Organisation that ran the evaluations.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    dataset: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND=OWNER/NAME[:TASK]", help="Hub dataset of a kind of evaluation. Repeatable."),
    ] = None,
) -> None:
    """Write a run's evaluations as the Hub's .eval_results/*.yaml and Every Eval Ever's JSON. Nothing is uploaded.

    The Hub's format holds the first number of each evaluation whose dataset is on the Hub; the other holds every number
    with its interval.
    """
    from coala.cli.output import emit, say, table
    from coala.export.evaluations import share_evaluations

    named = dict(one.partition("=")[::2] for one in dataset or [])
    if bad := [kind for kind, where in named.items() if not where]:
        raise CoalaError(f"Found --dataset {bad[0]}, expected KIND=OWNER/NAME, such as rewardbench=OWNER/NAME.")
    found = share_evaluations(run, out, model=model, organisation=organisation, datasets=named)
    table(
        [
            ["for the Hub", f"{len(found.hub)} in {out / '.eval_results'}"],
            ["for Every Eval Ever", f"{len(found.every_eval_ever)} in {out / 'data'}"],
        ]
    )
    for line in found.left_out:
        say(f"left out: {line}")
    emit({"hub": found.hub, "every_eval_ever": found.every_eval_ever, "left_out": found.left_out})
