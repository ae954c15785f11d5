"""`coala data`: look at, check, convert and make preference pairs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from coala.values import Pair

app = typer.Typer(no_args_is_help=True, help="Look at, check, convert and make preference pairs.")

Sources = Annotated[
    list[str],
    typer.Argument(metavar="PAIRS...", help="jsonl, json, csv, tsv or parquet, plain or .gz; or a hub dataset"),
]


class Role(StrEnum):
    """The speakers whose replies can be compared."""

    assistant = "assistant"
    user = "user"


Format = Annotated[str, typer.Option(help="Name of the format; `auto` recognises it (see `coala data formats`).")]


@app.command(epilog="Example: `coala data check train.jsonl --against test.jsonl`")
def check(
    pairs: Sources,
    format: Format = "auto",
    against: Annotated[
        list[str] | None, typer.Option(help="Test file(s) that must share no prompt with PAIRS.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model whose context the pairs have to fit.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest prompt plus reply; the model's context.")] = None,
) -> None:
    """Read every row and list what is wrong: FILE:ROW: FIELD: found; expected; how to mend. Exit code 2 on errors."""
    from coala.cli.screen import emit
    from coala.data import check as check_pairs

    count_tokens = None
    if model is not None:
        from coala.backbone import load_backbone

        backbone = load_backbone(model)
        max_tokens = max_tokens or backbone.max_tokens

        def count_tokens(pair: Pair) -> int:
            return backbone.count_tokens(pair)

    findings = check_pairs(pairs, format, against=against, count_tokens=count_tokens, max_tokens=max_tokens)
    for finding in (*findings.errors, *findings.warnings, *findings.notes):
        print(finding)
    emit({"pairs": findings.n_pairs, "errors": len(findings.errors), "warnings": len(findings.warnings)})
    if findings.errors:
        raise typer.Exit(2)


@app.command(epilog="Example: `coala data convert hh.jsonl.gz --out pairs.jsonl`")
def convert(
    pairs: Sources,
    out: Annotated[Path, typer.Option(help="File to write: one pair per line, TRL's conversational format.")],
    format: Format = "auto",
) -> None:
    """Write pairs of any known format in one plain form."""
    from coala.cli.screen import emit
    from coala.data import read_pairs
    from coala.store import save_pairs

    found = list(read_pairs(pairs, format))
    save_pairs(out, found)
    emit({"pairs": len(found), "out": out})


@app.command(epilog="Example: `coala data alternate dialogues.jsonl --out pairs.jsonl`")
def alternate(
    conversations: Sources,
    out: Annotated[Path, typer.Option(help="File to write.")],
    role: Annotated[Role, typer.Option(help="Whose replies are compared.")] = Role.assistant,
) -> None:
    """Pairs from conversations: the reply that follows is chosen, the same speaker's next reply is rejected.

    Prints how well position cues alone (length, question marks) tell the two apart: what is learnt may be position.
    """
    from coala.cli.screen import emit, say
    from coala.data import position_cues, read_pairs
    from coala.store import save_pairs

    pairs = list(read_pairs(conversations, "conversations", role=role.value))
    save_pairs(out, pairs)
    cues = position_cues(pairs)
    for cue, accuracy in cues.items():
        say(f"{cue} alone tells chosen from rejected: {accuracy}")
    emit({"pairs": len(pairs), "conversations": len({p.group for p in pairs}), "cues": cues, "out": out})


@app.command(epilog="Example: `coala data show pairs.jsonl --n 3`")
def show(
    pairs: Sources,
    format: Format = "auto",
    n: Annotated[int, typer.Option(min=1, help="How many pairs.")] = 3,
    width: Annotated[int, typer.Option(min=40, help="Columns.")] = 100,
) -> None:
    """Print a few pairs, chosen and rejected side by side."""
    from itertools import islice

    from coala.cli.screen import emit, side_by_side
    from coala.data import read_pairs
    from coala.values import conversation_text

    shown = list(islice(read_pairs(pairs, format), n))
    for pair in shown:
        print(f"\n{conversation_text(pair.prompt)}\n")
        side_by_side(pair.chosen, pair.rejected, ("chosen", "rejected"), width)
    emit({"shown": len(shown)})


@app.command()
def formats() -> None:
    """List the formats that are recognised."""
    from coala.cli.screen import emit, table
    from coala.data import READERS

    table([[name, reader.about] for name, reader in READERS.items()], ["format", "rows look like"])
    emit({"formats": list(READERS)})
