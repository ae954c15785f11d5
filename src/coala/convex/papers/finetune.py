"""Phase II: the second layer refitted to preferences, a small convex problem solved to machine precision.

Checks what it is given, picks a minimiser and lets ``solvers.solve`` drive it in float64. The losses and the program
are in ``losses.py``, the minimisers in ``minimisers.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from coala.convex.papers.losses import Logistic, PairLoss, Pointwise, SecondLayer, TwoScores
from coala.convex.papers.minimisers import LBFGS, DampedNewton, Minimiser, Nesterov
from coala.convex.solvers import Solution, solve
from coala.values import CoalaError

__all__ = ["Logistic", "PairLoss", "Pointwise", "SecondLayer", "TwoScores", "default_minimiser", "finetune"]

WIDEST_GRAM = 2000


def default_minimiser(loss: PairLoss, n_neurons: int, *, capped: bool = False) -> Minimiser:
    """Newton up to 2000 neurons; above, L-BFGS or, under a cap, Nesterov; L-BFGS for a loss that is not convex."""
    if not loss.convex:
        return LBFGS()
    if n_neurons <= WIDEST_GRAM:
        return DampedNewton()
    return Nesterov() if capped else LBFGS()


def finetune(
    second_layer: Float[np.ndarray, "m"],
    hidden_chosen: Float[np.ndarray, "n m"],
    hidden_rejected: Float[np.ndarray, "n m"],
    loss: PairLoss,
    *,
    ridge: float = 1e-4,
    weight: Float[np.ndarray, "n"] | None = None,
    centre: Float[np.ndarray, "m"] | None = None,
    norm_cap: float | None = None,
    minimiser: Minimiser | None = None,
    tolerance: float = 1e-9,
    max_steps: int | None = None,
    on_step: Callable[[int, np.ndarray, dict[str, Any]], None] | None = None,
) -> Solution:
    """The best second layer (m,) for hidden features (n, m) of both sides, in float64, started from ``second_layer``.

    Minimises sum_j weight_j loss_j + ridge/2 ||theta - centre||^2, under ||theta - centre|| <= ``norm_cap`` if given;
    ``weight`` (n,) is 1/n and ``centre`` (m,) 0 unless given. Stops at a certified gap of ``tolerance`` times the
    objective (:meth:`SecondLayer.bounds`); a loss that is not convex gets no certificate, its gap is the objective.
    ``minimiser`` is :func:`default_minimiser`'s unless given, and ``max_steps`` the minimiser's.

    Raises:
        CoalaError: for shapes that do not match, values that are not finite, a ridge of 0 without a cap, or a
            minimiser that cannot treat the loss or the cap.
    """
    minimiser = minimiser or default_minimiser(loss, hidden_chosen.shape[-1], capped=norm_cap is not None)
    _validate(second_layer, hidden_chosen, hidden_rejected, loss, ridge, norm_cap, minimiser)
    with jax.enable_x64(True):
        chosen, rejected = (jnp.asarray(hidden, jnp.float64) for hidden in (hidden_chosen, hidden_rejected))
        program = SecondLayer.of(chosen, rejected, loss, ridge=ridge, weight=weight, centre=centre, cap=norm_cap)
        return solve(
            program,
            minimiser,
            tolerance=tolerance,
            max_steps=minimiser.max_steps if max_steps is None else max_steps,
            check_every=minimiser.check_every,
            patience=minimiser.patience,
            start=jnp.asarray(second_layer, jnp.float64),
            exact=False,  # the program is in float64 already
            on_step=on_step,
        )


def _validate(
    second_layer: np.ndarray,
    chosen: np.ndarray,
    rejected: np.ndarray,
    loss: PairLoss,
    ridge: float,
    norm_cap: float | None,
    minimiser: Minimiser,
) -> None:
    if chosen.ndim != 2 or chosen.shape != rejected.shape or second_layer.shape != chosen.shape[1:]:
        raise CoalaError(
            f"Phase II was given hidden features {chosen.shape} and {rejected.shape} and a second layer "
            f"{second_layer.shape}; expected (n, m), (n, m) and (m,)."
        )
    for name, array in (("chosen", chosen), ("rejected", rejected), ("second layer's", second_layer)):
        if not np.isfinite(array).all():
            raise CoalaError(f"Phase II was given {name} values that are nan or infinite; expected finite numbers.")
    if norm_cap is not None and not 0 < norm_cap < np.inf:
        raise CoalaError(f"Phase II was given norm_cap={norm_cap}; expected a positive number, or None for no cap.")
    if not (0 < ridge < np.inf or (ridge == 0 and norm_cap is not None)):
        raise CoalaError(
            f"Phase II was given ridge={ridge}; expected a positive number, or 0 with a norm_cap. Pairs that a head "
            "can separate have no best head without either: larger weights always fit them better. Give, say, "
            "ridge=1e-4."
        )
    name = type(minimiser).__name__
    if minimiser.needs_convex and not loss.convex:
        raise CoalaError(
            f"{name} certifies what it finds, and {type(loss).__name__} is not convex: a point where its gradient "
            "vanishes may be far from the best. Use Logistic or Pointwise, or descend without a certificate: "
            "minimiser=LBFGS()."
        )
    if norm_cap is not None and not minimiser.allows_cap:
        raise CoalaError(f"{name} knows no norm_cap; use DampedNewton(), Nesterov() or AdamW(key), or a ridge alone.")
