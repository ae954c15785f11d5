"""The paper's two-phase head: Phase I fits rows with the squared loss, Phase II refits the second layer to the pairs.

Kept for comparison with the paper; ``pairwise`` is the default because it is one program and predicts better.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from coala.convex.finetune import PairLoss, finetune
from coala.convex.gates import sample_patterns
from coala.convex.newton import GatedNewton
from coala.convex.path import SPARSITIES, PairTask, Progress
from coala.convex.program import GatedProgram, largest_sparsity
from coala.convex.recover import GatedNetwork, Network, recover_gated
from coala.convex.solvers import Solution, solve
from coala.convex.validation import HeldOut, rising_twice

RIDGES = (1e-1, 1e-2, 1e-3, 1e-4)


@dataclass(frozen=True)
class TwoPhase:
    """The network with its second layer from Phase II, both solutions, what was chosen and the validation path.

    ``solver`` names what solved Phase I, ``n_patterns`` counts the gates it was given.
    """

    network: Network | GatedNetwork
    phase_one: Solution
    phase_two: Solution
    solver: str
    n_patterns: int
    sparsity: float
    sparsity_relative: float | None
    ridge: float
    chosen: HeldOut | None
    path: list[dict[str, Any]]

    def blocks(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Linear block (r,), zero, and gates and weights (r, m) of the head in the coordinates of the fit."""
        network = self.network
        gates = network.gates if isinstance(network, GatedNetwork) else network.first_layer
        weights = network.first_layer * network.second_layer[:, None]
        return np.zeros(gates.shape[1]), gates.T, weights.T


def fit_two_phase(task: PairTask, loss: PairLoss, *, n_patterns: int, tolerance: float, progress: Progress) -> TwoPhase:
    """Choose the sparsity of Phase I and the ridge of Phase II by held-out loss of the pairs, then fit on all."""
    rows = np.concatenate(list(task.rows))
    y = np.concatenate([np.ones(task.n_pairs), -np.ones(task.n_pairs)])
    patterns, gates = sample_patterns(rows, n_patterns, jax.random.key(task.seed))
    dtype = task.dtype
    program = GatedProgram(jnp.asarray(rows, dtype), jnp.asarray(y, dtype), jnp.asarray(patterns), jnp.ones((), dtype))
    unit = float(largest_sparsity(program))

    def phase_one(used: np.ndarray, relative: float, start: np.ndarray | None, exact: bool) -> Solution:
        both = np.concatenate([used, used])
        part = replace(
            program,
            y=jnp.asarray(y * both, dtype),
            patterns=jnp.asarray(patterns & both[:, None]),
            sparsity=jnp.asarray(relative * unit if unit > 0 else 1.0, dtype),
        )
        first = None if start is None else jnp.asarray(start)
        return solve(part, GatedNewton(), tolerance=tolerance if exact else 1e-3, start=first, exact=exact)

    def hidden(network: GatedNetwork) -> tuple[np.ndarray, np.ndarray]:
        # Columns of zeros stand for the neurons that are not there: one shape, one compilation.
        active = network.hidden(rows)
        chosen, rejected = np.split(np.pad(active, ((0, 0), (0, gates.shape[1] - active.shape[1]))), 2)
        return chosen, rejected

    def phase_two(used: np.ndarray, network: GatedNetwork, ridge: float) -> Solution:
        first = np.pad(network.second_layer, (0, gates.shape[1] - len(network.second_layer)))
        return finetune(first, *hidden(network), loss, ridge=ridge, weight=used / used.sum())

    everyone = np.ones(task.n_pairs, bool)
    path: list[dict[str, Any]] = []
    relative, ridge = 0.1, RIDGES[-1]
    chosen: HeldOut | None = None
    if task.fold is not None:
        starts: list[np.ndarray | None] = [None] * task.n_folds
        best_losses: list[float] = []
        for number, candidate in enumerate(SPARSITIES):
            margins = {tau: np.zeros(task.n_pairs) for tau in RIDGES}
            widths, gaps = [], []
            for k in range(task.n_folds):
                out = task.fold == k
                solution = phase_one(~out, candidate, starts[k], exact=False)
                starts[k] = solution.value
                network = recover_gated(solution.value, gates)
                widths.append(len(network.gates))
                gaps.append(solution.relative_gap)
                active_chosen, active_rejected = hidden(network)
                difference = active_chosen - active_rejected
                for tau in RIDGES:
                    margins[tau][out] = difference[out] @ phase_two(~out, network, tau).value
            results = {tau: HeldOut.of(margins[tau], task.margin, task.group) for tau in RIDGES}
            for tau, held_out in results.items():
                row = {"tau": tau, "gate_on": "reply", "beta_rel": candidate, "relaxation": 1.0, **held_out.row()}
                path.append({**row, "n_neurons": float(np.mean(widths)), "gap": max(gaps)})
                if chosen is None or held_out.loss < chosen.loss:
                    relative, ridge, chosen = candidate, tau, held_out
            best_losses.append(min(held_out.loss for held_out in results.values()))
            progress("sparsity", number + 1, len(SPARSITIES), path[-1])
            if rising_twice(best_losses):
                break

    first = phase_one(everyone, relative, None, exact=True)
    network = recover_gated(first.value, gates)
    second = phase_two(everyone, network, ridge)
    network = network._replace(second_layer=second.value[: len(network.gates)])
    count = gates.shape[1]
    return TwoPhase(network, first, second, "gated Newton", count, relative * unit, relative, ridge, chosen, path)
