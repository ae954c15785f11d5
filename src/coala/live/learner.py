"""What clicks have taught so far: the head, refitted after each of them; its ridge; which pair is worth asking.

Rows are differences of two replies' features in coordinates that follow replies, not clicks. The ridge is a function of
the pairs at hand: the one that a fit's own path chooses on the first m of them (m is 10, 15, 23, ...), so that a pair
taken back leaves nothing behind. Arrays in, arrays out; knows nothing of texts, raters or files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coala.convex.path import DEFAULT_RIDGE
from coala.convex.prepare import Standardisation
from coala.convex.questions import Gain, gains
from coala.convex.sequential import Optimality, SequentialProgram, choose_ridge
from coala.values import Certificate, ConvexHead, FeatureSpec

Float = NDArray[np.float64]
FIRST_CHOICE = 10  # pairs at which the ridge is first chosen
GROWTH = 1.5  # and by what factor there are more at the next
# Before that, the default of the path in the unit of replies of no likeness, whose rows have a mean square of 2.
EARLY_RIDGE = DEFAULT_RIDGE / 2


def coordinates(features: NDArray[np.float32]) -> Standardisation:
    """Those of a fit, by the features (k, d) of replies; not rotated, so that they serve replies that come later."""
    of_all = Standardisation.of(features, features)
    return replace(of_all, rotation=np.eye(features.shape[1] + 1))


@dataclass
class _Taught:
    at: int  # the order of clicks
    row: Float
    group: str


class Learner:
    """Pairs that come and go, and the head they make. Not for several threads at a time."""

    def __init__(self, standardisation: Standardisation, seed: int = 0) -> None:
        self.standardisation = standardisation
        self.program = SequentialProgram(len(standardisation.rotation), EARLY_RIDGE)
        self.ridge_of = 0  # pairs that the ridge was chosen on
        self._seed = seed
        self._taught: dict[str, _Taught] = {}
        self._ridges: dict[tuple[str, ...], float] = {}

    def __len__(self) -> int:
        return len(self._taught)

    def __contains__(self, key: str) -> bool:
        return key in self._taught

    @property
    def optimality(self) -> Optimality:
        return self.program.optimality

    def row(self, preferred: NDArray[np.float32], other: NDArray[np.float32]) -> Float:
        """The row (p,) of a pair from the features (d,) of its replies."""
        return np.asarray(self.standardisation.differences(preferred[None], other[None])[0])

    def rows(self, first: NDArray[np.float32], second: NDArray[np.float32]) -> Float:
        """Rows (k, p) of pairs of features (k, d)."""
        return np.asarray(self.standardisation.differences(first, second))

    def margin(self, first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
        """Log-odds by the head at hand that the first reply is preferred."""
        return float(self.row(first, second) @ self.program.weights)

    # --- teaching ----------------------------------------------------------------------------------------------------

    def teach(self, key: str, at: int, row: Float, group: str) -> Optimality:
        """One pair more, the ``at``-th click; refitted."""
        return self.teach_all([(key, at, row, group)])

    def teach_all(self, pairs: Iterable[tuple[str, int, Float, str]]) -> Optimality:
        """Pairs more, each as :meth:`teach` takes it; refitted once."""
        for key, at, row, group in pairs:
            self._taught[key] = _Taught(at, row, group)
            self.program.add(key, row)
        return self.program.refit()

    def forget(self, key: str) -> Optimality:
        """One pair less; refitted, exactly as if it had never been there once :meth:`settle` has been called."""
        del self._taught[key]
        self.program.remove(key)
        return self.program.refit()

    @property
    def due(self) -> tuple[str, ...] | None:
        """Keys of the pairs on which the ridge is to be chosen; None while the one at hand is theirs."""
        wanted = self._first(chosen_at(len(self)))
        known = EARLY_RIDGE if not wanted else self._ridges.get(wanted)
        return None if self.program.ridge == known else wanted

    def chooser(self, keys: Sequence[str]) -> Callable[[], float]:
        """What finds the ridge that these pairs choose, from a copy of them: it may run while others come and go.

        It takes seconds where they are thousands.
        """
        if not keys:
            return lambda: EARLY_RIDGE
        rows = np.stack([self._taught[key].row for key in keys])
        groups = np.array([self._taught[key].group for key in keys])
        return partial(choose_ridge, rows, groups, self._seed)

    def adopt(self, keys: Sequence[str], ridge: float) -> Optimality:
        """Go on with the ``ridge`` that ``keys`` chose, if it is still theirs to choose."""
        self._ridges[tuple(keys)] = ridge
        if tuple(keys) == self._first(chosen_at(len(self))):
            self.program.restate(ridge)
            self.ridge_of = len(keys)
        return self.program.refit()

    def settle(self) -> Optimality:
        """Choose the ridge now if that is due."""
        while (keys := self.due) is not None:
            self.adopt(keys, self._ridges[keys] if keys in self._ridges else self.chooser(keys)())
        return self.optimality

    def _first(self, n: int) -> tuple[str, ...]:
        return tuple(sorted(self._taught, key=lambda key: self._taught[key].at)[:n])

    # --- asking ------------------------------------------------------------------------------------------------------

    def worth(self, candidates: Float, to_come: Float | None = None, *, by: Gain = "determinant") -> Float:
        """What an answer to each of ``candidates`` (k, p) is expected to tell (``coala.convex.questions.gains``)."""
        return np.asarray(gains(self.program.hessian(), self.program.weights, candidates, to_come, by=by))

    # --- the head ----------------------------------------------------------------------------------------------------

    def head(self, spec: FeatureSpec) -> ConvexHead:
        """The head at hand, for replies of the current policy. Its certificate is the refit's own."""
        from importlib.metadata import version

        found = self.optimality
        facts: dict[str, Any] = {"method": "linear", "ridge": self.program.ridge, "n_clicks": len(self)}
        certificate = Certificate(
            "pairwise logistic loss, linear block and no gates",
            f"No other linear head lowers the ridge-regularised objective of {len(self)} clicks by more than "
            f"{found.gap:.1e}: proved by strong convexity, in double precision, for the standardised features.",
            found.objective,
            found.objective - found.gap,
            0.0,
            0,
            "converged",
            1e-12,
            "float64",
            self._seed,
            {"numpy": version("numpy")},
            facts,
        )
        (linear,) = self.standardisation.fold(self.program.weights[:, None])
        none = np.zeros((0, len(linear)), np.float32)
        return ConvexHead(none, none, linear.astype(np.float32), spec, certificate=certificate)


def chosen_at(n: int) -> int:
    """How many of ``n`` pairs the ridge is chosen on: the last of 10, 15, 23, 35, ... that is there; 0 before."""
    found, following = 0, FIRST_CHOICE
    while following <= n:
        found, following = following, int(np.ceil(following * GROWTH))
    return found
