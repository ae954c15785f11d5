"""What a fit tells of itself: its statement, an estimate of what gates could still gain, validation, and its steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
from jaxtyping import Float

from coala.convex.pairwise import PairModel
from coala.convex.path import LossDifference, PairTask, PathChoice
from coala.convex.validation import HeldOut

OnFitStep = Callable[[str, int, int | None, dict[str, Any]], None]


def statement(model: PairModel) -> str:
    """What is proved of a head, and what is not."""
    share = f"{model.solution.relative_gap:.1e} of it"
    proof = "proved by duality, in double precision, for the standardised features"
    if not model.n_neurons:
        return f"No other linear head lowers the ridge-regularised training objective by more than {share}: {proof}."
    where = "sampled" if np.isnan(model.violation) else "found by local search, so that over all gates it is estimated"
    return (
        f"With the {model.n_neurons} gates of this head, no other weights lower the training objective by more than "
        f"{share}: {proof}. The gates themselves were {where}."
    )


def gates_estimate(model: PairModel, choice: PathChoice) -> dict[str, Any] | None:
    """What the last search for a better gate found; None where nothing was searched."""
    if not np.isfinite(model.violation):
        return None
    return {
        "largest_violation": model.violation,
        "meaning": (
            "largest gradient norm found over all neurons, as a multiple of the sparsity at which the gates were "
            "picked; 1 at an optimum"
        ),
        "sparsity": choice.sparsity,
        "proved": False,
    }


def validation_facts(
    task: PairTask, linear: HeldOut | None, chosen: HeldOut | None, difference: LossDifference | None
) -> dict[str, Any]:
    """Held-out losses and rankings of the linear head and the chosen one, and their difference."""
    if task.fold is None or chosen is None:
        return {"folds": 0, "note": "Nothing was held out: a single group, or published settings."}
    return {
        "folds": task.n_folds,
        "linear": None if linear is None else linear.row(),
        "chosen": chosen.row(),
        "gated_minus_linear": None if difference is None else asdict(difference),
        "signal_found": bool(chosen.loss < np.log(2)),
    }


class Recorder:
    """Margins at every solver step, of the pairs fitted and of the fold held out."""

    def __init__(self, task: PairTask, report: OnFitStep) -> None:
        self.history: list[dict[str, Any]] = []
        self._report = report
        self._out = np.zeros(task.n_pairs, bool) if task.fold is None else task.fold == 0

    def on_step(self, step: int, margins: Float[np.ndarray, "n"], row: dict[str, Any]) -> None:
        entry = {"step": len(self.history), "objective": row["objective"], "gap": row["gap"]}
        entry |= _margin_facts(margins[~self._out], "train") | _margin_facts(margins[self._out], "held_out")
        self.history.append(entry)
        self._report("solve", entry["step"], None, entry)


def _margin_facts(margins: Float[np.ndarray, "n"], name: str) -> dict[str, float | None]:
    if not len(margins):
        return {f"{fact}_{name}": None for fact in ("margin", "margin_sd", "margin_ratio", "accuracy")}
    mean, deviation = float(margins.mean()), float(margins.std())
    return {
        f"margin_{name}": mean,
        f"margin_sd_{name}": deviation,
        f"margin_ratio_{name}": mean / deviation if deviation > 0 else 0.0,
        f"accuracy_{name}": float((margins > 0).mean() + (margins == 0).mean() / 2),
    }
