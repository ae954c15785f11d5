"""Intervals, bootstraps, votes and agreement: published values, SciPy, coverage under clustering, and limits."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from coala.statistics.agreement import fleiss_kappa, krippendorff_alpha
from coala.statistics.intervals import (
    bootstrap,
    bounded_mean,
    clopper_pearson,
    clustered,
    paired_difference,
    share_estimate,
    wald,
    wilson,
)
from coala.statistics.votes import (
    Contrast,
    contrasts,
    holm,
    intraclass_correlation,
    multinomial_difference,
    vote_difference,
    votes_for_difference,
    votes_for_width,
)
from coala.values import CoalaError

# --- shares ------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.integers(1, 200), st.data())
def test_intervals_of_a_share_agree_with_scipy(n: int, data: Any) -> None:
    k = data.draw(st.integers(0, n))
    exact = stats.binomtest(k, n).proportion_ci(method="exact")
    assert clopper_pearson(k, n) == pytest.approx((exact.low, exact.high), abs=1e-9)
    score = stats.binomtest(k, n).proportion_ci(method="wilson")
    assert wilson(k / n, n) == pytest.approx((score.low, score.high), abs=1e-9)
    low, high = wald(k / n, n)
    assert (low + high) / 2 == pytest.approx(k / n)


def test_edges_of_a_share() -> None:
    assert clopper_pearson(0, 0) == (0, 1)
    assert clopper_pearson(0, 20)[1] == pytest.approx(1 - 0.025 ** (1 / 20))
    assert clopper_pearson(5, 10, 0.5)[0] > clopper_pearson(5, 10, 0.99)[0]
    assert wald(0.0, 20) == (0, 0)  # why it is not for reporting
    assert math.isnan(wald(0.5, 0)[0])
    for bad in ((3, 2), (-1, 2)):
        with pytest.raises(CoalaError, match="successes"):
            clopper_pearson(*bad)
    with pytest.raises(CoalaError, match="level is 95"):
        clopper_pearson(1, 2, 95)


def test_exact_intervals_cover_at_least_as_often_as_they_say() -> None:
    for p in (0.03, 0.2, 0.5):
        chance = stats.binom(30, p).pmf(np.arange(31))
        covered = [low <= p <= high for low, high in (clopper_pearson(k, 30) for k in range(31))]
        assert chance @ covered >= 0.95
        as_printed = chance @ [low <= p <= high for low, high in (wald(k / 30, 30) for k in range(31))]
        assert as_printed < (0.7 if p == 0.03 else 0.96)


def half_width(share: float, n: int, z: float = 1.959963984540054) -> float:
    """In points."""
    return 100 * (wald(share, n, z)[1] - share)


def test_published_half_widths(shared: Path) -> None:
    found = json.loads((shared / "eval_reference" / "survey" / "survey_reference.json").read_text())
    for data, rates in found["table11"].items():
        for method, (rate, printed) in rates.items():
            half = half_width(rate / 100, found["n"], found["z"])
            assert half == pytest.approx(found["computed_half_width"][data][method], abs=1e-4)
            # All but one are printed as computed; that one's rate must have been rounded up.
            assert (round(half, 1) == printed) == ((data, method) != ("EDU", "ORPO"))
    assert half_width(0.1545, 107, 1.96) < 6.85 < half_width(0.1547, 107, 1.96)


def test_published_differences_of_dependent_shares(shared: Path) -> None:
    found = json.loads((shared / "eval_reference" / "survey" / "survey_reference.json").read_text())
    wanted = {"EDU": (10.3, 15.5, 1.30), "IMDb": (17.9, 15.2, 2.31)}
    for data, rates in found["table11"].items():
        votes = {method: 1.07 * rate for method, (rate, _) in rates.items()}
        apart = multinomial_difference(votes["COALA"], votes["DPO"], 107)
        half = 50 * (apart.difference.high - apart.difference.low)
        assert (100 * apart.difference.value, half) == pytest.approx(wanted[data][:2], abs=0.05)
        assert apart.statistic == pytest.approx(wanted[data][2], abs=0.005)
        for other in ("SFT", "ORPO"):
            assert multinomial_difference(votes["COALA"], votes[other], 107).statistic > 3


def test_what_the_published_survey_supports(shared: Path) -> None:
    """The table of docs/survey.md: leads of dependent shares if a person is one trial, and if each vote is."""
    found = json.loads((shared / "eval_reference" / "survey" / "survey_reference.json").read_text())
    wanted = {
        ("EDU", "ORPO"): (23.6, 13.3, 3.49, 0.0029, 2.7),
        ("EDU", "SFT"): (22.5, 13.5, 3.27, 0.0054, 2.7),
        ("EDU", "DPO"): (10.3, 15.5, 1.30, 0.385, 3.1),
        ("IMDb", "ORPO"): (22.6, 14.4, 3.08, 0.0104, 2.9),
        ("IMDb", "SFT"): (30.3, 12.8, 4.63, 2.24e-5, 2.6),
        ("IMDb", "DPO"): (17.9, 15.2, 2.31, 0.0837, 3.0),
    }
    for data, rates in found["table11"].items():
        pairs = list(combinations(rates, 2))

        def lead(one: str, other: str, n: int, rates: dict[str, list[float]] = rates) -> Contrast:
            return multinomial_difference(rates[one][0] * n / 100, rates[other][0] * n / 100, n)

        adjusted = dict(zip(pairs, holm([lead(*pair, 107).p_value for pair in pairs]), strict=True))
        for other in ("ORPO", "SFT", "DPO"):
            points, half, z, p, narrow = wanted[data, other]
            few, many = lead("COALA", other, 107), lead("COALA", other, 25 * 107)
            assert 100 * few.difference.value == pytest.approx(points, abs=0.05)
            assert 50 * (few.difference.high - few.difference.low) == pytest.approx(half, abs=0.05)
            assert few.statistic == pytest.approx(z, abs=0.005)
            assert adjusted["COALA", other] == pytest.approx(p, rel=0.02)
            assert 50 * (many.difference.high - many.difference.low) == pytest.approx(narrow, abs=0.05)
            # Independent votes would show all of them; persons as trials show those over ORPO and SFT.
            assert many.difference.low > 0
            assert (adjusted["COALA", other] < 0.05) == (other != "DPO")


def test_complete_questions_are_votes(shared: Path) -> None:
    found = json.loads((shared / "eval_reference" / "survey" / "survey_reference.json").read_text())
    assert len(found["questions_complete"]) == 8
    for name, counts in found["questions_complete"].items():
        votes = [method for method, count in counts.items() for _ in range(count)]
        assert len(votes) == 107
        for method, printed in found["questions_printed_percent"][name].items():
            if printed is not None:
                assert 100 * votes.count(method) / 107 == pytest.approx(printed, abs=0.0501)
        best = max(counts, key=lambda method: counts[method])
        assert all(one.difference.value > 0 for one in contrasts(votes, best))


# --- means and resampling ----------------------------------------------------------------------------------------


def test_bounded_mean_keeps_to_its_range() -> None:
    rng = np.random.default_rng(0)
    x = rng.beta(0.3, 6, size=40)
    found = bounded_mean(100 * x, of=100)
    t = stats.ttest_1samp(100 * x, 0).confidence_interval()
    assert (found.low, found.high) == pytest.approx((max(0, t.low), t.high))
    assert bounded_mean([0.0] * 20).high == pytest.approx(wilson(0, 20)[1])
    assert bounded_mean([7.0] * 5, ["a"] * 5, of=10).low == pytest.approx(10 * wilson(0.7, 1)[0])
    assert math.isnan(bounded_mean([]).value)


def test_paired_differences_cancel_what_is_shared() -> None:
    rng = np.random.default_rng(1)
    shared_part = rng.normal(size=200) * 10
    a, b = shared_part + rng.normal(0.5, 1, 200), shared_part + rng.normal(0, 1, 200)
    found = paired_difference(a, b)
    t = stats.ttest_rel(a, b).confidence_interval()
    assert (found.low, found.high) == pytest.approx((t.low, t.high))
    assert paired_difference(b, a).value == -found.value
    with pytest.raises(CoalaError, match="same rows"):
        paired_difference([1.0], [1.0, 2.0])


def test_bootstrap_of_a_mean_is_the_clustered_error() -> None:
    rng = np.random.default_rng(2)
    group = rng.integers(40, size=300)
    x = rng.normal(size=40)[group] + rng.normal(size=300)
    found = bootstrap(lambda rows: float(x[rows].mean()), 300, group, draws=1500, name="mean")
    _, error, groups = clustered(x, group)
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(error, rel=0.1)
    assert f"{groups} groups" in found.method
    alone = bootstrap(lambda rows: float(x[rows].mean()), 300, draws=300)
    assert alone.high - alone.low < 0.7 * (found.high - found.low)
    again = bootstrap(lambda rows: float(x[rows].mean()), 300, group, draws=1500, name="mean")
    assert again == found  # seeded
    narrow = bootstrap(lambda rows: float(x[rows].mean()), 300, group, draws=1500, level=0.5)
    assert narrow.high - narrow.low < 0.5 * (found.high - found.low)


def test_bootstrap_draws_whole_groups_and_says_what_failed() -> None:
    group = np.array([0, 0, 1, 1, 1, 2])
    seen: list[np.ndarray] = []

    def watch(rows: np.ndarray) -> float:
        seen.append(rows)
        return math.nan if 2 not in group[rows] else 1.0

    found = bootstrap(watch, 6, group, draws=50)
    for rows in seen[1:]:
        for g, size in enumerate((2, 3, 1)):
            assert (group[rows] == g).sum() % size == 0
        assert len(set(np.bincount(rows, minlength=6)[group == 1])) == 1
    assert "undefined in" in found.method
    assert (found.low, found.high) == (1, 1)
    assert bootstrap(lambda rows: math.nan, 4, draws=9).low == -math.inf
    assert bootstrap(lambda rows: 2.0, 1).high == math.inf
    assert math.isnan(bootstrap(lambda rows: 2.0, 0).value)


# --- votes -------------------------------------------------------------------------------------------------------


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 60))
def test_the_multinomial_difference_is_antisymmetric(first: int, second: int, rest: int) -> None:
    n = first + second + rest
    one, two = multinomial_difference(first, second, n), multinomial_difference(second, first, n)
    assert one.difference.value == -two.difference.value
    assert one.difference.low == pytest.approx(-two.difference.high)
    assert one.difference.low < one.difference.high
    assert one.difference.low <= one.difference.value <= one.difference.high
    assert 0 <= one.p_value <= 1
    assert one.p_value == pytest.approx(two.p_value)
    # Two dependent shares differ by more noise than independent ones would.
    if first and second:
        p, q = first / n, second / n
        independent = math.sqrt((p * (1 - p) + q * (1 - q)) / n)
        assert abs(one.difference.value / one.statistic) >= independent if one.statistic else first == second


def test_votes_agree_with_the_multinomial() -> None:
    votes = ["a"] * 40 + ["b"] * 25 + ["c"] * 42
    one, two = vote_difference(votes, "a", "b"), multinomial_difference(40, 25, 107)
    assert one.difference.value == pytest.approx(two.difference.value)
    assert one.statistic == pytest.approx(two.statistic * math.sqrt(106 / 107))
    assert one.p_value == pytest.approx(two.p_value, abs=0.005)


def test_voters_are_the_trials() -> None:
    # 30 voters of 20 votes, each with a taste: taking votes for trials finds differences that are not there.
    rng = np.random.default_rng(3)
    voters = np.repeat(np.arange(30), 20)
    honest = naive = 0
    for _ in range(300):
        taste = np.repeat(rng.dirichlet([1.0, 1.0, 1.0], size=30), 20, axis=0)
        votes = np.array(["a", "b", "c"])[(rng.random((600, 1)) > taste.cumsum(axis=1)).sum(axis=1)].tolist()
        honest += vote_difference(votes, "a", "b", voters).p_value < 0.05
        naive += vote_difference(votes, "a", "b").p_value < 0.05
    assert 0.02 < honest / 300 < 0.09
    assert naive / 300 > 0.3
    chosen = np.array(votes) == "a"
    wide, thin = share_estimate(chosen, voters), share_estimate(chosen)
    assert wide.value == thin.value
    assert wide.high - wide.low > 1.3 * (thin.high - thin.low)
    assert intraclass_correlation(np.array(votes) == "a", voters) > 0.1


def test_votes_without_spread() -> None:
    for found in (vote_difference(["a"] * 20, "a", "b"), multinomial_difference(20, 0, 20)):
        assert found.difference.value == 1
        assert 0.6 < found.difference.low < 1 == found.difference.high
        assert found.p_value < 1e-5
    for found in (vote_difference(["c"] * 20, "a", "b"), multinomial_difference(0, 0, 20)):
        assert found.difference.value == 0
        assert found.difference.low < 0 < found.difference.high
        assert (found.p_value, found.statistic) == (1, 0)
    alone = vote_difference(["a", "b", "a"], "a", "b", ["x"] * 3)
    assert (alone.difference.low, alone.difference.high) == (-1, 1)
    assert math.isnan(alone.p_value)
    with pytest.raises(CoalaError, match="with itself"):
        vote_difference(["a"], "a", "a")
    with pytest.raises(CoalaError, match="n of at least 1"):
        contrasts([], "a")
    with pytest.raises(CoalaError, match="sum is at most"):
        multinomial_difference(6, 5, 10)


def test_contrasts_are_adjusted_together() -> None:
    votes = ["a"] * 50 + ["b"] * 30 + ["c"] * 25 + ["d"] * 5
    found = contrasts(votes, "a")
    assert [one.second for one in found] == ["b", "c", "d"]
    assert [one.adjusted for one in found] == holm([one.p_value for one in found])
    assert all(one.adjusted >= one.p_value for one in found)


def test_holm() -> None:
    # Holm (1979) by hand: 0.01 x 4, 0.02 x 3, 0.03 x 2 not below the one before, 0.04.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5]) == [0.5]
    assert holm([]) == []
    assert holm([0.6, 0.9]) == [1, 1]
    some = holm([0.01, math.nan, 0.2])
    assert some[0] == 0.02
    assert math.isnan(some[1])
    with pytest.raises(CoalaError, match="p-value"):
        holm([1.2])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between_none_and_bonferroni(p: list[float]) -> None:
    found = holm(p)
    for adjusted, raw in zip(found, p, strict=True):
        assert raw <= adjusted <= min(1, len(p) * raw)
    order = np.argsort(p)
    assert (np.diff(np.array(found)[order]) >= 0).all()


def test_how_many_votes() -> None:
    assert votes_for_width(0.5, 0.098, 1.96) == 100
    needed = votes_for_width(0.3, 0.05)
    assert half_width(0.3, needed) <= 5 < half_width(0.3, needed - 1)
    n = votes_for_difference(0.391, 0.288)
    rng = np.random.default_rng(4)
    drawn = rng.multinomial(n, [0.391, 0.288, 0.321], size=3000)
    d = (drawn[:, 0] - drawn[:, 1]) / n
    both = (drawn[:, 0] + drawn[:, 1]) / n
    found = np.abs(d) / np.sqrt((both - d**2) / n) > 1.96
    assert found.mean() == pytest.approx(0.8, abs=0.03)
    assert n > 400  # far more than the 107 of the paper
    assert votes_for_difference(0.391, 0.288, power=0.95) > n
    # Many questions each help as far as a voter's votes differ.
    assert votes_for_difference(0.391, 0.288, questions=25) == math.ceil(n / 25)
    assert votes_for_difference(0.391, 0.288, questions=25, correlation=1.0) == n
    for bad in ((0.3, 0.3), (0.8, 0.4)):
        with pytest.raises(CoalaError, match="expected two that differ"):
            votes_for_difference(*bad)
    with pytest.raises(CoalaError, match="power"):
        votes_for_difference(0.4, 0.3, power=1.0)
    with pytest.raises(CoalaError, match="half-width"):
        votes_for_width(0.5, 0)


def test_intraclass_correlation_finds_the_truth() -> None:
    rng = np.random.default_rng(5)
    group = np.repeat(np.arange(8000), rng.integers(2, 6, 8000))
    x = rng.normal(size=8000)[group] + 2 * rng.normal(size=len(group))
    assert intraclass_correlation(x, group) == pytest.approx(0.2, abs=0.02)
    assert intraclass_correlation([1.0, 1, 2, 2], [0, 0, 1, 1]) == 1
    assert math.isnan(intraclass_correlation([1.0, 2.0], [0, 1]))


# --- agreement ---------------------------------------------------------------------------------------------------

# Fleiss (1971) as worked through in textbooks: 10 subjects, 14 raters, 5 categories; kappa 0.210
FLEISS = [
    *([0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1]),
    *([7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]),
]
# Krippendorff (2011), section C: four observers, twelve units, missing values
OBSERVERS: list[list[int | None]] = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
]


def test_published_agreement() -> None:
    assert fleiss_kappa(FLEISS).value == pytest.approx(0.210, abs=5e-4)
    units = [list(unit) for unit in zip(*OBSERVERS, strict=True)]
    for metric, value in (("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)):
        found = krippendorff_alpha(units, metric)  # type: ignore[arg-type]
        assert found.value == pytest.approx(value, abs=5e-4)
        assert found.n == 11  # the last unit has one rating
        assert found.low < found.value < found.high <= 1


def test_agreement_at_its_limits() -> None:
    perfect = [["a"] * 3, ["b"] * 3, ["a"] * 3]
    assert krippendorff_alpha(perfect).value == 1
    assert fleiss_kappa([[3, 0], [0, 3], [3, 0]]).value == 1
    assert math.isnan(krippendorff_alpha([["a", "a"], ["a", "a"]]).value)
    assert math.isnan(fleiss_kappa([[2, 0], [2, 0]]).value)
    rng = np.random.default_rng(6)
    chance = rng.integers(3, size=(800, 4))
    alpha = krippendorff_alpha(chance.tolist(), draws=200)
    assert alpha.low < 0 < alpha.high
    assert abs(alpha.value) < 0.03
    # With no value missing and many items, alpha and kappa are nearly the same.
    noisy = np.where(rng.random((800, 4)) < 0.6, rng.integers(3, size=(800, 1)), chance)
    counts = np.stack([(noisy == c).sum(axis=1) for c in range(3)], axis=1)
    kappa = fleiss_kappa(counts, draws=100)
    assert krippendorff_alpha(noisy.tolist(), draws=1).value == pytest.approx(kappa.value, abs=1e-3)
    assert kappa.low < kappa.value < kappa.high


@settings(max_examples=25)
@given(
    st.lists(st.lists(st.sampled_from([1, 2, 3, None]), min_size=3, max_size=3), min_size=2, max_size=12), st.randoms()
)
def test_alpha_does_not_know_raters_or_names(units: list[list[Any]], random: Any) -> None:
    if not any(sum(value is not None for value in unit) > 1 for unit in units):
        with pytest.raises(CoalaError, match="No item has two ratings"):
            krippendorff_alpha(units, draws=1)
        return
    value = krippendorff_alpha(units, draws=1).value
    shuffled = [random.sample(unit, 3) for unit in units]
    renamed = [[None if v is None else {1: "x", 2: "a", 3: "m"}[v] for v in unit] for unit in units]
    for other in (shuffled, renamed):
        assert krippendorff_alpha(other, draws=1).value == pytest.approx(value, nan_ok=True)


def test_agreement_refuses_what_it_cannot_use() -> None:
    with pytest.raises(CoalaError, match="from 2 to 3 ratings"):
        fleiss_kappa([[2, 0], [2, 1]])
    with pytest.raises(CoalaError, match="shape"):
        fleiss_kappa([1, 2])
    with pytest.raises(CoalaError, match="metric"):
        krippendorff_alpha([[1, 2]], "ratio")  # type: ignore[arg-type]
    with pytest.raises(CoalaError, match="finite numbers"):
        krippendorff_alpha([["a", "b"]], "interval")
    with pytest.raises(CoalaError, match="cannot be ordered"):
        krippendorff_alpha([["a", 1]])
