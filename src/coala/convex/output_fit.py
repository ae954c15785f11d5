"""From states to a change of the output layer: ridge and rank by held-out prompts, then a fit with a certificate.

The one way in from outside; ``output_layer.py`` has the program, ``docs/derivations/output_layer.md`` the proofs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from coala.convex.output_data import OutputData
from coala.convex.output_solver import OutputLBFGS
from coala.convex.solvers import Solution, certify, solve
from coala.convex.validation import grouped_folds, rising_twice
from coala.policies import DistilStates
from coala.settings import Support
from coala.statistics.intervals import clustered, mean_estimate
from coala.values import Certificate, CoalaError, Estimate

# Ridges that are tried, as shares of the trace of the losses' Hessian at no change.
RIDGES = tuple(10.0 ** (-k / 2) for k in range(5, 14))
RANKS = (1, 2, 4, 8, 16, 32, 64)
STRENGTHS = (1.0, 1.25, 1.5, 1.75, 2.0)
PATH_TOLERANCE = 1e-2
FOLDS = 5  # one of them is held out

Progress = Callable[[str, int, "int | None", dict[str, Any]], None]
# What a change (d, d) lacks (below 0) or has beyond what is asked of it, on the prompts of these groups, held out.
Lead = Callable[[Float[np.ndarray, "d d"], Int[np.ndarray, "k"]], Estimate]


@dataclass(frozen=True)
class OutputFit:
    """A = ``left`` ``right``, (d, r) and (r, d), or ``left`` alone; what was proved of it and how it was chosen.

    ``path`` has a row for every ridge, rank and strength that was tried, with its loss on held-out prompts. A is
    ``strength`` times the change that was fitted. ``held_out`` is that change's loss there, in nats a token from no
    change, before it is taken ``strength`` times; ``None`` where nothing was held out.
    """

    left: Float[np.ndarray, "d r"]
    right: Float[np.ndarray, "r d"] | None
    ridge: float
    certificate: Certificate
    path: list[dict[str, Any]] = field(default_factory=list)
    strength: float = 1.0
    held_out: Estimate | None = None

    @property
    def change(self) -> Float[np.ndarray, "d d"]:
        return self.left if self.right is None else self.left @ self.right


def fit_output(
    states: DistilStates,
    output: Float[np.ndarray, "V d"],
    *,
    support: Support = "nucleus",
    ridge: float | None = None,
    rank: int | Literal["auto", "full"] = "auto",
    tolerance: float = 1e-3,
    seed: int = 0,
    strength: float = 1.0,
    lead: Lead | None = None,
    progress: Progress = lambda *_: None,
) -> OutputFit:
    """Fit the change of the output layer W (V, d) that makes the targets of ``states`` likeliest.

    ``ridge``, if not given, is the one of :data:`RIDGES` with the lowest loss on a fifth of the prompts that are held
    out; the ``rank`` then the smallest whose loss there is within a standard error of the lowest. A change of a rank is
    cut from the full one by its singular values, and its left factor fitted anew. The fit itself is to all prompts, to
    a certified gap of ``tolerance`` times what it gains. Over the ``vocabulary`` nothing is fitted anew after a cut.

    A ridge shrinks what it lets through. The change is taken ``strength`` times; with a ``lead`` as many times, of
    :data:`STRENGTHS`, as it takes to have what is asked of it on the held-out prompts, while its loss there is below
    that of no change; the certificate's objective is that of the change so taken.

    Raises:
        CoalaError: for widths that do not match, or states that leave nothing to fit.
    """
    data = OutputData(states, output, support)
    if isinstance(rank, int) and not 1 <= rank <= states.width:
        raise CoalaError(f"Found a rank of {rank}; expected 1 to {states.width}, 'auto' or 'full'.")
    folds = grouped_folds(states.group, FOLDS, seed)
    chooses = folds is not None and (ridge is None or rank == "auto" or lead is not None)
    path: list[dict[str, Any]] = []
    left_out: Estimate | None = None
    chosen_rank = None if rank in ("auto", "full") else int(rank)
    if chooses:
        assert folds is not None
        out = folds == 0
        unit = trace_of(data) if ridge is None else 1.0
        ridges = [unit * relative for relative in RIDGES] if ridge is None else [ridge]
        ridge, terms, kept = _choose_ridge(data, out, ridges, path, progress)
        if rank == "auto":
            chosen_rank, terms, kept = _choose_rank(data, out, ridge, terms, kept, path, progress)
        elif chosen_rank is not None:
            _, terms, kept = _at_rank(data, out, chosen_rank, ridge, kept, path)
        if lead is not None:
            strength = _choose_strength(data, out, kept, lead, path, progress)
        left_out = mean_estimate(terms, states.group[out & data.counted])
    elif ridge is None:
        # A single prompt: nothing can be held out, and the second strongest ridge is as good a guess as any.
        ridge = trace_of(data) * RIDGES[1]
    program, solver = data.problem(ridge)
    progress("fit", 0, None, {})
    solution = solve(program, solver, tolerance=tolerance)
    left, right, objective = solution.value, None, solution.objective
    own: Solution | None = None
    if chosen_rank is not None:
        left, right, own = _cut(data, solution.value, chosen_rank, ridge, tolerance)
    left = np.asarray(strength * left, np.float32)
    if chosen_rank is not None or strength != 1:
        objective = certify(program, jnp.asarray(left if right is None else left @ right))[0]
    taken = "" if chosen_rank is None else ", cut to its rank"
    taken += "" if strength == 1 else f", taken {strength:g} times"
    certificate = _certificate(data, solution, own, objective, taken, ridge, strength, tolerance, seed, bool(chooses))
    return OutputFit(left, right, ridge, certificate, path, strength, left_out)


def trace_of(data: OutputData) -> float:
    """Trace of the losses' Hessian at no change, estimated: the unit of the relative ridge."""
    program = data.program(1.0)
    metric = OutputLBFGS().init(program).metric
    trace = float(metric.left_values.sum() * metric.right_values.sum())
    return trace if trace > 0 else 1.0


def _held_out(data: OutputData, out: Bool[np.ndarray, "n"], change: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Mean excess loss of held-out steps by their weight, its standard error, and the terms of that mean."""
    used = out & data.counted
    weight = data.states.weight[used]
    terms = data.losses(change)[used] * weight / weight.mean()
    mean, error, _ = clustered(terms, data.states.group[used])
    return mean, error, terms


def _choose_ridge(
    data: OutputData, out: Bool[np.ndarray, "n"], ridges: list[float], path: list[dict[str, Any]], progress: Progress
) -> tuple[float, np.ndarray, np.ndarray]:
    """The ridge with the lowest held-out loss, down from the largest, the terms of that loss, and its change."""
    trail: list[tuple[float, np.ndarray, np.ndarray]] = []
    start = None
    for number, ridge in enumerate(ridges):
        terms, start = _at_ridge(data, out, ridge, start, path)
        trail.append((ridge, terms, start))
        progress("ridge", number + 1, len(ridges), path[-1])
        if rising_twice([row["held_out"] for row in path]):
            break
    return min(trail, key=lambda entry: entry[1].mean())


def _at_ridge(
    data: OutputData, out: Bool[np.ndarray, "n"], ridge: float, start: np.ndarray | None, path: list[dict[str, Any]]
) -> tuple[np.ndarray, np.ndarray]:
    """Held-out losses by weight and change of the fit to all other prompts, begun at ``start``."""
    program, solver = data.problem(ridge, ~out)
    begin = None if start is None else jnp.asarray(start)
    found = solve(program, solver, tolerance=PATH_TOLERANCE, exact=False, start=begin)
    loss, error, terms = _held_out(data, out, found.value)
    row = {"ridge": ridge, "rank": None, "fitted": found.objective, "held_out": loss, "se": error}
    path.append({**row, "steps": found.steps, "gap": found.gap})
    return terms, found.value


def _choose_strength(
    data: OutputData,
    out: Bool[np.ndarray, "n"],
    change: Float[np.ndarray, "d d"],
    lead: Lead,
    path: list[dict[str, Any]],
    progress: Progress,
) -> float:
    """The first of :data:`STRENGTHS` at which ``change`` has the lead; where none has it, the one that lacks least."""
    groups = np.unique(data.states.group[out & data.counted])
    found: list[tuple[float, float]] = []
    for number, strength in enumerate(STRENGTHS):
        loss, error, _ = _held_out(data, out, strength * change)
        path.append({"strength": strength, "held_out": loss, "se": error})
        if found and loss >= 0:
            break
        ahead = lead(np.asarray(strength * change, np.float32), groups)
        path[-1]["lead"] = ahead
        progress("strength", number + 1, len(STRENGTHS), path[-1])
        found.append((ahead.value, strength))
        if ahead.value >= 0:
            break
    return max(found)[1]


def _choose_rank(
    data: OutputData,
    out: Bool[np.ndarray, "n"],
    ridge: float,
    uncut: np.ndarray,
    change: np.ndarray,
    path: list[dict[str, Any]],
    progress: Progress,
) -> tuple[int | None, np.ndarray, np.ndarray]:
    """The smallest rank whose held-out loss is within a standard error of the lowest, these losses, its change.

    ``uncut`` are the held-out losses of ``change`` as it is, whose rank is None.
    """
    ranks = [rank for rank in RANKS if rank < len(change)]
    tried: list[tuple[int | None, np.ndarray, np.ndarray]] = []
    for number, rank in enumerate(ranks):
        tried.append(_at_rank(data, out, rank, ridge, change, path))
        progress("rank", number + 1, len(ranks), path[-1])
    tried.append((None, uncut, change))
    lowest = min(tried, key=lambda entry: entry[1].mean())[1]
    group = data.states.group[out & data.counted]
    for candidate, terms, cut in tried:
        mean, error, _ = clustered(terms - lowest, group)
        if mean <= error or mean <= 0:
            return candidate, terms, cut
    return None, uncut, change


def _at_rank(
    data: OutputData,
    out: Bool[np.ndarray, "n"],
    rank: int,
    ridge: float,
    change: np.ndarray,
    path: list[dict[str, Any]],
) -> tuple[int, np.ndarray, np.ndarray]:
    """The rank, its held-out losses by weight, and ``change`` cut to it by all other prompts."""
    left, right, found = _cut(data, change, rank, ridge, PATH_TOLERANCE, ~out)
    loss, error, terms = _held_out(data, out, left @ right)
    steps = {} if found is None else {"steps": found.steps, "inputs": found.value.shape[1]}
    path.append({"ridge": ridge, "rank": rank, "held_out": loss, "se": error, **steps})
    return rank, terms, left @ right


def _cut(
    data: OutputData,
    change: np.ndarray,
    rank: int,
    ridge: float,
    tolerance: float,
    used: Bool[np.ndarray, "n"] | None = None,
) -> tuple[np.ndarray, np.ndarray, Solution | None]:
    """The change cut to a rank, its left factor fitted anew to the rows of the right one: a smaller convex program."""
    left, values, right = np.linalg.svd(change)
    left, right = (left[:, :rank] * values[:rank]).astype(np.float32), right[:rank].astype(np.float32)
    if data.support == "vocabulary":
        return left, right, None
    # The rows of ``right`` are orthonormal, so that the norm of the product is that of ``left``. Columns of zeros,
    # which stay zero, let all ranks share a compiled shape.
    width = min(max(rank, RANKS[-1]), len(change))
    more = ((0, 0), (0, width - rank))
    program = data.program(ridge, used, inputs=np.pad(data.states.states @ right.T, more))
    found = solve(
        program, OutputLBFGS(), tolerance=tolerance, exact=used is None, start=jnp.asarray(np.pad(left, more))
    )
    return np.asarray(found.value[:, :rank], np.float32), right, found


def _certificate(
    data: OutputData,
    solution: Solution,
    own: Solution | None,
    objective: float,
    taken: str,
    ridge: float,
    strength: float,
    tolerance: float,
    seed: int,
    chosen: bool,
) -> Certificate:
    lower, gain = solution.objective - solution.gap, -objective
    share = (objective - lower) / gain if gain > 0 else float("inf")
    over = "the nucleus of each step" if data.support == "nucleus" else "the whole vocabulary"
    statement = (
        f"No change of the output layer gains more than {-lower:.6g} nats a step on this objective, of which this one "
        f"has {gain:.6g}" + taken + f": proved by duality over {over}, in double "
        "precision, for the states and the matrix as they are stored. It does not say that the teacher "
        "prefers the right texts."
    )
    counted, states = data.counted, data.states
    facts: dict[str, Any] = {
        "relative_gap": share,
        "relative_to": "what the change gains, f(0) - f(A)",
        "gap_of_full_change": solution.gap,
        "relative_gap_of_full_change": solution.relative_gap,
        "steps": solution.steps,
        "certificates": solution.certificates,
        "ridge": ridge,
        "strength": strength,
        "support": data.support,
        "chosen_on_held_out_prompts": chosen,
        "n_states": len(states),
        "n_counted": int(counted.sum()),
        "n_outside_nucleus": int((~states.in_nucleus).sum()),
        "n_prompts": len(np.unique(states.group[counted])),
        **data.padded,
    }
    if own is not None:
        facts |= {"gap_within_rank": own.gap, "steps_within_rank": own.steps, "inputs_within_rank": own.value.shape[1]}
        facts["certificates_within_rank"] = own.certificates
    return Certificate(
        program=f"output layer, {data.support}",
        statement=statement,
        objective=objective,
        lower_bound=lower,
        violation=0.0,
        n_patterns=0,
        status=solution.status.value,
        tolerance=tolerance,
        precision="float32 iterations, float64 certificate",
        seed=seed,
        versions={name: version(name) for name in ("jax", "jaxlib", "numpy")},
        facts=facts,
    )
