"""A loaded model in the place of an endpoint: each kind of judge reads its verdict, and nothing is scored twice."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from coala.evaluation import JudgeFailure, judge_many, read_instructions, win_rate
from coala.evaluation.arena_judging import battles
from coala.evaluation.grading import Answered, grade_many
from coala.evaluation.judges import ChatJudge, LocalEndpoint, VerdictMemory, asked
from coala.values import Turn, user
from tests.evaluation_helpers import reply


class Liking:
    """A model that likes `GOOD`: it expects ``liked`` where that is shown first, and ``other`` elsewhere."""

    def __init__(self, liked: str, other: str) -> None:
        self.liked, self.other, self.asked = liked, other, 0

    def __call__(self, prompt: Sequence[Turn], replies: Sequence[str]) -> list[float]:
        self.asked += 1
        text = prompt[-1].text
        wanted = self.liked if text.index("GOOD") < text.index("poor reply") else self.other
        exact = {wanted, f"[[{wanted}]]", json.dumps({"reason": "", "verdict": wanted})}
        assert len(exact & set(replies)) == 1
        return [-0.5 if one in exact else -50.0 for one in replies]


def made(mode: str, parser: str | None, model: Liking, keeper: Any = None) -> ChatJudge:
    told = read_instructions(mode)
    told = told if parser is None else replace(told, parser=parser)  # type: ignore[arg-type]
    return ChatJudge(told, LocalEndpoint(told, model, "local 123"), model="here", keeper=keeper)


@pytest.mark.parametrize(
    ("mode", "parser", "liked", "other"),
    [
        ("weighted", None, "m", "M"),
        ("pairwise", "brackets", "A", "B"),
        ("pairwise", "json", "A", "B"),
        ("arena", "brackets", "A>>B", "B>A"),
        ("arena", "json", "A>>B", "B>A"),
    ],
)
def test_comparisons(mode: str, parser: str | None, liked: str, other: str) -> None:
    ours = [reply(f"p{i}", f"GOOD reply {i}", "ours") for i in range(3)]
    theirs = [reply(f"p{i}", f"poor reply {i}", "theirs") for i in range(3)]
    prompts = {f"p{i}": user("Say it.") for i in range(3)}
    keeper, model = VerdictMemory(), Liking(liked, other)
    by = made(mode, parser, model, keeper)
    found = judge_many(ours, theirs, by, prompts=prompts)
    assert win_rate(found.judgements).value == pytest.approx(1.0, abs=1e-12)
    assert (found.failures, found.cost.calls, found.cost.answers) == ({}, 6, 6)
    if mode == "arena":
        fought = battles(ours, theirs, by, prompts)
        assert fought.outcome.tolist() == [1.0] * 3 * (3 + 1)  # >> in one order, > in the other
    # Another judge object with the same model and folder finds the answers; with another model it does not.
    again = judge_many(ours, theirs, made(mode, parser, model, keeper), prompts=prompts)
    assert (again.cost.calls, again.cost.kept, model.asked) == (0, 6, 6)
    assert again.judgements == found.judgements


@pytest.mark.parametrize("parser", ["brackets", "json"])
def test_grades_are_means_under_the_probabilities(parser: str) -> None:
    told = replace(read_instructions("grade"), parser=parser)  # type: ignore[arg-type]

    def log_probs(prompt: Sequence[Turn], replies: Sequence[str]) -> list[float]:
        return [math.log({7: 0.2, 8: 0.6, 9: 0.2}.get(grade, 1e-30)) - 40 for grade in range(1, len(replies) + 1)]

    by = ChatJudge(told, LocalEndpoint(told, log_probs, "local"), model="here")
    value, said = by.rate(asked(["q"], [["a"]]))
    assert value == 8.0
    assert "8.0" in said
    answered = [Answered("1", "c", "m", ("q", "again"), ("a", "b"))]
    assert [row["score"] for row in grade_many(answered, by).rows] == [8.0, 8.0]


@pytest.mark.parametrize("bad", [[math.nan], [-math.inf], [0.0, 0.0]])
def test_log_probabilities_that_are_none_are_failures(bad: list[float]) -> None:
    told = read_instructions("arena")
    by = ChatJudge(told, LocalEndpoint(told, lambda p, r: bad if len(bad) > 1 else bad * len(r), "x"), model="here")
    with pytest.raises(JudgeFailure, match="log-probabilities"):
        by.settle(asked(["q"], [["a"], ["b"]]))
    assert (by.cost.calls, by.cost.answers) == (1, 0)
