"""`coala extract`: pairs to features, resumable."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from coala.cli.flags import every, with_settings
from coala.cli.options import TrustCode
from coala.settings import Format, ModelSettings, WorkerEngine


@with_settings
def extract(
    pairs: Annotated[list[str], typer.Argument(metavar="PAIRS...", help="File(s) of pairs, or a hub dataset.")],
    *,
    model: Annotated[ModelSettings, every(ModelSettings)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the features; an existing one is resumed.")],
    format: Format = "auto",
    n_workers: Annotated[
        int, typer.Option("--workers", min=1, help="Number of processes that extract in parallel.")
    ] = 1,
    engine: Annotated[
        WorkerEngine, typer.Option(help="Where workers run: in local processes, or as Ray tasks.")
    ] = "processes",
    ray_address: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster (default: a local one is started).")
    ] = None,
    trust_remote_code: TrustCode = False,
) -> None:
    """Encode chosen and rejected replies with the frozen model. Features are saved as they come; a rerun resumes.

    Example: `coala extract pairs.jsonl --model ./my-model --out features`
    """
    from coala.alignment.extraction import extract_folder, layer_rows
    from coala.cli.output import emit, progress, say, table

    with progress() as show:
        found = extract_folder(
            pairs,
            out,
            replace(model, trust_remote_code=trust_remote_code),
            format=format,
            n_workers=n_workers,
            engine=engine,
            ray_address=ray_address,
            on_progress=show,
            on_note=say,
        )
    if found.layers:
        head, rows = layer_rows(found.layers)
        table(rows, head)
    features = found.features
    layer = features.spec.layer
    emit({"out": out, "layer": layer, "n_pairs": len(features), "width": features.width, **found.facts})
