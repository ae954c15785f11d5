"""Statistics of votes: shares, differences between options that compete for one vote, many tests, how many voters.

A vote goes to one of several options, so that the shares of a question depend on one another and separate intervals
are the wrong test for their difference. One voter answers many questions, so voters are the trials. NumPy and SciPy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from coala.statistics.intervals import Z95, Float, clustered, group_numbers, student, vector, wilson, wilson_estimate
from coala.values import CoalaError, Estimate


@dataclass(frozen=True)
class Contrast:
    """The share of ``first`` minus that of ``second``, its test statistic and two-sided p-value.

    ``adjusted`` is Holm's p-value where several contrasts were asked for together, else ``p_value`` itself.
    """

    first: str
    second: str
    difference: Estimate
    statistic: float
    p_value: float
    adjusted: float


def multinomial_difference(first: float, second: float, n: int, z: float = Z95) -> Contrast:
    """Difference of two shares of one multinomial of ``n`` independent votes: counts ``first`` and ``second``.

    var = (p1 + p2 - (p1 - p2)^2) / n: the two shares are negatively correlated, as a vote for one is none for the
    other. When no vote tells them apart the interval reaches to Wilson's bound on the shares.
    """
    if n < 1 or first < 0 or second < 0 or first + second > n * (1 + 1e-12):
        raise CoalaError(
            f"Found {first} and {second} votes of {n}; expected counts from 0 whose sum is at most the number of votes."
        )
    p1, p2 = first / n, second / n
    apart = p1 - p2
    error = math.sqrt(max(p1 + p2 - apart**2, 0.0) / n)
    about = "difference of dependent shares, multinomial, normal 95 %" if z == Z95 else f"multinomial, normal, z = {z}"
    if error < 1e-12:
        low, high, about = (
            *_reach(apart, n),
            "difference of dependent shares; no spread, Wilson's bound on either share",
        )
        statistic = math.copysign(math.inf, apart) if apart else 0.0
    else:
        low, high, statistic = max(-1.0, apart - z * error), min(1.0, apart + z * error), apart / error
    p_value = math.erfc(abs(statistic) / math.sqrt(2)) if error >= 1e-12 else _sign_test(round(first), round(second))
    return Contrast("first", "second", Estimate(apart, low, high, n, about), statistic, p_value, p_value)


def vote_difference(votes: Sequence[str], first: str, second: str, voters: Sequence[Any] | None = None) -> Contrast:
    """Share of ``first`` minus share of ``second`` over n votes, with voters as clusters and Student's t.

    Each vote counts 1, -1 or 0, which carries the dependence of the two; with ``voters`` a person's votes are summed
    before squaring. With every vote its own voter this is :func:`multinomial_difference` up to n/(n - 1) and t for z.
    """
    chosen = _votes(votes)
    if first == second:
        raise CoalaError(f"A contrast of {first!r} with itself; expected two options.")
    x = (chosen == first).astype(float) - (chosen == second)
    mean, error, groups = clustered(x, voters)
    counted = f"{groups} voters" if voters is not None else f"{groups} votes"
    about = f"difference of dependent shares, t interval 95 %, {counted}"
    if groups < 2:
        nothing = Estimate(mean, -1.0, 1.0, len(x), f"{about}; one voter, so no interval")
        return Contrast(first, second, nothing, math.nan, math.nan, math.nan)
    if error == 0:
        p_value = _sign_test(*((groups, 0) if mean > 0 else (0, groups) if mean < 0 else (0, 0)))
        statistic = math.copysign(math.inf, mean) if mean else 0.0
        wide = Estimate(mean, *_reach(mean, groups), len(x), f"{about}; no spread, Wilson's bound on either share")
        return Contrast(first, second, wide, statistic, p_value, p_value)
    return _by_student(first, second, Estimate(mean, mean, mean, len(x), about), error, groups)


def _by_student(first: str, second: str, found: Estimate, error: float, groups: int) -> Contrast:
    """The contrast of a difference ``found`` with its standard ``error``, by Student's t over ``groups``."""
    from scipy.special import stdtr

    half, statistic = student(groups - 1) * error, found.value / error
    p_value = 2 * float(stdtr(groups - 1, -abs(statistic)))
    ends = max(-1.0, found.value - half), min(1.0, found.value + half)
    return Contrast(first, second, Estimate(found.value, *ends, found.n, found.method), statistic, p_value, p_value)


def two_way_error(
    values: Float, raters: NDArray[Any], questions: NDArray[Any]
) -> tuple[float, float, NDArray[np.intp]]:
    """Mean of ``values`` (n,), its error clustered by raters and questions at once, and the coarser grouping (n,).

    var = var_raters + var_questions - var_votes (Cameron, Gelbach and Miller 2011): votes that share either are
    correlated. Never below the larger of the first two, which the difference can be by chance. nan when either side has
    one group: of other raters, or other questions, nothing is known then.
    """
    mean, by_rater, n_raters = clustered(values, raters)
    _, by_question, n_questions = clustered(values, questions)
    _, by_vote, _ = clustered(values)
    if n_raters < 2 or n_questions < 2:
        return mean, math.nan, group_numbers(raters if n_raters < 2 else questions, len(values))
    variance = max(by_rater**2 + by_question**2 - by_vote**2, by_rater**2, by_question**2)
    side = raters if n_raters <= n_questions else questions
    return mean, math.sqrt(variance), group_numbers(side, len(values))


def two_way_share(values: Float, raters: NDArray[Any], questions: NDArray[Any], name: str) -> Estimate:
    """Share (mean of zeros and ones) with Wilson's interval at the sample size of the two-way error."""
    mean, error, labels = two_way_error(values, raters, questions)
    found = wilson_estimate(mean, error, labels, name)
    n_raters, n_questions = len(set(raters.tolist())), len(set(questions.tolist()))
    return replace(found, method=f"{found.method}; clustered by {n_raters} raters and {n_questions} questions")


def two_way_difference(
    votes: Sequence[str], first: str, second: str, raters: NDArray[Any], questions: NDArray[Any]
) -> Contrast:
    """Share of ``first`` minus share of ``second`` with the two-way error and Student's t on (coarser groups - 1)."""
    chosen = _votes(votes)
    x = (chosen == first).astype(float) - (chosen == second)
    mean, error, labels = two_way_error(x, raters, questions)
    groups = int(labels.max()) + 1
    if groups < 2:
        about = "difference of dependent shares; one rater or one question, so no interval"
        return Contrast(first, second, Estimate(mean, -1.0, 1.0, len(x), about), math.nan, math.nan, math.nan)
    if not error > 0:  # no spread at all: whole groups then count as one trial each
        return vote_difference(votes, first, second, labels.tolist())
    about = f"difference of dependent shares, t interval 95 %, clustered by raters and questions, {groups - 1} freedoms"
    return _by_student(first, second, Estimate(mean, mean, mean, len(x), about), error, groups)


def contrasts(votes: Sequence[str], of: str, voters: Sequence[Any] | None = None) -> list[Contrast]:
    """``of`` against every other option, p-values adjusted together by Holm's method."""
    others = sorted(set(_votes(votes).tolist()) - {of})
    return adjusted([vote_difference(votes, of, other, voters) for other in others])


def adjusted(contrasts: Sequence[Contrast]) -> list[Contrast]:
    """The same, their p-values adjusted together by Holm's method."""
    together = holm([one.p_value for one in contrasts])
    return [replace(one, adjusted=p) for one, p in zip(contrasts, together, strict=True)]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down p-values (1979), in the order given: they bound the chance of any false finding.

    The i-th smallest of m is multiplied by m - i + 1, never below a smaller one's, at most 1. nan stays and is not
    counted among the m.
    """
    p = np.asarray(p_values, dtype=np.float64)
    if ((p < 0) | (p > 1)).any():
        raise CoalaError("A p-value is not in [0, 1]; expected probabilities.")
    found = np.full(len(p), math.nan)
    order = [int(i) for i in np.argsort(p) if not math.isnan(p[i])]
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * float(p[i])))
        found[i] = largest
    return [float(one) for one in found]


def votes_for_width(share: float, half_width: float, z: float = Z95) -> int:
    """Independent votes after which Wald's half-width at ``share`` is at most ``half_width`` (both shares)."""
    if not 0 < half_width < 1 or not 0 <= share <= 1:
        raise CoalaError(f"Found a half-width of {half_width} at a share of {share}; expected both between 0 and 1.")
    return max(1, math.ceil(z * z * share * (1 - share) / half_width**2 - 1e-9))


def votes_for_difference(
    first: float,
    second: float,
    *,
    power: float = 0.8,
    alpha: float = 0.05,
    questions: int = 1,
    correlation: float = 0.0,
) -> int:
    """Voters needed to tell two dependent shares apart in a two-sided test at ``alpha`` with the given ``power``.

    Votes: (z_{1-alpha/2} sqrt(p1 + p2) + z_power sqrt(p1 + p2 - d^2))^2 / d^2 with d = p1 - p2 (Connor 1987). A voter
    gives ``questions`` votes with the intraclass ``correlation``, which is worth questions / (1 + (questions - 1)
    correlation) independent ones.
    """
    from scipy.special import ndtri

    apart, both = first - second, first + second
    if first < 0 or second < 0 or both > 1 + 1e-12 or apart == 0:
        raise CoalaError(f"Found shares of {first} and {second}; expected two that differ and sum to at most 1.")
    if not (0 < power < 1 and 0 < alpha < 1 and questions >= 1 and 0 <= correlation <= 1):
        raise CoalaError(
            f"Found power {power}, alpha {alpha}, {questions} questions, correlation {correlation}; expected the first "
            "two between 0 and 1, at least one question and a correlation from 0 to 1."
        )
    z = float(ndtri(1 - alpha / 2)) * math.sqrt(both) + float(ndtri(power)) * math.sqrt(max(both - apart**2, 0.0))
    votes = z * z / apart**2
    return max(1, math.ceil(votes * (1 + (questions - 1) * correlation) / questions - 1e-9))


def intraclass_correlation(values: ArrayLike, group: Sequence[Any] | NDArray[Any]) -> float:
    """How alike the rows of one group are: the one-way analysis-of-variance estimate, at most 1, nan where undefined.

    (between - within) / (between + (m - 1) within) of the mean squares, m the mean group size corrected for inequality
    (Donner 1986). Below 0 when groups are more even than chance.
    """
    x: Float = vector(values, "values")
    labels = group_numbers(group, len(x))
    sizes = np.bincount(labels).astype(np.float64)
    n, groups = len(x), len(sizes)
    if groups < 2 or n == groups:
        return math.nan
    means = np.bincount(labels, weights=x) / sizes
    between = float(sizes @ (means - x.mean()) ** 2) / (groups - 1)
    within = float(((x - means[labels]) ** 2).sum()) / (n - groups)
    size = (n - float(sizes @ sizes) / n) / (groups - 1)
    total = between + (size - 1) * within
    return (between - within) / total if total > 0 else math.nan


def _votes(votes: Sequence[str]) -> NDArray[np.str_]:
    chosen = np.asarray(votes, dtype=str)
    if chosen.ndim != 1 or not len(chosen):
        raise CoalaError(f"Expected votes of shape (n,) with n of at least 1; found {chosen.shape}.")
    return chosen


def _reach(apart: float, n: int) -> tuple[float, float]:
    """Bounds on a difference when all n trials gave the same one, -1, 0 or 1 at its extremes."""
    reach = wilson(0.0, n)[1]
    return max(-1.0, apart - 2 * reach), min(1.0, apart + 2 * reach)


def _sign_test(first: int, second: int) -> float:
    """Exact two-sided p-value that the larger of two counts is so by chance; for counts without spread."""
    return 1.0 if first == second else min(1.0, 2 * 0.5 ** max(first, second)) if not min(first, second) else math.nan
