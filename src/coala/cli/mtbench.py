"""`coala eval mtbench`: MT-Bench from saved judgements, or end to end with a run and a judge that grades."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from coala.cli.output import command_line, say
from coala.leaderboards.contest import described, manner_of, own_name
from coala.leaderboards.judges import Service
from coala.leaderboards.record import figure, keep, run_of, spread, told_interval

if TYPE_CHECKING:
    from coala.alignment.answers import ReplySettings
    from coala.store import RunFolder


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
    from coala.values import CoalaError

    run = run_of(into, judgements)
    if judgements is not None:
        _saved(judgements, questions, run)
        return
    if into is None or run is None or questions is None:
        raise CoalaError(
            "Give either a file of judgements, or --run RUN and --questions FILE: a run answers and a judge grades."
        )
    service = service_of(model, base_url, key_env, max_calls, max_tokens, attempts, timeout, ask_again, sampling or ())
    manner = manner_of(unguided, max_new_tokens, temperature, seed)
    named = name or own_name(run, manner)
    _whole(run, questions, references, named, manner, limit, by, local, service, cache, concurrency)


def _whole(
    run: RunFolder,
    questions: Path,
    references: Path | None,
    name: str,
    manner: ReplySettings,
    limit: int | None,
    by: str,
    local: str | None,
    service: Service,
    cache: Path | None,
    concurrency: int,
) -> None:
    """Answers in the published form, then grades for them."""
    from coala.alignment.answers import converse
    from coala.cli.judge import grade_all
    from coala.cli.output import progress
    from coala.evaluation.grading import read_answered, read_questions
    from coala.evaluation.judges import read_instructions
    from coala.leaderboards.judges import VERDICTS, asking, stem
    from coala.store import write_atomic

    asked = read_questions(questions)[:limit]
    # What can be wrong with the judge is told before hours of answering.
    judge = asking(read_instructions(by, kind="single"), local, service, cache or run.path / VERDICTS, say)
    with progress() as show:
        turns = [(one.question, one.turns) for one in asked]
        replies = converse(run, turns, manner, on_reply=lambda done, total: show("replies", done, total))
    answers = run.path / "mtbench" / f"{stem(name)}.jsonl"
    rows = [
        {"question_id": one.question, "model_id": name, "choices": [{"index": 0, "turns": list(said)}]}
        for one, said in zip(asked, replies, strict=True)
    ]
    write_atomic(answers, "".join(json.dumps(row) + "\n" for row in rows))
    grade_all(
        read_answered(questions, answers, references),
        by,
        judge,
        out=answers.with_name(
            f"{answers.stem}-{'-'.join(map(stem, filter(None, (by, local or service.model))))}.jsonl"
        ),
        concurrency=concurrency,
        run=run,
        files={
            "questions": questions,
            "answers": answers,
            **({} if references is None else {"references": references}),
        },
        settings=described(run, manner),
        kind="mtbench",
    )


def _saved(judgements: Path, questions: Path | None, run: RunFolder | None) -> None:
    """Figures of judgements that are there."""
    from coala.cli.output import finish, table
    from coala.evaluation import mtbench as bench

    if bench.is_pairwise(judgements):
        matches, remarks = bench.read_matches(judgements)
        contests = bench.contests(matches)
        table(
            [
                [
                    one.model,
                    f"{one.wins} / {one.losses} / {one.ties}",
                    *(
                        f"{rate.value:.4f}" if rate.value == rate.value else rate.absent
                        for rate in (one.win_rate, one.loss_rate)
                    ),
                    *map(told_interval, (one.adjusted, one.excluding_ties)),
                    str(one.n_errors),
                ]
                for one in contests.values()
            ],
            ["model", "win / loss / tie", "win rate", "loss rate", "adjusted", "excluding ties", "errors"],
        )
        figures = [
            figure(f"{one.model}, {word}", rate, even=0.5 if word != "wins" else None)
            for one in contests.values()
            for word, rate in (("wins", one.win_rate), ("adjusted", one.adjusted), ("no ties", one.excluding_ties))
        ]
        facts = {
            f"{one.model}, win / loss / tie": f"{one.wins} / {one.losses} / {one.ties}" for one in contests.values()
        }
        failures = {"error": next(iter(contests.values())).n_errors}
        remarks += _said(contests)
        finish({"matches": contests} | _keep(run, judgements, contests, figures, facts, failures, remarks), remarks)
        return
    categories = None if questions is None else bench.read_categories(questions)
    ratings, remarks = bench.read_ratings(judgements, categories)
    scores = bench.scores(ratings)
    figures = []
    for one in scores.values():
        parts = {"overall": one.overall}
        parts |= {f"turn {turn}": value for turn, value in one.by_turn.items()} | dict(one.by_category)
        table([[name, told_interval(value), str(value.n)] for name, value in parts.items()], [one.model, "score", "n"])
        figures += [figure(f"{one.model}, {name}", value, "plain") for name, value in parts.items()]
    remarks += _said(scores)
    failures = {f"error, {one.model}": one.n_errors for one in scores.values() if one.n_errors}
    finish({"scores": scores} | _keep(run, judgements, scores, figures, {}, failures, remarks), remarks)


def _keep(
    run: RunFolder | None,
    judgements: Path,
    models: Mapping[str, Any],
    figures: list[Any],
    facts: Mapping[str, Any],
    failures: Mapping[str, int],
    remarks: tuple[str, ...],
) -> dict[str, Any]:
    from coala.evaluation.rows import read_rows
    from coala.report import Evaluation, Sample

    rows = read_rows(judgements)
    said = [(row, name) for row in rows if (name := row.name_of("judgment", "g1_judgment")) is not None]
    judges = sorted({str(row.get("judge")) for row in rows if row.get("judge") is not None})
    evaluation = Evaluation(
        kind="mtbench",
        of=judgements.name.partition(".")[0],
        title=f"MT-Bench: {', '.join(models)}",
        command=command_line(),
        figures=figures,
        files={"judgements": judgements},
        judge={"name": ", ".join(judges)} if judges else {},
        facts=facts,
        failures={kind: n for kind, n in failures.items() if n},
        samples=[
            Sample(f"question {row.get('question_id')}, turn {row.get('turn')}", {}, str(row.get(name)))
            for row, name in spread(said)
        ],
        remarks=remarks,
    )
    return keep(run, evaluation, say)


def _said(parts: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(f"{name}: {remark}" for name, part in parts.items() for remark in part.remarks)
