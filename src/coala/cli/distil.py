"""`coala distil`: a run's guidance as a change of its model's output layer, for any program to serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from coala.cli.flags import every, with_settings
from coala.cli.options import Download, TrustCode
from coala.distil.settings import DistilSettings


@with_settings
def distil(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run folder.")],
    *,
    settings: Annotated[DistilSettings, every(DistilSettings)],
    to: Annotated[
        Literal["checkpoint", "gguf", "lora", "gguf-lora"] | None,
        typer.Option("--to", help="Write it for others: a Hugging Face folder, GGUF, a LoRA, or a LoRA in GGUF."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where --to writes; it must not exist.")] = None,
    base: Annotated[
        Path | None, typer.Option(help="gguf: the file to change (default: the one the model was loaded from).")
    ] = None,
    precision: Annotated[
        Literal["f16", "q8_0"], typer.Option(help="gguf: numbers of the output layer; q8_0 takes half the room.")
    ] = "f16",
    trust_remote_code: TrustCode = False,
    download: Download = False,
) -> None:
    """Distil a run's guidance into its model, by one convex program with a certificate: plain speed, any program.

    Writes RUN/distilled. Nothing is uploaded.

    Examples:

    `coala distil runs/demo`

    `coala distil runs/demo --to checkpoint --out distilled`
    """
    from coala.cli.output import emit, progress, say, table
    from coala.distil.stage import distil
    from coala.export.policy import export_policy, planned

    permitted = {"trust_remote_code": trust_remote_code, "download": download}
    planned(to, out, base, run, precision)
    with progress() as show:
        policy = distil(run, settings, on_progress=show, on_note=say, **permitted)
        told = {"base": base, "precision": precision, **permitted}
        made = None if to is None or out is None else export_policy(policy, run, to, out, **told)
    rows = policy.summary_rows()
    if made is not None:
        rows += [[made.form, f"{made.path}, {made.n_bytes / 1e6:.1f} MB"]]
    table(rows)
    emit({"folder": run / "distilled", "certificate": policy.certificate, "exported": made})
