"""``fit``: features of preference pairs to a certified :class:`~coala.values.ConvexHead`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import numpy as np

from coala.convex.finetune import Logistic, PairLoss
from coala.convex.pairwise import WIDTHS, PairModel, Search
from coala.convex.path import PairTask, PathSettings, choose, refit
from coala.convex.prepare import Scaling, Standardisation
from coala.convex.selftest import check_operators
from coala.convex.solvers import Solution
from coala.convex.two_phase import fit_two_phase
from coala.convex.validation import grouped_folds
from coala.values import CoalaError, ConvexHead, FeatureSet

Method = Literal["pairwise", "two-phase"]
OnFitStep = Callable[[str, int, int | None, dict[str, Any]], None]


@dataclass(frozen=True)
class Fit:
    """A head, and how it came about.

    ``solutions`` by name ("pairwise", or "phase-one" and "phase-two"). ``path``: one row per setting validated: tau,
    beta_rel (None = no gates), cv_nll, cv_se, cv_accuracy, n_neurons, gap. ``history``: one row per solver step of a
    run that holds one fold out: objective, gap, and for the pairs fitted and held out the mean margin, its standard
    deviation, their ratio and the accuracy (None where nothing is held out).
    """

    head: ConvexHead
    solutions: dict[str, Solution]
    path: list[dict[str, Any]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)


def fit(
    features: FeatureSet,
    *,
    method: Method = "pairwise",
    margin: float | np.ndarray = 0.0,
    loss: PairLoss | None = None,
    n_patterns: int = 32,
    n_folds: int = 4,
    scaling: Scaling = "feature",
    precision: Literal["float32", "float64"] = "float32",
    tolerance: float = 1e-4,
    seed: int = 0,
    on_step: OnFitStep | None = None,
) -> Fit:
    """Fit a head to preference pairs; the same features and seed give the same bytes.

    Args:
        method: "pairwise", one convex program with a linear block and learnt gates; or "two-phase", the paper's.
        margin: offset the score difference is asked to exceed, one number or one per pair (n,).
        loss: Phase II loss of the two-phase method; :class:`Logistic` with ``margin`` unless given.
        n_patterns: gates at most (pairwise; 0 for a linear head) or sampled (two-phase).
        n_folds: folds of whole groups on which ridge and sparsity are chosen.
        scaling: divide each feature by its own standard deviation, or all by one number.
        precision: of the iterations; certificates are always computed in float64.
        tolerance: relative duality gap at which a solve stops.
        on_step: called with a stage name, a step, the number of steps or None, and facts about the step.

    Raises:
        CoalaError: for no pairs, values that are not finite, or settings out of range.
    """
    report: OnFitStep = on_step if on_step is not None else lambda stage, step, total, info: None
    margins = _validated(features, method, margin, n_patterns, n_folds, tolerance)
    double = precision == "float64"
    with jax.enable_x64(double):
        standardisation = Standardisation.of(features.chosen, features.rejected, scaling)
        rows = np.stack([standardisation.rows(features.chosen), standardisation.rows(features.rejected)])
        fold = grouped_folds(features.group, n_folds, seed)
        dtype = np.float64 if double else np.float32
        task = PairTask(rows.astype(dtype), margins, features.group, fold, seed, dtype)
        if method == "two-phase":
            chosen_loss = Logistic(margin=margins if np.ndim(margin) else float(margin)) if loss is None else loss
            return _two_phase(features, task, standardisation, chosen_loss, n_patterns, tolerance, report)
        check_operators(len(features), rows.shape[-1], WIDTHS[0], np.dtype(dtype).name)
        return _pairwise(features, task, standardisation, n_patterns, tolerance, report)


def _validated(
    features: FeatureSet, method: str, margin: float | np.ndarray, n_patterns: int, n_folds: int, tolerance: float
) -> np.ndarray:
    """The margin of every pair (n,), after the checks that need no mathematics."""
    n = len(features)
    if method not in ("pairwise", "two-phase"):
        raise CoalaError(f"method is {method!r}; expected 'pairwise' or 'two-phase'.")
    if n == 0 or features.width == 0:
        raise CoalaError(
            f"There are {n} pairs with {features.width} features each; fitting needs at least one of both. "
            "Check that the input file has rows and that extraction finished."
        )
    for name, array in (("chosen", features.chosen), ("rejected", features.rejected)):
        bad = ~np.isfinite(array).all(axis=1)
        if bad.any():
            raise CoalaError(
                f"The {name} features of {int(bad.sum())} of {n} pairs hold nan or infinity (first: pair "
                f"{int(bad.argmax())}); expected finite numbers. Extract in a wider dtype (float32) or drop the pairs."
            )
    margins = np.asarray(margin, np.float64)
    if margins.shape not in ((), (n,)) or not np.isfinite(margins).all():
        raise CoalaError(f"margin has shape {margins.shape}; expected one finite number or one per pair, ({n},).")
    if n_patterns < (1 if method == "two-phase" else 0) or n_folds < 2 or not 0 < tolerance < 1:
        raise CoalaError(
            f"n_patterns={n_patterns}, n_folds={n_folds}, tolerance={tolerance}; expected n_patterns >= 1 "
            "(or 0 for a linear pairwise head), n_folds >= 2 and a tolerance between 0 and 1."
        )
    return np.broadcast_to(margins, (n,)).copy()


def assemble(
    features: FeatureSet, standardisation: Standardisation, linear: np.ndarray, gates: np.ndarray, weights: np.ndarray
) -> ConvexHead:
    """The head that scores feature vectors as ``linear`` (r,), ``gates`` and ``weights`` (r, m) score their rows."""
    directions = standardisation.fold(gates)
    # A gate's length means nothing; unit length keeps float32 scores well scaled.
    length = np.linalg.norm(directions[:, :-1], axis=1, keepdims=True)
    directions = directions / np.where(length > 0, length, 1.0)
    return ConvexHead(
        gates=directions.astype(np.float32),
        weights=standardisation.fold(weights).astype(np.float32),
        linear=standardisation.fold(linear[:, None])[0].astype(np.float32),
        spec=features.spec,
    )


def _pairwise(
    features: FeatureSet,
    task: PairTask,
    standardisation: Standardisation,
    n_patterns: int,
    tolerance: float,
    report: OnFitStep,
) -> Fit:
    settings = PathSettings(tolerance=tolerance, search=Search(max_neurons=n_patterns))
    choice = choose(task, settings, report)
    recorder = _Recorder(task, report)
    watched = task.everything() if task.fold is None else task.without(0)
    refit(task, choice, settings, watched, final=False, on_step=recorder.on_step)
    data = task.everything()
    model = refit(task, choice, settings, data)
    head = assemble(features, standardisation, model.linear, model.gates, model.weights)
    solution = model.solution
    certificate = {
        **_common(features, task, "pairwise", solution, tolerance),
        "statement": _statement(model),
        "gates_estimate": _gates_estimate(model, settings),
        "ridge": choice.ridge,
        "ridge_relative": choice.ridge_relative,
        "sparsity": choice.sparsity,
        "sparsity_relative": choice.sparsity_relative,
        "n_neurons": model.n_neurons,
        "cv": _validation(task, choice.linear, choice.chosen, choice.difference),
        "separable": _separates(head, features),
    }
    head = replace(head, certificate=certificate)
    return Fit(head, {"pairwise": solution}, choice.path, recorder.history)


def _two_phase(
    features: FeatureSet,
    task: PairTask,
    standardisation: Standardisation,
    loss: PairLoss,
    n_patterns: int,
    tolerance: float,
    report: OnFitStep,
) -> Fit:
    result = fit_two_phase(task, loss, n_patterns=n_patterns, tolerance=tolerance, progress=report)
    network = result.network
    u = (network.first_layer * network.second_layer[:, None]).T
    head = assemble(features, standardisation, np.zeros(len(u)), network.gates.T, u)
    one, two = result.phase_one, result.phase_two
    certificate = {
        **_common(features, task, "two-phase", two, tolerance),
        "phase_one": {
            "objective": one.objective,
            "lower_bound": one.objective - one.gap,
            "gap": one.gap,
            "relative_gap": one.relative_gap,
            "status": one.status.value,
        },
        "statement": (
            f"Phase I: with the sampled gates, no other weights lower its objective by more than "
            f"{one.relative_gap:.1e} of it. Phase II: no other second layer lowers its objective by more than "
            f"{two.relative_gap:.1e} of it. "
            "Each is proved in double precision for its own phase; nothing is said of other gates."
        ),
        "gates_estimate": None,
        "ridge": result.ridge,
        "sparsity": result.sparsity,
        "sparsity_relative": result.sparsity_relative,
        "n_neurons": head.n_neurons,
        "cv": _validation(task, {}, result.chosen, None),
        "separable": _separates(head, features),
    }
    head = replace(head, certificate=certificate)
    history = [{"stage": "phase-one", **row} for row in one.history]
    history += [{"stage": "phase-two", **row} for row in two.history]
    return Fit(head, {"phase-one": one, "phase-two": two}, result.path, history)


def _common(features: FeatureSet, task: PairTask, method: str, solution: Solution, tolerance: float) -> dict[str, Any]:
    return {
        "method": method,
        "objective": solution.objective,
        "lower_bound": solution.objective - solution.gap,
        "gap": solution.gap,
        "relative_gap": solution.relative_gap,
        "status": solution.status.value,
        "tolerance": tolerance,
        "n_pairs": len(features),
        "n_groups": len(np.unique(features.group)),
        "seed": task.seed,
    }


def _statement(model: PairModel) -> str:
    share = f"{model.solution.relative_gap:.1e} of it"
    proof = "proved by duality, in double precision, for the standardised features"
    if not model.n_neurons:
        return f"No other linear head lowers the ridge-regularised training objective by more than {share}: {proof}."
    return (
        f"With the {model.n_neurons} gates of this head, no other weights lower the training objective by more than "
        f"{share}: {proof}. Over all possible gates optimality is only estimated, by local search."
    )


def _gates_estimate(model: PairModel, settings: PathSettings) -> dict[str, Any] | None:
    if not np.isfinite(model.violation):
        return None
    return {
        "largest_violation": model.violation,
        "meaning": "largest gradient norm found over all ReLU neurons, as a multiple of the sparsity; 1 at an optimum",
        "starts": settings.search.n_starts,
        "proved": False,
    }


def _validation(
    task: PairTask, linear: dict[str, float], chosen: dict[str, float], difference: tuple[float, float] | None
) -> dict[str, Any]:
    if task.fold is None:
        return {"folds": 0, "note": "A single group leaves nothing to hold out: default regularisation, no gates."}
    loss = chosen.get("cv_nll", np.inf)
    return {
        "folds": task.n_folds,
        "linear": linear or None,
        "chosen": chosen,
        "gated_minus_linear": None if difference is None else {"nll": difference[0], "se": difference[1]},
        "signal_found": bool(loss < np.log(2)),
    }


def _separates(head: ConvexHead, features: FeatureSet) -> bool:
    """Whether the head ranks every pair right, so that without regularisation there would be no best head."""
    return bool((head.score(features.chosen) > head.score(features.rejected)).all())


class _Recorder:
    """Margins at every solver step, of the pairs fitted and of the fold held out."""

    def __init__(self, task: PairTask, report: OnFitStep) -> None:
        self.history: list[dict[str, Any]] = []
        self._report = report
        self._out = np.zeros(task.n_pairs, bool) if task.fold is None else task.fold == 0

    def on_step(self, step: int, margins: np.ndarray, row: dict[str, Any]) -> None:
        entry = {"step": len(self.history), "objective": row["objective"], "gap": row["gap"]}
        entry |= _margin_facts(margins[~self._out], "train") | _margin_facts(margins[self._out], "held_out")
        self.history.append(entry)
        self._report("solve", entry["step"], None, entry)


def _margin_facts(margins: np.ndarray, name: str) -> dict[str, float | None]:
    if not len(margins):
        return {f"{fact}_{name}": None for fact in ("margin", "margin_sd", "margin_ratio", "accuracy")}
    mean, deviation = float(margins.mean()), float(margins.std())
    return {
        f"margin_{name}": mean,
        f"margin_sd_{name}": deviation,
        f"margin_ratio_{name}": mean / deviation if deviation > 0 else 0.0,
        f"accuracy_{name}": float((margins > 0).mean() + (margins == 0).mean() / 2),
    }
