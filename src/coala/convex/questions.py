"""Which pair to ask about next, by the exact Hessian; and what further answers are likely to change.

Everything is in terms of the Hessian H of n J (:mod:`coala.convex.sequential`) at the weights at hand: H^-1 is the
covariance of the weights by Laplace's approximation, were the tastes those of the program. NumPy in float64. Knows rows
of pairs, not whose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from coala.statistics.logistic import sigmoid

Gain = Literal["determinant", "variance"]
ASKED = (0, 5, 10, 20, 40, 80, 160, 320, 640, 1280, 2560, 5120, 10240)  # further answers that are thought of
UNSETTLED = 0.05  # share of pairs whose order may still be wrong, below which more answers change little


def gains(
    hessian: Float[np.ndarray, "p p"],
    weights: Float[np.ndarray, "p"],
    candidates: Float[np.ndarray, "k p"],
    to_come: Float[np.ndarray, "h p"] | None = None,
    *,
    by: Gain = "determinant",
) -> Float[np.ndarray, "k"]:
    """What an answer to each of ``candidates`` is expected to tell; higher is better.

    An answer to row x, of probability s, adds s (1 - s) x x^T to the Hessian whichever it is. ``determinant``:
    by how much log det H grows, log(1 + s (1 - s) x^T H^-1 x) (D-optimal). ``variance``: by how much the variance of
    the margins of ``to_come`` falls, their mean (V-optimal); these are the pairs whose order is to be known.
    """
    from scipy.linalg import solve_triangular

    factor = np.linalg.cholesky(hessian)
    seen = solve_triangular(factor, candidates.T, lower=True)
    chance = sigmoid(candidates @ weights)
    curvature = chance * (1 - chance)
    spread = (seen**2).sum(axis=0)
    if by == "determinant" or to_come is None:
        return np.asarray(np.log1p(curvature * spread))
    wanted = solve_triangular(factor, to_come.T, lower=True)
    shared = ((wanted.T @ seen) ** 2).mean(axis=0)
    return np.asarray(curvature * shared / (1 + curvature * spread))


@dataclass(frozen=True)
class Outlook:
    """The share of pairs whose order the weights are likely to have wrong, now and after so many answers more.

    An estimate by Laplace's approximation, for answers that follow the program's own probabilities: of raters who
    contradict themselves, or tastes that no weights express, it knows nothing.
    """

    answers: tuple[int, ...]
    unsettled: tuple[float, ...]

    @property
    def now(self) -> float:
        return self.unsettled[0]

    def needed(self, share: float = UNSETTLED) -> int | None:
        """The fewest of ``answers`` after which at most ``share`` is unsettled; None if none is enough."""
        return next((n for n, left in zip(self.answers, self.unsettled, strict=True) if left <= share), None)


def outlook(
    hessian: Float[np.ndarray, "p p"], weights: Float[np.ndarray, "p"], pairs: Float[np.ndarray, "h p"]
) -> Outlook:
    """What answers to pairs drawn at random among ``pairs`` are likely to leave unsettled of these."""
    from scipy.linalg import solve_triangular
    from scipy.special import ndtr

    if not len(pairs):
        return Outlook(ASKED, (0.5,) * len(ASKED))
    whitened = solve_triangular(np.linalg.cholesky(hessian), pairs.T, lower=True)
    margins = pairs @ weights
    curvature = sigmoid(margins) * sigmoid(-margins)
    turn, singular, _ = np.linalg.svd(whitened * np.sqrt(curvature / len(pairs)), full_matrices=False)
    along = (turn.T @ whitened) ** 2
    left = []
    for more in ASKED:
        spread = np.sqrt((along / (1 + more * singular[:, None] ** 2)).sum(axis=0))
        left.append(float(ndtr(-np.abs(margins) / np.maximum(spread, 1e-300)).mean()))
    return Outlook(ASKED, tuple(left))
