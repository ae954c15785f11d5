"""Methods that look for a Nash policy, and the one loop that drives them.

A method is a generator of log-policies for one matrix; ``solve`` owns the loop over prompts, the stopping rule, the
history and the remarks on the settings. The measure is the duality gap of the game, the same for every method.
``eta`` is a step size everywhere; ``beta`` is accepted as its inverse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any, Literal, cast

import numpy as np
from jaxtyping import Float64
from numpy.typing import ArrayLike

from coala.nash import criteria
from coala.nash.criteria import Note
from coala.nash.game import Nash, Policy, PreferenceGame, Series, Vector, duality_gap, kl_divergence
from coala.nash.steps import Feedback, Population, SampledFeedback, mirror_step, normalise, regularised_nash, sppo_step
from coala.values import CoalaError

Schedule = float | Sequence[float] | Callable[[int], float]
CONVERGED = 1e-6  # the gap that is called converged when no tolerance is given


@dataclass(frozen=True, eq=False)
class UpdatePlan:
    """Settings per outer update: ``eta``, ``tau``, ``inner_steps``, equally long; ``inner`` names the inner solver."""

    eta: list[float]
    tau: list[float]
    inner_steps: list[int]
    inner: str


# --- methods: generators of log-policies ------------------------------------------------------------------------

InnerStep = Callable[[Feedback, Vector, Vector, float, float], Vector]


def _by_win_rates(feedback: Feedback, z: Vector, reference: Vector, eta: float, tau: float) -> Vector:
    return mirror_step(z, reference, eta, tau, feedback.win_rates(z))


def _by_pairs(feedback: Feedback, z: Vector, reference: Vector, eta: float, tau: float) -> Vector:
    return mirror_step(z, reference, eta, tau, feedback.pair_rewards(z))


def _by_sppo(feedback: Feedback, z: Vector, reference: Vector, eta: float, tau: float) -> Vector:
    return sppo_step(z, reference, eta, tau, feedback.win_rates(z))


# DRO fits one constant per prompt and REBEL differences over all pairs; over a table both minimisers are the proximal
# step with the win rates they are given. INPO sees labelled pairs instead.
INNER_STEPS: dict[str, InnerStep] = {
    "md": _by_win_rates,
    "inpo": _by_pairs,
    "sppo": _by_sppo,
    "dro": _by_win_rates,
    "rebel": _by_win_rates,
}


def comal(feedback: Feedback, z: Vector, plan: UpdatePlan) -> Iterator[Vector]:
    """Algorithm 1: solve the game regularised towards the policy, make its solution the policy, repeat."""
    for eta, tau, inner_steps in zip(plan.eta, plan.tau, plan.inner_steps, strict=True):
        reference = z
        if plan.inner == "exact":
            # `solve` refuses sampled feedback for it: the Newton step needs the matrix.
            z = regularised_nash(cast(Population, feedback).P, reference, tau)
        else:
            step = INNER_STEPS[plan.inner]
            for _ in range(inner_steps):
                z = step(feedback, z, reference, eta, tau)
        yield z


def inpo(feedback: Feedback, z: Vector, plan: UpdatePlan) -> Iterator[Vector]:
    """Algorithm 2 alone: the reference stays the start, the limit is the Nash policy of that regularised game."""
    reference = z
    for eta, tau in zip(plan.eta, plan.tau, strict=True):
        z = _by_pairs(feedback, z, reference, eta, tau)
        yield z


def _unregularised(step: InnerStep) -> Callable[[Feedback, Vector, UpdatePlan], Iterator[Vector]]:
    def method(feedback: Feedback, z: Vector, plan: UpdatePlan) -> Iterator[Vector]:
        for eta in plan.eta:
            z = step(feedback, z, z, eta, 0.0)
            yield z

    return method


def iterative_dpo(feedback: Feedback, z: Vector, plan: UpdatePlan) -> Iterator[Vector]:
    """p' ~ p exp(eta r) with r the Bradley-Terry rewards of labelled pairs drawn from p."""
    for eta in plan.eta:
        z = normalise(z + eta * feedback.logit_rewards(z))
        yield z


def mirror_prox(feedback: Feedback, z: Vector, plan: UpdatePlan) -> Iterator[Vector]:
    """Appendix F: a step to look ahead, then the step from the old point with the rewards found there."""
    for eta in plan.eta:
        half = normalise(z + eta * feedback.win_rates(z))
        z = normalise(z + eta * feedback.win_rates(half))
        yield z


def optimistic(feedback: Feedback, z: Vector, plan: UpdatePlan) -> Iterator[Vector]:
    """OMWU (Appendix F): Mirror-Prox that looks ahead with the rewards of the last half step."""
    rewards = feedback.win_rates(z)
    for eta in plan.eta:
        rewards = feedback.win_rates(normalise(z + eta * rewards))
        z = normalise(z + eta * rewards)
        yield z


METHODS: dict[str, Callable[[Feedback, Vector, UpdatePlan], Iterator[Vector]]] = {
    "comal": comal,
    "mwu": _unregularised(_by_win_rates),
    "ipo": _unregularised(_by_pairs),
    "dpo": iterative_dpo,
    "sppo": _unregularised(_by_sppo),
    "inpo": inpo,
    "mirror_prox": mirror_prox,
    "omwu": optimistic,
}


# --- the result --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class History:
    """One row per outer update, the start first: ``gap`` and ``kl`` (T + 1,), weighted over prompts.

    ``log_policy`` holds per prompt the logarithms (T + 1, n) of the policies; -inf for answers the start does not play.
    ``kl`` is the distance KL(Nash, policy) to the strategy of ``Result.nash``.
    """

    gap: Series
    kl: Series
    log_policy: tuple[Float64[np.ndarray, "updates _"], ...]

    def __len__(self) -> int:
        return len(self.gap)


@dataclass(frozen=True, eq=False)
class Result:
    """Where a method ended; ``converged`` if the last gap is at most the tolerance (1e-6 where none was given)."""

    game: PreferenceGame
    method: str
    nash: Nash
    history: History
    converged: bool
    reason: str
    notes: tuple[Note, ...]

    @property
    def policy(self) -> Policy:
        """The last iterate."""
        return self.game.whole([np.exp(z[-1]) for z in self.history.log_policy])

    @cached_property
    def average(self) -> Policy:
        """The mean of the iterates after the start, which converges for MWU where the last iterate does not."""
        return self.game.whole([np.exp(z[1:]).mean(0) for z in self.history.log_policy])

    @property
    def gap(self) -> float:
        """Duality gap of the last iterate."""
        return float(self.history.gap[-1])

    def kl_to(self, strategy: ArrayLike | Mapping[str, ArrayLike]) -> float:
        """KL(strategy, last iterate), weighted over prompts; inf where the policy plays an answer never."""
        parts = self.game.parts(strategy, "strategy")
        return float(
            self.game.shares @ [kl_divergence(p, z[-1]) for p, z in zip(parts, self.history.log_policy, strict=True)]
        )

    def to_frame(self) -> Any:
        """The history as a pandas table: update, gap, kl and one column per answer."""
        try:
            table = import_module("pandas")
        except ModuleNotFoundError as error:
            raise CoalaError(
                "to_frame needs pandas: `pip install pandas`, or read `.history`, which has arrays."
            ) from error
        columns: dict[str, Any] = {
            "update": np.arange(len(self.history)),
            "gap": self.history.gap,
            "kl": self.history.kl,
        }
        for prompt, names, z in zip(self.game.prompts, self.game.names, self.history.log_policy, strict=True):
            columns |= {f"{prompt}: {name}" if prompt else name: np.exp(z[:, i]) for i, name in enumerate(names)}
        return table.DataFrame(columns)

    def plot_simplex(self) -> str:
        """The path over the triangle of three answers as an SVG element; for one matrix of size 3."""
        from coala.nash.plots import simplex_plot

        if self.game.contextual or len(self.game.names[0]) != 3:
            raise CoalaError(
                "A triangle shows one game of three answers, and this is another: write a page (.html) instead."
            )
        strategy = cast(Vector, self.nash.strategy)
        return simplex_plot(self.method, np.exp(self.history.log_policy[0]), self.game.names[0], strategy).svg


# --- the driver --------------------------------------------------------------------------------------------------


def solve(
    game: PreferenceGame,
    start: ArrayLike | Mapping[str, ArrayLike] | None = None,
    *,
    method: str = "comal",
    inner: str = "exact",
    eta: Schedule | None = None,
    beta: float | None = None,
    tau: Schedule = 0.1,
    outer: int | None = None,
    inner_steps: Schedule | None = None,
    pairs_per_step: int | None = None,
    oracle: Literal["labels", "probabilities"] | None = None,
    seed: int = 0,
    tol: float | None = None,
    on_update: Callable[[int, float], None] | None = None,
) -> Result:
    """Run a method from ``start`` (uniform if not given) for ``outer`` updates or until the gap is at most ``tol``.

    ``method``: comal, mwu, ipo, dpo, sppo, inpo, mirror_prox or omwu. ``inner`` (comal only): ``exact`` (Newton), or
    ``inner_steps`` updates by md, inpo, sppo, dro or rebel. ``eta`` is the step size (0.3; or give ``beta`` = 1/eta),
    ``tau`` the strength of regularisation. ``eta``, ``tau`` and ``inner_steps`` may be a number, a sequence with one
    value per outer update, or a function of the update's index 0, 1, ... The defaults are the paper's: 200 updates with
    25 inner steps, 5000 for methods without an inner loop, all counted as updates made.

    ``pairs_per_step`` draws as many pairs from the policy at each step, from ``seed``, instead of taking expectations;
    ``oracle`` says whether they come with Bernoulli ``labels`` (default) or with ``probabilities``.

    Never raises for want of convergence: see ``Result.converged`` and ``Result.notes``. Raises CoalaError for input
    that makes no sense.
    """
    if not isinstance(game, PreferenceGame):
        raise CoalaError(
            f"solve takes a PreferenceGame; found {type(game).__name__}. Wrap the matrix: PreferenceGame(P)."
        )
    if method not in METHODS:
        raise CoalaError(f"Unknown method {method!r}; expected one of {', '.join(METHODS)}.")
    if inner not in ("exact", *INNER_STEPS):
        raise CoalaError(f"Unknown inner solver {inner!r}; expected one of exact, {', '.join(INNER_STEPS)}.")
    starts = game.parts(game.uniform() if start is None else start, "start")
    outer = (200 if method == "comal" else 5000) if outer is None else _count("outer", outer)
    exact = method == "comal" and inner == "exact"
    if inner_steps is not None and (method != "comal" or exact):
        raise CoalaError(
            f"inner_steps counts inner updates of comal, and {'inner=exact' if exact else method} makes none: leave it "
            f"out{', or choose inner=md' if exact else '; outer counts the updates'}."
        )
    if eta is not None and beta is not None:
        raise CoalaError(f"eta and beta are inverses of each other; give one of them (found eta={eta}, beta={beta}).")
    if exact and (eta is not None or beta is not None):
        raise CoalaError("The exact inner solver has no step size: leave eta and beta out, or choose inner=md.")
    rate: Schedule = 1 / _positive("beta", beta) if beta is not None else 0.3 if eta is None else eta
    counts = [
        _count("inner_steps", value)
        for value in _values("inner_steps", 25 if inner_steps is None else inner_steps, outer)
    ]
    plan = UpdatePlan(_values("eta", rate, outer), _values("tau", tau, outer), counts, inner)
    if tol is not None and not (math.isfinite(tol) and tol >= 0):
        raise CoalaError(f"tol is {tol}; expected a duality gap of at least 0 at which to stop.")

    # Answers that the start does not play are never played: the methods run on the others.
    kept = [np.flatnonzero(p > 0) for p in starts]
    feedbacks = _feedbacks(game, kept, exact, pairs_per_step, oracle, seed)
    begin = [normalise(np.log(p[rows])) for p, rows in zip(starts, kept, strict=True)]
    paths = [METHODS[method](feedback, z, plan) for feedback, z in zip(feedbacks, begin, strict=True)]
    logs = [np.full((outer + 1, len(p)), -np.inf) for p in starts]
    gaps = np.empty(outer + 1)
    threshold = CONVERGED if tol is None else tol
    for update in range(outer + 1):
        policies = begin if update == 0 else [next(path) for path in paths]
        for log, rows, z in zip(logs, kept, policies, strict=True):
            log[update, rows] = z
        gaps[update] = game.shares @ [
            duality_gap(P, np.exp(log[update])) for P, log in zip(game.matrices, logs, strict=True)
        ]
        if on_update is not None:
            on_update(update, float(gaps[update]))
        if tol is not None and gaps[update] <= tol:
            break
    converged = bool(gaps[update] <= threshold)
    nash = game.nash()
    history = History(
        gaps[: update + 1], _distances(game, nash, logs, update + 1), tuple(log[: update + 1] for log in logs)
    )
    return Result(
        game=game,
        method=method,
        nash=nash,
        history=history,
        converged=converged,
        reason=f"gap {gaps[update]:.2e} {'at most' if converged else 'above'} {threshold:g} after {update} updates",
        notes=tuple(dict.fromkeys(_notes(game, kept, method, plan))),
    )


def _feedbacks(
    game: PreferenceGame, kept: list[Any], exact: bool, pairs: int | None, oracle: str | None, seed: int
) -> list[Feedback]:
    inside = [P[np.ix_(rows, rows)] for P, rows in zip(game.matrices, kept, strict=True)]
    if oracle not in (None, "labels", "probabilities"):
        raise CoalaError(f"Unknown oracle {oracle!r}; expected labels or probabilities.")
    if pairs is None:
        if oracle is not None:
            raise CoalaError("An oracle judges drawn pairs: say how many with pairs_per_step, or leave oracle out.")
        return [Population(P) for P in inside]
    if exact:
        raise CoalaError("The exact inner solver needs the matrix itself: with pairs_per_step choose inner=inpo or md.")
    pairs = _count("pairs_per_step", pairs)
    # A stream of its own per prompt: what one prompt draws does not depend on the others.
    streams = [np.random.default_rng([seed, i]) for i in range(len(inside))]
    return [
        SampledFeedback(P, pairs, stream, oracle != "probabilities") for P, stream in zip(inside, streams, strict=True)
    ]


def _distances(game: PreferenceGame, nash: Nash, logs: list[Float64[np.ndarray, "_ _"]], rows: int) -> Series:
    parts = game.parts(nash.strategy)
    distances = []
    for p, log in zip(parts, logs, strict=True):
        mass = p > 0
        distances.append(np.maximum(0.0, (np.log(p[mass]) - log[:rows, mass]) @ p[mass]))
    return game.shares @ np.array(distances)


def _notes(game: PreferenceGame, kept: list[Any], method: str, plan: UpdatePlan) -> Iterator[Note]:
    """Remarks on the last settings of the plan, which decide where the tail goes."""
    for P, rows, names, prompt in zip(game.matrices, kept, game.names, game.prompts, strict=True):
        inside = PreferenceGame(P[np.ix_(rows, rows)]) if len(rows) > 1 else None
        if len(rows) < len(P):
            missing = ", ".join(names[i] for i in range(len(P)) if i not in set(rows.tolist()))
            text = f"the start never plays {missing}: this is the game without them, the gap is the whole game's."
            yield Note("information", f"prompt {prompt!r}: {text}" if prompt else text)
        if inside is not None:
            modes = criteria.frequencies(inside.matrices[0], cast(Vector, inside.nash().strategy))
            settings = (plan.eta[-1], plan.tau[-1], plan.inner_steps[-1])
            yield from criteria.examine(method, plan.inner, *settings, modes, prompt)


def _values(name: str, schedule: Schedule, outer: int) -> list[float]:
    if callable(schedule):
        found = [schedule(t) for t in range(outer)]
    elif isinstance(schedule, Sequence | np.ndarray):
        found = list(schedule)
        if len(found) != outer:
            raise CoalaError(f"{name} has {len(found)} values for {outer} outer updates; give one for each.")
    else:
        found = [schedule] * outer
    return [_positive(name, value) for value in found]


def _positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not (0 < value < math.inf):
        raise CoalaError(f"{name} is {value!r}; expected a positive number.")
    return float(value)


def _count(name: str, value: Any) -> int:
    if _positive(name, value) != int(value):
        raise CoalaError(f"{name} is {value!r}; expected a whole number of updates, one at least.")
    return int(value)
