"""A head from features as settings say: the calls to ``coala.convex.fit``, and a fit from folder to folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coala.callbacks import OnProgress
from coala.recipe import check_head
from coala.settings import HeadSettings
from coala.store import load_features, save_head, scratch
from coala.values import ConvexHead, FeatureSet

if TYPE_CHECKING:
    from coala.convex import Fit


MOST_BOUNDED = 1e10  # multiplications of a Hessian up to which a fit says what flips it withstands


def fit_options(settings: HeadSettings) -> dict[str, Any]:
    """The head's settings as arguments of ``coala.convex.fit``, but for those that a linear control shares."""
    from coala.convex import Pointwise

    return {
        "method": settings.method,
        "gate_on": settings.gate_on or "auto",
        "phase_one": settings.phase_one,
        "paper": settings.paper,
        "loss": Pointwise() if settings.method == "two-phase" and settings.loss == "pointwise" else None,
        "n_patterns": settings.n_patterns,
    }


def fit_settings(
    features: FeatureSet,
    settings: HeadSettings,
    *,
    seed: int,
    near: Path,
    on_step: Callable[[str, int, int | None], None],
    linear: bool = False,
) -> Fit:
    """The head that ``settings`` ask for, or with ``linear`` the linear one under the same loss and tolerance.

    Arrays that do not fit in memory are kept ``near`` while it is fitted.
    """
    from coala.convex import fit

    options = {"method": "linear"} if linear else fit_options(settings)
    return fit(
        features,
        reference_scale=settings.reference_scale,
        tolerance=settings.tolerance,
        seed=seed,
        scratch=scratch(near),
        on_step=lambda stage, step, total, info: on_step(stage, step, total),
        **options,
    )


def _withstood(data: FeatureSet, held_out: FeatureSet, head: ConvexHead, settings: HeadSettings) -> dict[str, Any]:
    """How many pairs an adversary may flip, or remove, and held-out accuracy is proved to stay above one half."""
    from coala.convex.held import HeldProgram
    from coala.convex.optimum import Optimum
    from coala.convex.poison import Poisoning

    columns = (data.width + 1) * (1 + head.n_neurons)
    if len(data) * columns**2 > MOST_BOUNDED:
        return {"flips_withstood": "not bounded: it would take long; `coala influence RUN` does"}
    optimum = Optimum.of(HeldProgram.of(data, head, reference_scale=settings.reference_scale))
    poisoning = Poisoning.of(optimum, optimum.program.design.compared(held_out))
    return {"flips_withstood": poisoning.largest("flip"), "removals_withstood": poisoning.largest("remove")}


def fit_folder(
    features: Path,
    out: Path,
    settings: HeadSettings,
    *,
    seed: int = 0,
    eval_features: Path | None = None,
    on_progress: OnProgress,
) -> dict[str, Any]:
    """Fit a head on the folder ``features`` and save it in ``out``; its figures, and its certificate as a sentence.

    With ``eval_features`` ranking accuracy and calibration on them too. Raises :class:`~coala.values.CoalaError` for
    settings that do not agree and for folders that hold no features.
    """
    from coala.statistics.scores import accuracy_of_margins, reliability

    settings = check_head(settings)
    data = load_features(features, mmap=True)
    head = fit_settings(
        data,
        settings,
        seed=seed,
        near=out,
        on_step=lambda stage, step, total: on_progress("fit", step, total, stage),
    ).head
    save_head(out, head)
    found: dict[str, Any] = {
        "out": out,
        "n_pairs": len(data),
        "n_neurons": head.n_neurons,
        "gate_on": head.gate_on,
        "temperature": head.temperature,
    }
    if (certificate := head.certificate) is not None:
        found |= {**asdict(certificate), "gap": certificate.gap, "relative_gap": certificate.relative_gap}
    if eval_features is not None:
        held_out = load_features(eval_features, mmap=True)
        found["accuracy"] = accuracy_of_margins(head.margins(held_out), held_out.group)
        sure = head.preference(held_out.chosen, held_out.rejected, held_out.prompt)
        reliable = reliability(sure, held_out.group, seed=seed)
        found |= {"calibration_error": reliable.error, "calibration_error_by_chance": reliable.error_by_chance}
        if settings.method != "two-phase":
            found |= _withstood(data, held_out, head, settings)
    return {"head": head, **found}
