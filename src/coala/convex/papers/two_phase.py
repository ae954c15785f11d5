"""The paper's two-phase head: Phase I fits rows with the squared loss, Phase II refits the second layer to the pairs.

Kept for comparison with the paper; ``pairwise`` is the default because it is one program and predicts better.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from coala.convex.gate_sampling import sample_patterns
from coala.convex.newton import GatedNewton
from coala.convex.papers.cronos import Cronos
from coala.convex.papers.finetune import PairLoss, finetune
from coala.convex.papers.minimisers import AdamW, Minimiser
from coala.convex.papers.patterns import PatternGeneration
from coala.convex.papers.recover import GatedNetwork, ReluNetwork, recover_gated, recover_network
from coala.convex.path import SPARSITIES, PairTask, Progress
from coala.convex.program import Program, largest_sparsity
from coala.convex.solvers import Solution, solve
from coala.convex.validation import HeldOut, rising_twice
from coala.settings import PhaseOne

RIDGES = (1e-1, 1e-2, 1e-3, 1e-4)
# As published: sparsity on summed squares with the factor 1/2 of Algorithm 2, and ADMM's fixed number of steps.
PAPER_SPARSITY = 1e-3
PAPER_STEPS = 30
PAPER_RIDGE = 1e-6


@dataclass(frozen=True)
class TwoPhase:
    """The network with its second layer from Phase II, both solutions, what was chosen and the validation path.

    ``solver`` names what solved Phase I, ``n_patterns`` counts the gates it was given.
    """

    network: ReluNetwork | GatedNetwork
    phase_one: Solution
    phase_two: Solution
    solver: str
    n_patterns: int
    sparsity: float
    sparsity_relative: float | None
    ridge: float
    chosen: HeldOut | None
    path: list[dict[str, Any]]

    def blocks(self) -> tuple[Float[np.ndarray, "d"], Float[np.ndarray, "d m"], Float[np.ndarray, "d m"]]:
        """Linear block (r,), zero, and gates and weights (r, m) of the head in the coordinates of the fit."""
        network = self.network
        gates = network.gates if isinstance(network, GatedNetwork) else network.first_layer
        weights = network.first_layer * network.second_layer[:, None]
        return np.zeros(gates.shape[1]), gates.T, weights.T


@dataclass(frozen=True)
class _Rows:
    """Both sides' rows as one labelled set: X (2n, d), y (2n,) +1 chosen and -1 rejected, sampled gates (d, P)."""

    X: Float[np.ndarray, "both d"]
    y: Float[np.ndarray, "both"]
    patterns: Bool[np.ndarray, "both P"]
    gates: Float[np.ndarray, "d P"]
    dtype: Any

    @classmethod
    def of(cls, task: PairTask, n_patterns: int) -> _Rows:
        X = task.rows.reshape(-1, task.rows.shape[-1])
        y = np.concatenate([np.ones(task.n_pairs), -np.ones(task.n_pairs)])
        patterns, gates = sample_patterns(X, n_patterns, jax.random.key(task.seed))
        return cls(X, y, patterns, gates, task.dtype)

    def program(self, sparsity: float, used: Bool[np.ndarray, "n"] | None = None) -> Program:
        """The program of Phase I; ``used`` (n,) bool closes every gate on the pairs held out."""
        both = np.ones(len(self.y), bool) if used is None else np.concatenate([used, used])
        return Program(
            jnp.asarray(self.X, self.dtype),
            jnp.asarray(self.y * both, self.dtype),
            jnp.asarray(self.patterns & both[:, None]),
            jnp.asarray(sparsity, self.dtype),
        )

    def hidden(
        self, network: ReluNetwork | GatedNetwork, width: int
    ) -> tuple[Float[np.ndarray, "n k"], Float[np.ndarray, "n k"]]:
        """Activations (n, width) of both sides; zeros stand for neurons that are not there: one shape, one compile."""
        active = network.hidden(self.X)
        chosen, rejected = np.split(np.pad(active, ((0, 0), (0, max(0, width - active.shape[1])))), 2)
        return chosen, rejected

    def phase_two(
        self,
        network: ReluNetwork | GatedNetwork,
        loss: PairLoss,
        ridge: float,
        used: Bool[np.ndarray, "n"],
        minimiser: Minimiser | None = None,
    ) -> Solution:
        width = max(self.gates.shape[1], len(network.second_layer))
        first = np.pad(network.second_layer, (0, width - len(network.second_layer)))
        weight = used / used.sum()
        hidden = self.hidden(network, width)
        return finetune(first, *hidden, loss, ridge=ridge, weight=weight, minimiser=minimiser)


def fit_two_phase(
    task: PairTask,
    loss: PairLoss,
    *,
    n_patterns: int,
    tolerance: float,
    progress: Progress,
    phase_one: PhaseOne = "gated",
) -> TwoPhase:
    """Choose the sparsity of Phase I and the ridge of Phase II by held-out loss of the pairs, then fit on all.

    The choice is made with the gated relaxation, whatever solves Phase I in the end.
    """
    rows = _Rows.of(task, n_patterns)
    unit = float(largest_sparsity(rows.program(1.0).relaxation))
    unit = unit if unit > 0 else 1.0
    relative, ridge, chosen, path = _choose(task, rows, unit, loss, progress)
    program = rows.program(relative * unit)
    network: ReluNetwork | GatedNetwork
    if phase_one == "gated":
        first = solve(program.relaxation, GatedNewton(), tolerance=tolerance)
        network = recover_gated(first.value, rows.gates)
    elif phase_one == "cronos":
        first = solve(program, Cronos(), tolerance=tolerance, max_steps=3000, check_every=50)
        network = recover_network(first.value)
    else:
        trained = PatternGeneration().run(rows.X, rows.y, relative * unit, jax.random.key(task.seed))
        network = trained.network
        first = Solution(
            trained.weights, trained.status, len(trained.history), trained.objective, trained.gap, trained.history
        )
    second = rows.phase_two(network, loss, ridge, np.ones(task.n_pairs, bool))
    network = network._replace(second_layer=second.value[: len(network.second_layer)])
    return TwoPhase(
        network, first, second, phase_one, rows.gates.shape[1], relative * unit, relative, ridge, chosen, path
    )


def fit_paper(task: PairTask, loss: PairLoss, *, n_patterns: int) -> TwoPhase:
    """Both phases at the published settings: nothing is chosen, and CRONOS and AdamW stop where the papers stop.

    A trace of ridge, which the papers have not, gives Phase II a minimiser from which the distance can be told.
    """
    rows = _Rows.of(task, n_patterns)
    program = rows.program(PAPER_SPARSITY)
    first = solve(program, Cronos.paper(), max_steps=PAPER_STEPS, tolerance=1e-9, patience=None, keep="last")
    network = recover_network(first.value)
    descent = AdamW(jax.random.key(task.seed))
    second = rows.phase_two(network, loss, PAPER_RIDGE, np.ones(task.n_pairs, bool), descent)
    network = network._replace(second_layer=second.value[: len(network.second_layer)])
    count = rows.gates.shape[1]
    return TwoPhase(network, first, second, "CRONOS as published", count, PAPER_SPARSITY, None, PAPER_RIDGE, None, [])


def _choose(
    task: PairTask, rows: _Rows, unit: float, loss: PairLoss, progress: Progress
) -> tuple[float, float, HeldOut | None, list[dict[str, Any]]]:
    """Relative sparsity, ridge, how they did, and the path; defaults where nothing can be held out."""
    path: list[dict[str, Any]] = []
    relative, ridge = 0.1, RIDGES[-1]
    chosen: HeldOut | None = None
    if task.fold is None:
        return relative, ridge, chosen, path
    starts: list[np.ndarray | None] = [None] * task.n_folds
    best_losses: list[float] = []
    for number, candidate in enumerate(SPARSITIES):
        margins = {tau: np.zeros(task.n_pairs) for tau in RIDGES}
        widths, gaps = [], []
        for k in range(task.n_folds):
            out = task.fold == k
            program = rows.program(candidate * unit, ~out).relaxation
            start = starts[k]
            first = None if start is None else jnp.asarray(start)
            solution = solve(program, GatedNewton(), tolerance=1e-3, start=first, exact=False)
            starts[k] = solution.value
            network = recover_gated(solution.value, rows.gates)
            widths.append(len(network.gates))
            gaps.append(solution.relative_gap)
            active_chosen, active_rejected = rows.hidden(network, rows.gates.shape[1])
            difference = active_chosen - active_rejected
            for tau in RIDGES:
                margins[tau][out] = difference[out] @ rows.phase_two(network, loss, tau, ~out).value
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
    return relative, ridge, chosen, path
