"""RewardBench from saved scores (`coala eval rewardbench`), and scored by a run's head (`coala bench rewardbench`)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from coala.cli.options import Download, RunOption, TrustCode
from coala.cli.output import command_line, conclude, progress


def from_scores(
    scores: Annotated[
        Path, typer.Argument(help="Rows with subset, chosen_score and rejected_score: JSON Lines or CSV, plain or .gz.")
    ],
    weights: Annotated[
        Literal["published", "rows"],
        typer.Option(help="What subsets weigh: their `published` example counts, or the file's `rows`."),
    ] = "published",
    into: RunOption = None,
) -> None:
    """RewardBench: ranking accuracy by subset, a tie counting as wrong, and example-weighted section scores."""
    from coala.leaderboards.record import run_of
    from coala.leaderboards.rewardbench import count_rewardbench

    conclude(count_rewardbench(scores, weights=weights, command=command_line()), run_of(into, scores))


def by_head(
    file: Annotated[
        Path, typer.Argument(help="Rows with prompt, chosen, rejected and subset: JSON Lines or CSV, plain or .gz.")
    ],
    run: Annotated[Path, typer.Option(help="The run whose head scores the replies, and whose report tells of it.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for results.json (upstream's form), scores.json and ranking.json.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The model's name in the results (default: the run folder's).")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one forward pass.")] = 4096,
    trust_remote_code: TrustCode = False,
    download: Download = False,
) -> None:
    """RewardBench with a run's head, on any device: accuracy by subset and section, with intervals.

    A tie counts as wrong, as upstream. Replies to one prompt share its forward pass.
    """
    from coala.leaderboards.rewardbench import run_rewardbench
    from coala.store import RunFolder

    options: dict[str, Any] = {"out": out, "name": name, "batch_tokens": batch_tokens, "command": command_line()}
    with progress() as show:
        found = run_rewardbench(run, file, on_progress=show, **options)
    conclude(found, RunFolder.open(run))
