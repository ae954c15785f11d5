"""Policy accuracy: of pairs, the share that a policy's log-ratio to its base ranks right.

Of a policy pi and its base pi_0 the log-ratio log pi(y|x) - log pi_0(y|x) is the reward that the policy stands for, up
to a constant of the prompt (Rafailov et al. 2023), so that policies of any kind are compared by it without a judge.
Arrays in, estimates out; knows nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from coala.statistics.intervals import Float, Groups, share_estimate
from coala.values import CoalaError, Estimate


@dataclass(frozen=True)
class PolicyAccuracy:
    """Share of pairs ranked right, a tie one half, with an interval by group; and what the ranking rests on.

    ``inside`` pairs have two finite log-ratios; ``by_support`` pairs one, of a policy that can write only one of the
    replies; ``outside`` pairs none. The latter two are ranked by support and by the ``lifted`` log-ratios, or are ties
    without any. ``lifted`` is the accuracy by the lifted log-ratios of all pairs, where there are any.
    """

    accuracy: Estimate
    inside: int
    by_support: int
    outside: int
    lifted: Estimate | None = None

    @property
    def note(self) -> str:
        """One line on what is ranked how; "" where every log-ratio is finite."""
        if not (self.by_support or self.outside):
            return ""
        n = self.inside + self.by_support + self.outside
        how = "by the log-ratio without top-k and top-p" if self.lifted is not None else "as ties"
        return (
            f"top-k and top-p leave both replies of {self.inside} of {n} pairs possible; {self.by_support} are ranked "
            f"by support alone (one reply is impossible) and {self.outside} {how} (both are)"
        )


def accuracy_of_log_ratios(
    chosen: ArrayLike, rejected: ArrayLike, group: Groups = None, *, lifted: tuple[ArrayLike, ArrayLike] | None = None
) -> PolicyAccuracy:
    """Policy accuracy from log-ratios in nats of ``chosen`` and ``rejected`` replies (n,), -inf outside of the support.

    A reply that the policy can write is ahead of one that it cannot. Where it can write neither, the ``lifted``
    log-ratios decide, finite ones of the policy without its restriction; without these it is a tie.
    """
    good, bad = _ratios(chosen, "chosen"), _ratios(rejected, "rejected")
    if good.shape != bad.shape:
        raise CoalaError(f"Found {len(good)} chosen and {len(bad)} rejected log-ratios; every pair needs one of each.")
    finite = np.isfinite(good).astype(int) + np.isfinite(bad)
    margin = np.zeros(len(good))
    margin[finite == 2] = good[finite == 2] - bad[finite == 2]
    margin[finite == 1] = np.where(np.isfinite(good[finite == 1]), 1.0, -1.0)
    free = None
    if lifted is not None:
        ours, theirs = (_ratios(side, "lifted") for side in lifted)
        if ours.shape != good.shape or theirs.shape != good.shape or not np.isfinite([*ours, *theirs]).all():
            raise CoalaError(
                f"Found lifted log-ratios unlike the {len(good)} pairs; expected a finite one of each reply."
            )
        free = ours - theirs
        margin[finite == 0] = free[finite == 0]
    inside, by_support, outside = (int((finite == n).sum()) for n in (2, 1, 0))
    by_lifted = None if free is None else _share(free, group)
    return PolicyAccuracy(_share(margin, group), inside, by_support, outside, by_lifted)


def _ratios(values: ArrayLike, name: str) -> Float:
    found: NDArray[Any] = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or np.isnan(found).any() or (found == np.inf).any():
        raise CoalaError(
            f"Found {name} log-ratios of shape {found.shape}, or nan or inf; expected (n,) below infinity."
        )
    return found


def _share(margin: Float, group: Groups) -> Estimate:
    wins = (margin > 0) + 0.5 * (margin == 0)
    return share_estimate(wins, group, "share of pairs that the log-ratio ranks right, a tie one half")
