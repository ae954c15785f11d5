"""Whether each rater chooses as the others do: by a head that neither this rater nor the pair's prompt had a part in.

A rater's reliability is the slope of the others' score differences on this rater's choices, in units of the slope on
the others' own: 1 agrees as the rest, 0 is random, below 0 is reversed. NumPy on margins and numbers; fits go through a
:class:`~coala.convex.raters.Raters` (docs/derivations/raters.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from coala.convex.raters import Raters
from coala.convex.validation import grouped_folds
from coala.statistics.intervals import share_estimate
from coala.values import Estimate

FOLDS = 4  # of prompts
RATER_FOLDS = 10  # as many raters or fewer are left out one by one
FOLD = 1e-4  # of the gradient, at which the margins of a fold are known well enough
MISS = 0.05  # that one interval misses, or one verdict of all is wrong
WIDEST = 1e3  # a slope times the margins' root mean square
Verdict = Literal["consistent", "random", "reversed", "undecided"]


@dataclass(frozen=True)
class Agreement:
    """What is known of one rater from ``n`` choices on ``prompts`` prompts.

    ``share`` of choices that the others' head prefers too, beside ``others``, its share on theirs. ``slope`` in
    [``low``, ``high``], a 95 % interval of its own; [``low_all``, ``high_all``] holds for all raters at once and
    carries the ``verdict``, with ``why`` where it needs a word. Ends may be infinite.
    """

    n: int
    prompts: int
    share: Estimate
    others: float
    slope: float
    low: float
    high: float
    low_all: float
    high_all: float
    verdict: Verdict
    why: str


@dataclass(frozen=True)
class HeldRows:
    """Pairs (h, p) that no head was fitted on, in the coordinates of the raters; by whom, and on which prompt."""

    rows: Float[np.ndarray, "h p"]
    member: Int[np.ndarray, "h"]
    group: Shaped[np.ndarray, "h"]


def agreements(
    raters: Raters, group: Shaped[np.ndarray, "n"], held_out: HeldRows | None = None, *, seed: int = 0
) -> list[Agreement]:
    """One for each rater, from the pairs fitted on (cross-fitted over prompts and raters) and those ``held_out``.

    Pairs of one ``group``, a prompt, may be correlated. Verdicts hold for all raters at once: Bonferroni over those
    who have choices. Who is found reversed or random does not count among the others in whose slope the rest is told.
    """
    rows = raters.program.rows if held_out is None else np.concatenate([raters.program.rows, held_out.rows])
    member = raters.member if held_out is None else np.concatenate([raters.member, held_out.member])
    places = np.asarray(group, dtype=str)
    if held_out is not None:
        places = np.concatenate([places, np.asarray(held_out.group, dtype=str)])
    prompts = np.unique(places, return_inverse=True)[1]
    margins, fold_of = _others_margins(raters, rows, np.asarray(group, dtype=str), seed)
    named = member >= 0
    own = np.full(len(rows), np.nan)
    own[named] = margins[fold_of[member[named]], np.flatnonzero(named)]
    seen = named & np.isfinite(own)
    choices = _Choices(own[seen], member[seen], raters.count, prompts[seen])
    first = choices.judged(_units(margins, member, fold_of, prompts, np.ones(raters.count, bool)), fold_of)
    apart = np.array([one.verdict in ("reversed", "random") for one in first], bool)
    if not apart.any():
        return first
    return choices.judged(_units(margins, member, fold_of, prompts, ~apart), fold_of)


@dataclass(frozen=True)
class _Unit:
    """The slope of a head on the choices of those who made it, the lower end of its interval, and their share."""

    slope: float
    least: float
    share: float


def _units(
    margins: Float[np.ndarray, "folds k"],
    member: Int[np.ndarray, "k"],
    fold_of: Int[np.ndarray, "R"],
    prompts: Int[np.ndarray, "k"],
    counted: Bool[np.ndarray, "R"],
) -> list[_Unit]:
    """For the heads without each fold of raters, what they are to the ``counted`` raters of the other folds."""
    named = member >= 0
    number = np.maximum(member, 0)
    made = []
    for fold, scores in enumerate(margins):
        theirs = np.isfinite(scores) & (~named | ((fold_of[number] != fold) & counted[number]))
        found = slope_intervals(scores[theirs], np.zeros(int(theirs.sum()), int), 1, prompts[theirs], MISS)
        share = float(_hits(scores[theirs]).mean()) if theirs.any() else np.nan
        made.append(_Unit(float(found.slope[0]), float(found.low[0]), share))
    return made


@dataclass(frozen=True)
class _Choices:
    """The others' margins (k,) of choices, by whom, and on which prompt."""

    margins: Float[np.ndarray, "k"]
    member: Int[np.ndarray, "k"]
    count: int
    prompts: Int[np.ndarray, "k"]

    def judged(self, units: Sequence[_Unit], fold_of: Int[np.ndarray, "R"]) -> list[Agreement]:
        sets = (self.margins, self.member, self.count, self.prompts)
        one = slope_intervals(*sets, MISS)
        every = slope_intervals(*sets, MISS / max(1, len(np.unique(self.member))))
        order = np.argsort(self.member, kind="stable")
        cuts = np.searchsorted(self.member[order], np.arange(self.count + 1))
        made = []
        for rater in range(self.count):
            mine = order[cuts[rater] : cuts[rater + 1]]
            unit = units[fold_of[rater]]
            known = unit.least > 0
            slopes = (one.slope, one.low, one.high, every.low, every.high)
            slope, low, high, low_all, high_all = (float(x[rater] / unit.slope) if known else np.nan for x in slopes)
            least = unit.least / unit.slope if known else np.nan
            verdict, why = _verdict(low_all, high_all, known, least, len(mine), every.fewest)
            places = self.prompts[mine]
            share = share_estimate(_hits(self.margins[mine]), places, "share of choices") if len(mine) else NOTHING
            n_prompts = len(np.unique(places))
            intervals = (slope, low, high, low_all, high_all)
            made.append(Agreement(len(mine), n_prompts, share, unit.share, *intervals, verdict, why))
        return made


NOTHING = Estimate(np.nan, np.nan, np.nan, 0, "no choices")


def _verdict(low: float, high: float, known: bool, least: float, n: int, fewest: int) -> tuple[Verdict, str]:
    """By where the interval that holds for all raters at once lies to 0, to what of 1 is sure, and to its negative."""
    if n == 0:
        return "undecided", "no choices that a head of others can be asked about"
    if not known:
        return "undecided", "the head of the others is not distinguishable from chance on their own choices"
    if high < 0:
        return "reversed", ""
    if low > 0:
        return "consistent", "agrees less than the rest" if high < least else ""
    if -least < low and high < least:
        return "random", ""
    if high < least:
        return "undecided", "agrees less than the rest: random or reversed"
    if n < fewest:
        return "undecided", f"too few: {n} choices, {fewest} or more can decide"
    return "undecided", "neither random nor agreement as of the rest is excluded"


def _others_margins(
    raters: Raters, rows: Float[np.ndarray, "k p"], group: Shaped[np.ndarray, "n"], seed: int
) -> tuple[Float[np.ndarray, "folds k"], Int[np.ndarray, "R"]]:
    """Margins of all rows by heads without a fold of raters, each row's prompt left out too; and each rater's fold.

    nan where nothing is left to fit on, and for rows fitted on where there is no second prompt to leave one out.
    """
    program, n = raters.program, len(group)
    fold_of = grouped_folds(np.arange(raters.count), min(RATER_FOLDS, raters.count), seed)
    if fold_of is None:
        return np.full((1, len(rows)), np.nan), np.zeros(raters.count, np.intp)
    # By their sizes, so that raters with many pairs are not left out together.
    sized = grouped_folds(raters.member[raters.member >= 0], min(RATER_FOLDS, raters.count), seed)
    if sized is not None:
        fold_of[raters.member[raters.member >= 0]] = sized
    prompt_fold = grouped_folds(group, FOLDS, seed)
    factor = program.factor(raters.shared)
    margins = np.full((int(fold_of.max()) + 1, len(rows)), np.nan)
    for fold in range(len(margins)):
        theirs = ~((raters.member >= 0) & (fold_of[np.maximum(raters.member, 0)] == fold))
        parts: list[tuple[Bool[np.ndarray, "n"], Int[np.ndarray, "out"]]] = [(theirs, np.arange(n, len(rows)))]
        folds = range(0 if prompt_fold is None else int(prompt_fold.max()) + 1)
        parts.extend((theirs & (prompt_fold != k), np.flatnonzero(prompt_fold == k)) for k in folds)
        for used, out in parts:
            if used.any() and len(out):
                weights = program.solve(raters.shared, used / used.sum(), factor=factor, exact=FOLD)
                margins[fold, out] = rows[out] @ weights
    return margins, fold_of


# --- slopes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slopes:
    """Likeliest slopes (count,) with the ends of their intervals; ``fewest`` choices that could tell one from 0."""

    slope: Float[np.ndarray, "count"]
    low: Float[np.ndarray, "count"]
    high: Float[np.ndarray, "count"]
    fewest: int


def slope_intervals(
    margins: Float[np.ndarray, "n"],
    member: Int[np.ndarray, "n"],
    count: int,
    group: Int[np.ndarray, "n"],
    miss: float,
) -> Slopes:
    """For each member the slope b of P(choice) = sigmoid(b margin), by the profile likelihood at level 1 - ``miss``.

    As :func:`~coala.convex.calibration.least_slope`, two-sided and for all members at once: groups widen an interval by
    the design effect of the mean margin, and Student's t takes the place of the normal where a group has several
    choices. Without two groups the interval is the whole line; ends are infinite where choices are all of one kind.
    """
    from scipy.special import ndtri, stdtrit

    def total(values: Float[np.ndarray, "n"]) -> Float[np.ndarray, "count"]:
        return np.bincount(member, values, count)

    n = np.bincount(member, minlength=count)
    safe = np.maximum(n, 1)
    size = np.sqrt(total(margins**2) / safe)
    units = margins / np.where(size > 0, size, 1.0)[member]
    centred = units - (total(units) / safe)[member]
    blocks, block = np.unique(np.stack([member, group]), axis=1, return_inverse=True)
    owner = blocks[0]
    clusters = np.bincount(owner, minlength=count)
    between = np.bincount(owner, np.bincount(block.reshape(-1), centred) ** 2, count)
    alone = total(centred**2)
    several = np.maximum(clusters, 2)
    effect = np.divide(between * several / (several - 1), alone, out=safe / np.maximum(clusters, 1), where=alone > 0)
    normal = float(-ndtri(miss / 2))
    quantile = np.where(clusters == n, normal, stdtrit(np.maximum(clusters - 1, 1), 1 - miss / 2))
    allowed = quantile**2 / 2 * np.where(clusters == n, 1.0, np.maximum(effect, 1.0))

    def loss(b: Float[np.ndarray, "count"]) -> Float[np.ndarray, "count"]:
        return total(np.logaddexp(0.0, -b[member] * units))

    def rising(b: Float[np.ndarray, "count"]) -> Bool[np.ndarray, "count"]:
        return -total(units / (1 + np.exp(np.clip(b[member] * units, -700, 700)))) > 0

    widest = np.full(count, WIDEST)
    best = _crossing(rising, -widest, widest)
    least = loss(best)
    low = _crossing(lambda b: loss(b) - least <= allowed, -widest, best)
    high = _crossing(lambda b: loss(b) - least > allowed, best, widest)
    known = (clusters > 1) & (size > 0)
    low = np.where(known & (loss(-widest) - least > allowed), low, -np.inf)
    high = np.where(known & (loss(widest) - least > allowed), high, np.inf)
    divisor = np.where(size > 0, size, 1.0)
    fewest = int(np.floor(normal**2 / 2 / np.log(2))) + 1
    best = np.where(np.abs(best) > 0.999 * WIDEST, np.copysign(np.inf, best), best)  # choices all of one kind
    return Slopes(np.where(size > 0, best, 0.0) / divisor, low / divisor, high / divisor, fewest)


def _crossing(
    beyond: Callable[[Float[np.ndarray, "count"]], Bool[np.ndarray, "count"]],
    low: Float[np.ndarray, "count"],
    high: Float[np.ndarray, "count"],
) -> Float[np.ndarray, "count"]:
    """Where ``beyond`` turns true between ``low`` and ``high``, by halving."""
    for _ in range(60):
        middle = (low + high) / 2
        over = beyond(middle)
        low, high = np.where(over, low, middle), np.where(over, middle, high)
    return (low + high) / 2


def _hits(margins: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    return np.asarray((margins > 0) + (margins == 0) / 2)
