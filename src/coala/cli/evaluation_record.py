"""Evaluations on their way into a run: which run, the command as it was given, samples, and the record itself."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coala.cli.judging import bare

if TYPE_CHECKING:
    from coala.backbone import LanguageModel
    from coala.report import Evaluation, Figure, Sample
    from coala.store import RunFolder
    from coala.values import ConvexHead, Estimate, Generation, Judgement, Turn

RunOption = Annotated[
    Path | None,
    typer.Option("--run", metavar="RUN", help="Run whose report this belongs to; the one the files lie in if any."),
]


def run_of(named: Path | None, *files: Path | None) -> RunFolder | None:
    """The run that was named, else the one that the first of ``files`` to be in a run lies in."""
    from coala.store import RunFolder

    if named is not None:
        return RunFolder.open(named)
    for file in files:
        for folder in file.absolute().parents if file is not None else ():
            if (folder / "run.json").is_file() and (folder / "stages").is_dir():
                return RunFolder(folder)
    return None


def require_head(run: Path) -> None:
    """Say so if the run has no head."""
    from coala.store import RunFolder, StoreError

    if not (RunFolder.open(run).path / "head" / "head.json").is_file():
        raise StoreError(f"{run}: has no fitted head yet. Finish it with `coala align`, and try again.")


def fitted(run: Path) -> tuple[LanguageModel, ConvexHead]:
    """Model and head of a run; says so if it has none."""
    from coala.alignment import load_parts

    require_head(run)
    backbone, head, _ = load_parts(run)
    return backbone, head


def command_line() -> str:
    """The command as it was given; names and passwords in addresses are left out."""
    return bare(shlex.join(["coala", *sys.argv[1:]]))


def figure(name: str, estimate: Estimate, form: str = "share", even: float | None = None) -> Figure:
    from coala.report import Figure

    return Figure(name, estimate, form, even)  # type: ignore[arg-type]


def comparisons(
    ours: Sequence[Generation],
    reference: Sequence[Generation],
    judgements: Sequence[Judgement],
    prompts: Mapping[str, Sequence[Turn]],
    names: tuple[str, str] | None = None,
) -> list[Sample]:
    """A few comparisons, spread evenly over all, with what was said of them in each order.

    Sides are named as in the judgements, or by ``names``, ours first.
    """
    from coala.evaluation.harness import matched_replies, sides_of
    from coala.report import Sample
    from coala.values import conversation_text

    said: dict[str, list[tuple[str, str]]] = {}
    for judgement in judgements:
        found = "no verdict" if judgement.preference is None else f"{judgement.preference:.2f}"
        said.setdefault(judgement.prompt_id, []).append((judgement.first, found))
    judged = [pair for pair in matched_replies(ours, reference) if pair[0].prompt_id in said]
    samples = []
    for mine, theirs in spread(judged):
        prompt = tuple(prompts.get(mine.prompt_id, ()))
        sides = sides_of(mine, theirs)
        called = dict(zip(sides, names or sides, strict=True))
        verdict = "; ".join(f"{called[first]} shown first: {found}" for first, found in said[mine.prompt_id])
        verdict = f"Probability that the reply shown first is better. {verdict}."
        replies = {called[sides[0]]: mine.text, called[sides[1]]: theirs.text}
        samples.append(Sample(conversation_text(prompt) if prompt else "", replies, verdict))
    return samples


def spread(rows: Sequence[Any]) -> Sequence[Any]:
    """As many rows as a record shows, evenly over all."""
    from coala.report.evaluations import SAMPLES

    return rows[:: max(1, len(rows) // SAMPLES)][:SAMPLES]


def keep(run: RunFolder | None, evaluation: Evaluation) -> dict[str, Any]:
    """The evaluation into the run's report, if there is a run; what the JSON line tells of it."""
    from coala.cli.output import say
    from coala.report import add_evaluation

    if run is None:
        return {}
    kept = add_evaluation(run, evaluation)
    page = run.path / "report.html"
    say(f"kept in {kept}" + (f" and shown in {page}" if page.exists() else f"; `coala report {run.path}` shows it"))
    return {"evaluation": str(kept)}
