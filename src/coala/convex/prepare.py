"""Coordinates in which heads are fitted: centred, scaled, with a bias column, rotated; and the way back, exactly.

NumPy in float64. Knows pairs of feature vectors, not programs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Scaling = Literal["feature", "global"]


@dataclass(frozen=True)
class Standardisation:
    """x = ((h - center) * factor, constant) @ rotation, with orthonormal columns of ``rotation`` (d + 1, r).

    A feature that does not vary has factor 0. The features of a row have mean squared norm 1, and the constant the size
    of one of them, 1 / sqrt(varying features): a constant of 1 would be the largest feature by far, and the cheapest
    neurons would be steps, of which it takes many to make a slope.
    The rotation diagonalises the covariance of the differences, which preconditions the solver; it changes no norm
    and, when there are fewer rows than features, drops directions no row has.
    """

    center: np.ndarray
    factor: np.ndarray
    constant: float
    rotation: np.ndarray

    @classmethod
    def of(cls, chosen: np.ndarray, rejected: np.ndarray, scaling: Scaling = "feature") -> Standardisation:
        """From the feature vectors (n, d) of both sides, which are treated alike."""
        h = np.concatenate([chosen, rejected]).astype(np.float64)
        center = h.mean(axis=0)
        spread = (h - center).std(axis=0)
        # Below this, a feature's variation is the rounding of its float32 storage.
        varies = spread > 1e-6 * np.abs(h).max(axis=0, initial=0.0)
        if scaling == "feature":
            factor = np.where(varies, 1 / np.where(varies, spread, 1.0), 0.0) / np.sqrt(max(1, varies.sum()))
        else:
            size = np.sqrt((spread[varies] ** 2).sum())
            factor = np.where(varies, 1 / (size if size > 0 else 1.0), 0.0)
        constant = 1 / np.sqrt(max(1, varies.sum()))
        x = _with_constant((h - center) * factor, constant)
        basis = _row_space(x)
        chosen_x, rejected_x = np.split(x @ basis, 2)
        difference = chosen_x - rejected_x
        _, turn = np.linalg.eigh(difference.T @ difference)
        return cls(center, factor, float(constant), basis @ turn[:, ::-1])

    def rows(self, h: np.ndarray) -> np.ndarray:
        """Feature vectors (n, d) in the coordinates of the fit, (n, r) float64."""
        return np.asarray(
            _with_constant((h.astype(np.float64) - self.center) * self.factor, self.constant) @ self.rotation
        )

    def fold(self, weights: np.ndarray) -> np.ndarray:
        """Linear functions of x, the columns of (r, k), as rows (k, d + 1) that act on (h, 1)."""
        on_x = (self.rotation @ weights.astype(np.float64)).T
        on_h = on_x[:, :-1] * self.factor
        return np.concatenate([on_h, self.constant * on_x[:, -1:] - (on_h @ self.center)[:, None]], axis=1)


def _with_constant(x: np.ndarray, constant: float) -> np.ndarray:
    return np.concatenate([x, np.full((len(x), 1), constant)], axis=1)


def _row_space(x: np.ndarray) -> np.ndarray:
    """An orthonormal basis (d, r) that spans the rows of x (n, d); the identity unless n < d."""
    n, d = x.shape
    if n >= d:
        return np.eye(d)
    values, vectors = np.linalg.eigh(x @ x.T)
    kept = values > 1e-12 * values[-1]
    basis, _ = np.linalg.qr(x.T @ (vectors[:, kept] / np.sqrt(values[kept])))
    return np.asarray(basis)
