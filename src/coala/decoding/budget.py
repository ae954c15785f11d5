"""A continuous shift of the next-token distribution and what it costs: strengths that keep within a budget of nats.

Of one step's restricted base distribution p the head scores the k likeliest tokens. The tilt f of a scored token is its
score (by the rule) less the p-weighted mean score of the scored ones; every other token has f = 0, as if it were worth
that mean. The token is drawn from ``q_s(c) = p(c) exp(s f(c)) / Z(s)``, which depends on no noise, so that

    KL(q_s || p) = s E_q[f] - log Z(s),        Z(s) = sum_c p(c) exp(s f(c)),

is exact. It grows with s; summed along a reply, its mean over replies is the divergence of the guided from the base
distribution of replies (the chain rule).

Of all ways to spend a sum of nats, one strength at every step gains most sum of f (Lagrange). The steps to come are not
known, so they are taken to be like those so far: a step uses the largest of :data:`STRENGTHS` which, at every step so
far and this one, would have cost on average no more than the remaining budget over the remaining steps, and which at
this step costs no more than what remains. What steps without a choice leave unspent thus raises the strength of later
ones; a reply that has spent all but a thousandth of its budget is no longer guided.

Knows nothing of models or text.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from coala.decoding.guidance import Float64

# Quarter powers of two: the finest difference of strength that a budget makes.
STRENGTHS: Float64 = 2.0 ** (np.arange(-24, 41) / 4)
# A budget with no more than this share of it left is spent.
SPENT = 1e-3


def centred(log_probs: Float64, scores: Float64) -> Float64:
    """Tilts f (B, k) of the scored candidates: scores less their mean under p; -inf ``log_probs`` take no part."""
    share = np.exp(log_probs)
    mean = (share * scores).sum(-1, keepdims=True) / share.sum(-1, keepdims=True)
    return np.where(np.isfinite(log_probs), scores - mean, 0.0)


def divergence(log_probs: Float64, tilt: Float64, strengths: Float64) -> Float64:
    """KL(q_s || p) (B, S) in nats at ``strengths`` (B, S) or (S,); ``log_probs`` and ``tilt`` are (B, k).

    Tokens that were not scored have the rest of the probability and tilt 0.
    """
    p = np.exp(log_probs)
    rest = np.maximum(1 - p.sum(-1), 0.0)
    strengths = np.broadcast_to(strengths, (len(p), np.shape(strengths)[-1]))
    # The largest exponent is taken out: a strength of 1000 must not overflow.
    top = np.maximum(tilt.max(-1), 0.0)
    weights = p[:, None] * np.exp(strengths[..., None] * (tilt - top[:, None])[:, None])
    total = weights.sum(-1) + rest[:, None] * np.exp(-strengths * top[:, None])
    mean = (weights * tilt[:, None]).sum(-1) / total
    cost: Float64 = strengths * (mean - top[:, None]) - np.log(total)
    return np.maximum(cost, 0.0)  # below 0 by rounding only


@dataclass
class Account:
    """What one reply has spent of its ``budget`` in nats (``None``: no bound, and nothing to choose)."""

    budget: float | None = None
    spent: float = 0.0
    steps: int = 0
    costs: Float64 = field(default_factory=lambda: np.zeros_like(STRENGTHS))

    @property
    def closed(self) -> bool:
        """Whether the budget is spent."""
        return self.budget is not None and self.spent >= self.budget * (1 - SPENT)

    def strength(self, costs: NDArray[np.float64], steps_left: int) -> float:
        """The strength of a step that would cost ``costs`` at each of :data:`STRENGTHS`; it is counted, not yet paid.

        ``steps_left`` counts the steps the reply may still be guided at, this one among them.
        """
        assert self.budget is not None
        left = self.budget - self.spent
        self.costs, self.steps = self.costs + costs, self.steps + 1
        fits = (self.costs / self.steps <= left / steps_left) & (costs <= left)
        return 0.0 if self.closed or not fits.any() else float(STRENGTHS[np.nonzero(fits)[0][-1]])
