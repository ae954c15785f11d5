"""The ridge-regularised logistic program kept at its optimum while pairs come and go: a refit after each of them.

    J(w) = 1/n sum_j softplus(-F_j.w) + ridge/2 ||w||^2

F_j is the row of pair j: the difference of both sides for a linear head, and for a network with its gates held the same
behind each gate. J is strongly convex with modulus ``ridge``, so a gradient g proves (docs/derivations/live.md)

    J(w) - J* <= |g|^2 / (2 ridge),    |w - w*| <= |g| / ridge

whatever way w was reached: after a removal the weights are those of a program that never had the pair, to that radius.
NumPy and BLAS in float64; nothing is compiled. Knows nothing of who compared, nor of what is asked next.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Shaped

from coala.convex.path import DEFAULT_RIDGE, RIDGES
from coala.convex.validation import grouped_folds, log_loss, rising_twice
from coala.statistics.logistic import sigmoid

TOLERANCE = 1e-12  # gap at which a refit stops, as a share of log 2, the objective at zero
STEPS = 50  # of Newton's method
MOST_CG = 60  # conjugate gradients of a step
SLOW_CG = 12  # after a step that took more, the inverse is made anew
DRIFT = 1.25  # and after the number of pairs has changed by this factor
SAFE = 0.5  # change of a margin up to which a Newton step needs no search: curvature changes by e^0.5 at most
FOLDS = 4


@dataclass(frozen=True)
class Optimality:
    """What is proved of the weights at hand, and what it took.

    ``gap`` bounds the objective's distance from its least value, ``radius`` the weights' from the optimum.
    """

    objective: float
    gap: float
    radius: float
    newton_steps: int = 0
    cg_steps: int = 0

    @property
    def relative_gap(self) -> float:
        return self.gap / self.objective if self.objective else 0.0


class SequentialProgram:
    """Pairs by key, the optimal ``weights`` (p,), and an inverse of the Hessian that follows each pair by rank one.

    The inverse only preconditions: what is claimed follows from the exact gradient. ``ridge`` > 0.
    """

    def __init__(self, width: int, ridge: float) -> None:
        self.ridge = ridge
        self.weights = np.zeros(width)
        self._rows = np.zeros((64, width))
        self._keys: list[int | str] = []
        self._places: dict[int | str, int] = {}
        self._curvature = np.zeros(64)  # with which each row is in the inverse
        self._inverse = np.zeros((width, width))
        self._made_of = 0.0  # pairs when the inverse was made anew; 0: never
        self.optimality = Optimality(float(np.log(2)), 0.0, 0.0)

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def width(self) -> int:
        """p, the number of weights."""
        return len(self.weights)

    @property
    def rows(self) -> Float[np.ndarray, "n p"]:
        """The rows at hand, in no order."""
        return self._rows[: len(self)]

    def __contains__(self, key: int | str) -> bool:
        return key in self._places

    # --- pairs that come and go --------------------------------------------------------------------------------------

    def add(self, key: int | str, row: Float[np.ndarray, "p"]) -> None:
        """A pair more; the weights wait for :meth:`refit`. ValueError for a key that is there."""
        if key in self._places:
            raise ValueError(f"pair {key!r} is there already")
        n = len(self)
        if n == len(self._rows):
            self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
            self._curvature = np.concatenate([self._curvature, np.zeros_like(self._curvature)])
        self._rows[n] = row
        self._keys.append(key)
        self._places[key] = n
        pull = float(sigmoid(-float(row @ self.weights)))
        self._curvature[n] = pull * (1 - pull)
        self._changed(row, self._curvature[n])

    def remove(self, key: int | str) -> None:
        """A pair less; the weights wait for :meth:`refit`. KeyError for one that is not there."""
        place, last = self._places.pop(key), len(self) - 1
        self._changed(self._rows[place], -self._curvature[place])
        self._keys[place], self._rows[place] = self._keys[last], self._rows[last]
        self._curvature[place] = self._curvature[last]
        self._keys.pop()
        if place != last:
            self._places[self._keys[place]] = place

    def restate(self, ridge: float) -> None:
        """Another ridge for the same pairs."""
        self.ridge = ridge
        self._made_of = 0.0

    def _changed(self, row: Float[np.ndarray, "p"], curvature: float) -> None:
        """The inverse after ``curvature`` row row^T is added to the Hessian (Sherman and Morrison)."""
        if not self._made_of:
            return
        image = self._inverse @ row
        below = 1 + curvature * float(row @ image)
        if below < 1e-6:
            self._made_of = 0.0
            return
        self._inverse -= np.multiply.outer(image * (curvature / below), image)

    # --- the optimum -------------------------------------------------------------------------------------------------

    def refit(self) -> Optimality:
        """Weights at the optimum of the pairs at hand, from those before, with what is proved of them."""
        n = len(self)
        rows, w = self.rows, self.weights
        target = float(np.sqrt(2 * self.ridge * np.log(2) * TOLERANCE))
        steps = in_all = 0
        size = np.inf
        while True:
            z = rows @ w
            pull = sigmoid(-z)
            gradient = self.ridge * w - (pull @ rows) / max(1, n)
            before, size = size, float(np.linalg.norm(gradient))
            # At rounding the gradient no longer falls.
            if size <= target or steps >= STEPS or (steps > 3 and size > 0.9 * before and size < 1e3 * target):
                break
            self._renew(pull)
            tolerance = min(0.1, max(1e-6, 0.3 * target / size))
            direction, dz, taken = self._newton(gradient, pull * (1 - pull) / n, tolerance)
            if taken > SLOW_CG:
                self._made_of = 0.0
            w = w + _length(z, dz, w, direction, self.ridge, gradient) * direction
            steps, in_all = steps + 1, in_all + taken
        self.weights = w
        objective = _objective(z, w, self.ridge)
        self.optimality = Optimality(objective, size**2 / (2 * self.ridge), size / self.ridge, steps, in_all)
        return self.optimality

    def hessian(self) -> Float[np.ndarray, "p p"]:
        """The Hessian of n J at the weights, exactly: sum_j c_j F_j F_j^T + n ridge I; of no pairs, ridge I."""
        pull = sigmoid(-(self.rows @ self.weights))
        return self._hessian(pull * (1 - pull))

    def _hessian(self, curvature: Float[np.ndarray, "n"]) -> Float[np.ndarray, "p p"]:
        curved = self.rows * np.sqrt(curvature)[:, None]
        hessian = curved.T @ curved
        hessian[np.diag_indices_from(hessian)] += max(1, len(self)) * self.ridge
        return np.asarray(hessian)

    def _renew(self, pull: Float[np.ndarray, "n"]) -> None:
        """The inverse made anew where it is too old to precondition well."""
        n = len(self)
        if self._made_of and self._made_of / DRIFT <= n <= max(self._made_of * DRIFT, self._made_of + 4):
            return
        self._curvature[:n] = pull * (1 - pull)
        self._inverse = np.linalg.inv(self._hessian(self._curvature[:n]))
        self._made_of = float(max(1, n))

    def _newton(
        self, gradient: Float[np.ndarray, "p"], curvature: Float[np.ndarray, "n"], tolerance: float
    ) -> tuple[Float[np.ndarray, "p"], Float[np.ndarray, "n"], int]:
        """Newton's direction by conjugate gradients, its image (n,) under the rows, and how many steps it took."""
        rows, n = self.rows, max(1, len(self))
        x, image = np.zeros(self.width), np.zeros(len(self))
        residual = -gradient
        bound = tolerance * float(np.linalg.norm(residual))
        scaled = n * (self._inverse @ residual)
        direction, product = scaled, float(residual @ scaled)
        taken = 0
        while taken < MOST_CG:
            taken += 1
            along = rows @ direction
            bent = (curvature * along) @ rows + self.ridge * direction
            length = product / float(direction @ bent)
            x, image = x + length * direction, image + length * along
            residual = residual - length * bent
            if float(np.linalg.norm(residual)) <= bound:
                break
            scaled = n * (self._inverse @ residual)
            product, last = float(residual @ scaled), product
            direction = scaled + product / last * direction
        return x, image, taken


def _objective(z: Float[np.ndarray, "n"], w: Float[np.ndarray, "p"], ridge: float) -> float:
    loss = float(np.logaddexp(0, -z).mean()) if len(z) else float(np.log(2))
    return loss + ridge / 2 * float(w @ w)


def _length(
    z: Float[np.ndarray, "n"],
    dz: Float[np.ndarray, "n"],
    w: Float[np.ndarray, "p"],
    direction: Float[np.ndarray, "p"],
    ridge: float,
    gradient: Float[np.ndarray, "p"],
) -> float:
    """1, or as often halved as it takes for the objective to fall by a share of what its slope promises."""
    if np.abs(dz).max(initial=0.0) <= SAFE:
        return 1.0
    start, slope, length = _objective(z, w, ridge), float(gradient @ direction), 1.0
    while length > 1e-6 and _objective(z + length * dz, w + length * direction, ridge) > start + 1e-4 * length * slope:
        length /= 2
    return length


def solved(
    rows: Float[np.ndarray, "n p"], ridge: float, start: Float[np.ndarray, "p"] | None = None
) -> SequentialProgram:
    """The program of these rows at its optimum, their keys being their places."""
    program = SequentialProgram(rows.shape[1], ridge)
    program._rows, program._curvature = np.array(rows, np.float64), np.zeros(len(rows))
    program._keys = list(range(len(rows)))
    program._places = {place: place for place in range(len(rows))}
    if not len(rows):
        program._rows, program._curvature = np.zeros((64, rows.shape[1])), np.zeros(64)
    if start is not None:
        program.weights = np.array(start)
    program.refit()
    return program


# --- the ridge -------------------------------------------------------------------------------------------------------


def unit_of(rows: Float[np.ndarray, "n p"]) -> float:
    """The unit in which a ridge is chosen, as in a fit: the trace of the Hessian of the mean loss at zero."""
    total = float((rows**2).sum())
    return total / (4 * len(rows)) if total > 0 else 1.0


def choose_ridge(rows: Float[np.ndarray, "n p"], group: Shaped[np.ndarray, "n"], seed: int = 0) -> float:
    """The ridge whose mean loss on folds of whole groups is least, down the path of a fit (RIDGES, in :func:`unit_of`).

    The path's default where there is but one group. A function of the rows, their groups and the seed alone.
    """
    unit = unit_of(rows)
    fold = grouped_folds(group, FOLDS, seed)
    if fold is None:
        return DEFAULT_RIDGE * unit
    if len(rows) < rows.shape[1]:
        # The optimum of any of them lies in the span of all: their coordinates in it say the same.
        rows = np.asarray(np.linalg.qr(rows.T)[1]).T
    programs: list[SequentialProgram | None] = [None] * (int(fold.max()) + 1)
    losses: list[float] = []
    for relative in RIDGES:
        out = np.zeros(len(rows))
        for number in range(len(programs)):
            program = programs[number]
            if program is None:
                program = programs[number] = solved(rows[fold != number], relative * unit)
            else:
                program.restate(relative * unit)
                program.refit()
            out[fold == number] = log_loss(rows[fold == number] @ program.weights)
        losses.append(float(out.mean()))
        if rising_twice(losses):
            break
    return RIDGES[int(np.argmin(losses))] * unit
