"""The house style: each rule on texts that keep it and break it, its score and judge; other measures of a text."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coala.evaluation.house_style import RULES, rules_kept, sentences, style_score, syllables, words_of
from coala.evaluation.judges import RuleJudge
from coala.evaluation.readability import coleman_liau, grammar_faults, has_grammar_checker
from coala.values import Generation

GOOD = "Ice is water that has frozen. It floats because it is lighter. Have you seen it on a lake?"
TWENTY = " ".join(["word"] * 20)


@pytest.mark.parametrize(
    ("rule", "text", "kept"),
    [
        *((rule, GOOD, True) for rule in RULES),
        ("short-sentences", f"{TWENTY}.", True),
        ("short-sentences", f"{TWENTY} more.", False),
        ("short-sentences", f"{TWENTY}\n{TWENTY}", True),  # a line break ends a sentence
        ("short-sentences", f"{TWENTY[:49]} e.g. {TWENTY[:49]} Dr. Ed 3.5 ok.", False),  # no stop ends one in here
        ("plain-words", "The cat sat on the mat by the big red door.", True),
        ("plain-words", "Photosynthesis necessitates considerable illumination.", False),
        ("plain-words", "One elephant ate all of our hay.", False),  # one of seven is above one in eight
        ("plain-words", "One elephant ate all of our old hay.", True),
        ("no-markup", "It costs 3 * 4 = 12, or 1.5 each - really.", True),
        ("no-markup", "The word is snake_case, 2019. Fine.", True),
        ("no-markup", "Well:\n- one\n- two", False),
        ("no-markup", "Well:\n1. one\n2. two", False),
        ("no-markup", "This is **bold**.", False),
        ("no-markup", "# A title\nText.", False),
        ("no-markup", "Use `print`.", False),
        ("no-markup", "See [here](there).", False),
        ("no-markup", "*smiles* Hello.", False),
        ("no-markup", "It is \\(x^2\\).", False),
        ("at-most-60-words", "word " * 60, True),
        ("at-most-60-words", "word " * 61, False),
        ("at-most-60-words", "don't well-known 1,000.5 " * 20, True),  # three words, twenty times
        ("asks-back", "It rains. Do you like rain?", True),
        ("asks-back", "It rains. Do you like rain? \U0001f600", True),
        ("asks-back", 'It rains. "Do you like rain?"', True),
        ("asks-back", "It rains. Do you like rain? I do.", False),
        ("asks-back", "Do you like rain?", False),  # it says nothing first
        ("asks-back", "It rains. Why?", False),  # one word asks nothing of the reader
        ("asks-back", "It rains. Do you like", False),
    ],
)
def test_a_rule(rule: str, text: str, kept: bool) -> None:
    assert RULES[rule](text) is kept
    assert rules_kept(text)[rule] is kept


@pytest.mark.parametrize("text", ["", "  \n", "...", "\U0001f600", "?!"])
def test_a_text_without_words_keeps_no_rule(text: str) -> None:
    assert not any(rules_kept(text).values())
    assert style_score(text) == 0


def test_sentences_and_words() -> None:
    assert sentences("Dr. Smith has 3.5 cats, e.g. Tom. Really?? Yes :)\nOk") == [
        "Dr. Smith has 3.5 cats, e.g. Tom.",
        "Really??",
        "Yes :)",
        "Ok",
    ]
    assert words_of("It's 3.5, or 1,000: well-known!") == ["It's", "3.5", "or", "1,000", "well-known"]


def test_syllables() -> None:
    """Against counts made by hand."""
    known = {
        1: "make played named time hopes strength the air know fridge",
        2: "table wanted people little science pages horses ocean being create",
        3: "elephant animal energy beautiful radio together important",
        4: "education experience society usually electrical",
        5: "photosynthesis university electricity",
    }
    found = [(n, syllables(word)) for n, words in known.items() for word in words.split()]
    assert sum(a == b for a, b in found) >= 0.95 * len(found)
    # What the rule asks is three or more.
    assert all((a >= 3) == (b >= 3) for a, b in found)


@given(st.text(max_size=300))
def test_the_whole_part_of_the_score_counts_the_rules(text: str) -> None:
    assert int(style_score(text)) == sum(rules_kept(text).values()) == RuleJudge("house-style").score(text)


def test_the_score_tells_near_from_far() -> None:
    assert style_score(GOOD) == 5
    assert style_score("word " * 65) > style_score("word " * 300)
    assert style_score("It rains. Why? It does.") > style_score("It rains. It does.")


def test_the_judge_prefers_more_rules_kept_and_ties_as_many() -> None:
    def verdict(first: str, second: str) -> float | None:
        sides = [Generation("p", text, name, 0, 1, math.nan, math.nan) for name, text in (("a", first), ("b", second))]
        return RuleJudge("house-style").compare((), *sides).preference

    assert verdict(GOOD, "Ice is cold.") == 1
    assert verdict("Ice is cold.", GOOD) == 0
    # Unlike in score, alike in rules kept.
    assert verdict("It rains. Why? It does.", "It rains. It does.") == 0.5


def test_coleman_liau() -> None:
    """The formula's own terms: 100 words of five letters in ten sentences are 0.0588 x 500 - 0.296 x 10 - 15.8."""
    text = " ".join([" ".join(["abcde"] * 10) + "."] * 10)
    assert coleman_liau(text) == pytest.approx(0.0588 * 500 - 0.296 * 10 - 15.8)
    assert coleman_liau("The cat sat.") < coleman_liau("Considerable illumination necessitates photosynthesis.")
    assert math.isnan(coleman_liau("12 34"))


@pytest.mark.skipif(not has_grammar_checker(), reason="harper-py is not installed")
def test_grammar_faults() -> None:
    wrong, right = grammar_faults(["This is an test of the the checker.", "This is a test of the checker."])
    assert right == 0
    assert wrong >= 2
