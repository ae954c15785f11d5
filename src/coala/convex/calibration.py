"""Probabilities that mean what they say: one temperature fitted on held-out pairs.

NumPy only; knows margins, not where they came from. What checks the probabilities is in ``coala.evaluation``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from coala.values import CoalaError

# The temperature lies within this factor of the margins' root mean square.
WIDEST = 1e3


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
