"""How well columns tell chosen from rejected: ridge logistic regression, cross-validated by whole groups.

Arrays in, out-of-fold margins out; knows nothing of texts.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coala.statistics.intervals import Float
from coala.statistics.logistic import fit_logistic

RIDGES = (1000.0, 300.0, 100.0, 30.0, 10.0, 3.0, 1.0, 0.3)  # on columns of unit mean square
FOLDS, INNER = 5, 3
TIE = 1e-9


def folds_of(groups: Sequence[str], n_folds: int, seed: int) -> NDArray[np.int64]:
    """A fold for each row (n,): whole groups in an order drawn by ``seed``, each to the fold that is smallest yet."""
    sizes = Counter(groups)

    def rank(group: str) -> bytes:
        return hashlib.sha256(f"{seed}\0{group}".encode("utf-8", "replace")).digest()

    filled = [0] * n_folds
    fold = {}
    for group in sorted(sizes, key=lambda one: (rank(one), one)):
        fold[group] = min(range(n_folds), key=lambda k: filled[k])
        filled[fold[group]] += sizes[group]
    return np.array([fold[group] for group in groups], dtype=np.int64)


def fit(x: Any, ridge: float, start: Float | None = None, weight: Float | None = None) -> Float:
    """argmin_w sum_i weight_i log(1 + exp(-x_i . w)) + ridge |w|^2 / 2, (d,), of differences x (n, d), dense or sparse.

    No intercept: the loss of a pair must not change with the order in which its replies are named.
    """
    return fit_logistic(x, 1.0, weight, l2=ridge, start=start, many=True).coefficients


def scale_of(x: Float) -> Float:
    """Root mean square of each column of a dense ``x``, 1 for one that is all zeros."""
    squares = (x * x).mean(axis=0)
    return np.asarray(np.where(squares > 0, np.sqrt(squares), 1.0), dtype=np.float64)


def best_ridge(x: Any, groups: Sequence[str], seed: int, weight: Float | None = None) -> float:
    """The ridge with the least held-out log loss over :data:`INNER` folds of groups."""
    if len(set(groups)) < INNER:
        return RIDGES[0]
    weight = np.ones(x.shape[0]) if weight is None else weight
    fold = folds_of(groups, INNER, seed)
    losses = np.zeros(len(RIDGES))
    for held_out in range(INNER):
        inside, outside = fold != held_out, fold == held_out
        w: Float | None = None
        for k, ridge in enumerate(RIDGES):
            w = fit(x[inside], ridge, w, weight[inside])
            losses[k] += float(weight[outside] @ np.logaddexp(0.0, -(x[outside] @ w)))
            if k and losses[k] > 1.2 * losses[:k].min() + 1e-9 and held_out == 0:
                losses[k + 1 :] = np.inf  # once it overfits, less ridge only does so more
                break
    return RIDGES[int(np.argmin(losses))]


@dataclass(frozen=True, eq=False)
class FoldFits:
    """Coefficients (d,) of each fold's fit on the other folds, in the units of the columns, and its rows as a mask."""

    folds: tuple[tuple[NDArray[np.bool_], Float], ...]

    def margins(self, x: Any) -> Float:
        """Margins (n,) of rows ``x`` (n, d), each by the fit that did not see its fold; 0 where there is none."""
        found = np.zeros(x.shape[0])
        for outside, w in self.folds:
            found[outside] = x[outside] @ w
        return found


def fit_folds(
    x: Any,
    groups: Sequence[str],
    seed: int,
    scaled: bool | NDArray[np.bool_] = True,
    weight: Float | None = None,
) -> FoldFits:
    """A fit for each fold of groups, on all others; the ridge is chosen within them. None for fewer than two groups.

    ``scaled`` brings (dense) columns to unit mean square: all, none, or those of a mask (d,). ``weight`` (n,) says what
    a row counts.
    """
    if len(set(groups)) < 2:
        return FoldFits(())
    weight = np.ones(x.shape[0]) if weight is None else weight
    fold = folds_of(groups, FOLDS, seed)
    names = np.array(groups, dtype=object)
    found = []
    for held_out in range(FOLDS):
        inside, outside = fold != held_out, fold == held_out
        if not outside.any() or not inside.any():
            continue
        train = x[inside]
        scale = np.where(scaled, scale_of(train), 1.0) if np.any(scaled) else 1.0
        train = train / scale
        w = fit(train, best_ridge(train, list(names[inside]), seed, weight[inside]), weight=weight[inside])
        found.append((outside, np.asarray(w / scale)))
    return FoldFits(tuple(found))


def out_of_fold(
    x: Any,
    groups: Sequence[str],
    seed: int,
    x_test: Any = None,
    scaled: bool | NDArray[np.bool_] = True,
    weight: Float | None = None,
) -> Float:
    """Margins (n,) of each pair by a fit on the other folds (:func:`fit_folds`); above 0 is right, 0 a tie.

    ``x_test`` takes the place of ``x`` where a pair is tested. All ties for fewer than two groups.
    """
    return fit_folds(x, groups, seed, scaled, weight).margins(x if x_test is None else x_test)


def told(margins: Float) -> Float:
    """1 for right, 1/2 for a tie, 0 for wrong."""
    return np.where(np.abs(margins) <= TIE, 0.5, (margins > 0).astype(np.float64))
