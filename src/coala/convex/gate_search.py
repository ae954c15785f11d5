"""Pattern generation for the pairwise program: solve, search for the most violated gates, add them, solve again.

    a gate h stays out of the optimum iff ||q(h)|| <= sparsity,
    q(h) = sum_j dual_j (1(h.z_wj >= 0) x_wj - 1(h.z_lj >= 0) x_lj)

The weights for the gates found are certified; that no other gate would help is an estimate, by local search.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from coala.convex.gate_sampling import ascend, distinct, separate
from coala.convex.pairwise import OnStep, PairData, PairModel, solve_pairs

NEW_GATES = 4


@dataclass(frozen=True)
class Search:
    """How hard to look for gates: random starts, iterations of each, rounds of adding, neurons at most."""

    n_starts: int = 64
    n_steps: int = 20
    max_rounds: int = 3
    max_neurons: int = 16
    slack: float = 0.02


def search_gates(
    data: PairData, model: PairModel, *, n_starts: int, n_steps: int, rng: np.random.Generator
) -> tuple[Float[np.ndarray, "e k"], Float[np.ndarray, "k"]]:
    """Gates h (e, k) with large ||q(h)||, and those norms (k,), the largest first.

    Starts at random, from what the model's last search found, and from its own gates and weights. Where gates see the
    rows themselves, only gates parallel to their neuron count, ReLU neurons: gates of any direction reach larger norms,
    but heads of them do worse on new pairs.
    """
    rows = np.asarray(data.rows)
    dtype = rows.dtype
    gate_rows = None if data.gate_rows is None else np.asarray(data.gate_rows)
    chosen, rejected = model.scores(rows, gate_rows)
    margins = np.asarray(data.margin)
    dual = np.asarray(data.weight) / (1 + np.exp(np.clip(chosen - rejected - margins, -60, 60)))
    own = [model.gates] if data.gate_rows is not None else [model.weights, model.gates, -model.weights]
    if model.found is not None:
        own.append(model.found[:, : n_starts // 4])
    warm = np.concatenate(own, axis=1)[:, : n_starts // 2]
    fresh = rng.standard_normal((data.seen_by_gates.shape[-1], n_starts - warm.shape[1]))
    starts = np.concatenate([warm, fresh], axis=1)
    starts /= np.maximum(np.linalg.norm(starts, axis=0), 1e-30)
    first, signed = jnp.asarray(starts, dtype), jnp.asarray(np.stack([dual, -dual]), dtype)
    if data.gate_rows is None:
        signs = jnp.asarray(np.where(np.arange(n_starts) % 2 == 0, 1.0, -1.0), dtype)
        best, norms = ascend(data.rows, signed, first, signs, n_steps)
    else:
        best, norms = separate(data.rows, data.gate_rows, signed, first, n_steps)
    order = np.argsort(-np.asarray(norms), kind="stable")
    return np.asarray(best)[:, order], np.asarray(norms)[order]


def learn_gates(
    data: PairData,
    model: PairModel,
    *,
    sparsity: float,
    ridge: float,
    search: Search,
    rng: np.random.Generator,
    tolerance: float = 1e-4,
    exact: bool = True,
    on_step: OnStep | None = None,
) -> PairModel:
    """Pattern generation from ``model``: re-solve and add up to 4 violating gates until none is found.

    Ends when the largest violation found is at most (1 + slack) sparsity, after ``max_rounds`` or at ``max_neurons``.
    """
    gates, start = model.gates, model.stacked()
    for turn in range(search.max_rounds + 1):
        found = model.found
        model = solve_pairs(
            data, gates, sparsity=sparsity, ridge=ridge, start=start, tolerance=tolerance, exact=exact, on_step=on_step
        )
        model = replace(model, found=found)
        candidates, norms = search_gates(data, model, n_starts=search.n_starts, n_steps=search.n_steps, rng=rng)
        # A search can miss the value 1 that the neurons of the model attain.
        violation = max(float(norms[0]) / sparsity, 1.0 if model.n_neurons else 0.0)
        model = replace(model, violation=violation, found=candidates[:, :64])
        room = min(NEW_GATES, search.max_neurons - model.n_neurons)
        if violation <= 1 + search.slack or room <= 0 or turn == search.max_rounds:
            break
        new = distinct(candidates[:, norms > sparsity], model.gates, room)
        if not new.shape[1]:
            break
        gates = np.concatenate([model.gates, new], axis=1)
        start = model.stacked()
    return model
