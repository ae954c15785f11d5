"""Benchmarks of reward models: `coala eval rewardbench`, `rewardbench2`, `rmbench`, `judgebench`; `coala bench`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from coala.cli.flags import with_settings
from coala.cli.options import Download, TrustCode
from coala.cli.output import command_line, conclude, progress
from coala.settings import RewardRule, SubsetWeights

Scores = Annotated[
    Path | None,
    typer.Argument(
        help="File of saved scores of right and wrong replies, one row per item: JSON Lines or CSV, plain or .gz."
    ),
]
BatchTokens = Annotated[int, typer.Option(min=1, help="Batch size of a forward pass, in tokens.")]
Out = Annotated[
    Path | None,
    typer.Option(help="Folder for results.json (upstream's format), scores.json and ranking.json (default: none)."),
]
Name = Annotated[str | None, typer.Option(help="Name of the model in the results (default: the run folder's).")]


@dataclass(frozen=True, kw_only=True)
class ScorerFlags:
    """Who scores, if no scores are given, and which replies."""

    replies: Annotated[
        list[Path] | None,
        typer.Option(
            "--replies", metavar="FILE", help="File of the benchmark's prompts and replies as published. Repeatable."
        ),
    ] = None
    run: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="Run whose head scores --replies, or whose report saved scores are added to (default: none).",
        ),
    ] = None
    rule: Annotated[
        RewardRule | None,
        typer.Option(help="Rule that scores replies instead of a head: length, or RM-Bench's style (default: none)."),
    ] = None
    out: Out = None
    name: Name = None
    batch_tokens: BatchTokens = 4096
    trust_remote_code: TrustCode = False
    download: Download = False


@with_settings
def rewardbench(
    scores: Scores = None,
    *,
    weights: Annotated[
        SubsetWeights,
        typer.Option(help="Weights of the subsets: their `published` example counts, or the file's `rows`."),
    ] = "published",
    scorer: ScorerFlags,
) -> None:
    """RewardBench: ranking accuracy by subset, a tie counting as wrong, and example-weighted section scores.

    From saved scores (subset, chosen_score, rejected_score), or of --replies with a run's head or a rule.
    """
    _evaluate("rewardbench", scores, scorer, weights=weights)


@with_settings
def rewardbench2(scores: Scores = None, *, scorer: ScorerFlags) -> None:
    """RewardBench 2: the best of four replies in five subsets, Ties by their own formula, and the mean of the six.

    From saved scores (id, subset, scores, num_correct), or of --replies with a run's head or a rule.
    """
    _evaluate("rewardbench2", scores, scorer)


@with_settings
def rmbench(scores: Scores = None, *, scorer: ScorerFlags) -> None:
    """RM-Bench: accuracy by the styles of right and wrong reply; easy, normal and hard; domains and their mean.

    From saved scores (domain, score_chosen, score_rejected of three each), or of --replies, one file per domain or a
    folder of them, with a run's head or a rule.
    """
    _evaluate("rmbench", scores, scorer)


@with_settings
def judgebench(scores: Scores = None, *, scorer: ScorerFlags) -> None:
    """JudgeBench: accuracy over all pairs and by category, a tie counting as wrong.

    From saved scores of one or several reward models (pair_id, label, scores), to which --replies adds categories; or
    of --replies with a run's head or a rule.
    """
    _evaluate("judgebench", scores, scorer)


def by_head(
    file: Annotated[
        Path,
        typer.Argument(help="File of rows with prompt, chosen, rejected and subset: JSON Lines or CSV, plain or .gz."),
    ],
    run: Annotated[
        Path, typer.Option(help="Run whose head scores the replies, and whose report the result is added to.")
    ],
    out: Out = None,
    name: Name = None,
    batch_tokens: BatchTokens = 4096,
    trust_remote_code: TrustCode = False,
    download: Download = False,
) -> None:
    """RewardBench with a run's head, on any device: accuracy by subset and section, with intervals.

    A tie counts as wrong, as upstream. Replies to one prompt share its forward pass.
    """
    _evaluate("rewardbench", None, ScorerFlags(replies=[file], run=run, out=out, name=name, batch_tokens=batch_tokens))


def _evaluate(form: str, scores: Path | None, by: ScorerFlags, weights: SubsetWeights = "published") -> None:
    from coala.leaderboards.record import run_of
    from coala.leaderboards.reward_benchmarks import count_rule, count_scores, one_source, run_benchmark

    files = by.replies or []
    one_source(scores, files, by.rule, by.run)
    options: dict[str, Any] = {"command": command_line()}
    if scores is not None:
        found = count_scores(form, scores, files=files, weights=weights, **options)
    elif by.rule is not None:
        found = count_rule(form, by.rule, files, **options)
    else:
        assert by.run is not None
        options |= {"out": by.out, "name": by.name, "batch_tokens": by.batch_tokens}
        with progress() as show:
            found = run_benchmark(form, by.run, files, on_progress=show, **options)
    conclude(found, run_of(by.run, scores))
