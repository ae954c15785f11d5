"""Probabilities that mean what they say: one temperature fitted on held-out pairs, and the tables that check it.

NumPy only; knows margins and probabilities, not where they came from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from coala.values import CoalaError, Estimate

# The temperature lies within this factor of the margins' root mean square.
WIDEST = 1e3
Z95 = 1.959963984540054  # the 97.5 % point of the normal distribution


def fit_temperature(
    margins: np.ndarray, *, weight: np.ndarray | None = None, offset: np.ndarray | float = 0.0
) -> float:
    """The T > 0 that minimises sum_j weight_j softplus(offset_j - margin_j / T), for margins (n,) of held-out pairs.

    Convex in 1/T, found by Newton's method. Scaling the margins scales T. Where the minimum is not attained:

    - margins that are all 0 say nothing: 1;
    - margins that are all right (or 0) fit the better the smaller T: T is such that the mean probability of a wrong
      preference is 1 / (n + 2), what n right answers in n leave to expect (rule of succession), n without the zeros;
    - margins no better than chance fit the better the larger T: 1000 times their root mean square.

    Raises:
        CoalaError: for margins, weights or offsets that are not finite, or weights that are negative.
    """
    margins = np.asarray(margins, np.float64)
    weight = np.ones_like(margins) if weight is None else np.asarray(weight, np.float64)
    offset = np.broadcast_to(np.asarray(offset, np.float64), margins.shape)
    if not (np.isfinite(margins).all() and np.isfinite(weight).all() and np.isfinite(offset).all()):
        raise CoalaError("Margins, weights and offsets must be finite to fit a temperature; some are not.")
    if (weight < 0).any():
        raise CoalaError(f"A weight is {weight.min()}; expected weights of at least 0 to fit a temperature.")
    telling = (margins != 0) & (weight > 0)
    if not telling.any():
        return 1.0
    margins, offset = margins[telling], offset[telling]
    share = weight[telling] / weight[telling].sum()
    size = float(np.abs(margins).max())
    size *= float(np.sqrt(share @ (margins / size) ** 2))
    unit = margins / size
    wanted = -1 / (len(unit) + 2)
    separable = bool((unit > 0).all())

    def rising(inverse: float) -> tuple[float, float]:
        """What must be 0 at the answer, as a rising function of 1/T, and its derivative."""
        wrong = _sigmoid(offset - inverse * unit)
        bend = share * wrong * (1 - wrong)
        if separable:
            return float(-share @ wrong - wanted), float(bend @ unit)
        return float(-(share * unit) @ wrong), float(bend @ unit**2)

    return size / _root(rising, 1 / WIDEST, WIDEST)


def _root(rising: Callable[[float], tuple[float, float]], low: float, high: float) -> float:
    """Where a rising function crosses 0 in [low, high], by Newton's method kept in a bracket; an end if it does not."""
    if rising(low)[0] >= 0:
        return low
    if rising(high)[0] <= 0:
        return high
    x = min(max(1.0, low), high)
    for _ in range(200):
        value, derivative = rising(x)
        low, high = (x, high) if value < 0 else (low, x)
        newton = x - value / derivative if derivative > 0 else np.inf
        # Ends that are far apart are halved by their ratio.
        new = float(newton) if low < newton < high else float(np.sqrt(low * high))
        if abs(new - x) <= 1e-13 * x:
            return new
        x = new
    return x


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(np.exp(-np.logaddexp(0.0, -x)))


@dataclass(frozen=True)
class Reliability:
    """One bin of a reliability diagram: the mean confidence of its pairs and the share that was ranked right."""

    low: float
    high: float
    predicted: float
    observed: Estimate


class CalibrationError(NamedTuple):
    """Expected calibration error, and the value that perfectly calibrated probabilities would have on average.

    The error is biased upwards: chance alone separates shares from probabilities, the more the fewer pairs in a bin.
    Only an error well above ``by_chance`` speaks against the probabilities.
    """

    value: float
    by_chance: float


def reliability(probability: np.ndarray, bins: int = 10) -> list[Reliability]:
    """Bins of equal width over the confidences max(p, 1 - p), for the probabilities p (n,) of the preferred replies.

    Which reply comes first is a matter of naming, so a pair at p says the same as its mirror image at 1 - p: pairs are
    folded to [0.5, 1], and one is right if p > 0.5; a tie is half right. Empty bins are left out. Wilson intervals.

    Raises:
        CoalaError: for probabilities outside [0, 1] or no bin.
    """
    return [
        Reliability(low, high, float(confidence.mean()), _share(right))
        for low, high, confidence, right in _folded(probability, bins)
    ]


def calibration_error(probability: np.ndarray, bins: int = 10) -> CalibrationError:
    """sum_bins n_bin / n |mean confidence - share right|, with the same folding and bins as :func:`reliability`.

    ``by_chance`` takes the difference in each bin for normal, with the variance that the confidences imply.

    Raises:
        CoalaError: as :func:`reliability`.
    """
    parts = [(confidence, right) for _, _, confidence, right in _folded(probability, bins)]
    n = max(sum(len(right) for _, right in parts), 1)
    value = sum(abs(float(confidence.sum() - right.sum())) for confidence, right in parts) / n
    spread = sum(float(np.sqrt((confidence * (1 - confidence)).sum())) for confidence, _ in parts) / n
    return CalibrationError(value, float(np.sqrt(2 / np.pi)) * spread)


def _folded(probability: np.ndarray, bins: int) -> list[tuple[float, float, np.ndarray, np.ndarray]]:
    """Ends, confidences and rightness of every bin that is not empty."""
    p = np.asarray(probability, np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise CoalaError("A probability of a preference is not a number in [0, 1].")
    if bins < 1:
        raise CoalaError(f"bins is {bins}; expected at least 1.")
    confidence = np.maximum(p, 1 - p)
    right = (p > 0.5) + (p == 0.5) / 2
    edges = np.linspace(0.5, 1, bins + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, bins - 1)
    members = [place == b for b in range(bins)]
    return [
        (float(edges[b]), float(edges[b + 1]), confidence[member], right[member])
        for b, member in enumerate(members)
        if member.any()
    ]


def _share(right: np.ndarray) -> Estimate:
    """The mean with Wilson's score interval."""
    n, share = len(right), float(right.mean())
    spread = Z95**2 / n
    centre = (share + spread / 2) / (1 + spread)
    half = float(np.sqrt(spread * (share * (1 - share) + spread / 4))) / (1 + spread)
    low, high = min(max(0.0, centre - half), share), max(min(1.0, centre + half), share)
    return Estimate(share, low, high, n, "share of pairs ranked right, Wilson 95 %")
