"""Losses of the two scores of a pair, and the program they make of a network's second layer.

    min_theta sum_j weight_j loss_j(theta.phi(x_w,j), theta.phi(x_l,j)) + ridge/2 ||theta - centre||^2
    subject to ||theta - centre|| <= cap, if there is one

Knows nothing of how the hidden features phi came about, nor of how the program is solved.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Scalar

from coala.convex.linear import matmul
from coala.convex.program import Bounds
from coala.convex.pytree import pytree

BLOCK = 2048


class PairLoss(Protocol):
    """A non-negative loss of the two scores of a pair, elementwise; a pytree, so that a new margin compiles nothing.

    ``curvature`` bounds the absolute eigenvalues of its 2 x 2 Hessian. A ``shift_invariant`` loss sees only the
    difference of the scores. One that is not ``convex`` can be descended but not certified.
    """

    @property
    def curvature(self) -> Any: ...
    @property
    def convex(self) -> bool: ...
    @property
    def shift_invariant(self) -> bool: ...
    def __call__(self, chosen: Float[Array, "*shape"], rejected: Float[Array, "*shape"]) -> Float[Array, "*shape"]: ...


@pytree()
@dataclass(frozen=True)
class Logistic:
    """softplus(margin - scale (chosen - rejected)): the Bradley-Terry reading of Eq. 6. ``margin`` a number or (n,)."""

    convex: ClassVar[bool] = True
    shift_invariant: ClassVar[bool] = True

    scale: Any = 1.0
    margin: Any = 0.0

    @classmethod
    def with_reference(cls, log_ratio: Any, scale: Any = 1.0) -> Logistic:
        """DPO's loss: the margin is scale times the reference's log pi(chosen) - log pi(rejected), (n,).

        -log sigma(scale (log pi(chosen)/pi_ref(chosen) - log pi(rejected)/pi_ref(rejected))) with scores for log pi:
        what the reference prefers already must be preferred by that much more (CVX-DPO; its Eq. 7 misprints the sign).
        """
        return cls(scale, scale * log_ratio)

    @property
    def curvature(self) -> Any:
        return self.scale**2 / 2  # 1/4 from softplus, times ||(1, -1)||^2 = 2

    def __call__(self, chosen: Float[Array, "*shape"], rejected: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return jax.nn.softplus(self.margin - self.scale * (chosen - rejected))


@pytree()
@dataclass(frozen=True)
class Pointwise:
    """Eq. 9: the mean of softplus(margin - scale y score) over the chosen row, y = +1, and the rejected row, y = -1."""

    convex: ClassVar[bool] = True
    shift_invariant: ClassVar[bool] = False

    scale: Any = 1.0
    margin: Any = 0.0

    @property
    def curvature(self) -> Any:
        return self.scale**2 / 8

    def __call__(self, chosen: Float[Array, "*shape"], rejected: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        right = jax.nn.softplus(self.margin - self.scale * chosen)
        return (right + jax.nn.softplus(self.margin + self.scale * rejected)) / 2


@pytree()
@dataclass(frozen=True)
class TwoScores:
    """Eq. 8 read literally, each reply with a probability of its own, pi = sigma(score):

    softplus(margin - scale (log sigma(chosen) - log sigma(rejected))). Not convex: its Hessian has eigenvalues near
    -scale/4 where the chosen reply is hopeless. Eq. 9 follows from Eq. 8 only if pi(rejected) = 1 - pi(chosen).
    """

    convex: ClassVar[bool] = False
    shift_invariant: ClassVar[bool] = False

    scale: Any = 1.0
    margin: Any = 0.0

    @property
    def curvature(self) -> Any:
        return self.scale**2 / 2 + self.scale / 4

    def __call__(self, chosen: Float[Array, "*shape"], rejected: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        log_odds = jax.nn.log_sigmoid(chosen) - jax.nn.log_sigmoid(rejected)
        return jax.nn.softplus(self.margin - self.scale * log_odds)


@pytree()
@dataclass(frozen=True)
class SecondLayer:
    """The program above; all fields dynamic. Weights are theta (m,).

    ``sides``: hidden features (m, n) of the chosen and of the rejected replies or, for a shift-invariant loss, their
    difference alone. ``weight`` (n,), not negative; ``centre`` (m,); ``cap`` a number, or None for no constraint.
    ``ridge`` must be positive unless there is a cap: pairs that a head can separate have no best head without either.
    """

    sides: tuple[Float[Array, "m n"], ...]
    loss: PairLoss
    weight: Float[Array, "n"]
    ridge: Scalar
    centre: Float[Array, "m"]
    cap: Scalar | None = None

    @classmethod
    def of(
        cls,
        chosen: Float[Array, "n m"],
        rejected: Float[Array, "n m"],
        loss: PairLoss,
        *,
        ridge: Any,
        weight: Any = None,
        centre: Any = None,
        cap: Any = None,
    ) -> SecondLayer:
        """The program of hidden features (n, m) of both sides; ``weight`` is 1/n and ``centre`` 0 unless given."""
        n, m = chosen.shape
        dtype = chosen.dtype
        return cls(
            _sides(chosen, rejected, loss.shift_invariant),
            jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), loss),
            jnp.full(n, 1 / max(n, 1), dtype) if weight is None else jnp.asarray(weight, dtype),
            jnp.asarray(ridge, dtype),
            jnp.zeros(m, dtype) if centre is None else jnp.asarray(centre, dtype),
            None if cap is None else jnp.asarray(cap, dtype),
        )

    def take(self, pairs: Int[Array, "b"]) -> SecondLayer:
        """The program of some pairs (b,), whose weights grow by n / b: drawn at random, an unbiased estimate."""
        n = len(self.weight)
        loss = jax.tree.map(lambda leaf: leaf[pairs] if leaf.ndim else leaf, self.loss)
        sides = tuple(side[:, pairs] for side in self.sides)
        weight = self.weight[pairs] * (n / max(len(pairs), 1))
        return SecondLayer(sides, loss, weight, self.ridge, self.centre, self.cap)

    def scores(self, theta: Float[Array, "m"]) -> tuple[Float[Array, "n"], ...]:
        """What the loss sees, (n,) for each side; linear in theta."""
        return tuple(matmul(theta, side) for side in self.sides)

    def mean_loss(self, scores: tuple[Float[Array, "n"], ...]) -> Scalar:
        # A shift-invariant loss takes the difference for the score of the chosen reply.
        chosen, rejected = scores if len(scores) == 2 else (scores[0], jnp.zeros_like(scores[0]))
        return jnp.sum(self.weight * self.loss(chosen, rejected))

    def slope(self, scores: tuple[Float[Array, "n"], ...]) -> tuple[Float[Array, "n"], ...]:
        """Derivatives of :meth:`mean_loss` by the scores."""
        slope: tuple[Float[Array, "n"], ...] = jax.grad(self.mean_loss)(scores)
        return slope

    def pull_back(self, slope: tuple[Float[Array, "n"], ...]) -> Float[Array, "m"]:
        """The adjoint of :meth:`scores`, (m,)."""
        return jnp.stack([matmul(side, z) for side, z in zip(self.sides, slope, strict=True)]).sum(axis=0)

    def objective(self, theta: Float[Array, "m"]) -> Scalar:
        """The value of the program at theta, which need not lie under the cap."""
        return self.mean_loss(self.scores(theta)) + self.ridge / 2 * jnp.sum((theta - self.centre) ** 2)

    def gradient(self, theta: Float[Array, "m"], scores: tuple[Float[Array, "n"], ...]) -> Float[Array, "m"]:
        return self.pull_back(self.slope(scores)) + self.ridge * (theta - self.centre)

    def loss_hessian(self, scores: tuple[Float[Array, "n"], ...]) -> Float[Array, "m m"]:
        """The Hessian of the loss without the ridge, (m, m), positive semi-definite; for convex losses.

        The 2 x 2 Hessian of each pair is factored, L L^T, which leaves one Gram matrix for each side.
        """
        # The loss is separable: a Hessian product with ones on one side holds one column of every pair's Hessian.
        columns = [
            jax.jvp(self.slope, (scores,), (tuple(jnp.full_like(z, float(k == i)) for k, z in enumerate(scores)),))[1]
            for i in range(len(scores))
        ]
        first = jnp.sqrt(jnp.maximum(columns[0][0], 0.0))
        if len(scores) == 1:
            return gram(first[None] * self.sides[0])
        crossed = jnp.where(first > 0, columns[0][1] / jnp.where(first > 0, first, 1.0), 0.0)
        second = jnp.sqrt(jnp.maximum(columns[1][1] - crossed**2, 0.0))
        chosen, rejected = self.sides
        return gram(first[None] * chosen + crossed[None] * rejected) + gram(second[None] * rejected)

    def smoothness(self) -> Scalar:
        """A Lipschitz constant of the gradient: curvature times the largest eigenvalue of the features' Gram matrix."""
        root = jnp.sqrt(self.weight)[None]
        total = jnp.stack([gram(root * side) for side in self.sides]).sum(axis=0)
        # Along a difference the 2 x 2 Hessian [[a, -a], [-a, a]] bends by a, half its eigenvalue.
        share = self.loss.curvature / (2 if self.loss.shift_invariant else 1)
        bound: Scalar = share * jnp.linalg.eigvalsh(total)[-1] + self.ridge
        return bound

    def project(self, theta: Float[Array, "m"]) -> Float[Array, "m"]:
        """The nearest weights under the cap."""
        if self.cap is None:
            return theta
        offset = theta - self.centre
        length = jnp.linalg.norm(offset)
        return jnp.where(length > self.cap, self.centre + offset * (self.cap / jnp.maximum(length, self.cap)), theta)

    def bounds(self, theta: Float[Array, "m"], multipliers: Array | None = None) -> Bounds:
        """Objective, and the minimum of the program with the loss replaced by its tangent at theta.

        With u = theta - centre, g the gradient of the loss and u' = -g / max(ridge, ||g|| / cap), where the tangent
        program has its minimum,

            gap = <g + ridge (u + u') / 2, u - u'>.

        Without a cap that is ||gradient||^2 / (2 ridge), and also the Fenchel duality gap at the dual point a_j = the
        slope of the loss; with a cap and ridge 0 it is <g, u> + cap ||g||. Written thus nothing cancels. A loss that is
        not convex has no tangent below it: all that is known is that it is not negative.
        """
        scores = self.scores(theta)
        u = theta - self.centre
        objective = self.mean_loss(scores) + self.ridge / 2 * jnp.vdot(u, u)
        if not self.loss.convex:
            return Bounds(objective, jnp.zeros_like(objective))
        g = self.pull_back(self.slope(scores))
        stiffness = self.ridge if self.cap is None else jnp.maximum(self.ridge, jnp.linalg.norm(g) / self.cap)
        best = -g / jnp.where(stiffness > 0, stiffness, 1.0)
        return Bounds(objective, objective - jnp.vdot(g + self.ridge * (u + best) / 2, u - best))


def gram(rows: Float[Array, "m n"]) -> Float[Array, "m m"]:
    """rows rows^T, (m, m), of (m, n) in blocks of columns that stay in the cache of a CPU."""
    m, n = rows.shape
    if n < BLOCK:
        return matmul(rows, rows.T)

    def add(i: Scalar, total: Float[Array, "m m"]) -> Float[Array, "m m"]:
        part = jax.lax.dynamic_slice(rows, (0, i * BLOCK), (m, BLOCK))
        return total + matmul(part, part.T)

    rest = rows[:, n // BLOCK * BLOCK :]
    total: Float[Array, "m m"] = jax.lax.fori_loop(0, n // BLOCK, add, matmul(rest, rest.T))
    return total


@partial(jax.jit, static_argnums=2)
def _sides(
    chosen: Float[Array, "n m"], rejected: Float[Array, "n m"], shift_invariant: bool
) -> tuple[Float[Array, "m n"], ...]:
    # A row for each feature: the weighted Gram matrix, which is the cost, runs several times faster on long rows.
    return ((chosen - rejected).T,) if shift_invariant else (chosen.T, rejected.T)
