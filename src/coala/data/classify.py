"""How well columns tell chosen from rejected: ridge logistic regression, cross-validated by whole groups.

Arrays in, out-of-fold margins out; knows nothing of texts.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
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


def out_of_fold(
    x: Any,
    groups: Sequence[str],
    seed: int,
    x_test: Any = None,
    scaled: bool | NDArray[np.bool_] = True,
    weight: Float | None = None,
) -> Float:
    """Margins (n,) of each pair by a fit on the other folds; above 0 is right, 0 a tie.

    The ridge is chosen within the training folds. ``x_test`` takes the place of ``x`` where a pair is tested. All
    ties for fewer than two groups: nothing can be held out. ``scaled`` brings (dense) columns to unit mean square:
    all, none, or those of a mask (d,). ``weight`` (n,) says what a row counts in the fits.
    """
    margins = np.zeros(x.shape[0])
    if len(set(groups)) < 2:
        return margins
    x_test = x if x_test is None else x_test
    weight = np.ones(x.shape[0]) if weight is None else weight
    fold = folds_of(groups, FOLDS, seed)
    names = np.array(groups, dtype=object)
    for held_out in range(FOLDS):
        inside, outside = fold != held_out, fold == held_out
        if not outside.any() or not inside.any():
            continue
        train, test = x[inside], x_test[outside]
        if np.any(scaled):
            scale = np.where(scaled, scale_of(train), 1.0)
            train, test = train / scale, test / scale
        w = fit(train, best_ridge(train, list(names[inside]), seed, weight[inside]), weight=weight[inside])
        margins[outside] = test @ w
    return margins


def told(margins: Float) -> Float:
    """1 for right, 1/2 for a tie, 0 for wrong."""
    return np.where(np.abs(margins) <= TIE, 0.5, (margins > 0).astype(np.float64))
