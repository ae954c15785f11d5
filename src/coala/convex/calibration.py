"""Probabilities that mean what they say: one temperature fitted on held-out pairs, and how far it can be trusted.

NumPy only; knows margins, not where they came from. What checks the probabilities is in ``coala.evaluation``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Shaped

from coala.statistics.logistic import sigmoid
from coala.values import CoalaError

# Half the square of the normal quantile of a two-sided 99 % interval: the log-likelihood that its ends may lose. Not
# 95 %, since a fit has chosen its ridge on the margins that it is judged by (docs/decoding.md).
DROP = 2.5758293035489004**2 / 2
# The temperature lies within this factor of the margins' root mean square.
WIDEST = 1e3


def fit_temperature(
    margins: Float[np.ndarray, "n"],
    *,
    weight: Float[np.ndarray, "n"] | None = None,
    offset: Float[np.ndarray, "n"] | float = 0.0,
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
        wrong = sigmoid(offset - inverse * unit)
        bend = share * wrong * (1 - wrong)
        if separable:
            return float(-share @ wrong - wanted), float(bend @ unit)
        return float(-(share * unit) @ wrong), float(bend @ unit**2)

    return size / _root(rising, 1 / WIDEST, WIDEST)


def least_slope(margins: Float[np.ndarray, "n"], group: Shaped[np.ndarray, "n"] | None = None) -> float:
    """The lower end, at least 0, of the 99 % interval of the slope b in P(right) = sigmoid(b margin).

    ``margins`` (n,) of held-out pairs; pairs of one ``group`` (n,) may be correlated. The interval is that of the
    profile likelihood: all slopes whose log-likelihood is within 3.32 of the largest, which holds for few pairs and
    for margins that are all right, where a standard error does not. Groups widen it by the design effect of the mean
    margin (Kish 1965). Scaling the margins by c divides the slope by c.

    It is 0 where what is seen cannot be told from chance: of sets of margins that have nothing to do with the
    preference, for about 199 in 200.

    Raises:
        CoalaError: for margins that are not finite.
    """
    margins = np.asarray(margins, np.float64)
    if not np.isfinite(margins).all():
        raise CoalaError("Margins must be finite to estimate a slope; some are not.")
    size = float(np.abs(margins).max(initial=0.0))
    if size == 0:
        return 0.0
    size *= float(np.sqrt(((margins / size) ** 2).mean()))
    units = margins / size
    if units.sum() <= 0:  # the likeliest slope is not above 0
        return 0.0
    allowed = DROP * _design_effect(units, group)

    def loss(slope: float) -> float:
        return float(np.logaddexp(0.0, -slope * units).sum())

    if (units >= 0).all():
        high, least = WIDEST, float(np.log(2) * (units == 0).sum())
    else:
        high = size / fit_temperature(margins)
        least = loss(high)
    if loss(0.0) - least <= allowed:
        return 0.0
    low = 0.0
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if loss(middle) - least > allowed else (low, middle)
    return low / size


def _design_effect(units: Float[np.ndarray, "n"], group: Shaped[np.ndarray, "n"] | None) -> float:
    """By how much groups widen the variance of the mean, at least 1."""
    if group is None:
        return 1.0
    names, member = np.unique(group, return_inverse=True)
    centred = units - units.mean()
    alone = float((centred**2).sum())
    if len(names) < 2 or alone == 0:  # nothing tells how alike pairs of a group are: they count as one
        return len(units) / len(names)
    sums = np.bincount(member, centred)
    return max(1.0, float((sums**2).sum()) * len(names) / (len(names) - 1) / alone)


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
