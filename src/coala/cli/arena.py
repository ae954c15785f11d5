"""`coala eval arena`: Arena-Hard from saved judgements or battles, or end to end with a run and a judge."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

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

Seed = Annotated[int, typer.Option(min=0, help="Seed of the bootstrap, and of replies.")]


class Board(StrEnum):
    """Which published interval to print."""

    old = "v0.1"
    new = "v2.0"


class Rule(StrEnum):
    """Which of several verdicts counts."""

    last = "last"
    unanimous = "unanimous"


def arena(
    judgements: Annotated[
        Path | None,
        typer.Argument(help="Judgements of two games each, or battles (model, question, winner); JSON Lines or CSV."),
    ] = None,
    baseline: Annotated[str, typer.Option(help="The model that all others are compared with.")] = "gpt-4-0314",
    model: Annotated[
        str | None,
        typer.Option(help="The judged model, where rows do not name it; with --prompts the one that judges."),
    ] = None,
    board: Annotated[Board, typer.Option(help="Published interval: v0.1 95 %, v2.0 90 %, both over rows.")] = Board.old,
    rule: Annotated[
        Rule, typer.Option(help="Of several verdicts: the `last`, or none unless `unanimous`.")
    ] = Rule.last,
    style: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=ANSWERS", help="Answers of a model, the baseline's too, to hold style fixed; repeat."
        ),
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="Bootstrap draws.")] = 1000,
    seed: Seed = 0,
    into: RunOption = None,
    prompts: Prompts = None,
    reference: Reference = None,
    name: Annotated[str | None, typer.Option(help="The run's name (default: its folder's).")] = None,
    unguided: Unguided = False,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    limit: Limit = None,
    by: Annotated[str, typer.Option("--judge", help="arena, or a folder with a judge.yaml of mode arena.")] = "arena",
    local: Local = None,
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
    """Arena-Hard: win rate against the baseline with the interval that counts questions, beside the published one.

    From judgements, or end to end: with --run, --prompts and --reference the run answers and a judge of mode arena says
    how much better. The same command goes on after a kill.

    `coala eval arena --run RUN --prompts question.jsonl --reference gpt-4-0314.jsonl --model gpt-4`
    """
    from coala.cli.output import conclude, progress, say
    from coala.leaderboards.arena import count_arena, run_arena

    common: dict[str, Any] = {"style": style or (), "board": board.value, "draws": draws, "command": command_line()}
    run = run_of(into, judgements)
    if needed(into, prompts, judgements, "judgements"):
        assert prompts is not None
        assert run is not None
        service = service_of(
            model, base_url, key_env, max_calls, max_tokens, attempts, timeout, ask_again, sampling or ()
        )
        with progress() as show:
            found = run_arena(
                run,
                prompts,
                reference,
                judge=JudgeSettings(by, service, local, cache, concurrency),
                manner=manner_of(unguided, max_new_tokens, temperature, seed),
                name=name,
                limit=limit,
                on_progress=show,
                on_failure=tell_failures(),
                on_note=say,
                **common,
            )
    else:
        assert judgements is not None
        found = count_arena(judgements, baseline=baseline, model=model, rule=rule.value, seed=seed, **common)
    conclude(found, run)
