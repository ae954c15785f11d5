"""The capability control: what counts as an answer, and that its questions are sound."""

from __future__ import annotations

import pytest

from coala.evaluation.capability import Question, capability_questions


@pytest.mark.parametrize(
    ("accepts", "reply", "right"),
    [
        (("Paris",), "The capital is PARIS, of course!", True),
        (("Paris",), "The parish is old.", False),
        (("Paris",), "", False),
        (("7",), "There are seven days.", True),
        (("7",), "There are 17 days, or 7.5.", False),
        (("24",), "Twenty-four hours.", True),
        (("24",), "Twenty four", True),
        (("24",), "Twenty, four", True),  # punctuation counts for nothing
        (("60",), "sixty-one", False),
        (("4",), "It is fourteen.", False),
        (("1000",), "1,000 metres, or one thousand.", True),
        (("105",), "one hundred and five", True),
        (("carbon dioxide", "CO2"), "They take in Carbon-Dioxide.", True),
        (("carbon dioxide", "CO2"), "They take in carbon. Dioxin is bad.", False),
        (("CO2",), "It is CO\u2082.", True),
        (("Leonardo",), "Leonardo's work.", True),
        (("Sao Paulo",), "S\u00e3o Paulo", True),
    ],
)
def test_an_answer(accepts: tuple[str, ...], reply: str, right: bool) -> None:
    assert Question("?", accepts).answered_by(reply) is right


def test_the_questions() -> None:
    questions = capability_questions()
    assert len(questions) == len({q.prompt for q in questions}) == 100
    assert len({q.topic for q in questions}) == 10
    for one in questions:
        assert not one.answered_by(one.prompt), f"an echo answers it: {one.prompt}"
        assert all(one.answered_by(f"Well, it is {answer}.") for answer in one.accepts)
        assert not one.answered_by("I do not know.")
