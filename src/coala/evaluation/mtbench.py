"""MT-Bench from saved judgements: ratings of single answers, and games of two models.

Scores are in 1..10, shares in [0, 1]. Turns of one question count as one group in every interval. Knows nothing of
judges or models; prompts and questions stay in the files of the user.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from coala.data.reasoning import spoken
from coala.evaluation.rows import FileRow, read_rows, shown
from coala.evaluation.win_rates import place_alone
from coala.statistics.intervals import Float, bounded_mean, share_estimate, void
from coala.values import Estimate

ERROR = -1.0  # the score of a judgement that holds no rating, as it is stored
LOWEST, HIGHEST = 1.0, 10.0
_RATINGS = tuple(re.compile(pattern, re.ASCII) for pattern in (r"\[\[(\d+\.?\d*)\]\]", r"\[(\d+\.?\d*)\]"))
_VERDICT = re.compile(r"\[\[([ABC])\]\]")
GameOutcome = Literal["model_1", "model_2", "tie", "error"]
_OUTCOMES: dict[str, GameOutcome] = {name: name for name in ("model_1", "model_2", "tie", "error")}


@dataclass(frozen=True)
class Rating:
    """One judged answer; ``score`` is in 1..10, or -1 where the judgement holds no rating."""

    model: str
    question: str
    turn: int
    category: str
    judge: str
    score: float


@dataclass(frozen=True)
class Match:
    """Two games on one question and turn with the order swapped, each outcome named by the model that won."""

    model_1: str
    model_2: str
    question: str
    turn: int
    judge: str
    outcomes: tuple[GameOutcome, GameOutcome]


@dataclass(frozen=True)
class TurnScores:
    """Mean ratings of one model. ``overall`` is over all valid rows, not over the turn means."""

    model: str
    overall: Estimate
    by_turn: Mapping[int, Estimate]
    by_category: Mapping[str, Estimate]
    n_rows: int
    n_errors: int
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class Contest:
    """What a model won, lost and tied, and the rates (shares in [0, 1]); ``adjusted`` counts a tie one half."""

    model: str
    wins: int
    losses: int
    ties: int
    n_errors: int
    win_rate: Estimate
    loss_rate: Estimate
    adjusted: Estimate
    excluding_ties: Estimate
    remarks: tuple[str, ...]


def parse_rating(judgment: str) -> float:
    """The first ``[[number]]`` of a judgement, else the first ``[number]``, if it lies in 1..10; else -1.

    Thoughts are taken off first; a thought without an end is an error. The single bracket also matches code, as in
    ``a[0]`` or ``[100]``, from which scores of 0 and 100 have been read.
    """
    said = spoken(judgment)
    return ERROR if said is None else _published_rating(said)


def ratings_in(judgment: str) -> tuple[float, ...]:
    """The different ratings that a judgement gives outside its thoughts, in their order, whatever their range."""
    said = spoken(judgment) or ""
    found = next((found for pattern in _RATINGS if (found := pattern.findall(said))), [])
    return tuple(dict.fromkeys(map(_number, found)))


def _published_rating(judgment: str) -> float:
    """As FastChat reads it, but for the range."""
    for pattern in _RATINGS:
        if match := pattern.search(judgment):
            value = _number(match[1])
            return value if LOWEST <= value <= HIGHEST else ERROR
    return ERROR


def parse_game(judgment: str, swapped: bool) -> GameOutcome:
    """Who wins by ``[[A]]``, ``[[B]]`` or ``[[C]]`` (a tie); model 1 is A unless ``swapped``.

    No verdict outside the thoughts, or two that differ, is an error.
    """
    verdicts = set(_VERDICT.findall(spoken(judgment) or ""))
    if len(verdicts) != 1:
        return "error"
    verdict = verdicts.pop()
    return "tie" if verdict == "C" else "model_1" if (verdict == "A") != swapped else "model_2"


def is_pairwise(path: Path | str) -> bool:
    """Whether a file holds games of two models rather than ratings."""
    return read_rows(path)[0].name_of("model_1", "g1_winner", "g1_judgment") is not None


def read_ratings(path: Path | str, categories: Mapping[str, str] | None = None) -> tuple[list[Rating], tuple[str, ...]]:
    """Single-answer judgements, and remarks on them: ``question_id``, ``model``, ``turn``, ``judgment`` or ``score``.

    The rating is read from the judgement's text where there is one; a stored score that differs is remarked on.
    ``categories`` by question are used where rows name none.
    """
    ratings = []
    differing = invalid = thinking = several = 0
    for row in read_rows(path):
        stored = row.value("score") if row.get("score") is not None else None
        if row.get("judgment") is None:
            score = row.value("score")
            if not (LOWEST <= score <= HIGHEST or score == ERROR):
                invalid += 1
                score = ERROR
        else:
            text = row.text("judgment")
            score = parse_rating(text)
            thinking += score != _published_rating(text)
            several += len(ratings_in(text)) > 1
            differing += stored is not None and stored != score
        question = row.label("question_id")
        named = row.get("category") not in (None, "")
        category = row.label("category") if named else (categories or {}).get(question, "")
        ratings.append(Rating(row.label("model"), question, _turn(row), category, _judge(row), score))
    remarks = []
    if differing:
        remarks.append(f"{differing} stored scores differ from what their judgements say; the judgements count")
    if invalid:
        remarks.append(f"{invalid} stored scores outside 1..10 count as errors")
    if thinking:
        remarks.append(
            f"{thinking} judgements think aloud, and the rating is read from what follows; the published parser would "
            "read the thoughts"
        )
    if several:
        remarks.append(f"{several} judgements give ratings that differ; the first counts, as published")
    return ratings, tuple(remarks)


def read_matches(path: Path | str) -> tuple[list[Match], tuple[str, ...]]:
    """Pairwise judgements, and remarks: ``question_id``, ``turn``, ``model_1``, ``model_2`` and both games.

    A game is read from ``g1_judgment``/``g2_judgment`` where there is one, else from ``g1_winner``/``g2_winner``.
    """
    matches = []
    differing = thinking = several = 0
    for row in read_rows(path):
        outcomes: list[GameOutcome] = []
        for game in (1, 2):
            stored = None
            if row.get(f"g{game}_winner") is not None:
                name = row.text(f"g{game}_winner")
                if name not in _OUTCOMES:
                    expected = ", ".join(_OUTCOMES)
                    raise row.fault(f"g{game}_winner", shown(name), f"one of {expected}", "correct or delete the row")
                stored = _OUTCOMES[name]
            if stored is None or row.get(f"g{game}_judgment") is not None:
                text = row.text(f"g{game}_judgment", f"g{game}_winner")
                outcomes.append(parse_game(text, swapped=game == 2))
                found = set(_VERDICT.findall(text))
                said = set(_VERDICT.findall(spoken(text) or ""))
                thinking += found != said
                several += len(said) > 1
                differing += stored is not None and stored != outcomes[-1]
            else:
                outcomes.append(stored)
        models = row.label("model_1"), row.label("model_2")
        if models[0] == models[1]:
            raise row.fault("model_2", shown(models[1]), "another model than model_1", "delete the row")
        matches.append(Match(*models, row.label("question_id"), _turn(row), _judge(row), (outcomes[0], outcomes[1])))
    remarks = []
    if differing:
        remarks.append(f"{differing} stored winners differ from what their judgements say; the judgements count")
    if thinking:
        remarks.append(
            f"{thinking} judgements think aloud, and the verdict is read from what follows; the published parser would "
            "read the thoughts"
        )
    if several:
        remarks.append(
            f"{several} judgements give verdicts that differ and are errors; the published parser takes A before B"
        )
    return matches, tuple(remarks)


def read_categories(path: Path | str) -> dict[str, str]:
    """Category by question from a question file (``question_id``, ``category``)."""
    return {row.label("question_id"): row.label("category") for row in read_rows(path)}


def scores(ratings: Sequence[Rating]) -> dict[str, TurnScores]:
    """Mean scores of every model: overall, by turn and by category, with t intervals that count questions.

    Rows with a score of -1 are left out and counted. A repeated (question, turn) counts again, as the benchmark's own
    code has it, and is remarked on.
    """
    found = {}
    for model in sorted({rating.model for rating in ratings}):
        rows = [rating for rating in ratings if rating.model == model]
        valid = [row for row in rows if row.score != ERROR]
        remarks = _repeats([(row.question, row.turn, row.judge) for row in rows])
        if len(valid) > 1 and len({row.score for row in valid}) == 1:
            remarks += (
                f"every one of the {len(valid)} ratings is {valid[0].score:g}: this judge does not distinguish replies",
            )
        judges = {row.judge for row in rows}
        if len({row.question for row in rows if row.category}) not in (0, len({row.question for row in rows})):
            remarks += ("some questions have no category",)
        if len(judges) > 1:
            remarks += (f"{len(judges)} judges are mixed",)
        found[model] = TurnScores(
            model=model,
            overall=_mean(valid),
            by_turn={
                turn: _mean([row for row in valid if row.turn == turn]) for turn in sorted({row.turn for row in rows})
            },
            by_category={
                name: _mean([row for row in valid if row.category == name])
                for name in sorted({row.category for row in rows} - {""})
            },
            n_rows=len(rows),
            n_errors=len(rows) - len(valid),
            remarks=remarks,
        )
    return found


def contests(matches: Sequence[Match]) -> dict[str, Contest]:
    """Wins, losses and ties of every model over all its matches.

    A match is won only if both games name the same model; any disagreement is a tie; a match with an error in either
    game is left out. ``win_rate`` = wins/n, ``adjusted`` = (wins + ties/2)/n.
    """
    found = {}
    for model in sorted({name for match in matches for name in (match.model_1, match.model_2)}):
        mine = [match for match in matches if model in (match.model_1, match.model_2)]
        used = [match for match in mine if "error" not in match.outcomes]
        result = np.array([_result(match, model) for match in used])
        question = [match.question for match in used]
        decided = result != 0.5
        why = place_alone(*zip(*map(_shown_first, used), strict=True)) if used else ""
        remarks = _repeats([(m.question, m.turn, m.judge, *sorted((m.model_1, m.model_2))) for m in mine])

        def share(
            name: str, values: Float, questions: Sequence[str] = question, n: int = len(used), why: str = why
        ) -> Estimate:
            return void(name, n, why) if why else share_estimate(values, questions, name)

        kept = [name for name, one in zip(question, decided, strict=True) if one]
        found[model] = Contest(
            model=model,
            wins=int((result == 1).sum()),
            losses=int((result == 0).sum()),
            ties=int((~decided).sum()),
            n_errors=len(mine) - len(used),
            win_rate=share("wins", result == 1),
            loss_rate=share("losses", result == 0),
            adjusted=share("wins, a tie one half", result),
            excluding_ties=share("wins among decided matches", result[decided], kept),
            remarks=(*remarks, f"{why}; its rates say nothing") if why else remarks,
        )
    return found


def _result(match: Match, model: str) -> float:
    first, second = match.outcomes
    if first != second or first == "tie":
        return 0.5
    return float((match.model_1 if first == "model_1" else match.model_2) == model)


def _shown_first(match: Match) -> tuple[float, float]:
    """What each game gives to the answer shown first: model 1's in the first game, model 2's in the second."""
    worth = {"model_1": 1.0, "model_2": 0.0, "tie": 0.5}
    return worth[match.outcomes[0]], 1 - worth[match.outcomes[1]]


def _mean(rows: Sequence[Rating]) -> Estimate:
    values: Float = np.array([row.score for row in rows], dtype=np.float64)
    if not rows:
        return Estimate(math.nan, LOWEST, HIGHEST, 0, "mean; no rating")
    above = bounded_mean(values - LOWEST, [row.question for row in rows], of=HIGHEST - LOWEST)
    return Estimate(float(values.mean()), LOWEST + above.low, LOWEST + above.high, above.n, above.method)


def _repeats(keys: Sequence[object]) -> tuple[str, ...]:
    again = sum(count - 1 for count in Counter(keys).values())
    return (f"{again} rows repeat a question and turn; all are counted",) if again else ()


def _number(rating: str) -> float:
    # Longer than any rating: not worth making a number of.
    return float(rating) if len(rating) < 20 else ERROR


def _turn(row: FileRow) -> int:
    turn = row.value("turn", low=1, high=99)
    if turn != int(turn):
        raise row.fault("turn", f"{turn:g}", "a whole number", "correct the row")
    return int(turn)


def _judge(row: FileRow) -> str:
    value = row.get("judge")
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return value[0] if value else ""  # the judge; what follows is the prompt's name
    return "" if value is None else row.label("judge")
