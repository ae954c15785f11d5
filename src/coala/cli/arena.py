"""`coala eval arena`: Arena-Hard from saved judgements or battles, or end to end with a run and a judge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from coala.cli.options import (
    NOT_ALL,
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
from coala.cli.output import command_line, tell_failures, told_interval
from coala.leaderboards.contest import described, hold, manner_of, needed, own_name
from coala.leaderboards.record import about, comparisons, figure, judged_rows, keep, order_figures, run_of, spending

if TYPE_CHECKING:
    from coala.evaluation.arena import Battles
    from coala.evaluation.arena_style import StyleControlled

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
    from coala.cli.output import finish, progress, say, table
    from coala.evaluation.arena import read_battles, score
    from coala.evaluation.judges import read_instructions
    from coala.evaluation.order_effects import remarks_on
    from coala.report import Evaluation
    from coala.values import CoalaError

    held, run = None, run_of(into, judgements)
    if needed(into, prompts, judgements, "judgements"):
        assert prompts is not None
        assert run is not None
        if read_instructions(by).mode != "arena":
            raise CoalaError(
                f"--judge {by} does not use mode arena, so its verdicts carry no strength. Use --judge arena."
            )
        service = service_of(
            model, base_url, key_env, max_calls, max_tokens, attempts, timeout, ask_again, sampling or ()
        )
        manner = manner_of(unguided, max_new_tokens, temperature, seed)
        with progress() as show:
            held = hold(
                run,
                prompts,
                reference,
                name=name or own_name(run, manner),
                manner=manner,
                limit=limit,
                by=by,
                local=local,
                service=service,
                cache=cache,
                concurrency=concurrency,
                orders="both",
                on_progress=show,
                on_failure=tell_failures(),
                note=say,
            )
        assert held.battles is not None
        if not len(held.battles):
            words = "; ".join(f"{kind}: {text}" for kind, text in held.found.words.items())
            raise CoalaError(f"No game has a verdict. {words or 'The judge said nothing.'} The replies are kept.")
        battles, baseline = held.battles, held.reference[0].method
        files, judge = {"prompts": prompts, **_given(reference), **held.chosen.files}, held.chosen.facts
        settings = described(run, manner)
    else:
        assert judgements is not None
        kind: Literal["last", "unanimous"] = "last" if rule is Rule.last else "unanimous"
        battles = read_battles(judgements, model=model, baseline=baseline, rule=kind)
        files, judge, settings = {"judgements": judgements}, {}, {"rule": kind}
    published: Literal["v0.1", "v2.0"] = "v0.1" if board is Board.old else "v2.0"
    scores = score(battles, baseline, board=published, draws=draws, seed=seed)
    controlled = _styled(battles, style, baseline, published, draws, seed) if style else None
    rows = []
    for one in sorted(scores.values(), key=lambda one: -one.score.value):
        rating = f"{one.rating:.1f}" if math.isfinite(one.rating) else "-"
        spread = one.published_interval
        ends = f"[{spread.low:.2f}, {spread.high:.2f}]" if math.isfinite(spread.value) else spread.absent
        counts = f"{one.wins} / {one.losses} / {one.ties}"
        cells = [
            one.model,
            told_interval(one.score),
            ends,
            told_interval(one.excluding_ties),
            counts,
            rating,
            str(one.score.n),
        ]
        rows.append([*cells, *([told_interval(controlled.scores[one.model])] if controlled else [])])
    head = ["model", "score, over questions", f"over rows ({board.value})", "excluding ties", "win / loss / tie"]
    table(rows, [*head, "rating", "battles", *(["style controlled"] if controlled else [])])
    result: dict[str, Any] = {"baseline": baseline, "scores": scores, "failed_games": battles.n_failed}
    if controlled:
        result["style_controlled"] = controlled
    figures = [figure(f"{one.model}, percent of battles", one.score, "percent", 50.0) for one in scores.values()]
    figures += [figure(f"{one.model}, excluding ties", one.excluding_ties, "percent", 50.0) for one in scores.values()]
    if controlled:
        figures += [figure(f"{n}, style controlled", value, "percent", 50.0) for n, value in controlled.scores.items()]
    facts: dict[str, Any] = {"baseline": baseline, "games without a verdict": battles.n_failed}
    facts |= {f"{one.model}, win / loss / tie": f"{one.wins} / {one.losses} / {one.ties}" for one in scores.values()}
    remarks = battles.remarks
    if held is not None:
        remarks = (*held.chosen.remarks, *remarks, *remarks_on(held.found.judgements))
        table(judged_rows(held.found))
        result |= {"judge": held.chosen.judge.name, **about(held.found)}
        figures += order_figures(held.found)
        facts |= spending(
            held.found.n_unjudged, held.found.n_comparisons, held.found.stopped, held.found.cost, held.found.words
        )
        if held.found.stopped:
            say(f"stopped: {held.found.stopped}")
    whose = ", ".join(scores)
    evaluation = Evaluation(
        kind="arena",
        of=f"{whose} {baseline}",
        title=f"Arena-Hard: {whose} against {baseline}",
        command=command_line(),
        figures=figures,
        files=files,
        judge=judge,
        settings={**settings, "board": board.value, "draws": draws, "seed": seed},
        facts=facts,
        failures=held.found.failures if held is not None else {},
        samples=[] if held is None else comparisons(held.ours, held.reference, held.found.judgements, held.prompts),
        remarks=remarks,
    )
    finish(result | keep(run, evaluation, say), remarks)
    if held is not None and held.found.stopped:
        raise typer.Exit(NOT_ALL)


def _given(reference: str | None) -> dict[str, Path]:
    """The file of replies, if one was named."""
    return {"reference": Path(reference)} if reference is not None and Path(reference).is_file() else {}


def _styled(
    battles: Battles, named: Sequence[str], baseline: str, version: Literal["v0.1", "v2.0"], draws: int, seed: int
) -> StyleControlled:
    """Style control with answer files given as NAME=FILE."""
    import numpy as np

    from coala.evaluation.arena_style import read_styles, style_controlled
    from coala.values import CoalaError

    files = {}
    for item in named:
        name, sign, file = item.rpartition("=")
        if not sign or not name or not file:
            raise CoalaError(f"--style {item!r}: expected NAME=ANSWERS, such as {baseline}=answers.jsonl.")
        files[name] = read_styles(file)
    if lacking := [name for name in battles.models if name not in files]:
        raise CoalaError(f"Style control needs the answers of every model; missing {lacking[0]!r}. Add --style for it.")
    sides = []
    for side in (battles.first.tolist(), battles.second.tolist()):
        for name, question in zip(side, battles.question.tolist(), strict=True):
            if question not in files[name]:
                raise CoalaError(f"The answers of {name!r} have none for question {question!r}. Add it to the file.")
        sides.append(np.array([files[n][q] for n, q in zip(side, battles.question.tolist(), strict=True)]))
    # Every draw refits the model: no more of them than the published boards use.
    return style_controlled(battles, sides[0], sides[1], baseline, version=version, draws=min(draws, 100), seed=seed)
