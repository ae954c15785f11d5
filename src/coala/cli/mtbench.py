"""`coala eval mtbench`: MT-Bench from saved judgements, or end to end with a run and a judge that grades."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coala.cli.options import (
    AskAgain,
    Attempts,
    BaseUrl,
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
    RunOption,
    Sampling,
    Temperature,
    Timeout,
    TrustCode,
    Unguided,
    service_of,
)
from coala.cli.output import command_line, say, tell_failures
from coala.leaderboards.contest import manner_of
from coala.leaderboards.judges import JudgeSettings
from coala.leaderboards.record import run_of


def mtbench(
    judgements: Annotated[
        Path | None, typer.Argument(help="Single-answer or pairwise judgements: JSON Lines, plain or .gz.")
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option(help="Question file: categories, where judgements name none; with --run what it answers."),
    ] = None,
    into: RunOption = None,
    references: Annotated[Path | None, typer.Option(help="Reference answers, for the judge of --run.")] = None,
    name: Annotated[str | None, typer.Option(help="The run's name in answers (default: its folder's).")] = None,
    unguided: Unguided = False,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the replies.")] = 0,
    limit: Limit = None,
    by: Annotated[
        str, typer.Option("--judge", help="grade, a folder with judge.yaml, or a .jsonl of prompt templates.")
    ] = "grade",
    local: Local = None,
    model: Model = None,
    base_url: BaseUrl = None,
    key_env: KeyEnv = "OPENAI_API_KEY",
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
    """MT-Bench: mean ratings overall, by turn and by category; or wins, losses and ties of two models.

    From judgements, or end to end: with --run and --questions the run answers both turns and a judge grades them. The
    same command goes on after a kill.

    `coala eval mtbench --run RUN --questions question.jsonl --references gpt-4.jsonl --model gpt-4`
    """
    from coala.cli.output import conclude, progress
    from coala.leaderboards.mtbench import count_mtbench, run_mtbench
    from coala.values import CoalaError

    run = run_of(into, judgements)
    if judgements is not None:
        found = count_mtbench(judgements, questions, command=command_line())
    elif into is None or run is None or questions is None:
        raise CoalaError(
            "Give either a file of judgements, or --run RUN and --questions FILE: a run answers and a judge grades."
        )
    else:
        service = service_of(
            model, base_url, key_env, max_calls, max_tokens, attempts, timeout, ask_again, sampling or ()
        )
        with progress() as show:
            found = run_mtbench(
                run,
                questions,
                judge=JudgeSettings(by, service, local, cache, concurrency),
                manner=manner_of(unguided, max_new_tokens, temperature, seed),
                references=references,
                name=name,
                limit=limit,
                command=command_line(),
                on_progress=show,
                on_failure=tell_failures(),
                on_note=say,
            )
    conclude(found, run)
