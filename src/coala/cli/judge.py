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
        Path,
        typer.Argument(metavar="GENERATIONS_A", help="File of replies (a run's generations-*.jsonl), or a run folder."),
    ],
    reference: Annotated[
        Path | None,
        typer.Argument(
            metavar="[GENERATIONS_B]",
            help="File of replies to the same prompts (default: a run folder's unguided ones).",
        ),
    ] = None,
    *,
    by: By = None,
    endpoint: JudgeFlags,
    pairs: Annotated[
        Path | None,
        typer.Option(help="File of pairs with the prompts (default: pairs-eval.jsonl next to the replies)."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File of judgements to write (default: judgements-JUDGE.jsonl next to A).")
    ] = None,
    one_order: Annotated[
        bool, typer.Option("--one-order", help="Judge with A first only: half the cost, but biased by position.")
    ] = False,
    into: RunOption = None,
) -> None:
    """Judge A's replies against B's in both orders, or a run's guided against its unguided replies.

    Reports win rate, position bias, inconsistency and cost.

    Rerun the same command to resume; cached verdicts are reused. Exit code 1: only partly judged.

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
    questions: Annotated[
        Path, typer.Argument(help="File of questions (question_id, category, turns): JSON Lines, plain or .gz.")
    ],
    answers: Annotated[Path, typer.Argument(help="File of answers (question_id, model_id, choices with turns).")],
    *,
    out: Annotated[Path, typer.Option(help="File to write the graded rows to.")],
    references: Annotated[
        Path | None, typer.Option(help="File of reference answers, in the same format as the answers (default: none).")
    ] = None,
    by: Annotated[
        str, typer.Option("--judge", help="Judge: grade, a folder with judge.yaml, or a .jsonl of prompt templates.")
    ] = "grade",
    endpoint: JudgeFlags,
    into: RunOption = None,
) -> None:
    """Grade answers from 1 to 10, turn by turn, as in MT-Bench; `coala eval mtbench` reads the result.

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
