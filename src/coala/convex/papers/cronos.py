"""The papers' ADMM for the cone-constrained program (Algorithm 2 as it should read), returning only feasible weights.

Knows nothing of gates: a violated cone is repaired along a direction found from the patterns alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Scalar

from coala.convex.linear import NystromSketch, matmul, nystrom, nystrom_preconditioner, pcg, weighted_grams
from coala.convex.newton import GatedNewton
from coala.convex.papers.cones import interior_directions, nearest
from coala.convex.program import DualPoint, Program, gated_product, gated_product_adjoint, in_double
from coala.convex.prox import group_soft_threshold, project_orthant
from coala.convex.solvers import solve

T = TypeVar("T")


class Iterate(NamedTuple):
    """ADMM's variables and scaled duals, in coordinates in which X^T X is diagonal.

    ``u``, ``v`` and their dual ``lam`` (2, d, P); ``s`` and its dual ``nu`` (2, n, P). ``moved`` holds the lengths of
    the last changes of v and s.
    """

    u: Float[Array, "2 d P"]
    v: Float[Array, "2 d P"]
    lam: Float[Array, "2 d P"]
    s: Float[Array, "2 n P"]
    nu: Float[Array, "2 n P"]
    moved: Float[Array, "2"]


class Penalties(NamedTuple):
    """Of u = v and of G u = s."""

    copy: Scalar
    cone: Scalar


class CronosState(NamedTuple):
    """An :class:`Iterate` with what its steps need.

    ``rotated`` is the program with X V for X^T X = V diag(``spectrum``) V^T; ``rotation`` V and ``inside`` (d, P),
    directions inside the cones, are float64. ``factor`` is what the u-step of these penalties takes from a
    factorisation or a sketch, and ``overlap`` what every factorisation starts from.
    """

    iterate: Iterate
    penalties: Penalties
    factor: tuple[Array, ...]
    steps: int
    rotated: Program
    spectrum: Float[Array, "d"]
    rotation: Float[Array, "d d"]
    inside: Float[Array, "d P"]
    overlap: Float[Array, "..."] | None


@dataclass(frozen=True)
class Cronos:
    """CRONOS (Alg. 2) with scaled duals, two penalties and over-relaxation a:

        u   = argmin ||F u - y||^2/2 + copy/2 ||u - v + lam||^2 + cone/2 ||G u - s + nu||^2
        v   = prox of sparsity/copy sum_i ||.||  at  u' + lam,     u' = a u + (1 - a) v_old
        s   = max(G u' + nu, 0),                                  G u' = a G u + (1 - a) s_old
        lam = lam + u' - v,    nu = nu + G u' - s

    ``u_step`` "exact" solves for u through one factorisation of width min(n, P d); "block" and "nystrom" by
    preconditioned conjugate gradients, at most ``max_cg_steps`` to an error of (1 + step)^-1.2, with the exact diagonal
    blocks or a sketch of ``rank`` directions drawn with ``seed``. Without a ``penalty`` both start at values fitted to
    the gated solution and, with ``balance``, follow the residuals at powers of two steps.
    """

    max_steps: ClassVar[int] = 10_000
    u_step: Literal["exact", "block", "nystrom"] = "exact"
    relaxation: float = 1.6
    penalty: float | None = None
    balance: bool = True
    max_cg_steps: int = 100
    warm_start: bool = True
    rank: int = 10
    seed: int = 0

    @classmethod
    def paper(cls, max_cg_steps: int = 20) -> Cronos:
        """The published settings: penalty 0.01, rank 10, cold-started conjugate gradients cut off early, nothing else.

        What stops there is repaired like any other iterate, so its distance from the optimum can be told.
        """
        return cls("nystrom", 1.0, 0.01, balance=False, max_cg_steps=max_cg_steps, warm_start=False)

    def init(self, program: Program, start: Float[Array, "2 d P"] | None = None) -> CronosState:
        """ADMM at rest at ``start`` (2, d, P) or zero; finds penalties, rotation, factor and interior directions."""
        with jax.enable_x64(True):
            inside = interior_directions(program)
            rotated, spectrum, rotation = _rotate(program)
            overlap = self._overlap(rotated)
        dtype = program.X.dtype
        rotated, narrow_spectrum = _in_type((rotated, spectrum), dtype)
        v = program.zeros() if start is None else matmul(_in_type(rotation, dtype).T, start)
        s = project_orthant(rotated.cone(v))
        iterate = Iterate(v, v, jnp.zeros_like(v), s, jnp.zeros_like(s), jnp.zeros(2, dtype))
        state = CronosState(
            iterate, self._first_penalties(program), (), 0, rotated, narrow_spectrum, rotation, inside, overlap
        )
        return self._factored(state)

    def step(self, program: Program, state: CronosState) -> CronosState:
        iterate, penalties, factor, steps, rotated, spectrum = state[:6]
        iterate = self._iterate(rotated, spectrum, penalties, factor, iterate, steps)
        steps += 1
        state = state._replace(iterate=iterate, steps=steps)
        # Factors are dear and steps cheap: at powers of two, all factors together cost a vanishing share.
        if not self.balance or steps < 4 or steps & (steps - 1):
            return state
        penalties, iterate = _balanced(rotated, penalties, iterate)
        return self._factored(state._replace(penalties=penalties, iterate=iterate))

    def solution(self, program: Program, state: CronosState) -> tuple[Float[np.ndarray, "2 d P"], DualPoint]:
        """The feasible weights nearest to v, in float64, and ADMM's dual point: y - F u and -cone * nu >= 0.

        Bounds from the residual of u and from -cone * nu meet as soon as ADMM rests, however far v is from the cones.
        """
        with jax.enable_x64(True):
            value, residual, multipliers = _answer(
                program, state.iterate, state.penalties.cone, state.rotation, state.inside
            )
        # NumPy arrays keep their 64 bits outside the context.
        dual = DualPoint(np.asarray(residual), np.asarray(multipliers))  # type: ignore[arg-type]
        return np.asarray(value), dual

    def at_rest(self, program: Program, state: CronosState) -> bool:
        """Whether the last step changed nothing but by rounding: every relative residual of Algorithm 2 is that small.

        The residual at which it cannot get smaller is some 20 units in the last place on programs of every kind tried.
        """
        return bool(_residual(state.rotated, state.iterate) <= 64 * np.finfo(program.X.dtype).eps)

    def _first_penalties(self, program: Program) -> Penalties:
        one = jnp.ones((), program.X.dtype)
        if self.penalty is not None:
            return Penalties(self.penalty * one, self.penalty * one)
        gated = solve(program.relaxation, GatedNewton(), tolerance=1e-2, max_steps=20, exact=False)
        norms = np.linalg.norm(gated.value, axis=0)
        size = norms[norms > 0].mean() if norms.any() else 1.0
        return Penalties(one * (program.sparsity / size), one)

    def _overlap(self, rotated: Program) -> Float[Array, "..."] | None:
        """F_d^T F_d for F_d = [D_1 X ... D_P X], its diagonal blocks, or nothing, as the u-step wants."""
        n, d = rotated.X.shape
        P = rotated.patterns.shape[1]
        if self.u_step == "block":
            return weighted_grams(rotated.X, rotated.patterns.astype(rotated.X.dtype))
        if self.u_step == "exact" and P * d <= n:
            F = jnp.where(rotated.patterns[:, :, None], rotated.X[:, None, :], 0.0).reshape(n, -1)
            return matmul(F.T, F)
        return None

    def _factored(self, state: CronosState) -> CronosState:
        """The state with the factor of its penalties."""
        dtype = state.rotated.X.dtype
        if self.u_step == "nystrom":
            factor = _sketch(state.rotated, state.spectrum, state.penalties, self.rank, self.seed)
            return state._replace(factor=factor)
        with jax.enable_x64(True):
            inverse = _inverse(state.rotated, state.spectrum, state.penalties, state.overlap)
        return state._replace(factor=(_in_type(inverse, dtype),))

    @partial(jax.jit, static_argnums=0)
    def _iterate(
        self,
        program: Program,
        spectrum: Float[Array, "d"],
        penalties: Penalties,
        factor: tuple[Array, ...],
        iterate: Iterate,
        steps: Scalar,
    ) -> Iterate:
        """One step, all in rotated coordinates."""
        u, v, lam, s, nu, _ = iterate
        copy, cone = penalties
        target = program.predict_adjoint(program.y) + copy * (v - lam) + cone * program.cone_adjoint(s - nu)
        if self.u_step == "exact":
            u = exact_u_step(program, spectrum, penalties, factor[0], target)
        else:
            u = self._inexact_u_step(program, spectrum, penalties, factor, target, u, steps)
        a = self.relaxation
        relaxed, relaxed_cone = a * u + (1 - a) * v, a * program.cone(u) + (1 - a) * s
        new_v = group_soft_threshold(relaxed + lam, program.sparsity / copy)
        new_s = project_orthant(relaxed_cone + nu)
        moved = jnp.stack([jnp.linalg.norm(new_v - v), jnp.linalg.norm(new_s - s)])
        return Iterate(u, new_v, lam + relaxed - new_v, new_s, nu + relaxed_cone - new_s, moved)

    def _inexact_u_step(
        self,
        program: Program,
        spectrum: Float[Array, "d"],
        penalties: Penalties,
        factor: tuple[Array, ...],
        target: Float[Array, "2 d P"],
        u: Float[Array, "2 d P"],
        steps: Scalar,
    ) -> Float[Array, "2 d P"]:
        diagonal = _diagonal(spectrum, penalties)[:, None]

        def operator(x: Float[Array, "2 d P"]) -> Float[Array, "2 d P"]:
            return program.predict_adjoint(program.predict(x)) + diagonal[None] * x

        precondition: Callable[[Array], Array]
        if self.u_step == "block":

            def precondition(r: Float[Array, "2 d P"]) -> Float[Array, "2 d P"]:
                return _by_sum_and_difference(
                    r, lambda b: b / diagonal, lambda a: matmul(factor[0], a.T[..., None])[..., 0].T
                )
        else:
            precondition = nystrom_preconditioner(NystromSketch(*factor), penalties.copy)
        known = u if self.warm_start else jnp.zeros_like(u)
        missing = target - operator(known)
        size = jnp.linalg.norm(missing)
        tolerance = (1.0 + steps) ** -1.2 / jnp.where(size > 0, size, 1.0)
        return known + pcg(operator, missing, precondition, tolerance=tolerance, max_steps=self.max_cg_steps).value


def exact_u_step(
    program: Program,
    spectrum: Float[Array, "d"],
    penalties: Penalties,
    inverse: Float[Array, "k k"],
    target: Float[Array, "2 d P"],
) -> Float[Array, "2 d P"]:
    """(F^T F + copy I + cone G^T G)^-1 target, (2, d, P), for X^T X = diag(spectrum).

    G^T G is X^T X in every block, so the matrix is M = copy + cone spectrum, a diagonal, plus F^T F, which sees only
    (u[0] - u[1])/sqrt 2. There it is M + 2 F_d^T F_d: ``inverse`` is its inverse (P d, P d), or when n is smaller the
    (n, n) inverse of I/2 + F_d M^-1 F_d^T (Woodbury).
    """
    diagonal = _diagonal(spectrum, penalties)[:, None]
    d, P = target.shape[1:]

    def invert_difference(r: Float[Array, "d P"]) -> Float[Array, "d P"]:
        if P * d <= len(program.X):
            return matmul(inverse, r.T.reshape(-1)).reshape(P, d).T
        first = r / diagonal
        inner = matmul(inverse, gated_product(program.X, program.patterns, first))
        return jnp.asarray(first - gated_product_adjoint(program.X, program.patterns, inner) / diagonal)

    return _by_sum_and_difference(target, lambda b: b / diagonal, invert_difference)


@jax.jit
def _answer(
    program: Program, iterate: Iterate, cone: Scalar, rotation: Float[Array, "d d"], inside: Float[Array, "d P"]
) -> tuple[Float[Array, "2 d P"], Float[Array, "n"], Float[Array, "2 n P"]]:
    """The feasible weights nearest to v, y - F u, and -cone * nu, in float64."""
    program, iterate, cone = in_double((program, iterate, cone))
    u, v = matmul(rotation, jnp.stack([iterate.u, iterate.v]))
    return nearest(program, v, inside), program.y - program.predict(u), -cone * iterate.nu


@jax.jit
def _residual(program: Program, iterate: Iterate) -> Scalar:
    """The largest of the primal and dual residuals, each relative to what it is a difference of."""
    u, v, _, s, _, moved = iterate
    image, norm = program.cone(u), jnp.linalg.norm
    apart = jnp.stack([norm(u - v), norm(image - s)])
    sizes = jnp.stack([jnp.maximum(norm(u), norm(v)), jnp.maximum(norm(image), norm(s))])
    return jnp.where(sizes > 0, jnp.maximum(apart, moved) / jnp.where(sizes > 0, sizes, 1.0), 0.0).max()


def _by_sum_and_difference(
    r: Float[Array, "2 d P"], on_sum: Callable[[Array], Array], on_difference: Callable[[Array], Array]
) -> Float[Array, "2 d P"]:
    """Two maps of (d, P), applied to (r[0] + r[1])/sqrt 2 and (r[0] - r[1])/sqrt 2, and back."""
    b, a = on_sum((r[0] + r[1]) / 2), on_difference((r[0] - r[1]) / 2)
    return jnp.stack([b + a, b - a])


def _diagonal(spectrum: Float[Array, "d"], penalties: Penalties) -> Float[Array, "d"]:
    """M = copy I + cone X^T X, (d,)."""
    return jnp.asarray(penalties.copy + penalties.cone * spectrum)


@jax.jit
def _rotate(program: Program) -> tuple[Program, Float[Array, "d"], Float[Array, "d d"]]:
    """The program with X V, the eigenvalues (d,) and V, for X^T X = V diag V^T."""
    program = in_double(program)
    spectrum, rotation = jnp.linalg.eigh(matmul(program.X.T, program.X))
    return replace(program, X=matmul(program.X, rotation)), jnp.maximum(spectrum, 0.0), rotation


@jax.jit
def _inverse(
    program: Program, spectrum: Float[Array, "d"], penalties: Penalties, overlap: Float[Array, "..."] | None
) -> Float[Array, "..."]:
    """The inverse :func:`exact_u_step` asks for, or of the diagonal blocks (P, d, d), depending on ``overlap``."""
    program, spectrum, penalties = in_double((program, spectrum, penalties))
    diagonal = _diagonal(spectrum, penalties)
    if overlap is None:
        shared = program.patterns.astype(program.X.dtype)
        matrix = jnp.eye(len(program.X)) / 2 + matmul(program.X / diagonal[None], program.X.T) * matmul(
            shared, shared.T
        )
    else:
        copies = overlap.shape[-1] // len(diagonal)
        matrix = 2 * overlap + jnp.broadcast_to(jnp.diag(jnp.tile(diagonal, copies)), overlap.shape)
    inverse = jnp.linalg.inv(matrix)
    return jnp.asarray((inverse + jnp.swapaxes(inverse, -1, -2)) / 2)


@partial(jax.jit, static_argnames=("rank", "seed"))
def _sketch(
    program: Program, spectrum: Float[Array, "d"], penalties: Penalties, rank: int, seed: int
) -> tuple[Float[Array, "2 d P k"], Float[Array, "k"]]:
    """Of F^T F + cone G^T G."""
    shape = program.zeros().shape
    probes = jax.random.normal(jax.random.key(seed), (min(rank, int(np.prod(shape))), *shape), program.X.dtype)

    def operator(x: Float[Array, "2 d P"]) -> Float[Array, "2 d P"]:
        return program.predict_adjoint(program.predict(x)) + penalties.cone * spectrum[None, :, None] * x

    sketch = nystrom(operator, probes)
    return sketch.basis, sketch.values


@jax.jit
def _balanced(program: Program, penalties: Penalties, iterate: Iterate) -> tuple[Penalties, Iterate]:
    """Penalties nearer to equal relative residuals, at most ten times away, and the duals rescaled to them."""

    def factor(primal: Scalar, size: Scalar, moved: Scalar, dual: Float[Array, "..."]) -> Scalar:
        ratio = jnp.sqrt(primal * jnp.linalg.norm(dual) / (size * moved))
        return jnp.where(jnp.isfinite(ratio) & (ratio > 0), jnp.clip(ratio, 0.1, 10.0), 1.0)

    u, v, lam, s, nu, moved = iterate
    image, norm = program.cone(u), jnp.linalg.norm
    by_copy = factor(norm(u - v), jnp.maximum(norm(u), norm(v)), moved[0], lam)
    by_cone = factor(norm(image - s), jnp.maximum(norm(image), norm(s)), moved[1], nu)
    rescaled = iterate._replace(lam=lam / by_copy, nu=nu / by_cone)
    return Penalties(penalties.copy * by_copy, penalties.cone * by_cone), rescaled


def _in_type(tree: T, dtype: Any) -> T:
    """Arrays of any width, with floating numbers of ``dtype``."""

    def cast(leaf: Any) -> Any:
        return jnp.asarray(np.asarray(leaf, dtype)) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    converted: T = jax.tree.map(cast, tree)
    return converted
