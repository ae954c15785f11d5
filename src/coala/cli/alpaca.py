"""`coala eval alpaca`: AlpacaEval 2 from saved annotations, or end to end with a run that answers and a judge."""

from __future__ import annotations

import math
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from coala.cli.options import (
    AskAgain,
    Attempts,
    BaseUrl,
    By,
    Cache,
    Concurrency,
    Download,
    KeyEnv,
    Limit,
    Local,
    MaxCalls,
    MaxNewTokens,
    MaxTokens,
    Model,
    OneOrder,
    Prompts,
    Reference,
    RunOption,
    Sampling,
    Temperature,
    Timeout,
    TrustCode,
    Unguided,
    service_of,
)
from coala.cli.output import command_line, tell_failures
from coala.leaderboards.contest import manner_of, needed
from coala.leaderboards.judges import JudgeSettings
from coala.leaderboards.record import run_of


class DifficultyBy(StrEnum):
    """How an instruction finds its difficulty."""

    position = "position"
    instruction = "instruction"


class Stopping(StrEnum):
    """Where the fit of length control ends."""

    optimum = "optimum"
    liblinear = "liblinear"


Seed = Annotated[int, typer.Option(min=0, help="Seed of replies, of the bootstrap and of cross-validation's folds.")]


def alpaca(
    annotations: Annotated[
        Path | None, typer.Argument(help="Annotations of one model: JSON Lines or one list, plain or .gz.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="The authors' df_gamed.csv, or a stand-in; needed for length control.")
    ] = None,
    difficulty: Annotated[
        Path | None, typer.Option(help="Difficulty of every instruction; needed for length control.")
    ] = None,
    difficulty_by: Annotated[
        DifficultyBy,
        typer.Option(help="`position` as the published figures, even where rows are missing; or `instruction`."),
    ] = DifficultyBy.position,
    penalty: Annotated[
        str, typer.Option(help="C of the L1 fit: a number, `cv` (chosen by five folds) or `none` (maximum likelihood).")
    ] = "cv",
    stopping: Annotated[
        Stopping, typer.Option(help="`optimum`, or `liblinear`: where the published fits stopped, to reproduce them.")
    ] = Stopping.optimum,
    outputs: Annotated[
        Path | None, typer.Option(help="The model's whole output file, for the average length that is published.")
    ] = None,
    draws: Annotated[int, typer.Option(min=0, help="Bootstrap draws for the length-controlled interval.")] = 200,
    seed: Seed = 0,
    into: RunOption = None,
    prompts: Prompts = None,
    reference: Reference = None,
    name: Annotated[str | None, typer.Option(help="The model's name (default: the run folder's).")] = None,
    unguided: Unguided = False,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    limit: Limit = None,
    by: By = None,
    local: Local = None,
    model: Model = None,
    base_url: BaseUrl = None,
    key_env: KeyEnv = "OPENAI_API_KEY",
    one_order: OneOrder = False,
    cache: Cache = None,
    concurrency: Concurrency = 8,
    max_calls: MaxCalls = None,
    max_tokens: MaxTokens = None,
    attempts: Attempts = 6,
    timeout: Timeout = 180.0,
    ask_again: AskAgain = False,
    sampling: Sampling = None,
    trust_remote_code: TrustCode = False,
    download: Download = False,
) -> None:
    """AlpacaEval 2: win rate, its counts and lengths, and the length-controlled win rate.

    From annotations, or end to end: with --run and --prompts the run answers, a judge (`weighted` if none is named)
    compares with the reference, and the same command goes on after a kill: no reply is made and no verdict bought
    twice. Without both files of length control the run's own rows alone decide it.

    `coala eval alpaca --run RUN --prompts alpaca_eval.json --model gpt-4-1106-preview`
    """
    from coala.cli.output import conclude, progress, say
    from coala.leaderboards.alpaca import LengthControl, count_alpaca, run_alpaca

    control = LengthControl(
        calibration, difficulty, difficulty_by.value, _penalty(penalty), stopping.value, draws, seed
    )
    run = run_of(into, annotations)
    if needed(into, prompts, annotations, "annotations"):
        assert prompts is not None
        assert run is not None
        service = service_of(
            model, base_url, key_env, max_calls, max_tokens, attempts, timeout, ask_again, sampling or ()
        )
        with progress() as show:
            found = run_alpaca(
                run,
                prompts,
                reference,
                judge=JudgeSettings(by or "weighted", service, local, cache, concurrency),
                manner=manner_of(unguided, max_new_tokens, temperature, seed),
                control=control,
                name=name,
                limit=limit,
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
