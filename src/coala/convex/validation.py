"""Cross-validation by whole groups: folds, held-out losses, and the standard error of their differences.

NumPy only; knows margins and groups, not how a model was fitted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Shaped

from coala.statistics.intervals import clustered


def grouped_folds(group: Shaped[np.ndarray, "n"], n_folds: int, seed: int) -> Int[np.ndarray, "n"] | None:
    """A fold number (n,) for each pair, groups kept whole and folds of about one size; None for fewer than 2 groups.

    Depends on the names and sizes of the groups and the seed, not on the order of the rows.
    """
    names, member, sizes = np.unique(group, return_inverse=True, return_counts=True)
    if len(names) < 2:
        return None
    n_folds = min(n_folds, len(names))
    shuffled = np.random.default_rng(seed).permutation(len(names))
    fold_of = np.zeros(len(names), int)
    filled = np.zeros(n_folds)
    for name in shuffled[np.argsort(-sizes[shuffled], kind="stable")]:
        fold_of[name] = int(np.argmin(filled))
        filled[fold_of[name]] += sizes[name]
    return np.asarray(fold_of[member])


def log_loss(margins: Float[np.ndarray, "n"], offset: Float[np.ndarray, "n"] | float = 0.0) -> Float[np.ndarray, "n"]:
    """softplus(offset - margins) per pair: the negative log-likelihood of the preference."""
    return np.asarray(np.logaddexp(0.0, offset - margins))


@dataclass(frozen=True)
class HeldOut:
    """Out-of-fold score differences (n,) of one setting, with its mean loss, standard error and accuracy."""

    margins: Float[np.ndarray, "n"]
    losses: Float[np.ndarray, "n"]
    error: float

    @classmethod
    def of(
        cls, margins: Float[np.ndarray, "n"], offset: Float[np.ndarray, "n"], group: Shaped[np.ndarray, "n"]
    ) -> HeldOut:
        losses = log_loss(margins, offset)
        return cls(margins, losses, clustered(losses, group)[1])

    @property
    def loss(self) -> float:
        return float(self.losses.mean())

    @property
    def hits(self) -> Float[np.ndarray, "n"]:
        """Per pair, 1 if ranked right, 0 if not, and a half for a tie."""
        return np.asarray((self.margins > 0) + (self.margins == 0) / 2)

    @property
    def accuracy(self) -> float:
        """Share of pairs ranked right; a tie counts half."""
        return float(self.hits.mean())

    def row(self) -> dict[str, float]:
        return {"cv_nll": self.loss, "cv_se": self.error, "cv_accuracy": self.accuracy}


def rising_twice(losses: list[float]) -> bool:
    """Whether the last two values both lie above the best before them: the path has passed its minimum."""
    return len(losses) >= 3 and min(losses[-2:]) > min(losses[:-2])
