"""Estimates from saved scores and judgements: ranking, calibration, win rates of judged replies, perplexity.

Pure NumPy on arrays; knows nothing of models, judges or files. How a value gets its interval is the business of
:mod:`coala.evaluation.statistics`: rows of one ``group`` (a prompt, a conversation) are not independent and every
interval counts groups.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from coala.evaluation.order_effects import place_alone, place_alone_once
from coala.evaluation.statistics import (
    Float,
    clustered,
    group_numbers,
    mean_estimate,
    over,
    share_estimate,
    student,
    vector,
    void,
    wilson_estimate,
)
from coala.values import CoalaError, Estimate, Judgement

# --- ranking -----------------------------------------------------------------------------------------------------


def ranking_accuracy(
    chosen: ArrayLike,
    rejected: ArrayLike,
    group: Sequence[Any] | NDArray[Any] | None = None,
    *,
    ties: Literal["half", "wrong"] = "half",
) -> Estimate:
    """Share of pairs whose chosen reply scores higher: scores ``chosen`` and ``rejected`` (n,), ``group`` (n,).

    A tie counts one half, so that a constant score has the accuracy of a coin; ``ties="wrong"`` is the strict count
    (that of TRL, where a constant score has 0). :func:`tie_share` tells how much that matters.
    """
    return accuracy_of_margins(margins_of(chosen, rejected), group, ties=ties)


def accuracy_of_margins(
    margins: ArrayLike, group: Sequence[Any] | NDArray[Any] | None = None, *, ties: Literal["half", "wrong"] = "half"
) -> Estimate:
    """:func:`ranking_accuracy` from margins score(chosen) - score(rejected), (n,)."""
    margin = vector(margins, "margins")
    wins = (margin > 0) + (0.5 * (margin == 0) if ties == "half" else 0.0)
    return share_estimate(wins, group, "share of pairs ranked right" + (", a tie one half" if ties == "half" else ""))


def margins_of(chosen: ArrayLike, rejected: ArrayLike) -> Float:
    """score(chosen) - score(rejected) in float64, (n,)."""
    a, b = vector(chosen, "chosen scores"), vector(rejected, "rejected scores")
    if a.shape != b.shape:
        raise CoalaError(f"Found {len(a)} chosen and {len(b)} rejected scores; every pair needs one of each.")
    return a - b


def tie_share(margins: ArrayLike) -> float:
    """Share of margins that are exactly 0; nan of none."""
    margin = vector(margins, "margins")
    return float((margin == 0).mean()) if len(margin) else math.nan


def accuracy_difference(
    margins: ArrayLike, other: ArrayLike, group: Sequence[Any] | NDArray[Any] | None = None
) -> Estimate:
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


def pairwise_nll(margins: ArrayLike, group: Sequence[Any] | NDArray[Any] | None = None) -> Estimate:
    """Mean of log(1 + exp(-margin)) in nats per pair (Bradley-Terry, Eq. 6); a head without a signal has log 2."""
    margin = vector(margins, "margins")
    return mean_estimate(np.logaddexp(0.0, -margin), group)


def auc(chosen: ArrayLike, rejected: ArrayLike, group: Sequence[Any] | NDArray[Any] | None = None) -> Estimate:
    """P(a random chosen reply scores above a random rejected one), across prompts; a tie counts one half.

    Scores (n,) each. The error is DeLong's (1988) with the two components of a pair, and then of a group, summed
    before squaring, as pairs share a prompt.
    """
    a, b = vector(chosen, "chosen scores"), vector(rejected, "rejected scores")
    margins_of(a, b)
    n = len(a)
    labels = group_numbers(group, n)
    if not n:
        return wilson_estimate(math.nan, math.nan, labels, "AUC")
    ordered_a, ordered_b = np.sort(a), np.sort(b)
    above = (np.searchsorted(ordered_b, a, "left") + np.searchsorted(ordered_b, a, "right")) / (2 * n)
    below = 1 - (np.searchsorted(ordered_a, b, "left") + np.searchsorted(ordered_a, b, "right")) / (2 * n)
    value = float(above.mean())
    _, error, _ = clustered(above + below, labels)
    return wilson_estimate(value, error, labels, "AUC of chosen against rejected, DeLong error", counted=False)


@dataclass(frozen=True)
class LengthBin:
    """Ranking accuracy of the pairs with low <= length difference < high (the last bin includes its upper end)."""

    low: float
    high: float
    accuracy: Estimate


def by_length_difference(
    margins: ArrayLike,
    length_differences: ArrayLike,
    group: Sequence[Any] | NDArray[Any] | None = None,
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
    group: Sequence[Any] | NDArray[Any] | None = None,
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

    def error(right: Float) -> float:
        return float(np.abs(np.bincount(place, right - confidence)).sum()) / n

    value = error(right)
    rng = np.random.default_rng(seed)
    by_chance = [error((rng.random(n) < confidence).astype(float)) for _ in range(200)]
    groups = int(labels.max()) + 1
    low, high, about = 0.0, 1.0, "; one group, so no interval"
    if groups > 1:
        excess = np.zeros((groups, len(rows)))
        np.add.at(excess, (labels, place), right - confidence)
        sizes = np.bincount(labels)
        drawn = rng.integers(groups, size=(draws, groups))
        errors = [np.abs(excess[some].sum(0)).sum() / sizes[some].sum() for some in drawn]
        low, high = (float(end) for end in np.quantile(errors, [0.025, 0.975]))
        about = f", percentile bootstrap 95 % ({draws} draws, seed {seed}){over(groups, n)}"
    # Resampling adds noise to noise, so the bootstrap can lie above the value it is an interval of.
    estimate = Estimate(value, min(low, value), max(high, value), n, f"calibration error, {len(rows)} bins{about}")
    return Reliability(tuple(rows), float(confidence.mean()), estimate, float(np.mean(by_chance)))


# --- generated text ----------------------------------------------------------------------------------------------


def win_rate(
    judgements: Sequence[Judgement], ties: Literal["half", "exclude"] = "half", *, of: str | None = None
) -> Estimate:
    """Share of comparisons that ``of`` wins (by default the side named first in the first judgement).

    The k-th judgement of a prompt in one order and the k-th in the other are averaged into one comparison before
    anything else, which removes a judge's taste for the first place. A comparison with a failed judgement (``None``)
    in either order is left out and counted in ``method``. A comparison that ends at exactly 1/2 is a tie: it counts
    one half, or nothing with ``ties="exclude"``. Comparisons of one prompt are one group of the interval. Verdicts
    that follow the place alone have no win rate: the value is nan and ``method`` says ``void`` and why.
    """
    if not judgements:
        return Estimate(math.nan, 0.0, 1.0, 0, "win rate; no judgements")
    ours = judgements[0].first if of is None else of
    orders: dict[tuple[str, str, str], tuple[list[float | None], list[float | None]]] = {}
    for judgement in judgements:
        if ours not in (judgement.first, judgement.second) or judgement.first == judgement.second:
            raise CoalaError(
                f"The judgement of prompt {judgement.prompt_id!r} compares {judgement.first!r} with "
                f"{judgement.second!r}; expected {ours!r} on exactly one side. Count one contest at a time."
            )
        value = judgement.preference
        if value is not None and not 0 <= value <= 1:
            raise CoalaError(f"A preference of {value} on prompt {judgement.prompt_id!r}; expected a value in [0, 1].")
        swapped = judgement.second == ours
        other = judgement.first if swapped else judgement.second
        games = orders.setdefault((judgement.prompt_id, other, judgement.judge), ([], []))
        games[swapped].append(value if value is None or not swapped else 1 - value)
    values: list[float] = []
    prompts: list[str] = []
    # Preferences for the reply shown first: ours, and theirs, of comparisons judged in both orders or in one.
    twice: tuple[list[float], list[float]] = ([], [])
    once: tuple[list[float], list[float]] = ([], [])
    failed = tied = both = 0
    for (prompt_id, *_), (straight, swapped_games) in orders.items():
        for k in range(max(len(straight), len(swapped_games))):
            game = [side[k] for side in (straight, swapped_games) if k < len(side)]
            known = [value for value in game if value is not None]
            if len(known) < len(game):
                failed += 1
                continue
            value = sum(known) / len(known)
            both += len(known) == 2
            places = twice if len(known) == 2 else once
            if k < len(straight):
                places[0].append(known[0])
            if k < len(swapped_games):
                places[1].append(1 - known[-1])
            tied += value == 0.5
            if value != 0.5 or ties == "half":
                values.append(value)
                prompts.append(prompt_id)
    facts = [f"{both} of {len(values) + (tied if ties == 'exclude' else 0)} comparisons judged in both orders"]
    facts.append(f"{tied} tied and {'counted one half' if ties == 'half' else 'left out'}")
    if failed:
        facts.append(f"{failed} failed and left out")
    mixed = bool(twice[0]) and any(once)
    why = "" if mixed else place_alone(*twice) if twice[0] else place_alone_once(*once)
    if why:
        n = len(twice[0]) or sum(map(len, once))
        return void("win rate", n, ", ".join([why, *facts[2:]]))
    estimate = share_estimate(values, prompts, "win rate")
    return Estimate(estimate.value, estimate.low, estimate.high, estimate.n, f"{estimate.method}; {', '.join(facts)}")


def perplexity(
    log_probs: ArrayLike, n_tokens: ArrayLike, group: Sequence[Any] | NDArray[Any] | None = None
) -> Estimate:
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


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
