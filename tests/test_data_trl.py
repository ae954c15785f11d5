"""Rows of TRL's preference format: the pair comes back, and TRL itself reads the same prompt and replies."""

from __future__ import annotations

import string
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coala.data import DataError
from coala.values import CoalaError, Pair, Turn, user

said = st.text(string.ascii_letters + string.digits + " .,?!é漢\n", min_size=1, max_size=20).filter(
    lambda text: bool(text.strip()) and text.strip() not in ("None", "null") and "Human" not in text
)
turns = st.lists(st.builds(Turn, st.sampled_from(["system", "user", "assistant"]), said), max_size=3)
replies = st.tuples(said, said).filter(lambda two: two[0].strip() != two[1].strip())
pairs = st.builds(
    lambda before, asked, two, group, rater: Pair((*before, Turn("user", asked)), *two, group, rater),
    turns,
    said,
    replies,
    st.text(string.ascii_letters, min_size=1, max_size=8),
    st.text(string.ascii_letters, max_size=4),
)
FAST = settings(max_examples=20, deadline=None)


@FAST
@given(pairs, st.booleans())
def test_messages_come_back_as_the_pair(pair: Pair, implicit: bool) -> None:
    assert Pair.from_trl(pair.to_trl(implicit_prompt=implicit)) == pair


@FAST
@given(said, replies, st.booleans())
def test_texts_come_back_as_the_pair_or_are_refused(prompt: str, two: tuple[str, str], implicit: bool) -> None:
    pair = Pair(user(prompt), *two, "g")
    try:
        row = pair.to_trl(conversational=False, implicit_prompt=implicit)
    except CoalaError:
        assert implicit  # explicit texts always hold a prompt of one user turn
        return
    assert Pair.from_trl(row) == pair
    if implicit:
        assert (row["chosen"], row["rejected"]) == (prompt + two[0], prompt + two[1])


@FAST
@given(pairs, st.booleans())
def test_trl_finds_the_same_prompt_in_messages(pair: Pair, implicit: bool) -> None:
    trl = pytest.importorskip("trl", reason="the extra baselines brings TRL")
    row = pair.to_trl(implicit_prompt=implicit)
    explicit = {key: value for key, value in pair.to_trl().items() if key in ("prompt", "chosen", "rejected")}
    read = trl.data_utils.maybe_extract_prompt(row)
    assert trl.data_utils.is_conversational(row)
    assert {key: read[key] for key in explicit} == explicit
    assert Pair.from_trl({**read, "group": pair.group, "rater": pair.rater}) == pair


@FAST
@given(said.map(str.strip), replies.map(lambda two: (two[0].strip(), two[1].strip())))
def test_trl_finds_the_same_prompt_in_texts_that_part_at_a_space(prompt: str, two: tuple[str, str]) -> None:
    trl = pytest.importorskip("trl", reason="the extra baselines brings TRL")
    better, worse = f" 1{two[0]}", f" 2{two[1]}"  # the first letter after the space already differs
    pair = Pair(user(prompt), better, worse, "g")
    row = pair.to_trl(conversational=False, implicit_prompt=True)
    assert not trl.data_utils.is_conversational(row)
    assert trl.data_utils.maybe_extract_prompt(row) == {"prompt": prompt, "chosen": better, "rejected": worse}


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"prompt": "a", "chosen": "b"}, "rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "tools": [{"name": "search"}]}, "tools"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "images": ["x.png"]}, "images"),
        ([], "an empty list"),
    ],
)
def test_a_row_that_is_no_pair_names_its_field(row: Any, named: str) -> None:
    with pytest.raises(DataError, match=named) as error:
        Pair.from_trl(row)
    assert "Fix: " in str(error.value)


def test_a_conversation_is_no_text() -> None:
    pair = Pair((Turn("system", "Be brief."), Turn("user", "Why?")), "So.", "Because.", "g")
    with pytest.raises(CoalaError, match=r"2 turns.*conversational=True"):
        pair.to_trl(conversational=False)
