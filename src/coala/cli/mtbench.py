"""`coala eval mtbench`: MT-Bench from saved judgements, or end to end with a run and a judge that grades."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coala.cli.flags import with_settings
from coala.cli.options import JudgeFlags, ReplyFlags
from coala.cli.output import command_line, say, tell_failures
from coala.leaderboards.record import run_of


@with_settings
def mtbench(
    judgements: Annotated[
        Path | None, typer.Argument(help="File of single-answer or pairwise judgements: JSON Lines, plain or .gz.")
    ] = None,
    *,
    questions: Annotated[
        Path | None,
        typer.Option(help="File of questions: their categories, and with --run what it answers (default: none)."),
    ] = None,
    replies: ReplyFlags,
    references: Annotated[
        Path | None, typer.Option(help="File of reference answers for the judge, with --run (default: none).")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the replies.")] = 0,
    by: Annotated[
        str, typer.Option("--judge", help="Judge: grade, a folder with judge.yaml, or a .jsonl of prompt templates.")
    ] = "grade",
    judge: JudgeFlags,
) -> None:
    """MT-Bench: mean ratings overall, by turn and by category; or wins, losses and ties between two models.

    From judgements, or end to end: with --run and --questions the run answers both turns and a judge grades them. Rerun
    the same command to resume.

    `coala eval mtbench --run RUN --questions question.jsonl --references gpt-4.jsonl --model gpt-4`
    """
    from coala.cli.output import conclude, progress
    from coala.leaderboards.mtbench import count_mtbench, run_mtbench
    from coala.values import CoalaError

    run = run_of(replies.into, judgements)
    if judgements is not None:
        found = count_mtbench(judgements, questions, command=command_line())
    elif run is None or questions is None:
        raise CoalaError(
            "Found neither judgements nor a run with questions, expected one. Fix: pass a file of judgements, "
            "or --run RUN "
            "and --questions FILE."
        )
    else:
        with progress() as show:
            found = run_mtbench(
                run,
                questions,
                judge=judge.by(by),
                manner=replies.manner(seed),
                references=references,
                name=replies.name,
                limit=replies.limit,
                command=command_line(),
                on_progress=show,
                on_failure=tell_failures(),
                on_note=say,
            )
    conclude(found, run)
