"""MT-Bench: stored judgements read again, published means and counts, and ratings that are none."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coala.evaluation.mtbench import (
    Match,
    Rating,
    contests,
    is_pairwise,
    parse_game,
    parse_rating,
    read_categories,
    read_matches,
    read_ratings,
    scores,
)
from coala.evaluation.rows import read_rows
from coala.values import CoalaError
from tests.evaluation_helpers import write_lines

SINGLE = "single_judgments_phi-3-dpo.jsonl.gz"
PAIRWISE = "pairwise_judgments_phi-3_vs_phi-3-dpo_odd_questions.jsonl.gz"


@pytest.fixture
def folder(shared: Path) -> Path:
    return shared / "eval_reference" / "mtbench"


@pytest.fixture
def expected(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "expected.json").read_text())
    return found


def test_published_means(folder: Path, expected: dict[str, Any]) -> None:
    wanted = expected["single"]["phi-3-dpo"]
    ratings, remarks = read_ratings(folder / SINGLE)
    assert remarks == ()  # every stored score is what its judgement says
    assert not is_pairwise(folder / SINGLE)
    (found,) = scores(ratings).values()
    assert (found.n_rows, found.n_errors, found.overall.n) == (wanted["rows"], wanted["errors"], wanted["valid"])
    assert found.overall.value == pytest.approx(wanted["mean_over_rows"], abs=1e-12)
    assert found.by_turn[1].value == pytest.approx(wanted["turn1"], abs=1e-12)
    assert found.by_turn[2].value == pytest.approx(wanted["turn2"], abs=1e-12)
    assert {k: v.value for k, v in found.by_category.items()} == pytest.approx(wanted["by_category"], abs=1e-12)
    assert found.remarks == ()
    assert "80 groups" in found.overall.method


def test_every_stored_score_is_read_again(folder: Path) -> None:
    rows = read_rows(folder / SINGLE)
    assert len(rows) == 160
    for row in rows:
        assert parse_rating(row.text("judgment")) == row.fields["score"]


def test_categories_come_from_the_question_file(folder: Path, tmp_path: Path, expected: dict[str, Any]) -> None:
    bare = tmp_path / "bare.jsonl"
    rows = [{k: v for k, v in row.fields.items() if k != "category"} for row in read_rows(folder / SINGLE)]
    write_lines(bare, rows)
    ratings, _ = read_ratings(bare, read_categories(folder / "questions.jsonl.gz"))
    by_category = scores(ratings)["phi-3-dpo"].by_category
    assert by_category["math"].value == pytest.approx(expected["single"]["phi-3-dpo"]["by_category"]["math"])
    assert scores(read_ratings(bare)[0])["phi-3-dpo"].by_category == {}
    assert any("no category" in r for r in scores(read_ratings(bare, {"81": "writing"})[0])["phi-3-dpo"].remarks)


def test_published_contest(folder: Path, expected: dict[str, Any]) -> None:
    matches, remarks = read_matches(folder / PAIRWISE)
    assert remarks == ()
    assert is_pairwise(folder / PAIRWISE)
    wanted = expected["pairwise_odd_questions"]
    assert len(matches) == wanted["rows"]
    found = contests(matches)
    for name, side in (("phi-3", "model_1"), ("phi-3-dpo", "model_2")):
        one, want = found[name], wanted[side]
        assert (one.wins, one.losses, one.ties) == (want["win"], want["loss"], want["tie"])
        assert one.adjusted.n == wanted["used"]
        assert one.n_errors == wanted["rows"] - wanted["used"]
        assert one.win_rate.value == pytest.approx(want["win_rate"], abs=1e-12)
        assert one.loss_rate.value == pytest.approx(want["loss_rate"], abs=1e-12)
        assert one.adjusted.value == pytest.approx(want["win_rate_adjusted"], abs=1e-12)
        assert one.excluding_ties.value == pytest.approx(want["win_rate_excluding_ties"], abs=1e-12)


@pytest.mark.parametrize(
    ("judgment", "score"),
    [
        ("Rating: [[9]]", 9),
        ("Rating: [[8.5]]", 8.5),
        ("[[7]] and then [[3]]", 7),
        ("see [4], Rating: [[10]]", 10),  # double brackets come first wherever they stand
        ("Rating: [6]", 6),
        ("the element a[0] is never set", -1),
        ("np.zeros([100])", -1),
        ("Rating: [[0]]", -1),
        ("Rating: [[11]] of [[10]]", -1),
        ("Rating: 9", -1),
        ("", -1),
        ("[[٣]]", -1),  # a digit of another script
        ("[[" + "9" * 400 + "]]", -1),
    ],
)
def test_ratings_that_are_and_are_not(judgment: str, score: float) -> None:
    assert parse_rating(judgment) == score


@given(st.text(alphabet="[]0123456789. aA\n"))
def test_a_rating_is_in_range_or_an_error(judgment: str) -> None:
    assert parse_rating(judgment) == -1 or 1 <= parse_rating(judgment) <= 10


@given(st.sampled_from(["[[A]]", "[[B]]", "[[C]]", "[A]", "", "[[A]] not [[B]]"]), st.booleans())
def test_a_verdict_moves_with_the_order(judgment: str, swapped: bool) -> None:
    mirror = {"model_1": "model_2", "model_2": "model_1", "tie": "tie", "error": "error"}
    assert parse_game(judgment, swapped) == mirror[parse_game(judgment, not swapped)]
    assert (parse_game(judgment, swapped) == "error") == (judgment in ("[A]", "", "[[A]] not [[B]]"))


def rating(question: str, turn: int, score: float, **other: str) -> Rating:
    return Rating(other.get("model", "m"), question, turn, other.get("category", ""), "j", score)


def test_the_overall_score_is_over_rows() -> None:
    found = scores([rating("1", 1, 10), rating("2", 1, 8), rating("1", 2, 3), rating("2", 2, -1)])["m"]
    assert found.overall.value == 7  # not (9 + 3) / 2
    assert (found.by_turn[1].value, found.by_turn[2].value) == (9, 3)
    assert (found.n_rows, found.n_errors) == (4, 1)


def test_repeated_rows_count_again_and_are_remarked() -> None:
    found = scores([rating("1", 1, 10), rating("1", 1, 4), rating("2", 1, 4)])["m"]
    assert found.overall.value == 6
    assert found.remarks == ("1 rows repeat a question and turn; all are counted",)
    several = scores([rating("1", 1, 10), rating("1", 1, 2, model="n")])
    assert {name: one.overall.value for name, one in several.items()} == {"m": 10, "n": 2}


def test_scores_without_spread_or_rows_keep_an_interval() -> None:
    alike = scores([rating(str(i), 1, 10) for i in range(10)])["m"].overall
    assert (alike.value, alike.high) == (10, 10)
    assert alike.low < 9
    one = scores([rating("1", 1, 5)])["m"].overall
    assert one.low < 3 < 8 < one.high
    none = scores([rating("1", 1, -1)])["m"]
    assert math.isnan(none.overall.value)
    assert (none.overall.low, none.overall.high, none.n_errors) == (1, 10, 1)
    assert scores([]) == {}


def match(question: str, *outcomes: Any) -> Match:
    return Match("a", "b", question, 1, "j", outcomes)  # type: ignore[arg-type]


def test_a_win_needs_both_games() -> None:
    rows = [
        match("1", "model_1", "model_1"),
        match("2", "model_1", "tie"),
        match("3", "model_1", "model_2"),
        match("4", "tie", "tie"),
        match("5", "model_2", "model_2"),
        match("6", "error", "model_2"),
        match("1", "model_1", "model_1"),
    ]
    found = contests(rows)
    assert (found["a"].wins, found["a"].losses, found["a"].ties, found["a"].n_errors) == (2, 1, 3, 1)
    assert found["a"].adjusted.value + found["b"].adjusted.value == pytest.approx(1)
    assert found["a"].win_rate.value == found["b"].loss_rate.value
    assert "1 rows repeat" in found["a"].remarks[0]
    ties = contests([match("1", "tie", "tie")])["a"]
    assert math.isnan(ties.excluding_ties.value)
    assert ties.excluding_ties.n == 0
    errors = contests([match("1", "error", "tie")])["a"]
    assert math.isnan(errors.adjusted.value)
    assert contests([]) == {}


def test_stored_values_stand_in_for_judgements(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    row = {"question_id": 1, "model": "m", "turn": 1}
    rows: list[dict[str, Any]] = [row | {"score": 7}, row | {"score": 100.0}, row | {"score": 3, "judgment": "[[9]]"}]
    write_lines(path, rows)
    ratings, remarks = read_ratings(path)
    assert [one.score for one in ratings] == [7, -1, 9]
    assert len(remarks) == 2
    game = {"question_id": 1, "turn": 1, "model_1": "a", "model_2": "b", "g1_winner": "model_1"}
    rows = [game | {"g2_winner": "tie"}, game | {"g2_winner": "tie", "g2_judgment": "[[B]]"}]
    write_lines(path, rows)
    matches, remarks = read_matches(path)
    assert [one.outcomes for one in matches] == [("model_1", "tie"), ("model_1", "model_1")]
    assert "1 stored winners differ" in remarks[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"turn": 1.5}, "r.jsonl:1: turn: found 1.5, expected a whole number"),
        ({"turn": "x"}, "turn: found 'x'"),
        ({"judgment": 3}, "judgment: found 3, expected a text"),
        ({"judgment": None, "score": None}, "score: found null or an empty cell"),
        ({"model": ""}, "model: found ''"),
        ({"question_id": True}, "question_id: found True"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({"question_id": 1, "model": "m", "turn": 1, "judgment": "[[9]]", "score": 9} | change))
    with pytest.raises(CoalaError, match=words):
        read_ratings(path)


def test_bad_games_are_named(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    game = {"question_id": 1, "turn": 1, "model_1": "a", "model_2": "b", "g1_winner": "model_1", "g2_winner": "b"}
    path.write_text(json.dumps(game))
    with pytest.raises(CoalaError, match="g2_winner: found 'b', expected one of model_1, model_2, tie, error"):
        read_matches(path)
    path.write_text(json.dumps(game | {"model_2": "a", "g2_winner": "tie"}))
    with pytest.raises(CoalaError, match="another model than model_1"):
        read_matches(path)
