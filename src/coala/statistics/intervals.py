"""Intervals for shares, means and anything computed from rows, where rows of one group are not independent.

NumPy and SciPy on arrays; knows nothing of models, judges or files. Standard errors are cluster-robust, with Student's
t on (groups - 1) degrees of freedom; a bootstrap draws whole groups. A share never gets an interval of no width: it is
a Wilson interval whose sample size is the one that clustering leaves (`effective sample size`, Kish 1965; for binomial
data see Korn and Graubard 1998).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from coala.values import CoalaError, Estimate

Float = NDArray[np.float64]
Groups = Sequence[Any] | NDArray[Any] | None
Z95 = 1.959963984540054  # the 97.5 % point of the normal distribution


# --- a share seen in n independent trials ------------------------------------------------------------------------


def wilson(share: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a share in [0, 1] seen in ``n`` trials; ``n`` need not be whole. (0, 1) for n = 0."""
    if n <= 0:
        return 0.0, 1.0
    spread = z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    # The ends are exact at 0 and 1; rounding must not move the value itself out of its interval.
    return min(max(0.0, centre - half), share), max(min(1.0, centre + half), share)


def wald(share: float, n: float, z: float = Z95) -> tuple[float, float]:
    """share -+ z sqrt(share (1 - share) / n), as most papers print it; for comparing with them only.

    It has no width at 0 and 1, leaves [0, 1] near them and covers too rarely for small n; :func:`wilson` does not.
    nan for n = 0.
    """
    if n <= 0:
        return math.nan, math.nan
    half = z * math.sqrt(max(share * (1 - share), 0.0) / n)
    return share - half, share + half


def clopper_pearson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The exact binomial interval of ``successes`` in ``n`` trials: it covers at least ``level`` at any true share.

    Each end is a beta quantile; wider than Wilson's. (0, 1) for n = 0. CoalaError for counts that cannot be.
    """
    from scipy.special import betaincinv

    if not 0 <= successes <= n:
        raise CoalaError(f"Found {successes} successes in {n} trials; expected a count from 0 to the number of trials.")
    tail = (1 - _share_of("level", level)) / 2
    low = 0.0 if successes == 0 else float(betaincinv(successes, n - successes + 1, tail))
    high = 1.0 if successes == n else float(betaincinv(successes + 1, n - successes, 1 - tail))
    return low, high


# --- means -------------------------------------------------------------------------------------------------------


def clustered(values: ArrayLike, group: Groups = None) -> tuple[float, float, int]:
    """Mean of ``values`` (n,), its cluster-robust standard error, and the number G of groups.

    se^2 = G/(G-1) * sum_g (sum_{i in g} (x_i - mean))^2 / n^2, which is the usual se of a mean when every group has
    one row (``group=None``). nan for one group: what does not vary cannot be judged.
    """
    x = vector(values, "values")
    labels = group_numbers(group, len(x))
    if not len(x):
        return math.nan, math.nan, 0
    mean = float(x.mean())
    groups = int(labels.max()) + 1
    if groups < 2:
        return mean, math.nan, groups
    totals = np.bincount(labels, weights=x - mean, minlength=groups)
    return mean, math.sqrt(groups / (groups - 1) * float(totals @ totals)) / len(x), groups


def mean_estimate(
    values: ArrayLike,
    group: Groups = None,
    *,
    how: Literal["t", "bootstrap"] = "t",
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """Mean of ``values`` (n,) with a t interval, or a percentile bootstrap over groups (``draws``, ``seed``).

    With a single group (or row) nothing is known of the spread and the interval is the whole line.
    """
    x = vector(values, "values")
    mean, error, groups = clustered(x, group)
    if groups < 2:
        return Estimate(mean, -math.inf, math.inf, len(x), "mean; one group, so no interval")
    if how == "t":
        half = student(groups - 1, level) * error
        about = f"mean, t interval {100 * level:g} %{over(groups, len(x))}"
        return Estimate(mean, mean - half, mean + half, len(x), about)
    means = [times @ x / times.sum() for times in resamples(group_numbers(group, len(x)), draws, seed)]
    low, high = percentiles(means, level)
    about = f"mean, percentile bootstrap {100 * level:g} % ({draws} draws, seed {seed}){over(groups, len(x))}"
    return Estimate(mean, low, high, len(x), about)


def bounded_mean(values: ArrayLike, group: Groups = None, *, of: float = 1.0) -> Estimate:
    """Mean of ``values`` (n,) in [0, ``of``] with a t interval cut to that range; Wilson's where all values agree.

    The interval for graded values, whose spread is smaller than that of zeros and ones with the same mean.
    """
    x = vector(values, "values") / of
    mean, error, groups = clustered(x, group)
    # All values equal: the sample shows no spread, which is not to say that there is none.
    inner = share_estimate(x, group, "mean") if groups < 2 or not error > 0 else mean_estimate(x, group)
    ends = max(0.0, of * inner.low), min(of, of * inner.high)
    return Estimate(of * mean, *ends, len(x), inner.method)


def paired_difference(values: ArrayLike, others: ArrayLike, group: Groups = None) -> Estimate:
    """Mean of values - others on the same rows (n,); what the rows share cancels, and groups count as in a mean."""
    a, b = vector(values, "values"), vector(others, "values")
    if a.shape != b.shape:
        raise CoalaError(f"Found {len(a)} and {len(b)} values; a paired comparison needs the same rows on both sides.")
    found = mean_estimate(a - b, group)
    return Estimate(found.value, found.low, found.high, found.n, f"paired difference: {found.method}")


def bootstrap(
    statistic: Callable[[NDArray[np.intp]], float],
    n: int,
    group: Groups = None,
    *,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    name: str = "statistic",
) -> Estimate:
    """``statistic(rows)`` of all n rows, with a percentile bootstrap that draws whole groups with replacement.

    ``rows`` holds row numbers, a row as often as it was drawn: arrays indexed by it stay paired. Draws whose statistic
    is not finite are left out and counted in ``method``; without a finite one, or with one group, the interval is
    the whole line.
    """
    labels = group_numbers(group, n)
    value = statistic(np.arange(n)) if n else math.nan
    groups = int(labels.max()) + 1 if n else 0
    if groups < 2:
        return Estimate(value, -math.inf, math.inf, n, f"{name}; fewer than two groups, so no interval")
    found = np.array([statistic(np.repeat(np.arange(n), times)) for times in resamples(labels, draws, seed)])
    sound = found[np.isfinite(found)]
    about = f"{name}, percentile bootstrap {100 * level:g} % ({draws} draws, seed {seed}){over(groups, n)}"
    if len(sound) < len(found):
        about += f"; undefined in {len(found) - len(sound)} draws"
    low, high = percentiles(sound, level) if len(sound) else (-math.inf, math.inf)
    return Estimate(value, low, high, n, about)


def resamples(labels: NDArray[np.intp], draws: int, seed: int | np.random.Generator = 0) -> Iterator[NDArray[np.intp]]:
    """For each bootstrap draw of whole groups with replacement, how often each row is in it (n,).

    ``labels`` (n,) number the groups from 0. Groups differ in size, and so do the draws' numbers of rows.
    """
    groups = int(labels.max()) + 1
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        yield np.bincount(rng.integers(groups, size=groups), minlength=groups)[labels]


def percentiles(drawn: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """Both ends of the percentile interval of ``drawn`` (draws,): what leaves (1 - level)/2 on either side."""
    tail = (1 - _share_of("level", level)) / 2
    low, high = np.quantile(np.asarray(drawn, dtype=np.float64), [tail, 1 - tail])
    return float(low), float(high)


def share_estimate(values: ArrayLike, group: Groups = None, name: str = "share") -> Estimate:
    """Mean of ``values`` (n,) in [0, 1] with a Wilson interval for clustered rows; see :func:`wilson_estimate`."""
    x = vector(values, "values")
    if len(x) and (x.min() < 0 or x.max() > 1):
        raise CoalaError(f"A share is a mean of values in [0, 1]; found values from {x.min():g} to {x.max():g}.")
    mean, error, _ = clustered(x, group)
    return wilson_estimate(mean, error, group_numbers(group, len(x)), name)


def wilson_estimate(value: float, error: float, labels: NDArray[np.intp], name: str) -> Estimate:
    """Wilson's interval at the sample size that gives the standard error ``error``; ``labels`` (n,) number the groups.

    Groups of one row each: n itself. Otherwise n_eff = value(1 - value)/error^2, at most n, with Student's t in place
    of z. When every row agrees the error is 0 and says nothing of clustering; then whole groups count as one trial
    each, n_eff = n^2 / sum n_g^2, which is the most that correlated rows can cost.
    """
    n = len(labels)
    if not n:
        return Estimate(math.nan, 0.0, 1.0, 0, f"{name}; no rows")
    sizes = np.bincount(labels).astype(float)
    groups = len(sizes)
    if groups == n:
        low, high = wilson(value, n)
        return Estimate(value, low, high, n, f"{name}, Wilson 95 %")
    if groups == 1:
        low, high = wilson(value, 1)
        return Estimate(value, low, high, n, f"{name}, Wilson 95 %; all rows are of one group, which counts as one")
    if not 0 < value < 1:
        effective = n**2 / float(sizes @ sizes)
        low, high = wilson(value, effective)
    else:
        effective = min(value * (1 - value) / error**2, float(n)) if error > 0 else float(n)
        low, high = wilson(value, effective, student(groups - 1))
    return Estimate(value, low, high, n, f"{name}, Wilson 95 % at n_eff = {effective:.1f}{over(groups, n)}")


def weighted_mean(parts: Sequence[Estimate], weights: Sequence[float] | None = None, name: str = "mean") -> Estimate:
    """sum_i w_i value_i / sum_i w_i of independent estimates (equal weights: None), the half-widths added as squares.

    Low and high sides are added apart, so that the interval stays within the range of its parts. CoalaError for
    weights of another number, below 0 or all 0.
    """
    given = [1.0] * len(parts) if weights is None else list(weights)
    if len(given) != len(parts) or not (all(weight >= 0 for weight in given) and sum(given) > 0):
        raise CoalaError(f"The weights of {len(parts)} parts are {given}; expected one each, some above 0, none below.")
    w = np.array(given, dtype=np.float64) / sum(given)
    value, low, high = (np.array([getattr(part, end) for part in parts]) for end in ("value", "low", "high"))
    mean = float(w @ value)
    down, up = (float(np.sqrt((w * side) @ (w * side))) for side in (value - low, high - value))
    return Estimate(mean, mean - down, mean + up, sum(part.n for part in parts), f"{name}, 95 % intervals combined")


def void(name: str, n: int, why: str) -> Estimate:
    """The estimate of a share whose ``n`` values say nothing of it: no value, and ``why`` in its method."""
    return Estimate(math.nan, 0.0, 1.0, n, f"{name}; void: {why}")


# --- what the estimators share -----------------------------------------------------------------------------------


def vector(values: ArrayLike, name: str) -> Float:
    """``values`` as float64 (n,); CoalaError for another shape or a value that is not finite."""
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1:
        raise CoalaError(f"Expected {name} of shape (n,); found {x.shape}.")
    if not np.isfinite(x).all():
        row = int(np.flatnonzero(~np.isfinite(x))[0])
        raise CoalaError(f"Row {row} of the {name} is {x[row]}; expected finite numbers. Leave such rows out first.")
    return x


def group_numbers(group: Groups, n: int) -> NDArray[np.intp]:
    """Groups as numbers 0..G-1 (n,); every row its own group without any."""
    if group is None:
        return np.arange(n)
    names = np.asarray(group)
    if names.shape != (n,):
        raise CoalaError(f"{n} rows need as many group names; found {names.shape}.")
    return np.unique(names, return_inverse=True)[1].astype(np.intp)


def student(freedom: int, level: float = 0.95) -> float:
    """The point of Student's t that leaves (1 - level)/2 above it."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + _share_of("level", level)) / 2))


def over(groups: int, n: int) -> str:
    """How a method names its groups; nothing where every row is its own."""
    return "" if groups == n else f", {groups} groups"


def _share_of(name: str, value: float) -> float:
    if not 0 < value < 1:
        raise CoalaError(f"{name} is {value}; expected a number between 0 and 1, such as 0.95.")
    return value
