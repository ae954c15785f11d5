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
        Literal["loss", "accuracy"], typer.Option(help="Measure the effect on this, of the held-out pairs.")
    ] = "loss",
    reply: Annotated[str | None, typer.Option(help="Measure it on the score of this reply; give --prompt too.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The prompt that --reply answers.")] = None,
    pair: Annotated[
        int | None, typer.Option(min=1, help="Measure it on the margin of this line of RUN/pairs-eval.jsonl.")
    ] = None,
    by: Annotated[Literal["pair", "group", "rater"], typer.Option(help="What is left out, one at a time.")] = "pair",
    top: Annotated[int, typer.Option(min=1, max=100, help="How many to list of each sign, refitted exactly.")] = 10,
    attack: Annotated[
        int, typer.Option(min=0, help="Search greedily for so many flips that lower the held-out accuracy.")
    ] = 0,
    out: Annotated[Path | None, typer.Option(help="Write a JSON line for every pair, group or rater.")] = None,
    trust_remote_code: TrustCode = False,
    download: Download = False,
) -> None:
    """The pairs that helped and harmed the head most, proved complete, and a bound on what poisoned pairs could do.

    Gates, ridge, sparsity, coordinates and temperature are held as they are. Adds to the run's report.

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
        f"\nContradicted most by all others, look for exchanged replies here first: line {', '.join(against) or 'none'}"
    )
    twins = found["copies"]
    write(
        f"\n{twins['pairs']} pairs share their features with another ({twins['sets']} sets); {twins['contrary']} "
        "have a contrary twin"
    )
    write("\nPoisoned pairs, held-out pairs ranked right now: " + f"{100 * found['poison']['accuracy']:.1f} %")
    table(poison_rows(found["poison"]), POISON_HEAD)
    write("\n".join(poison_words(found["poison"])))


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
