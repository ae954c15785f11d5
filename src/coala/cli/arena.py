"""`coala eval arena`: Arena-Hard from saved judgements or battles, or end to end with a run and a judge."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from coala.cli.flags import with_settings
from coala.cli.options import JudgeFlags, Prompts, Reference, ReplyFlags
from coala.cli.output import command_line, tell_failures
from coala.leaderboards.contest import one_source
from coala.leaderboards.record import run_of
from coala.settings import Board, VerdictRule

Seed = Annotated[int, typer.Option(min=0, help="Random seed of bootstrap and replies.")]


@dataclass(frozen=True, kw_only=True)
class ArenaFlags(JudgeFlags):
    """Judges of mode arena; ``model`` also names what saved judgements are of."""

    model: Annotated[
        str | None,
        typer.Option(help="The judged model if rows do not name it; with --prompts, the judge (default: none)."),
    ] = None


@with_settings
def arena(
    judgements: Annotated[
        Path | None,
        typer.Argument(
            help="File of judgements with two games each, or battles (model, question, winner): JSON Lines or CSV."
        ),
    ] = None,
    *,
    baseline: Annotated[str, typer.Option(help="Model that all others are compared with.")] = "gpt-4-0314",
    board: Annotated[
        Board, typer.Option(help="Version of the published interval: v0.1 has 95 %, v2.0 90 %, both over rows.")
    ] = "v0.1",
    rule: Annotated[
        VerdictRule, typer.Option(help="Verdict to use if there are several: the `last`, or none unless `unanimous`.")
    ] = "last",
    style: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=ANSWERS",
            help="Answers of a model (also the baseline's), to control for style. Repeatable (default: none).",
        ),
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="Number of bootstrap draws.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of bootstrap and replies.")] = 0,
    replies: ReplyFlags,
    prompts: Prompts = None,
    reference: Reference = None,
    by: Annotated[
        str, typer.Option("--judge", help="Judge: arena, or a folder with a judge.yaml of mode arena.")
    ] = "arena",
    judge: ArenaFlags,
) -> None:
    """Arena-Hard: win rate against the baseline, with an interval over questions next to the published one.

    From judgements, or end to end: with --run, --prompts and --reference the run answers and a judge of mode arena
    grades the difference. Rerun the same command to resume.

    `coala eval arena --run RUN --prompts question.jsonl --reference gpt-4-0314.jsonl --model gpt-4`
    """
    from coala.cli.output import conclude, progress, say
    from coala.leaderboards.arena import count_arena, run_arena

    common: dict[str, Any] = {"style": style or (), "board": board, "draws": draws, "command": command_line()}
    run = run_of(replies.into, judgements)
    one_source(run, prompts, judgements, "judgements")
    if run is not None and prompts is not None:
        with progress() as show:
            found = run_arena(
                run,
                prompts,
                reference,
                judge=judge.by(by),
                manner=replies.manner(seed),
                name=replies.name,
                limit=replies.limit,
                on_progress=show,
                on_failure=tell_failures(),
                on_note=say,
                **common,
            )
    else:
        assert judgements is not None
        found = count_arena(judgements, baseline=baseline, model=judge.model, rule=rule, seed=seed, **common)
    conclude(found, run)
