"""`coala audit`: what cues that understand nothing make of pairs and of benchmarks, and what systems add to them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coala.cli.flags import with_settings
from coala.cli.options import TrustCode
from coala.cli.terminal import write
from coala.messages import CoalaError
from coala.settings import AuditSet, Format, SkipBad

if TYPE_CHECKING:
    from coala.audit import Audit, PreferenceSet

Files = list[str] | None


@dataclass(frozen=True, kw_only=True)
class SetFlags:
    """What is audited, and which systems' scores stand beside the cues."""

    bench: Annotated[
        AuditSet, typer.Option(help="What SOURCE is: pairs, or a benchmark's published file; auto looks at it.")
    ] = "auto"
    format: Format = "auto"
    by: Annotated[str | None, typer.Option(help="Column of pairs that says their subset.")] = None
    subset: Annotated[Files, typer.Option(help="Look at this subset alone; repeat for several.")] = None
    questions: Annotated[Files, typer.Option(help="Questions of judgements (mtbench, arena, vicuna).")] = None
    answers: Annotated[Files, typer.Option(help="Answers that were judged; repeat for several files.")] = None
    scores: Annotated[
        Files, typer.Option(help="Systems' scores of the same replies, as `coala eval rmbench` and its like take them.")
    ] = None
    skip_bad: SkipBad = False

    def read(self, sources: list[str]) -> PreferenceSet:
        from coala.audit import read_set

        options: dict[str, Any] = {name: value for name, value in vars(self).items() if value is not None}
        return read_set(sources, **options)


@with_settings
def audit(
    source: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE...", help="Pairs, or a benchmark with its replies: jsonl, json, csv, ..."),
    ],
    *,
    held: SetFlags,
    model: Annotated[
        str | None, typer.Option(help="Add the likelihood of each reply under this model as a cue; reads every reply.")
    ] = None,
    features: Annotated[
        Path | None, typer.Option(help="Folder of features of exactly these pairs, judged beside the cues.")
    ] = None,
    against: Annotated[Files, typer.Option(help="The other side of the split: look for leaks.")] = None,
    out: Annotated[Path | None, typer.Option(help="Page to write (HTML, needs nothing else).")] = None,
    balance: Annotated[
        str | None, typer.Option(help="Cue to take out of pairs, e.g. `length` or `surface`; needs --balanced.")
    ] = None,
    balanced: Annotated[Path | None, typer.Option(help="File to write what is left to.")] = None,
    deals: Annotated[int | None, typer.Option(min=1, help="Deals of the folds; 3, above 2,000 comparisons 1.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of folds, shuffles and thinning.")] = 0,
    trust_remote_code: TrustCode = False,
) -> None:
    """How far length, markdown, lists, place, first words and other signs alone pick the right reply.

    Rules and cross-validated classifiers, over all and by subset, beside chance; with --scores what systems add to
    them. `--balance CUE` writes a part of the pairs on which that cue says nothing. Conversations: `--format
    conversations` audits their alternating pairs.

    Examples: `coala audit pairs.jsonl --against test.jsonl`, `coala audit judgebench.jsonl --scores scores.jsonl`
    """
    from coala.audit import audit_preferences
    from coala.audit.page import audit_summary, render
    from coala.cli.output import emit, progress
    from coala.store import write_atomic

    if (balance is None) != (balanced is None):
        raise CoalaError("--balance CUE and --balanced FILE go together: the cue to take out, and where to write.")
    found = held.read(source)
    options: dict[str, Any] = {"model": model, "features": _differences(features), "deals": deals, "seed": seed}
    other = None if against is None else replace(held, by=None, subset=None, scores=None).read(against)
    with progress() as show:
        result = audit_preferences(found, against=other, on_progress=show, **options)
    _show(result)
    summary = audit_summary(result)
    if out is not None:
        write_atomic(out, render(result, f"Audit of {', '.join(Path(name).name for name in source)}"))
        summary["out"] = out
    if balance is not None and balanced is not None:
        summary |= _balanced(found, balance, balanced, seed)
    emit(summary)


def _show(result: Audit) -> None:
    """Sentences, then cues, subsets, systems and counts."""
    from coala.audit.page import CUE_HEAD, SYSTEM_HEAD, cue_rows, subset_head, subset_rows, system_rows
    from coala.cli.output import say, table

    for sentence in (*result.verdicts, *result.remarks):
        say(sentence)
    table(cue_rows(result), CUE_HEAD)
    for rows, head in ((subset_rows(result), subset_head(result)), (system_rows(result), SYSTEM_HEAD)):
        if rows:
            write("")
            table(rows, head)
    write("")
    for name, n in result.counts.items():
        write(f"{name}: {n}")


def _differences(folder: Path | None) -> Any:
    """Chosen minus rejected features of a folder."""
    from coala.store import load_features

    if folder is None:
        return None
    held = load_features(folder)
    return held.chosen - held.rejected


def _balanced(found: PreferenceSet, cue: str, file: Path, seed: int) -> dict[str, Any]:
    """Write the pairs that are left once ``cue`` is taken out, and tell how many."""
    from coala.audit import balance
    from coala.cli.output import say
    from coala.store import save_pairs

    if not found.pairs:
        raise CoalaError("Found a benchmark with --balance, expected plain pairs. Fix: add --bench pairs.")
    rest = balance(found.pairs, cue.replace("-", " "), seed=seed)
    save_pairs(file, rest.pairs)
    say(
        f"{rest.cue}: {rest.before} before, {rest.after} after; {len(rest.pairs)} of {len(found.pairs)} pairs are left."
    )
    return {"balanced": file, "pairs_left": len(rest.pairs), "before": rest.before, "after": rest.after}
