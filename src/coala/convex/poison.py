"""How far k pairs in the hands of an adversary can move a head: a proved bound, and the worst attack a search finds.

Pairs are flipped, removed or added; gates, ridge, sparsity and coordinates are held, as in ``influence.py``. Flipping a
pair adds a linear function to the objective and leaves its curvature as it is, since softplus(t) - softplus(-t) = t.
Derivation: docs/derivations/leaving_out.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from coala.convex.optimum import Optimum, beyond, descended, reach
from coala.statistics.logistic import sigmoid

Attack = Literal["flip", "remove", "add"]
Proof = Literal["refits", "curvature", "modulus", "nothing"]
MOST_REFITTED = 4e8  # n times the size of the rows, up to which every pair is refitted
MOST_CURVED = 4e8  # multiplications of one Hessian that is made for a bound
CURVED = 3e9  # multiplications that one bound may take
FARTHEST = 30.0  # a margin that moves further has no curvature left
FEW = 64  # pairs up to which sums of the largest are kept
MOST_PRODUCTS = 3000  # pairs whose rows are multiplied each with each
ATTACKS: tuple[Attack, ...] = ("flip", "remove", "add")


@dataclass(frozen=True)
class PoisonBound:
    """What ``k`` pairs of n can do at most, on held-out pairs.

    ``margin``: no held-out margin moves by more; inf where nothing is proved. ``could_turn`` held-out margins of
    ``held_out`` might change sign, and at least the share ``accuracy`` stays ranked right. ``by`` names what proves it:
    the curvature at the optimum, the modulus of the ridge alone, or refits, where all ways to choose are few enough.
    """

    attack: Attack
    k: int
    margin: float
    could_turn: int
    held_out: int
    accuracy: float
    by: Proof

    @property
    def vacuous(self) -> bool:
        """Whether it leaves open that the head ranks no better than a coin."""
        return not self.accuracy > 0.5


@dataclass(frozen=True)
class Poisoning:
    """An optimum and the held-out pairs, ``rows`` (h, p), on which attacks are measured.

    ``cap`` is the largest norm that an added pair's row is assumed to have in the inverse of the Hessian; that of the
    most unusual pair seen unless given.
    """

    optimum: Optimum
    rows: Float[np.ndarray, "h p"]
    cap: float

    @classmethod
    def of(cls, optimum: Optimum, rows: Float[np.ndarray, "h p"], cap: float | None = None) -> Poisoning:
        return cls(optimum, rows, float(optimum.sizes.max(initial=0.0)) if cap is None else cap)

    @cached_property
    def _kept(self) -> dict[tuple[Attack, int], PoisonBound]:
        return {}

    def bound(self, attack: Attack, k: int) -> PoisonBound:
        """The bound for any ``k`` pairs, chosen with full knowledge of all of this."""
        if (attack, k) not in self._kept:
            self._kept[attack, k] = self._bound(attack, k)
        return self._kept[attack, k]

    def _bound(self, attack: Attack, k: int) -> PoisonBound:
        opt, n = self.optimum, len(self.optimum)
        margins = self.rows @ opt.weights
        curved = self._by_curvature(attack, k, margins)
        plain = self._by_modulus(attack, k)
        most = np.minimum(curved, plain)  # (2, h): against the sign of each margin, and with it
        tried = self._one_by_one.get(attack) if k == 1 else None
        if tried is not None:
            most = np.minimum(most, tried)
        turned = (np.abs(margins) <= most[0]) | (margins == 0)
        kept = float(((margins > 0) & ~turned).mean()) if len(margins) else 0.0
        by: Proof = "curvature"
        if tried is not None:
            by = "refits"
        elif not np.isfinite(most).all() or (k >= n and attack == "remove"):
            by = "nothing"
        elif plain.sum() < curved.sum():
            by = "modulus"
        return PoisonBound(attack, k, float(most.max(initial=0.0)), int(turned.sum()), len(margins), kept, by)

    def largest(self, attack: Attack) -> int:
        """A number of pairs for which the bound is not vacuous, the largest that bisection finds."""
        low, high = 0, 1
        n = len(self.optimum)
        while high < n and not self.bound(attack, high).vacuous:
            low, high = high, 2 * high
        high = min(high, n)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.bound(attack, middle).vacuous else (middle, high)
        return low

    def _by_curvature(self, attack: Attack, k: int, margins: Float[np.ndarray, "h"]) -> Float[np.ndarray, "2 h"]:
        """For each held-out margin, how far it can move against its sign, and with it."""
        opt, n = self.optimum, len(self.optimum)
        there = self.rows @ opt.basis
        norms = np.linalg.norm(there, axis=1)
        if opt.unseen:
            rest = np.linalg.norm(self.rows - there @ opt.back, axis=1)
            norms = np.where(rest > 1e-9 * np.linalg.norm(self.rows, axis=1), np.inf, norms)
        pushes, lost = self._pushes(attack), 0.0
        if attack == "remove":
            lost = float(_largest(opt.leverage, k)) + k / n * float(opt.stiffness.max(initial=0.0))
        if lost >= 1:
            return np.full((2, len(margins)), np.inf)
        if pushes is None:
            nu = k / n * (self.cap + float(np.linalg.norm(opt.force)))
            turn = np.full(n, np.inf)
        else:
            nu, turn = self._strength(attack, k)
        nu += 2 * opt.residual * opt.widest
        size, off = self._moved(nu, turn, lost)
        if not np.isfinite(size):
            return np.full((2, len(margins)), np.inf)
        if pushes is None or not opt.program.linear:
            return _both(norms * size)
        # Along the first step the worst k pairs add up for each margin; what the step misses is of second order.
        most = self._most[attack]
        first = most[..., k - 1] if k <= most.shape[-1] else self._turning(attack, k)[..., -1]
        missed = (np.sqrt(np.maximum(((there @ off) * there).sum(axis=1), 0)) + lost * norms) * size
        return np.minimum(first + missed, norms * size)

    def _moved(self, nu: float, turn: Float[np.ndarray, "n"], lost: float) -> tuple[float, Float[np.ndarray, "q q"]]:
        """The ``size`` of the optimum's move at most, for a gradient of norm ``nu``, and what the first step misses.

        A linear function v changes by its change along the first step, within (sqrt(v^T off v) + lost |v|) size.

        ``turn`` (n,): how far the first step moves each training margin at most; ``lost`` is the share of the curvature
        that goes with pairs. Margins cannot jump: they stay below the least size and r_j that imply themselves,

            size >= nu / (least eigenvalue of the Hessian, each pair's curvature times (1 - e^-r_j) / r_j, less lost),
            r_j >= |Z_j| size,  or  r_j >= turn_j + what is missed of Z_j.
        """
        opt, n = self.optimum, len(self.optimum)
        gain = 1 / np.sqrt(1 - lost)
        rho = float(opt.sizes.max(initial=0.0)) * gain
        plain = float(reach(np.asarray(nu * gain), np.asarray(rho))) * gain
        bend = min(float(beyond(np.asarray(rho * plain / gain))), 1e100)
        simple = plain, bend**2 * np.eye(opt.rows.shape[1])
        if n * opt.rows.shape[1] ** 2 > MOST_CURVED:
            return simple
        share = opt.curvature / n

        def implied(
            size: float, r: Float[np.ndarray, "n"]
        ) -> tuple[float, Float[np.ndarray, "q q"], Float[np.ndarray, "n"]]:
            kept = share * np.where(r > 0, -np.expm1(-r) / np.where(r > 0, r, 1.0), 1.0)
            bent = (opt.rows * kept[:, None]).T @ opt.rows + np.diag(opt.stiffness)
            least = float(np.linalg.eigvalsh(bent)[0]) - lost
            if least <= 0 or r.max(initial=0.0) > FARTHEST:
                return np.inf, bent, r
            off = (opt.rows * (share * beyond(r) ** 2)[:, None]).T @ opt.rows
            missed = np.sqrt(np.maximum(((opt.rows @ off) * opt.rows).sum(axis=1), 0)) + lost * opt.sizes
            return nu / least, off, np.minimum(opt.sizes * size, turn + missed * size)

        size, r = nu, np.minimum(opt.sizes * nu, turn)
        for _ in range(int(np.clip(CURVED / (n * opt.rows.shape[1] ** 2), 40, 200))):
            ahead, off, new = implied(size, r)
            if ahead <= size and (new <= r).all():
                return min(size, plain), off
            if not np.isfinite(ahead):
                break
            # Upwards, a hundredth further than is implied, to where no more than itself is.
            size, r = max(size, 1.01 * ahead), np.maximum(r, 1.01 * new)
        return simple

    @cached_property
    def _most(self) -> dict[Attack, Float[np.ndarray, "2 h top"]]:
        """:meth:`_turning` for few pairs, as most questions are."""
        few = min(FEW, len(self.optimum))
        return {a: self._turning(a, few) for a in ATTACKS if a != "add"}

    def _turning(self, attack: Attack, k: int) -> Float[np.ndarray, "2 h top"]:
        """How far the first step of 1, 2, ... k pairs moves held-out margins, against their sign and with it."""
        pushes = self._pushes(attack)
        assert pushes is not None
        there, margins = self.rows @ self.optimum.basis, self.rows @ self.optimum.weights
        found = np.zeros((2, len(margins), k))
        for part in np.array_split(np.arange(len(margins)), 1 + len(margins) * len(pushes) // 4_000_000):
            turning = np.where(margins[part] >= 0, 1.0, -1.0)[:, None] * (there[part] @ pushes.T)
            for number, side in enumerate((turning, -turning)):
                top = -np.partition(-np.maximum(side, 0), k - 1, axis=-1)[:, :k]
                found[number, part] = np.cumsum(-np.sort(-top, axis=-1), axis=-1)
        return found

    def _pushes(self, attack: Attack) -> Float[np.ndarray, "n q"] | None:
        """What attacking each pair adds to the gradient, with the sign that moves margins down along the row."""
        n = len(self.optimum)
        if attack == "add":
            return None
        return self.optimum.rows / n if attack == "flip" else -self.optimum.gradients(np.arange(n))

    def _strength(self, attack: Attack, k: int) -> tuple[float, Float[np.ndarray, "n"]]:
        """The norm of the gradient that k pairs can add up to, and how far its step can move each training margin."""
        pushes = self._pushes(attack)
        assert pushes is not None
        nu = float(_largest(np.linalg.norm(pushes, axis=1), k))
        if len(pushes) > MOST_PRODUCTS or not self.optimum.program.linear:
            return nu, np.full(len(pushes), np.inf)
        # Pairs that point elsewhere do not add up: |sum|^2 is a sum of products of two pairs each.
        together = _largest(np.maximum(self._products[attack], 0), k)
        across = self._turns[attack]
        turn = np.maximum(*(_largest(np.maximum(sign * across, 0), k) for sign in (1.0, -1.0)))
        return min(nu, float(np.sqrt(_largest(together, k)))), turn

    @cached_property
    def _products(self) -> dict[Attack, Float[np.ndarray, "n n"]]:
        return {a: p @ p.T for a in ATTACKS if (p := self._pushes(a)) is not None}

    @cached_property
    def _turns(self) -> dict[Attack, Float[np.ndarray, "n n"]]:
        return {a: self.optimum.rows @ p.T for a in ATTACKS if (p := self._pushes(a)) is not None}

    @cached_property
    def _one_by_one(self) -> dict[Attack, Float[np.ndarray, "2 h"]]:
        """How far any one pair can move each held-out margin, where all n can be refitted."""
        opt, n = self.optimum, len(self.optimum)
        if not opt.program.linear or n * opt.rows.size > MOST_REFITTED or n < 2:
            return {}
        there = self.rows @ opt.basis
        before = there @ opt.point
        sign = np.where(before >= 0, 1.0, -1.0)
        flips = np.where(np.eye(n, dtype=bool), -1.0, 1.0)
        moves = opt.without_each().steps
        after: dict[Attack, list[Float[np.ndarray, "h"]]] = {
            "flip": [there @ self._flipped(row, opt.point) for row in flips],
            "remove": [self.rows @ opt.refit(np.array([j]), moves[j]) for j in range(n)],
        }
        found: dict[Attack, Float[np.ndarray, "2 h"]] = {}
        for attack, margins in after.items():
            turned = sign * (before - np.stack(margins))
            worst = np.stack([turned.max(axis=0), -turned.min(axis=0)])
            found[attack] = np.maximum(worst, 0) + 1e-8 * (1 + np.abs(before))
        return found

    def _by_modulus(self, attack: Attack, k: int) -> Float[np.ndarray, "2 h"]:
        """|gradient| / modulus times the norm of each held-out row, in the coordinates of the fit."""
        opt, held, n = self.optimum, self.optimum.program, len(self.optimum)
        norms = np.linalg.norm(self.rows, axis=1)
        if not held.linear or (attack == "remove" and k >= n):
            return np.full((2, len(norms)), np.inf)
        penalty = held.ridge * opt.weights
        if attack == "flip":
            gradient, left = float(_largest(np.linalg.norm(held.rows, axis=1), k)) / n, 1.0
        elif attack == "remove":
            pulls = np.linalg.norm(penalty - opt.pull[:, None] * held.rows, axis=1)
            gradient, left = float(_largest(pulls, k)) / n, 1 - k / n
        else:
            widest = self.cap / float(np.linalg.norm(opt.basis, -2))  # the cap, as a norm in these coordinates
            gradient, left = k / n * (widest + float(np.linalg.norm(penalty))), 1 + k / n
        return _both(norms * (gradient + 2 * opt.residual) / (left * held.ridge))

    # --- attacks -----------------------------------------------------------------------------------------------------

    def attack(self, k: int, *, batch: int = 1, temperature: float = 1.0) -> tuple[Int[np.ndarray, "k"], list[float]]:
        """Pairs that a greedy search flips to lower the held-out accuracy, and the accuracy after each batch, refitted.

        Each time it flips those that raise the held-out log loss most along Newton's step: a lower bound on the harm
        of the worst flips.
        """
        opt, n = self.optimum, len(self.optimum)
        there = self.rows @ opt.basis
        sign = np.ones(n)
        x = opt.point
        taken: list[int] = []
        accuracies: list[float] = []
        while len(taken) < k:
            margins = there @ x
            slope = -(sigmoid(-margins / temperature) @ there) / (temperature * len(margins))
            pull = sigmoid(opt.program.margin - opt.rows @ x)
            hessian = (opt.rows * (pull * (1 - pull) / n)[:, None]).T @ opt.rows + np.diag(opt.stiffness)
            gains = np.where(sign > 0, -opt.rows @ np.linalg.solve(hessian, slope), -np.inf)
            chosen = np.argsort(-gains, kind="stable")[: min(batch, k - len(taken))]
            sign[chosen] = -1
            taken += chosen.tolist()
            x = self._flipped(sign, x)
            margins = there @ x
            accuracies.append(float(((margins > 0) + (margins == 0) / 2).mean()))
        return np.asarray(taken), accuracies

    def _flipped(self, sign: Float[np.ndarray, "n"], x: Float[np.ndarray, "q"]) -> Float[np.ndarray, "q"]:
        """The optimum when pairs with sign -1 are flipped, from ``x``."""
        opt, n = self.optimum, len(self.optimum)
        rows, margin = opt.rows * sign[:, None], opt.program.margin * sign

        def gradient(x: Float[np.ndarray, "q"]) -> Float[np.ndarray, "q"]:
            return np.asarray(-(sigmoid(margin - rows @ x) @ rows) / n + opt.stiffness * x)

        def hessian(x: Float[np.ndarray, "q"]) -> Float[np.ndarray, "q q"]:
            pull = sigmoid(margin - rows @ x)
            return np.asarray((rows * (pull * (1 - pull) / n)[:, None]).T @ rows + np.diag(opt.stiffness))

        return descended(gradient, hessian, x, float(np.linalg.norm(opt.force)), tolerance=1e-10)

    def margins_if_flipped(self, pairs: Sequence[int]) -> Float[np.ndarray, "h"]:
        """Held-out margins of the optimum with ``pairs`` flipped."""
        sign = np.ones(len(self.optimum))
        sign[list(pairs)] = -1
        return np.asarray(self.rows @ (self.optimum.basis @ self._flipped(sign, self.optimum.point)))


def _both(most: Float[np.ndarray, "h"]) -> Float[np.ndarray, "2 h"]:
    return np.stack([most, most])


def _largest(values: Float[np.ndarray, "*rows n"], k: int) -> Float[np.ndarray, "*rows"]:
    """The sum of the k largest of the last axis."""
    k = min(k, values.shape[-1])
    if k == 0:
        return np.zeros(values.shape[:-1])
    return np.asarray(np.partition(values, values.shape[-1] - k, axis=-1)[..., values.shape[-1] - k :].sum(axis=-1))
