"""Preference oracles: how often one answer beats another, asked of a function, a table, scores or a judge.

An oracle answers for a batch of examples; :func:`ask` is how the rest of the package asks one: both orders, range
checked, failures kept apart. Those that are models are in ``coala.comal.model_oracles``. Knows nothing of policies.

An oracle that scores answers one by one is a Bradley-Terry model and cannot prefer a to c, c to b and b to a.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from coala.evaluation.judges import VerdictStore
from coala.nash.game import PreferenceGame
from coala.statistics.logistic import sigmoid
from coala.values import CoalaError, Generation, Turn, conversation_text

Example = Mapping[str, Any]  # at least "prompt", a tuple of turns; whatever else the oracle needs to know
Answers = Sequence[float | None]


class PreferenceOracle(Protocol):
    """P(a beats b | example) in [0, 1] for each row; None where there is no verdict.

    ``name`` tells oracles apart in files. ``antisymmetric`` promises that the two orders of a pair add up to 1, and
    saves asking for both.
    """

    @property
    def name(self) -> str: ...

    @property
    def antisymmetric(self) -> bool: ...

    def __call__(self, examples: Sequence[Example], a: Sequence[str], b: Sequence[str]) -> Answers: ...


@dataclass(frozen=True)
class OracleVerdict:
    """``preference``: P(a beats b), or None without a verdict. ``disagreement``: |p(a, b) + p(b, a) - 1|, 0 at best."""

    preference: float | None
    disagreement: float | None = None


def prompt_of(example: Example) -> tuple[Turn, ...]:
    """The conversation of an example; CoalaError if there is none."""
    prompt = example.get("prompt")
    if isinstance(prompt, tuple | list) and prompt and all(isinstance(turn, Turn) for turn in prompt):
        return tuple(prompt)
    raise CoalaError(f'An example needs a "prompt" of turns (coala.values.user("text")); found {prompt!r:.80}.')


def ask(
    oracle: PreferenceOracle,
    examples: Sequence[Example],
    a: Sequence[str],
    b: Sequence[str],
    *,
    keeper: VerdictStore | None = None,
    batch_size: int = 64,
    tell: Callable[[float], None] | None = None,
) -> list[OracleVerdict]:
    """The oracle's verdicts with P(a, b) = (p(a, b) + 1 - p(b, a))/2, so that P(a, b) + P(b, a) = 1 whatever it says.

    A row without a verdict in either order has none: no coin replaces it. A value outside [0, 1] or nan is a
    :class:`CoalaError`. Verdicts found in ``keeper`` are not asked for again; new ones are put there after every
    batch. ``tell`` hears what share of the questions is answered.
    """
    if not len(examples) == len(a) == len(b):
        raise CoalaError(f"Found {len(examples)} examples, {len(a)} and {len(b)} answers; expected as many of each.")
    orders = [(i, x, y) for i, (x, y) in enumerate(zip(a, b, strict=True))]
    if not oracle.antisymmetric:
        orders += [(i, y, x) for i, x, y in orders]
    said: dict[int, float | None] = {}
    keys = [_key(oracle, examples[i], x, y) if keeper is not None else "" for i, x, y in orders]
    if keeper is not None:
        for row, key in enumerate(keys):
            kept = keeper.get(key)
            if kept is not None:
                said[row] = json.loads(kept)
    open_rows = [row for row in range(len(orders)) if row not in said]
    for first in range(0, len(open_rows), batch_size):
        rows = open_rows[first : first + batch_size]
        batch = [orders[row] for row in rows]
        found = oracle([examples[i] for i, _, _ in batch], [x for _, x, _ in batch], [y for _, _, y in batch])
        if len(found) != len(rows):
            raise CoalaError(f"Oracle {oracle.name!r} gave {len(found)} verdicts for {len(rows)} pairs; one each.")
        for row, value in zip(rows, found, strict=True):
            said[row] = _checked(oracle, value, examples[orders[row][0]])
            # A failure may be a passing one: it is asked for again by the next run.
            if keeper is not None and said[row] is not None:
                keeper.put(keys[row], json.dumps(said[row]))
        if tell is not None:
            tell((first + len(rows)) / len(open_rows))
    n = len(examples)
    if oracle.antisymmetric:
        return [OracleVerdict(said[i], None if said[i] is None else 0.0) for i in range(n)]
    return [_combined(said[i], said[n + i]) for i in range(n)]


def _combined(forward: float | None, backward: float | None) -> OracleVerdict:
    if forward is None or backward is None:
        return OracleVerdict(None)
    return OracleVerdict((forward + 1 - backward) / 2, abs(forward + backward - 1))


def _checked(oracle: PreferenceOracle, value: float | None, example: Example) -> float | None:
    if value is None:
        return None
    number = float(value)
    if not 0 <= number <= 1:  # nan too
        raise CoalaError(
            f"Oracle {oracle.name!r} said {value!r} of {conversation_text(prompt_of(example))[:60]!r}; expected the "
            "probability in [0, 1] that the first answer wins, or None where it has no verdict."
        )
    return number


def _key(oracle: PreferenceOracle, example: Example, a: str, b: str) -> str:
    turns = [[turn.role, turn.text] for turn in prompt_of(example)]
    rest = {str(name): value for name, value in example.items() if name != "prompt"}
    return json.dumps(["preference", oracle.name, turns, rest, a, b], ensure_ascii=False, sort_keys=True, default=str)


# --- adapters ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Oracle:
    """A function with the name and the promise of a :class:`PreferenceOracle`."""

    function: Callable[[Sequence[Example], Sequence[str], Sequence[str]], Answers]
    name: str
    antisymmetric: bool = False

    def __call__(self, examples: Sequence[Example], a: Sequence[str], b: Sequence[str]) -> Answers:
        return self.function(examples, a, b)


Score = Callable[[Sequence[Example], Sequence[str]], Sequence[float] | NDArray[Any]]
Link = Literal["bt", "majority"]


def from_callable(
    function: Callable[[Example, str, str], float | None], name: str, *, antisymmetric: bool = False
) -> Oracle:
    """An oracle from ``function(example, a, b)``, the probability that a wins, called once per pair and order."""
    return Oracle(
        lambda examples, a, b: [function(*row) for row in zip(examples, a, b, strict=True)], name, antisymmetric
    )


def from_scores(score: Score, name: str, *, link: Link = "bt", scale: float = 1.0) -> Oracle:
    """An oracle from ``score(examples, answers)``: sigma(scale (s_a - s_b)), or for ``majority`` who scores higher.

    Transitive, whatever the scores. A score that is not finite is no verdict.
    """
    if link not in ("bt", "majority"):
        raise CoalaError(f"Link {link!r}; expected 'bt' or 'majority'.")
    if not (math.isfinite(scale) and scale > 0):
        raise CoalaError(f"scale is {scale}; expected a positive number.")

    def compare(examples: Sequence[Example], a: Sequence[str], b: Sequence[str]) -> Answers:
        scores = np.asarray(score([*examples, *examples], [*a, *b]), dtype=np.float64)
        if scores.shape != (2 * len(a),):
            raise CoalaError(f"{name}: found scores of shape {scores.shape} for {2 * len(a)} answers; one each.")
        first, second = scores[: len(a)], scores[len(a) :]
        sound = np.isfinite(first) & np.isfinite(second)
        difference = np.where(sound, first, 0) - np.where(sound, second, 0)
        values = sigmoid(scale * difference) if link == "bt" else (1 + np.sign(difference)) / 2
        return [float(value) if ok else None for value, ok in zip(values, sound, strict=True)]

    return Oracle(compare, name, antisymmetric=True)


def from_majority(voters: Sequence[PreferenceOracle], name: str) -> Oracle:
    """1 where more voters prefer a than b, 0 where fewer do, 1/2 for a tie; no verdict where a voter has none.

    Three voters that each have an order of their own suffice for a cycle (Condorcet): of all ways to order three
    answers independently one in eighteen has one.
    """
    if not voters:
        raise CoalaError("A majority needs one voter at least.")

    def compare(examples: Sequence[Example], a: Sequence[str], b: Sequence[str]) -> Answers:
        votes = [[v.preference for v in ask(voter, examples, a, b)] for voter in voters]
        return [
            None if None in said else _winner(cast(list[float], said)) for said in map(list, zip(*votes, strict=True))
        ]

    return Oracle(compare, name, antisymmetric=True)


def _winner(votes: Sequence[float]) -> float:
    # Averaging two orders leaves a voter's tie within rounding of 1/2.
    balance = sum(float(np.sign(round(vote - 0.5, 9))) for vote in votes)
    return float((np.sign(balance) + 1) / 2)


def from_table(game: PreferenceGame, name: str = "table", *, prompt: Callable[[Example], str] | None = None) -> Oracle:
    """The oracle of a known game: its labels are the answers (spaces around them ignored), its prompts the prompts.

    ``prompt(example)`` gives the game's name of the prompt (default: the conversation's text). An answer the game does
    not know has no verdict, but equals itself.
    """
    places = [{label: i for i, label in enumerate(labels)} for labels in game.names]

    def one(example: Example, a: str, b: str) -> float | None:
        key = "" if not game.contextual else (prompt or (lambda e: conversation_text(prompt_of(e))))(example)
        if key not in game.prompts:
            raise CoalaError(f"The game has no prompt {key!r:.60}; it has {list(game.prompts)!r:.200}.")
        number = game.prompts.index(key)
        i, j = places[number].get(a.strip()), places[number].get(b.strip())
        if i is None or j is None:
            return 0.5 if a.strip() == b.strip() else None
        return float(game.matrices[number][i, j])

    return from_callable(one, name, antisymmetric=True)


def from_judge(judge: Any) -> Oracle:
    """Any :class:`coala.evaluation.Judge`: an object with ``name`` and ``compare(prompt, first, second)``.

    A comparison that fails, or has no preference, is no verdict.
    """
    from coala.evaluation import JudgeFailure

    def one(example: Example, a: str, b: str) -> float | None:
        first, second = (Generation("", text, side, 0, 0, math.nan, math.nan) for side, text in (("a", a), ("b", b)))
        try:
            found = judge.compare(prompt_of(example), first, second).preference
        except JudgeFailure:
            return None
        return None if found is None else float(found)

    return from_callable(one, str(judge.name))
