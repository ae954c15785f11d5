"""`coala fit`: features to a certified head."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coala.cli.flags import every, with_settings
from coala.settings import HeadSettings


@with_settings
def fit(
    features: Annotated[Path, typer.Argument(help="Folder written by `coala extract` (or RUN/features/train).")],
    *,
    out: Annotated[Path, typer.Option(help="Folder for the head.")],
    settings: Annotated[HeadSettings, every(HeadSettings)],
    seed: Annotated[int, typer.Option(min=0, help="Fixes the fit.")] = 0,
    eval_features: Annotated[
        Path | None, typer.Option("--eval", help="Features to measure ranking accuracy on.")
    ] = None,
) -> None:
    """Fit the convex head on extracted features and print its certificate.

    Example: `coala fit RUN/features/train --eval RUN/features/eval --out head`
    """
    from coala.alignment.fitting import fit_folder
    from coala.cli.output import emit, progress, say, table

    with progress() as show:
        found = fit_folder(features, out, settings, seed=seed, eval_features=eval_features, on_progress=show)
    say(str(found.pop("head").certificate))
    shown = {name: value for name, value in found.items() if isinstance(value, str | int | float)}
    rows = [[name, f"{value:.6g}" if isinstance(value, float) else str(value)] for name, value in shown.items()]
    if "accuracy" in found:
        rows.append(["ranking accuracy", str(found["accuracy"])])
    table(rows)
    emit(found)
