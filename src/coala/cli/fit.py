"""`coala fit`: features to a certified head."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Method(StrEnum):
    """What is solved."""

    pairwise = "pairwise"
    two_phase = "two-phase"


def fit(
    features: Annotated[Path, typer.Argument(help="Folder written by `coala extract` (or RUN/features/train).")],
    out: Annotated[Path, typer.Option(help="Folder for the head.")],
    method: Annotated[
        Method, typer.Option(help="`pairwise` (one convex program) or `two-phase` (the papers').")
    ] = Method.pairwise,
    loss: Annotated[str, typer.Option(help="Phase II loss: `pairwise` or `pointwise` (Eq. 9).")] = "pairwise",
    n_patterns: Annotated[int, typer.Option(min=1, help="Random gates of Phase I.")] = 32,
    tolerance: Annotated[float, typer.Option(help="Certified relative gap.")] = 1e-4,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    eval_features: Annotated[
        Path | None, typer.Option("--eval", help="Features to measure ranking accuracy on.")
    ] = None,
) -> None:
    """Fit the convex head on extracted features and print its certificate.

    Example: `coala fit RUN/features/train --eval RUN/features/eval --out head`
    """
    from coala.cli.screen import emit, progress, table
    from coala.convex import Logistic, Pointwise
    from coala.convex import fit as fit_head
    from coala.evaluation import ranking_accuracy
    from coala.store import load_features, save_head

    data = load_features(features)
    with progress() as show:
        fitted = fit_head(
            data,
            method=method.value,
            loss=Pointwise() if loss == "pointwise" else Logistic(),
            n_patterns=n_patterns,
            tolerance=tolerance,
            seed=seed,
            on_step=lambda stage, step, total, info: show("fit", step, total, stage),
        )
    save_head(out, fitted.head)
    result = {"out": out, "n_pairs": len(data), "n_neurons": fitted.head.n_neurons, **fitted.head.certificate}
    rows = [[key, str(value)] for key, value in result.items() if isinstance(value, str | int | float)]
    if eval_features is not None:
        held_out = load_features(eval_features)
        accuracy = ranking_accuracy(
            fitted.head.score(held_out.chosen), fitted.head.score(held_out.rejected), held_out.group
        )
        result["accuracy"] = accuracy
        rows.append(["ranking accuracy", str(accuracy)])
    table(rows)
    emit(result)
