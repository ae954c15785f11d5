"""Solvers for the convex programs and the one loop that drives them.

A solver only initialises and steps; ``solve`` owns the loop, the stopping rule and the history. The measure of
optimality belongs to the program, so every solver is judged by the same certified gap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol, TypeVar

import jax
import numpy as np

from coala.convex.program import Bounds, in_double

P = TypeVar("P")
P_contra = TypeVar("P_contra", contravariant=True)
S = TypeVar("S")


class Status(Enum):
    """How a solve ended; a stalled one has reached the precision of its arithmetic above the tolerance."""

    CONVERGED = "converged"
    STALLED = "stalled"
    MAX_STEPS = "max_steps"


class Solver(Protocol[P_contra, S]):
    """What ``solve`` drives. States are pytrees; ``solution`` gives primal weights and dual
    multipliers (or None), JAX or NumPy arrays.

    A solver whose state holds the products that a certificate needs may offer ``bounds(program, state) -> Bounds``.
    """

    def init(self, program: P_contra, start: jax.Array | None = None) -> S: ...
    def step(self, program: P_contra, state: S) -> S: ...
    def solution(self, program: P_contra, state: S) -> tuple[Any, Any]: ...


@dataclass(frozen=True)
class Solution:
    """Weights with what was proved of them: the optimal value lies in [objective - gap, objective]."""

    value: np.ndarray
    status: Status
    steps: int
    objective: float
    gap: float
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def relative_gap(self) -> float:
        """Gap over objective; 0 for an objective of 0."""
        return self.gap / self.objective if self.objective > 0 else 0.0


@jax.jit
def _bounds(program: Any, value: jax.Array, multipliers: jax.Array | None) -> Bounds:
    bounds: Bounds = program.bounds(value, multipliers)
    return bounds


def certify(program: Any, value: Any, multipliers: Any = None) -> tuple[float, float]:
    """(objective, lower bound) of a program at ``value``, computed in float64 whatever the program's own type."""
    with jax.enable_x64(True):
        objective, lower = _bounds(*in_double((program, value, multipliers)))
        return float(objective), float(lower)


def solve(
    program: P,
    solver: Solver[P, S],
    *,
    tolerance: float = 1e-4,
    max_steps: int = 100,
    check_every: int = 1,
    patience: int | None = 10,
    start: jax.Array | None = None,
    exact: bool = True,
    on_step: Callable[[int, np.ndarray, dict[str, Any]], None] | None = None,
) -> Solution:
    """Step until the certified gap is at most ``tolerance`` times the objective.

    The gap is looked at every ``check_every`` steps; each look makes a row of the history. A gap that ``patience``
    looks have not lowered by a thousandth ends the solve as stalled; None never gives up before ``max_steps``.
    With ``exact`` the last word is a certificate in float64; without it, the program's own precision is trusted. The
    lower bound is the best one seen.
    ``on_step`` gets the step, the weights and that step's history row. Never raises for want of convergence: see
    ``Solution.status``.
    """
    state = solver.init(program, start)
    own_bounds = getattr(solver, "bounds", None)
    history: list[dict[str, Any]] = []
    status, lower, stale, best = Status.MAX_STEPS, -np.inf, 0, np.inf
    witness: tuple[Any, Any] = (None, None)  # what the lower bound was computed from
    proven = -np.inf  # the best lower bound in float64
    for step in range(max_steps + 1):
        if step % check_every == 0 or step == max_steps:
            value, multipliers = solver.solution(program, state)
            if own_bounds is not None:
                objective, dual = map(float, jax.device_get(tuple(own_bounds(program, state))))
            elif value.dtype == np.float64:
                # A solver that works in float64 whatever the program's type is looked at in float64.
                objective, dual = certify(program, value, multipliers)
            else:
                objective, dual = map(float, jax.device_get(tuple(_bounds(program, value, multipliers))))
            if dual > lower:
                lower, witness = dual, (value, multipliers)
            row: dict[str, Any] = {"step": step, "objective": objective, "gap": objective - lower}
            history.append(row)
            if on_step is not None:
                on_step(step, np.asarray(value), row)
            if objective - lower <= tolerance * abs(objective):
                if exact:
                    objective, dual = certify(program, value, multipliers)
                    proven = lower = max(proven, dual)
                if objective - lower <= tolerance * abs(objective):
                    status = Status.CONVERGED
                    break
            stale = stale + 1 if objective - lower >= best * 0.999 else 0
            best = min(best, objective - lower)
            if patience is not None and stale >= patience:
                status = Status.STALLED
                break
        if step < max_steps:
            state = solver.step(program, state)
    if exact and status is not Status.CONVERGED:
        objective, dual = certify(program, value, multipliers)
        lower = max(proven, dual)
        if witness[0] is not None and witness[0] is not value:
            lower = max(lower, certify(program, *witness)[1])
    return Solution(np.asarray(value), status, step, objective, objective - lower, history)
