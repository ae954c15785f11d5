"""Grades for single answers, the way MT-Bench asks for them: two turns, reference answers where there are some.

The rows that come out are what :mod:`coala.evaluation.mtbench` reads. Knows nothing of endpoints.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from coala.callbacks import OnFailure
from coala.evaluation.harness import OnDone, kind_of, run
from coala.evaluation.judges import ChatJudge, Cost, Exchange, JudgeStopped, asked
from coala.evaluation.mtbench import ERROR
from coala.evaluation.rows import FileRow, read_rows, shown


@dataclass(frozen=True)
class Answered:
    """One model's answers to the turns of a question, one or two, with a reference answer to each or none."""

    question: str
    category: str
    model: str
    turns: tuple[str, ...]
    answers: tuple[str, ...]
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class Graded:
    """``rows`` in the published form, a failed grade as a score of -1; ``n_unjudged`` of ``n_grades`` are not there.

    ``words`` holds the first message of each kind of failure.
    """

    rows: tuple[Mapping[str, Any], ...]
    failures: Mapping[str, int]
    n_grades: int
    n_unjudged: int
    stopped: str
    cost: Cost
    words: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BenchmarkQuestion:
    """The turns of a question, one or two, and its category (or "")."""

    question: str
    category: str
    turns: tuple[str, ...]


def read_questions(path: Path | str) -> list[BenchmarkQuestion]:
    """A question file: ``question_id``, ``turns`` and perhaps ``category``, each question once."""
    found: dict[str, BenchmarkQuestion] = {}
    for row in read_rows(path):
        name, turns = row.label("question_id"), _texts(row, row.get("turns"))
        if not 1 <= len(turns) <= 2:
            raise row.fault("turns", f"{len(turns)} turns", "1 or 2", "correct or delete the row")
        if name in found:
            raise row.fault("question_id", f"{shown(name)} again", "each question once", "delete one of them")
        found[name] = BenchmarkQuestion(
            name, row.label("category") if row.get("category") not in (None, "") else "", turns
        )
    return list(found.values())


def read_answered(questions: Path | str, answers: Path | str, references: Path | str | None = None) -> list[Answered]:
    """Join a question file (``question_id``, ``category``, ``turns``) with answer files in the published form.

    Answers and references have ``question_id``, ``model_id`` and ``choices``, the first of which holds ``turns``.
    CoalaError for an answer to a question that is not there or has another number of turns.
    """
    asked_for = {one.question: one for one in read_questions(questions)}
    given = {} if references is None else {row.label("question_id"): _choice(row) for row in read_rows(references)}
    found = []
    for row in read_rows(answers):
        question, said = row.label("question_id"), _choice(row)
        if question not in asked_for:
            raise row.fault("question_id", shown(question), "a question of the question file", "name the right files")
        about = asked_for[question]
        if len(said) != len(about.turns):
            raise row.fault("choices", f"{len(said)} turns", str(len(about.turns)), "answer every turn")
        references_to = given.get(question, ())
        found.append(Answered(question, about.category, row.label("model_id"), about.turns, said, references_to))
    return found


def grade_many(
    answered: Sequence[Answered],
    by: ChatJudge,
    *,
    concurrency: int = 1,
    on_progress: OnDone | None = None,
    on_failure: OnFailure | None = None,
) -> Graded:
    """A grade for every turn: the first by itself, the second with the first before it.

    ``concurrency`` and the callbacks are those of :func:`coala.evaluation.harness.judge_many`.
    """
    tasks = [(one, turn) for one in answered for turn in range(1, len(one.turns) + 1)]

    def grade(one: Answered, turn: int) -> tuple[float, str]:
        return by.rate(_exchange(one, turn))

    rows: dict[int, Mapping[str, Any]] = {}
    failures: Counter[str] = Counter()
    words: dict[str, str] = {}
    before, stopped = by.cost, ""
    with closing(run([partial(grade, *task) for task in tasks], by, concurrency)) as results:
        for number, value in results:
            one, turn = tasks[number]
            if isinstance(value, JudgeStopped):
                stopped = stopped or str(value)
                continue
            if isinstance(value, Exception):
                failures[kind_of(value)] += 1
                words.setdefault(kind_of(value), str(value))
                if on_failure is not None:
                    on_failure(one.question, value)
            rows[number] = _row(one, turn, by, value)
            if on_progress is not None:
                on_progress(len(rows), len(tasks))
    return Graded(
        rows=tuple(rows[number] for number in sorted(rows)),
        failures=dict(sorted(failures.items())),
        n_grades=len(tasks),
        n_unjudged=len(tasks) - len(rows),
        stopped=stopped,
        cost=by.cost - before,
        words=dict(sorted(words.items())),
    )


def _exchange(one: Answered, turn: int) -> Exchange:
    return asked(one.turns[:turn], [one.answers[:turn]], one.references[:turn])


def _row(one: Answered, turn: int, by: ChatJudge, value: tuple[float, str] | Exception) -> Mapping[str, Any]:
    prompt = by.instructions.prompt_for(_exchange(one, turn)).name
    row: dict[str, Any] = {
        "question_id": one.question,
        "category": one.category,
        "model": one.model,
        "turn": turn,
        "judge": [by.model, prompt],
    }
    if isinstance(value, Exception):
        return row | {"score": ERROR}
    # Who reads the row reads the grade from a text in brackets again; from JSON it could not.
    said = {"judgment": value[1]} if by.instructions.parser == "brackets" else {"answer": value[1]}
    return row | said | {"score": value[0]}


def _choice(row: FileRow) -> tuple[str, ...]:
    choices = row.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise row.fault("choices", shown(choices), "a list of objects with turns", "correct or delete the row")
    return _texts(row, choices[0].get("turns"))


def _texts(row: FileRow, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise row.fault("turns", shown(value), "a list of texts", "correct or delete the row")
    return tuple(value)
