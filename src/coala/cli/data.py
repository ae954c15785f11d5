"""`coala data`: look at, check, convert and make preference pairs, and the conversations they come from."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from coala.cli.flags import with_settings
from coala.cli.options import TrustCode
from coala.cli.terminal import write
from coala.settings import Format, SkipBad

if TYPE_CHECKING:
    from coala.values import Pair

app = typer.Typer(no_args_is_help=True, help="Show, check, convert and create preference pairs.")

Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="PAIRS...", help="File(s): jsonl, json, csv, tsv or parquet, plain or .gz; or a hub dataset."
    ),
]


@app.command(epilog="Example: `coala data check train.jsonl --against test.jsonl`")
@with_settings
def check(
    pairs: Sources,
    format: Format = "auto",
    against: Annotated[
        list[str] | None, typer.Option(help="Test file(s) that must share no prompt with PAIRS (default: none).")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model whose context the pairs must fit (default: none).")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Maximum length of prompt plus reply, in tokens (default: the model's context).")
    ] = None,
    trust_remote_code: TrustCode = False,
) -> None:
    """Check every row and list the errors: FILE:ROW: FIELD: found X, expected Y. Fix: Z. Exit code 2 on errors."""
    from coala.cli.output import emit, say
    from coala.data import check as check_pairs
    from coala.data.findings import few

    count_tokens = None
    as_read: dict[str, Any] = {}
    if model is not None:
        from coala.backbone import load_backbone

        backbone = load_backbone(model)
        as_read = {"refusal": backbone.refusal, "specials": backbone.specials}
        max_tokens = max_tokens or backbone.max_tokens

        def count_tokens(pair: Pair) -> int:
            return backbone.count_tokens(pair)

    findings = check_pairs(pairs, format, against=against, count_tokens=count_tokens, max_tokens=max_tokens, **as_read)
    for line in (*few(findings.errors), *findings.warnings, *findings.notes):
        write(line)
    if findings.way_on:
        say(findings.way_on)
    emit({"pairs": findings.n_pairs, "errors": len(findings.errors), "warnings": len(findings.warnings)})
    if findings.errors:
        raise typer.Exit(2)


@app.command(epilog="Example: `coala data convert hh.jsonl.gz --out pairs.jsonl`")
@with_settings
def convert(
    pairs: Sources,
    out: Annotated[Path, typer.Option(help="File to write: one pair per line, TRL's conversational format.")],
    format: Format = "auto",
    skip_bad: SkipBad = False,
) -> None:
    """Convert pairs from any known format. Ignored fields are listed."""
    from coala.cli.output import emit
    from coala.store import save_pairs

    found = _sound(pairs, format, skip_bad)
    save_pairs(out, found)
    emit({"pairs": len(found), "out": out}, alone=True)


@app.command(epilog="Example: `coala data alternate dialogues.jsonl --out pairs.jsonl`")
def alternate(
    conversations: Sources,
    out: Annotated[Path, typer.Option(help="File of pairs to write.")],
    role: Annotated[
        Literal["assistant", "user"], typer.Option(help="Speaker whose replies are compared.")
    ] = "assistant",
    context: Annotated[
        str, typer.Option(help="Turns in the prompt: `all` before the reply, the `first` only, or the last N.")
    ] = "all",
) -> None:
    """Make pairs from conversations: the next reply is chosen, the same speaker's following reply is rejected.

    Prints how well cues of position alone (length, question marks) separate the two: a head may only learn position.
    """
    from coala.cli.output import emit, say
    from coala.data import position_cues, read_pairs
    from coala.store import save_pairs

    kept: Literal["all", "first"] | int
    kept = int(context) if context.isdecimal() else cast(Literal["all", "first"], context)
    pairs = list(read_pairs(conversations, "conversations", role=role, context=kept))
    save_pairs(out, pairs)
    cues = position_cues(pairs)
    for cue, accuracy in cues.items():
        say(f"chosen and rejected separated by {cue}: {accuracy}")
    emit({"pairs": len(pairs), "conversations": len({p.group for p in pairs}), "cues": cues, "out": out}, alone=True)


def _sound(names: list[str], format: str, skip_bad: bool) -> list[Pair]:
    """The pairs that can be read. Warnings are said aloud; bad rows end it, or are left out and counted."""
    from coala.cli.output import say
    from coala.data.doctor import gather

    findings = gather(names, format)
    if not (skip_bad and findings.pairs):
        findings.raise_for_errors()
    elif findings.errors:
        say(f"{len(findings.errors)} rows skipped with errors; the first: {findings.errors[0]}")
    for warning in findings.warnings:
        say(str(warning))
    return list(findings.pairs)


@app.command(epilog="Example: `coala data synthesize src/coala/recipes/edufeedback.yaml --out conversations.jsonl`")
def synthesize(
    recipe: Annotated[Path, typer.Argument(help="YAML file of the two agents, fields, moods, lengths and limits.")],
    out: Annotated[Path, typer.Option(help="File to write: one conversation per line, in sampling order.")],
    conversations: Annotated[
        int | None, typer.Option(min=1, help="Number of conversations (default: the recipe's).")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Budget in tokens, over all runs (default: the recipe's).")
    ] = None,
    dollars: Annotated[
        float | None, typer.Option(min=0, help="Budget in dollars, at the recipe's prices (default: the recipe's).")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Number of concurrent conversations (default: the recipe's).")
    ] = None,
    requests_per_minute: Annotated[
        float | None, typer.Option(min=0, help="Maximum number of requests per minute (default: the recipe's).")
    ] = None,
    send_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Environment variable the recipe may send although its name is not that of a key, or the "
            "connection is "
            "unencrypted. Repeatable (default: none).",
        ),
    ] = None,
) -> None:
    """Generate conversations between a student and a tutor through any OpenAI-compatible endpoint.

    Every finished conversation is saved at once in OUT.journal, so rerun the same command to resume.
    OUT is written when the run is finished or the budget spent (exit code 3).
    """
    from coala.cli.output import emit, progress, say
    from coala.data.synthesis_file import synthesize_file

    limits = {"tokens": tokens, "dollars": dollars, "concurrency": concurrency}
    with progress() as show:
        summary, journal = synthesize_file(
            recipe,
            out,
            conversations,
            limits={**limits, "requests_per_minute": requests_per_minute},
            environment=os.environ,
            confirmed=send_key or (),
            on_progress=lambda now: show("conversations", now.done, now.total, str(now)),
            on_note=say,
        )
    emit({**asdict(summary), "dollars": summary.dollars, "out": out, "journal": journal}, alone=True)
    if summary.stopped:
        say(
            f"{summary.stopped}: {summary.kept} of {summary.wanted} conversations. Rerun with a higher limit to resume."
        )
        raise typer.Exit(3)


@app.command(epilog="Example: `coala data show pairs.jsonl --n 3`")
@with_settings
def show(
    pairs: Sources,
    format: Format = "auto",
    n: Annotated[int, typer.Option(min=1, help="Number of pairs to show.")] = 3,
    width: Annotated[int, typer.Option(min=40, help="Width of the output, in columns.")] = 100,
) -> None:
    """Print a few pairs, with chosen and rejected side by side."""
    from itertools import islice

    from coala.cli.output import emit, side_by_side
    from coala.data import read_pairs
    from coala.values import conversation_text

    shown = list(islice(read_pairs(pairs, format), n))
    for pair in shown:
        write(f"\n{conversation_text(pair.prompt)}\n")
        side_by_side(pair.chosen, pair.rejected, ("chosen", "rejected"), width)
    emit({"shown": len(shown)})


@app.command()
def formats() -> None:
    """List the formats that are recognised."""
    from coala.cli.output import emit, table
    from coala.data import READERS

    table([[name, reader.about] for name, reader in READERS.items()], ["format", "rows look like"])
    emit({"formats": list(READERS)})
