"""Ridge, gates, sparsity and relaxation of the pairwise head, chosen on held-out groups along warm-started paths.

First the linear block alone over a path of ridges. Then, at the best ridge and for every source of gates, a path of
sparsities, at each of which the gates found are kept and their weights relaxed: solved again at a lower sparsity, since
the sparsity that picks few gates shrinks their weights too much. Of the settings within one standard error of the best
the sparsest is taken, and gates stay only if they lower the held-out loss and raise the held-out ranking accuracy, each
by more than one standard error of the difference: never worse than linear, as far as the data can tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from coala.convex.gate_sources import FOLD_TOLERANCE, GateOn, GateSource
from coala.convex.pairwise import OnStep, PairData, PairModel, solve_pairs
from coala.convex.validation import HeldOut, rising_twice
from coala.statistics.intervals import clustered

RIDGES = tuple(10.0 ** (-k / 2) for k in range(13))
SPARSITIES = (0.65, 0.5, 0.35, 0.25, 0.18, 0.13, 0.09, 0.06, 0.04, 0.03, 0.02)
RELAXATIONS = (1.0, 0.5, 0.25, 0.12, 0.06, 0.03)
DEFAULT_RIDGE = 0.1

Progress = Callable[[str, int, "int | None", dict[str, Any]], None]


def _blocks(n: int, size: int = 8192) -> Iterator[slice]:
    return (slice(start, min(n, start + size)) for start in range(0, n, size))


@dataclass(frozen=True)
class PairTask:
    """Rows (2, n, r) in the coordinates of the fit, margin (n,), group (n,), fold (n,) or None.

    ``prompt_rows`` (n, e), if there are any, are what gates on the prompt see.
    """

    rows: Float[np.ndarray, "2 n d"]
    margin: Float[np.ndarray, "n"]
    group: Shaped[np.ndarray, "n"]
    fold: Int[np.ndarray, "n"] | None
    seed: int
    dtype: Any
    prompt_rows: Float[np.ndarray, "n e"] | None = None

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
        total = 0.0
        for part in _blocks(self.n_pairs):
            total += float(((self.rows[0, part] - self.rows[1, part]) ** 2).sum())
        return total / (4 * self.n_pairs) if total > 0 else 1.0

    @cached_property
    def placed(self) -> Float[Array, "2 n d"]:
        """The rows on the device; on a CPU, and mapped from a file, without a copy."""
        return jax.device_put(self.rows, may_alias=True)

    def gate_rows(self, gate_on: GateOn) -> Float[np.ndarray, "2 n e"] | None:
        """(2, n, e), or None where gates see the rows themselves."""
        if gate_on == "reply":
            return None
        assert self.prompt_rows is not None
        return np.broadcast_to(self.prompt_rows, (2, *self.prompt_rows.shape))

    def everything(self, gate_on: GateOn = "reply") -> PairData:
        return self._weighted(np.ones(self.n_pairs, bool), gate_on)

    def without(self, fold: int, gate_on: GateOn = "reply") -> PairData:
        """All rows, with weight 0 on the pairs of ``fold``: every fold has the same shape and compiles once."""
        assert self.fold is not None
        return self._weighted(self.fold != fold, gate_on)

    def _weighted(self, used: Bool[np.ndarray, "n"], gate_on: GateOn) -> PairData:
        gate_rows = self.gate_rows(gate_on)
        return PairData(
            self.placed,
            jnp.asarray(self.margin, self.dtype),
            jnp.asarray(used / used.sum(), self.dtype),
            None if gate_rows is None else jnp.asarray(gate_rows, self.dtype),
        )

    def held_out(self, models: list[PairModel], gate_on: GateOn = "reply") -> HeldOut:
        """Out-of-fold margins of one model per fold."""
        assert self.fold is not None
        gate_rows = self.gate_rows(gate_on)
        margins = np.zeros(self.n_pairs)
        for number, model in enumerate(models):
            for part in _blocks(self.n_pairs):
                out = np.arange(self.n_pairs)[part][self.fold[part] == number]
                chosen, rejected = model.scores(self.rows[:, out], None if gate_rows is None else gate_rows[:, out])
                margins[out] = chosen - rejected
        return HeldOut.of(margins, self.margin, self.group)


@dataclass(frozen=True)
class LossDifference:
    """Held-out loss and ranking accuracy of gates minus linear, with the standard error of each."""

    nll: float
    nll_se: float
    accuracy: float
    accuracy_se: float

    @classmethod
    def of(cls, gated: HeldOut, linear: HeldOut, group: Shaped[np.ndarray, "n"]) -> LossDifference:
        loss, hits = gated.losses - linear.losses, gated.hits - linear.hits
        return cls(*clustered(loss, group)[:2], *clustered(hits, group)[:2])

    @property
    def clear(self) -> bool:
        """Both better by more than their standard error: some gates give better probabilities but rank no better."""
        return self.nll < -self.nll_se and self.accuracy > self.accuracy_se


@dataclass(frozen=True)
class PathChoice:
    """What validation chose; ``source`` None means no gates. Relative values are in the units of the path.

    Gates were picked at ``sparsity`` and their weights solved for at ``relaxation`` times it.
    """

    ridge: float
    ridge_relative: float
    linear: HeldOut | None = None
    chosen: HeldOut | None = None
    source: GateSource | None = None
    sparsity: float | None = None
    sparsity_relative: float | None = None
    relaxation: float = 1.0
    difference: LossDifference | None = None
    path: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Candidate:
    """One setting of one source, and how it did."""

    source: GateSource
    unit: float
    sparsity: float
    relaxation: float
    held_out: HeldOut


def _row(ridge: float, held_out: HeldOut, models: list[PairModel], **where: Any) -> dict[str, Any]:
    return {
        "tau": ridge,
        "gate_on": None,
        "beta_rel": None,
        "relaxation": None,
        **where,
        **held_out.row(),
        "n_neurons": float(np.mean([model.n_neurons for model in models])),
        "gap": max(model.solution.relative_gap for model in models),
    }


def _nothing(data: PairData) -> Float[np.ndarray, "e 0"]:
    return np.zeros((data.seen_by_gates.shape[-1], 0))


def choose(task: PairTask, sources: list[GateSource], progress: Progress) -> PathChoice:
    """Ridge, then source, sparsity and relaxation, by the held-out loss; a default ridge and no gates without folds."""
    scale = task.curvature_scale
    if task.fold is None:
        return PathChoice(DEFAULT_RIDGE * scale, DEFAULT_RIDGE)
    path: list[dict[str, Any]] = []
    relative, models, linear = _choose_ridge(task, scale, path, progress)
    ridge = relative * scale
    plain = PathChoice(ridge, relative, linear, linear, path=path)
    best: list[Candidate] = []
    for source in sources:
        candidates = _walk(task, source, ridge, models, linear, path, progress)
        if candidates:
            best.append(sparsest_within_an_error(candidates, task.group))
    if not best:
        return plain
    winner = min(best, key=lambda candidate: candidate.held_out.loss)
    difference = LossDifference.of(winner.held_out, linear, task.group)
    if not difference.clear:
        return replace(plain, difference=difference)
    return PathChoice(
        ridge,
        relative,
        linear,
        winner.held_out,
        winner.source,
        winner.sparsity * winner.unit,
        winner.sparsity,
        winner.relaxation,
        difference,
        path,
    )


def _choose_ridge(
    task: PairTask, scale: float, path: list[dict[str, Any]], progress: Progress
) -> tuple[float, list[PairModel], HeldOut]:
    folds = [task.without(k) for k in range(task.n_folds)]
    trail: list[tuple[float, list[PairModel], HeldOut]] = []
    models: list[PairModel] = []
    for number, relative in enumerate(RIDGES):
        starts: list[np.ndarray | None] = [model.stacked() for model in models] or [None] * task.n_folds
        models = [
            solve_pairs(
                data,
                _nothing(data),
                sparsity=1.0,
                ridge=relative * scale,
                start=start,
                tolerance=FOLD_TOLERANCE,
                exact=False,
            )
            for data, start in zip(folds, starts, strict=True)
        ]
        trail.append((relative, models, task.held_out(models)))
        path.append(_row(relative * scale, trail[-1][2], models))
        progress("ridge", number + 1, len(RIDGES), path[-1])
        if rising_twice([held_out.loss for _, _, held_out in trail]):
            break
    return min(trail, key=lambda entry: entry[2].loss)


def _walk(
    task: PairTask,
    source: GateSource,
    ridge: float,
    models: list[PairModel],
    linear: HeldOut,
    path: list[dict[str, Any]],
    progress: Progress,
) -> list[Candidate]:
    """Down the path of sparsities from the linear models of the folds, and from each down the relaxations."""
    gate_on = source.gate_on
    everything = task.everything(gate_on)
    start = solve_pairs(everything, _nothing(everything), sparsity=1.0, ridge=ridge, exact=False)
    unit = source.unit(everything, start, task.rng(2))
    if not unit > 0:
        return []
    folds = [task.without(k, gate_on) for k in range(task.n_folds)]
    rngs = [task.rng(1, k) for k in range(task.n_folds)]
    models = [replace(model, gates=_nothing(data)) for model, data in zip(models, folds, strict=True)]
    candidates: list[Candidate] = []
    best_here: list[HeldOut] = []
    for number, sparsity in enumerate(SPARSITIES):
        models = [
            source.grow(data, model, sparsity * unit, ridge, rng)
            for data, model, rng in zip(folds, models, rngs, strict=True)
        ]
        relaxed, tried = models, []
        for relaxation in RELAXATIONS:
            if relaxation < 1:
                relaxed = [
                    relax(data, model, relaxation * sparsity * unit, ridge, FOLD_TOLERANCE)
                    for data, model in zip(folds, relaxed, strict=True)
                ]
            held_out = task.held_out(relaxed, gate_on)
            tried.append(Candidate(source, unit, sparsity, relaxation, held_out))
            path.append(_row(ridge, held_out, relaxed, gate_on=gate_on, beta_rel=sparsity, relaxation=relaxation))
            no_gates = not any(model.n_neurons for model in models)
            if no_gates or rising_twice([entry.held_out.loss for entry in tried]):
                break
        candidates += tried
        best_here.append(min((entry.held_out for entry in tried), key=lambda held_out: held_out.loss))
        progress("sparsity", number + 1, len(SPARSITIES), path[-1])
        leader = min((linear, *best_here), key=lambda held_out: held_out.loss)
        past = rising_twice([linear.loss, *(held_out.loss for held_out in best_here)])
        if past or _clearly_worse(best_here[-1], leader, task.group):
            break
    return candidates


def relax(data: PairData, model: PairModel, sparsity: float, ridge: float, tolerance: float) -> PairModel:
    """The model's gates with their weights at another sparsity."""
    if not model.n_neurons:
        return model
    solved = solve_pairs(
        data, model.gates, sparsity=sparsity, ridge=ridge, start=model.stacked(), tolerance=tolerance, exact=False
    )
    return replace(solved, violation=model.violation)


def sparsest_within_an_error(candidates: list[Candidate], group: Shaped[np.ndarray, "n"]) -> Candidate:
    """The first candidate, sparsest and least relaxed first, whose loss is within one standard error of the lowest.

    The lowest loss of a flat path is mostly luck; the sparser head has fewer ways of being wrong on new pairs.
    """
    lowest = min(candidates, key=lambda entry: entry.held_out.loss)
    for entry in candidates:
        change = entry.held_out.losses - lowest.held_out.losses
        if change.mean() <= clustered(change, group)[1]:
            return entry
    raise AssertionError("the lowest loss is within an error of itself")


def _clearly_worse(held_out: HeldOut, best: HeldOut, group: Shaped[np.ndarray, "n"]) -> bool:
    change = held_out.losses - best.losses
    return bool(change.mean() > 2 * clustered(change, group)[1])


def refit(
    task: PairTask, choice: PathChoice, data: PairData, *, tolerance: float = 1e-4, on_step: OnStep | None = None
) -> PairModel:
    """The chosen model on ``data``: down the path as in validation, then one solve with a certificate in float64.

    ``on_step`` sees that last solve, which starts from zero.
    """
    model = solve_pairs(data, _nothing(data), sparsity=1.0, ridge=choice.ridge, tolerance=tolerance, exact=False)
    sparsity, source = 1.0, choice.source
    if source is not None and choice.sparsity is not None and choice.sparsity_relative is not None:
        rng = task.rng(3)
        for relative in SPARSITIES:
            if relative < choice.sparsity_relative:
                break
            level = relative / choice.sparsity_relative * choice.sparsity
            model = source.grow(data, model, level, choice.ridge, rng)
        model = replace(model, violation=source.violation(data, model, choice.sparsity, rng))
        sparsity = choice.relaxation * choice.sparsity
    solved = solve_pairs(
        data, model.gates, sparsity=sparsity, ridge=choice.ridge, tolerance=tolerance, exact=True, on_step=on_step
    )
    return replace(solved, violation=model.violation)
