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
    pairs: Annotated[list[str], typer.Argument(metavar="PAIRS...", help="Pairs: file(s) or a hub dataset.")],
    *,
    model: Annotated[ModelSettings, every(ModelSettings)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the features; resumed if begun.")],
    format: Format = "auto",
    n_workers: Annotated[int, typer.Option("--workers", min=1, help="Processes that share the work.")] = 1,
    engine: Annotated[
        WorkerEngine, typer.Option(help="Where workers run: processes of this machine, or Ray tasks.")
    ] = "processes",
    ray_address: Annotated[str | None, typer.Option(help="Ray cluster; without it one is started here.")] = None,
    trust_remote_code: TrustCode = False,
) -> None:
    """Encode chosen and rejected replies with the frozen model; written as they come, so that a killed run resumes.

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
