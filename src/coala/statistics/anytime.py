"""Confidence sequences: intervals that hold at all times together, however often one looks and whenever one stops.

The mean is the running mean of conditional means, (E[x_1|before] + ... + E[x_n|before]) / n, of values in [0, 1]: no
two need have the same. For x_i with conditional mean mu_i and any l,

    prod_i exp(l x_i) / (1 - mu_i + mu_i e^l)

is a supermartingale from 1, and log(1 - mu + mu e^l) is concave in mu, so that it is at least
exp(l S_n - n log(1 - m_n + m_n e^l)) for their sum S_n and running mean m_n. A mixture over fixed l > 0 exceeds 2/alpha
at any time with probability alpha/2 at most (Ville), and falls in m: the lower end is where it does not
(docs/derivations/live.md). The upper end is that of 1 - x.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from coala.statistics.intervals import vector
from coala.values import CoalaError, Estimate

# The mixture: as much weight for each of these. Near 0.15 are deviations of some 2,000 values, near 4 those of a few.
BETS = np.geomspace(0.15, 4.0, 32)
BISECTIONS = 50


def log_wealth(total: ArrayLike, n: ArrayLike, mean: ArrayLike) -> NDArray[np.float64]:
    """Log of the mixture against "the running mean is at most ``mean``" after ``n`` values that sum to ``total``.

    Arrays of one shape, or that broadcast. Where the running mean is ``mean`` at most, it exceeds log(1/a) at any time
    with probability a at most.
    """
    s, count, m = np.broadcast_arrays(*(np.asarray(one, np.float64)[..., None] for one in (total, n, mean)))
    exponent = BETS * s - count * np.log1p(m * np.expm1(BETS))
    highest = exponent.max(axis=-1, keepdims=True)
    return np.asarray(highest[..., 0] + np.log(np.exp(exponent - highest).mean(axis=-1)))


def running_mean(values: ArrayLike, *, level: float = 0.95, name: str = "mean so far") -> Estimate:
    """The mean of ``values`` (n,) in [0, 1], in their order of coming, with an interval for the running mean.

    ``level`` is the probability that the intervals after 1, 2, 3, ... values all hold, each for the running mean of
    that time. (0, 1) for none.
    """
    x = vector(values, "values")
    if len(x) and (x.min() < 0 or x.max() > 1):
        raise CoalaError(f"Values from {x.min():g} to {x.max():g}; expected values in [0, 1].")
    if not 0 < level < 1:
        raise CoalaError(f"level is {level}; expected a number between 0 and 1, such as 0.95.")
    if not len(x):
        return Estimate(np.nan, 0.0, 1.0, 0, f"{name}; no values")
    n, total = len(x), float(x.sum())
    bound = float(np.log(2 / (1 - level)))
    about = f"{name}, confidence sequence {100 * level:g} %: holds at all times together"
    return Estimate(total / n, _least(total, n, bound), 1 - _least(n - total, n, bound), n, about)


def _least(total: float, n: int, bound: float) -> float:
    """The least running mean that the mixture does not speak against, to 2^-50."""
    low, high = 0.0, total / n
    if total == 0 or float(log_wealth(total, n, 0.0)) < bound:
        return 0.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if float(log_wealth(total, n, middle)) >= bound:
            low = middle
        else:
            high = middle
    return low
