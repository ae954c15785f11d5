"""A part of a set on which a cue says nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from coala.audit.comparisons import Comparisons
from coala.audit.sets import item_of
from coala.data import classify
from coala.data.findings import DataError, Finding, listed
from coala.statistics.intervals import Float, share_estimate
from coala.values import Estimate, Pair

ROUNDS = 16
STRATA = 20


@dataclass(frozen=True)
class Balanced:
    """The pairs that are left, in their order, and what the cue alone gets right before and after."""

    pairs: tuple[Pair, ...]
    cue: str
    before: Estimate
    after: Estimate


def balance(pairs: Sequence[Pair], cue: str, *, seed: int) -> Balanced:
    """A part of ``pairs`` on which ``cue`` says nothing: as many of them speak for it as against, at every strength.

    A cue-only classifier is cross-validated by group; within strata of equal strength |margin| the pairs it gets right
    are thinned at random towards as many as it gets wrong. Repeated until what a new classifier gets right cannot be
    told from one half. Ties stay. Raises :class:`DataError` for an unknown cue, and if too little is left to be used.
    """
    items = [item_of(pair, k) for k, pair in enumerate(pairs)]
    known = Comparisons(tuple(items)).cues
    if cue not in known:
        raise DataError([Finding("balance", None, "", repr(cue), f"one of {listed(known)}", "name a cue")])
    left = list(range(len(pairs)))
    draw = np.random.default_rng(seed)
    before: Estimate | None = None
    for turn in range(ROUNDS + 1):
        data = Comparisons(tuple(items[k] for k in left))
        if len({item.group for item in data.items}) < classify.FOLDS:
            found = f"{len(left)} of {len(pairs)} pairs remain after balancing {cue}"
            mend = "these pairs carry little beyond that cue: collect others"
            raise DataError([Finding("balance", None, "", found, "pairs from at least five groups", mend)])
        x, scaled = data.columns(cue)
        margins = data.out_of_fold(x, seed + turn, scaled=scaled)
        rate = share_estimate(classify.told(margins), data.groups, "grouped cross-validation, a tie one half")
        before = before or rate
        kept = _thinned(margins, draw)
        if rate.low <= 0.5 or turn == ROUNDS or len(kept) == len(left):
            return Balanced(tuple(pairs[k] for k in left), cue, before, rate)
        left = [left[k] for k in kept]
    raise AssertionError("the last round returns")


def _thinned(margins: Float, draw: np.random.Generator) -> list[int]:
    """Places that stay: in each stratum of |margin| half of what the right ones are too many goes; all ties stay."""
    strength = np.abs(margins)
    parted = np.flatnonzero(strength > classify.TIE)
    kept = list(np.flatnonzero(strength <= classify.TIE))
    for stratum in np.array_split(parted[np.argsort(strength[parted], kind="stable")], STRATA):
        right, wrong = stratum[margins[stratum] > 0], stratum[margins[stratum] < 0]
        if len(right) > len(wrong):
            # Half of the surplus a round: a classifier of what is left is another one, and all at once overshoots.
            right = draw.permutation(right)[: (len(right) + len(wrong)) // 2]
        kept += [*right, *wrong]
    return sorted(int(k) for k in kept)
