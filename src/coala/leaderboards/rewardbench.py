"""RewardBench: from saved scores, or with a run's head as the scorer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coala.callbacks import OnProgress
from coala.leaderboards.record import Outcome, fitted, interval, measure
from coala.settings import SubsetWeights

if TYPE_CHECKING:
    from coala.evaluation.rewardbench import Ranking


def count_rewardbench(scores: Path, *, weights: SubsetWeights = "published", command: str = "") -> Outcome:
    """Accuracy by subset and section of saved scores; what subsets weigh: their published counts, or the file's."""
    from coala.evaluation.rewardbench import ranking, read_scores

    found = ranking(read_scores(scores), weights=weights)
    name = scores.name.partition(".")[0]
    return _outcome(found, name, files={"scores": scores}, settings={"weights": weights}, command=command)


def run_rewardbench(
    run: Path,
    file: Path,
    *,
    out: Path | None = None,
    name: str | None = None,
    batch_tokens: int = 4096,
    on_progress: OnProgress,
    command: str = "",
) -> Outcome:
    """The run's head scores the replies of ``file``; a tie counts as wrong, as upstream.

    Replies to one prompt share its forward pass. ``out`` gets results.json in upstream's form, scores.json and
    ranking.json.
    """
    from coala.evaluation.rewardbench import ranking
    from coala.export.rewardbench import read_benchmark, results, score_rows
    from coala.features import extract
    from coala.store import plain, save_json

    benchmark = read_benchmark(file)
    backbone, head = fitted(run)
    features = extract(
        benchmark.pairs,
        backbone,
        head.spec,
        prompt_features=head.needs_prompt,
        batch_tokens=batch_tokens,
        on_batch=lambda done, total, tokens: on_progress("replies", done, total),
    )
    chosen = head.score(features.chosen, features.prompt)
    rejected = head.score(features.rejected, features.prompt)
    found = ranking(benchmark.scored(chosen, rejected))
    called = name or run.resolve().name
    if out is not None:
        sections = {key: value.value for key, value in found.sections.items()}
        save_json(out / "results.json", results(found, called, head.spec))
        save_json(out / "scores.json", score_rows(benchmark, chosen.tolist(), rejected.tolist()))
        save_json(out / "ranking.json", {"by_section": sections, **plain(found)})
    return _outcome(found, called, files={"benchmark": file}, settings={"weights": "published"}, command=command)


def _outcome(
    found: Ranking, of: str, *, files: Mapping[str, Path], settings: Mapping[str, Any], command: str
) -> Outcome:
    from coala.report import Evaluation

    named = {**found.sections, "all rows": found.rows}
    rows = [[name, interval(value, 4), str(value.n)] for name, value in (*found.subsets.items(), *named.items())]
    rows += [["mean of sections", f"{found.overall:.4f}", ""], ["share of ties", f"{found.ties:.4f}", ""]]
    evaluation = Evaluation(
        kind="rewardbench",
        of=of,
        title=f"RewardBench: {of}",
        command=command,
        measures=[measure(name, value, even=0.5) for name, value in named.items()]
        + [measure(name, value) for name, value in found.subsets.items()],
        files=dict(files),
        settings=dict(settings),
        facts={"mean of sections": found.overall, "share of ties": found.ties},
        remarks=found.remarks,
    )
    table = rows, ["subset or section", "accuracy", "n"]
    return Outcome(evaluation, asdict(found), [table], remarks=found.remarks)
