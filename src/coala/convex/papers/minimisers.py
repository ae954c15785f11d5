"""Minimisers of a second layer: damped Newton, L-BFGS, Nesterov's accelerated gradient and AdamW.

Each only initialises and steps; ``solvers.solve`` owns the loop and the program its certificate. A step costs one or
two products with the features, and the Gram matrix in Newton's case; line searches cost none, since scores are linear.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Scalar

from coala.convex.linear import matmul
from coala.convex.papers.losses import SecondLayer
from coala.convex.pytree import pytree

Weights = Float[Array, "m"]
Scores = tuple[Float[Array, "n"], ...]


class Minimiser(Protocol):
    """A solver of :class:`SecondLayer`, how often its gap is worth a look, and what it asks of a program."""

    check_every: ClassVar[int]
    patience: ClassVar[int | None]
    max_steps: ClassVar[int]
    needs_convex: ClassVar[bool]
    allows_cap: ClassVar[bool]

    def init(self, program: SecondLayer, start: Weights | None = None) -> Any: ...
    def step(self, program: SecondLayer, state: Any) -> Any: ...
    def solution(self, program: SecondLayer, state: Any) -> tuple[Weights, None]: ...


class _Solved:
    """The solution of a state that holds it as ``theta``."""

    def solution(self, program: SecondLayer, state: Any) -> tuple[Weights, None]:
        return state.theta, None


def _first(program: SecondLayer, start: Weights | None) -> Weights:
    return program.project(program.centre if start is None else start)


def _search(
    program: SecondLayer, theta: Weights, scores: Scores, direction: Weights, *, curvature: float = jnp.inf
) -> tuple[Scalar, Scores]:
    """A step length by bisection, and the scores of the direction.

    Lengths must lower the objective by 1e-4 of what the slope promises (Armijo), and leave at most the share
    ``curvature`` of a negative slope (Wolfe); without it no length above 1 is tried. 0 if none is found.
    """
    along = program.scores(direction)
    offset = theta - program.centre
    linear = program.ridge * jnp.vdot(offset, direction)
    square = program.ridge * jnp.vdot(direction, direction)

    def value_and_slope(t: Scalar) -> tuple[Scalar, Scalar]:
        loss, slope = jax.value_and_grad(
            lambda t: program.mean_loss(tuple(z + t * dz for z, dz in zip(scores, along, strict=True)))
        )(t)
        return loss + t * linear + t * t / 2 * square, slope + linear + t * square

    first, descent = value_and_slope(jnp.zeros((), theta.dtype))
    rounding = 4 * np.finfo(theta.dtype).eps * jnp.abs(first)

    class _Search(NamedTuple):
        low: Scalar
        high: Scalar
        t: Scalar
        tries: Scalar
        done: Scalar

    def look(search: _Search) -> _Search:
        t = search.t
        value, slope = value_and_slope(t)
        # Not a number is too far.
        too_far = ~(value <= first + 1e-4 * t * descent + rounding)
        too_near = ~too_far & (slope < curvature * descent)
        low, high = jnp.where(too_near, t, search.low), jnp.where(too_far, t, search.high)
        middle = jnp.where(jnp.isfinite(high), (low + high) / 2, 2 * t)
        done = ~too_far & ~too_near
        return _Search(low, high, jnp.where(done, t, middle), search.tries + 1, done)

    zero = jnp.zeros_like(first)
    start = _Search(zero, zero + jnp.inf, zero + 1, jnp.asarray(0), jnp.asarray(False))
    end = jax.lax.while_loop(lambda search: ~search.done & (search.tries < 40), look, start)
    return jnp.where(end.done, end.t, end.low), along


class MinimiserState(NamedTuple):
    theta: Weights
    scores: Scores


@dataclass(frozen=True)
class DampedNewton(_Solved):
    """Newton's method with Armijo's rule: the default. One m x m factorisation a step.

    A handful of steps, or, on pairs that can be separated, about one for each unit that their margins grow by.

    Under a cap each step minimises the quadratic model within the ball, exactly: an eigendecomposition turns the
    multiplier of the constraint into the root of a function of one variable.
    """

    check_every: ClassVar[int] = 1
    patience: ClassVar[int | None] = 5
    max_steps: ClassVar[int] = 500
    needs_convex: ClassVar[bool] = True
    allows_cap: ClassVar[bool] = True

    def init(self, program: SecondLayer, start: Weights | None = None) -> MinimiserState:
        theta = _first(program, start)
        return MinimiserState(theta, program.scores(theta))

    @partial(jax.jit, static_argnums=0)
    def step(self, program: SecondLayer, state: MinimiserState) -> MinimiserState:
        theta, scores = state
        direction = _newton_direction(program, theta, scores)
        t, along = _search(program, theta, scores, direction)
        moved = tuple(z + t * dz for z, dz in zip(scores, along, strict=True))
        return MinimiserState(program.project(theta + t * direction), moved)


def _newton_direction(program: SecondLayer, theta: Weights, scores: Scores) -> Weights:
    gradient = program.gradient(theta, scores)
    hessian = program.loss_hessian(scores)
    # A trace of damping keeps the factor of a nearly singular matrix finite.
    damping = 10 * np.finfo(theta.dtype).eps * jnp.trace(hessian)
    if program.cap is None:
        damped = hessian + (program.ridge + damping) * jnp.eye(len(theta), dtype=theta.dtype)
        newton: Weights = -jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(damped), gradient)
        return newton
    # The model's minimum u in the ball solves (H + (ridge + multiplier) I) u = target; ||u|| falls with the multiplier.
    values, vectors = jnp.linalg.eigh(hessian)
    stiffness = jnp.maximum(values, 0.0) + program.ridge + damping
    offset = theta - program.centre
    target = stiffness * matmul(offset, vectors) - matmul(gradient, vectors)
    stiffness = jnp.where(stiffness > 0, stiffness, 1.0)
    cap = program.cap

    def halve(_: Scalar, ends: tuple[Scalar, Scalar]) -> tuple[Scalar, Scalar]:
        low, high = ends
        middle = (low + high) / 2
        outside = jnp.linalg.norm(target / (stiffness + middle)) > cap
        return jnp.where(outside, middle, low), jnp.where(outside, high, middle)

    ends = (jnp.zeros_like(cap), jnp.linalg.norm(target) / cap)
    multiplier = jax.lax.fori_loop(0, 100, halve, ends)[1]
    inside = jnp.linalg.norm(target / stiffness) <= cap
    u = matmul(vectors, target / (stiffness + jnp.where(inside, 0.0, multiplier)))
    return u - offset


class LBFGSState(NamedTuple):
    """The last steps and the changes of the gradient over them, (memory, m), the newest last."""

    theta: Weights
    scores: Scores
    gradient: Weights
    steps: Float[Array, "memory m"]
    changes: Float[Array, "memory m"]


@dataclass(frozen=True)
class LBFGS(_Solved):
    """Limited-memory BFGS with a weak Wolfe line search: the default for wide layers, whose Gram matrix is dear."""

    check_every: ClassVar[int] = 10
    patience: ClassVar[int | None] = 50
    max_steps: ClassVar[int] = 10_000
    needs_convex: ClassVar[bool] = False
    allows_cap: ClassVar[bool] = False

    memory: int = 20

    def init(self, program: SecondLayer, start: Weights | None = None) -> LBFGSState:
        theta = _first(program, start)
        scores = program.scores(theta)
        none = jnp.zeros((self.memory, len(theta)), theta.dtype)
        return LBFGSState(theta, scores, program.gradient(theta, scores), none, none)

    @partial(jax.jit, static_argnums=0)
    def step(self, program: SecondLayer, state: LBFGSState) -> LBFGSState:
        theta, scores, gradient, steps, changes = state
        direction = _two_loops(gradient, steps, changes)
        t, along = _search(program, theta, scores, direction, curvature=0.9)
        moved = theta + t * direction
        new_scores = tuple(z + t * dz for z, dz in zip(scores, along, strict=True))
        new_gradient = program.gradient(moved, new_scores)
        step, change = moved - theta, new_gradient - gradient
        # Wolfe's rule makes this product positive; rounding at the optimum may not, and such a pair would do harm.
        useful = jnp.vdot(step, change) > np.finfo(theta.dtype).eps * jnp.vdot(change, change)
        steps = jnp.where(useful, jnp.roll(steps, -1, axis=0).at[-1].set(step), steps)
        changes = jnp.where(useful, jnp.roll(changes, -1, axis=0).at[-1].set(change), changes)
        return LBFGSState(moved, new_scores, new_gradient, steps, changes)


def _two_loops(gradient: Weights, steps: Float[Array, "memory m"], changes: Float[Array, "memory m"]) -> Weights:
    """Minus the inverse Hessian of the last steps, times the gradient; an empty row of zeros changes nothing."""
    products = jnp.sum(steps * changes, axis=1)
    inverse = jnp.where(products > 0, 1 / jnp.where(products > 0, products, 1.0), 0.0)
    rows = (steps, changes, inverse)

    def back(q: Weights, row: tuple[Array, ...]) -> tuple[Weights, Scalar]:
        step, change, rho = row
        share = rho * jnp.vdot(step, q)
        return q - share * change, share

    def forth(r: Weights, row: tuple[Array, ...]) -> tuple[Weights, None]:
        step, change, rho, share = row
        return r + step * (share - rho * jnp.vdot(change, r)), None

    q, shares = jax.lax.scan(back, gradient, rows, reverse=True)
    size = jnp.vdot(changes[-1], changes[-1])
    length = jnp.linalg.norm(gradient)
    first = 1 / jnp.where(length > 0, length, 1.0)
    scale = jnp.where(size > 0, products[-1] / jnp.where(size > 0, size, 1.0), first)
    return -jax.lax.scan(forth, scale * q, (*rows, shares))[0]


class NesterovState(NamedTuple):
    """``ahead`` is where the next gradient is taken; ``age`` the steps since its momentum last began at 0."""

    theta: Weights
    ahead: Weights
    age: Scalar
    smoothness: Scalar


@dataclass(frozen=True)
class Nesterov(_Solved):
    """Accelerated gradient descent with step 1 / L (Theorem 4.3), projected under the cap.

    After k steps the objective exceeds the optimum by at most 2 L ||theta_0 - theta*||^2 / (k + 1)^2. With ``restart``
    the momentum begins anew when it points uphill (O'Donoghue and Candes), which is faster once near the optimum.
    """

    check_every: ClassVar[int] = 20
    patience: ClassVar[int | None] = 200
    max_steps: ClassVar[int] = 20_000
    needs_convex: ClassVar[bool] = True
    allows_cap: ClassVar[bool] = True

    restart: bool = True

    def init(self, program: SecondLayer, start: Weights | None = None) -> NesterovState:
        theta = _first(program, start)
        return NesterovState(theta, theta, jnp.zeros_like(program.ridge), _smoothness(program))

    @partial(jax.jit, static_argnums=0)
    def step(self, program: SecondLayer, state: NesterovState) -> NesterovState:
        theta, ahead, age, smoothness = state
        gradient = program.gradient(ahead, program.scores(ahead))
        # Without features and ridge there is nothing to descend.
        moved = program.project(ahead - gradient / jnp.where(smoothness > 0, smoothness, 1.0))
        if self.restart:
            age = jnp.where(jnp.vdot(ahead - moved, moved - theta) > 0, 0.0, age)
        return NesterovState(moved, moved + age / (age + 3) * (moved - theta), age + 1, smoothness)


@jax.jit
def _smoothness(program: SecondLayer) -> Scalar:
    return program.smoothness()


class AdamWState(NamedTuple):
    """Running means of the gradient and its square, the order of this epoch's pairs, and the steps made."""

    theta: Weights
    mean: Weights
    square: Weights
    order: Int[Array, "n"]
    made: Scalar


@pytree("batch")
@dataclass(frozen=True)
class AdamW(_Solved):
    """AdamW on random batches, as the papers ran Phase II: kept for comparison, it does not reach tight tolerances.

    Each epoch visits the pairs in a new order drawn from ``key`` and leaves out an incomplete last batch. The ridge is
    part of the gradient; a ``decay`` above 0 pulls towards 0 besides and so minimises another objective.
    """

    check_every: ClassVar[int] = 100
    patience: ClassVar[int | None] = None
    max_steps: ClassVar[int] = 10_000
    needs_convex: ClassVar[bool] = False
    allows_cap: ClassVar[bool] = True

    key: Key[Array, ""]
    rate: Any = 1e-3
    decay: Any = 0.0
    betas: tuple[Any, Any] = (0.9, 0.999)
    epsilon: Any = 1e-8
    batch: int = 256

    def init(self, program: SecondLayer, start: Weights | None = None) -> AdamWState:
        theta = _first(program, start)
        zero = jnp.zeros_like(theta)
        return AdamWState(theta, zero, zero, jnp.arange(len(program.weight)), jnp.asarray(0))

    @jax.jit
    def step(self, program: SecondLayer, state: AdamWState) -> AdamWState:
        n = len(program.weight)
        size = min(self.batch, n)
        epoch, turn = jnp.divmod(state.made, max(n // max(size, 1), 1))
        order = jax.lax.cond(
            turn == 0,
            lambda order: jax.random.permutation(jax.random.fold_in(self.key, epoch), n),
            lambda order: order,
            state.order,
        )
        part = program.take(jax.lax.dynamic_slice(order, (turn * size,), (size,)))
        gradient = part.gradient(state.theta, part.scores(state.theta))
        slow, slower = self.betas
        mean = slow * state.mean + (1 - slow) * gradient
        square = slower * state.square + (1 - slower) * gradient**2
        count = state.made + 1
        unbiased = jnp.sqrt(square / (1 - slower**count)) + self.epsilon
        move = mean / (1 - slow**count) / unbiased + self.decay * state.theta
        theta = program.project(state.theta - self.rate * move)
        return AdamWState(theta.astype(state.theta.dtype), mean, square, order, count)
