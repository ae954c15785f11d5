"""Scores of systems beside the cues: how much of a system's lead is left once the cues are known.

``docs/derivations/lead_beside_cues.md`` derives both figures. In short: a model of all cues, out of fold, points the
right way on some items and the wrong way on others. Weighed so that it is right as often as chance, the set tells what
a system does where cues say nothing (*at even cues*). And a model of the cues with the system's score has a smaller
loss than one of the cues alone by what the score knows *beyond* them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coala.audit.comparisons import ALL, Comparisons
from coala.data import classify
from coala.statistics.intervals import Float, bootstrap, group_numbers, mean_estimate, share_estimate, void
from coala.values import CoalaError, Estimate

SPARED = 30.0  # by which a score's columns are larger than a cue's, so that a ridge weighs 1/900 on them


@dataclass(frozen=True)
class System:
    """What the scores of a system are worth beside the cues; shares in [0, 1].

    ``accuracy`` by the score alone; ``against`` and ``along`` the same where the cues point the wrong way and the
    right way, ``even`` where they are right as often as chance, ``survives`` the share of the lead over chance that is
    left there. ``with_cues`` is the accuracy of score and cues together, ``beyond`` the share of the score's
    information that the cues do not hold. ``subsets``: the accuracy by the score alone in each.
    """

    name: str
    accuracy: Estimate
    tied: float
    against: Estimate
    along: Estimate
    even: Estimate
    survives: Estimate
    with_cues: Estimate
    beyond: Estimate
    subsets: Mapping[str, Estimate]


def systems_beside(
    data: Comparisons, scores: Mapping[str, Float], by_cues: Sequence[Float], *, seed: int
) -> tuple[System, ...]:
    """Each system with its scores (R,) of all replies, in the order of the items' replies.

    ``by_cues`` are the margins (m,) of the model of all cues, out of fold, by each deal of the folds. CoalaError for
    scores of another number or one that is not finite.
    """
    if not scores:
        return ()
    x, scaled = data.columns(ALL)
    mask = np.concatenate([np.broadcast_to(scaled, x.shape[1]), [False, False]])
    found = []
    for name, given in scores.items():
        if given.shape != (len(data.texts),) or not np.isfinite(given).all():
            raise CoalaError(
                f"Found scores of {name[:60]} of shape {given.shape}, expected {len(data.texts)} finite numbers, one "
                "of each reply. Fix: give the scores of these items."
            )
        margins = data.difference(given)
        own = data.difference(_columns(data, given))
        both = np.hstack([x, own])
        alone = [data.out_of_fold(own, seed + k, scaled=False) for k in range(len(by_cues))]
        joint = [data.out_of_fold(both, seed + k, scaled=mask) for k in range(len(by_cues))]
        found.append(_system(name, data, data.credits(margins), alone, joint, by_cues))
    return tuple(found)


def _columns(data: Comparisons, scores: Float) -> Float:
    """(R, 2): the reply's rank in its item, and how far it is from the item's middle on a scale without outliers.

    Times :data:`SPARED`: the ridge that silences a hundred cues must not silence the score too.
    """
    item = np.repeat(np.arange(len(data.items)), [len(one.replies) for one in data.items])
    scores = scores / (np.abs(scores).max(initial=0.0) or 1.0)
    off = scores - (np.bincount(item, scores) / np.bincount(item))[item]
    apart = np.abs(off[off != 0])
    scale = float(np.median(apart)) if len(apart) else 1.0
    return SPARED * np.stack([data.ranks(scores), np.tanh(off / scale)], axis=1)


def _system(
    name: str,
    data: Comparisons,
    right: Float,
    alone: Sequence[Float],
    joint: Sequence[Float],
    by_cues: Sequence[Float],
) -> System:
    """``right`` (n,) is what the score counts; the others are margins (m,) by each deal."""
    groups = [item.group for item in data.items]
    chance = float(data.chance.mean())
    cues = _credit(data, by_cues)
    wrong, well = cues < data.chance, cues > data.chance
    accuracy = share_estimate(right, groups, "share ranked right")
    subsets = np.array([item.subset for item in data.items])
    losses = [_loss(data, margins) for margins in (alone, by_cues, joint)]
    return System(
        name=name,
        accuracy=accuracy,
        tied=float(((right > 0) & (right < 1)).mean()),
        against=_of(right, wrong, groups),
        along=_of(right, well, groups),
        even=_even(right, wrong, well, chance, groups),
        survives=_survives(right, wrong, well, chance, groups, accuracy),
        with_cues=share_estimate(_credit(data, joint), groups, "share ranked right by score and cues, out of fold"),
        beyond=_beyond(losses[0], losses[1], losses[2], groups),
        subsets={part: _of(right, subsets == part, groups) for part in sorted(set(subsets.tolist())) if part},
    )


def _credit(data: Comparisons, deals: Sequence[Float]) -> Float:
    return np.asarray(np.mean([data.credits(one, classify.TIE) for one in deals], axis=0))


def _loss(data: Comparisons, deals: Sequence[Float]) -> Float:
    """Log loss of each item in nats (n,): of its comparisons, by their weights."""
    losses = np.mean([np.logaddexp(0.0, -one) for one in deals], axis=0)
    return np.asarray(np.bincount(data.item, data.weight * losses, minlength=len(data.items)), dtype=np.float64)


def _of(values: Float, chosen: NDArray[np.bool_], groups: Sequence[str]) -> Estimate:
    """The share among the items ``chosen`` (n,)."""
    places = np.flatnonzero(chosen)
    names = [groups[int(k)] for k in places] if len(places) else None
    return share_estimate(values[places], names, "share ranked right")


def _at_even(right: Float, wrong: NDArray[np.bool_], well: NDArray[np.bool_], chance: float) -> float:
    """The accuracy of items weighed so that the cues are right as often as chance; nan where they always are, or never.

    A score that follows the cues has (1 - chance) * 0 + chance * 1, which is chance.
    """
    if not wrong.any() or not well.any():
        return math.nan
    return (1 - chance) * float(right[wrong].mean()) + chance * float(right[well].mean())


def _even(
    right: Float, wrong: NDArray[np.bool_], well: NDArray[np.bool_], chance: float, groups: Sequence[str]
) -> Estimate:
    name = "share ranked right at even cues"
    if math.isnan(_at_even(right, wrong, well, chance)):
        return void(name, len(right), f"the cues are {'never' if not wrong.any() else 'always'} wrong")
    labels = group_numbers(groups, len(right))
    return bootstrap(lambda rows: _at_even(right[rows], wrong[rows], well[rows], chance), len(right), labels, name=name)


def _survives(
    right: Float,
    wrong: NDArray[np.bool_],
    well: NDArray[np.bool_],
    chance: float,
    groups: Sequence[str],
    accuracy: Estimate,
) -> Estimate:
    """(even - chance) / (accuracy - chance), the cues' fits held; void where there is no lead to speak of."""
    name = "share of the lead that survives"
    if not accuracy.low > chance:
        return void(name, len(right), "no lead over chance is established")
    if math.isnan(_at_even(right, wrong, well, chance)):
        return void(name, len(right), f"the cues are {'never' if not wrong.any() else 'always'} wrong")

    def ratio(rows: NDArray[np.intp]) -> float:
        lead = float(right[rows].mean()) - chance
        return (_at_even(right[rows], wrong[rows], well[rows], chance) - chance) / lead if lead > 0 else math.nan

    return bootstrap(ratio, len(right), group_numbers(groups, len(right)), name=name)


def _beyond(alone: Float, cues: Float, joint: Float, groups: Sequence[str]) -> Estimate:
    """(loss of cues - of both) / (log 2 - loss of the score) from losses (n,); void where the score tells nothing."""
    name = "share of the score's information that is beyond the cues"
    if not mean_estimate(math.log(2) - alone, groups).low > 0:
        return void(name, len(alone), "by its loss the score is not distinguishable from chance")

    def ratio(rows: NDArray[np.intp]) -> float:
        worth = math.log(2) - float(alone[rows].mean())
        return float((cues[rows] - joint[rows]).mean()) / worth if worth > 0 else math.nan

    return bootstrap(ratio, len(alone), group_numbers(groups, len(alone)), name=name)
