"""Solvers for the convex programs and the one loop that drives them.

A solver only initialises and steps; ``solve`` owns the loop, the stopping rule and the history. The measure of
optimality belongs to the program, so every solver is judged by the same certified gap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, Protocol, TypeVar, cast

import jax
import numpy as np
from jaxtyping import Array, Float

from coala.convex.program import Bounds, in_double

P = TypeVar("P")
P_contra = TypeVar("P_contra", contravariant=True)
S = TypeVar("S")

MAX_STEPS = 100  # of solvers that close in quadratically, as Newton's method does


class Status(Enum):
    """How a solve ended; a stalled one has ceased to move above the tolerance: its arithmetic allows no more."""

    CONVERGED = "converged"
    STALLED = "stalled"
    MAX_STEPS = "max_steps"


class Solver(Protocol[P_contra, S]):
    """What ``solve`` drives. States are pytrees; ``solution`` gives primal weights and dual
    multipliers (or None), JAX or NumPy arrays.

    A solver whose state holds the products that a certificate needs may offer ``bounds(program, state) -> Bounds``;
    one whose gap may stand still for long before it falls, ``at_rest(program, state) -> bool``.
    """

    def init(self, program: P_contra, start: Float[Array, "..."] | None = None) -> S: ...
    def step(self, program: P_contra, state: S) -> S: ...
    def solution(self, program: P_contra, state: S) -> tuple[Any, Any]: ...


@dataclass(frozen=True)
class Solution:
    """Weights with what was proved of them: the optimal value lies in [objective - gap, objective].

    ``certificates`` were computed in float64 on the way.
    """

    value: Float[np.ndarray, "..."]
    status: Status
    steps: int
    objective: float
    gap: float
    history: list[dict[str, Any]] = field(default_factory=list)
    certificates: int = 0

    @property
    def relative_gap(self) -> float:
        """Gap over the size of the objective; 0 for an objective of 0."""
        return self.gap / abs(self.objective) if self.objective else 0.0


@jax.jit
def _bounds(program: Any, value: Float[Array, "..."], multipliers: Any) -> Bounds:
    bounds: Bounds = program.bounds(value, multipliers)
    return bounds


@jax.jit
def _bounds_in_double(program: Any, value: Float[Array, "..."], multipliers: Any) -> Bounds:
    # Widened inside: outside, each shape of each part would compile a conversion of its own.
    return cast(Bounds, _bounds(*in_double((program, value, multipliers))))


def certify(program: Any, value: Any, multipliers: Any = None) -> tuple[float, float]:
    """(objective, lower bound) of a program at ``value``, computed in float64 whatever the program's own type."""
    with jax.enable_x64(True):
        objective, lower = _bounds_in_double(program, value, multipliers)
        return float(objective), float(lower)


def solve(
    program: P,
    solver: Solver[P, S],
    *,
    tolerance: float = 1e-4,
    max_steps: int | None = None,
    check_every: int = 1,
    patience: int | None = 10,
    start: Float[Array, "..."] | None = None,
    exact: bool = True,
    keep: Literal["best", "last"] = "best",
    on_step: Callable[[int, np.ndarray, dict[str, Any]], None] | None = None,
) -> Solution:
    """Step until the certified gap is at most ``tolerance`` times the objective.

    The gap is looked at every ``check_every`` steps; each look makes a row of the history. Both bounds are the best
    seen, and ``keep`` says whose weights are returned: the best or the last looked at.
    A solve ends as stalled when the gap has not fallen by a thousandth during the last ``patience`` looks, nor during
    the second half of all looks, which any method that closes in like 1/k survives, and the solver, if it can tell, is
    at rest. None never gives up before ``max_steps``.
    ``max_steps`` is the solver's own unless given: 100 for Newton's kind, thousands for ADMM.
    With ``exact`` the last word is a certificate in float64; without it, the program's own precision is trusted.
    ``on_step`` gets the step, the weights and that step's history row. Never raises for want of convergence: see
    ``Solution.status``.
    """
    max_steps = int(getattr(solver, "max_steps", MAX_STEPS)) if max_steps is None else max_steps
    state = solver.init(program, start)
    own_bounds, at_rest = getattr(solver, "bounds", None), getattr(solver, "at_rest", None)
    history: list[dict[str, Any]] = []
    status, objective, lower = Status.MAX_STEPS, np.inf, -np.inf
    kept: Any = None  # weights and multipliers of ``objective``
    witness: tuple[Any, Any] = (None, None)  # what the lower bound was computed from
    proven = -np.inf  # the best lower bound in float64
    certificates = 0
    lowest, lowest_at = np.inf, 0  # the gap, and the look that lowered it by a thousandth last
    for step in range(max_steps + 1):
        if step % check_every == 0 or step == max_steps:
            value, multipliers = solver.solution(program, state)
            if own_bounds is not None:
                here, dual = map(float, jax.device_get(tuple(own_bounds(program, state))))
            elif value.dtype == np.float64:
                # A solver that works in float64 whatever the program's type is looked at in float64.
                here, dual = certify(program, value, multipliers)
            else:
                here, dual = map(float, jax.device_get(tuple(_bounds(program, value, multipliers))))
            if kept is None or keep == "last" or not here >= objective:
                kept, objective = (value, multipliers), here
            if dual > lower:
                lower, witness = dual, (value, multipliers)
            row: dict[str, Any] = {"step": step, "objective": here, "gap": here - lower}
            history.append(row)
            if on_step is not None:
                on_step(step, np.asarray(value), row)
            if objective - lower <= tolerance * abs(objective):
                if exact:
                    objective, dual = certify(program, *kept)
                    proven, certificates = max(proven, dual), certificates + 1
                    if objective - proven > tolerance * abs(objective) and witness[0] is not kept[0]:
                        proven, certificates = max(proven, certify(program, *witness)[1]), certificates + 1
                    lower = proven
                if objective - lower <= tolerance * abs(objective):
                    status = Status.CONVERGED
                    break
            if objective - lower < lowest and not objective - lower > 0.999 * lowest:
                lowest, lowest_at = objective - lower, len(history)
            stale = patience is not None and len(history) - lowest_at >= max(patience, lowest_at)
            if stale and (at_rest is None or at_rest(program, state)):
                status = Status.STALLED
                break
        if step < max_steps:
            state = solver.step(program, state)
    if exact and status is not Status.CONVERGED:
        objective, dual = certify(program, *kept)
        lower, certificates = max(proven, dual), certificates + 1
        if witness[0] is not None and witness[0] is not kept[0]:
            lower, certificates = max(lower, certify(program, *witness)[1]), certificates + 1
    return Solution(np.asarray(kept[0]), status, step, objective, objective - lower, history, certificates)
