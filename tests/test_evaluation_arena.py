"""Arena-Hard: published scores, the identity of mean and Bradley-Terry, style control against a naive fit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from coala.evaluation.arena import (
    Battles,
    battles_of,
    bradley_terry,
    parse_verdict,
    read_battles,
    score,
)
from coala.evaluation.arena_style import read_styles, style_controlled, style_differences, style_of
from coala.evaluation.rows import read_rows
from coala.values import CoalaError

BASELINE = "gpt-4-0314"


@pytest.fixture
def folder(shared: Path) -> Path:
    return shared / "eval_reference" / "arena_hard"


@pytest.fixture
def expected(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "expected.json").read_text())
    return found


# --- published figures -------------------------------------------------------------------------------------------


def test_published_scores_and_intervals(folder: Path, expected: dict[str, Any]) -> None:
    battles = read_battles(folder / "battles_vs_gpt-4-0314.csv.gz", baseline=BASELINE)
    found = score(battles, BASELINE, draws=2000)
    ratings = bradley_terry(battles, BASELINE)
    assert ratings[BASELINE] == 1000
    assert len(battles) == 5912
    assert set(found) == set(expected["battles"])
    for model, want in expected["battles"].items():
        one = found[model]
        assert (one.wins, one.losses, one.ties) == (want["wins"], want["losses"], want["ties"])
        assert (one.score.n, one.n_questions) == (want["weighted_battles"], want["questions"])
        assert one.score.value == pytest.approx(want["weighted_mean_win_rate"], abs=1e-9)
        # One baseline: the mean, the fit and its prediction are the same.
        assert predicted(ratings[model], 1000) == pytest.approx(one.score.value, abs=1e-9)
        assert one.score.value == pytest.approx(want["bt_win_rate_vs_baseline"], abs=1e-4)
        assert ratings[model] == pytest.approx(one.rating, abs=1e-8)
        assert ratings[model] == pytest.approx(want["bt_mle_elo"], abs=1e-4)
        assert one.excluding_ties.value == pytest.approx(want["win_rate_excluding_ties"], abs=1e-9)
        ends = (one.published_interval.low, one.published_interval.high)
        assert ends == pytest.approx(want["bootstrap_95ci_row"], abs=0.6)
        assert (one.score.low, one.score.high) == pytest.approx(want["bootstrap_95ci_question"], abs=0.6)
        wider = (one.score.high - one.score.low) / (ends[1] - ends[0])
        assert 1.5 < wider < 1.8  # battles of one question are not independent
        if want["published"]:
            assert one.score.value == pytest.approx(want["published"]["score"], abs=0.005)
            published = (want["published"]["rating_q025"], want["published"]["rating_q975"])
            assert ends == pytest.approx(published, abs=0.6)


def test_raw_judgements(folder: Path, expected: dict[str, Any]) -> None:
    path = folder / "raw_judgments_first40.jsonl.gz"
    want = expected["raw_judgments"]
    battles = read_battles(path, model="m", baseline=BASELINE)
    assert len(battles) == want["weighted_battles"]
    assert battles.n_failed == want["null_games"]
    assert battles.remarks == ("2 games have no verdict and are left out",)
    assert score(battles, BASELINE)["m"].score.value == pytest.approx(want["weighted_mean_win_rate"], abs=1e-9)
    games = score(read_battles(path, model="m", baseline=BASELINE, strong_weight=1), BASELINE)["m"]
    counts = {"win": games.wins, "loss": games.losses, "tie": games.ties}
    assert counts == want["games"]
    assert games.excluding_ties.value == pytest.approx(want["win_rate_excluding_ties_games"], abs=1e-9)
    read = [(parse_verdict(g["judgment"]), g["score"]) for row in read_rows(path) for g in row.fields["games"]]
    assert len(read) == 80
    assert all(found == stored for found, stored in read)


# --- verdicts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("judgment", "last", "unanimous"),
    [
        ("My verdict: [[A>>B]]", "A>>B", "A>>B"),
        ("first [[A>B]], no: [[B>A]]", "B>A", None),
        ("[[a=b]] [[A=B]]", "A=B", "A=B"),
        ("[B>>A]", "B>>A", "B>>A"),
        ("[A>B] but [[A=B]]", "A=B", "A=B"),
        ("[[A<B]]", "B>A", "B>A"),
        ("[[A<<B]]", "B>>A", "B>>A"),
        ("[[B=A]]", "A=B", "A=B"),
        ("[[A>B]] [[AB]]", None, None),
        ("[[A>A]]", None, None),
        ("[[A>>>B]]", None, None),
        ("A>B", None, None),
        ("", None, None),
    ],
)
def test_verdicts(judgment: str, last: str | None, unanimous: str | None) -> None:
    assert parse_verdict(judgment) == last
    assert parse_verdict(judgment, "unanimous") == unanimous


@given(st.sampled_from(["A>>B", "A>B", "A=B", "B>A", "B>>A"]), st.booleans())
def test_swapping_the_sides_mirrors_the_battles(verdict: str, swapped: bool) -> None:
    found, turned = battles_of(verdict, swapped), battles_of(verdict, not swapped)
    assert [1 - one for one in found] == turned
    assert len(found) == (3 if ">>" in verdict else 1)
    assert battles_of("A>B", False) == [1.0]
    assert len(battles_of(verdict, swapped, 1)) == 1
    with pytest.raises(CoalaError, match="expected A>>B"):
        battles_of("A>>>B", swapped)


def test_which_side_is_the_baseline(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    games = [{"judgment": "[[A>>B]]"}, {"judgment": {"answer": "[[A>B]]"}, "score": "B>A"}]
    path.write_text(json.dumps({"uid": "u", "model": "m", "baseline": "b", "games": games}))
    battles = read_battles(path)
    assert battles.outcome.tolist() == [0, 0, 0, 1]  # game 0 shows the baseline first, game 1 the model
    assert set(battles.question.tolist()) == {"u"}
    assert "1 stored scores differ" in battles.remarks[0]
    one = {"question_id": 1, "model_a": "b", "model_b": "m"}
    path.write_text(
        "\n".join(json.dumps(one | {"winner": who}) for who in ("model_a", "model_b", "tie", "tie (bothbad)"))
    )
    found = score(read_battles(path), "b")["m"]
    assert (found.wins, found.losses, found.ties) == (1, 1, 2)
    row = json.dumps({"uid": "u", "model": "m", "baseline": "b", "games": games})
    path.write_text(row + "\n" + row)
    assert any("1 rows repeat a model and question" in remark for remark in read_battles(path).remarks)


def test_self_battles_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    games = [{"score": "A>B"}]
    path.write_text(json.dumps({"uid": "u", "model": BASELINE, "games": games}))
    with pytest.raises(CoalaError, match=r"j.jsonl:1: model: found 'gpt-4-0314', expected another model"):
        read_battles(path, baseline=BASELINE)
    path.write_text(json.dumps({"uid": "u", "model_a": "x", "model_b": "x", "winner": "tie"}))
    with pytest.raises(CoalaError, match="Fix: leave self-battles out"):
        read_battles(path)
    with pytest.raises(CoalaError, match="1 of 2 battles set a model against itself"):
        Battles(np.array(["a", "x"]), np.array(["b", "x"]), np.array([1, 0]), np.array(["1", "2"]))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"uid": "u", "model": "m", "games": []}, "games: found a list of 0, expected a list of two games"),
        ({"uid": "u", "model": "m", "games": [3]}, "games"),
        ({"uid": "u", "model": "m", "games": [{"judgment": 3}]}, "games: found 3, expected texts"),
        ({"uid": "u", "model": "m", "games": [{"score": None}]}, "found no game with a verdict"),
        ({"uid": "u", "model": "m", "winner": "model_a"}, "winner: found 'model_a', expected one of model, baseline"),
        ({"uid": "u", "model": "m"}, "winner: found no such field among 'uid', 'model'"),
        ({"model": "m", "winner": "tie"}, "question_id or uid or question"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    path = tmp_path / "j.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(CoalaError, match=words):
        read_battles(path, baseline="b")


# --- scores and ratings ------------------------------------------------------------------------------------------


def made(rows: list[tuple[str, str, float]], questions: list[int] | None = None) -> Battles:
    first, second, outcome = zip(*rows, strict=True)
    names = list(range(len(rows))) if questions is None else questions
    return Battles(np.array(first), np.array(second), np.array(outcome), np.array(names))


def test_extreme_scores_keep_an_interval() -> None:
    won = score(made([("m", "b", 1.0)] * 30), "b")["m"]
    assert won.score.value == 100
    assert won.score.low < 95
    assert won.rating == math.inf
    tied = score(made([("b", "m", 0.5)] * 30), "b")["m"]
    assert (tied.score.value, tied.rating) == (50, 1000)
    assert math.isnan(tied.excluding_ties.value)
    assert tied.score.high - tied.score.low > 20
    with pytest.raises(CoalaError, match="No battle has the baseline 'c'; found 'b', 'm'"):
        score(made([("m", "b", 1.0)]), "c")


def test_boards_differ_in_their_interval() -> None:
    rng = np.random.default_rng(0)
    battles = made([("m", "b", float(x)) for x in rng.integers(0, 2, 300)])
    old, new = (score(battles, "b", board=board)["m"] for board in ("v0.1", "v2.0"))  # type: ignore[arg-type]
    ratio = (old.published_interval.high - old.published_interval.low) / (
        new.published_interval.high - new.published_interval.low
    )
    assert ratio == pytest.approx(1.96 / 1.645, rel=0.08)
    assert "90 %" in new.published_interval.method


def predicted(rating: float, other: float) -> float:
    return 100 / (1 + 10 ** ((other - rating) / 400))


def random_battles(seed: int, models: int = 5, n: int = 600) -> tuple[Battles, np.ndarray]:
    rng = np.random.default_rng(seed)
    strength = rng.normal(size=models)
    a = rng.integers(models, size=n)
    b = (a + 1 + rng.integers(models - 1, size=n)) % models
    p = 1 / (1 + np.exp(strength[b] - strength[a]))
    outcome = np.where(rng.random(n) < 0.2, 0.5, rng.random(n) < p)
    name = np.array([f"m{i}" for i in range(models)])
    return Battles(name[a], name[b], outcome, rng.integers(80, size=n).astype(str)), strength


def test_ratings_against_another_solver() -> None:
    battles, _ = random_battles(1)
    found = bradley_terry(battles, "m0")
    place = {name: i for i, name in enumerate(sorted(found))}
    a, b = (np.array([place[name] for name in side]) for side in (battles.first, battles.second))

    def loss(r: np.ndarray) -> float:
        z = (r[a] - r[b]) * math.log(10) / 400
        # Every battle twice: a tie is a win and a loss.
        return float((2 * battles.outcome * np.logaddexp(0, -z) + 2 * (1 - battles.outcome) * np.logaddexp(0, z)).sum())

    naive = minimize(loss, np.full(5, 1000.0), method="BFGS", options={"gtol": 1e-8}).x
    naive += 1000 - naive[0]
    assert [found[name] for name in sorted(found)] == pytest.approx(naive, abs=1e-2)
    # Turning every battle round, or doubling all, changes nothing.
    turned = Battles(battles.second, battles.first, 1 - battles.outcome, battles.question)
    assert bradley_terry(turned, "m0") == pytest.approx(found)
    twice = battles.take(np.tile(np.arange(len(battles)), 2))
    assert bradley_terry(twice, "m0") == pytest.approx(found)
    moved = bradley_terry(battles, "m3", 500.0)
    assert moved["m1"] - moved["m2"] == pytest.approx(found["m1"] - found["m2"])
    assert moved["m3"] == 500


def test_ratings_that_do_not_exist() -> None:
    with pytest.raises(CoalaError, match="'loser' never won against any of the other"):
        bradley_terry(made([("b", "c", 1.0), ("c", "b", 1.0), ("loser", "b", 0.0)]), "b")
    with pytest.raises(CoalaError, match="'winner' never lost to any of the other"):
        bradley_terry(made([("b", "c", 1.0), ("c", "b", 1.0), ("winner", "b", 1.0)]), "b")
    with pytest.raises(CoalaError, match="No finite ratings"):
        bradley_terry(made([("b", "c", 0.5), ("d", "e", 0.5)]), "b")
    with pytest.raises(CoalaError, match="No battle has 'x'"):
        bradley_terry(made([("b", "c", 0.5)]), "x")
    assert bradley_terry(made([("b", "c", 0.5)]), "b") == {"b": 1000, "c": 1000}


# --- style -------------------------------------------------------------------------------------------------------


def star(seed: int, n: int = 400, effect: float = 0.8) -> tuple[Battles, np.ndarray, np.ndarray, float]:
    """One model of strength -0.3 against a baseline by a judge who likes length."""
    rng = np.random.default_rng(seed)
    ours, theirs = (
        np.column_stack(
            [rng.integers(50, 900, n), rng.integers(0, 5, n), rng.integers(0, 20, n), rng.integers(0, 9, n)]
        )
        for _ in range(2)
    )
    ours[:, 0] += 300
    tokens = style_differences(ours.astype(float), theirs.astype(float))[:, 0]
    z = (tokens - tokens.mean()) / tokens.std(ddof=1)
    p = 1 / (1 + np.exp(0.3 - effect * z))
    name = np.full(n, "m"), np.full(n, "b")
    return Battles(*name, (rng.random(n) < p).astype(float), np.arange(n).astype(str)), ours, theirs, effect


def naive_style(battles: Battles, ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    t, b = ours.astype(float), theirs.astype(float)
    columns = [(t[:, 0] - b[:, 0]) / (t[:, 0] + b[:, 0])]
    for j in (1, 2, 3):
        one, two = t[:, j] / (t[:, 0] + 1), b[:, j] / (b[:, 0] + 1)
        columns.append((one - two) / (one + two + 1))
    z = np.column_stack([(c - c.mean()) / c.std(ddof=1) for c in columns])
    design = np.hstack([np.ones((len(z), 1)), z])

    def loss(w: np.ndarray) -> float:
        s = design @ w
        return float((np.logaddexp(0, s) - battles.outcome * s).sum())

    return np.asarray(minimize(loss, np.zeros(5), method="BFGS", options={"gtol": 1e-9}).x)


def test_style_control_against_a_naive_fit() -> None:
    battles, ours, theirs, effect = star(0)
    found = style_controlled(battles, ours.astype(float), theirs.astype(float), "b", draws=60)
    w = naive_style(battles, ours, theirs)
    assert list(found.coefficients.values()) == pytest.approx(w[1:], abs=1e-4)
    assert found.scores["m"].value == pytest.approx(100 / (1 + math.exp(-w[0])), abs=1e-3)
    assert found.coefficients["tokens"] == pytest.approx(effect, abs=0.25)
    assert found.scores["m"].low < found.scores["m"].value < found.scores["m"].high
    # At equal length a judge who likes length thinks less of the longer model than at its usual length.
    equal = style_controlled(battles, ours.astype(float), theirs.astype(float), "b", at="equal", draws=0)
    assert equal.scores["m"].value < found.scores["m"].value - 3
    assert math.isinf(equal.scores["m"].high)


@pytest.mark.parametrize("version", ["v2.0", "v0.1"])
def test_turning_battles_round_changes_nothing(version: Any) -> None:
    battles, ours, theirs, _ = star(1)
    rng = np.random.default_rng(2)
    turn = rng.random(len(battles)) < 0.5
    mixed = Battles(
        np.where(turn, battles.second, battles.first),
        np.where(turn, battles.first, battles.second),
        np.where(turn, 1 - battles.outcome, battles.outcome),
        battles.question,
    )
    first = np.where(turn[:, None], theirs, ours).astype(float)
    second = np.where(turn[:, None], ours, theirs).astype(float)
    one = style_controlled(battles, ours.astype(float), theirs.astype(float), "b", version=version, draws=0)
    two = style_controlled(mixed, first, second, "b", version=version, draws=0)
    assert two.scores["m"].value == pytest.approx(one.scores["m"].value, abs=1e-6)
    assert two.coefficients == pytest.approx(one.coefficients, abs=1e-7)


def test_a_model_that_won_everything_has_no_finite_strength() -> None:
    battles, ours, theirs, _ = star(0)
    rng = np.random.default_rng(0)
    question = [f"q{i}" for i in range(40)]
    won = Battles(np.array(["w"] * 40), np.array(["b"] * 40), np.ones(40), np.array(question))
    both = Battles(
        *(np.concatenate([getattr(battles, name), getattr(won, name)]) for name in ("first", "second", "outcome")),
        np.concatenate([battles.question, won.question]),
    )
    first, second = (np.vstack([side, rng.integers(1, 9, (40, 4))]).astype(float) for side in (ours, theirs))
    found = style_controlled(both, first, second, "b", draws=0).scores
    assert found["w"].value == pytest.approx(100, abs=1e-6)
    assert "no finite strengths fit best" in found["w"].method
    alone = style_controlled(battles, ours.astype(float), theirs.astype(float), "b", draws=0).scores["m"]
    assert "no finite strengths" not in alone.method
    assert found["m"].value == pytest.approx(alone.value, abs=10)


def test_without_style_differences_it_is_bradley_terry() -> None:
    battles, _ = random_battles(4)
    same = np.ones((len(battles), 4))
    found = style_controlled(battles, same, same, "m0", draws=0)
    assert found.ratings == pytest.approx(bradley_terry(battles, "m0"), abs=1e-5)
    assert set(found.coefficients.values()) == {0.0}
    chosen = style_controlled(battles, same, same, "m0", columns=("tokens",), draws=0)
    assert list(chosen.coefficients) == ["tokens"]


def test_the_older_board_shrinks_and_has_its_anchor() -> None:
    battles, ours, theirs, _ = star(3)
    found = style_controlled(battles, ours.astype(float), theirs.astype(float), "b", version="v0.1", draws=0)
    assert found.ratings["b"] == 1114
    diff = (ours - theirs) / (ours + theirs + 1)
    z = (diff - diff.mean(axis=0)) / diff.std(axis=0)
    design = np.column_stack([np.full(len(z), math.log(10)), np.full(len(z), -math.log(10)), z])

    def loss(w: np.ndarray) -> float:  # the penalty of 1/2 on every battle counted twice
        s = design @ w
        return float(2 * (np.logaddexp(0, s) - battles.outcome * s).sum() + w @ w / 2)

    w = minimize(loss, np.zeros(6), method="BFGS", options={"gtol": 1e-9}).x
    assert found.ratings["m"] - 1114 == pytest.approx(400 * (w[0] - w[1]), abs=1e-2)
    assert list(found.coefficients.values()) == pytest.approx(w[2:], abs=1e-4)


def test_style_control_refuses_what_does_not_fit() -> None:
    battles, ours, theirs, _ = star(0, n=20)
    a, b = ours.astype(float), theirs.astype(float)
    with pytest.raises(CoalaError, match=r"expected \(20, 4\)"):
        style_controlled(battles, a[:5], b, "b")
    with pytest.raises(CoalaError, match="is not a count"):
        style_controlled(battles, -a, b, "b")
    with pytest.raises(CoalaError, match="no style column 'colour'"):
        style_controlled(battles, a, b, "b", columns=("colour",))
    with pytest.raises(CoalaError, match="No battle has the baseline"):
        style_controlled(battles, a, b, "x")


def test_styles_of_replies(shared: Path, tmp_path: Path) -> None:
    text = "# Head\n\n* one\n* two\n1. three\n\n**bold** and __more__\n```\n# code\n* not\n```\n## Last **x**"
    assert style_of(text, tokens=40).tolist() == [40, 2, 3, 3]
    assert style_of("").tolist() == [0, 0, 0, 0]
    path = tmp_path / "a.jsonl"
    counts = {"token_len": 12, "header_count": {"h1": 1, "h2": 2}, "list_count": 4, "bold_count": {"**": 0}}
    path.write_text(json.dumps({"question_id": 5, "conv_metadata": counts}))
    assert read_styles(path)["5"].tolist() == [12, 3, 4, 0]
    path.write_text(json.dumps({"question_id": 5, "conv_metadata": counts | {"list_count": -1}}))
    with pytest.raises(CoalaError, match="list_count: found -1"):
        read_styles(path)
    path.write_text(
        json.dumps({"question_id": 5, "output": "two words"}) + "\n" + json.dumps({"uid": "5", "output": ""})
    )
    with pytest.raises(CoalaError, match="'5' again"):
        read_styles(path)
    real = read_styles(shared / "data" / "arena_hard" / "v0.1_answer_gpt-4-0314.jsonl.gz")
    assert len(real) == 500
    assert np.mean([style[0] for style in real.values()]) > 100
