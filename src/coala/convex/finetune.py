"""Phase II: the second layer refitted to preferences, a small convex problem solved to machine precision.

    min_theta sum_j weight_j loss(theta.phi(x_w,j), theta.phi(x_l,j)) + ridge/2 ||theta||^2

With separable pairs and ridge 0 there is no minimiser: ``ridge`` must be positive.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from coala.convex.linear import matmul
from coala.convex.solvers import Solution, Status
from coala.values import CoalaError


class PairLoss(Protocol):
    """A convex loss of the two scores of a pair, elementwise; a pytree, so that a new margin compiles nothing.

    ``curvature`` bounds the largest eigenvalue of its 2 x 2 Hessian.
    """

    @property
    def curvature(self) -> Any: ...
    def __call__(self, chosen: jax.Array, rejected: jax.Array) -> jax.Array: ...


@partial(jax.tree_util.register_dataclass, data_fields=["scale", "margin"], meta_fields=[])
@dataclass(frozen=True)
class Logistic:
    """softplus(margin - scale (chosen - rejected)): the Bradley-Terry reading of Eq. 6. ``margin`` a number or (n,).

    A vector margin scale log(pi_ref(y_w|x) / pi_ref(y_l|x)) is the loss with a reference model.
    """

    scale: Any = 1.0
    margin: Any = 0.0

    @property
    def curvature(self) -> Any:
        return self.scale**2 / 2  # 1/4 from softplus, times ||(1, -1)||^2 = 2

    def __call__(self, chosen: jax.Array, rejected: jax.Array) -> jax.Array:
        return jax.nn.softplus(self.margin - self.scale * (chosen - rejected))


@partial(jax.tree_util.register_dataclass, data_fields=["scale", "margin"], meta_fields=[])
@dataclass(frozen=True)
class Pointwise:
    """Eq. 9: the mean of softplus(margin - scale y score) over the chosen row, y = +1, and the rejected row, y = -1."""

    scale: Any = 1.0
    margin: Any = 0.0

    @property
    def curvature(self) -> Any:
        return self.scale**2 / 8

    def __call__(self, chosen: jax.Array, rejected: jax.Array) -> jax.Array:
        right = jax.nn.softplus(self.margin - self.scale * chosen)
        return (right + jax.nn.softplus(self.margin + self.scale * rejected)) / 2


@jax.jit
def _newton_step(
    theta: jax.Array, hidden: tuple[jax.Array, jax.Array], weight: jax.Array, loss: PairLoss, ridge: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """One damped Newton step: the new theta, and objective, ||gradient||^2 and decrement^2 at the old one."""
    chosen, rejected = hidden

    def total(scores: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.sum(weight * loss(*scores))

    def objective(theta: jax.Array) -> jax.Array:
        return total((matmul(chosen, theta), matmul(rejected, theta))) + ridge / 2 * jnp.vdot(theta, theta)

    scores = (matmul(chosen, theta), matmul(rejected, theta))
    one, zero = jnp.ones_like(scores[0]), jnp.zeros_like(scores[0])
    # The loss is separable, so the Hessian times an all-one tangent is the diagonal of each 2 x 2 block.
    (slope_c, slope_r), (bend_cc, bend_cr) = jax.jvp(jax.grad(total), (scores,), ((one, zero),))
    _, (_, bend_rr) = jax.jvp(jax.grad(total), (scores,), ((zero, one),))
    gradient = matmul(slope_c, chosen) + matmul(slope_r, rejected) + ridge * theta
    crossed = matmul((bend_cr[:, None] * chosen).T, rejected)
    hessian = (
        matmul((bend_cc[:, None] * chosen).T, chosen)
        + matmul((bend_rr[:, None] * rejected).T, rejected)
        + crossed
        + crossed.T
        + ridge * jnp.eye(len(theta), dtype=theta.dtype)
    )
    direction = -jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(hessian), gradient)
    value, decrease = objective(theta), jnp.vdot(gradient, direction)

    def too_long(t: jax.Array) -> jax.Array:
        return (objective(theta + t * direction) > value + 1e-4 * t * decrease) & (t > 1e-12)

    t = jax.lax.while_loop(too_long, lambda t: t / 2, jnp.ones((), theta.dtype))
    step = jnp.where(t > 1e-12, t, 0.0)
    return theta + step * direction, value, jnp.vdot(gradient, gradient), -decrease


def finetune(
    second_layer: np.ndarray,
    hidden_chosen: np.ndarray,
    hidden_rejected: np.ndarray,
    loss: PairLoss,
    *,
    ridge: float = 1e-4,
    weight: np.ndarray | None = None,
    tolerance: float = 1e-9,
    max_steps: int = 100,
) -> Solution:
    """Damped Newton in float64 from ``second_layer`` (m,) on hidden features (n, m) of both sides.

    ``weight`` (n,) defaults to 1/n. The certificate is ||gradient||^2 / (2 ridge), which bounds the suboptimality of
    any ridge-regularised convex loss. Stops at a gap of ``tolerance`` times the objective.

    Raises:
        CoalaError: if ``ridge`` is not positive.
    """
    if not ridge > 0:
        raise CoalaError(
            f"Phase II was given ridge={ridge}; expected a positive number. Pairs that a head can separate have no "
            "best head without it: give, say, ridge=1e-4."
        )
    n = len(hidden_chosen)
    with jax.enable_x64(True):
        theta = jnp.asarray(second_layer, jnp.float64)
        hidden = (jnp.asarray(hidden_chosen, jnp.float64), jnp.asarray(hidden_rejected, jnp.float64))
        share = jnp.full(n, 1 / max(n, 1), jnp.float64) if weight is None else jnp.asarray(weight, jnp.float64)
        loss = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), loss)
        history: list[dict[str, Any]] = []
        status = Status.MAX_STEPS
        for step in range(max_steps + 1):
            new, value, squared, decrement = _newton_step(theta, hidden, share, loss, jnp.asarray(ridge, jnp.float64))
            objective, gap = float(value), float(squared) / (2 * ridge)
            history.append({"step": step, "objective": objective, "gap": gap})
            if gap <= tolerance * abs(objective):
                status = Status.CONVERGED
                break
            if bool((new == theta).all()) or float(decrement) <= 0:
                status = Status.STALLED
                break
            if step < max_steps:
                theta = new
        return Solution(np.asarray(theta), status, step, objective, gap, history)
