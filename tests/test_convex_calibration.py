"""The temperature: optimum, limits, invariances, and what it does to probabilities that are too sure."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from coala.convex.calibration import WIDEST, fit_temperature
from coala.evaluation import reliability
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


@settings(max_examples=50)
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


@settings(max_examples=50)
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


# --- what it is for ---------------------------------------------------------------------------------------------


def test_fitting_the_temperature_mends_overconfidence() -> None:
    margins = held_out(4.0, 4000, 2)
    before = reliability(sigmoid(margins))
    after = reliability(sigmoid(margins / fit_temperature(held_out(4.0, 4000, 3))))
    assert before.error.value > 5 * before.error_by_chance
    assert after.error.value < 2 * after.error_by_chance + 0.01
