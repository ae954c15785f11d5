"""Estimates from scores: ranking, calibration, perplexity.

Pure NumPy on arrays; knows nothing of models, judges or files. How a value gets its interval is the business of
:mod:`coala.statistics.intervals`: rows of one ``group`` (a prompt, a conversation) are not independent and every
interval counts groups.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from coala.statistics.intervals import (
    Float,
    Groups,
    clustered,
    group_numbers,
    mean_estimate,
    over,
    percentiles,
    resamples,
    share_estimate,
    student,
    vector,
)
from coala.values import CoalaError, Estimate

# --- ranking -----------------------------------------------------------------------------------------------------


def ranking_accuracy(
    chosen: ArrayLike,
    rejected: ArrayLike,
    group: Groups = None,
    *,
    ties: Literal["half", "wrong"] = "half",
) -> Estimate:
    """Share of pairs whose chosen reply scores higher: scores ``chosen`` and ``rejected`` (n,), ``group`` (n,).

    A tie counts one half, so that a constant score has the accuracy of a coin; ``ties="wrong"`` is the strict count
    (that of TRL, where a constant score has 0). :func:`tie_share` tells how much that matters.
    """
    a, b = vector(chosen, "chosen scores"), vector(rejected, "rejected scores")
    if a.shape != b.shape:
        raise CoalaError(f"Found {len(a)} chosen and {len(b)} rejected scores; every pair needs one of each.")
    return accuracy_of_margins(a - b, group, ties=ties)


def accuracy_of_margins(
    margins: ArrayLike, group: Groups = None, *, ties: Literal["half", "wrong"] = "half"
) -> Estimate:
    """:func:`ranking_accuracy` from margins score(chosen) - score(rejected), (n,)."""
    margin = vector(margins, "margins")
    wins = (margin > 0) + (0.5 * (margin == 0) if ties == "half" else 0.0)
    return share_estimate(wins, group, "share of pairs ranked right" + (", a tie one half" if ties == "half" else ""))


def tie_share(margins: ArrayLike) -> float:
    """Share of margins that are exactly 0; nan of none."""
    margin = vector(margins, "margins")
    return float((margin == 0).mean()) if len(margin) else math.nan


def accuracy_difference(margins: ArrayLike, other: ArrayLike, group: Groups = None) -> Estimate:
    """Ranking accuracy of one head minus another's on the same pairs (ties one half), with a paired t interval.

    When the two agree on every pair the interval reaches to Wilson's bound on the share of pairs where they may not.
    """
    a, b = vector(margins, "margins"), vector(other, "margins")
    if a.shape != b.shape:
        raise CoalaError(
            f"Found {len(a)} and {len(b)} margins; a paired comparison needs the same pairs on both sides."
        )
    difference = (np.sign(a) - np.sign(b)) / 2
    if len(a) and not difference.any():
        reach = share_estimate(np.zeros(len(a)), group).high
        return Estimate(0.0, -reach, reach, len(a), "difference of accuracies; equal on every pair")
    estimate = mean_estimate(difference, group)
    low, high = max(-1.0, estimate.low), min(1.0, estimate.high)
    return Estimate(estimate.value, low, high, estimate.n, f"difference of accuracies, paired: {estimate.method}")


def pairwise_nll(margins: ArrayLike, group: Groups = None) -> Estimate:
    """Mean of log(1 + exp(-margin)) in nats per pair (Bradley-Terry, Eq. 6); a head without a signal has log 2."""
    margin = vector(margins, "margins")
    return mean_estimate(np.logaddexp(0.0, -margin), group)


@dataclass(frozen=True)
class LengthBin:
    """Ranking accuracy of the pairs with low <= length difference < high (the last bin includes its upper end)."""

    low: float
    high: float
    accuracy: Estimate


def by_length_difference(
    margins: ArrayLike,
    length_differences: ArrayLike,
    group: Groups = None,
    *,
    bins: int | Sequence[float] = 5,
) -> list[LengthBin]:
    """Ranking accuracy by length(chosen) - length(rejected): a head that only likes length fails on the left.

    ``bins`` is a number of bins of about equal size, or their edges (ascending; pairs outside are left out). Bins
    without a pair are left out.
    """
    margin, difference = vector(margins, "margins"), vector(length_differences, "length differences")
    if margin.shape != difference.shape:
        raise CoalaError(f"Found {len(margin)} margins and {len(difference)} length differences; expected as many.")
    if not len(margin):
        return []
    if isinstance(bins, int):
        edges = np.unique(np.quantile(difference, np.linspace(0, 1, bins + 1), method="nearest"))
    else:
        edges = np.unique(np.asarray(bins, dtype=float))
    if len(edges) == 1:
        edges = np.repeat(edges, 2)
    labels = group_numbers(group, len(margin))
    rows = []
    for i, (low, high) in enumerate(itertools.pairwise(edges)):
        last = i == len(edges) - 2
        inside = (difference >= low) & ((difference <= high) if last else (difference < high))
        if inside.any():
            rows.append(LengthBin(float(low), float(high), accuracy_of_margins(margin[inside], labels[inside])))
    return rows


# --- calibration -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReliabilityBin:
    """Pairs of like confidence: its mean ``predicted``, and the share of them ranked right, ``observed``."""

    predicted: float
    observed: Estimate


@dataclass(frozen=True)
class Reliability:
    """What probabilities are worth, bin by bin and in one number.

    ``confidence`` is the mean probability given to the reply held to be the better one; ``error`` the expected
    calibration error, and ``error_by_chance`` the mean one that probabilities without fault have on as many pairs.
    """

    bins: tuple[ReliabilityBin, ...]
    confidence: float
    error: Estimate
    error_by_chance: float


def reliability(
    preferences: ArrayLike,
    group: Groups = None,
    *,
    bins: int = 8,
    draws: int = 1000,
    seed: int = 0,
) -> Reliability:
    """Do pairs with P(chosen is preferred) = p, ``preferences`` (n,), turn out so in a share p of cases?

    Which reply of a pair comes first is arbitrary, so p is folded: the confidence max(p, 1 - p) in [0.5, 1] is held
    against whether the reply it speaks for is the chosen one (p = 0.5: one half). ``bins`` hold about as many pairs
    each; pairs of one confidence stay together. The expected calibration error (Naeini et al. 2015) is
    sum_b n_b/n |observed_b - predicted_b|; its interval is a percentile bootstrap over groups, with these bins.
    """
    p = vector(preferences, "preferences")
    if len(p) and (p.min() < 0 or p.max() > 1):
        raise CoalaError(f"A preference is a probability; found values from {p.min():g} to {p.max():g}.")
    labels, n = group_numbers(group, len(p)), len(p)
    if not n:
        return Reliability((), math.nan, Estimate(math.nan, 0.0, 1.0, 0, "calibration error; no pairs"), math.nan)
    confidence = np.maximum(p, 1 - p)
    right = (p > 0.5) + 0.5 * (p == 0.5)
    edges = np.unique(np.quantile(confidence, np.linspace(0, 1, bins + 1)[1:-1], method="nearest"))
    place = np.searchsorted(edges, confidence, "right")
    place = np.unique(place, return_inverse=True)[1]
    rows = [
        ReliabilityBin(
            float(confidence[place == b].mean()),
            share_estimate(right[place == b], labels[place == b], "share of pairs ranked right, a tie one half"),
        )
        for b in range(int(place.max()) + 1)
    ]

    def error(right: Float, times: float | NDArray[np.intp] = 1.0) -> float:
        excess = np.bincount(place, times * (right - confidence))
        return float(np.abs(excess).sum() / np.broadcast_to(times, n).sum())

    value = error(right)
    rng = np.random.default_rng(seed)
    by_chance = [error((rng.random(n) < confidence).astype(float)) for _ in range(200)]
    groups = int(labels.max()) + 1
    low, high, about = 0.0, 1.0, "; one group, so no interval"
    if groups > 1:
        low, high = percentiles([error(right, times) for times in resamples(labels, draws, rng)])
        about = f", percentile bootstrap 95 % ({draws} draws, seed {seed}){over(groups, n)}"
    # Resampling adds noise to noise, so the bootstrap can lie above the value it is an interval of.
    estimate = Estimate(value, min(low, value), max(high, value), n, f"calibration error, {len(rows)} bins{about}")
    return Reliability(tuple(rows), float(confidence.mean()), estimate, float(np.mean(by_chance)))


def perplexity(log_probs: ArrayLike, n_tokens: ArrayLike, group: Groups = None) -> Estimate:
    """exp(-sum log_probs / sum n_tokens) of texts with summed log-probabilities ``log_probs`` (n,) in nats.

    The interval is that of the ratio's logarithm (linearised, cluster-robust, t), so it is never negative.
    """
    logs, tokens = vector(log_probs, "log-probabilities"), vector(n_tokens, "token counts")
    if logs.shape != tokens.shape:
        raise CoalaError(f"Found {len(logs)} log-probabilities and {len(tokens)} token counts; expected as many.")
    total = float(tokens.sum())
    if total <= 0:
        return Estimate(math.nan, 0.0, math.inf, len(logs), "perplexity; no tokens")
    nll = -float(logs.sum()) / total
    _, error, groups = clustered((-logs - nll * tokens) * len(logs) / total, group)
    if groups < 2:
        return Estimate(_exp(nll), 0.0, math.inf, len(logs), "perplexity per token; one group, so no interval")
    half = student(groups - 1) * error
    about = f"perplexity per token, t interval 95 % of its logarithm{over(groups, len(logs))}"
    return Estimate(_exp(nll), _exp(nll - half), _exp(nll + half), len(logs), about)


def perplexity_ratio(
    log_probs: ArrayLike, n_tokens: ArrayLike, base_log_probs: ArrayLike, base_n_tokens: ArrayLike
) -> Estimate:
    """The perplexity of texts over that of others to the same prompts (n,), with a paired t interval of its logarithm.

    Linearised as :func:`perplexity` is: prompts on which both are high or low cancel.
    """
    sides: list[tuple[float, Float]] = []
    for logs, counts in ((log_probs, n_tokens), (base_log_probs, base_n_tokens)):
        x, tokens = vector(logs, "log-probabilities"), vector(counts, "token counts")
        if x.shape != tokens.shape or (sides and x.shape != sides[0][1].shape):
            raise CoalaError(
                f"Found {len(x)} log-probabilities and {len(tokens)} token counts; expected one per prompt."
            )
        total = float(tokens.sum())
        if total <= 0:
            return Estimate(math.nan, 0.0, math.inf, len(x), "ratio of two perplexities; no tokens")
        nll = -float(x.sum()) / total
        sides.append((nll, (-x - nll * tokens) * len(x) / total))
    (ours, own), (theirs, other) = sides
    found = mean_estimate(own - other)
    half = found.high - found.value
    if not math.isfinite(half):
        return Estimate(_exp(ours - theirs), 0.0, math.inf, found.n, "ratio of two perplexities; too few prompts")
    low, high = (_exp(ours - theirs + side) for side in (-half, half))
    about = "ratio of two perplexities on the same prompts, t interval 95 % of its logarithm"
    return Estimate(_exp(ours - theirs), low, high, found.n, about)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
