"""What each pair did to a head: the change if it were left out, for all at once, with proved ends and exact refits.

The effect of a pair is on a score, a margin, or the loss or the accuracy on held-out pairs. Gates, ridge, sparsity,
coordinates and temperature are held. Derivation: docs/derivations/leaving_out.md. Knows pairs by number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from jaxtyping import Bool, Float, Int

from coala.convex.optimum import Moves, Optimum
from coala.statistics.logistic import sigmoid

CHUNK = 4_000_000  # numbers held at once
REFITTING = 1e10  # multiplications that refits beyond the first few may take
ROUNDING = 1e-9  # of an exact refit, as a share of what it is compared with


class Measured(Protocol):
    """What the effect of leaving pairs out is measured on."""

    def along(self, moves: Moves) -> tuple[Float[np.ndarray, "k"], Float[np.ndarray, "k"]]:
        """The changes along Newton's steps, and how far the true ones may be from them at most."""

    def exactly(self, weights: Float[np.ndarray, "p"]) -> float:
        """The change if these are the weights."""


@dataclass(frozen=True)
class LinearEffect:
    """A score, or a margin, that is ``row`` (p,) times the weights."""

    optimum: Optimum
    row: Float[np.ndarray, "p"]

    def along(self, moves: Moves) -> tuple[Float[np.ndarray, "k"], Float[np.ndarray, "k"]]:
        there = self.row @ self.optimum.basis
        return moves.steps @ there, moves.error * float(_proved_norms(self.optimum, self.row[None])[0])

    def exactly(self, weights: Float[np.ndarray, "p"]) -> float:
        return float(self.row @ (weights - self.optimum.weights))


@dataclass(frozen=True)
class HeldOutEffect:
    """Mean log loss, in nats, or ranking accuracy, in [0, 1], on held-out pairs with ``rows`` (h, p)."""

    optimum: Optimum
    rows: Float[np.ndarray, "h p"]
    temperature: float
    unit: Literal["loss", "accuracy"] = "loss"

    def along(self, moves: Moves) -> tuple[Float[np.ndarray, "k"], Float[np.ndarray, "k"]]:
        there = self.rows @ self.optimum.basis
        norms = _proved_norms(self.optimum, self.rows)
        margins = self.rows @ self.optimum.weights
        change, slack = np.zeros(len(moves)), np.zeros(len(moves))
        for part in _parts(len(moves), len(self.rows)):
            moved = margins[:, None] + there @ moves.steps[part].T
            if self.unit == "loss":
                error = moves.error[part]
                pulled = sigmoid(-moved / self.temperature) / (self.temperature * len(margins))
                slope = np.linalg.norm(there.T @ pulled, axis=0)
                change[part] = self._losses(moved) - self._losses(margins[:, None])
                bend = float((norms**2).mean()) / (8 * self.temperature**2)
                slack[part] = np.where(np.isfinite(error), slope * error + bend * error**2, np.inf)
                if not np.isfinite(norms).all():
                    slack[part] = np.inf
            else:
                change[part] = _hits(moved).mean(axis=0) - _hits(margins).mean()
                apart = norms[:, None] * moves.error[None, part]
                slack[part] = (np.abs(moved) <= np.where(np.isnan(apart), np.inf, apart)).mean(axis=0)
        return change, slack

    def exactly(self, weights: Float[np.ndarray, "p"]) -> float:
        before, after = self.rows @ self.optimum.weights, self.rows @ weights
        if self.unit == "loss":
            return float(self._losses(after[:, None])[0] - self._losses(before[:, None])[0])
        return float(_hits(after).mean() - _hits(before).mean())

    def _losses(self, margins: Float[np.ndarray, "h k"]) -> Float[np.ndarray, "k"]:
        return np.asarray(np.logaddexp(0, -margins / self.temperature).mean(axis=0))


def _hits(margins: Float[np.ndarray, "*h"]) -> Float[np.ndarray, "*h"]:
    return np.asarray((margins > 0) + (margins == 0) / 2)


def _proved_norms(optimum: Optimum, rows: Float[np.ndarray, "h p"]) -> Float[np.ndarray, "h"]:
    """|T^T row|; inf for a row that reaches where no training pair does, of which nothing is proved."""
    there = rows @ optimum.basis
    norms = np.linalg.norm(there, axis=1)
    if optimum.unseen:
        rest = np.linalg.norm(rows - there @ optimum.back, axis=1)
        norms = np.where(rest > 1e-9 * np.linalg.norm(rows, axis=1), np.inf, norms)
    return np.asarray(norms)


def _parts(n: int, width: int) -> Iterator[slice]:
    size = max(1, CHUNK // max(1, width))
    return (slice(start, min(n, start + size)) for start in range(0, n, size))


@dataclass(frozen=True)
class Left:
    """A unit, a pair or a group of pairs, and the effect of leaving it out: exact, as a refit found it."""

    unit: int
    effect: float
    estimate: float


@dataclass(frozen=True)
class Ranked:
    """The units with the largest effects of one sign, the largest first, refitted exactly.

    ``proved``: so many of them, from the first on, are proved to be ahead of every unit that is not listed. ``outside``
    bounds the effect of any unit that is not: inf where nothing is proved.
    """

    rows: list[Left]
    proved: int
    outside: float


@dataclass(frozen=True)
class Influence:
    """Effects of leaving units out: the ``change`` (k,) along Newton's step, true within ``slack`` (k,).

    ``lowers`` and ``raises`` list those whose absence lowers the measure most and raises it most. ``distance`` (k,)
    bounds the change of the weights.
    """

    change: Float[np.ndarray, "k"]
    slack: Float[np.ndarray, "k"]
    distance: Float[np.ndarray, "k"]
    lowers: Ranked
    raises: Ranked
    refits: int


def influence(
    optimum: Optimum,
    effect: Measured,
    units: Sequence[Int[np.ndarray, "_"]] | None = None,
    *,
    top: int = 10,
    most_refits: int | None = None,
) -> Influence:
    """Leave out every pair, or each of ``units`` (numbers of pairs), one at a time.

    ``most_refits`` bounds the exact refits for each sign, unless given by what takes seconds; the lists are then proved
    as far as they reach.
    """
    if most_refits is None:
        swift = optimum.rows.size if optimum.program.linear else REFITTING
        most_refits = max(60, int(REFITTING / (12 * swift)))
    if units is None:
        moves = optimum.without_each()
        members = [np.array([j]) for j in range(len(optimum))]
    else:
        members = list(units)
        moves = _joined([optimum.without(unit) for unit in members])
    change, slack = effect.along(moves)
    kept: dict[int, float] = {}

    def exactly(unit: int) -> float:
        if unit not in kept:
            step = moves.steps[unit] if np.isfinite(moves.slack[unit]) else None
            kept[unit] = effect.exactly(optimum.refit(members[unit], step))
        return kept[unit]

    lowers, raises = (_ranked(sign, change, slack, exactly, top, most_refits) for sign in (-1.0, 1.0))
    return Influence(change, slack, moves.distance, lowers, raises, len(kept))


def _ranked(
    sign: float,
    change: Float[np.ndarray, "k"],
    slack: Float[np.ndarray, "k"],
    exactly: Callable[[int], float],
    top: int,
    most_refits: int,
) -> Ranked:
    """Refits in the order of what each unit could do at most, until no other can do more than those listed."""
    most = sign * change + slack
    order = np.lexsort((np.arange(len(most)), -sign * change, -most))
    found: list[Left] = []
    beyond = 0.0  # what a unit that was not refitted could do
    for tried, unit in enumerate(order):
        beyond = max(0.0, float(most[unit]))
        best = sorted((sign * row.effect for row in found), reverse=True)[:top]
        if beyond == 0 or tried == most_refits or (len(best) == top and best[-1] >= beyond):
            break
        found.append(Left(int(unit), exactly(int(unit)), float(change[unit])))
        beyond = 0.0
    found.sort(key=lambda row: (-sign * row.effect, row.unit))
    rows = [row for row in found[:top] if sign * row.effect > 0]
    outside = max([beyond, *(sign * row.effect for row in found[len(rows) :])])
    proved = sum(sign * row.effect * (1 + ROUNDING) >= beyond for row in rows)
    return Ranked(rows, int(proved), outside)


def _joined(moves: Sequence[Moves]) -> Moves:
    parts = [[getattr(one, name) for one in moves] for name in ("steps", "slack", "stretch", "distance")]
    return Moves(*(np.concatenate(part) for part in parts))


def copies(rows: Float[np.ndarray, "n p"]) -> tuple[list[list[int]], Bool[np.ndarray, "n"]]:
    """Pairs with one and the same row, or its opposite: lists of numbers, and which pairs have their opposite there.

    A pair whose row another has with the other sign says the contrary of it.
    """
    size = np.abs(rows).max(initial=0.0)
    rounded = np.round(rows / (size if size > 0 else 1.0), 9) + 0.0
    sign = np.sign(np.take_along_axis(rounded, (rounded != 0).argmax(axis=1)[:, None], axis=1))
    sign = np.where(sign == 0, 1.0, sign)
    _, member = np.unique(rounded * sign + 0.0, axis=0, return_inverse=True)
    order = np.argsort(member, kind="stable")
    cuts = np.flatnonzero(np.diff(member[order])) + 1
    together = [part.tolist() for part in np.split(order, cuts) if len(part) > 1]
    contrary = np.zeros(len(rows), bool)
    for part in together:
        contrary[part] = len({float(sign[j, 0]) for j in part}) > 1
    return together, contrary
