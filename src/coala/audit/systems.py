"""Scores of systems beside the cues: how much of a system's lead is left once the cues are known.

``docs/derivations/lead_beside_cues.md`` derives the figures. In short: C is what a cross-fitted logistic model of all
cues gets right, J the same of the cues with the system's score, S what the score gets by itself, c chance. S - c is the
lead, J - C what the score adds to the cues, and (J - C)/(S - c) the share of the lead that survives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coala.audit.comparisons import ALL, Comparisons
from coala.data import classify
from coala.statistics.intervals import Float, bootstrap, group_numbers, paired_difference, share_estimate, void
from coala.values import CoalaError, Estimate

SPARED = 30.0  # by which a score's columns are larger than a cue's, so that a ridge weighs 1/900 on them


@dataclass(frozen=True)
class System:
    """What the scores of a system are worth beside the cues; shares in [0, 1], differences of them in ``beyond``.

    ``accuracy`` by the score alone, ``with_cues`` by score and cues together, ``beyond`` what the score adds to the
    cues, ``survives`` the share of its lead over chance that this is; ``against`` and ``along`` are the accuracy of the
    score alone where the cues point the wrong way and the right way; ``subsets`` its accuracy in each.
    """

    name: str
    accuracy: Estimate
    tied: float
    with_cues: Estimate
    beyond: Estimate
    survives: Estimate
    against: Estimate
    along: Estimate
    subsets: Mapping[str, Estimate]


def systems_beside(
    data: Comparisons, scores: Mapping[str, Float], by_cues: Float, *, seed: int, repeats: int
) -> tuple[System, ...]:
    """Each system with its scores (R,) of all replies, in the order of the items' replies.

    ``by_cues`` (n,) is what the model of all cues makes of each item, out of fold, a mean over ``repeats`` deals.
    """
    x, scaled = data.columns(ALL)
    scale = np.broadcast_to(scaled, x.shape[1])
    groups = [item.group for item in data.items]
    found = []
    for name, given in scores.items():
        if given.shape != (len(data.texts),) or not np.isfinite(given).all():
            raise CoalaError(
                f"Found scores of {name[:60]} of shape {given.shape}, expected {len(data.texts)} finite numbers, one "
                "of each reply. Fix: give the scores of these items."
            )
        margins = data.difference(given)
        alone = data.credits(margins)
        both = np.hstack([x, _columns(margins)])
        mask = np.concatenate([scale, [False, False]])
        fits = [data.out_of_fold(both, seed + k, scaled=mask) for k in range(repeats)]
        joint = np.mean([data.credits(one, classify.TIE) for one in fits], axis=0)
        found.append(_system(name, data, groups, alone, joint, by_cues))
    return tuple(found)


def _columns(margins: Float) -> Float:
    """(m, 2): which way the score points, and by how much on a scale that its outliers do not set.

    Times :data:`SPARED`: the ridge that silences a hundred cues must not silence the score too.
    """
    apart = np.abs(margins[margins != 0])
    middle = float(np.median(apart)) if len(apart) else 1.0
    return SPARED * np.stack([np.sign(margins), np.tanh(margins / middle)], axis=1)


def _system(name: str, data: Comparisons, groups: Sequence[str], alone: Float, joint: Float, by_cues: Float) -> System:
    accuracy = share_estimate(alone, groups, "share ranked right")
    subsets = np.array([item.subset for item in data.items])
    return System(
        name=name,
        accuracy=accuracy,
        tied=float(((alone > 0) & (alone < 1)).mean()),
        with_cues=share_estimate(joint, groups, "share ranked right by score and cues, out of fold"),
        beyond=paired_difference(joint, by_cues, groups),
        survives=_survives(alone, joint, by_cues, data.chance, groups, accuracy),
        against=_of(alone, by_cues < data.chance, groups),
        along=_of(alone, by_cues > data.chance, groups),
        subsets={part: _of(alone, subsets == part, groups) for part in sorted(set(subsets.tolist())) if part},
    )


def _of(values: Float, chosen: NDArray[np.bool_], groups: Sequence[str]) -> Estimate:
    """The share among the items ``chosen`` (n,)."""
    places = np.flatnonzero(chosen)
    return share_estimate(
        values[places], [groups[int(k)] for k in places] if len(places) else None, "share ranked right"
    )


def _survives(
    alone: Float, joint: Float, by_cues: Float, chance: Float, groups: Sequence[str], accuracy: Estimate
) -> Estimate:
    """(J - C)/(S - c) with a bootstrap over groups that holds the fits; void where there is no lead to speak of."""
    name = "share of the lead that survives"
    if not accuracy.low > float(chance.mean()):
        return void(name, len(alone), "no lead over chance is established")

    def ratio(rows: NDArray[np.intp]) -> float:
        lead = float((alone[rows] - chance[rows]).mean())
        return float((joint[rows] - by_cues[rows]).mean()) / lead if lead > 0 else np.nan

    return bootstrap(ratio, len(alone), group_numbers(groups, len(alone)), name=name)
