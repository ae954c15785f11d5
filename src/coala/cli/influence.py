"""`coala influence`: what each pair, group or rater did to the head of a run; and what poisoned pairs could do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from coala.cli.options import Download, TrustCode


def influence(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder made by `coala align`.")],
    *,
    metric: Annotated[
        Literal["loss", "accuracy"], typer.Option(help="Held-out metric on which effects are measured.")
    ] = "loss",
    reply: Annotated[
        str | None,
        typer.Option(help="Reply on whose score effects are measured instead; needs --prompt (default: none)."),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Prompt of --reply (default: none).")] = None,
    pair: Annotated[
        int | None,
        typer.Option(
            min=1, help="Line of RUN/pairs-eval.jsonl on whose margin effects are measured instead (default: none)."
        ),
    ] = None,
    by: Annotated[
        Literal["pair", "group", "rater"], typer.Option(help="Unit that is left out, one at a time.")
    ] = "pair",
    top: Annotated[
        int, typer.Option(min=1, max=100, help="Number of entries to list for each sign, refitted exactly.")
    ] = 10,
    attack: Annotated[
        int,
        typer.Option(min=0, help="Number of label flips to search for, greedily, that lower the held-out accuracy."),
    ] = 0,
    out: Annotated[
        Path | None, typer.Option(help="File to write, one JSON line per pair, group or rater (default: none).")
    ] = None,
    trust_remote_code: TrustCode = False,
    download: Download = False,
) -> None:
    """List the pairs that helped and harmed the head most (provably complete), and bound what poisoned pairs can do.

    Gates, ridge, sparsity, coordinates and temperature stay fixed. The result is added to the run's report.

    Example: `coala influence runs/demo`
    """
    from coala.cli.output import emit, say
    from coala.receipts import pair_influence

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "download": download, "on_note": say}
    found = pair_influence(
        run, metric=metric, reply=reply, prompt=prompt, pair=pair, by=by, top=top, attack=attack, out=out, **options
    )
    _show(found)
    emit(found)


def _show(found: dict[str, Any]) -> None:
    """Both lists with what is proved of them, and the bounds on poisoned pairs."""
    from coala.cli.output import table
    from coala.cli.terminal import write
    from coala.report.receipts import POISON_HEAD, effect_words, poison_rows, poison_words, proof_words, side_words

    write(f"{found['title']} now: {found['value']:.6g}; {found['units']} {found['by']}s, {found['held']}")
    for side in ("raises", "lowers"):
        write(f"\n{side_words(side, found['good'], found['by'])}: {proof_words(found, side)}")
        rows = found["lists"][side]["rows"]
        table([[row["name"], effect_words(found, row["effect"]), _short(row["chosen"])] for row in rows])
    against = [str(one["line"]) for one in found["contradicted"]]
    write(
        f"\nMost contradicted by all other pairs; check these first for swapped replies: line "
        f"{', '.join(against) or 'none'}"
    )
    twins = found["copies"]
    write(
        f"\n{twins['pairs']} pairs share their features with another ({twins['sets']} sets); {twins['contrary']} "
        "have a twin with the opposite label"
    )
    write("\nPoisoned pairs; held-out accuracy now: " + f"{100 * found['poison']['accuracy']:.1f} %")
    table(poison_rows(found["poison"]), POISON_HEAD)
    write("\n".join(poison_words(found["poison"])))


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
