"""The output-layer program: the change of a language model's last matrix that makes given targets likeliest.

    min_A  sum_t weight_t (logsumexp_{v in S_t} z_tv - sum_v target_tv z_tv)  +  ridge/2 ||A||_F^2
    z_tv = W_v . (h_t + A x_t),  the weights summing to 1

h_t are final hidden states, W the output layer, S_t the tokens over which a step's distribution is normalised, and
x_t = h_t, or fewer coordinates of it. Convex, for z is affine in A; strongly so with the ridge. Each target sums to 1,
so that a loss is the cross-entropy of the target and softmax(z_t). The objective is counted from A = 0: minus it is
what a change gains. ``docs/derivations/output_layer.md`` derives the bound. Knows no file, model or solver.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Scalar

from coala.convex.linear import matmul
from coala.convex.program import Bounds, widen
from coala.convex.pytree import pytree

Change = Float[Array, "d e"]
# One array for each part of a program, (chunks, rows, tokens).
Logits = tuple[Float[Array, "..."], ...]

CHUNK = 2048  # states of one product with A: more is no faster, and takes more memory
GATHERED = 1 << 20  # numbers of W that are gathered at once on a CPU, 4 MB in float32: they stay in cache
GATHERED_ELSEWHERE = 1 << 27


@pytree()
@dataclass(frozen=True)
class Support:
    """The states whose supports have about one size: ``tokens`` (chunks, rows, K), of which the first ``size`` count.

    ``rows`` (chunks, rows) are their numbers among the states, ``target`` (chunks, rows, K) and ``weight``
    (chunks, rows); a state of weight 0 is padding or held out. ``rest`` (chunks, rows, d), if there, is one more
    token of each state, with the logit ``rest_offset`` + rest . (h + A x): it stands for the tokens not named.
    """

    rows: Int[Array, "chunks rows"]
    tokens: Int[Array, "chunks rows K"]
    size: Int[Array, "chunks rows"]
    target: Float[Array, "chunks rows K"]
    weight: Float[Array, "chunks rows"]
    rest: Float[Array, "chunks rows d"] | None = None
    rest_offset: Float[Array, "chunks rows"] | None = None

    @property
    def inside(self) -> Array:
        """Whether each place holds a token of the support, (chunks, rows, K)."""
        return jnp.arange(self.tokens.shape[-1], dtype=self.size.dtype)[None, None] < self.size[..., None]

    def widened(self) -> Support:
        rest, offset = (None if part is None else widen(part) for part in (self.rest, self.rest_offset))
        return replace(self, target=widen(self.target), weight=widen(self.weight), rest=rest, rest_offset=offset)


@pytree()
@dataclass(frozen=True)
class OutputProgram:
    """The program above; all fields dynamic. ``states`` (N, d), ``output`` W (V, d), the states in parts by support.

    ``inputs`` (N, e) are the x_t, the states themselves unless given. States that are in no part are those whose
    loss no change can move: their support is one token.
    """

    states: Float[Array, "N d"]
    output: Float[Array, "V d"]
    parts: tuple[Support, ...]
    ridge: Scalar
    inputs: Float[Array, "N e"] | None = None

    @property
    def _inputs(self) -> Float[Array, "N e"]:
        return self.states if self.inputs is None else self.inputs

    @property
    def dtype(self) -> Any:
        return jnp.asarray(self.ridge).dtype

    def zeros(self) -> Change:
        return jnp.zeros((self.states.shape[1], self._inputs.shape[1]), self.dtype)

    # --- products ------------------------------------------------------------------------------------------------

    def logits(self, change: Change) -> tuple[Logits, Logits]:
        """The logits of no change, W_v . h_t, and how ``change`` moves them, W_v . change x_t."""
        found = [self._forward(part, change, base=True) for part in self.parts]
        return tuple(both[..., 0] for both in found), tuple(both[..., 1] for both in found)

    def moves(self, direction: Change) -> Logits:
        """W_v . direction x_t alone."""
        return tuple(self._forward(part, direction, base=False)[..., 0] for part in self.parts)

    def adjoint(self, slopes: Logits) -> Change:
        """sum_t W_S^T slopes_t x_t^T, (d, e)."""
        total = self.zeros()
        for part, given in zip(self.parts, slopes, strict=True):

            def add(total: Change, chunk: Any) -> tuple[Change, None]:
                back, x = chunk
                return total + matmul(back.T, x), None

            total = self._over_chunks(part, given, add, total)
        return total

    def factors(self, signed: Logits) -> tuple[Float[Array, "d d"], Float[Array, "e e"]]:
        """L and R whose Kronecker product is about the Hessian of the losses, of the same trace.

        ``signed`` are draws r_t of mean square weight_t (diag p_t - p_t p_t^T): see :func:`scattered`.
        L is the sum of c_t c_t^T for c_t = W_S^T r_t, R the mean of x_t x_t^T weighted by ||c_t||^2.
        """
        d, e = self.zeros().shape
        total = (jnp.zeros((d, d), self.dtype), jnp.zeros((e, e), self.dtype))

        def add(total: Any, chunk: Any) -> tuple[Any, None]:
            back, x = chunk
            return (
                total[0] + matmul(back.T, back),
                total[1] + matmul((jnp.sum(back**2, axis=1)[:, None] * x).T, x),
            ), None

        for part, given in zip(self.parts, signed, strict=True):
            total = self._over_chunks(part, given, add, total)
        left, right = total
        trace = jnp.trace(left)
        return left, right / jnp.where(trace > 0, trace, 1.0)

    def _forward(self, part: Support, change: Change, *, base: bool) -> Float[Array, "..."]:
        """(chunks, rows, tokens, 1), or 2 with the logits of no change before those of the change."""

        def of_chunk(chunk: Any) -> Float[Array, "rows k j"]:
            rows, tokens, rest, offset = chunk
            moved = matmul(self._inputs[rows].astype(self.dtype), change.T)
            final = jnp.stack([self.states[rows].astype(self.dtype), moved], axis=1) if base else moved[:, None]
            z = _gathered(self.output, "bkd,bjd->bkj", tokens, final)
            if rest is None:
                return z
            last = jnp.einsum("rd,rjd->rj", rest, final, precision="highest")
            if base:
                last = last.at[:, 0].add(offset)
            return jnp.concatenate([z, last[:, None]], axis=1)

        found: Float[Array, "..."] = jax.lax.map(of_chunk, (part.rows, part.tokens, part.rest, part.rest_offset))
        return found

    def _over_chunks(self, part: Support, slopes: Float[Array, "..."], add: Callable[..., Any], start: Any) -> Any:
        """``add`` over the chunks of a part, given W_S^T slopes_t (rows, d) and x_t (rows, e)."""
        n_tokens = part.tokens.shape[-1]

        def advance(total: Any, chunk: Any) -> Any:
            rows, tokens, rest, slope = chunk
            back = _gathered(self.output, "bkd,bk->bd", tokens, slope[:, :n_tokens])
            if rest is not None:
                back = back + slope[:, n_tokens:] * rest
            return add(total, (back, self._inputs[rows].astype(self.dtype)))

        return jax.lax.scan(advance, start, (part.rows, part.tokens, part.rest, slopes))[0]

    # --- the loss ------------------------------------------------------------------------------------------------

    def losses(self, z: Logits) -> tuple[Float[Array, "chunks rows"], ...]:
        """The cross-entropy of every state's target, (chunks, rows) of each part."""
        return tuple(_cross_entropy(part, logits) for part, logits in zip(self.parts, z, strict=True))

    def gain(self, z: Logits, base: Logits) -> Scalar:
        """sum_t weight_t times what the loss at ``z`` exceeds that at ``base`` by."""
        total = jnp.zeros((), self.dtype)
        for part, there, here in zip(self.parts, self.losses(z), self.losses(base), strict=True):
            total = total + jnp.sum(part.weight * (there - here))
        return total

    def probabilities(self, z: Logits) -> Logits:
        """softmax(z) over each support, 0 outside."""
        return tuple(
            jax.nn.softmax(jnp.where(_inside(part, logits), logits, -jnp.inf), axis=-1)
            for part, logits in zip(self.parts, z, strict=True)
        )

    def slopes(self, z: Logits) -> Logits:
        """The derivatives of the weighted losses by the logits: weight (probability - target)."""
        found = zip(self.parts, self.probabilities(z), strict=True)
        return tuple(part.weight[..., None] * (p - _like(part.target, p)) for part, p in found)

    def bounds(self, change: Change, multipliers: Any = None) -> Bounds:
        """Objective, and the dual value of the probabilities at ``change``.

        That lies ||gradient||^2 / (2 ridge) below, which is at once the bound of strong convexity.
        """
        base, moved = self.logits(change)
        z = added(base, moved)
        objective = self.gain(z, base) + self.ridge / 2 * jnp.sum(change**2)
        return self.bounds_at(objective, self.adjoint(self.slopes(z)) + self.ridge * change)

    def bounds_at(self, objective: Scalar, gradient: Change) -> Bounds:
        """:meth:`bounds` from an objective and gradient that a solver has at hand."""
        return Bounds(objective, objective - jnp.sum(gradient**2) / (2 * self.ridge))

    def in_double(self) -> OutputProgram:
        """All in float64 but states and output layer, which the products widen chunk by chunk."""
        return replace(self, parts=tuple(part.widened() for part in self.parts), ridge=widen(self.ridge))


def _inside(part: Support, logits: Float[Array, "..."]) -> Array:
    """Which of ``logits`` belong to the support, the rest among them."""
    inside = part.inside
    if logits.shape[-1] > inside.shape[-1]:
        inside = jnp.concatenate([inside, jnp.ones((*inside.shape[:-1], 1), bool)], axis=-1)
    return inside


def _like(target: Float[Array, "..."], z: Float[Array, "..."]) -> Float[Array, "..."]:
    """The target with a 0 for the rest, if there is one."""
    missing = z.shape[-1] - target.shape[-1]
    return jnp.pad(target, ((0, 0), (0, 0), (0, missing))) if missing else target


def _cross_entropy(part: Support, z: Float[Array, "..."]) -> Float[Array, "chunks rows"]:
    inside = _inside(part, z)
    total = jax.nn.logsumexp(jnp.where(inside, z, -jnp.inf), axis=-1)
    loss: Float[Array, "chunks rows"] = total - jnp.sum(jnp.where(inside, _like(part.target, z) * z, 0.0), axis=-1)
    return loss


def added(z: Logits, moved: Logits, t: Scalar | float = 1.0) -> Logits:
    """z + t moved."""
    return tuple(a + t * b for a, b in zip(z, moved, strict=True))


def scattered(program: OutputProgram, z: Logits, key: Key[Array, ""]) -> Logits:
    """Random r_t with E r_t r_t^T = weight_t (diag p_t - p_t p_t^T), p_t = softmax(z_t): see ``factors``.

    With signs e and s = sqrt(p): r = s e - p (s . e), whose covariance is that of one token drawn from p.
    """
    found = []
    for number, (part, p) in enumerate(zip(program.parts, program.probabilities(z), strict=True)):
        signs = jax.random.rademacher(jax.random.fold_in(key, number), p.shape, p.dtype)
        root = jnp.sqrt(p) * signs
        found.append(jnp.sqrt(part.weight)[..., None] * (root - p * root.sum(axis=-1, keepdims=True)))
    return tuple(found)


def _gathered(
    output: Float[Array, "V d"], product: str, tokens: Int[Array, "rows K"], per_row: Float[Array, "rows ..."]
) -> Float[Array, "rows ..."]:
    """``product`` (einsum) of the rows of ``output`` that ``tokens`` name with ``per_row``, a few states at a time."""
    rows, n_tokens = tokens.shape
    together = int(np.gcd(rows, together_of(n_tokens, output.shape[1])))

    def block(some: tuple[Array, Array]) -> Array:
        found: Array = jnp.einsum(product, output[some[0]].astype(some[1].dtype), some[1], precision="highest")
        return found

    if together == rows:
        return block((tokens, per_row))
    split = tuple(a.reshape(rows // together, together, *a.shape[1:]) for a in (tokens, per_row))
    found = jax.lax.map(block, split)
    return found.reshape(rows, *found.shape[2:])


def together_of(n_tokens: int, width: int) -> int:
    """States whose tokens are gathered at once: a power of 2."""
    most = GATHERED if jax.default_backend() == "cpu" else GATHERED_ELSEWHERE
    return 1 << int(np.clip(np.log2(max(1, most // (n_tokens * width))), 0, 11))
