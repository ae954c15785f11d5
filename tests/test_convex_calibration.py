"""Temperature, reliability tables and calibration error: optima, limits, invariances, and a simulation of chance."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from coala.convex.calibration import WIDEST, calibration_error, fit_temperature, reliability
from coala.evaluation import wilson
from coala.values import CoalaError


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def held_out(temperature: float, n: int, seed: int) -> np.ndarray:
    """Margins whose preferences were drawn at the given temperature."""
    rng = np.random.default_rng(seed)
    margins = 3 * rng.standard_normal(n)
    return np.where(rng.random(n) < sigmoid(margins / temperature), margins, -margins)


# --- temperature -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.3, 1.0, 7.0])
def test_the_temperature_of_the_draw_is_found(temperature: float) -> None:
    assert fit_temperature(held_out(temperature, 20_000, 0)) == pytest.approx(temperature, rel=0.1)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("offset", [0.0, 0.4])
def test_the_minimum_is_scipy_s(seed: int, offset: float) -> None:
    margins = held_out(2.0, 60, seed)
    weight = np.random.default_rng(seed).random(60)

    def loss(log_t: float) -> float:
        return float(weight @ np.logaddexp(0, offset - margins / np.exp(log_t)))

    best = minimize_scalar(loss, bounds=(-5, 6), method="bounded", options={"xatol": 1e-10})
    found = np.log(fit_temperature(margins, weight=weight, offset=offset))
    assert loss(found) <= best.fun * (1 + 1e-12)
    assert found == pytest.approx(best.x, abs=1e-4)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-1e3, 1e3).filter(lambda x: x == 0 or abs(x) > 1e-6), min_size=1, max_size=20),
    st.floats(1e-6, 1e6),
)
def test_any_margins_give_a_bounded_temperature_that_scales_with_them(values: list[float], factor: float) -> None:
    margins = np.array(values)
    temperature = fit_temperature(margins)
    if not margins.any():
        assert temperature == 1.0
        return
    size = np.sqrt(np.mean(margins[margins != 0] ** 2))
    assert size / WIDEST * (1 - 1e-9) <= temperature <= size * WIDEST * (1 + 1e-9)
    assert fit_temperature(margins * factor) == pytest.approx(temperature * factor, rel=1e-6)
    assert fit_temperature(np.concatenate([margins, margins * 0])) == pytest.approx(temperature, rel=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 100))
def test_no_other_temperature_is_better_where_the_minimum_is_attained(seed: int, ratio: float) -> None:
    margins = held_out(1.0, 30, seed)
    assume((margins < 0).any())
    temperature = fit_temperature(margins)
    loss = [np.logaddexp(0, -margins / t).mean() for t in (temperature, temperature * ratio)]
    assert loss[0] <= loss[1] + 1e-12


def test_margins_that_say_nothing() -> None:
    assert fit_temperature(np.zeros(5)) == 1.0
    assert fit_temperature(np.zeros(0)) == 1.0
    assert fit_temperature(np.array([1.0, -1.0]), weight=np.zeros(2)) == 1.0


@pytest.mark.parametrize("n", [1, 10, 1000])
def test_separable_margins_follow_the_rule_of_succession(n: int) -> None:
    margins = np.random.default_rng(n).random(n) + 0.5
    temperature = fit_temperature(margins)
    assert np.mean(sigmoid(-margins / temperature)) == pytest.approx(1 / (n + 2), rel=1e-6)


def test_margins_no_better_than_chance_get_the_widest_temperature() -> None:
    assert fit_temperature(np.array([1.0, -1.0])) == pytest.approx(WIDEST)
    assert fit_temperature(np.array([-2.0, -2.0])) == pytest.approx(2 * WIDEST)


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(CoalaError, match="finite"):
        fit_temperature(np.array([1.0, np.nan]))
    with pytest.raises(CoalaError, match="at least 0"):
        fit_temperature(np.ones(2), weight=np.array([1.0, -1.0]))


# --- tables ------------------------------------------------------------------------------------------------------


def test_rows_add_up_and_carry_wilson_intervals() -> None:
    probability = np.random.default_rng(0).random(500)
    rows = reliability(probability, 7)
    assert sum(row.observed.n for row in rows) == 500
    for row in rows:
        assert row.low - 1e-12 <= row.predicted <= row.high + 1e-12
        assert (row.observed.low, row.observed.high) == pytest.approx(wilson(row.observed.value, row.observed.n))
    right = sum(row.observed.value * row.observed.n for row in rows)
    assert right == pytest.approx((probability > 0.5).sum())
    assert sum(row.predicted * row.observed.n for row in rows) == pytest.approx(
        np.maximum(probability, 1 - probability).sum()
    )


def test_one_bin_by_hand() -> None:
    (row,) = reliability(np.array([0.8, 0.3, 0.5, 0.9]), 1)
    assert row.predicted == pytest.approx((0.8 + 0.7 + 0.5 + 0.9) / 4)
    assert row.observed.value == pytest.approx(2.5 / 4)
    assert calibration_error(np.array([0.8, 0.3, 0.5, 0.9]), 1).value == pytest.approx(abs(2.9 - 2.5) / 4)


def test_the_ends_of_the_unit_interval_have_a_bin() -> None:
    assert [row.observed.value for row in reliability(np.array([0.0, 1.0, 0.5]), 4)] == [0.5, 0.5]
    assert reliability(np.zeros(0)) == []
    assert calibration_error(np.zeros(0)) == (0.0, 0.0)


def test_sure_and_wrong_is_the_worst() -> None:
    assert calibration_error(np.zeros(10)) == (1.0, 0.0)
    assert calibration_error(np.ones(10)) == (0.0, 0.0)


def test_calibrated_probabilities_have_the_error_of_chance() -> None:
    """The mean error of 400 calibrated tables is what ``by_chance`` says, and an overconfident one is far above."""
    rng = np.random.default_rng(1)
    values, expected, over = [], [], []
    for _ in range(400):
        confidence = 0.5 + rng.random(300) / 2
        right = rng.random(300) < confidence
        found = calibration_error(np.where(right, confidence, 1 - confidence))
        sure = confidence ** (1 / 4)
        values.append(found.value)
        expected.append(found.by_chance)
        over.append(calibration_error(np.where(right, sure, 1 - sure)).value)
    assert np.mean(values) == pytest.approx(np.mean(expected), rel=0.05)
    assert np.mean(over) > 3 * np.mean(expected)


def test_fitting_the_temperature_mends_overconfidence() -> None:
    margins = held_out(4.0, 4000, 2)
    before = calibration_error(sigmoid(margins))
    after = calibration_error(sigmoid(margins / fit_temperature(held_out(4.0, 4000, 3))))
    assert before.value > 5 * before.by_chance
    assert after.value < 2 * after.by_chance + 0.01


@pytest.mark.parametrize(("probability", "bins"), [([1.5], 10), ([np.nan], 10), ([0.5], 0)])
def test_tables_refuse_what_is_no_probability(probability: list[float], bins: int) -> None:
    with pytest.raises(CoalaError):
        reliability(np.array(probability), bins)
