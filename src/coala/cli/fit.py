"""`coala fit`: features to a certified head."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from coala.choices import GateOn, Loss, Method, PhaseOne


def fit(
    features: Annotated[Path, typer.Argument(help="Folder written by `coala extract` (or RUN/features/train).")],
    out: Annotated[Path, typer.Option(help="Folder for the head.")],
    method: Annotated[
        Method,
        typer.Option(
            help="`learnt` gates (one convex program), `direct` (the same, sampled gates), `linear` (none), or "
            "`two-phase` (the papers')."
        ),
    ] = "learnt",
    gate_on: Annotated[
        GateOn, typer.Option(help="What gates look at; `auto`: both compete where features hold prompts.")
    ] = "auto",
    reference_scale: Annotated[
        float | None, typer.Option(help="CVX-DPO: ask for a margin of this times the features' log ratio.")
    ] = None,
    phase_one: Annotated[
        PhaseOne,
        typer.Option(help="Two-phase: Phase I by Newton's method (`gated`), ADMM (`cronos`) or as a ReLU `network`."),
    ] = "gated",
    paper: Annotated[
        bool, typer.Option("--paper", help="Two-phase with the published settings, nothing searched.")
    ] = False,
    loss: Annotated[Loss, typer.Option(help="Phase II loss: `pairwise` or `pointwise` (Eq. 9).")] = "pairwise",
    n_patterns: Annotated[
        int | None, typer.Option(min=1, help="Gates at most (learnt) or sampled (default: the method's own).")
    ] = None,
    tolerance: Annotated[float, typer.Option(help="Certified relative gap.")] = 1e-4,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    eval_features: Annotated[
        Path | None, typer.Option("--eval", help="Features to measure ranking accuracy on.")
    ] = None,
) -> None:
    """Fit the convex head on extracted features and print its certificate.

    Example: `coala fit RUN/features/train --eval RUN/features/eval --out head`
    """
    from coala.alignment.stages import fit_options
    from coala.cli.output import emit, progress, say, table
    from coala.convex import fit as fit_head
    from coala.recipe import HeadSettings
    from coala.statistics.scores import accuracy_of_margins
    from coala.store import load_features, save_head, scratch
    from coala.values import CoalaError

    if paper and method != "two-phase":
        raise CoalaError("--paper stands for the published settings of the two-phase method: add --method two-phase.")
    data = load_features(features, mmap=True)
    settings = HeadSettings(
        method=method,
        gate_on=gate_on,
        paper=paper,
        loss=loss,
        n_patterns=n_patterns,
        phase_one=phase_one,
    )
    with progress() as show:
        fitted = fit_head(
            data,
            reference_scale=reference_scale,
            tolerance=tolerance,
            seed=seed,
            scratch=scratch(out),
            on_step=lambda stage, step, total, info: show("fit", step, total, stage),
            **fit_options(settings),
        )
    head, certificate = fitted.head, fitted.head.certificate
    save_head(out, head)
    say(str(certificate))
    result: dict[str, Any] = {
        "out": out,
        "n_pairs": len(data),
        "n_neurons": head.n_neurons,
        "gate_on": head.gate_on,
        "temperature": head.temperature,
    }
    if certificate is not None:
        result |= {**asdict(certificate), "gap": certificate.gap, "relative_gap": certificate.relative_gap}
    rows = [
        [key, f"{value:.6g}" if isinstance(value, float) else str(value)]
        for key, value in result.items()
        if isinstance(value, str | int | float)
    ]
    if eval_features is not None:
        held_out = load_features(eval_features, mmap=True)
        result["accuracy"] = accuracy_of_margins(head.margins(held_out), held_out.group)
        rows.append(["ranking accuracy", str(result["accuracy"])])
    table(rows)
    emit(result)
