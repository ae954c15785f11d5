"""Policies against each other: the matrix of win rates with intervals, and the mixture of them that none beats.

Answers in, numbers out; knows nothing of models. Answers are kept by whoever made them, so that a policy can be added
without generating again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from coala.comal.oracles import Example, PreferenceOracle, ask
from coala.evaluation.judges import VerdictStore
from coala.nash.game import Float, PreferenceGame
from coala.settings import Win
from coala.statistics.intervals import bounded_mean, share_estimate
from coala.values import CoalaError, Estimate


@dataclass(frozen=True, eq=False)
class WinRates:
    """``percent[i, j]``: how often policy i beats policy j, in %; M + M^T = 100 and 50 on the diagonal.

    ``intervals[i][j]`` is the same with its interval over prompts, ``preferences`` (m, m, n) what they are computed
    from (nan without a verdict, ties 1/2). ``failures`` counts pairs without a verdict, which are left out,
    ``disagreement`` is the mean of |p(a, b) + p(b, a) - 1| and ``characters`` the mean length of each policy's answers.
    ``averages`` are the mean win rates in % against the others, with intervals over prompts.
    """

    names: tuple[str, ...]
    percent: Float
    intervals: tuple[tuple[Estimate, ...], ...]
    preferences: Float
    failures: int
    disagreement: float
    characters: Float
    mode: Win
    averages: tuple[Estimate, ...]

    def average(self, *, include_self: bool = False) -> Float:
        """Mean win rate (m,) of each policy against the others, in %; published tables may count the 50 with itself."""
        m = len(self.names)
        if include_self or m == 1:
            return np.asarray(self.percent.mean(axis=1))
        return np.asarray((self.percent.sum(axis=1) - 50) / (m - 1))

    def nash(self) -> EmpiricalNash:
        """:func:`empirical_nash` of these win rates."""
        return empirical_nash(self.percent, self.names)


@dataclass(frozen=True, eq=False)
class EmpiricalNash:
    """A mixture of the policies that none of them beats, and by how much each alone is beaten.

    ``gap[name]`` = 2 max_j M[j, name]/100 - 1, in [0, 1]: 0 for a policy that no other one of the table beats.
    """

    mixture: dict[str, float]
    unique: bool
    gap: dict[str, float]


def win_rate_matrix(
    answers: Mapping[str, Sequence[str]],
    examples: Sequence[Example],
    oracle: PreferenceOracle,
    *,
    mode: Win = "hard",
    group: Sequence[Any] | None = None,
    keeper: VerdictStore | None = None,
    tell: Callable[[float], None] | None = None,
) -> WinRates:
    """Every policy's answers (one per example, n each) against every other's, judged in both orders.

    ``hard`` counts who is preferred (1/2 for a tie), as published tables do; ``mean`` averages the probabilities.
    Intervals are over prompts, or over ``group`` where prompts belong together.
    """
    names, n = tuple(answers), len(examples)
    if mode not in ("hard", "mean"):
        raise CoalaError(f"Win {mode!r}; expected 'hard' or 'mean'.")
    if len(names) < 2 or not n:
        raise CoalaError(f"Found {len(names)} policies and {n} prompts; expected two policies and one prompt at least.")
    for name in names:
        if len(answers[name]) != n:
            raise CoalaError(f"Policy {name!r} has {len(answers[name])} answers for {n} prompts; expected one each.")
    m = len(names)
    found = np.full((m, m, n), np.nan)
    found[np.arange(m), np.arange(m)] = 0.5
    pairs = [(i, j) for i in range(m) for j in range(i + 1, m)]
    # An answer ties with itself; the oracle is not asked.
    rows = [(i, j, x) for i, j in pairs for x in range(n) if answers[names[i]][x] != answers[names[j]][x]]
    verdicts = ask(
        oracle,
        [examples[x] for _, _, x in rows],
        [answers[names[i]][x] for i, _, x in rows],
        [answers[names[j]][x] for _, j, x in rows],
        keeper=keeper,
        tell=tell,
    )
    for i, j in pairs:
        same = [answers[names[i]][x] == answers[names[j]][x] for x in range(n)]
        found[i, j, same] = found[j, i, same] = 0.5
    for (i, j, x), verdict in zip(rows, verdicts, strict=True):
        if verdict.preference is not None:
            # Averaging two orders leaves a tie within rounding of 1/2.
            sign = np.sign(np.round(verdict.preference - 0.5, 9))
            value = verdict.preference if mode == "mean" else (sign + 1) / 2
            found[i, j, x], found[j, i, x] = value, 1 - value
    intervals = tuple(tuple(_interval(found[i, j], i == j, mode, group) for j in range(m)) for i in range(m))
    # Each row's mean over the opponents with a verdict, so that a row counts once however many opponents there are.
    sound = np.isfinite(found) & ~np.eye(m, dtype=bool)[:, :, None]
    rows_mean = np.where(sound, found, 0).sum(1) / np.maximum(sound.sum(1), 1)
    rows_mean[~sound.any(1)] = np.nan
    gaps = [verdict.disagreement for verdict in verdicts if verdict.disagreement is not None]
    return WinRates(
        names=names,
        percent=np.array([[estimate.value for estimate in row] for row in intervals]),
        intervals=intervals,
        preferences=found,
        failures=sum(verdict.preference is None for verdict in verdicts),
        disagreement=float(np.mean(gaps)) if gaps else 0.0,
        characters=np.array([np.mean([len(text) for text in answers[name]]) for name in names]),
        mode=mode,
        averages=tuple(_interval(rows_mean[i], False, "mean", group) for i in range(m)),
    )


def _interval(values: Float, itself: bool, mode: Win, group: Sequence[Any] | None) -> Estimate:
    if itself:
        return Estimate(50.0, 50.0, 50.0, len(values), "a policy against itself")
    sound = np.isfinite(values)
    if not sound.any():
        raise CoalaError("Two policies have no pair with a verdict, so their win rate is unknown. Judge again.")
    labels = None if group is None else [label for label, ok in zip(group, sound, strict=True) if ok]
    share = share_estimate if mode == "hard" else bounded_mean
    found = share(values[sound], labels)
    return Estimate(100 * found.value, 100 * found.low, 100 * found.high, found.n, f"win rate in %, {found.method}")


def empirical_nash(percent: ArrayLike, names: Sequence[str] | None = None) -> EmpiricalNash:
    """The Nash mixture of policies whose win rates against each other are ``percent`` (m, m), M + M^T = 100."""
    matrix = np.asarray(percent, dtype=np.float64) / 100
    game = PreferenceGame(matrix, names)
    labels, nash = game.names[0], game.nash()
    return EmpiricalNash(
        mixture=dict(zip(labels, map(float, np.asarray(nash.strategy)), strict=True)),
        unique=nash.unique,
        gap={label: float(max(0.0, 2 * matrix[:, i].max() - 1)) for i, label in enumerate(labels)},
    )
