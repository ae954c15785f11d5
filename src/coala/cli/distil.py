"""`coala distil`: a run's guidance as a change of its model's weights, for any program to serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from coala.cli.flags import Given, every, with_settings
from coala.cli.options import Download, TrustCode
from coala.distil.settings import AdapterSettings, check_vehicle
from coala.settings import DistilSettings, Vehicle


@with_settings
def distil(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run folder.")],
    *,
    settings: Annotated[Given, every(DistilSettings)],
    into: Annotated[
        Vehicle,
        typer.Option(
            "--into",
            help="What is changed: the output layer (one convex program) or a LoRA adapter of all layers (SFT).",
        ),
    ] = "output",
    adapter: Annotated[AdapterSettings, every(AdapterSettings)],
    measure: Annotated[
        bool,
        typer.Option(
            "--measure", help="Also sample the policy on the run's held-out prompts: wins, divergence, perplexity."
        ),
    ] = False,
    to: Annotated[
        Literal["checkpoint", "gguf", "lora", "gguf-lora", "merged"] | None,
        typer.Option(
            "--to",
            help="Format to export: a Hugging Face folder (an adapter: merged), GGUF, LoRA, or LoRA in GGUF "
            "(default: none).",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File or folder --to writes; must not exist (default: none).")
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="GGUF file to change, for gguf (default: the one the model was loaded from).")
    ] = None,
    precision: Annotated[
        Literal["f16", "q8_0"], typer.Option(help="Number format of the output layer in GGUF; q8_0 is half the size.")
    ] = "f16",
    trust_remote_code: TrustCode = False,
    download: Download = False,
) -> None:
    """Distil a run's guidance into its model's weights, for full speed in any program.

    Changes the output layer by one convex program with a certificate, or trains a LoRA adapter of all layers by SFT on
    the same replies. Writes RUN/distilled or RUN/distilled-adapter. Nothing is uploaded. A setting that is not given
    is that of the run's recipe (`distil:` in RUN/run.json).

    Examples:

    `coala distil runs/demo`

    `coala distil runs/demo --to checkpoint --out distilled`

    `coala distil runs/demo --into adapter --measure --to merged --out merged`
    """
    from coala.cli.output import emit, progress, say, table
    from coala.distil.adapter import distil_adapter
    from coala.distil.measured import measure as measured
    from coala.distil.stage import distil, settings_of
    from coala.export.policy import export_policy, planned

    permitted: dict[str, Any] = {"trust_remote_code": trust_remote_code, "download": download}
    check_vehicle(into, settings, adapter)
    planned(to, out, base, into, run, precision)
    exported: dict[str, Any] = {"base": base, "precision": precision, **permitted}
    wanted = settings_of(run, settings)
    with progress() as show:
        told: dict[str, Any] = {"on_progress": show, "on_note": say, **permitted}
        policy = distil_adapter(run, wanted, adapter, **told) if into == "adapter" else distil(run, wanted, **told)
        seen = measured(run, policy, **told) if measure else None
        made = None if to is None or out is None else export_policy(policy, run, to, out, **exported)
    rows = policy.summary_rows() + ([] if seen is None else seen.summary_rows())
    if made is not None:
        rows += made.summary_rows()
    table(rows)
    folder = run / ("distilled-adapter" if into == "adapter" else "distilled")
    certificate = getattr(policy, "certificate", None)
    emit({"folder": folder, "certificate": certificate, "measured": seen, "exported": made})
