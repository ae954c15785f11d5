"""Ways to a change of the output layer, W (h + A h + b) in place of W h, other than the distilled policy's.

``fit_by_adam`` is what LM-Steer does (arXiv:2305.12798): A by Adam to the likelihood of replies. ``fit_bias`` is the
best constant b, by the convex program of :mod:`coala.convex.output_layer` with inputs 1 in place of states.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coala.costs import Solve, output_fit_flops
from coala.policies import DistilStates
from coala.values import CoalaError, Float32

if TYPE_CHECKING:
    from torch import Tensor

    from coala.settings import Support

BATCH = 256  # states of a step of Adam


# --- Adam ------------------------------------------------------------------------------------------------------------


def fit_by_adam(
    states: DistilStates,
    output: NDArray[np.floating[Any]],
    *,
    support: Support,
    rate: float,
    epochs: int,
    batch: int = BATCH,
    ridge: float = 0.0,
    decay: bool = False,
    seed: int = 0,
    on_epoch: Callable[[int, NDArray[Any]], None] = lambda *_: None,
) -> NDArray[Any]:
    """A (d, d) by Adam from none, on the weighted cross-entropy of ``states`` over ``support`` + ridge/2 |A|^2.

    The very objective of :func:`coala.convex.output_fit.fit_output`, in the type of ``output`` W (V, d). ``on_epoch``
    is handed the number of passes and A after each. With ``decay`` the rate falls to zero by a cosine. Raises
    :class:`CoalaError` where no state takes part or A is not finite.
    """
    import torch

    W = torch.as_tensor(output)
    rows = counted_rows(states, support)
    A = torch.zeros(states.width, states.width, dtype=W.dtype, requires_grad=True)
    optimiser = torch.optim.Adam([A], lr=rate)
    total = epochs * -(-len(rows) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, total) if decay else None
    rng = np.random.default_rng(seed)
    mean_weight = float(states.weight[rows].mean())
    for epoch in range(1, epochs + 1):
        order = rng.permutation(rows) if batch < len(rows) else rows
        for first in range(0, len(order), batch):
            some = np.sort(order[first : first + batch])
            optimiser.zero_grad()
            loss = _cross_entropy(states, some, W, A, support, mean_weight) + ridge / 2 * A.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            if schedule is not None:
                schedule.step()
        if not torch.isfinite(A).all():
            raise CoalaError(f"Adam diverged at rate {rate:g}. Fix: try lower rates.")
        on_epoch(epoch, A.detach().numpy().copy())
    return A.detach().numpy().copy()


def counted_rows(states: DistilStates, support: Support) -> NDArray[np.intp]:
    """The steps that an objective over ``support`` is the mean of."""
    inside = states.in_nucleus if support == "nucleus" else np.ones(len(states), bool)
    rows = np.flatnonzero(inside & (states.weight > 0))
    if not len(rows):
        raise CoalaError("Found no step that a change could move; expected some. Fix: give more replies.")
    return rows


def mean_loss(states: DistilStates, output: NDArray[np.floating[Any]], change: NDArray[Any], support: Support) -> float:
    """The weighted mean cross-entropy of ``states`` in nats a step at A = ``change``."""
    import torch

    W, A = torch.as_tensor(output), torch.as_tensor(change)
    rows = counted_rows(states, support)
    weight = states.weight[rows]
    total = 0.0
    with torch.no_grad():
        for first in range(0, len(rows), BATCH):
            some = rows[first : first + BATCH]
            total += len(some) * float(_cross_entropy(states, some, W, A, support, 1.0))
    return total / float(weight.sum())


def _cross_entropy(
    states: DistilStates, rows: NDArray[np.intp], W: Tensor, A: Tensor, support: Support, mean_weight: float
) -> Tensor:
    """The mean over ``rows`` of weight / ``mean_weight`` times the cross-entropy of target and policy."""
    import torch

    h = torch.as_tensor(np.asarray(states.states[rows])).to(W.dtype)
    tokens = torch.as_tensor(np.asarray(states.tokens[rows]).astype(np.int64))
    target = torch.as_tensor(np.asarray(states.target[rows])).to(W.dtype)
    weight = torch.as_tensor(states.weight[rows] / mean_weight).to(W.dtype)
    moved = h + h @ A.T
    if support == "nucleus":
        logits = torch.einsum("bkd,bd->bk", W[tokens], moved)
        size = torch.as_tensor(np.asarray(states.size[rows]).astype(np.int64))
        inside = torch.arange(tokens.shape[1]) < size[:, None]
        named, total = torch.where(inside, logits, 0.0), torch.where(inside, logits, -torch.inf).logsumexp(1)
        target = torch.where(inside, target, 0.0)
    else:
        logits = moved @ W.T
        named, total = logits.gather(1, tokens), logits.logsumexp(1)
    losses: Tensor = weight * (total - (target * named).sum(1))
    return losses.mean()


# --- the best constant -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BiasFit:
    """The best constant ``bias`` (d,), its ridge, what was tried, the certified gap as a share of its gain; FLOPs."""

    bias: Float32
    ridge: float
    relative_gap: float
    path: list[dict[str, Any]]
    flops: int


def fit_bias(
    states: DistilStates, output: Float32, *, ridge: float | None = None, tolerance: float = 1e-3, seed: int = 0
) -> BiasFit:
    """The constant added to every state that makes the targets likeliest over each nucleus; ridge by held-out prompts.

    One convex program: that of a change of the output layer whose inputs are all 1.
    """
    import jax.numpy as jnp

    from coala.convex.output_data import OutputData
    from coala.convex.output_fit import FOLDS, PATH_TOLERANCE, RIDGES
    from coala.convex.output_solver import OutputLBFGS
    from coala.convex.solvers import certify, solve
    from coala.convex.validation import grouped_folds, rising_twice

    data, ones = OutputData(states, output), np.ones((len(states), 1), np.float32)
    folds = grouped_folds(states.group, FOLDS, seed)
    metric = OutputLBFGS().init(data.program(1.0, inputs=ones)).metric
    trace = float(metric.left_values.sum() * metric.right_values.sum()) or 1.0
    path: list[dict[str, Any]] = []
    if ridge is None and folds is not None:
        start: Any = None
        for relative in RIDGES:
            program = data.program(trace * relative, folds != 0, inputs=ones)
            found = solve(program, OutputLBFGS(), tolerance=PATH_TOLERANCE, exact=False, start=start)
            start = jnp.asarray(found.value)
            # At a ridge that weighs nothing the objective is the loss.
            held_out = certify(data.program(1e-30, folds == 0, inputs=ones), found.value)[0]
            path.append({"ridge": trace * relative, "held_out": held_out, "steps": found.steps})
            if rising_twice([row["held_out"] for row in path]):
                break
    chosen = min(path, key=lambda row: row["held_out"])["ridge"] if path else ridge or trace * RIDGES[1]
    solution = solve(data.program(chosen, inputs=ones), OutputLBFGS(), tolerance=tolerance)
    bias = np.asarray(solution.value[:, 0], np.float32)
    padded = data.padded
    solves = [Solve(1, 0), *(Solve(1, row["steps"], certificates=1) for row in path)]
    solves += [Solve(1, solution.steps, certificates=solution.certificates)]
    flops = output_fit_flops(padded["n_rows"], padded["n_support"], states.width, solves)
    return BiasFit(bias, chosen, solution.relative_gap, path, flops)
