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

Seed = Annotated[int, typer.Option(min=0, help="Seed of replies, of the bootstrap and of cross-validation's folds.")]


@with_settings
def alpaca(
    annotations: Annotated[
        Path | None, typer.Argument(help="Annotations of one model: JSON Lines or one list, plain or .gz.")
    ] = None,
    *,
    calibration: Annotated[
        Path | None, typer.Option(help="The authors' df_gamed.csv, or a stand-in; needed for length control.")
    ] = None,
    difficulty: Annotated[
        Path | None, typer.Option(help="Difficulty of every instruction; needed for length control.")
    ] = None,
    difficulty_by: Annotated[
        Literal["position", "instruction"],
        typer.Option(help="`position` as the published figures, even where rows are missing; or `instruction`."),
    ] = "position",
    penalty: Annotated[
        str, typer.Option(help="C of the L1 fit: a number, `cv` (chosen by five folds) or `none` (maximum likelihood).")
    ] = "cv",
    stopping: Annotated[
        Literal["optimum", "liblinear"],
        typer.Option(help="`optimum`, or `liblinear`: where the published fits stopped, to reproduce them."),
    ] = "optimum",
    outputs: Annotated[
        Path | None, typer.Option(help="The model's whole output file, for the average length that is published.")
    ] = None,
    draws: Annotated[int, typer.Option(min=0, help="Bootstrap draws for the length-controlled interval.")] = 200,
    seed: Seed = 0,
    replies: ReplyFlags,
    prompts: Prompts = None,
    reference: Reference = None,
    by: By = None,
    one_order: OneOrder = False,
    judge: JudgeFlags,
) -> None:
    """AlpacaEval 2: win rate, its counts and lengths, and the length-controlled win rate.

    From annotations, or end to end: with --run and --prompts the run answers, a judge (`weighted` if none is named)
    compares with the reference, and the same command goes on after a kill: no reply is made and no verdict bought
    twice. Without both files of length control the run's own rows alone decide it.

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
