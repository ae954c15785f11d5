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
from coala.convex.recover import GatedNetwork, recover_gated
from coala.convex.solvers import Solution, solve
from coala.convex.validation import HeldOut, rising_twice

RIDGES = (1e-1, 1e-2, 1e-3, 1e-4)


@dataclass(frozen=True)
class TwoPhase:
    """The network with its second layer from Phase II, both solutions, what was chosen and the validation path."""

    network: GatedNetwork
    phase_one: Solution
    phase_two: Solution
    sparsity: float
    sparsity_relative: float
    ridge: float
    chosen: dict[str, float]
    path: list[dict[str, Any]]


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
    relative, ridge, chosen_row = 0.1, RIDGES[-1], dict[str, float]()
    if task.fold is not None:
        starts: list[np.ndarray | None] = [None] * task.n_folds
        best_losses: list[float] = []
        best = np.inf
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
                chosen, rejected = hidden(network)
                difference = chosen - rejected
                for tau in RIDGES:
                    margins[tau][out] = difference[out] @ phase_two(~out, network, tau).value
            results = {tau: HeldOut.of(margins[tau], task.margin, task.group) for tau in RIDGES}
            for tau, held_out in results.items():
                row = {"tau": tau, "beta_rel": candidate, **held_out.row()}
                path.append({**row, "n_neurons": float(np.mean(widths)), "gap": max(gaps)})
                if held_out.loss < best:
                    best, relative, ridge, chosen_row = held_out.loss, candidate, tau, held_out.row()
            best_losses.append(min(held_out.loss for held_out in results.values()))
            progress("sparsity", number + 1, len(SPARSITIES), path[-1])
            if rising_twice(best_losses):
                break

    first = phase_one(everyone, relative, None, exact=True)
    network = recover_gated(first.value, gates)
    second = phase_two(everyone, network, ridge)
    network = network._replace(second_layer=second.value[: len(network.gates)])
    return TwoPhase(network, first, second, relative * unit, relative, ridge, chosen_row, path)
