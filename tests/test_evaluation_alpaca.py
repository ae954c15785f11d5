"""AlpacaEval 2: published figures, the length-controlled fit against an independent solver, and its edge cases."""

from __future__ import annotations

import csv
import gzip
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coala.evaluation.alpaca import (
    Annotations,
    preference_from_logprobs,
    read_annotations,
    read_output_lengths,
    win_rate,
)
from coala.evaluation.length_control import (
    Calibration,
    Difficulty,
    LengthControlled,
    LengthWeights,
    instruction_key,
    length_controlled,
    predict_winrate,
    read_calibration,
    read_difficulty,
)
from coala.values import CoalaError
from tests.reference import naive_logistic

MODELS = ("FuseChat-Llama-3.2-3B-Instruct", "gpt-3.5-turbo-0301", "vicuna-13b-v1.5", "alpaca-7b")


@pytest.fixture
def folder(shared: Path) -> Path:
    return shared / "eval_reference" / "alpaca"


@pytest.fixture
def expected(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "expected.json").read_text())["models"]
    return found


@pytest.fixture
def difficulty(folder: Path) -> Difficulty:
    return read_difficulty(folder / "instruction_difficulty_recovered.csv")


@pytest.fixture
def calibration(folder: Path) -> Calibration:
    return read_calibration(folder / "df_gamed_surrogate.csv.gz")


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


# --- published figures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_raw_figures_of_the_leaderboard(folder: Path, expected: dict[str, Any], model: str) -> None:
    found = win_rate(read_annotations(folder / f"annotations_{model}.jsonl.gz"))
    board = expected[model]["leaderboard"]
    assert found.model == model
    assert found.baseline == "gpt4_1106_preview"
    assert found.win_rate.value == pytest.approx(board["win_rate"], abs=1e-8)
    assert found.standard_error == pytest.approx(board["standard_error"], abs=1e-8)
    counts = (found.n_wins, found.n_wins_base, found.n_draws, found.n_total)
    assert counts == (board["n_wins"], board["n_wins_base"], board["n_draws"], board["n_total"])
    assert found.discrete == pytest.approx(board["discrete_win_rate"], abs=1e-8)
    assert found.average_length == board["avg_length"]
    assert found.excluding_ties.value == pytest.approx(expected[model]["win_rate_excluding_ties_discrete"], abs=1e-8)
    assert found.excluding_ties.n == found.n_wins + found.n_wins_base
    assert found.win_rate.low < found.win_rate.value < found.win_rate.high


def test_preferences_follow_from_the_log_probabilities(folder: Path) -> None:
    checked = 0
    for model in MODELS:
        with gzip.open(folder / f"annotations_{model}.jsonl.gz", "rt", encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                if "top_logprobs" in row:
                    top = [(token, value) for token, value in row["top_logprobs"]]
                    found = preference_from_logprobs(top, row["judge_saw_swapped_order"])
                    assert found == pytest.approx(row["preference"], abs=1e-6)
                    checked += 1
                elif model != MODELS[0]:  # no judge output is stored as a tie
                    assert row["preference"] == preference_from_logprobs(None, False) == 1.5
    assert checked == 802 + 804 + 801


@pytest.mark.parametrize("model", MODELS)
def test_length_controlled_by_maximum_likelihood(
    folder: Path, expected: dict[str, Any], difficulty: Difficulty, calibration: Calibration, model: str
) -> None:
    annotations = read_annotations(folder / f"annotations_{model}.jsonl.gz")
    found = length_controlled(annotations, difficulty, calibration, penalty=None)
    plain = expected[model]["plain_mle_with_surrogate"]
    assert found.win_rate.value == pytest.approx(plain["length_controlled_winrate"], abs=1e-6)
    assert found.standard_error == pytest.approx(plain["lc_standard_error"], abs=1e-6)
    weights = [found.weights.length, found.weights.difficulty, found.weights.bias]
    assert weights == pytest.approx(plain["weights"], abs=1e-6)
    board = expected[model]["leaderboard"]
    assert found.win_rate.value == pytest.approx(board["length_controlled_winrate"], abs=0.16)
    assert found.win_rate.low < found.win_rate.value < found.win_rate.high
    assert found.baseline_length == pytest.approx(2049.4, abs=0.1)
    assert found.remarks == ()


# Our optimum is a little further from the board than the published fit, which stops at a tolerance of 1e-4; run on to
# 1e-9 that solver gives these values to 1e-7.
AT_PUBLISHED_C = dict.fromkeys(MODELS, 0.002) | {"gpt-3.5-turbo-0301": 0.0022}
CONVERGED = {
    "FuseChat-Llama-3.2-3B-Instruct": 53.99969773816391,
    "gpt-3.5-turbo-0301": 18.091068895033956,
    "vicuna-13b-v1.5": 10.484408574798621,
    "alpaca-7b": 5.8748283382947895,
}


@pytest.mark.parametrize("model", MODELS)
def test_length_controlled_at_the_published_penalty(
    folder: Path, expected: dict[str, Any], difficulty: Difficulty, calibration: Calibration, model: str
) -> None:
    annotations = read_annotations(folder / f"annotations_{model}.jsonl.gz")
    c = expected[model]["l1_C_matching_publication"]["C"]
    found = length_controlled(annotations, difficulty, calibration, penalty=c, draws=0)
    board = expected[model]["leaderboard"]
    assert found.win_rate.value == pytest.approx(board["length_controlled_winrate"], abs=AT_PUBLISHED_C[model])
    assert found.win_rate.value == pytest.approx(CONVERGED[model], abs=1e-6)
    if board["lc_standard_error"] is not None:
        assert found.standard_error == pytest.approx(board["lc_standard_error"], abs=5e-5)
    for c, value in expected[model]["l1_fixed_C"].items():
        exact = float(np.logspace(-4, 4, 10)[np.argmin(np.abs(np.logspace(-4, 4, 10) - float(c)))])
        at_c = length_controlled(annotations, difficulty, calibration, penalty=exact, draws=0)
        assert at_c.win_rate.value == pytest.approx(value, abs=0.004)


@pytest.mark.parametrize("model", MODELS)
def test_published_stopping_gives_what_the_published_package_gives(
    folder: Path, expected: dict[str, Any], difficulty: Difficulty, calibration: Calibration, model: str
) -> None:
    """Another implementation, theirs, on the same rows: every value to 1e-8, and the board within 0.002."""
    annotations = read_annotations(folder / f"annotations_{model}.jsonl.gz")

    def at(c: float) -> LengthControlled:
        return length_controlled(annotations, difficulty, calibration, penalty=c, stopping="liblinear", draws=0)

    published = expected[model]["l1_C_matching_publication"]
    board = expected[model]["leaderboard"]["length_controlled_winrate"]
    found = at(published["C"]).win_rate
    assert found.value == pytest.approx(board, abs=0.002)
    assert found.value - board == pytest.approx(published["lc_minus_leaderboard"], abs=1e-8)
    assert "as liblinear stops" in found.method
    grid = np.logspace(-4, 4, 10)
    for c, value in expected[model]["l1_fixed_C"].items():
        assert at(float(grid[np.argmin(np.abs(grid - float(c)))])).win_rate.value == pytest.approx(value, abs=1e-8)


def test_published_stopping_is_near_the_optimum(world: World) -> None:
    annotations, difficulty, calibration, _ = world
    for c in (0.2, 1.0, 50.0):
        exact = length_controlled(annotations, difficulty, calibration, penalty=c, draws=0)
        early = length_controlled(annotations, difficulty, calibration, penalty=c, stopping="liblinear", draws=0)
        assert 1e-9 < abs(early.win_rate.value - exact.win_rate.value) < 0.1
    won = replace(annotations, preference=np.full(len(annotations), 2.0))
    assert length_controlled(won, difficulty, calibration, stopping="liblinear", draws=0).win_rate.value > 90


def test_published_stopping_says_what_it_needs(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    annotations, difficulty, calibration, _ = world
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(CoalaError, match=r"pip install 'coala-align\[liblinear\]'"):
        length_controlled(annotations, difficulty, calibration, penalty=1.0, stopping="liblinear", draws=0)
    assert length_controlled(annotations, difficulty, calibration, penalty=1.0, draws=0).penalty == 1


def test_stopping_needs_a_penalty_and_a_name(world: World) -> None:
    annotations, difficulty, calibration, _ = world
    with pytest.raises(CoalaError, match="give a C or 'cv'"):
        length_controlled(annotations, difficulty, calibration, penalty=None, stopping="liblinear")
    with pytest.raises(CoalaError, match="expected 'optimum' or 'liblinear'"):
        length_controlled(annotations, difficulty, calibration, stopping="early")  # type: ignore[arg-type]


def test_own_rows_alone_are_read_at_equal_lengths() -> None:
    """Verdicts drawn from a length weight and a bias: the truth is in the interval, the raw rate far from it."""
    rng = np.random.default_rng(2)
    length, base = rng.integers(50, 900, 500), rng.integers(300, 900, 500)
    difference = base - length
    chance = 1 / (1 + np.exp(2 * np.tanh(difference / difference.std(ddof=1)) - 0.4))
    verdicts = 1.0 + (rng.random(500) < chance)
    annotations = made(verdicts, length, base)
    found = length_controlled(annotations, None, None, draws=200)
    truth = 100 / (1 + math.exp(-0.4))
    assert found.win_rate.low < truth < found.win_rate.high
    assert win_rate(annotations).win_rate.high < truth
    assert found.standard_error == pytest.approx((found.win_rate.high - found.win_rate.low) / 3.92, rel=0.15)
    assert found.weights.difficulty == 0
    assert "own rows alone" in found.win_rate.method
    X = np.column_stack([np.tanh(difference / difference.std(ddof=1)), np.ones(500)])
    assert found.win_rate.value == pytest.approx(
        100 / (1 + math.exp(-naive_logistic(X, verdicts - 1, np.ones(500), 0.0)[1])), abs=1e-3
    )
    with pytest.raises(CoalaError, match="together, or neither"):
        length_controlled(annotations, Difficulty(np.zeros(500), {}), None)


@pytest.mark.parametrize(
    ("verdicts", "lengths", "known"),
    [
        ([1, 1, 2, 2], [1, 2, 8, 9], False),
        ([2, 2, 1, 1], [1, 2, 8, 9], False),
        ([1, 1.5, 2], [1, 5, 9], False),  # a tie in between holds the weights no better
        ([2, 2, 2], [1, 5, 9], False),
        ([1, 2, 1, 2], [1, 2, 8, 9], True),
        ([1.2, 1.1, 1.9], [1, 5, 9], True),
        ([1.2, 1.1, 1.9], [6, 8, 9], False),  # never shorter than the reference: equal lengths were not seen
        ([1.2, 1.1, 1.9], [1, 2, 3], False),
        ([1, 2, 2], [5, 5, 5], True),  # always the reference's length: the raw rate
        ([1, 2, 2], [7, 7, 7], False),
    ],
)
def test_what_length_alone_decides_is_not_told(verdicts: list[float], lengths: list[int], known: bool) -> None:
    found = length_controlled(made(verdicts, lengths, [5] * len(lengths)), None, None, draws=0)
    assert math.isfinite(found.win_rate.value) == known
    assert known or any("length alone decides who won" in remark for remark in found.remarks)
    # With a handful of rows hardly a draw can tell, and then the interval says nothing.
    drawn = length_controlled(made(verdicts, lengths, [5] * len(lengths)), None, None, draws=100).win_rate
    assert (drawn.low, drawn.high) == (0, 100) or lengths[0] == lengths[-1] == 5
    if lengths[0] == lengths[-1] == 5:
        assert found.win_rate.value == pytest.approx(200 / 3)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("model", MODELS)
def test_length_controlled_with_a_chosen_penalty(
    folder: Path, expected: dict[str, Any], difficulty: Difficulty, calibration: Calibration, model: str, seed: int
) -> None:
    annotations = read_annotations(folder / f"annotations_{model}.jsonl.gz")
    found = length_controlled(annotations, difficulty, calibration, draws=0, seed=seed)
    board = expected[model]["leaderboard"]["length_controlled_winrate"]
    assert found.win_rate.value == pytest.approx(board, abs=0.16)
    assert found.penalty is not None
    assert found.penalty > 0.3  # smaller ones shrink the weights visibly and predict worse
    assert "L1 at C" in found.win_rate.method


def test_published_weights_give_the_published_values(folder: Path, difficulty: Difficulty) -> None:
    rows = {row["model"]: row for row in table(folder / "published_weights_and_lc.csv")}
    columns = ("w_tanh_std_delta_len", "w_instruction_difficulty", "w_bias")
    weights = {model: LengthWeights(*(float(row[column]) for column in columns)) for model, row in rows.items()}
    whole = [model for model, row in rows.items() if float(row["n_total"]) == 805]
    assert len(whole) == 93
    errors = 0
    for model in whole:
        predictions = predict_winrate(weights[model], difficulty.values)
        published = float(rows[model]["length_controlled_winrate"])
        assert 100 * predictions.mean() == pytest.approx(published, abs=1e-6)
        if rows[model]["lc_standard_error"]:
            error = 100 * predictions.std(ddof=1) / math.sqrt(805)
            assert error == pytest.approx(float(rows[model]["lc_standard_error"]), abs=5e-5)
            errors += 1
    assert errors == 17
    assert len(rows) - len(whole) == 4
    for model in set(rows) - set(whole):
        first = difficulty.values[: int(float(rows[model]["n_total"]))]
        used, other = (difficulty.values, first) if model[0] in "SM" else (first, difficulty.values)
        published = float(rows[model]["length_controlled_winrate"])
        assert 100 * predict_winrate(weights[model], used).mean() == pytest.approx(published, abs=1e-8)
        assert 100 * predict_winrate(weights[model], other).mean() != pytest.approx(published, abs=0.003)


def test_published_predictions_are_affine_in_the_difficulty(folder: Path, difficulty: Difficulty) -> None:
    with gzip.open(folder / "per_instruction_lc_predictions.jsonl.gz", "rt") as lines:
        for row in map(json.loads, lines):
            g = np.array(row["glm_preference"])
            logit = np.log(g / (1 - g))
            design = np.column_stack([difficulty.values, np.ones(len(g))])
            (w, b), *_ = np.linalg.lstsq(design, logit, rcond=None)
            assert np.abs(logit - design @ [w, b]).max() < 1e-6
            assert np.abs(predict_winrate(LengthWeights(0.0, w, b), difficulty.values) - g).max() < 1e-7


def test_calibration_file_has_its_sufficient_statistics(calibration: Calibration, difficulty: Difficulty) -> None:
    assert calibration.preference @ np.tanh(calibration.length_difference) == pytest.approx(-182.6961, abs=1e-3)
    assert calibration.preference @ calibration.difficulty == pytest.approx(412.8648, abs=1e-3)
    assert not calibration.bias.any()
    assert len(difficulty.values) == len(difficulty.places) == 805


# --- laws --------------------------------------------------------------------------------------------------------


@given(st.floats(-20, 0), st.floats(-20, 0), st.booleans())
def test_swapping_the_order_mirrors_the_preference(first: float, second: float, swapped: bool) -> None:
    found = preference_from_logprobs([("m", first), ("x", -1.0), ("M", second)], swapped)
    other = preference_from_logprobs([("m", second), ("M", first)], swapped)
    turned = preference_from_logprobs([("m", first), ("M", second)], not swapped)
    assert found is not None
    assert other is not None
    assert turned is not None
    assert 1 <= found <= 2
    assert found + other == pytest.approx(3)
    assert found + turned == pytest.approx(3)
    naive = math.exp(first) / (math.exp(first) + math.exp(second))
    assert found == pytest.approx(1 + naive if swapped else 2 - naive, abs=1e-12)


def test_tokens_that_are_missing() -> None:
    assert preference_from_logprobs([("m", -0.1)], False) == 1.0
    assert preference_from_logprobs([("M", -0.1)], False) == 2.0
    assert preference_from_logprobs([("M", -0.1)], True) == 1.0
    assert preference_from_logprobs([("The", -0.1)], False) is None
    assert preference_from_logprobs([("m", -math.inf), ("M", -math.inf)], False) is None
    assert preference_from_logprobs([], True) == 1.5
    assert preference_from_logprobs([("A", -1.0), ("B", -3.0)], True, ("A", "B")) == pytest.approx(
        1 + 1 / (1 + math.exp(-2))
    )


def made(preference: Any, model: Any, baseline: Any, instruction: Any = None) -> Annotations:
    n = len(preference)
    names = tuple(f"say {i}" for i in range(n)) if instruction is None else tuple(instruction)
    return Annotations(
        "mine", "theirs", np.array(preference, float), np.array(model, float), np.array(baseline, float), names
    )


@pytest.fixture(scope="module")
def world() -> tuple[Annotations, Difficulty, Calibration, LengthWeights]:
    """A model of 400 answers whose preferences follow known weights exactly."""
    rng = np.random.default_rng(3)
    truth = LengthWeights(-1.5, 0.8, -0.4)
    hard = rng.normal(size=400)
    baseline, model = rng.integers(200, 2000, 400), rng.integers(200, 2000, 400)
    difference = baseline - model
    score = truth.length * np.tanh(difference / difference.std(ddof=1)) + truth.difficulty * hard + truth.bias
    annotations = made(1 + 1 / (1 + np.exp(-score)), model, baseline)
    gamed = rng.normal(size=300)
    other = rng.normal(size=300)
    y = 1 / (1 + np.exp(-(truth.length * np.tanh(gamed) + truth.difficulty * other)))
    places = {instruction_key(name): i for i, name in enumerate(annotations.instruction)}
    return annotations, Difficulty(hard, places), Calibration(gamed, other, np.zeros(300), y), truth


World = tuple[Annotations, Difficulty, Calibration, LengthWeights]


def test_true_weights_are_found(world: World) -> None:
    annotations, difficulty, calibration, truth = world
    found = length_controlled(annotations, difficulty, calibration, penalty=None, draws=50)
    assert vars(found.weights) == pytest.approx(vars(truth), abs=1e-8)
    assert found.predictions == pytest.approx(predict_winrate(truth, difficulty.values))
    assert found.win_rate.low < found.win_rate.value < found.win_rate.high
    by_cv = length_controlled(annotations, difficulty, calibration, draws=0)
    assert by_cv.penalty is not None
    assert by_cv.penalty >= 100  # nothing is gained by shrinking exact weights
    assert by_cv.win_rate.value == pytest.approx(found.win_rate.value, abs=0.1)


def test_the_interval_covers_sampled_verdicts(world: World) -> None:
    annotations, difficulty, calibration, truth = world
    target = 100 * predict_winrate(truth, difficulty.values).mean()
    rng = np.random.default_rng(5)
    inside = 0
    for seed in range(25):
        verdict = 1.0 + (rng.random(400) < annotations.preference - 1)
        sampled = made(verdict, annotations.model_length, annotations.baseline_length)
        found = length_controlled(sampled, difficulty, calibration, penalty=None, draws=60, seed=seed).win_rate
        inside += found.low <= target <= found.high
    assert inside >= 20


def test_the_baseline_against_itself_is_at_fifty(world: World) -> None:
    annotations, difficulty, calibration, _ = world
    itself = Annotations("theirs", "theirs", *list(vars(annotations).values())[2:])
    assert length_controlled(itself, difficulty, calibration).win_rate.value == 50


def test_difficulty_by_position_shifts_after_a_gap(world: World) -> None:
    annotations, difficulty, calibration, truth = world
    kept = np.delete(np.arange(400), 10)
    names = [annotations.instruction[i] for i in kept]
    gap = made(annotations.preference[kept], annotations.model_length[kept], annotations.baseline_length[kept], names)

    def fit(by: Any) -> LengthControlled:
        return length_controlled(gap, difficulty, calibration, penalty=None, difficulty_by=by, draws=0)

    by_name, by_place = fit("instruction"), fit("position")
    assert by_name.remarks == ("399 rows for 400 instructions with a difficulty",)
    assert by_place.remarks[1].startswith("389 rows take another instruction's difficulty")
    assert by_name.weights.difficulty == pytest.approx(truth.difficulty, abs=0.01)
    assert by_place.weights.difficulty < 0.5  # the shifted difficulties say little about the rows
    assert by_name.predictions == pytest.approx(predict_winrate(by_name.weights, difficulty.values[kept]))
    assert by_place.predictions == pytest.approx(predict_winrate(by_place.weights, difficulty.values[:399]))
    # Without a gap the two are one.
    whole = [
        length_controlled(annotations, difficulty, calibration, penalty=None, difficulty_by=by, draws=0)
        for by in ("instruction", "position")
    ]
    assert whole[0].win_rate.value == whole[1].win_rate.value
    lacking = Difficulty(difficulty.values, {key: i for key, i in difficulty.places.items() if i != 7})
    with pytest.raises(CoalaError, match="1 of 400 instructions have no difficulty"):
        length_controlled(annotations, lacking, calibration, difficulty_by="instruction")
    with pytest.raises(CoalaError, match="400 annotated rows but 5 difficulties"):
        length_controlled(annotations, Difficulty(difficulty.values[:5], {}), calibration)


# --- edges -------------------------------------------------------------------------------------------------------


def controlled(world: World, annotations: Annotations, **options: Any) -> LengthControlled:
    return length_controlled(annotations, world[1], world[2], draws=20, **options)


@pytest.mark.parametrize("penalty", [None, "cv", 21.5])
def test_degenerate_outputs(world: World, penalty: Any) -> None:
    rng = np.random.default_rng(0)
    lengths, soft = rng.integers(100, 3000, 40), 1 + rng.random(40)
    constant = made(soft, np.full(40, 123), lengths)  # one output for every instruction
    empty = made(np.full(40, 1.02), np.zeros(40), lengths)
    ties = made(np.full(40, 1.5), rng.integers(1, 500, 40), lengths)
    equal = made(soft, lengths, lengths)  # the length differences have no spread
    shorter = made(soft, lengths, lengths + 7)
    short = made(soft, np.ones(40), lengths)
    for rows in (constant, empty, ties, equal, shorter, short):
        found = controlled(world, rows, penalty=penalty)
        assert 0 <= found.win_rate.low <= found.win_rate.value <= found.win_rate.high <= 100
        assert any("calibration rows" in remark for remark in found.remarks)  # 40 rows are few
    assert any("differences are equal" in remark for remark in controlled(world, equal, penalty=penalty).remarks)
    assert win_rate(empty).remarks == ("40 outputs of the model are empty",)
    even = win_rate(ties)
    assert (even.win_rate.value, even.n_draws, even.discrete) == (50, 40, 50)
    assert math.isnan(even.excluding_ties.value)
    assert even.excluding_ties.n == 0
    assert even.win_rate.high - even.win_rate.low > 20  # no spread seen is not no spread


def test_all_rows_lost_or_won(world: World) -> None:
    rng = np.random.default_rng(1)
    for verdict, limit in ((1.0, 0.0), (2.0, 100.0)):
        annotations = made(np.full(30, verdict), rng.integers(1, 99, 30), rng.integers(1, 99, 30))
        assert controlled(world, annotations, penalty=None).win_rate.value == pytest.approx(limit, abs=1e-3)
        raw = win_rate(annotations)
        assert raw.win_rate.value == limit
        assert raw.win_rate.high - raw.win_rate.low > 5
        assert raw.excluding_ties.value == limit


def test_null_preferences_are_predicted_but_not_fitted(world: World) -> None:
    annotations, difficulty, calibration, truth = world
    holes = annotations.preference.copy()
    holes[::3] = np.nan
    some = made(holes, annotations.model_length, annotations.baseline_length)
    raw = win_rate(some)
    known = np.isfinite(holes)
    assert (raw.n_total, raw.n_missing) == (known.sum(), (~known).sum())
    assert raw.win_rate.value == pytest.approx(100 * (holes[known] - 1).mean())
    found = length_controlled(some, difficulty, calibration, penalty=None, draws=0)
    assert len(found.predictions) == 400
    assert found.weights.difficulty == pytest.approx(truth.difficulty, abs=1e-6)
    nothing = made([math.nan] * 4, [1] * 4, [2] * 4)
    assert math.isnan(win_rate(nothing).win_rate.value)
    with pytest.raises(CoalaError, match="None of the 4 rows"):
        controlled(world, nothing)


def test_repeated_rows_are_kept_and_remarked(world: World) -> None:
    again = made([1.2, 1.9, 1.4, 1.1], [5, 6, 7, 8], [9, 9, 9, 9], ["a", "b", "a", "c"])
    found = win_rate(again)
    assert found.n_total == 4
    assert "1 rows repeat an instruction" in found.remarks[0]
    assert "3 groups" in found.win_rate.method
    for bad in (0.0, -1, math.inf, "lasso"):
        with pytest.raises(CoalaError, match="positive number"):
            controlled(world, again, penalty=bad)
    with pytest.raises(CoalaError, match="expected 'position' or 'instruction'"):
        controlled(world, again, difficulty_by="name")
    single = made([1.3], [5], [9])
    assert math.isnan(win_rate(single).standard_error)
    assert 0 <= controlled(world, single, penalty=None).win_rate.value <= 100


def test_published_files_are_read_in_every_form(tmp_path: Path) -> None:
    names = {"generator_1": "b", "generator_2": "m"}
    lengths = names | {"len_1": 4, "len_2": 9}
    top = {"top_logprobs": [{"token": "M", "logprob": -0.5}], "judge_saw_swapped_order": False}
    rows: list[dict[str, Any]] = [
        names | {"output_1": "äb", "output_2": "", "preference": 0, "instruction": "x"},
        lengths | {"preference": None, "instruction": "y"},
        lengths | top | {"instruction": "z"},
        lengths | {"preference": None, "top_logprobs": None},
    ]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    with gzip.open(tmp_path / "lines.jsonl.gz", "wt") as file:
        file.write("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    for name in ("list.json", "lines.jsonl", "lines.jsonl.gz"):
        found = read_annotations(tmp_path / name)
        assert found.preference.tolist()[0] == 1.5
        assert math.isnan(found.preference[1])
        assert found.preference.tolist()[2:] == [2.0, 1.5]
        assert found.baseline_length.tolist() == [2, 4, 4, 4]
        assert found.instruction == ("x", "y", "z", "")
    (tmp_path / "outputs.json").write_text(json.dumps([{"output": "abc"}, {"output": "abcd"}] * 4))
    whole = read_output_lengths(tmp_path / "outputs.json")
    assert win_rate(found, whole).average_length == 3  # 3.5, truncated
    assert any("whole file" in remark for remark in win_rate(found, whole[:2]).remarks)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"preference": 3}, r"a.jsonl:2: preference: found 3, expected a number from 0 to 2"),
        ({"preference": 0.5}, "from 1 to 2, or 0 for a tie"),
        ({"preference": "x"}, "preference: found 'x'"),
        ({"len_2": None}, "len_2: found null or an empty cell, expected a number"),
        ({"len_2": -1}, "at least 0|from 0"),
        ({"generator_2": "other"}, "One|one model"),
        ({"instruction": 3}, "instruction: found 3, expected a text"),
        ({"preference": None, "top_logprobs": [["m"]]}, "top_logprobs"),
        ({"preference": None, "top_logprobs": [["m", -1.0]]}, "judge_saw_swapped_order"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    row = {"generator_1": "b", "generator_2": "m", "len_1": 4, "len_2": 9, "preference": 1.5, "instruction": "x"}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | change) + "\n")
    with pytest.raises(CoalaError, match=words):
        read_annotations(path)


def test_calibration_scales_and_difficulty_order(tmp_path: Path) -> None:
    head = "preference,std_delta_len,instruction_difficulty,not_gamed_baseline\n"
    one, two, mixed = tmp_path / "one.csv", tmp_path / "two.csv", tmp_path / "mixed.csv"
    one.write_text(head + "0.25,1,2,False\n0.5,1,2,True\n")
    two.write_text(head + "1.25,1,2,False\n0,1,2,True\n")
    mixed.write_text(head + "1.25,1,2,False\n0.3,1,2,True\n")
    assert read_calibration(one).preference.tolist() == read_calibration(two).preference.tolist() == [0.25, 0.5]
    assert read_calibration(one).bias.tolist() == [0, 1]
    with pytest.raises(CoalaError, match=r"mixed.csv:2: preference"):
        read_calibration(mixed)
    order = tmp_path / "order.csv"
    order.write_text("index,instruction_difficulty\n0,1.5\n2,2.5\n")
    with pytest.raises(CoalaError, match=r"order.csv:2: index: found 2, expected 1"):
        read_difficulty(order)
    order.write_text("instruction,instruction_difficulty\nsay a,1.5\nsay b,2.5\n")
    assert read_difficulty(order).places[instruction_key("say b")] == 1
