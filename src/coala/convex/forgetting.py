"""A head without some of its pairs: the exact refit on those that remain, from the old weights.

What a fit decides once is held, the relative ridge, the sparsity and the gates; what is computed from the pairs is
computed anew from those that remain: coordinates, weights, certificate, temperature. NumPy in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
from jaxtyping import Float

from coala.convex.calibration import fit_temperature, least_slope
from coala.convex.held import HeldProgram
from coala.convex.validation import HeldOut, grouped_folds
from coala.values import Certificate, ConvexHead, FeatureSet

FOLDS = 4
FOLD = 1e-4  # of the gradient, at which the margins of a fold are known well enough
TOLERANCE = 1e-9  # relative gap below which a refit is called exact


@dataclass(frozen=True)
class Forgotten:
    """The new head, and what the pairs that are gone had to do with the old one.

    ``distance``: |new - old weights| in the coordinates of the remaining pairs; ``bound``: what the gradient there and
    the modulus of the ridge prove of it, without the new weights (inf for a gated head, whose neurons have no ridge).
    ``gap_before`` and ``gap_after`` are relative gaps of both heads' weights in the new program. ``row`` is what
    validation finds at the held settings; ``history`` the refit's steps.
    """

    head: ConvexHead
    distance: float
    bound: float
    gap_before: float
    gap_after: float
    row: dict[str, Any]
    history: list[dict[str, Any]]


def forget(
    remaining: FeatureSet,
    head: ConvexHead,
    *,
    reference_scale: float | None = None,
    seed: int = 0,
) -> Forgotten:
    """Refit ``head`` on the pairs that remain; equal to a fit of these alone with the same ridge and gates.

    Raises:
        CoalaError: for a head of another program, or of other features.
    """
    facts = head.certificate.facts if head.certificate is not None else {}
    held = HeldProgram.of(remaining, head, reference_scale=reference_scale, ridge_relative=facts.get("ridge_relative"))
    old, even = held.saved, held.even
    slopes = held.gradient(old, even)
    before = held.bounds(old, even)
    factor = held.factor(old) if held.linear else None
    weights = held.solve(old, factor=factor)
    after = held.bounds(weights, even)
    new = held.design.folded(weights)
    new = _certified(held, new, weights, after, facts, _held_out(held, weights, factor, seed), seed)
    cv = new.certificate.facts["cv"] if new.certificate is not None else {}
    row = {
        "tau": held.ridge,
        "gate_on": facts.get("gate_on"),
        "beta_rel": facts.get("sparsity_relative"),
        "relaxation": facts.get("relaxation") if head.n_neurons else None,
        **{name: (cv.get("chosen") or {}).get(name) for name in ("cv_nll", "cv_se", "cv_accuracy")},
        "n_neurons": float(new.n_neurons),
        "gap": _relative(after),
    }
    history = [_step(held, 0, old, before), _step(held, 1, weights, after)]
    residual = float(np.linalg.norm(held.gradient(weights, even)))
    bound = (float(np.linalg.norm(slopes)) + residual) / held.ridge if held.linear else float("inf")
    distance = float(np.linalg.norm(weights - old))
    return Forgotten(new, distance, bound, _relative(before), _relative(after), row, history)


def _certified(
    held: HeldProgram,
    head: ConvexHead,
    weights: Float[np.ndarray, "p"],
    bounds: tuple[float, float],
    facts: Any,
    found: HeldOut | None,
    seed: int,
) -> ConvexHead:
    """The head with its certificate, and with a temperature from folds of the pairs that remain."""
    temperature, slope = 1.0, None
    if found is not None:
        temperature = fit_temperature(found.margins)
        slope = min(least_slope(found.margins, held.features.group), 1 / temperature)
    old = head.certificate
    assert old is not None
    # A neuron that the remaining pairs leave at zero is no part of the head.
    kept = np.abs(head.weights).max(axis=1, initial=0.0) > 0
    head = replace(head, gates=head.gates[kept], weights=head.weights[kept])
    share = _relative(bounds)
    certificate = Certificate(
        program=old.program,
        statement=(
            f"Refitted on the {len(held):,} pairs that remain, with the ridge and the gates held: no other weights "
            f"lower the training objective by more than {share:.1e} of it, proved by duality, in double precision, for "
            "the standardised features. The ridge and the gates were chosen with pairs that have been forgotten since."
        ),
        objective=bounds[0],
        lower_bound=bounds[1],
        violation=0.0,
        n_patterns=head.n_neurons,
        status="converged" if share <= TOLERANCE else "stalled",
        tolerance=TOLERANCE,
        precision="float64",
        seed=seed,
        versions={"numpy": version("numpy")},
        facts={
            **{name: facts.get(name) for name in ("method", "gate_on", "ridge_relative", "sparsity", "relaxation")},
            "sparsity_relative": facts.get("sparsity_relative"),
            "ridge": held.ridge,
            "gates_estimate": None,
            "refitted": True,
            "cv": {"folds": 0}
            if found is None
            else {"folds": FOLDS, "chosen": found.row(), "signal_found": bool(found.loss < np.log(2))},
            "n_pairs": len(held),
            "n_groups": len(np.unique(held.features.group)),
            "n_neurons": head.n_neurons,
            "calibration": {"temperature": temperature, "least_slope": slope, "held_out": found is not None},
            "separable": bool((held.rows @ weights > 0).all()),
        },
    )
    return replace(head, temperature=temperature, least_slope=slope, certificate=certificate)


def _held_out(
    held: HeldProgram, weights: Float[np.ndarray, "p"], factor: Float[np.ndarray, "p p"] | None, seed: int
) -> HeldOut | None:
    """Margins of each fold under a refit on the others, from the weights of all and their Hessian."""
    folds = grouped_folds(held.features.group, FOLDS, seed)
    if folds is None:
        return None
    margins = np.zeros(len(held))
    for fold in range(int(folds.max()) + 1):
        used = folds != fold
        found = held.solve(weights, used / used.sum(), factor=factor, exact=FOLD)
        margins[~used] = held.rows[~used] @ found
    return HeldOut.of(margins, held.margin, held.features.group)


def _relative(bounds: tuple[float, float]) -> float:
    return max(0.0, (bounds[0] - bounds[1]) / bounds[0]) if bounds[0] > 0 else 0.0


def _step(held: HeldProgram, step: int, weights: Float[np.ndarray, "p"], bounds: tuple[float, float]) -> dict[str, Any]:
    margins = held.rows @ weights
    mean, deviation = float(margins.mean()), float(margins.std())
    found: dict[str, Any] = {f"{name}_held_out": None for name in ("margin", "margin_sd", "margin_ratio", "accuracy")}
    return found | {
        "step": step,
        "objective": bounds[0],
        "gap": bounds[0] - bounds[1],
        "margin_train": mean,
        "margin_sd_train": deviation,
        "margin_ratio_train": mean / deviation if deviation > 0 else 0.0,
        "accuracy_train": float((margins > 0).mean() + (margins == 0).mean() / 2),
    }
