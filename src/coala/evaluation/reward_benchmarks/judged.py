"""Judged replies as items: MT-Bench, Arena-Hard, Vicuna and AlpacaEval, their judgements joined with the texts judged.

A judgement is an item of its own, with what the judge was shown first; judgements of one question are one group. Ties,
judgements without a verdict and those whose texts are not at hand are left out and counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from coala.evaluation.alpaca import read_annotations
from coala.evaluation.arena import games_of, models_of
from coala.evaluation.mtbench import read_matches
from coala.evaluation.reward_benchmarks.benchmark import Item, RewardBenchmark
from coala.evaluation.reward_benchmarks.labelled import rank_rows, ties_left
from coala.evaluation.reward_benchmarks.reading import Paths, files_of
from coala.evaluation.rows import FileRow, read_rows, shown
from coala.values import CoalaError, Turn


@dataclass(frozen=True)
class Texts:
    """What was asked and answered: by question its category and turns, by model and question or by id the answers."""

    questions: Mapping[str, tuple[str, tuple[str, ...]]]
    answers: Mapping[tuple[str, str], tuple[str, ...]]
    by_id: Mapping[str, tuple[str, ...]]


@dataclass
class _Found:
    """Items as they come, and what is left out."""

    items: list[Item] = field(default_factory=list)
    ties: int = 0
    errors: int = 0
    textless: int = 0

    def add(
        self, id: str, asked: tuple[str, str, str], replies: tuple[str | None, str | None], won: float | None
    ) -> None:
        """One judgement of ``replies`` as shown: ``won`` by the first 1, the second 0, a tie 1/2, no verdict None.

        ``asked`` are the question's id, its category and its text.
        """
        question, category, prompt = asked
        if won is None:
            self.errors += 1
        elif won == 0.5:
            self.ties += 1
        elif replies[0] is None or replies[1] is None:
            self.textless += 1
        else:
            self.items.append(Item.of_two(id, category, prompt, (replies[0], replies[1]), won > 0.5, question))

    def benchmark(self, what: str, remarks: Iterable[str] = ()) -> RewardBenchmark:
        lost = self.textless
        if not self.items:
            raise CoalaError(
                f"Found no {what} with a verdict and both texts ({self.ties} ties, {self.errors} without a verdict, "
                f"{lost} without a text), expected at least one. Fix: give the answers of the models that were judged."
            )
        said = [*remarks, *ties_left(self.ties)]
        said += [f"{self.errors} {what}s have no verdict and are left out"] if self.errors else []
        said += [f"{lost} {what}s are skipped because their answers are missing"] if lost else []
        return RewardBenchmark(tuple(self.items), rank_rows, tuple(said))


def read_texts(questions: Paths, answers: Paths) -> Texts:
    """Questions (``question_id`` or ``uid``; ``turns``, ``text`` or ``prompt``; perhaps ``category``) and answers.

    An answer has the question's name, ``model_id`` or ``model``, perhaps ``answer_id``, and its text in ``choices``,
    ``messages``, ``text`` or ``output``.
    """
    asked: dict[str, tuple[str, tuple[str, ...]]] = {}
    for row in _rows(questions):
        category = row.label("category") if row.get("category") not in (None, "") else ""
        turns = row.get("turns") if row.name_of("turns") else [row.text("text", "prompt")]
        asked[row.label("question_id", "uid")] = category, _texts(row, "turns", turns)
    said: dict[tuple[str, str], tuple[str, ...]] = {}
    by_id: dict[str, tuple[str, ...]] = {}
    for row in _rows(answers):
        texts = _answer(row)
        said[row.label("model_id", "model"), row.label("question_id", "uid")] = texts
        if row.name_of("answer_id"):
            by_id[row.label("answer_id")] = texts
    return Texts(asked, said, by_id)


def read_mtbench_games(path: Paths, questions: Paths, answers: Paths) -> RewardBenchmark:
    """MT-Bench's pairwise judgements (as :func:`coala.evaluation.mtbench.read_matches` takes them), a game an item.

    The prompt of a second turn is both questions; what each model had answered to the first is no part of it. Model 1
    is shown first in game 1 and second in game 2.
    """
    texts, found, remarks = read_texts(questions, answers), _Found(), list[str]()
    for file in files_of(path):
        matches, said = read_matches(file)
        remarks += said
        for match in matches:
            category, turns = _question(texts, match.question)
            asked = match.question, category, "\n\n".join(turns[: match.turn])
            models = match.model_1, match.model_2
            replies = [_turn(texts, model, match.question, match.turn - 1) for model in models]
            for game, outcome in enumerate(match.outcomes):
                shown_first = game == 0
                won = {"model_1": 1.0, "model_2": 0.0, "tie": 0.5, "error": None}[outcome]
                both = (replies[0], replies[1]) if shown_first else (replies[1], replies[0])
                won = won if shown_first or won is None else 1 - won
                found.add(f"{match.question}:{match.turn}:{':'.join(models)}:{game + 1}", asked, both, won)
    return found.benchmark("game", remarks)


def read_arena_games(path: Paths, questions: Paths, answers: Paths) -> RewardBenchmark:
    """Arena-Hard's judgements with ``games``, one item each, whatever the strength of its verdict.

    The baseline is shown first in game 0, the model in game 1.
    """
    texts, found = read_texts(questions, answers), _Found()
    for row in _rows(path):
        named = row.label("question_id", "uid", "question")
        category, turns = _question(texts, named)
        if row.get("games") is None:
            raise row.fault("games", "no such field", "a list of two games", "give judgements, not battles")
        model, baseline = models_of(row, None, None)
        for game, verdict in enumerate(games_of(row, "last")[0]):
            shown_first, second = (baseline, model) if game == 0 else (model, baseline)
            replies = _turn(texts, shown_first, named, 0), _turn(texts, second, named, 0)
            won = None if verdict is None else 0.5 if "=" in verdict else float(verdict.startswith("A"))
            found.add(f"{named}:{model}:{game}", (named, category, turns[0]), replies, won)
    return found.benchmark("game")


def read_vicuna_reviews(path: Paths, questions: Paths, answers: Paths) -> RewardBenchmark:
    """Vicuna's reviews: ``question_id``, ``answer1_id``, ``answer2_id``, ``score`` of both; answer 1 is shown first."""
    texts, found = read_texts(questions, answers), _Found()
    for place, row in enumerate(_rows(path)):
        named = row.label("question_id")
        category, turns = _question(texts, named)
        scores = row.get("score")
        if not (isinstance(scores, list) and len(scores) == 2 and all(isinstance(one, int | float) for one in scores)):
            raise row.fault("score", shown(scores), "a list of two numbers", "correct or delete the row")
        sides = [texts.by_id.get(row.label(f"answer{number}_id")) for number in (1, 2)]
        replies = tuple(None if one is None else one[0] for one in sides)
        won = None if min(scores) < 0 else 0.5 if scores[0] == scores[1] else float(scores[0] > scores[1])
        found.add(f"{named}:{place}", (named, category, turns[0]), (replies[0], replies[1]), won)
    return found.benchmark("review")


def read_alpaca_annotations(path: Paths) -> RewardBenchmark:
    """AlpacaEval's annotations with ``instruction``, ``output_1``, ``output_2``, ``preference``, perhaps ``dataset``.

    Output 2 is right above 1.5; which of the two the judge was shown first is not in the file.
    """
    items: list[Item] = []
    ties = missing = 0
    for file in files_of(path):
        preferences = read_annotations(file).preference
        for place, (row, preference) in enumerate(zip(read_rows(file), preferences, strict=True)):
            if preference != preference:
                missing += 1
                continue
            ties += (tie := preference in (0.0, 1.5))
            if tie:
                continue
            right, wrong = (row.text(f"output_{side}") for side in ((2, 1) if preference > 1.5 else (1, 2)))
            subset = row.label("dataset") if row.get("dataset") not in (None, "") else ""
            asked = (Turn("user", row.text("instruction")),)
            items.append(Item(f"{row.label('generator_2')}:{place}", subset, asked, (right,), (wrong,)))
    if not items:
        raise CoalaError("Found no annotation with a preference, expected at least one. Fix: give a complete file.")
    remarks = [*ties_left(ties), *([f"{missing} annotations have no preference and are left out"] if missing else [])]
    return RewardBenchmark(tuple(items), rank_rows, tuple(remarks))


def _rows(path: Paths) -> list[FileRow]:
    return [row for file in files_of(path) for row in read_rows(file)]


def _question(texts: Texts, named: str) -> tuple[str, tuple[str, ...]]:
    if named not in texts.questions:
        raise CoalaError(
            f"Found a judgement of question {shown(named)}, expected one of the {len(texts.questions)} questions. "
            "Fix: give the question file that the judgements are of."
        )
    return texts.questions[named]


def _turn(texts: Texts, model: str, question: str, turn: int) -> str | None:
    said = texts.answers.get((model, question), ())
    return said[turn] if turn < len(said) else None


def _answer(row: FileRow) -> tuple[str, ...]:
    """The answer to each turn."""
    if row.name_of("choices"):
        choices = row.get("choices")
        first = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(first, Mapping):
            raise row.fault("choices", shown(choices), "a list of objects with turns", "correct or delete the row")
        return _texts(row, "choices", first.get("turns"))
    if row.name_of("messages"):
        messages = row.get("messages")
        said = [
            one.get("content")
            for one in (messages if isinstance(messages, list) else [])
            if isinstance(one, Mapping) and one.get("role") == "assistant"
        ]
        return _texts(row, "messages", said)
    return (row.text("text", "output", "answer"),)


def _texts(row: FileRow, name: str, value: Any) -> tuple[str, ...]:
    """A list of texts, or of objects that hold one as ``content`` or ``answer``."""
    found = [_text(one) for one in value] if isinstance(value, Sequence) and not isinstance(value, str) else []
    if not found or not all(isinstance(one, str) for one in found):
        raise row.fault(name, shown(value), "a list of texts", "correct or delete the row")
    return tuple(one for one in found if isinstance(one, str))


def _text(value: Any) -> Any:
    while isinstance(value, Mapping):
        value = value.get("answer", value.get("content"))
    return value
