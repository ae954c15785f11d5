"""One update of each method, on log-policies: proximal steps, the minimisers of the losses, the regularised game.

Arrays in, arrays out, for one matrix and full support; knows nothing of outer loops, prompts or stopping. Policies are
logarithms throughout: diverging methods reach probabilities of 1e-24 and less. ``eta`` is a step size, the inverse of
the beta of preference losses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Float64, Real
from scipy.optimize import brentq
from scipy.special import expit, lambertw

from coala.nash.game import Matrix, Vector
from coala.values import CoalaError

PRIOR = 0.01  # precision of the Gaussian prior on the rewards of a sampled Bradley-Terry fit, in comparisons
DIRECT = 1e-3  # tau from which Newton starts at the reference
RIDGE = 1e-10  # the same for the population loss, where only certain wins (P = 1) need one


def normalise(z: Vector) -> Vector:
    """Prox(p, g) in logs for z = log p + g: subtracts logsumexp(z)."""
    z = z - z.max()
    return z - np.log(np.exp(z).sum())


# --- what a method learns of the game ----------------------------------------------------------------------------


class Feedback(Protocol):
    """Rewards (n,) that a method computes at a policy exp(z), each up to an additive constant.

    ``win_rates``: P p, what SPPO, DRO and REBEL regress on. ``pair_rewards``: the minimiser d of the IPO loss
    E (d_winner - d_loser - 1/2)^2 over pairs drawn from p. ``logit_rewards``: the minimiser of the Bradley-Terry loss
    E -log sigmoid(d_winner - d_loser), the one of DPO.
    """

    def win_rates(self, z: Vector) -> Vector: ...
    def pair_rewards(self, z: Vector) -> Vector: ...
    def logit_rewards(self, z: Vector) -> Vector: ...


@dataclass(frozen=True, eq=False)
class Population:
    """Noiseless feedback: expectations over all pairs and labels."""

    P: Matrix

    def win_rates(self, z: Vector) -> Vector:
        """P p (n,)."""
        return self.P @ np.exp(z)

    def pair_rewards(self, z: Vector) -> Vector:
        """P p again: stationarity, sum_j p_j (d_i - d_j) = sum_j p_j (P_ij - 1/2), is solved by d = P p."""
        return self.P @ np.exp(z)

    def logit_rewards(self, z: Vector) -> Vector:
        """Solves sum_j p_j (P_ij - sigmoid(r_i - r_j)) = 0, the stationarity of row i divided by p_i.

        Without that division the rows of rare answers would vanish beside the others.
        """
        p = np.exp(z)
        certain = self.P.min() == 0
        ridge = np.full(len(p), RIDGE if certain else 0.0)
        return bradley_terry(self.P * p, np.broadcast_to(p, self.P.shape), ridge, p)


@dataclass(frozen=True, eq=False)
class SampledFeedback:
    """Feedback from ``pairs`` pairs of answers drawn from the policy at each call.

    ``labels``: each pair is judged by a coin that shows P (a Bernoulli label); otherwise the judge tells P itself. Only
    counts are drawn (multinomial for pairs, binomial for labels), which has the same law as drawing pair by pair.
    Win rates are the mean of P over the drawn opponents. An answer that was not drawn gets no reward of its own: the
    minimiser of least norm leaves it where the regularisation has it.
    """

    P: Matrix
    pairs: int
    generator: np.random.Generator
    labels: bool = True

    def win_rates(self, z: Vector) -> Vector:
        """P times the frequencies of the drawn opponents (n,)."""
        return self.P @ (self.generator.multinomial(self.pairs, _clean(np.exp(z))) / self.pairs)

    def wins(self, z: Vector) -> Real[np.ndarray, "answers answers"]:
        """(n, n): how often i won against j; expected counts where the judge tells probabilities."""
        p, n = np.exp(z), len(z)
        drawn = self.generator.multinomial(self.pairs, _clean(np.outer(p, p).ravel())).reshape(n, n)
        met = np.triu(drawn + drawn.T, 1)
        won = self.generator.binomial(met, self.P) if self.labels else met * self.P
        return won + (met - won).T

    def pair_rewards(self, z: Vector) -> Vector:
        """Least squares on the drawn pairs; see :func:`pair_regression`."""
        return pair_regression(self.wins(z))

    def logit_rewards(self, z: Vector) -> Vector:
        """Bradley-Terry fit to the drawn labels, with the prior that makes a fit exist where one answer always won."""
        wins = self.wins(z)
        met = wins + wins.T
        total = met.sum(1)
        rows = np.flatnonzero(total > 0)
        rewards = np.zeros(len(z))
        if len(rows):
            scale = total[rows, None]
            inside = np.ix_(rows, rows)
            share = total[rows] / total.sum()
            rewards[rows] = bradley_terry(wins[inside] / scale, met[inside] / scale, PRIOR / total[rows], share)
        return rewards


def _clean(p: Float64[np.ndarray, "k"]) -> Float64[np.ndarray, "k"]:
    """Probabilities whose sum is 1 to rounding, as NumPy's sampler demands."""
    return p / p.sum()


def pair_regression(wins: Real[np.ndarray, "answers answers"]) -> Vector:
    """Minimiser (n,) of least norm of sum_ij wins_ij (d_i - d_j - 1/2)^2, ``wins`` (n, n) how often i beat j.

    (diag(M 1) - M) d = (W - W^T) 1 / 2 with the wins W and the meetings M = W + W^T.
    """
    met = wins + wins.T
    laplacian = np.diag(met.sum(1)) - met
    return np.linalg.lstsq(laplacian, (wins.sum(1) - wins.sum(0)) / 2, rcond=None)[0]


def bradley_terry(won: Matrix, met: Matrix, ridge: Vector, share: Vector) -> Vector:
    """Rewards r (n,) with sum_j (won_ij - met_ij sigmoid(r_i - r_j)) = ridge_i r_i, by damped Newton.

    Rows of ``won`` and ``met`` (n, n) may be scaled as one likes, with ``ridge`` (n,) scaled along; ``share`` (n,) are
    weights of the rows that undo it. Fixes the free constant by share^T r = 0.
    """
    n = len(share)

    def residual(r: Vector) -> tuple[Vector, Matrix]:
        chance = expit(r[:, None] - r[None, :])
        return (won - met * chance).sum(1) - ridge * r - share @ r, met * chance * (1 - chance)

    # One step of Newton from 0 is 4 (win rate - 1/2); certain wins are far beyond it, hence the damping.
    r = np.zeros(n)
    value, slope = residual(r)
    size = float(np.abs(value).max())
    for _ in range(200):
        if size <= 1e-15:
            break
        jacobian = slope - np.diag(slope.sum(1) + ridge) - share
        direction = np.linalg.solve(jacobian, -value)
        length = min(1.0, 10.0 / max(float(np.abs(direction).max()), 1e-300))
        while True:
            candidate = r + length * direction
            new_value, new_slope = residual(candidate)
            new_size = float(np.abs(new_value).max())
            if new_size < size or length < 1e-10:
                break
            length /= 2
        if new_size >= size:
            break  # rounding is all that is left
        r, value, slope, size = candidate, new_value, new_slope, new_size
    return r


# --- updates -----------------------------------------------------------------------------------------------------


def mirror_step(z: Vector, reference: Vector, eta: float, tau: float, reward: Vector) -> Vector:
    """log mu' = (1 - eta tau) log mu + eta tau log ref + eta reward - log Z (Algorithm 2); MWU for tau = 0.

    With the win rates as reward this is the population minimiser of INPO, Reg-DRO and Reg-REBEL alike.
    """
    return normalise((1 - eta * tau) * z + eta * tau * reference + eta * reward)


def sppo_step(z: Vector, reference: Vector, eta: float, tau: float, reward: Vector) -> Vector:
    """Minimiser over the simplex of sum_i mu_i (log(mu'_i / mu_i) - t_i)^2, t = eta (reward - tau log(mu/ref) - 1/2).

    Stationary points have d_i + kappa exp(d_i) = t_i for the log-ratios d, hence d_i = t_i - W(kappa exp(t_i)) with
    Lambert's W; kappa is the root of total(kappa) = sum_i mu_i exp(d_i) = 1. The total falls in kappa. Far from the
    reference it may stay below 1 up to the end of the branch W_0 (kappa = -exp(-1 - max t)); then the answer of the
    largest t, the first to reach that end, goes on along W_-1, where its share grows without bound.
    """
    target = eta * (reward - tau * (z - reference) - 0.5)
    mu, top = np.exp(z), int(target.argmax())
    end = -float(np.exp(-1 - target[top])) * (1 - 1e-12)

    def ratios(kappa: float, *, beyond: bool = False) -> Vector:
        d = target - lambertw(kappa * np.exp(target)).real
        if beyond:
            d[top] = target[top] - lambertw(kappa * np.exp(target[top]), -1).real
        return d

    if mu @ np.exp(ratios(end)) < 1:

        def excess_beyond(kappa: float) -> float:
            return float(mu @ np.exp(ratios(kappa, beyond=True))) - 1

        near_zero = end
        while excess_beyond(near_zero) < 0:
            near_zero /= 2
        return normalise(z + ratios(float(brentq(excess_beyond, end, near_zero, xtol=1e-300)), beyond=True))
    kappa, low = 0.0, end
    d = ratios(kappa)
    for _ in range(100):
        excess = float(mu @ np.exp(d)) - 1
        if abs(excess) <= 4e-16:
            break
        if excess > 0:
            low = max(low, kappa)
        new = kappa + excess / float(mu @ (np.exp(2 * d) / (1 + kappa * np.exp(d))))
        # Newton in kappa may overshoot the end of the branch; half the way to it is always allowed.
        new = new if new > low else (kappa + low) / 2
        if new == kappa:
            break
        kappa = new
        d = ratios(kappa)
    return normalise(z + d)


def regularised_nash(P: Matrix, reference: Vector, tau: float) -> Vector:
    """log of the Nash policy of the game with payoff P and penalty tau KL(., reference), by damped Newton.

    Solves F(z) = z - z_ref - (P - 1/2) softmax(z) / tau = 0. The Jacobian is I - B D / tau with B = P - 1/2
    antisymmetric and D = diag(p) - p p^T; the spectrum of B D is imaginary, so the Jacobian is never singular and
    |F| has no stationary point but the solution. Needs no step size; accurate to rounding. A small tau is reached
    through larger ones, for the steps that lower |F| become tiny far from the solution.
    """
    levels = [tau]
    while levels[-1] < DIRECT:
        levels.append(min(DIRECT, 4 * levels[-1]))
    z = reference
    for level in reversed(levels):
        z, size = _newton(P, reference, level, z)
    if size > 1e-8 * (1 + 1 / tau):
        raise CoalaError(
            f"The regularised game could not be solved at tau {tau:g} (residual {size:.1e}): start with a larger tau "
            "and lower it over the outer updates, for example tau=lambda t: max(0.1 * 0.7**t, 1e-4)."
        )
    return normalise(z)


def _newton(P: Matrix, reference: Vector, tau: float, z: Vector) -> tuple[Vector, float]:
    """Newton's iteration of :func:`regularised_nash` from z; the logits and |F| there."""
    B, identity = (P - P.T) / 2, np.eye(len(P))

    def residual(z: Vector) -> tuple[Vector, Vector]:
        p = np.exp(normalise(z))
        return z - reference - B @ p / tau, p

    value, p = residual(z)
    size = float(np.linalg.norm(value))
    for _ in range(200):
        if size == 0:
            break
        jacobian = identity - (B * p - np.outer(B @ p, p)) / tau
        direction = np.linalg.solve(jacobian, -value)
        length = 1.0
        while True:
            candidate = z + length * direction
            new_value, new_p = residual(candidate)
            new_size = float(np.linalg.norm(new_value))
            if new_size < (1 - 1e-4 * length) * size or length < 1e-9:
                break
            length /= 2
        if new_size >= size:
            break  # rounding is all that is left
        z, value, p, size = candidate, new_value, new_p, new_size
    return z, size
