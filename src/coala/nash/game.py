"""A preference game: who beats whom with which probability, its duality gap, best responses and Nash strategies.

Arrays in, arrays out; knows nothing of how a Nash policy is approached (``solvers``) nor of language models.

``P[i, j]`` is the probability that answer i beats answer j, hence P + P^T = 1 with 1/2 on the diagonal. A game holds
one matrix, or one per prompt; prompts are weighted by how often they are asked and otherwise have nothing to do with
each other. A policy is an array (n,) for one matrix and a mapping from prompt to such arrays for several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Float64, Int
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linprog

from coala.documents import DocumentError, parse_json
from coala.values import CoalaError

Vector = Float64[np.ndarray, "answers"]  # a number for each answer: probabilities, their logarithms, rewards
Matrix = Float64[np.ndarray, "answers answers"]  # the row's answer against the column's
Float = NDArray[np.float64]  # of any shape
Series = Float64[np.ndarray, "updates"]
Policies = Float64[np.ndarray, "updates answers"]
Policy = Vector | dict[str, Float64[np.ndarray, "_"]]
TOLERANCE = 1e-6  # on P + P^T = 1 and on the sum of a distribution


# --- one matrix --------------------------------------------------------------------------------------------------


def duality_gap(P: Matrix, p: Vector) -> float:
    """max_i (P p)_i - min_j (p^T P)_j in [0, 1]: what the best answer wins against p, beyond what p wins at worst.

    For P + P^T = 1 it equals 2 max_i (P p)_i - 1, twice the exploitability. 0 exactly at a Nash strategy. The best
    answer is sought among all of them, not only where p has mass.
    """
    return max(0.0, float((P @ p).max() - (p @ P).min()))


def kl_divergence(p: Vector, log_q: Vector) -> float:
    """KL(p, q) = sum_i p_i (log p_i - log q_i) of p (n,) and *log* q (n,); inf where p has mass and q has none."""
    mass = p > 0
    # q may be given in float64 logs of 1e-300 and less, which is why it is not an array of probabilities.
    return max(0.0, float(p[mass] @ (np.log(p[mass]) - log_q[mass])))


def nash_of_matrix(P: Matrix) -> tuple[Vector, bool, Int[np.ndarray, "support"]]:
    """A Nash strategy (n,) of largest support, whether it is the only one, and that support.

    The Nash strategies are {x >= 0, 1^T x = 1, B x <= 0} with B = P - 1/2 antisymmetric. On the cone {x >= 0, B x <= 0}
    the linear program max 1^T s, s <= x, 0 <= s <= 1 has s_i = 1 exactly for the answers that some Nash strategy
    plays, for x may be scaled up; so a small probability is not mistaken for none. By strict complementarity (Goldman
    and Tucker) the strategies are then the distributions in the kernel of B restricted to that support, and there is
    one of them iff this kernel has dimension 1.
    """
    B, n = (P - P.T) / 2, len(P)
    zero, one = np.zeros((n, n)), np.eye(n)
    found = linprog(
        np.r_[np.zeros(n), -np.ones(n)],
        A_ub=np.block([[B, zero], [-one, one]]),
        b_ub=np.zeros(2 * n),
        bounds=[(0, None)] * n + [(0, 1)] * n,
        method="highs",
    )
    if found.status != 0:
        raise CoalaError(
            f"The linear program of the Nash strategy could not be solved ({found.message.strip()}). Every preference "
            "game has one: check the matrix for entries of very different size and round those below 1e-9."
        )
    support = np.flatnonzero(found.x[n:] > 0.5)
    inside = B[np.ix_(support, support)]
    _, sizes, rows = np.linalg.svd(inside)
    kernel = rows[sizes <= 1e-10 * max(sizes.max(), 1e-10)]
    strategy = np.zeros(n)
    strategy[support] = found.x[support]
    strategy /= strategy.sum()
    # The program is solved to 1e-7; its point projected on the kernel is exact to rounding.
    exact = np.zeros(n)
    exact[support] = kernel.T @ (kernel @ strategy[support])
    if len(kernel) and exact.min() >= 0 and duality_gap(P, exact / exact.sum()) <= duality_gap(P, strategy):
        strategy = exact / exact.sum()
    return strategy, len(kernel) == 1, support


# --- the game ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Nash:
    """A Nash strategy: no answer beats it more often than ``value`` = 1/2.

    ``support`` are the labels of the answers it plays, the largest support of any Nash strategy; ``unique`` whether it
    is the only one (for several prompts: of every prompt). A game with an even number of answers and a Nash strategy
    that plays them all has a whole segment of them; judge policies on such a game by the gap, not by the distance to
    this one.
    """

    strategy: Policy
    value: float
    unique: bool
    support: tuple[str, ...] | dict[str, tuple[str, ...]]


@dataclass(frozen=True, eq=False)
class PreferenceGame:
    """``P`` (n, n), or a mapping from prompt to such matrices, which may differ in size.

    ``labels`` name the answers (for several prompts: one list for all, or a mapping); without them they are "1", "2",
    ... ``weights`` say how often each prompt is asked and add up to 1; equal if not given. Input that is not a game is
    refused, never mended: P has to be square and finite, in [0, 1], and P + P^T = 1 to within 1e-6.
    """

    P: ArrayLike | Mapping[str, ArrayLike]
    labels: Sequence[str] | Mapping[str, Sequence[str] | None] | None = None
    weights: Sequence[float] | Mapping[str, float] | None = None
    prompts: tuple[str, ...] = field(init=False)
    matrices: tuple[Float64[np.ndarray, "_ _"], ...] = field(init=False, repr=False)
    names: tuple[tuple[str, ...], ...] = field(init=False, repr=False)
    shares: Float64[np.ndarray, "prompts"] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        given = self.P if isinstance(self.P, Mapping) else {"": self.P}
        if not given:
            raise CoalaError("A game needs at least one matrix; found a mapping without prompts.")
        matrices = tuple(_matrix(P, prompt) for prompt, P in given.items())
        object.__setattr__(self, "prompts", tuple(map(str, given)))
        object.__setattr__(self, "matrices", matrices)
        object.__setattr__(self, "names", tuple(self._named(i) for i in range(len(matrices))))
        object.__setattr__(self, "shares", self._weighed())
        for prompt, P, names in zip(self.prompts, matrices, self.names, strict=True):
            _check_antisymmetry(P, names, prompt)

    @property
    def contextual(self) -> bool:
        """Whether policies are mappings from prompt to array."""
        return isinstance(self.P, Mapping)

    def win_rate(self, p: ArrayLike | Mapping[str, ArrayLike], q: ArrayLike | Mapping[str, ArrayLike]) -> float:
        """P(an answer of p beats an answer of q) = sum_x weight_x p_x^T P_x q_x; 1/2 for p = q."""
        pairs = zip(self.matrices, self.parts(p, "p"), self.parts(q, "q"), strict=True)
        return float(self.shares @ [a @ P @ b for P, a, b in pairs])

    def gap(self, p: ArrayLike | Mapping[str, ArrayLike]) -> float:
        """Duality gap in [0, 1], weighted over prompts; 0 iff p is a Nash policy (:func:`duality_gap`)."""
        gaps = [duality_gap(P, part) for P, part in zip(self.matrices, self.parts(p, "p"), strict=True)]
        return float(self.shares @ gaps)

    def best_response(self, p: ArrayLike | Mapping[str, ArrayLike]) -> str | dict[str, str]:
        """The label of the answer that beats p most often (the first of equals), per prompt if there are several."""
        best = [
            names[int((P @ part).argmax())]
            for P, names, part in zip(self.matrices, self.names, self.parts(p, "p"), strict=True)
        ]
        return dict(zip(self.prompts, best, strict=True)) if self.contextual else best[0]

    def nash(self) -> Nash:
        """A Nash policy by linear programming (HiGHS), exact to rounding; see :func:`nash_of_matrix`."""
        found = [nash_of_matrix(P) for P in self.matrices]
        value = self.shares @ [(p @ P).min() for P, (p, _, _) in zip(self.matrices, found, strict=True)]
        supports = [tuple(names[i] for i in rows) for names, (_, _, rows) in zip(self.names, found, strict=True)]
        return Nash(
            strategy=self.whole([p for p, _, _ in found]),
            value=float(value),
            unique=all(alone for _, alone, _ in found),
            support=dict(zip(self.prompts, supports, strict=True)) if self.contextual else supports[0],
        )

    def uniform(self) -> Policy:
        """The policy that plays all answers equally often."""
        return self.whole([np.full(len(P), 1 / len(P)) for P in self.matrices])

    def parts(self, policy: ArrayLike | Mapping[str, ArrayLike], what: str = "policy") -> list[Vector]:
        """A policy as one checked array (n,) per prompt. ``what`` names it in the error."""
        if not self.contextual:
            if isinstance(policy, Mapping):
                raise CoalaError(
                    f"The {what} is a mapping, but the game has one matrix: give an array of probabilities."
                )
            return [_distribution(policy, self.names[0], what)]
        if not isinstance(policy, Mapping) or set(policy) != set(self.prompts):
            found = sorted(map(str, policy)) if isinstance(policy, Mapping) else type(policy).__name__
            raise CoalaError(
                f"The {what} must map each of the prompts {list(self.prompts)} to an array; found {found}."
            )
        return [
            _distribution(policy[prompt], names, f"{what} of prompt {prompt!r}")
            for prompt, names in zip(self.prompts, self.names, strict=True)
        ]

    def whole(self, parts: Sequence[Float64[np.ndarray, "_"]]) -> Policy:
        """The inverse of :meth:`parts`."""
        return dict(zip(self.prompts, parts, strict=True)) if self.contextual else parts[0]

    def _named(self, i: int) -> tuple[str, ...]:
        n, labels = len(self.matrices[i]), self.labels
        if isinstance(labels, Mapping):
            if set(labels) != set(self.prompts):
                raise CoalaError(f"Labels are for prompts {sorted(labels)}, matrices for {sorted(self.prompts)}.")
            labels = labels[self.prompts[i]]
        if labels is None:
            return tuple(str(j + 1) for j in range(n))
        names = tuple(map(str, labels)) if isinstance(labels, Sequence) and not isinstance(labels, str) else ()
        if len(names) != n or len(set(names)) != n:
            raise CoalaError(
                f"{n} answers{_of(self.prompts[i])} need a list of as many different labels; found {labels!r}."
            )
        return names

    def _weighed(self) -> Float64[np.ndarray, "prompts"]:
        if self.weights is None:
            return np.full(len(self.prompts), 1 / len(self.prompts))
        if not self.contextual:
            raise CoalaError("Weights are for prompts, and this game has one matrix: leave `weights` out.")
        if isinstance(self.weights, Mapping):
            if set(self.weights) != set(self.prompts):
                raise CoalaError(
                    f"Weights are for prompts {sorted(self.weights)}, matrices for {sorted(self.prompts)}."
                )
            listed = [self.weights[prompt] for prompt in self.prompts]
        else:
            listed = list(self.weights)
        return _distribution(listed, self.prompts, "weights")


def load_game(path: Path) -> tuple[PreferenceGame, Policy]:
    """:func:`read_game` of a JSON file."""
    try:
        return read_game(parse_json(path.read_bytes()))
    except OSError as error:
        raise CoalaError(f"{path}: could not be read ({error.strerror}). Give the path of a JSON file.") from error
    except DocumentError as error:
        raise CoalaError(f"{path} is {error}; see `coala comal game --help` for its form.") from error


def read_game(content: Any) -> tuple[PreferenceGame, Policy]:
    """A game and where to start, from what a JSON file holds; the start is uniform where none is given.

    Either {"P": [[...]], "labels": [...], "start": [...]} with the last two optional, or {"prompts": {name: {the same,
    "weight": number}}} with weights for all prompts or for none.
    """
    if isinstance(content, Mapping) and "prompts" in content:
        _known(content, {"prompts"}, "the file")
        entries = content["prompts"]
        if not isinstance(entries, Mapping) or not entries:
            raise CoalaError('"prompts" must be an object from prompt to {"P": ...}; see `coala comal game --help`.')
        for prompt, entry in entries.items():
            _known(entry, {"P", "labels", "start", "weight"}, f"prompt {prompt!r}")
        weighed = [prompt for prompt, entry in entries.items() if "weight" in entry]
        if weighed and len(weighed) < len(entries):
            raise CoalaError(f"Only the prompts {weighed} have a weight: give all prompts one, or none.")
        labels = {prompt: entry.get("labels") for prompt, entry in entries.items()}
        weights = {prompt: entries[prompt]["weight"] for prompt in weighed} or None
        game = PreferenceGame({prompt: entry["P"] for prompt, entry in entries.items()}, labels, weights)
        uniform = cast(dict[str, Vector], game.uniform())
        start = {prompt: entry.get("start", uniform[prompt]) for prompt, entry in entries.items()}
        return game, game.whole(game.parts(start, "start"))
    _known(content, {"P", "labels", "start"}, "the file")
    game = PreferenceGame(content["P"], content.get("labels"))
    return game, game.whole(game.parts(content.get("start", game.uniform()), "start"))


# --- checks ------------------------------------------------------------------------------------------------------


def _known(entry: Any, keys: set[str], where: str) -> None:
    if not isinstance(entry, Mapping):
        raise CoalaError(f"{where} holds a {type(entry).__name__}; expected an object with {sorted(keys)}.")
    unknown = sorted(set(entry) - keys)
    if unknown or not ({"P", "prompts"} & set(entry)):
        raise CoalaError(f"{where} has the keys {sorted(entry)}; expected {sorted(keys)}, of which P is required.")
    if not isinstance(entry.get("P", []), list):
        raise CoalaError(f"{where}: P is a {type(entry['P']).__name__}; expected a list of rows.")


def _of(prompt: str) -> str:
    return f" of prompt {prompt!r}" if prompt else ""


def _numbers(values: ArrayLike, what: str) -> Float64[np.ndarray, "..."]:
    try:
        return np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise CoalaError(f"The {what}: expected numbers, in rows of equal length ({error}).") from error


def _matrix(P: ArrayLike, prompt: str) -> Matrix:
    what = f"preference matrix{_of(prompt)}"
    matrix = _numbers(P, what)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) < 2:
        raise CoalaError(f"The {what} has shape {matrix.shape}; expected (n, n) with n answers, two at least.")
    if not np.isfinite(matrix).all():
        row, column = np.argwhere(~np.isfinite(matrix))[0]
        raise CoalaError(
            f"The {what} has {matrix[row, column]} in row {row + 1}, column {column + 1}; judge that pair."
        )
    if matrix.min() < 0 or matrix.max() > 1:
        raise CoalaError(
            f"The {what} has entries from {matrix.min():g} to {matrix.max():g}; expected probabilities in [0, 1] that "
            "the row's answer beats the column's (divide percentages by 100)."
        )
    matrix.setflags(write=False)
    return matrix


def _check_antisymmetry(P: Matrix, names: tuple[str, ...], prompt: str) -> None:
    excess = np.abs(P + P.T - 1)
    if excess.max() > TOLERANCE:
        i, j = np.unravel_index(int(excess.argmax()), P.shape)
        found = (
            f"P[{names[i]}, {names[i]}] = {P[i, i]:g}, expected 0.5"
            if i == j
            else f"P[{names[i]}, {names[j]}] + P[{names[j]}, {names[i]}] = {P[i, j]:g} + {P[j, i]:g}, expected 1"
        )
        raise CoalaError(
            f"The preference matrix{_of(prompt)} is not a game: {found} (to within {TOLERANCE:g}). Judge every pair in "
            "both orders and take P[i, j] = (p_ij + 1 - p_ji) / 2."
        )


def _distribution(values: ArrayLike, names: tuple[str, ...], what: str) -> Vector:
    p = _numbers(values, what)
    if p.shape != (len(names),):
        raise CoalaError(
            f"The {what} has shape {p.shape}; expected ({len(names)},), one number for each of {list(names)}."
        )
    if not np.isfinite(p).all() or p.min() < 0 or abs(p.sum() - 1) > TOLERANCE:
        raise CoalaError(
            f"The {what}: found {p.tolist()}, sum {p.sum():g}; expected numbers of at least 0 that add up to 1."
        )
    return p
