"""The output-layer program over the whole vocabulary: a few tokens of each step named, the rest as one token.

That one token lies below what it stands for and touches it where it was taken, so that each round is a small program
(``output_layer.py``) and one product with all of W; see ``docs/derivations/output_layer.md``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Scalar

from coala.convex.linear import matmul
from coala.convex.output_layer import Change, OutputProgram, Support
from coala.convex.output_solver import OutputLBFGS
from coala.convex.program import Bounds
from coala.convex.pytree import pytree
from coala.convex.solvers import solve

LOGITS = 1 << 24  # logits of a chunk over the whole vocabulary: 64 MB in float32
LOOKS = 4  # most points looked at in a round
TOO_FAR = 0.25  # share of the slope at the start that may be left, upwards, at the end of a step
NOTHING = -1e30  # logit of a rest that has no probability


def chunk_of(vocabulary: int) -> int:
    """States whose logits over the whole vocabulary are computed at once."""
    return 1 << int(np.clip(np.log2(max(1, LOGITS // vocabulary)), 0, 11))


class Look(NamedTuple):
    """What one product with all of W tells: the mean loss, its gradient, and the rest of every state as one token."""

    loss: Scalar
    gradient: Change
    rest: Float[Array, "chunks rows d"]
    rest_offset: Float[Array, "chunks rows"]


@pytree()
@dataclass(frozen=True)
class VocabularyProgram:
    """The output-layer program with every token in every support; ``named`` has one part, the tokens that are named."""

    named: OutputProgram

    @property
    def ridge(self) -> Scalar:
        return self.named.ridge

    def zeros(self) -> Change:
        return self.named.zeros()

    def look(self, change: Change) -> Look:
        """One product with W forth and one back."""
        program, (part,) = self.named, self.named.parts
        dtype = program.dtype
        W = program.output.astype(dtype)

        def advance(total: tuple[Scalar, Change], chunk: Any) -> tuple[Any, tuple[Array, Array]]:
            rows, tokens, target, weight = chunk
            x = program._inputs[rows].astype(dtype)
            final = program.states[rows].astype(dtype) + matmul(x, change.T)
            z = matmul(final, W.T)
            normaliser = jax.nn.logsumexp(z, axis=1)
            of_target = jnp.sum(target * jnp.take_along_axis(z, tokens, axis=1), axis=1)
            p = jnp.exp(z - normaliser[:, None])
            back = matmul(p, W) - jnp.einsum("rk,rkd->rd", target, W[tokens], precision="highest")
            others = p.at[jnp.arange(len(rows), dtype=tokens.dtype)[:, None], tokens].set(0.0)
            mass = others.sum(axis=1)
            known = mass > 0
            rest = matmul(others, W) / jnp.where(known, mass, 1.0)[:, None]
            offset = jnp.log(jnp.where(known, mass, 1.0)) + normaliser - jnp.sum(rest * final, axis=1)
            loss = total[0] + jnp.sum(weight * (normaliser - of_target))
            gradient = total[1] + matmul((weight[:, None] * back).T, x)
            return (loss, gradient), (rest, jnp.where(known, offset, NOTHING))

        start = (jnp.zeros((), dtype), program.zeros())
        (loss, slope), (rest, offset) = jax.lax.scan(advance, start, (part.rows, part.tokens, part.target, part.weight))
        return Look(loss, slope + self.ridge * change, rest, offset)

    def losses(self, change: Change) -> Float[Array, "chunks rows"]:
        """The cross-entropy of every state's target, from one product with W."""
        program, (part,) = self.named, self.named.parts
        W = program.output.astype(program.dtype)

        def of_chunk(chunk: Any) -> Float[Array, "rows"]:
            rows, tokens, target = chunk
            final = program._inputs[rows].astype(program.dtype)
            z = matmul(program.states[rows].astype(program.dtype) + matmul(final, change.T), W.T)
            return jax.nn.logsumexp(z, axis=1) - jnp.sum(target * jnp.take_along_axis(z, tokens, axis=1), axis=1)

        found: Float[Array, "chunks rows"] = jax.lax.map(of_chunk, (part.rows, part.tokens, part.target))
        return found

    def loss_of_none(self) -> Scalar:
        """The mean loss of no change."""
        return jnp.sum(self.named.parts[0].weight * self.losses(self.zeros()))

    def bounds(self, change: Change, multipliers: Any = None) -> Bounds:
        """As those of :class:`~coala.convex.output_layer.OutputProgram`."""
        seen = self.look(change)
        objective = seen.loss - self.loss_of_none() + self.ridge / 2 * jnp.sum(change**2)
        return self.named.bounds_at(objective, seen.gradient)

    def with_rest(self, rest: Float[Array, "chunks rows d"], offset: Float[Array, "chunks rows"]) -> OutputProgram:
        """The small program: the tokens that are named, and one that stands for all others."""
        part: Support = replace(self.named.parts[0], rest=rest, rest_offset=offset)
        return replace(self.named, parts=(part,))

    def in_double(self) -> VocabularyProgram:
        return VocabularyProgram(self.named.in_double())


class VocabularyState(NamedTuple):
    """The change, what was seen of it, the loss of no change, and the objective."""

    change: Change
    seen: Look
    none: Scalar
    objective: Scalar


@dataclass(frozen=True)
class RestAsOne:
    """Solves the program with the rest as one token, takes the rest anew, and so on; the objective never rises."""

    max_steps: ClassVar[int] = 30

    inner: OutputLBFGS = OutputLBFGS()  # noqa: RUF009  frozen

    def init(self, program: VocabularyProgram, start: Change | None = None) -> VocabularyState:
        change = program.zeros() if start is None else start
        seen = _look(program, change)
        none = seen.loss if start is None else _loss_of_none(program)
        return self._state(program, change, seen, none)

    def _state(self, program: VocabularyProgram, change: Change, seen: Look, none: Scalar) -> VocabularyState:
        objective = seen.loss - none + program.ridge / 2 * jnp.sum(change**2)
        return VocabularyState(change, seen, none, objective)

    def solution(self, program: VocabularyProgram, state: VocabularyState) -> tuple[Change, None]:
        return state.change, None

    def bounds(self, program: VocabularyProgram, state: VocabularyState) -> Bounds:
        return program.named.bounds_at(state.objective, state.seen.gradient)

    def step(self, program: VocabularyProgram, state: VocabularyState) -> VocabularyState:
        small = program.with_rest(state.seen.rest, state.seen.rest_offset)
        gap = float(self.bounds(program, state).gap)
        # Solved to a tenth of the gap there is: more would be lost when the rest is taken anew.
        share = 0.1 * gap / max(gap, abs(float(state.objective)))
        found = solve(small, self.inner, tolerance=max(share, 1e-6), start=state.change, exact=False)
        direction, t = jnp.asarray(found.value) - state.change, 1.0
        descent = float(jnp.vdot(state.seen.gradient, direction))
        best = state
        for _ in range(LOOKS):
            change = state.change + t * direction
            new = self._state(program, change, _look(program, change), state.none)
            if float(new.objective) < float(best.objective):
                best = new
            slope = float(jnp.vdot(new.seen.gradient, direction))
            # Without the curvature of the rest the step is often too long, by up to twice.
            if not slope > TOO_FAR * abs(descent):
                break
            t *= descent / (descent - slope)
        return best


@jax.jit
def _look(program: VocabularyProgram, change: Change) -> Look:
    return program.look(change)


@jax.jit
def _loss_of_none(program: VocabularyProgram) -> Scalar:
    return program.loss_of_none()
