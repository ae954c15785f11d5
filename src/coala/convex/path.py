"""Ridge and sparsity of the pairwise head, chosen on held-out groups along warm-started paths, then the refit.

First the linear block alone over a path of ridges; then, at the best ridge, gates over a path of sparsities, of which
the sparsest within one standard error of the best is taken. Gates stay only where they lower the held-out loss by more
than one standard error of the difference: never worse than linear, as far as the data can tell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from coala.convex.pairwise import OnStep, PairData, PairModel, Search, learn_gates, search_gates, solve_pairs
from coala.convex.validation import HeldOut, clustered_error, rising_twice

RIDGES = tuple(10.0 ** (-k / 2) for k in range(13))
SPARSITIES = (0.65, 0.5, 0.35, 0.25, 0.18, 0.13, 0.09, 0.06, 0.04, 0.03, 0.02)
# Held-out losses do not feel the last digits, so the folds are solved and searched more coarsely than the final model.
FOLD_TOLERANCE = 1e-3

Progress = Callable[[str, int, "int | None", dict[str, Any]], None]


@dataclass(frozen=True)
class PairTask:
    """Rows (2, n, r) in the coordinates of the fit, margin (n,), group (n,), fold (n,) or None."""

    rows: np.ndarray
    margin: np.ndarray
    group: np.ndarray
    fold: np.ndarray | None
    seed: int
    dtype: Any

    @property
    def n_pairs(self) -> int:
        return len(self.margin)

    @property
    def n_folds(self) -> int:
        return 0 if self.fold is None else int(self.fold.max()) + 1

    def rng(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, *purpose))

    @property
    def curvature_scale(self) -> float:
        """Trace of the Hessian of the mean loss at zero: the unit of the relative ridge; 1 without any difference."""
        chosen, rejected = self.rows
        scale = float(((chosen - rejected) ** 2).sum()) / (4 * self.n_pairs)
        return scale if scale > 0 else 1.0

    def everything(self) -> PairData:
        return self._weighted(np.ones(self.n_pairs, bool))

    def without(self, fold: int) -> PairData:
        """All rows, with weight 0 on the pairs of ``fold``: every fold has the same shape and compiles once."""
        assert self.fold is not None
        return self._weighted(self.fold != fold)

    def _weighted(self, used: np.ndarray) -> PairData:
        return PairData(
            jnp.asarray(self.rows, self.dtype),
            jnp.asarray(self.margin, self.dtype),
            jnp.asarray(used / used.sum(), self.dtype),
        )

    def held_out(self, models: list[PairModel]) -> HeldOut:
        """Out-of-fold margins of one model per fold."""
        assert self.fold is not None
        margins = np.zeros(self.n_pairs)
        chosen, rejected = self.rows
        for number, model in enumerate(models):
            out = self.fold == number
            margins[out] = model.scores(chosen[out]) - model.scores(rejected[out])
        return HeldOut.of(margins, self.margin, self.group)


@dataclass(frozen=True)
class Choice:
    """What validation chose: ``sparsity`` None means no gates. Relative values are in the units of the path."""

    ridge: float
    ridge_relative: float
    sparsity: float | None = None
    sparsity_relative: float | None = None
    linear: dict[str, float] = field(default_factory=dict)
    chosen: dict[str, float] = field(default_factory=dict)
    difference: tuple[float, float] | None = None
    path: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class PathSettings:
    """How far and how finely to look; see :func:`choose`."""

    ridges: tuple[float, ...] = RIDGES
    sparsities: tuple[float, ...] = SPARSITIES
    default_ridge: float = 0.1
    tolerance: float = 1e-4
    search: Search = field(default_factory=Search)

    @property
    def fold_search(self) -> Search:
        full = self.search
        return Search(min(64, full.n_starts), min(20, full.n_steps), min(3, full.max_rounds), full.max_neurons)


def _row(tau: float, beta_rel: float | None, held_out: HeldOut, models: list[PairModel]) -> dict[str, Any]:
    return {
        "tau": tau,
        "beta_rel": beta_rel,
        **held_out.row(),
        "n_neurons": float(np.mean([model.n_neurons for model in models])),
        "gap": max(model.solution.relative_gap for model in models),
    }


def _nothing(width: int) -> np.ndarray:
    return np.zeros((width, 0))


def choose(task: PairTask, settings: PathSettings, progress: Progress) -> Choice:
    """Ridge, then sparsity, by the held-out loss; the default ridge and no gates when there is nothing to hold out."""
    scale, width = task.curvature_scale, task.rows.shape[-1]
    if task.fold is None:
        return Choice(settings.default_ridge * scale, settings.default_ridge)
    folds = [task.without(k) for k in range(task.n_folds)]
    path: list[dict[str, Any]] = []

    trail: list[tuple[float, list[PairModel], HeldOut]] = []
    models: list[PairModel] = []
    for number, relative in enumerate(settings.ridges):
        starts: list[np.ndarray | None] = [model.stacked() for model in models] or [None] * task.n_folds
        models = [
            solve_pairs(
                data,
                _nothing(width),
                sparsity=1.0,
                ridge=relative * scale,
                start=start,
                tolerance=FOLD_TOLERANCE,
                exact=False,
            )
            for data, start in zip(folds, starts, strict=True)
        ]
        trail.append((relative, models, task.held_out(models)))
        path.append(_row(relative * scale, None, trail[-1][2], models))
        progress("ridge", number + 1, len(settings.ridges), path[-1])
        if rising_twice([held_out.loss for _, _, held_out in trail]):
            break
    relative, models, linear = min(trail, key=lambda entry: entry[2].loss)
    ridge = relative * scale
    plain = Choice(ridge, relative, linear=linear.row(), chosen=linear.row(), path=path)
    if settings.search.max_neurons == 0 or not settings.sparsities:
        return plain

    unit = _largest_sparsity(task, settings, ridge)
    if not unit > 0:
        return plain
    gated: list[tuple[float, HeldOut]] = []
    rngs = [task.rng(1, number) for number in range(task.n_folds)]
    for number, relative_sparsity in enumerate(settings.sparsities):
        models = [
            learn_gates(
                data,
                model,
                sparsity=relative_sparsity * unit,
                ridge=ridge,
                search=settings.fold_search,
                rng=rng,
                tolerance=FOLD_TOLERANCE,
                exact=False,
            )
            for data, model, rng in zip(folds, models, rngs, strict=True)
        ]
        held_out = task.held_out(models)
        gated.append((relative_sparsity, held_out))
        path.append(_row(ridge, relative_sparsity, held_out, models))
        progress("sparsity", number + 1, len(settings.sparsities), path[-1])
        leader = min((linear, *(entry for _, entry in gated)), key=lambda entry: entry.loss)
        if rising_twice([linear.loss, *(entry.loss for _, entry in gated)]) or _clearly_worse(
            held_out, leader, task.group
        ):
            break
    relative_sparsity, best = sparsest_within_an_error(gated, task.group)
    change = best.losses - linear.losses
    error = clustered_error(change, task.group)
    difference = (float(change.mean()), error)
    if not change.mean() + error < 0:
        return Choice(ridge, relative, None, None, linear.row(), linear.row(), difference, path)
    sparsity = relative_sparsity * unit
    return Choice(ridge, relative, sparsity, relative_sparsity, linear.row(), best.row(), difference, path)


def sparsest_within_an_error(gated: list[tuple[float, HeldOut]], group: np.ndarray) -> tuple[float, HeldOut]:
    """The largest sparsity whose held-out loss is within one standard error of the lowest (the paired difference's).

    The lowest loss of a flat path is mostly luck; the sparser head has fewer ways of being wrong on new pairs.
    """
    _, lowest = min(gated, key=lambda entry: entry[1].loss)
    for entry in gated:
        change = entry[1].losses - lowest.losses
        if change.mean() <= clustered_error(change, group):
            return entry
    raise AssertionError("the lowest loss is within an error of itself")


def _clearly_worse(held_out: HeldOut, best: HeldOut, group: np.ndarray) -> bool:
    change = held_out.losses - best.losses
    return bool(change.mean() > 2 * clustered_error(change, group))


def _largest_sparsity(task: PairTask, settings: PathSettings, ridge: float) -> float:
    """The largest ||q(h)|| a search finds at the linear optimum: from there on, gates enter."""
    data, width = task.everything(), task.rows.shape[-1]
    model = solve_pairs(data, _nothing(width), sparsity=1.0, ridge=ridge, tolerance=settings.tolerance, exact=False)
    search = settings.search
    _, norms = search_gates(data, model, n_starts=search.n_starts, n_steps=search.n_steps, rng=task.rng(2))
    return float(norms[0])


def refit(
    task: PairTask,
    choice: Choice,
    settings: PathSettings,
    data: PairData,
    *,
    final: bool = True,
    on_step: OnStep | None = None,
) -> PairModel:
    """The chosen model on ``data``; gates are learnt down the path of sparsities, as they were in validation.

    With ``final`` the last search is the thorough one and the result is certified in float64.
    """
    model = solve_pairs(
        data,
        _nothing(task.rows.shape[-1]),
        sparsity=1.0,
        ridge=choice.ridge,
        tolerance=settings.tolerance,
        exact=final,
        on_step=on_step,
    )
    if choice.sparsity is None or choice.sparsity_relative is None:
        return model
    rng = task.rng(3)
    for relative in settings.sparsities:
        if relative < choice.sparsity_relative:
            break
        last = final and relative == choice.sparsity_relative
        model = learn_gates(
            data,
            model,
            sparsity=relative / choice.sparsity_relative * choice.sparsity,
            ridge=choice.ridge,
            search=settings.search if last else settings.fold_search,
            rng=rng,
            tolerance=settings.tolerance if last else FOLD_TOLERANCE,
            exact=last,
            on_step=on_step,
        )
    return model
