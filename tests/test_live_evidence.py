"""Confidence sequences of a running mean: the bound they rest on, how often they miss, what few values say."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coala.statistics.anytime import log_wealth, running_mean
from coala.statistics.intervals import clopper_pearson
from coala.values import CoalaError


def chance(before: tuple[int, ...]) -> float:
    """A mean that depends on all that went before: a head that learns from its errors, and forgets."""
    return 0.5 + 0.35 * np.tanh(sum(1 - y for y in before) / 3) - 0.1 * (len(before) % 3)


def test_expected_wealth_against_the_truth_is_at_most_one() -> None:
    """Over all sequences of up to eight outcomes, exactly, for either side: what Ville's inequality needs."""
    for length in range(1, 9):
        expected = np.zeros(2)
        for outcome in product((0, 1), repeat=length):
            means = [chance(outcome[:i]) for i in range(length)]
            weight = np.prod([mean if y else 1 - mean for mean, y in zip(means, outcome, strict=True)])
            total, mean = sum(outcome), float(np.mean(means))
            sides = [log_wealth(total, length, mean), log_wealth(length - total, length, 1 - mean)]
            expected += weight * np.exp(np.array(sides, dtype=float))
        assert (expected <= 1 + 1e-12).all()


def missed(runs: int, length: int, seed: int) -> tuple[int, int]:
    """Of so many runs of an accuracy that rises, jumps and depends on the past: missed at any time, and above half
    when it was not."""
    rng = np.random.default_rng(seed)
    rise = 0.45 + 0.4 * (1 - np.exp(-np.arange(length) / rng.uniform(5, 200, (runs, 1))))
    jumps = np.where(rng.random((runs, 1)) < 0.5, 1.0, np.where(np.arange(length) < length // 2, 1.0, 0.4))
    means, x = np.zeros((runs, length)), np.zeros((runs, length))
    mood = np.zeros(runs)
    for i in range(length):
        means[:, i] = np.clip(rise[:, i] * jumps[:, i] + 0.1 * np.tanh(mood), 0.01, 0.99)
        x[:, i] = rng.random(runs) < means[:, i]
        mood += means[:, i] - x[:, i]
    n, total, truth = np.arange(1, length + 1), x.cumsum(axis=1), means.cumsum(axis=1)
    out = np.zeros(runs, bool)
    claimed = np.zeros(runs, bool)
    for i in range(length):
        mean = truth[:, i] / n[i]
        either = np.maximum(log_wealth(total[:, i], n[i], mean), log_wealth(n[i] - total[:, i], n[i], 1 - mean))
        out |= either >= np.log(2 / 0.05)
        claimed |= (log_wealth(total[:, i], n[i], 0.5) >= np.log(1 / 0.05)) & (mean <= 0.5)
    return int(out.sum()), int(claimed.sum())


@pytest.mark.parametrize(("runs", "length"), [(200, 120), pytest.param(1000, 600, marks=pytest.mark.nightly)])
def test_sequences_hold_at_all_times_together(runs: int, length: int) -> None:
    out, claimed = missed(runs, length, seed=1)
    assert out <= 0.05 * runs
    assert claimed <= 0.05 * runs


def test_the_interval_is_where_the_mixture_is_below_its_bound() -> None:
    x = np.array([1, 1, 0, 1, 1, 1, 0.5, 1, 1, 0, 1, 1])
    found = running_mean(x)
    bound = np.log(2 / 0.05)
    for mean in np.linspace(0.001, 0.999, 400):
        lower = log_wealth(x.sum(), len(x), mean) < bound
        upper = log_wealth(len(x) - x.sum(), len(x), 1 - mean) < bound
        assert (found.low - 1e-9 <= mean <= found.high + 1e-9) == bool(lower and upper)


@given(st.lists(st.integers(0, 1), min_size=1, max_size=80))
def test_order_does_not_matter_sides_are_alike_and_looking_at_all_times_has_a_price(values: list[int]) -> None:
    found, other = running_mean(values), running_mean([1 - y for y in values])
    assert found.low <= found.value <= found.high
    assert (found.low, found.high) == pytest.approx((1 - other.high, 1 - other.low))
    assert running_mean(sorted(values)) == found
    fixed = clopper_pearson(sum(values), len(values))
    assert found.low <= fixed[0] + 1e-12
    assert found.high >= fixed[1] - 1e-12
    # The end of the interval is where the mixture speaks against a mean, with half of 5 %.
    assert (float(log_wealth(float(sum(values)), len(values), 0.5)) > np.log(2 / 0.05)) == (found.low > 0.5)


def test_of_nothing_everything_is_possible() -> None:
    found = running_mean([])
    assert (found.low, found.high, found.n) == (0.0, 1.0, 0)
    with pytest.raises(CoalaError, match="in \\[0, 1\\]"):
        running_mean([2.0])
    with pytest.raises(CoalaError, match="level"):
        running_mean([1.0], level=1.5)
