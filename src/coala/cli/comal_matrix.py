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
Entrants, each optionally named (NAME=...):
  FOLDER or hub name    a model
  RUN                   of `coala comal train`: the last policy; RUN@start, RUN@2 (after update 2), RUN@all
  RUN                   of `coala align`: guided as in the run's recipe; RUN@unguided
  FILE.jsonl            existing answers (generations for these prompts)
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
    entrants: Annotated[list[str], typer.Argument(metavar="ENTRANTS...", help="Two or more entrants; see below.")],
    *,
    prompts: Annotated[Path, typer.Option("--prompts", "-p", help="File of prompts (.txt, .jsonl, ...) or pairs.")],
    oracle: Annotated[str, typer.Option(help="Judge of which answer is better; see below.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Output folder; answers are saved, so entrants can be added later.")
    ],
    samples: Annotated[int, typer.Option(min=1, help="Number of answers per prompt.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")] = 1.0,
    top_p: Annotated[
        float, typer.Option(help="Nucleus sampling threshold of entrants that are not guided (1: off).")
    ] = 1.0,
    template: Template = "auto",
    mode: Annotated[
        Win, typer.Option(help="What counts as a win: hard, which answer is preferred, or mean, the mean probability.")
    ] = "hard",
    device: Device = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the answers.")] = 0,
    cache: Annotated[
        Path | None, typer.Option(help="Verdict cache; runs can share it (default: verdicts.sqlite next to OUT).")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Delete everything in OUT and start over.")] = False,
    trust_remote_code: TrustCode = False,
    download: Download = False,
) -> None:
    """Compute win rates between all entrants, with intervals over prompts, and the unbeaten mixture.

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
        say(f"{rates.failures} pairs have no verdict and were excluded.")
    write(f"page: {out / 'matrix.html'}")
    emit(result)
