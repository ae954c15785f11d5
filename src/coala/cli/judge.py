"""`coala eval judge` and `coala eval grade`: verdicts from a judge, paid for once, with what they are worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coala.cli.flags import with_settings
from coala.cli.options import By, JudgeFlags, RunOption
from coala.cli.output import command_line, say, tell_failures
from coala.leaderboards.record import run_of


@with_settings
def judge(
    ours: Annotated[
        Path, typer.Argument(metavar="GENERATIONS_A", help="Replies: a generations-*.jsonl of a run, or a run folder.")
    ],
    reference: Annotated[
        Path | None,
        typer.Argument(metavar="[GENERATIONS_B]", help="Replies to the same prompts; a run folder's unguided ones."),
    ] = None,
    *,
    by: By = None,
    endpoint: JudgeFlags,
    pairs: Annotated[
        Path | None, typer.Option(help="Pairs with the prompts (default: pairs-eval.jsonl next to the replies).")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Output file (default: judgements-JUDGE.jsonl next to A).")] = None,
    one_order: Annotated[
        bool, typer.Option("--one-order", help="Ask with A first only; biased, at half cost.")
    ] = False,
    into: RunOption = None,
) -> None:
    """Judge A's replies against B's in both orders, or a run's guided ones against its unguided ones.

    Tells win rate, position bias, inconsistency and cost.

    Rerun the same command to resume; cached verdicts are not paid for twice. Exit code 1: judged in part.

    `coala eval judge RUN/generations-guided.jsonl RUN/generations-unguided.jsonl --model gpt-4o`
    """
    from coala.cli.output import conclude, progress
    from coala.leaderboards.pairwise import run_pairwise, sides_of_run

    run = run_of(into, *sides_of_run(ours, reference))
    with progress() as show:
        found = run_pairwise(
            ours,
            reference,
            judge=endpoint.by(by or ("weighted" if endpoint.local else "pairwise")),
            pairs=pairs,
            out=out,
            one_order=one_order,
            command=command_line(),
            on_progress=show,
            on_failure=tell_failures(),
            on_note=say,
        )
    conclude(found, run)


@with_settings
def grade(
    questions: Annotated[Path, typer.Argument(help="Questions: question_id, category, turns; JSON Lines, also .gz.")],
    answers: Annotated[Path, typer.Argument(help="Answers: question_id, model_id, choices with turns.")],
    *,
    out: Annotated[Path, typer.Option(help="Where the graded rows go.")],
    references: Annotated[Path | None, typer.Option(help="Reference answers, in the form of answers.")] = None,
    by: Annotated[
        str, typer.Option("--judge", help="grade, a folder with judge.yaml, or a .jsonl of prompt templates.")
    ] = "grade",
    endpoint: JudgeFlags,
    into: RunOption = None,
) -> None:
    """Grade answers from 1 to 10, turn by turn, the way MT-Bench does; `coala eval mtbench` reads what is written.

    `coala eval grade question.jsonl answers.jsonl --references gpt-4.jsonl --model gpt-4 --out graded.jsonl`
    """
    from coala.cli.output import conclude, progress
    from coala.leaderboards.mtbench import grade_answers

    with progress() as show:
        found = grade_answers(
            questions,
            answers,
            out=out,
            judge=endpoint.by(by),
            references=references,
            command=command_line(),
            on_progress=show,
            on_failure=tell_failures(),
            on_note=say,
        )
    conclude(found, run_of(into, answers, out))
