"""`coala forget`: pairs taken out of a run for good, with an exact refit and a receipt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def forget(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder made by `coala align`.")],
    *,
    group: Annotated[list[str] | None, typer.Option(help="Group whose pairs to forget. Repeatable.")] = None,
    rater: Annotated[list[str] | None, typer.Option(help="Rater whose pairs to forget. Repeatable.")] = None,
    pairs: Annotated[
        list[Path] | None, typer.Option(help="File of pairs to forget, in any known format. Repeatable.")
    ] = None,
    line: Annotated[
        list[int] | None, typer.Option(help="Line of the current RUN/pairs-train.jsonl to forget. Repeatable.")
    ] = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Fit from scratch: choose ridge, gates and everything else again.")
    ] = False,
    cache: Annotated[
        Path | None, typer.Option(help="Feature cache of the run, whose copies are deleted too (default: none).")
    ] = None,
) -> None:
    """Remove pairs from a run: refit its head exactly without them, delete their features, write a receipt.

    Output of the old head is deleted or marked stale; the model itself does not change.

    Example: `coala forget runs/demo --group 4211`
    """
    from coala.cli.output import emit, say, table
    from coala.data import read_pairs
    from coala.receipts import forget_pairs

    files = [str(path) for path in pairs or []]
    receipt = forget_pairs(
        run,
        groups=group or [],
        raters=rater or [],
        pairs=list(read_pairs(files)) if files else [],
        lines=line or [],
        from_scratch=from_scratch,
        cache=cache,
        on_note=say,
    )
    names = (
        "removed_train",
        "removed_held_out",
        "how",
        "gap_before",
        "gap_after",
        "distance",
        "bound",
        "margins_moved",
    )
    told = [(name.replace("_", " "), receipt[name]) for name in names]
    table([[name, f"{value:.3g}" if isinstance(value, float) else str(value)] for name, value in told])
    for text in receipt["not_claimed"]:
        say(f"not claimed: {text}")
    emit(receipt)
