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
    """What is audited, and which systems' scores are compared with the cues."""

    bench: Annotated[
        AuditSet, typer.Option(help="Kind of SOURCE: pairs, or a benchmark's published file; auto detects it.")
    ] = "auto"
    format: Format = "auto"
    by: Annotated[str | None, typer.Option(help="Column that names each pair's subset (default: no subsets).")] = None
    subset: Annotated[Files, typer.Option(help="Subset to audit. Repeatable (default: all).")] = None
    questions: Annotated[
        Files, typer.Option(help="File of the judged questions (mtbench, arena, vicuna). Repeatable (default: none).")
    ] = None
    answers: Annotated[Files, typer.Option(help="File of the judged answers. Repeatable (default: none).")] = None
    scores: Annotated[
        Files,
        typer.Option(
            help="File of systems' scores of the same replies, as `coala eval rmbench` reads it. Repeatable "
            "(default: none)."
        ),
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
        typer.Argument(
            metavar="SOURCE...", help="File(s) of pairs, or a benchmark with its replies: jsonl, json, csv, ..."
        ),
    ],
    *,
    held: SetFlags,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model whose likelihood of each reply is added as a cue; encodes every reply (default: none)."
        ),
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(help="Folder of features of exactly these pairs, to compare with the cues (default: none)."),
    ] = None,
    against: Annotated[
        Files, typer.Option(help="File(s) of the other split, to search for leaks (default: none).")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="HTML page to write, in one file (default: none).")] = None,
    balance: Annotated[
        str | None,
        typer.Option(
            help="Cue to balance out of the pairs, e.g. `length` or `surface`; needs --balanced (default: none)."
        ),
    ] = None,
    balanced: Annotated[Path | None, typer.Option(help="File to write the balanced pairs to (default: none).")] = None,
    deals: Annotated[
        int | None,
        typer.Option(min=1, help="Number of random fold assignments (default: 3; 1 above 2,000 comparisons)."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of folds, shuffles and thinning.")] = 0,
    trust_remote_code: TrustCode = False,
) -> None:
    """Measure how often surface cues alone (length, markdown, lists, position, first words) pick the right reply.

    Rules and cross-validated classifiers are compared with chance, overall and by subset; --scores adds what systems
    contribute beyond them. `--balance CUE` writes a subset of the pairs in which that cue carries no information.
    `--format conversations` audits the alternating pairs of conversations.

    Examples: `coala audit pairs.jsonl --against test.jsonl`, `coala audit judgebench.jsonl --scores scores.jsonl`
    """
    from coala.audit import audit_preferences
    from coala.audit.page import audit_summary, render
    from coala.cli.output import emit, progress
    from coala.store import write_atomic

    if (balance is None) != (balanced is None):
        raise CoalaError("Found only one of --balance CUE and --balanced FILE, expected both or neither.")
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
