"""Preference games: what they refuse, win rates, gaps and Nash strategies against naive computations."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coala.nash import Nash, PreferenceGame, duality_gap, kl_divergence, read_game
from coala.values import CoalaError

PAPER = [[0.5, 0.1, 0.8], [0.9, 0.5, 0.1], [0.2, 0.9, 0.5]]


def random_matrix(n: int, seed: int) -> Any:
    """A generic game: independent uniform probabilities above the diagonal."""
    above = np.triu(np.random.default_rng(seed).uniform(size=(n, n)), 1)
    return above + np.tril(1 - above.T, -1) + np.eye(n) / 2


games = st.builds(random_matrix, st.integers(2, 6), st.integers(0, 10**6))
seeds = st.integers(0, 10**6)


def strategies_by_supports(P: Any) -> list[Any]:
    """Every Nash strategy that is the only one on its support, by trying all supports."""
    B, n, found = (P - P.T) / 2, len(P), []
    for size in range(1, n + 1):
        for rows in itertools.combinations(range(n), size):
            system = np.vstack([B[np.ix_(rows, rows)], np.ones(size)])
            inside, _, rank, _ = np.linalg.lstsq(system, np.r_[np.zeros(size), 1.0], rcond=1e-10)
            p = np.zeros(n)
            p[list(rows)] = inside
            fits = np.abs(system @ inside - np.r_[np.zeros(size), 1.0]).max() < 1e-10
            if rank == size and fits and p.min() >= -1e-12 and (B @ p).max() <= 1e-12:
                found.append(p)
    return found


# --- laws --------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(games, seeds)
def test_win_rates_and_gap_are_the_sums(P: Any, seed: int) -> None:
    game, draw = PreferenceGame(P), np.random.default_rng(seed)
    n = len(P)
    p, q = draw.dirichlet(np.ones(n), size=2)
    naive = sum(p[i] * q[j] * P[i, j] for i in range(n) for j in range(n))
    assert game.win_rate(p, q) == pytest.approx(naive, abs=1e-14)
    assert game.win_rate(p, q) + game.win_rate(q, p) == pytest.approx(1, abs=1e-14)
    assert game.win_rate(p, p) == pytest.approx(0.5, abs=1e-14)
    wins = [sum(P[i, j] * p[j] for j in range(n)) for i in range(n)]
    assert max(wins) >= 0.5 - 1e-15
    assert game.gap(p) == pytest.approx(2 * max(wins) - 1, abs=1e-14)
    best = game.best_response(p)
    assert wins[game.names[0].index(best)] == max(wins)  # type: ignore[arg-type]


@settings(max_examples=40)
@given(games)
def test_nash_is_the_one_found_by_trying_supports(P: Any) -> None:
    nash = PreferenceGame(P).nash()
    assert duality_gap(P, nash.strategy) <= 1e-14  # type: ignore[arg-type]
    assert nash.value == pytest.approx(0.5, abs=1e-14)
    found = strategies_by_supports(P)
    assert any(np.abs(nash.strategy - p).max() < 1e-10 for p in found) or not nash.unique
    assert nash.unique == (len(found) == 1)
    assert nash.support == tuple(str(i + 1) for i in np.flatnonzero(np.asarray(nash.strategy)))


@settings(max_examples=30)
@given(games, seeds)
def test_relabelling_moves_the_nash_strategy_along(P: Any, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(P))
    first, second = PreferenceGame(P).nash(), PreferenceGame(P[np.ix_(order, order)]).nash()
    assert first.unique == second.unique
    np.testing.assert_allclose(np.asarray(first.strategy)[order], second.strategy, atol=1e-10)


def test_the_papers_game() -> None:
    game = PreferenceGame(PAPER, labels=["a", "b", "c"])
    nash = game.nash()
    np.testing.assert_allclose(nash.strategy, np.array([4, 3, 4]) / 11, atol=1e-15)
    assert nash.unique
    assert nash.support == ("a", "b", "c")
    assert game.gap([0.2, 0.5, 0.3]) == pytest.approx(0.28, abs=1e-15)
    assert game.best_response([0.2, 0.5, 0.3]) == "c"
    assert kl_divergence(np.array([4, 3, 4]) / 11, np.log([0.2, 0.5, 0.3])) == pytest.approx(0.122039, abs=5e-7)


@pytest.mark.parametrize(
    ("P", "unique", "support"),
    [
        (np.full((4, 4), 0.5), False, 4),  # all equal: every policy is Nash
        ([[0.5, 1.0], [0.0, 0.5]], True, 1),  # a winner
        ([[0.5, 0.5, 1], [0.5, 0.5, 1], [0, 0, 0.5]], False, 2),  # two winners
        (np.array(PAPER)[np.ix_([0, 1, 2, 0], [0, 1, 2, 0])], False, 4),  # a clone: a segment
    ],
)
def test_uniqueness(P: Any, unique: bool, support: int) -> None:
    nash = PreferenceGame(P).nash()
    assert (nash.unique, len(nash.support)) == (unique, support)
    assert PreferenceGame(P).gap(nash.strategy) <= 1e-15  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [1e-3, 1e-5])
def test_a_rarely_played_answer_is_in_the_support(share: float) -> None:
    # Weighted rock-paper-scissors with Nash (p1, p2, p3) has B_12 ~ p3, B_23 ~ p1, B_31 ~ p2.
    p = np.array([share, 0.4, 0.6 - share])
    P = 0.5 + 0.5 * np.array([[0, p[2], -p[1]], [-p[2], 0, p[0]], [p[1], -p[0], 0]])
    nash = PreferenceGame(P).nash()
    assert nash.unique
    np.testing.assert_allclose(nash.strategy, p, rtol=1e-9)


def test_kl_counts_only_what_p_plays() -> None:
    with np.errstate(divide="ignore"):
        assert kl_divergence(np.array([0.0, 1.0]), np.log([0.0, 1.0])) == 0
        assert kl_divergence(np.array([0.5, 0.5]), np.log([0.0, 1.0])) == np.inf


# --- several prompts ---------------------------------------------------------------------------------------------


def test_prompts_are_weighted_and_may_differ_in_size() -> None:
    other = random_matrix(4, 1)
    game = PreferenceGame({"x": PAPER, "y": other}, weights=[0.25, 0.75])
    p = {"x": [0.2, 0.5, 0.3], "y": [0.1, 0.2, 0.3, 0.4]}
    q = {"x": [1, 0, 0], "y": [0, 0, 0, 1]}
    single = [PreferenceGame(PAPER), PreferenceGame(other)]
    for name, expected in (
        ("gap", [s.gap(p[k]) for s, k in zip(single, "xy", strict=True)]),
        ("win_rate", [s.win_rate(p[k], q[k]) for s, k in zip(single, "xy", strict=True)]),
    ):
        value = getattr(game, name)(*((p, q) if name == "win_rate" else (p,)))
        assert value == pytest.approx(0.25 * expected[0] + 0.75 * expected[1], abs=1e-15)
    assert game.best_response(p) == {"x": "3", "y": single[1].best_response(p["y"])}
    nash = game.nash()
    assert isinstance(nash, Nash)
    assert isinstance(nash.strategy, dict)
    np.testing.assert_allclose(nash.strategy["x"], np.array([4, 3, 4]) / 11)
    assert game.gap(nash.strategy) <= 1e-14


# --- what is refused ---------------------------------------------------------------------------------------------

HALF = [[0.5, 0.5], [0.5, 0.5]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"P": [[0.5, 0.2]]}, r"shape \(1, 2\)"),
        ({"P": [0.5, 0.5]}, r"shape \(2,\)"),
        ({"P": [[0.5]]}, "two at least"),
        ({"P": [[0.5, 0.2], [0.8]]}, "rows of equal length"),
        ({"P": [[0.5, "x"], [0.8, 0.5]]}, "expected numbers"),
        ({"P": [[0.5, np.nan], [0.8, 0.5]]}, "nan in row 1, column 2"),
        ({"P": [[0.5, np.inf], [0.8, 0.5]]}, "inf in row 1"),
        ({"P": [[50, 20], [80, 50]]}, "divide percentages by 100"),
        ({"P": [[0.5, 1.2], [-0.2, 0.5]]}, r"from -0.2 to 1.2"),
        ({"P": [[0.5, 0.2], [0.7, 0.5]], "labels": ["yes", "no"]}, r"P\[yes, no\] \+ P\[no, yes\] = 0.2 \+ 0.7"),
        ({"P": [[0.4, 0.2], [0.8, 0.5]]}, r"P\[1, 1\] = 0.4, expected 0.5"),
        ({"P": [[0.5, 0.2], [0.800002, 0.5]]}, "is not a game"),
        ({"P": HALF, "labels": ["a"]}, "as many different labels"),
        ({"P": HALF, "labels": ["a", "a"]}, "as many different labels"),
        ({"P": HALF, "labels": "ab"}, "as many different labels"),
        ({"P": HALF, "labels": 5}, "as many different labels"),
        ({"P": HALF, "weights": [1.0]}, "one matrix"),
        ({"P": {}}, "at least one matrix"),
        ({"P": {"x": HALF}, "labels": {"y": ["a", "b"]}}, "Labels are for prompts"),
        ({"P": {"x": HALF, "y": HALF}, "weights": [1.5, -0.5]}, "weights: found"),
        ({"P": {"x": HALF, "y": HALF}, "weights": [0.5, 0.6]}, "add up to 1"),
        ({"P": {"x": HALF, "y": HALF}, "weights": [1.0]}, r"shape \(1,\)"),
        ({"P": {"x": HALF, "y": HALF}, "weights": {"x": 1.0}}, "Weights are for prompts"),
        ({"P": {"x": HALF, "y": [[0.5, 0.1], [0.8, 0.5]]}}, "of prompt 'y' is not a game"),
    ],
)
def test_input_that_is_no_game_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(CoalaError, match=message):
        PreferenceGame(**arguments)


def test_rounding_below_the_tolerance_is_accepted_and_kept() -> None:
    game = PreferenceGame([[0.5, 0.2], [0.8000005, 0.5]])
    assert game.matrices[0][1, 0] == 0.8000005
    with pytest.raises(ValueError):
        game.matrices[0][0, 0] = 1.0


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ([0.5, 0.5], r"shape \(2,\); expected \(3,\)"),
        ([0.5, 0.5, 0.5], "add up to 1"),
        ([1.5, -0.5, 0], "at least 0"),
        ([np.nan, 0.5, 0.5], "at least 0"),
        ({"x": [1, 0, 0]}, "mapping"),
    ],
)
def test_policies_that_are_no_distributions_are_refused(policy: Any, message: str) -> None:
    with pytest.raises(CoalaError, match=message):
        PreferenceGame(PAPER).gap(policy)


@pytest.mark.parametrize("policy", [[1, 0, 0], {"x": [1, 0, 0]}, {"x": [1, 0, 0], "z": [1, 0, 0]}])
def test_policies_have_to_cover_the_prompts(policy: Any) -> None:
    with pytest.raises(CoalaError, match="map each of the prompts"):
        PreferenceGame({"x": PAPER, "y": PAPER}).gap(policy)


# --- the form in a file ------------------------------------------------------------------------------------------


def test_games_from_json() -> None:
    content = json.loads(json.dumps({"P": PAPER, "labels": ["a", "b", "c"], "start": [0.2, 0.5, 0.3]}))
    game, start = read_game(content)
    assert game.names == (("a", "b", "c"),)
    np.testing.assert_array_equal(start, [0.2, 0.5, 0.3])
    game, start = read_game({"P": PAPER})
    np.testing.assert_allclose(start, np.ones(3) / 3)
    game, start = read_game(
        {"prompts": {"x": {"P": PAPER, "weight": 0.3, "start": [0.2, 0.5, 0.3]}, "y": {"P": HALF, "weight": 0.7}}}
    )
    assert game.prompts == ("x", "y")
    np.testing.assert_array_equal(game.shares, [0.3, 0.7])
    assert isinstance(start, dict)
    np.testing.assert_array_equal(start["y"], [0.5, 0.5])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([PAPER], "holds a list"),
        ({"matrix": PAPER}, "P is required"),
        ({"P": PAPER, "lables": ["a", "b", "c"]}, "lables"),
        ({"P": "abc"}, "list of rows"),
        ({"P": [[0.5, None], [0.5, 0.5]]}, "nan in row 1"),
        ({"P": PAPER, "start": [1, 1, 1]}, "start: found"),
        ({"prompts": []}, "object from prompt"),
        ({"prompts": {"x": 3}}, "holds a int"),
        ({"prompts": {"x": {"labels": ["a"]}}}, "P is required"),
        ({"prompts": {"x": {"P": HALF, "weight": 1}, "y": {"P": HALF}}}, r"Only the prompts \['x'\]"),
        ({"prompts": {"x": {"P": HALF}}, "start": [0.5, 0.5]}, "start"),
    ],
)
def test_files_that_hold_no_game_are_refused(content: Any, message: str) -> None:
    with pytest.raises(CoalaError, match=message):
        read_game(content)
