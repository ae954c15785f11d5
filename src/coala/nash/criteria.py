"""When a method converges: its linearisation at a Nash strategy, in closed form, and what that says of the settings.

Around a Nash strategy p a small deviation of log-probabilities moves as a product of rotations. Their angular speeds
are the frequencies lambda of the game, i lambda the eigenvalues of B D with B = P - 1/2 and D = diag(p) - p p^T. Each
method multiplies the deviation of frequency lambda by a complex factor; it converges locally iff the modulus is below
1 for every lambda > 0. A linearisation: necessary at the Nash strategy, no global proof.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float64

from coala.nash.game import Matrix, Vector

Modes = Float64[np.ndarray, "modes"]  # frequencies, ascending
NO_SLOWER = 1e-9  # frequencies below this share of a payoff are directions along a segment of Nash strategies


@dataclass(frozen=True)
class Note:
    """A remark on the settings: a ``warning`` (they will not converge) or an ``information``; says what to do."""

    level: Literal["warning", "information"]
    text: str

    def __str__(self) -> str:
        return f"{self.level}: {self.text}"


def frequencies(P: Matrix, p: Vector) -> Modes:
    """The lambda > 0, ascending, of a game (n, n) at the strategy p (n,); empty at a pure strategy.

    With D = F F^T, F = diag(sqrt p)(I - sqrt p sqrt p^T), the eigenvalues of B D are those of F^T B F, which is
    antisymmetric: they come out imaginary to rounding. Answers that p does not play are left out.
    """
    rows = p > 0
    root = np.sqrt(p[rows])
    centred = np.eye(len(root)) - np.outer(root, root)
    inside = ((P - P.T) / 2)[np.ix_(rows, rows)]
    turned = centred @ (root[:, None] * inside * root) @ centred
    values = np.linalg.eigvalsh(1j * (turned - turned.T) / 2)
    return values[values > NO_SLOWER]


def inner_limit(tau: float, fastest: float) -> float:
    """Largest eta with which the inner loop converges locally: (1 - eta tau)^2 + (eta lambda)^2 < 1."""
    return 2 * tau / (tau**2 + fastest**2)


def proved_limit(tau: float) -> float:
    """The largest eta that Theorem 2 covers."""
    return 2 * tau / (3 * tau**2 + 8)


def outer_factor(eta: float, tau: float, inner_steps: int | None, frequency: float) -> float:
    """Modulus by which an outer update of COMAL multiplies a deviation; ``inner_steps=None`` is an exact inner game.

    m = 1 - eta tau + i eta lambda per inner step from mu = ref gives m^K + eta tau (1 - m^K) / (1 - m); its limit for
    many steps is 1 / (1 - i lambda / tau). KL shrinks by the square.
    """
    if inner_steps is None:
        return 1 / math.hypot(1, frequency / tau)
    m = complex(1 - eta * tau, eta * frequency)
    try:
        power = m**inner_steps
    except OverflowError:
        return math.inf
    return abs(power + eta * tau * (1 - power) / (1 - m))


def single_factor(method: str, eta: float, tau: float, frequency: float) -> float:
    """Modulus per update of a method without outer loop.

    MWU, IPO and SPPO: |1 + i a| with a = eta lambda. DPO: the same with 4 a, for the slope of its loss is that of a
    sigmoid, 1/4. INPO: |1 - eta tau + i a|, around the Nash strategy of the *regularised* game. Mirror-Prox:
    |1 + i a - a^2|, below 1 iff a < 1. OMWU: the larger root of x^2 - (1 + 2 i a) x + i a, below 1 iff a < 1/sqrt 3.
    """
    a = eta * frequency
    if method == "dpo":
        return math.hypot(1, 4 * a)
    if method == "inpo":
        return math.hypot(1 - eta * tau, a)
    if method == "mirror_prox":
        return math.hypot(1 - a * a, a)
    if method == "omwu":
        return float(np.abs(np.roots([1, -(1 + 2j * a), 1j * a])).max())
    return math.hypot(1, a)


def examine(
    method: str, inner: str, eta: float, tau: float, inner_steps: int, modes: Modes, prompt: str = ""
) -> list[Note]:
    """What the local criterion says of the settings on a game with frequencies ``modes``, ascending."""
    if not len(modes):
        return []
    where = f" (prompt {prompt!r})" if prompt else ""
    slowest, fastest = float(modes[0]), float(modes[-1])
    if method == "comal":
        return _examine_comal(inner, eta, tau, inner_steps, modes, where)
    worst = max(single_factor(method, eta, tau, float(mode)) for mode in modes)
    if method == "inpo":
        limit = inner_limit(tau, fastest)
        fixed = Note("information", f"INPO goes to the Nash policy of the game regularised with tau {tau:g}{where}.")
        return [fixed] if worst < 1 else [Note("warning", _too_large("INPO", eta, limit, where)), fixed]
    if worst < 1:
        return []
    if method in ("mirror_prox", "omwu"):
        limit = (1 if method == "mirror_prox" else 1 / math.sqrt(3)) / fastest
        return [Note("warning", _too_large(method, eta, limit, where))]
    text = (
        f"{method} moves away from the Nash policy{where}: deviations grow by {worst:.6g} per update (frequency "
        f"{slowest:.3g} to {fastest:.3g}), for every eta. Only its average converges; use `comal` or `mirror_prox`."
    )
    return [Note("warning", text)]


def _examine_comal(inner: str, eta: float, tau: float, inner_steps: int, modes: Modes, where: str) -> list[Note]:
    if inner == "exact":
        slow = outer_factor(eta, tau, None, float(modes[0]))
        if slow < 0.999:
            return []
        text = (
            f"tau {tau:g} is {tau / float(modes[0]):.0f} times the slowest frequency {float(modes[0]):.2g}{where}: an "
            f"outer update shrinks the deviation by {1 - slow:.1e} only. Lower tau towards that frequency."
        )
        return [Note("information", text)]
    notes = []
    if eta > proved_limit(tau):
        text = f"eta {eta:g} is above {proved_limit(tau):.3g}, up to which Theorem 2 proves the inner loop to converge."
        notes.append(Note("information", text))
    limit = inner_limit(tau, float(modes[-1]))
    if eta >= limit:
        notes.append(Note("warning", _too_large("the inner loop", eta, limit, where)))
    factors = [outer_factor(eta, tau, inner_steps, float(mode)) for mode in modes]
    if max(factors) >= 1:
        text = (
            f"an outer update multiplies deviations by up to {max(factors):.6g}{where}: the inner game is not solved "
            f"well enough. Raise inner_steps (now {inner_steps}; about 3 / (eta tau) = {3 / (eta * tau):.0f}) or tau, "
            "or take inner='exact'."
        )
        notes.append(Note("warning", text))
    return notes


def _too_large(what: str, eta: float, limit: float, where: str) -> str:
    return f"{what} does not converge with eta {eta:g}{where}: at the Nash policy it needs eta below {limit:.4g}."
