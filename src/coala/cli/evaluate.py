"""`coala eval`: judging, and figures of published benchmarks; here the app itself and RewardBench."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from coala.cli import alpaca, arena, judge, mtbench
from coala.cli.records import RunOption

app = typer.Typer(
    no_args_is_help=True, help="Have replies judged; compute benchmark figures, end to end or from files."
)
app.command("judge")(judge.judge)
app.command("grade")(judge.grade)
app.command(
    "alpaca",
    epilog="Example: `coala eval alpaca annotations.jsonl.gz --calibration df_gamed.csv "
    "--difficulty instruction_difficulty.csv`",
)(alpaca.alpaca)
app.command("mtbench", epilog="Example: `coala eval mtbench gpt-4_single.jsonl --questions question.jsonl`")(
    mtbench.mtbench
)
app.command("arena", epilog="Example: `coala eval arena judgements.jsonl --model MODEL --baseline gpt-4-0314`")(
    arena.arena
)


class Weigh(StrEnum):
    """What subsets weigh in their section."""

    published = "published"
    rows = "rows"


@app.command(epilog="Example: `coala eval rewardbench scores.jsonl`")
def rewardbench(
    scores: Annotated[
        Path, typer.Argument(help="Rows with subset, chosen_score and rejected_score: JSON Lines or CSV, plain or .gz.")
    ],
    weights: Annotated[
        Weigh, typer.Option(help="What subsets weigh: their `published` example counts, or the file's `rows`.")
    ] = Weigh.published,
    into: RunOption = None,
) -> None:
    """RewardBench: ranking accuracy by subset, a tie counting as wrong, and example-weighted section scores."""
    from coala.cli.records import command_line, figure, keep, run_of
    from coala.cli.screen import finish, interval, table
    from coala.evaluation.rewardbench import ranking, read_scores
    from coala.report import Evaluation

    run = run_of(into, scores)

    found = ranking(read_scores(scores), weights="published" if weights is Weigh.published else "rows")
    named = {**found.sections, "all rows": found.rows}
    table(
        [[name, interval(value, 4), str(value.n)] for name, value in (*found.subsets.items(), *named.items())]
        + [["mean of sections", f"{found.overall:.4f}", ""], ["share of ties", f"{found.ties:.4f}", ""]],
        ["subset or section", "accuracy", "n"],
    )
    evaluation = Evaluation(
        kind="rewardbench",
        of=scores.name.partition(".")[0],
        title=f"RewardBench: {scores.name.partition('.')[0]}",
        command=command_line(),
        figures=[figure(name, value, even=0.5) for name, value in named.items()]
        + [figure(name, value) for name, value in found.subsets.items()],
        files={"scores": scores},
        settings={"weights": weights.value},
        facts={"mean of sections": found.overall, "share of ties": found.ties},
        remarks=found.remarks,
    )
    finish(asdict(found) | keep(run, evaluation), found.remarks)
