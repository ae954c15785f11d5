"""RewardBench from saved scores (`coala eval rewardbench`), and scored by a run's head (`coala bench rewardbench`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coala.cli.options import Download, RunOption, TrustCode
from coala.cli.output import say

if TYPE_CHECKING:
    from coala.evaluation.rewardbench import Ranking
    from coala.store import RunFolder


class Weigh(StrEnum):
    """What subsets weigh in their section."""

    published = "published"
    rows = "rows"


def from_scores(
    scores: Annotated[
        Path, typer.Argument(help="Rows with subset, chosen_score and rejected_score: JSON Lines or CSV, plain or .gz.")
    ],
    weights: Annotated[
        Weigh, typer.Option(help="What subsets weigh: their `published` example counts, or the file's `rows`.")
    ] = Weigh.published,
    into: RunOption = None,
) -> None:
    """RewardBench: ranking accuracy by subset, a tie counting as wrong, and example-weighted section scores."""
    from coala.evaluation.rewardbench import ranking, read_scores
    from coala.leaderboards.record import run_of

    run = run_of(into, scores)
    found = ranking(read_scores(scores), weights="published" if weights is Weigh.published else "rows")
    _tell(found, run, of=scores.name.partition(".")[0], files={"scores": scores}, settings={"weights": weights.value})


def by_head(
    file: Annotated[
        Path, typer.Argument(help="Rows with prompt, chosen, rejected and subset: JSON Lines or CSV, plain or .gz.")
    ],
    run: Annotated[Path, typer.Option(help="The run whose head scores the replies, and whose report tells of it.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for results.json (upstream's form), scores.json and ranking.json.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The model's name in the results (default: the run folder's).")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one forward pass.")] = 4096,
    trust_remote_code: TrustCode = False,
    download: Download = False,
) -> None:
    """RewardBench with a run's head, on any device: accuracy by subset and section, with intervals.

    A tie counts as wrong, as upstream. Replies to one prompt share its forward pass.
    """
    from coala.cli.output import progress
    from coala.evaluation.rewardbench import ranking
    from coala.export.rewardbench import read_benchmark, results, score_rows
    from coala.features import extract
    from coala.leaderboards.record import fitted
    from coala.store import RunFolder, save_json

    benchmark = read_benchmark(file)
    backbone, head = fitted(run)
    with progress() as show:
        features = extract(
            benchmark.pairs,
            backbone,
            head.spec,
            prompt_features=head.needs_prompt,
            batch_tokens=batch_tokens,
            on_batch=lambda done, total, tokens: show("replies", done, total),
        )
    chosen = head.score(features.chosen, features.prompt)
    rejected = head.score(features.rejected, features.prompt)
    found = ranking(benchmark.scored(chosen, rejected))
    called = name or run.resolve().name
    if out is not None:
        sections = {key: value.value for key, value in found.sections.items()}
        save_json(out / "results.json", results(found, called, head.spec))
        save_json(out / "scores.json", score_rows(benchmark, chosen.tolist(), rejected.tolist()))
        save_json(out / "ranking.json", {"by_section": sections, **asdict(found), "overall": _finite(found.overall)})
    _tell(found, RunFolder.open(run), of=called, files={"benchmark": file}, settings={"weights": "published"})


def _tell(
    found: Ranking, run: RunFolder | None, *, of: str, files: Mapping[str, Path], settings: Mapping[str, Any]
) -> None:
    """The table, the record in the run's report, and the JSON line."""
    from coala.cli.output import command_line, finish, table
    from coala.leaderboards.record import figure, interval, keep
    from coala.report import Evaluation

    named = {**found.sections, "all rows": found.rows}
    table(
        [[name, interval(value, 4), str(value.n)] for name, value in (*found.subsets.items(), *named.items())]
        + [["mean of sections", f"{found.overall:.4f}", ""], ["share of ties", f"{found.ties:.4f}", ""]],
        ["subset or section", "accuracy", "n"],
    )
    evaluation = Evaluation(
        kind="rewardbench",
        of=of,
        title=f"RewardBench: {of}",
        command=command_line(),
        figures=[figure(name, value, even=0.5) for name, value in named.items()]
        + [figure(name, value) for name, value in found.subsets.items()],
        files=dict(files),
        settings=dict(settings),
        facts={"mean of sections": found.overall, "share of ties": found.ties},
        remarks=found.remarks,
    )
    finish(asdict(found) | keep(run, evaluation, say), found.remarks)


def _finite(value: float) -> float | None:
    return value if value == value else None  # JSON has no nan
