"""A head on pair features: an antisymmetric preference between two hidden states, which no score has to order.

Arrays in, a convex fit with a bound of its gap out; knows nothing of models or files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike

from coala.statistics.intervals import Float
from coala.statistics.logistic import fit_logistic, sigmoid
from coala.values import CoalaError


@dataclass(frozen=True, eq=False)
class PairHead:
    """P(a beats b) = sigma(w . (x_a - x_b) + x_a^T K x_b) with K = -K^T, x = (h - mean) projected on k directions.

    Antisymmetric by construction: swapping a and b negates the margin. w alone is Bradley-Terry; K holds what no score
    can: with x in the plane and K a rotation, each answer beats those on one side of it. ``projection`` (d, k),
    ``mean`` (d,), ``linear`` (k,), ``skew`` (k, k). Fitted by :func:`fit_pair_head`; ``objective`` is its mean loss and
    ``gradient_norm`` tells how far from optimal it may be: the program is ``ridge``-strongly convex, hence
    objective - optimum <= gradient_norm^2 / (2 ridge).
    """

    projection: Float
    mean: Float
    linear: Float
    skew: Float
    ridge: float
    objective: float
    gradient_norm: float

    @property
    def gap(self) -> float:
        """Upper bound of objective - optimum."""
        return self.gradient_norm**2 / (2 * self.ridge)

    def margin(self, a: ArrayLike, b: ArrayLike) -> Float:
        """Logit (n,) of P(a beats b) from features (n, d) each."""
        x, y = ((np.asarray(h, dtype=np.float64) - self.mean) @ self.projection for h in (a, b))
        return cast(Float, (x - y) @ self.linear + np.einsum("ni,ij,nj->n", x, self.skew, y))

    def probability(self, a: ArrayLike, b: ArrayLike) -> Float:
        """P(a beats b), (n,)."""
        return sigmoid(self.margin(a, b))


def fit_pair_head(
    a: ArrayLike, b: ArrayLike, preference: ArrayLike | None = None, *, rank: int = 16, ridge: float = 1e-3
) -> PairHead:
    """Least cross-entropy of sigma(margin) against ``preference`` (n,), P(a beats b) (1 if not given), plus ridge.

    min mean_i CE(p_i, margin_i) + ridge/2 |(w, K above its diagonal)|^2, linear in the k + k(k-1)/2 pair features and
    therefore convex; solved by Newton's method. Features (n, d) are centred and projected on the ``rank`` leading
    principal directions, each scaled to unit variance.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.ndim != 2 or first.shape != second.shape or not len(first):
        raise CoalaError(f"Features must be two (n, d) arrays of one shape; found {first.shape} and {second.shape}.")
    p = np.ones(len(first)) if preference is None else np.asarray(preference, dtype=np.float64)
    if p.shape != (len(first),) or not ((p >= 0) & (p <= 1)).all():
        raise CoalaError(f"Preferences must be {len(first)} probabilities in [0, 1]; found shape {p.shape}.")
    if rank < 1 or not (math.isfinite(ridge) and ridge > 0):
        raise CoalaError(f"rank {rank}, ridge {ridge}; expected a rank of at least 1 and a positive ridge.")
    stacked = np.concatenate([first, second])
    mean = stacked.mean(axis=0)
    _, sizes, directions = np.linalg.svd(stacked - mean, full_matrices=False)
    k = max(1, min(rank, int((sizes > 1e-10 * max(sizes[0], 1e-300)).sum())))
    scale = np.maximum(sizes[:k] / math.sqrt(len(stacked)), 1e-300)
    projection = directions[:k].T / scale
    x, y = (first - mean) @ projection, (second - mean) @ projection
    above = np.triu_indices(k, 1)
    design = np.concatenate([x - y, x[:, above[0]] * y[:, above[1]] - x[:, above[1]] * y[:, above[0]]], axis=1)
    fit = fit_logistic(design, p, np.full(len(p), 1 / len(p)), l2=ridge)
    skew = np.zeros((k, k))
    skew[above] = fit.coefficients[k:]
    norm = float(np.linalg.norm(fit.gradient))
    return PairHead(projection, mean, fit.coefficients[:k], skew - skew.T, ridge, fit.objective, norm)


def choose_pair_head(
    chosen: ArrayLike,
    rejected: ArrayLike,
    group: Sequence[Any],
    *,
    rank: int = 16,
    ridges: Sequence[float] = (1e-3, 1e-2, 1e-1, 1.0),
    seed: int = 0,
) -> tuple[PairHead, dict[str, float]]:
    """A head on preference pairs with the ridge of the least held-out loss; that loss (nats a pair) by ridge.

    A fifth of the groups is held out for the choice; the head is then fitted to all pairs. Fewer than ten groups leave
    nothing to choose by, and the largest ridge is taken.
    """
    first, second = np.asarray(chosen, dtype=np.float64), np.asarray(rejected, dtype=np.float64)
    names, numbers = np.unique(np.asarray(group, dtype=str), return_inverse=True)
    if len(names) < 10:
        return fit_pair_head(first, second, rank=rank, ridge=max(ridges)), {}
    held = np.random.default_rng(seed).permutation(len(names))[: len(names) // 5]
    out = np.isin(numbers, held)
    losses = {}
    for ridge in ridges:
        head = fit_pair_head(first[~out], second[~out], rank=rank, ridge=ridge)
        losses[ridge] = float(np.mean(np.logaddexp(0, -head.margin(first[out], second[out]))))
    best = min(losses, key=losses.__getitem__)
    return fit_pair_head(first, second, rank=rank, ridge=best), {f"{ridge:g}": loss for ridge, loss in losses.items()}
