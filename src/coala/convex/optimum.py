"""The optimum of a held program and what is near it: Newton steps to other optima, and how far these can lie.

In coordinates in which the Hessian of loss and ridge is the identity, an optimum that moves by D satisfies, by the
generalised self-concordance of the logistic loss (docs/derivations/leaving_out.md),

    |D| <= reach(nu, rho) = -log(1 - rho nu) / rho,     |D - Newton's step| <= (e^r - 1 - r)/r |D|  with r = rho |D|

for a gradient of norm nu and rows of norm rho at most. NumPy in float64. Knows pairs by number; nothing of what an
effect is measured on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int

from coala.convex.held import HeldProgram
from coala.statistics.logistic import sigmoid

FLAT = 1e-11  # curvature, as a share of the largest, of directions that no pair sees
UNIT = 1.1548  # above 2 / sqrt(3), the largest second derivative of x / |x| at |x| = 1


def reach(nu: Float[np.ndarray, "*k"], rho: Float[np.ndarray, "*k"]) -> Float[np.ndarray, "*k"]:
    """-log(1 - rho nu) / rho: how far the optimum moves at most; inf where rho nu >= 1, for which nothing follows."""
    product = rho * nu
    inside = np.minimum(product, 1 - 1e-16)
    return np.where(product < 1, -np.log1p(-inside) / np.maximum(rho, 1e-300), np.inf)


def beyond(r: Float[np.ndarray, "*k"]) -> Float[np.ndarray, "*k"]:
    """(e^r - 1 - r) / r: the share of a move that Newton's step may miss."""
    small = np.minimum(r, 500.0)
    series = small / 2 + small**2 / 6
    exact = (np.expm1(small) - small) / np.where(small > 0, small, 1.0)
    return np.where(np.isfinite(r), np.where(small < 1e-4, series * (1 + 1e-3), exact), np.inf)


@dataclass(frozen=True)
class Moves:
    """Newton's steps (k, q) to k other optima, each within ``slack`` of the optimum itself in its own Hessian's norm.

    ``stretch`` (k,): a vector's norm in that Hessian's inverse is at most ``stretch`` times its own. ``distance`` (k,)
    bounds the change of the weights in the coordinates of the fit; inf where nothing is proved.
    """

    steps: Float[np.ndarray, "k q"]
    slack: Float[np.ndarray, "k"]
    stretch: Float[np.ndarray, "k"]
    distance: Float[np.ndarray, "k"]

    def __len__(self) -> int:
        return len(self.slack)

    @property
    def error(self) -> Float[np.ndarray, "k"]:
        """What a linear function of norm 1 may differ by from its change along the step."""
        return self.slack * self.stretch


@dataclass(frozen=True)
class Optimum:
    """A program with its optimal ``weights`` (p,) and the ``basis`` T (p, q) in which the Hessian is the identity.

    Weights w are T x there, x = ``back`` w; rows F are Z = F T (n, q), and the ridge is the diagonal ``stiffness`` (q,)
    in [0, 1].
    ``residual`` is the norm of the gradient that is left; ``unseen`` says that weights of neurons can move, together,
    in directions that no pair sees.
    """

    program: HeldProgram
    weights: Float[np.ndarray, "p"]
    basis: Float[np.ndarray, "p q"]
    back: Float[np.ndarray, "q p"]
    stiffness: Float[np.ndarray, "q"]
    rows: Float[np.ndarray, "n q"]
    residual: float
    unseen: bool = False

    @classmethod
    def of(cls, program: HeldProgram) -> Optimum:
        """The optimum nearest to the program's head, solved to the last digits."""
        weights = program.solve(program.saved)
        curved = program.rows * np.sqrt(program.curvature(weights) / len(program))[:, None]
        hessian = curved.T @ curved
        hessian[np.diag_indices_from(hessian)] += program.ridges
        values, vectors = np.linalg.eigh(hessian)
        seen = values > FLAT * values[-1]
        whitened = vectors[:, seen] / np.sqrt(values[seen])
        stiffness, turn = np.linalg.eigh(whitened.T @ (program.ridges[:, None] * whitened))
        basis = whitened @ turn
        residual = float(np.linalg.norm(program.gradient(weights, program.even)))
        rows = program.rows @ basis
        unseen = bool((~seen).any())
        return cls(program, weights, basis, basis.T @ hessian, np.clip(stiffness, 0, 1), rows, residual, unseen)

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def pull(self) -> Float[np.ndarray, "n"]:
        return self.program.pull(self.weights)

    @cached_property
    def curvature(self) -> Float[np.ndarray, "n"]:
        return self.pull * (1 - self.pull)

    @cached_property
    def point(self) -> Float[np.ndarray, "q"]:
        """x with T x = weights, on the directions that some pair sees."""
        return np.asarray(self.back @ self.weights)

    @cached_property
    def force(self) -> Float[np.ndarray, "q"]:
        """The penalty's gradient, which at the optimum is what all pairs pull together."""
        return np.asarray(self.pull @ self.rows / len(self))

    @cached_property
    def sizes(self) -> Float[np.ndarray, "n"]:
        """|Z_j|: the norm of every row in the inverse of the Hessian."""
        return np.asarray(np.linalg.norm(self.rows, axis=1))

    @cached_property
    def widest(self) -> float:
        """The largest change of the weights for a change of norm 1 in the coordinates of the basis."""
        return float(np.linalg.norm(self.basis, 2))

    @cached_property
    def leverage(self) -> Float[np.ndarray, "n"]:
        """The share of the curvature along a pair's own row that the pair itself makes, in [0, 1)."""
        return np.asarray(self.curvature * self.sizes**2 / len(self))

    @property
    def own_distance(self) -> float:
        """How far the saved head, rounded and solved to a tolerance, lies from the optimum, in the Hessian's norm."""
        return float(np.linalg.norm(self.back @ (self.program.saved - self.weights)))

    @cached_property
    def _bending(self) -> Float[np.ndarray, "q q"]:
        """The Hessian of the neurons' norms."""
        return np.asarray(self.basis.T @ self.program.bending(self.weights) @ self.basis)

    @cached_property
    def _blocks(self) -> list[tuple[float, float]]:
        """For each neuron that is not zero, its norm and the largest singular value of its part of the basis."""
        width = self.program.width
        found = []
        for i in range(1, 1 + self.program.n_neurons):
            block = slice(i * width, (i + 1) * width)
            norm = float(np.linalg.norm(self.weights[block]))
            found.append((norm, float(np.linalg.norm(self.basis[block], 2))))
        return found

    # --- leaving out -------------------------------------------------------------------------------------------------

    def gradients(self, pairs: Int[np.ndarray, "k"]) -> Float[np.ndarray, "k q"]:
        """What each pair's absence adds to the gradient: the pull it had, and its share of the penalty."""
        return np.asarray((self.force - self.pull[pairs, None] * self.rows[pairs]) / len(self))

    def without_each(self) -> Moves:
        """The moves if one pair is left out, for all n pairs at once."""
        n = len(self)
        shrunk = 1 - self.stiffness / n
        gradients = self.gradients(np.arange(n))
        own = (self.rows**2) @ (1 / shrunk) * self.curvature / n
        stretch = 1 / np.sqrt(np.maximum((1 - own) * shrunk.min(initial=1.0), 1e-300))
        # Without the neurons' norms the Hessian is diagonal.
        bare = self._solved(gradients, gradients / shrunk, self.rows / shrunk)
        nu = np.sqrt(np.maximum((gradients * bare).sum(axis=1), 0))
        if not self.program.linear:
            hessian = np.diag(shrunk) + (1 - 1 / n) * self._bending
            bare = self._solved(gradients, *(np.linalg.solve(hessian, side.T).T for side in (gradients, self.rows)))
        return self._moves(bare, gradients, nu, stretch, 1 / n)

    def _solved(
        self, right: Float[np.ndarray, "n q"], bare: Float[np.ndarray, "n q"], tied: Float[np.ndarray, "n q"]
    ) -> Float[np.ndarray, "n q"]:
        """Each row of ``right`` by the inverse of a Hessian without that row's pair (Sherman and Morrison).

        ``bare`` and ``tied`` are ``right`` and the pairs' rows by the inverse with no pair taken out.
        """
        share = self.curvature / len(self)
        along = share * (tied * right).sum(axis=1) / (1 - share * (tied * self.rows).sum(axis=1))
        return np.asarray(bare + tied * along[:, None])

    @cached_property
    def left_out_margins(self) -> Float[np.ndarray, "n"]:
        """Each pair's margin if the pair itself is left out, along Newton's step: what the others say of it."""
        return np.asarray(self.program.rows @ self.weights + (self.rows * self.without_each().steps).sum(axis=1))

    def without(self, pairs: Int[np.ndarray, "k"]) -> Moves:
        """The one move if all of ``pairs`` are left out together."""
        n, k = len(self), len(pairs)
        shrunk = 1 - k * self.stiffness / n
        gradient = self.gradients(pairs).sum(axis=0)
        curved = self.rows[pairs] * np.sqrt(self.curvature[pairs] / n)[:, None]
        inner = np.eye(k) - curved @ (curved / shrunk).T
        least = float(shrunk.min(initial=1.0)) * float(np.linalg.eigvalsh(inner)[0]) if k else 1.0
        if least <= 1e-9:
            nothing = np.full(1, np.inf)
            return Moves(np.zeros((1, len(shrunk))), nothing, np.ones(1), nothing)
        bare = gradient / shrunk
        bare = bare + (curved / shrunk).T @ np.linalg.solve(inner, curved @ bare)
        nu = np.sqrt(np.full(1, max(0.0, float(gradient @ bare))))
        if not self.program.linear:
            hessian = np.diag(shrunk) - curved.T @ curved + (1 - k / n) * self._bending
            bare = np.linalg.solve(hessian, gradient)
        return self._moves(bare[None], gradient[None], nu, np.full(1, 1 / np.sqrt(least)), k / n)

    def _moves(
        self,
        steps: Float[np.ndarray, "k q"],
        gradients: Float[np.ndarray, "k q"],
        nu: Float[np.ndarray, "k"],
        stretch: Float[np.ndarray, "k"],
        share: float,
    ) -> Moves:
        """Moves with what is proved of them, for gradients of norm ``nu`` in the inverse Hessian without the pairs."""
        rho = self.sizes.max(initial=0.0) * stretch
        size = reach(nu + 2 * self.residual * self.widest * stretch, rho)
        r = rho * size
        slack = _times(beyond(r), size)
        for norm, gain in [] if self.unseen else self._blocks:
            change = gain * stretch * size
            apart = np.where(change < norm, change / np.maximum(norm - change, 1e-300), np.inf)
            slack = slack + (1 - share) * self.program.sparsity * UNIT / 2 * apart**2 * gain * stretch
        if self._blocks:  # what is known without the neurons' norms
            alone = size + np.sqrt(np.maximum((gradients * steps).sum(axis=1), 0))
            slack = alone if self.unseen else np.minimum(slack, alone)
        distance = np.full_like(size, np.inf) if self.unseen else size * stretch * self.widest
        if self.program.linear:  # the modulus of the ridge, |gradient| / modulus, holds whatever the curvature does
            own = np.linalg.norm(gradients @ self.back, axis=1) + 2 * self.residual
            distance = np.minimum(distance, own / ((1 - share) * self.program.ridge))
        return Moves(steps, slack, stretch, distance)

    # --- exact refits ------------------------------------------------------------------------------------------------

    def refit(self, pairs: Int[np.ndarray, "k"], step: Float[np.ndarray, "q"] | None = None) -> Float[np.ndarray, "p"]:
        """The optimal weights without ``pairs``, in the coordinates of the fit, from Newton's step."""
        held = self.program
        n, k = len(self), len(pairs)
        if not held.linear:
            weight = np.full(n, 1 / (n - k))
            weight[pairs] = 0
            return held.solve(self.weights, weight)
        used = np.ones(n, bool)
        used[pairs] = False
        rows, margin = self.rows[used], held.margin[used]

        def gradient(x: Float[np.ndarray, "q"]) -> Float[np.ndarray, "q"]:
            return np.asarray(-(sigmoid(margin - rows @ x) @ rows) / n + (1 - k / n) * self.stiffness * x)

        def hessian(x: Float[np.ndarray, "q"]) -> Float[np.ndarray, "q q"]:
            pull = sigmoid(margin - rows @ x)
            return np.asarray(
                (rows * (pull * (1 - pull) / n)[:, None]).T @ rows + np.diag((1 - k / n) * self.stiffness)
            )

        start = self.point if step is None else self.point + step
        return np.asarray(self.basis @ descended(gradient, hessian, start, float(np.linalg.norm(self.force))))


def descended(
    gradient: Callable[[Float[np.ndarray, "q"]], Float[np.ndarray, "q"]],
    hessian: Callable[[Float[np.ndarray, "q"]], Float[np.ndarray, "q q"]],
    x: Float[np.ndarray, "q"],
    scale: float,
    tolerance: float = 1e-13,
) -> Float[np.ndarray, "q"]:
    """Where ``gradient`` is ``tolerance`` times ``scale`` or rounding, from ``x``.

    The identity serves as the Hessian as long as it is near enough; then it is Newton's method, each step halved until
    the gradient shrinks, as it does along Newton's direction.
    """
    factor: Float[np.ndarray, "q q"] | None = None
    slope = gradient(x)
    for _ in range(100):
        size = float(np.linalg.norm(slope))
        if size <= tolerance * scale:
            break
        step = -slope if factor is None else -np.linalg.solve(factor, slope)
        length = 1.0
        while length > 1e-6:
            ahead = x + length * step
            new = gradient(ahead)
            if np.linalg.norm(new) < size * (0.5 if factor is None else 1 - length / 10):
                x, slope = ahead, new
                break
            length = 0.0 if factor is None else length / 2
        if length <= 1e-6:
            if factor is not None and size <= 1e-8 * scale:
                break  # rounding
            factor = hessian(x)
    return x


def _times(a: Float[np.ndarray, "k"], b: Float[np.ndarray, "k"]) -> Float[np.ndarray, "k"]:
    """a b, where inf times anything is inf."""
    known = np.isfinite(a) & np.isfinite(b)
    return np.where(known, np.where(known, a, 0) * np.where(known, b, 0), np.inf)
