"""`coala comal matrix`: policies against each other, from checkpoints of a run to COALA-guided models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coala.cli.flags import with_settings
from coala.cli.options import Download, TrustCode
from coala.cli.terminal import write
from coala.comal.named_oracles import ORACLES
from coala.settings import Device, Template, Win

EPILOG = (
    """
\b
Entrants, each with a name before it if you like (NAME=...):
  FOLDER or hub name    a model
  RUN                   of `coala comal train`: the last policy; RUN@start, RUN@2 (after update 2), RUN@all
  RUN                   of `coala align`: guided by its head as the run says; RUN@unguided
  FILE.jsonl            answers that are there already (generations of these prompts)
"""
    + ORACLES
    + """
\b
Example:
  `coala comal matrix runs/comal@all guided=runs/demo -p prompts.txt --oracle judge:./judge -o runs/matrix`
"""
)


@with_settings
def matrix(
    entrants: Annotated[list[str], typer.Argument(metavar="ENTRANTS...", help="Two or more; see below.")],
    *,
    prompts: Annotated[Path, typer.Option("--prompts", "-p", help="Prompts (.txt, .jsonl, ...) or pairs.")],
    oracle: Annotated[str, typer.Option(help="What prefers one answer to another; see below.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder; answers are kept, so that entrants can be added.")],
    samples: Annotated[int, typer.Option(min=1, help="Answers per prompt.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Of entrants that are not guided by a run.")] = 1.0,
    template: Template = "auto",
    mode: Annotated[Win, typer.Option(help="Who is preferred, or the mean probability.")] = "hard",
    device: Device = "auto",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    cache: Annotated[
        Path | None, typer.Option(help="Verdict cache, which runs may share (default: verdicts.sqlite next to OUT).")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Delete what OUT holds and start over.")] = False,
    trust_remote_code: TrustCode = False,
    download: Download = False,
) -> None:
    """Win rates of every entrant against every other, with intervals over prompts, and the mixture that none beats.

    M + M^T = 100; both orders of a pair are judged and averaged. Writes OUT/matrix.json and OUT/matrix.html.
    """
    from coala.cli.output import emit, progress, say, table
    from coala.comal.entrants import AnswerSampling
    from coala.comal.report import matrix_rows, nash_rows
    from coala.comal.runs import play_matrix

    with progress() as show:
        rates, nash, result = play_matrix(
            entrants,
            prompts,
            out,
            oracle=oracle,
            sampling=AnswerSampling(samples, max_new_tokens, temperature, top_p),
            template=template,
            mode=mode,
            device=device,
            seed=seed,
            cache=cache,
            restart=restart,
            on_progress=show,
            on_note=say,
        )
    for head, cells in (matrix_rows(rates), nash_rows(nash)):
        table(cells, head)
        write()
    if rates.failures:
        say(f"{rates.failures} pairs have no verdict and were left out.")
    write(f"page: {out / 'matrix.html'}")
    emit(result)
