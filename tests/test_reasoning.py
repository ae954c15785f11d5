"""Thoughts are taken off before a verdict is read, by every reader of verdicts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coala.data.reasoning import opens_thought, spoken
from coala.evaluation import JudgeFailure, read_instructions
from coala.evaluation.arena import parse_verdict, read_battles
from coala.evaluation.judges import Answer, read_rating, read_verdict
from coala.evaluation.mtbench import ERROR, parse_game, parse_rating, read_matches, read_ratings
from tests.evaluation_helpers import write_lines

# What opens and closes a thought, of each kind of model.
MARKS = [
    ("<think>", "</think>"),
    ("", "</think>"),
    ("<Think>\n", "\n</THINK>\n"),
    ("<thinking>", "</thinking>"),
    ("<reasoning effort='high'>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought\n", "<channel|>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ("analysisWe compare. ", "assistantfinal"),
    ("<think>a <think>b", "</think> and more </think>"),
    ("<think>the reply has `</think>` in it; ", "</think>"),
    ("<think>\n```\n", "\n</think>"),
]
HAVE_OPENING = [(opening, closing) for opening, closing in MARKS if opening]
FREE = st.text(alphabet="ab 1[]{}A>=B.\n", max_size=20)


@given(st.sampled_from(MARKS), FREE, FREE)
def test_what_stands_in_a_thought_is_not_said(marks: tuple[str, str], thought: str, said: str) -> None:
    found = spoken(marks[0] + thought + marks[1] + said)
    assert found is not None
    assert found.strip() == said.strip()


@given(st.sampled_from(HAVE_OPENING), FREE)
def test_a_thought_without_an_end_leaves_nothing(marks: tuple[str, str], thought: str) -> None:
    assert spoken(marks[0] + thought) is None


@given(st.text(alphabet="abc [1]{}<>/|AB=`\n", max_size=60))
def test_text_without_marks_comes_back_as_it_is(text: str) -> None:
    assert spoken(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "B leaves a `<think>` open, so [[8]]",
        'It writes "</think>" twice. [[8]]',
        "[Analysis]\nGood.\n[[8]]",
        "analysis: fine. [[8]]",
        "I think so. [[8]]",
    ],
)
def test_marks_that_are_spoken_of_are_text(text: str) -> None:
    assert spoken(text) == text
    assert parse_rating(text) == 8


def test_a_mark_in_a_quoted_block_ends_with_the_block() -> None:
    assert parse_rating("The reply was\n```\n<think>\n[[3]]\n```\nwhich is bad. [[8]]") == 8
    assert parse_rating("The reply was\n```\n<think>\n[[3]]\n```\n<think> so [[8]]") == ERROR


@pytest.mark.parametrize(("opening", "closing"), MARKS)
def test_every_reader_reads_what_is_said(opening: str, closing: str) -> None:
    def aloud(thought: str, said: str) -> str:
        return f"{opening}{thought}{closing}{said}"

    assert parse_rating(aloud("perhaps [[3]]", "Rating: [[8]]")) == 8
    assert parse_game(aloud("perhaps [[B]]", "[[A]]"), swapped=False) == "model_1"
    assert parse_verdict(aloud("perhaps [[B>>A]]", "[[A>B]]")) == "A>B"
    assert parse_verdict(aloud("perhaps [[B>>A]]", "[[A>B]]"), "unanimous") == "A>B"
    grade, pair, five = (read_instructions(name) for name in ("grade", "pairwise", "arena"))
    assert read_rating(Answer(aloud("perhaps [[3]]", "[[8]]")), grade) == 8
    assert read_verdict(Answer(aloud("perhaps [[B]]", "[[A]]")), pair).label == "A"
    assert read_verdict(Answer(aloud("perhaps [[B>A]]", "[[A>B]]")), five).label == "A>B"
    as_json = json.dumps({"reason": "x", "verdict": "A"})
    assert read_verdict(Answer(aloud('{"verdict": "B"}', as_json)), replace(pair, parser="json")).label == "A"
    rated = json.dumps({"reason": "x", "rating": 8})
    assert read_rating(Answer(aloud('{"rating": 3}', rated)), replace(grade, parser="json")) == 8
    # The verdict in the thought alone is none.
    for told, text in ((grade, "[[3]]"), (pair, "[[B]]"), (five, "[[B>A]]")):
        with pytest.raises(JudgeFailure, match="no verdict"):
            (read_rating if told is grade else read_verdict)(Answer(aloud(text, "I am done.")), told)


@pytest.mark.parametrize(("opening", "closing"), HAVE_OPENING)
def test_a_thought_that_is_cut_off_is_a_failure(opening: str, closing: str) -> None:
    for name, text in (("grade", "[[8]]"), ("pairwise", "[[A]]"), ("arena", "[[A>B]]")):
        told = read_instructions(name)
        with pytest.raises(JudgeFailure, match="a thought without an end") as raised:
            (read_rating if name == "grade" else read_verdict)(Answer(opening + text), told)
        assert raised.value.kind == "cut short"
    assert (parse_rating(opening + "[[8]]"), parse_game(opening + "[[A]]", False)) == (ERROR, "error")
    assert parse_verdict(opening + "[[A>B]]") is None


def test_reasoning_beside_the_content_holds_no_verdict() -> None:
    for name, text in (("grade", "[[8]]"), ("pairwise", "[[A]]"), ("arena", "[[A>B]]")):
        read: Callable[..., object] = read_rating if name == "grade" else read_verdict
        read(Answer(text, reasoning="perhaps [[3]] [[B]] [[B>A]]"), read_instructions(name))
        with pytest.raises(JudgeFailure, match="thought and said nothing"):
            read(Answer("", reasoning=text), read_instructions(name))


def test_the_first_token_of_a_thought_is_no_verdict() -> None:
    told = read_instructions("weighted")
    likely = (("<think>", -0.01), ("m", -6.0), ("M", -9.0))
    for answer in (
        Answer("<think>", "length", top=likely),
        Answer("", "length", top=likely),
        Answer("", "length", top=(("m", -0.1), ("M", -2.0)), reasoning="Let me"),
    ):
        with pytest.raises(JudgeFailure) as raised:
            read_verdict(answer, told)
        assert raised.value.kind == "thinks first"
    assert opens_thought("<think>")
    assert not opens_thought("m")
    assert not opens_thought("</think>")


def test_objects_in_code_blocks_and_with_marks_in_their_texts() -> None:
    told = replace(read_instructions("pairwise"), parser="json")
    plain = json.dumps({"reason": "B has a <think> left open", "verdict": "A"})
    for text in (plain, f"```json\n{plain}\n```", f"```\n{plain}\n```"):
        assert read_verdict(Answer(text), told).label == "A"
    for text in (f"```json\n{plain}\n``` or\n```json\n{plain}\n```", f"{plain} {plain}", f"<think>{plain}"):
        with pytest.raises(JudgeFailure):
            read_verdict(Answer(text), told)


@pytest.mark.parametrize(
    "text",
    [
        "[[7]] and then [[3]]",
        "[[8/10]]",
        "Rating: 9",
        "[[11]]",
        "[[0]]",
        "[[11]] of [[10]]",
        "",
        "[[A]]",
        "[[8]] [[8.5]]",
    ],
)
def test_a_grade_that_is_not_plain_is_a_counted_failure(text: str) -> None:
    with pytest.raises(JudgeFailure) as raised:
        read_rating(Answer(text), read_instructions("grade"))
    assert raised.value.kind == "no verdict"
    assert read_rating(Answer("[[8]], I say [[8.0]]"), read_instructions("grade")) == 8


def test_saved_judgements_that_think_are_read_and_told(tmp_path: Path) -> None:
    base = {"question_id": 1, "model": "m", "turn": 1}
    texts = ["<think>[[3]]</think>[[8]]", "[[7]] then [[3]]", "[[6]]", "<think>[[5]]"]
    path = write_lines(
        tmp_path / "grades.jsonl", [base | {"question_id": i, "judgment": t} for i, t in enumerate(texts)]
    )
    ratings, remarks = read_ratings(path)
    assert [one.score for one in ratings] == [8, 7, 6, ERROR]
    assert any(said.startswith("2 judgements think aloud") for said in remarks)
    assert any(said.startswith("1 judgements give ratings that differ; the first counts") for said in remarks)

    games = {"question_id": 1, "turn": 1, "model_1": "a", "model_2": "b"}
    rows = [games | {"g1_judgment": "<think>[[B]]</think>[[A]]", "g2_judgment": "[[A]] or [[B]]"}]
    matches, remarks = read_matches(write_lines(tmp_path / "games.jsonl", rows))
    assert matches[0].outcomes == ("model_1", "error")
    assert len(remarks) == 2

    arena = {"question_id": 1, "model": "a", "baseline": "b"}
    said = ["<think>[[A>>B]]</think>[[B>A]]", "[[A>B]] no: [[B>>A]]"]
    battles = read_battles(
        write_lines(tmp_path / "arena.jsonl", [arena | {"games": [{"judgment": text} for text in said]}])
    )
    assert battles.outcome.tolist() == [1.0, 0.0, 0.0, 0.0]
    assert any("1 judgements think aloud" in remark for remark in battles.remarks)
    assert any("1 games give verdicts that differ; the last counts" in remark for remark in battles.remarks)
