"""From states to the output-layer program: supports of like size together, padded to few shapes; held-out losses.

NumPy in, a program out; knows no solver.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from coala.convex.output_layer import CHUNK, Change, OutputProgram, Support, added
from coala.convex.output_solver import OutputLBFGS
from coala.convex.output_vocabulary import RestAsOne, VocabularyProgram, chunk_of
from coala.convex.solvers import Solver
from coala.policies import DistilStates
from coala.settings import Support as SupportKind
from coala.values import CoalaError

WIDTHS = (8, 24)  # tokens of a support, before all; each takes a second or two to compile
ROUND = 64  # states of a part are padded to a multiple


@dataclass(frozen=True)
class OutputData:
    """The states of a fit with the output layer W (V, d), laid out once for every ridge, fold and rank.

    Over the ``nucleus`` each step is normalised over the first ``size`` of its tokens, and steps whose target is not
    among them, or whose nucleus is one token, have no part in it. Over all of a row's tokens (``vocabulary``) every
    step takes part; what is not named is left to :mod:`coala.convex.output_vocabulary`.
    """

    states: DistilStates
    output: Float[np.ndarray, "V d"]
    support: SupportKind = "nucleus"

    def __post_init__(self) -> None:
        if self.output.shape[1] != self.states.width:
            raise CoalaError(
                f"Found states of width {self.states.width} and an output layer of width {self.output.shape[1]}; "
                "expected one width. Fix: give the output layer of the model that made the states."
            )
        if not self.counted.any():
            raise CoalaError("Found no step that a change could move; expected some. Fix: give more replies.")

    @cached_property
    def counted(self) -> Bool[np.ndarray, "n"]:
        """The steps that the objective is the mean of."""
        inside = self.states.in_nucleus if self.support == "nucleus" else np.ones(len(self.states), bool)
        return np.asarray(inside & (self.states.weight > 0))

    @cached_property
    def _rows(self) -> list[tuple[int, Int[np.ndarray, "some"]]]:
        """Width and states of each part."""
        K = self.states.tokens.shape[1]
        if self.support == "vocabulary":
            return [(K, np.flatnonzero(self.counted))]
        bounds = [1, *(width for width in WIDTHS if width < K), K]
        size = self.states.size
        found = [(high, np.flatnonzero(self.counted & (size > low) & (size <= high))) for low, high in pairwise(bounds)]
        return [(width, rows) for width, rows in found if len(rows)]

    @cached_property
    def placed(self) -> tuple[Array, Array]:
        """States and output layer on the device; on a CPU, and mapped from a file, without a copy."""
        return jax.device_put(self.states.states, may_alias=True), jax.device_put(self.output, may_alias=True)

    @property
    def padded(self) -> dict[str, int]:
        """What products are taken over: ``n_rows`` states, ``n_support`` tokens in their supports, padding included."""
        shapes = [part.tokens.shape for part in self._parts]
        rows = sum(chunks * each for chunks, each, _ in shapes)
        return {"n_rows": rows, "n_support": sum(chunks * each * k for chunks, each, k in shapes)}

    @cached_property
    def _parts(self) -> tuple[Support, ...]:
        return tuple(self._part(width, rows) for width, rows in self._rows)

    def _part(self, width: int, rows: Int[np.ndarray, "some"]) -> Support:
        most = CHUNK if self.support == "nucleus" else chunk_of(len(self.output))
        chunks = -(-len(rows) // most)
        each = -(-len(rows) // (chunks * ROUND)) * ROUND

        def laid(values: np.ndarray) -> Array:
            out = np.zeros((chunks * each, *values.shape[1:]), values.dtype)
            out[: len(rows)] = values
            return jnp.asarray(out.reshape(chunks, each, *values.shape[1:]))

        states, size = self.states, np.full(len(rows), width)
        if self.support == "nucleus":
            size = states.size[rows]
        # Padding has a support of one token, or its logsumexp would be that of nothing.
        return Support(
            laid(rows.astype(np.int32)),
            laid(states.tokens[rows, :width].astype(np.int32)),
            jnp.maximum(laid(size.astype(np.int32)), 1),
            laid(states.target[rows, :width].astype(np.float32)),
            laid(np.zeros(len(rows), np.float32)),
        )

    def program(
        self,
        ridge: float,
        used: Bool[np.ndarray, "n"] | None = None,
        inputs: Float[np.ndarray, "n e"] | None = None,
    ) -> OutputProgram:
        """The program with the steps that are ``used`` (all unless given), of the same shapes whichever they are."""
        weight = np.where(self.counted if used is None else self.counted & used, self.states.weight, 0.0)
        if not weight.sum() > 0:
            raise CoalaError("Found no step on one side of the split; expected some. Fix: give more prompts.")
        weight = weight / weight.sum()
        parts = []
        for (_, rows), part in zip(self._rows, self._parts, strict=True):
            own = np.zeros(part.weight.size, np.float32)
            own[: len(rows)] = weight[rows]
            parts.append(replace(part, weight=jnp.asarray(own.reshape(part.weight.shape))))
        given = None if inputs is None else jnp.asarray(inputs, jnp.float32)
        return OutputProgram(*self.placed, tuple(parts), jnp.asarray(ridge, jnp.float32), given)

    def problem(self, ridge: float, used: Bool[np.ndarray, "n"] | None = None) -> tuple[Any, Solver[Any, Any]]:
        """The program over the support, and the solver of it."""
        named = self.program(ridge, used)
        return (named, OutputLBFGS()) if self.support == "nucleus" else (VocabularyProgram(named), RestAsOne())

    def losses(self, change: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "n"]:
        """Per step, what its loss at ``change`` exceeds that of no change by; 0 for steps that no change moves."""
        program = self.program(1.0)
        excess = _excess if self.support == "nucleus" else _excess_of_all
        found = excess(program, jnp.asarray(change, jnp.float32))
        out = np.zeros(len(self.states))
        for (_, rows), values in zip(self._rows, found, strict=True):
            out[rows] = np.asarray(values, np.float64).reshape(-1)[: len(rows)]
        return out


@jax.jit
def _excess(program: OutputProgram, change: Change) -> Any:
    base, moved = program.logits(change)
    there, here = program.losses(added(base, moved)), program.losses(base)
    return tuple(a - b for a, b in zip(there, here, strict=True))


@jax.jit
def _excess_of_all(program: OutputProgram, change: Change) -> Any:
    whole = VocabularyProgram(program)
    there, here = whole.losses(change), whole.losses(jnp.zeros_like(change))
    return (there - here,)
