"""Coordinates in which heads are fitted: centred, scaled, with a bias column, rotated; and the way back, exactly.

NumPy in float64. Knows pairs of feature vectors, not programs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Float

Scaling = Literal["feature", "global"]
BLOCK = 8192  # rows in float64 at a time


@dataclass(frozen=True)
class Standardisation:
    """x = ((h - center) * factor, constant) @ rotation, with orthonormal columns of ``rotation`` (d + 1, r).

    A feature that does not vary has factor 0. The features of a row have mean squared norm 1, and the constant the size
    of one of them, 1 / sqrt(varying features): a constant of 1 would be the largest feature by far, and the cheapest
    neurons would be steps, of which it takes many to make a slope.
    The rotation diagonalises the covariance of the differences, which preconditions the solver; it changes no norm
    and, when there are fewer rows than features, drops directions no row has.
    """

    center: Float[np.ndarray, "d"]
    factor: Float[np.ndarray, "d"]
    constant: float
    rotation: Float[np.ndarray, "d+1 r"]

    @classmethod
    def of(
        cls, chosen: Float[np.ndarray, "n d"], rejected: Float[np.ndarray, "n d"], scaling: Scaling = "feature"
    ) -> Standardisation:
        """From the feature vectors (n, d) of both sides, which are treated alike; read in blocks, three times."""
        sides = (chosen, rejected)
        n, d = 2 * len(chosen), chosen.shape[1]
        center, largest = np.zeros(d), np.zeros(d)
        for h in _blocks(*sides):
            center += h.sum(axis=0) / n
            largest = np.maximum(largest, np.abs(h).max(axis=0, initial=0.0))
        square = np.zeros(d)
        for h in _blocks(*sides):
            square += ((h - center) ** 2).sum(axis=0) / n
        spread = np.sqrt(square)
        # Below this, a feature's variation is the rounding of its float32 storage.
        varies = spread > 1e-6 * largest
        if scaling == "feature":
            factor = np.where(varies, 1 / np.where(varies, spread, 1.0), 0.0) / np.sqrt(max(1, varies.sum()))
        else:
            size = np.sqrt((spread[varies] ** 2).sum())
            factor = np.where(varies, 1 / (size if size > 0 else 1.0), 0.0)
        constant = 1 / np.sqrt(max(1, varies.sum()))
        plain = cls(center, factor, float(constant), np.eye(d + 1))
        if n < d + 1:
            plain = replace(plain, rotation=_row_space(np.concatenate([plain._scaled(side) for side in sides])))
        basis = plain.rotation
        # The identity is not multiplied with.
        turned = plain.rows if n < d + 1 else plain._scaled
        moment = np.zeros((basis.shape[1], basis.shape[1]))
        for start in range(0, len(chosen), BLOCK):
            part = slice(start, start + BLOCK)
            difference = turned(chosen[part]) - turned(rejected[part])
            moment += difference.T @ difference
        _, turn = np.linalg.eigh(moment)
        return replace(plain, rotation=turn[:, ::-1] if n >= d + 1 else basis @ turn[:, ::-1])

    def rows(self, h: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n r"]:
        """Feature vectors (n, d) in the coordinates of the fit, (n, r) float64."""
        return np.asarray(self._scaled(h) @ self.rotation)

    def differences(
        self, chosen: Float[np.ndarray, "n d"], rejected: Float[np.ndarray, "n d"]
    ) -> Float[np.ndarray, "n r"]:
        """``rows(chosen) - rows(rejected)`` by one product."""
        # In a difference the center and the constant cancel.
        apart = (chosen.astype(np.float64) - rejected) * self.factor
        return np.asarray(apart @ self.rotation[:-1])

    def _scaled(self, h: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d+1"]:
        scaled = (h.astype(np.float64) - self.center) * self.factor
        return np.concatenate([scaled, np.full((len(h), 1), self.constant)], axis=1)

    def fill(self, h: Float[np.ndarray, "n d"], out: Float[np.ndarray, "n r"]) -> None:
        """:meth:`rows` into ``out`` (n, r), block by block."""
        for start in range(0, len(h), BLOCK):
            out[start : start + BLOCK] = self.rows(h[start : start + BLOCK])

    def fold(self, weights: Float[np.ndarray, "r k"]) -> Float[np.ndarray, "k d+1"]:
        """Linear functions of x, the columns of (r, k), as rows (k, d + 1) that act on (h, 1)."""
        on_x = (self.rotation @ weights.astype(np.float64)).T
        on_h = on_x[:, :-1] * self.factor
        return np.concatenate([on_h, self.constant * on_x[:, -1:] - (on_h @ self.center)[:, None]], axis=1)


def _blocks(*sides: Float[np.ndarray, "n d"]) -> Iterator[Float[np.ndarray, "n d"]]:
    for side in sides:
        for start in range(0, len(side), BLOCK):
            yield side[start : start + BLOCK].astype(np.float64)


def _row_space(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "d r"]:
    """An orthonormal basis (d, r) that spans the rows of x (n, d), n < d."""
    values, vectors = np.linalg.eigh(x @ x.T)
    kept = values > 1e-12 * values[-1]
    basis, _ = np.linalg.qr(x.T @ (vectors[:, kept] / np.sqrt(values[kept])))
    return np.asarray(basis)
