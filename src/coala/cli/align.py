"""`coala align`: preference pairs in, a certified head, guided replies and a report out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coala.cli.flags import Given, Of, with_settings
from coala.cli.options import RecipeFile, SetOption, TrustCode, Workers
from coala.cli.terminal import write
from coala.cli.tracking import Track, tracked
from coala.messages import CoalaError
from coala.settings import EvaluationSettings, GuidanceSettings, HeadSettings, ModelSettings, PairSettings

if TYPE_CHECKING:
    from coala.alignment.parts import LoadParts
    from coala.recipe import Recipe
    from coala.settings import TrackerName
    from coala.store import RunFolder


@with_settings
def align(
    pairs: Annotated[
        list[str] | None, typer.Argument(metavar="PAIRS...", help="File(s) of training pairs, or a hub dataset.")
    ] = None,
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder; an existing run is resumed.")] = Path(
        "runs/run"
    ),
    recipe: RecipeFile = None,
    model: Annotated[Given, Of(ModelSettings)],
    which: Annotated[Given, Of(PairSettings)],
    head: Annotated[Given, Of(HeadSettings)],
    guidance: Annotated[Given, Of(GuidanceSettings)],
    evaluation: Annotated[Given, Of(EvaluationSettings)],
    set_: SetOption = None,
    cache: Annotated[
        Path | None, typer.Option(envvar="COALA_CACHE", help="Feature cache shared between runs (default: none).")
    ] = None,
    n_workers: Workers = 1,
    distil: Annotated[
        bool, typer.Option("--distil", help="Distil the guidance at the end and report on the policy.")
    ] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Delete everything in RUN and start over.")] = False,
    track: Track = None,
    trust_remote_code: TrustCode = False,
) -> None:
    """Check pairs, extract features, fit the convex head, evaluate and report, in one resumable command.

    Rerun the same command to resume after an interruption. After a change of head, guidance, judge or reply length,
    only the steps that depend on it are redone.

    Examples:

    `coala align pairs.jsonl --model ./my-model --out runs/mine`

    `coala align train.jsonl.gz --eval test.jsonl.gz -m ./my-model -o runs/mine --mode block --set head.tolerance=1e-6`

    `coala align pairs.jsonl --model ./my-model --out runs/mine --workers 4`

    `coala align pairs.jsonl --model ./my-model --out runs/mine --distil`
    """
    from coala.recipe import load_recipe, set_option

    own = {**model, "trust_remote_code": trust_remote_code or None}
    given = {"pairs": pairs or None, **which, "model": own}
    given |= {"head": head, "guidance": guidance, "evaluation": evaluation}
    settings = load_recipe(recipe, given, *map(set_option, set_ or []))
    then = distil_and_show if distil else None
    run_and_show(settings, out, restart, cache=cache, n_workers=n_workers, track=track, then=then)


def run_and_show(
    settings: Recipe,
    out: Path,
    restart: bool = False,
    samples: int = 0,
    cache: Path | None = None,
    n_workers: int = 1,
    track: TrackerName | None = None,
    then: Callable[[RunFolder], Mapping[str, Any]] | None = None,
) -> None:
    """Carry out a recipe, print the summary table and, on the last line, the summary as JSON.

    ``then`` goes on with the finished run and returns what the summary gains by it.
    """
    from coala.alignment import align_recipe, check_settings, evidence_notes, summary_rows
    from coala.alignment.parts import guidance_of
    from coala.cli.output import emit, insistent, progress, say, table
    from coala.store import RunFolder, head_for

    run = RunFolder(out)
    check_settings(settings, run, cache, restart=restart)
    if restart or not (run.path / "run.json").exists():
        _plan_first(settings, n_workers)
    if restart:
        run.restart()
    with tracked(track, out, asdict(settings)) as told, progress() as shown, insistent(told.following(shown)) as show:
        content = align_recipe(settings, run, on_progress=show, on_note=say, cache=cache, n_workers=n_workers)
        told.summarise(_outcome(content))
    table(summary_rows(content))
    head = head_for(run.path / "head", settings.guidance.rater)
    for note in evidence_notes(run.path, head, guidance_of(settings)):
        say(f"note: {note}")
    for sample in content.get("samples", [])[:samples]:
        _show(sample)
    more = then(run) if then else {}
    write(f"\nreport: {run.path / 'report.html'}")
    emit({"run": run.path, "report": run.path / "report.html", **content["summary"], **more})


def _show(sample: Mapping[str, Any]) -> None:
    """A prompt, and below it the two replies side by side."""
    from coala.cli.output import side_by_side
    from coala.values import conversation_text

    write(f"\n{conversation_text(sample['prompt'])}\n")
    side_by_side(sample["unguided"], sample["guided"], ("unguided", "guided"))


def distil_and_show(run: RunFolder, parts: LoadParts | None = None) -> dict[str, Any]:
    """Distil the finished run as its recipe says, show its policy beside its other replies; what was measured.

    ``parts`` are the run's, if its model is loaded once for more than this.
    """
    from coala.cli.output import progress, say, table
    from coala.distil.side_by_side import HEADS, distil_into_report, table_rows

    with progress() as show:
        content = distil_into_report(run.path, on_progress=show, on_note=say, parts=parts)
    if rows := table_rows(content):
        write("")
        table(rows, list(HEADS))
    return {"distilled": content["distilled"]}


def _outcome(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a tracker is told at the end: the summary, win rates by judge, perplexities."""
    rates = {row["judge"]: row["estimate"] for row in content.get("win_rates", [])}
    return {**content["summary"], "win rate": rates, "perplexity": content.get("perplexity", {})}


def _plan_first(settings: Recipe, n_workers: int) -> None:
    """Refuse what cannot fit now, with the flag that would make it fit, not after hours."""
    from coala.cli.output import say
    from coala.plan.plan import make_plan
    from coala.plan.text import first_lines

    try:
        planned = make_plan(settings, probe_seconds=0, n_workers=n_workers)
        lines = first_lines(planned)
    except CoalaError:
        return  # input that cannot be read is for the stages to name, in their order
    for line in lines:
        say(line)
    planned.require(certain=True)
