"""Where the gates of a path come from: learnt by pattern generation, or fixed ones that were sampled.

Knows pairs and one model at a time; nothing of folds, paths or what is chosen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from coala.convex.gate_search import Search, learn_gates, search_gates
from coala.convex.pairwise import PairData, PairModel, solve_pairs

GateOn = Literal["reply", "prompt"]
# Held-out losses do not feel the last digits, so the folds are solved and searched more coarsely than the final model.
FOLD_TOLERANCE = 1e-3


class GateSource(Protocol):
    """Where the gates of a path come from: the convex program is the same."""

    @property
    def gate_on(self) -> GateOn: ...

    def unit(self, data: PairData, linear: PairModel, rng: np.random.Generator) -> float:
        """The sparsity from which on, going down, gates enter a linear model."""

    def grow(
        self, data: PairData, model: PairModel, sparsity: float, ridge: float, rng: np.random.Generator
    ) -> PairModel:
        """The model at a lower sparsity than ``model``'s."""

    def violation(self, data: PairData, model: PairModel, sparsity: float, rng: np.random.Generator) -> float:
        """What is left to gain outside the gates of the model; nan where nothing was searched."""


@dataclass(frozen=True)
class Learnt:
    """Gates by pattern generation; see :mod:`coala.convex.gate_search`.

    The final model searches just as the folds did: a more thorough search finds more gates, and the sparsity was chosen
    for fewer.
    """

    gate_on: GateOn = "reply"
    search: Search = field(default_factory=Search)

    def unit(self, data: PairData, linear: PairModel, rng: np.random.Generator) -> float:
        _, norms = search_gates(data, linear, n_starts=4 * self.search.n_starts, n_steps=40, rng=rng)
        return float(norms[0])

    def grow(
        self, data: PairData, model: PairModel, sparsity: float, ridge: float, rng: np.random.Generator
    ) -> PairModel:
        return learn_gates(
            data,
            model,
            sparsity=sparsity,
            ridge=ridge,
            search=self.search,
            rng=rng,
            tolerance=FOLD_TOLERANCE,
            exact=False,
        )

    def violation(self, data: PairData, model: PairModel, sparsity: float, rng: np.random.Generator) -> float:
        """The largest optimality violation a thorough search finds at the model, as a multiple of the sparsity."""
        _, norms = search_gates(data, model, n_starts=4 * self.search.n_starts, n_steps=40, rng=rng)
        # A search can miss the value 1 that the neurons of the model attain.
        return max(float(norms[0]) / sparsity, 1.0 if model.n_neurons else 0.0)


@dataclass(frozen=True)
class SampledGates:
    """Fixed gates (e, P): one convex program, nothing searched."""

    gates: Float[np.ndarray, "e P"]
    gate_on: GateOn = "reply"

    def unit(self, data: PairData, linear: PairModel, rng: np.random.Generator) -> float:
        program = data.program(self.gates, sparsity=1.0, ridge=1.0)
        alone = np.zeros(program.zeros().shape, data.rows.dtype)
        alone[:, 0] = linear.linear
        q = program.predict_adjoint(program.slope(program.predict(jnp.asarray(alone))))
        return float(np.linalg.norm(np.asarray(q)[:, 1:], axis=0).max(initial=0.0))

    def grow(
        self, data: PairData, model: PairModel, sparsity: float, ridge: float, rng: np.random.Generator
    ) -> PairModel:
        return solve_pairs(
            data,
            self.gates,
            sparsity=sparsity,
            ridge=ridge,
            start=self._placed(model),
            tolerance=FOLD_TOLERANCE,
            exact=False,
        )

    def violation(self, data: PairData, model: PairModel, sparsity: float, rng: np.random.Generator) -> float:
        return float("nan")

    def _placed(self, model: PairModel) -> Float[np.ndarray, "d 1+P"]:
        """The model's weights at the places of their gates among all."""
        start = np.zeros((len(model.linear), 1 + self.gates.shape[1]), model.linear.dtype)
        start[:, 0] = model.linear
        for gate, weight in zip(model.gates.T, model.weights.T, strict=True):
            start[:, 1 + int(np.abs(self.gates - gate[:, None]).sum(axis=0).argmin())] = weight
        return start
