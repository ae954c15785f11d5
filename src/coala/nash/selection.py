"""What training on (best, worst) of N candidates converges to: the Nash strategy of another game.

The recipe draws N answers from the policy, keeps the one that the others lose to most and the one they beat most, and
asks for a margin of eta / 2 between them however clear the preference. This module computes the population version
exactly, by enumerating what N draws can be; knows nothing of language models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations_with_replacement

import numpy as np
from jaxtyping import Float64
from numpy.typing import ArrayLike

from coala.nash.game import Matrix, PreferenceGame, Vector, duality_gap
from coala.nash.steps import mirror_step, normalise
from coala.values import CoalaError

PerDraw = Float64[np.ndarray, "draws answers"]


@dataclass(frozen=True, eq=False)
class FixedPoint:
    """Where selection ends: the ``policy`` (n,), its ``gap`` in the game, and how far the last update moved it."""

    policy: Vector
    gap: float
    moved: float


@dataclass(frozen=True, eq=False)
class SelectionGame:
    """The law of (best, worst) among ``candidates`` draws; ``hard`` judges tell who wins, others with what probability.

    A candidate's score is its mean win rate against the other candidates; equal scores are decided by lot.
    """

    P: Matrix
    candidates: int
    hard: bool

    @cached_property
    def draws(self) -> list[tuple[Float64[np.ndarray, "draws"], PerDraw, PerDraw, PerDraw]]:
        """For each answer i, the M_i multisets of draws that contain it.

        Logarithms of how many orders they have (M_i,), counts without one i (M_i, n), chance that i is best and j worst
        (M_i, n), and that i is worst and j best (M_i, n).
        """
        n, N = len(self.P), self.candidates
        judged = np.sign(self.P - 0.5) / 2 + 0.5 if self.hard else self.P
        sets = [np.bincount(drawn, minlength=n) for drawn in combinations_with_replacement(range(n), N)]
        counts = np.array(sets, dtype=np.float64)
        chance = np.array([_extremes(judged, drawn) for drawn in counts])
        orders = np.array([math.lgamma(N + 1) - sum(math.lgamma(c + 1) for c in drawn) for drawn in counts])
        found = []
        for i, unit in enumerate(np.eye(n)):
            rows = counts[:, i] > 0
            found.append(
                (orders[rows], counts[rows] - unit, chance[rows, i] * (1 - unit), chance[rows, :, i] * (1 - unit))
            )
        return found

    def rewards(self, z: Vector) -> Vector:
        """Minimiser d (n,) of E (d_best - d_worst - 1/2)^2 over draws from exp(z), up to a constant.

        Its stationarity, row i divided by p_i (else rare answers would vanish): sum_j m_ij (d_i - d_j) = w_i / 2 with
        m_ij how often i and j are the pair and w_i how much more often i is best than worst.
        """
        n = len(z)
        system, right = np.eye(n), np.zeros(n)
        for i, (orders, others, best, worst) in enumerate(self.draws):
            weight = np.exp(orders + others @ z)
            won, lost = weight @ best, weight @ worst
            met = won + lost
            if (total := met.sum()) > 0:
                system[i] -= met / total
                right[i] = (won.sum() - lost.sum()) / (2 * total)
        # The free constant is fixed by p^T d = 0; added to every row it changes nothing else.
        return np.linalg.solve(system + np.exp(z), right)


def selection_fixed_point(
    game: PreferenceGame,
    start: ArrayLike | None = None,
    *,
    candidates: int = 5,
    hard: bool = False,
    eta: float = 0.3,
    tau: float = 0.1,
    outer: int = 400,
    inner_steps: int = 25,
) -> FixedPoint:
    """COMAL with the INPO loss on (best, worst) of ``candidates`` answers and margin eta / 2, population version.

    Stops after ``outer`` updates or when one moves no probability by more than 1e-10. One matrix of few answers: the
    number of multisets of draws, (n + N - 1 choose N), is held in memory.
    """
    if game.contextual:
        raise CoalaError("The study of selection takes a game of one matrix; run it for each prompt.")
    if candidates < 2:
        raise CoalaError(f"Best and worst need two candidates at least; found {candidates}.")
    n = len(game.names[0])
    if (size := math.comb(n + candidates - 1, candidates)) * n * n > 2e7:
        raise CoalaError(
            f"{candidates} draws from {n} answers can come out in {size} ways, too many to enumerate: take fewer."
        )
    selection = SelectionGame(game.matrices[0], candidates, hard)
    p = game.parts(game.uniform() if start is None else start, "start")[0]
    if p.min() <= 0:
        raise CoalaError("The study of selection starts from a policy that plays every answer; found a 0 in the start.")
    z, moved = normalise(np.log(p)), math.inf
    for new in _updates(selection, z, eta, tau, outer, inner_steps):
        moved = float(np.abs(np.exp(new) - np.exp(z)).max())
        z = new
        if moved < 1e-10:
            break
    return FixedPoint(np.exp(z), duality_gap(game.matrices[0], np.exp(z)), moved)


def _updates(
    selection: SelectionGame, z: Vector, eta: float, tau: float, outer: int, inner_steps: int
) -> Iterator[Vector]:
    for _ in range(outer):
        reference = z
        for _ in range(inner_steps):
            z = mirror_step(z, reference, eta, tau, selection.rewards(z))
        yield z


def _extremes(judged: Matrix, counts: Vector) -> Matrix:
    """(n, n): chance that i is picked best and j worst among candidates with these counts; equals are drawn by lot."""
    total = counts.sum() - 1
    present = np.flatnonzero(counts)
    inside = judged[np.ix_(present, present)]
    # Against copies of itself an answer wins half.
    scores = (inside @ counts[present] - 0.5) / total
    chance = np.zeros(judged.shape)
    # Rounding must not break ties.
    best = present[scores >= scores.max() - 1e-12]
    worst = present[scores <= scores.min() + 1e-12]
    if len(best) == len(present) and len(worst) == len(present):
        # All are equal: a random pair of different candidates.
        pairs = np.outer(counts, counts) - np.diag(counts)
        return pairs / pairs.sum()
    chance[np.ix_(best, worst)] = np.outer(counts[best], counts[worst])
    return chance / chance.sum()
