"""The temperature: optimum, limits, invariances, and what it does to probabilities that are too sure."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize_scalar

from coala.convex import fit
from coala.convex.calibration import DROP, WIDEST, fit_temperature, least_slope
from coala.statistics.scores import reliability
from coala.values import CoalaError, FeatureSet, FeatureSpec


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


# --- how far it can be trusted -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_the_least_slope_is_where_the_likelihood_has_dropped(seed: int) -> None:
    margins = held_out(2.0, 80, seed)

    def loss(slope: float) -> float:
        return float(np.logaddexp(0, -slope * margins).sum())

    top = 1 / fit_temperature(margins)
    wanted = brentq(lambda slope: loss(slope) - loss(top) - DROP, 0, top, xtol=1e-14)
    assert least_slope(margins) == pytest.approx(wanted, rel=1e-8)
    assert least_slope(margins) < top


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-1e3, 1e3).filter(lambda x: x == 0 or abs(x) > 1e-6), max_size=20),
    st.floats(1e-6, 1e6),
    st.integers(1, 6),
)
def test_any_margins_give_a_slope_that_scales_and_that_copies_do_not_raise(
    values: list[float], factor: float, copies: int
) -> None:
    margins = np.array(values)
    slope = least_slope(margins)
    assert slope >= 0
    assert least_slope(margins * factor) == pytest.approx(slope / factor, rel=1e-6)
    # Nothing is learnt from the same pair again, if it is known to be the same: at most the n / (n - 1) of a variance.
    again = least_slope(np.tile(margins, copies), np.tile(np.arange(len(margins)), copies))
    assert again <= slope * (1 + 1e-6)


@pytest.mark.parametrize("n", [1, 4, 5, 100])
def test_margins_that_are_all_right_vouch_for_what_so_many_can(n: int) -> None:
    """n equal margins: n softplus(-slope) is the drop of the likelihood from its supremum; none for fewer than 5."""
    found = least_slope(np.full(n, 2.0))
    assert found == pytest.approx(0 if n * np.log(2) <= DROP else -np.log(np.expm1(DROP / n)) / 2)


def test_margins_that_say_nothing_vouch_for_nothing() -> None:
    assert least_slope(np.zeros(5)) == least_slope(np.zeros(0)) == 0
    assert least_slope(np.array([1.0, -1.0])) == least_slope(np.full(50, -3.0)) == 0
    with pytest.raises(CoalaError, match="finite"):
        least_slope(np.array([1.0, np.inf]))


@pytest.mark.parametrize("n", [15, 60, 500])
def test_chance_is_taken_for_evidence_once_in_two_hundred(n: int) -> None:
    rng = np.random.default_rng(n)
    slopes = np.array([least_slope(rng.standard_normal(n)) for _ in range(2000)])
    # 1 in 200 has a standard deviation of 0.0016 among 2000; few margins make the likelihood less than normal.
    assert (slopes > 0).mean() < 0.005 + 4 * 0.0016
    assert np.mean([1 / fit_temperature(rng.standard_normal(n)) > 0.01 for _ in range(200)]) > 0.3, "which the fit is"


def test_as_pairs_add_up_all_of_the_slope_is_vouched_for() -> None:
    shares = [least_slope(held_out(2.0, n, 1)) * 2.0 for n in (30, 300, 3000, 30_000)]
    assert (np.diff(shares) > 0).all()
    assert shares[-1] == pytest.approx(1, abs=0.05)


def test_a_fit_carries_its_evidence() -> None:
    rng = np.random.default_rng(0)
    chosen, rejected = rng.standard_normal((2, 60, 4)).astype(np.float32)
    group = np.arange(60).astype(str)
    spec = FeatureSpec("m", "", "w", "chat:x", 1, "mean", False, 64)
    tells = (chosen - rejected)[:, 0] > 0
    found = []
    for label in (tells, rng.permutation(tells)):
        a, b = np.where(label[:, None], chosen, rejected), np.where(label[:, None], rejected, chosen)
        head = fit(FeatureSet(a, b, group, spec), method="linear").head
        assert head.least_slope is not None
        assert head.least_slope <= 1 / head.temperature
        found.append(head.evidence)
    assert found[0] > 0
    assert found[1] == 0


# --- what it is for ---------------------------------------------------------------------------------------------


def test_fitting_the_temperature_mends_overconfidence() -> None:
    margins = held_out(4.0, 4000, 2)
    before = reliability(sigmoid(margins))
    after = reliability(sigmoid(margins / fit_temperature(held_out(4.0, 4000, 3))))
    assert before.error.value > 5 * before.error_by_chance
    assert after.error.value < 2 * after.error_by_chance + 0.01
