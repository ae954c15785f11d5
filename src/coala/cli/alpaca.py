"""`coala eval alpaca`: AlpacaEval 2 from saved annotations, or end to end with a run that answers and a judge."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import typer

from coala.cli.flags import with_settings
from coala.cli.options import By, JudgeFlags, OneOrder, Prompts, Reference, ReplyFlags
from coala.cli.output import command_line, tell_failures
from coala.leaderboards.contest import one_source
from coala.leaderboards.record import run_of
from coala.settings import DifficultyBy, Stopping

Seed = Annotated[int, typer.Option(min=0, help="Random seed of replies, bootstrap and folds.")]


@with_settings
def alpaca(
    annotations: Annotated[
        Path | None, typer.Argument(help="File of one model's annotations: JSON Lines or one list, plain or .gz.")
    ] = None,
    *,
    calibration: Annotated[
        Path | None, typer.Option(help="The authors' df_gamed.csv or a substitute, for length control (default: none).")
    ] = None,
    difficulty: Annotated[
        Path | None,
        typer.Option(help="File of the difficulty of every instruction, for length control (default: none)."),
    ] = None,
    difficulty_by: Annotated[
        DifficultyBy,
        typer.Option(help="Key of the difficulties: `position`, as in the published figures, or `instruction`."),
    ] = "position",
    penalty: Annotated[
        str, typer.Option(help="Penalty C of the L1 fit: a number, `cv` (five folds) or `none` (maximum likelihood).")
    ] = "cv",
    stopping: Annotated[
        Stopping,
        typer.Option(
            help="Where the fit stops: at the `optimum`, or where `liblinear` stopped for the published figures."
        ),
    ] = "optimum",
    outputs: Annotated[
        Path | None,
        typer.Option(help="The model's full output file, for the published average length (default: none)."),
    ] = None,
    draws: Annotated[
        int, typer.Option(min=0, help="Number of bootstrap draws for the length-controlled interval.")
    ] = 200,
    seed: Seed = 0,
    replies: ReplyFlags,
    prompts: Prompts = None,
    reference: Reference = None,
    by: By = None,
    one_order: OneOrder = False,
    judge: JudgeFlags,
) -> None:
    """AlpacaEval 2: win rate, its counts and lengths, and the length-controlled win rate.

    From annotations, or end to end: with --run and --prompts the run answers and a judge (default: `weighted`) compares
    with the reference. Rerun the same command to resume: saved replies and verdicts are reused. Without both files of
    length control, only the run's own rows are used for it.

    `coala eval alpaca --run RUN --prompts alpaca_eval.json --model gpt-4-1106-preview`
    """
    from coala.cli.output import conclude, progress, say
    from coala.leaderboards.alpaca import LengthControl, count_alpaca, run_alpaca

    control = LengthControl(calibration, difficulty, difficulty_by, _penalty(penalty), stopping, draws, seed)
    run = run_of(replies.into, annotations)
    one_source(run, prompts, annotations, "annotations")
    if run is not None and prompts is not None:
        with progress() as show:
            found = run_alpaca(
                run,
                prompts,
                reference,
                judge=judge.by(by or "weighted"),
                manner=replies.manner(seed),
                control=control,
                name=replies.name,
                limit=replies.limit,
                one_order=one_order,
                command=command_line(),
                on_progress=show,
                on_failure=tell_failures(),
                on_note=say,
            )
    else:
        assert annotations is not None
        found = count_alpaca(annotations, control=control, outputs=outputs, command=command_line())
    conclude(found, run)


def _penalty(text: str) -> float | Literal["cv"] | None:
    from coala.values import CoalaError

    if text == "cv":
        return "cv"
    if text == "none":
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise CoalaError(f"--penalty {text!r}: expected a positive number, `cv` or `none`.")
    return value
