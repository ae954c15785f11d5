"""Arena-Hard from saved judgements: verdicts, weighted battles, win rates against a baseline, Bradley-Terry ratings.

Scores are in percent. A strong verdict (``>>``) counts as three battles and a question is judged twice, so battles of
one question are far from independent: the interval to trust draws questions. Style control is in `arena_style`.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coala.data.reasoning import spoken
from coala.evaluation.alpaca import in_percent
from coala.evaluation.rows import FileRow, read_rows, shown, shown_path
from coala.evaluation.win_rates import place_alone
from coala.settings import Board, VerdictRule
from coala.statistics.intervals import Float, mean_estimate, share_estimate, void
from coala.statistics.logistic import fit_logistic
from coala.values import CoalaError, Estimate

STRONG_WEIGHT = 3  # battles for one strong verdict
SCALE, BASE, ANCHOR = 400.0, 10.0, 1000.0  # ratings: 400 points are odds of ten to one; the baseline is at 1000
_VERDICTS = tuple(re.compile(pattern) for pattern in (r"\[\[([AB<>=]+)\]\]", r"\[([AB<>=]+)\]"))


@dataclass(frozen=True, eq=False)
class Battles:
    """Battles of ``first`` against ``second`` (n,) on ``question``: ``outcome`` 1 when first wins, 0, 1/2 for a tie.

    ``n_failed`` counts games without a verdict; ``nothing_said`` tells, for a model against the baseline, why its
    verdicts say nothing (:func:`coala.evaluation.win_rates.place_alone`). A model against itself is refused: in the
    published design matrix its second entry overwrites the first and shifts every rating.
    """

    first: NDArray[np.str_]
    second: NDArray[np.str_]
    outcome: Float
    question: NDArray[np.str_]
    n_failed: int = 0
    remarks: tuple[str, ...] = ()
    nothing_said: Mapping[tuple[str, str], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, kind in (("first", str), ("second", str), ("outcome", np.float64), ("question", str)):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=kind))
        lengths = sorted({len(self.first), len(self.second), len(self.outcome), len(self.question)})
        if len(lengths) > 1:
            raise CoalaError(f"Battles need columns of one length; found {lengths}.")
        if (same := np.flatnonzero(self.first == self.second)).size:
            raise CoalaError(
                f"{same.size} of {len(self)} battles set a model against itself (the first is row {same[0] + 1}: "
                f"{shown(str(self.first[same[0]]))}); expected two models. Leave such rows out."
            )
        if len(self) and not ((self.outcome >= 0) & (self.outcome <= 1)).all():
            raise CoalaError("A battle's outcome is not in [0, 1]; expected 1, 1/2 or 0. Fix: correct the battles.")

    def __len__(self) -> int:
        return len(self.outcome)

    def take(self, rows: NDArray[Any]) -> Battles:
        """The battles selected by an index or boolean array."""
        return Battles(self.first[rows], self.second[rows], self.outcome[rows], self.question[rows])

    @property
    def models(self) -> list[str]:
        return sorted({*self.first.tolist(), *self.second.tolist()})


@dataclass(frozen=True)
class ArenaScore:
    """A model's score against the baseline. Estimates are in percent.

    ``score`` has the bootstrap interval that draws questions; ``published_interval`` is the same value with the one
    that draws rows, as leaderboards print it. Counts are of weighted battles. ``rating`` is the Bradley-Terry rating
    with the baseline at 1000, infinite for a model that won or lost everything.
    """

    model: str
    baseline: str
    score: Estimate
    published_interval: Estimate
    excluding_ties: Estimate
    wins: int
    losses: int
    ties: int
    n_questions: int
    rating: float


def parse_verdict(judgment: str, rule: VerdictRule = "last") -> str | None:
    """``A>>B``, ``A>B``, ``A=B``, ``B>A`` or ``B>>A``; None where the judgement gives no such verdict.

    Thoughts are taken off first; where one has no end there is no verdict. Double brackets count, single ones only if
    there is no double one. Of several, the last ("last", since 2025), or none at all unless they agree ("unanimous",
    the code of 2024). ``A<B`` is read as ``B>A``.
    """
    return _verdict_of(verdicts_in(judgment), rule)


def verdicts_in(judgment: str) -> list[str]:
    """All verdicts that a judgement gives outside its thoughts, as they are written but in capitals."""
    return _bracketed(spoken(judgment) or "")


def _bracketed(text: str) -> list[str]:
    return next((found for pattern in _VERDICTS if (found := pattern.findall(text.upper()))), [])


def _verdict_of(found: Sequence[str], rule: VerdictRule) -> str | None:
    return _normal(found[-1]) if found and (rule == "last" or len(set(found)) == 1) else None


def _normal(verdict: str) -> str | None:
    match = re.fullmatch(r"([AB])(>>|>|=|<|<<)([AB])", verdict)
    if match is None or match[1] == match[3]:
        return None
    left, sign, right = match.groups()
    if sign == "=":
        return "A=B"
    return f"{left}{sign}{right}" if ">" in sign else f"{right}{sign.replace('<', '>')}{left}"


def battles_of(verdict: str, swapped: bool, strong_weight: int = STRONG_WEIGHT) -> list[float]:
    """The battles of one verdict as outcomes for the model, which is A, or B if ``swapped``: 1 won, 0 lost, 1/2 tied.

    One battle, or ``strong_weight`` alike for ``>>``.
    """
    normal = _normal(verdict)
    if normal is None:
        raise CoalaError(f"The verdict is {shown(verdict)}; expected A>>B, A>B, A=B, B>A or B>>A.")
    won = 0.5 if "=" in normal else float(normal.startswith("A"))
    return [1 - won if swapped else won] * (strong_weight if ">>" in normal else 1)


def read_battles(
    path: Path | str,
    *,
    model: str | None = None,
    baseline: str | None = None,
    rule: VerdictRule = "last",
    strong_weight: int = STRONG_WEIGHT,
) -> Battles:
    """Battles from a file of judgements or of battles.

    Judgements: ``question_id``, ``uid`` or ``question``, and ``games``, two objects with ``judgment`` (a text, or an
    object with ``answer``) or ``score``; in game 0 the baseline is A, in game 1 the model is. The names come from
    ``model`` and ``baseline`` of the row, else from the arguments. Battles: ``winner`` with ``model`` and the baseline,
    or with ``model_a`` and ``model_b``. With a ``strong_weight`` of 1 every game is one battle. CoalaError for anything
    else and for self-battles.
    """
    first: list[str] = []
    second: list[str] = []
    outcome: list[float] = []
    question: list[str] = []
    failed = differing = thinking = several = 0
    seen: Counter[tuple[str, str]] = Counter()
    shown_first: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for row in read_rows(path):
        named = row.label("question_id", "uid", "question")
        if row.get("games") is None:
            pair, won = _battle(row, model, baseline)
            found = [won]
        else:
            pair = models_of(row, model, baseline)
            verdicts, unlike, aloud, many = games_of(row, rule)
            failed += verdicts.count(None)
            differing, thinking, several = differing + unlike, thinking + aloud, several + many
            if len(verdicts) == 2 and None not in verdicts:
                lead = [battles_of(str(verdict), False, 1)[0] for verdict in verdicts]
                shown_first[pair].append((lead[0], lead[1]))
            found = [
                value
                for game, verdict in enumerate(verdicts)
                if verdict is not None
                for value in battles_of(verdict, game == 0, strong_weight)
            ]
            seen[pair[0], named] += 1
        first += [pair[0]] * len(found)
        second += [pair[1]] * len(found)
        outcome += found
        question += [named] * len(found)
    remarks = []
    if failed:
        remarks.append(f"{failed} games have no verdict and are left out")
    if differing:
        remarks.append(f"{differing} stored scores differ from what their judgements say; the judgements count")
    if thinking:
        remarks.append(
            f"{thinking} judgements think aloud, and the verdict is read from what follows; the published parser would "
            "read the thoughts"
        )
    if several:
        counts = "the last counts" if rule == "last" else "they count as none"
        remarks.append(f"{several} games give verdicts that differ; {counts}, as published")
    if again := sum(count - 1 for count in seen.values()):
        remarks.append(f"{again} rows repeat a model and question; all are counted")
    if not outcome:
        raise CoalaError(f"{shown_path(path)}: found no game with a verdict; expected at least one. Judge again.")
    empty = {pair: why for pair, both in shown_first.items() if (why := place_alone(*zip(*both, strict=True)))}
    remarks += [f"{pair[0]}: {why}; its score says nothing" for pair, why in empty.items()]
    sides = np.array(first), np.array(second)
    return Battles(*sides, np.array(outcome), np.array(question), failed, tuple(remarks), empty)


def score(
    battles: Battles,
    baseline: str,
    *,
    board: Board = "v0.1",
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, ArenaScore]:
    """Every model's mean outcome against the baseline, in percent.

    With one baseline for all this equals the win rate that a Bradley-Terry fit predicts, so no fit is needed.
    ``board`` sets what the published interval is: 95 % for v0.1, 90 % (5-95) for v2.0, both over rows.
    """
    if not (battles.first == baseline).any() and not (battles.second == baseline).any():
        raise CoalaError(
            f"No battle has the baseline {shown(baseline)}; found {', '.join(map(shown, battles.models[:8]))}. "
            "Name one of these as the baseline."
        )
    found = {}
    for model in battles.models:
        straight = (battles.first == model) & (battles.second == baseline)
        turned = (battles.first == baseline) & (battles.second == model)
        won = np.where(straight, battles.outcome, 1 - battles.outcome)[straight | turned]
        if model == baseline or not len(won):
            continue
        question = battles.question[straight | turned]
        if why := battles.nothing_said.get((model, baseline)):
            found[model] = _void(model, baseline, why, len(won), len(set(question.tolist())))
            continue
        decided = won != 0.5
        level = 0.95 if board == "v0.1" else 0.9
        value = float(won.mean())
        found[model] = ArenaScore(
            model=model,
            baseline=baseline,
            score=_percent(won, question, draws, seed, 0.95),
            published_interval=_percent(won, None, draws, seed, level),
            excluding_ties=in_percent(share_estimate(won[decided] > 0.5, question[decided], "wins among decided")),
            wins=int((won > 0.5).sum()),
            losses=int((won < 0.5).sum()),
            ties=int((~decided).sum()),
            n_questions=len(set(question.tolist())),
            rating=ANCHOR + SCALE * _log_odds(value),
        )
    return found


def _void(model: str, baseline: str, why: str, n: int, n_questions: int) -> ArenaScore:
    """No score, since the verdicts say nothing of the replies."""
    nothing = in_percent(void("mean outcome", n, why))
    return ArenaScore(model, baseline, nothing, nothing, nothing, 0, 0, 0, n_questions, math.nan)


def bradley_terry(battles: Battles, anchor: str, rating: float = ANCHOR) -> dict[str, float]:
    """Maximum-likelihood ratings, P(a beats b) = 1 / (1 + 10^((R_b - R_a)/400)), with ``anchor`` at ``rating``.

    A tie is half a win for both. CoalaError where no finite ratings fit best: when the models fall into two sides of
    which one never won anything from the other (Ford 1957).
    """
    models = battles.models
    place = {name: i for i, name in enumerate(models)}
    if anchor not in place:
        raise CoalaError(f"No battle has {shown(anchor)}; found {', '.join(map(shown, models[:8]))}.")
    a = np.array([place[name] for name in battles.first.tolist()])
    b = np.array([place[name] for name in battles.second.tolist()])
    k = len(models)
    count = np.zeros((k, k))
    won = np.zeros((k, k))
    np.add.at(count, (a, b), 1.0)
    np.add.at(won, (a, b), battles.outcome)
    _connected(won + (count - won).T, models)
    pairs = np.argwhere(count > 0)
    X = np.zeros((len(pairs), k))
    X[np.arange(len(pairs)), pairs[:, 0]] = 1.0
    X[np.arange(len(pairs)), pairs[:, 1]] = -1.0
    weight = count[pairs[:, 0], pairs[:, 1]]
    free = [i for i in range(k) if i != place[anchor]]
    fit = fit_logistic(X[:, free], won[pairs[:, 0], pairs[:, 1]] / weight, weight)
    strength = np.zeros(k)
    strength[free] = fit.coefficients * SCALE / math.log(BASE)
    return {name: rating + float(strength[i]) for name, i in place.items()}


def _connected(won: Float, models: Sequence[str]) -> None:
    """Along wins (or half wins) the first model must reach every other, and be reached by it."""
    for beats, lacks in ((won > 0, "never lost to"), ((won > 0).T, "never won against")):
        reached = {0}
        frontier = [0]
        while frontier:
            frontier = sorted({int(j) for j in np.flatnonzero(beats[frontier].any(axis=0))} - reached)
            reached.update(frontier)
        if left := [shown(name) for i, name in enumerate(models) if i not in reached]:
            raise CoalaError(
                f"No finite ratings fit: {', '.join(left[:8])} {lacks} any of the other {len(reached)} models. Leave "
                "them out, add battles, or use the win rates."
            )


def _log_odds(share: float) -> float:
    if share in (0.0, 1.0):
        return math.inf if share else -math.inf
    return math.log(share / (1 - share), BASE)


def _percent(won: Float, group: NDArray[np.str_] | None, draws: int, seed: int, level: float) -> Estimate:
    if (won == won[0]).all():
        # Every draw would be the same; that no battle went otherwise does not prove that none ever will.
        return in_percent(share_estimate(won, group, "mean outcome"))
    found = mean_estimate(100 * won, group, how="bootstrap", draws=draws, seed=seed, level=level)
    return Estimate(found.value, max(0.0, found.low), min(100.0, found.high), found.n, found.method)


def models_of(row: FileRow, model: str | None, baseline: str | None) -> tuple[str, str]:
    ours = row.label("model") if row.get("model") is not None or model is None else model
    other = row.label("baseline") if row.get("baseline") is not None or baseline is None else baseline
    if ours == other:
        raise row.fault("model", shown(ours), "another model than the baseline", "leave self-battles out")
    return ours, other


def _battle(row: FileRow, model: str | None, baseline: str | None) -> tuple[tuple[str, str], float]:
    winner = row.text("winner").lower()
    if row.get("model_a") is not None:
        pair = row.label("model_a"), row.label("model_b")
        if pair[0] == pair[1]:
            raise row.fault("model_b", shown(pair[1]), "another model than model_a", "leave self-battles out")
        meaning = {"model_a": 1.0, "model_b": 0.0, "tie": 0.5, "tie (bothbad)": 0.5}
    else:
        pair = models_of(row, model, baseline)
        meaning = {"model": 1.0, "baseline": 0.0, "tie": 0.5}
    if winner not in meaning:
        raise row.fault("winner", shown(winner), f"one of {', '.join(meaning)}", "correct or delete the row")
    return pair, meaning[winner]


def games_of(row: FileRow, rule: VerdictRule) -> tuple[list[str | None], int, int, int]:
    """The verdicts of a row's games, and how many differ from what is stored, think aloud, and give several."""
    games = row.fields["games"]
    if not isinstance(games, list) or not 1 <= len(games) <= 2 or not all(isinstance(game, dict) for game in games):
        raise row.fault("games", shown(games), "a list of two games", "correct or delete the row")
    verdicts: list[str | None] = []
    differing = thinking = several = 0
    for game in games:
        stored, text = game.get("score"), game.get("judgment")
        if isinstance(text, dict):
            text = text.get("answer")
        if not isinstance(stored, str | None) or not isinstance(text, str | None):
            bad = text if isinstance(stored, str | None) else stored
            raise row.fault("games", shown(bad), "texts under judgment and score", "correct or delete the row")
        verdict = None if stored is None else _normal(stored.upper())
        if text is not None:
            said = verdicts_in(text)
            read = _verdict_of(said, rule)
            thinking += said != _bracketed(text)
            several += len(set(said)) > 1
            differing += "score" in game and read != verdict
            verdict = read
        verdicts.append(verdict)
    return verdicts, differing, thinking, several
