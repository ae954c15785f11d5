"""Estimates, judges and the harness: limits, invariances, coverage, and naive references written here."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coala.evaluation import HeadJudge, WordJudge, judge, win_rate
from coala.statistics.intervals import clustered, mean_estimate, share_estimate, wilson
from coala.statistics.scores import (
    accuracy_difference,
    accuracy_of_margins,
    by_length_difference,
    pairwise_nll,
    perplexity,
    perplexity_ratio,
    ranking_accuracy,
    reliability,
    tie_share,
)
from coala.values import CoalaError, Generation, Judgement, Turn, user

# --- intervals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wins", "n", "low", "high"),
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_published(wins: int, n: int, low: float, high: float) -> None:
    assert wilson(wins / n, n) == pytest.approx((low, high), abs=5e-5)


@given(st.floats(0, 1), st.floats(0.1, 1e6))
def test_wilson_holds_its_share_and_has_width(share: float, n: float) -> None:
    low, high = wilson(share, n)
    assert 0 <= low <= share <= high <= 1
    assert high - low > 0
    mirrored = wilson(1 - share, n)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-9)


def test_wilson_without_trials_knows_nothing() -> None:
    assert wilson(0.3, 0) == (0, 1)


def naive_clustered(values: list[float], group: list[Any]) -> float:
    mean, names = sum(values) / len(values), sorted(set(group))
    total = 0.0
    for name in names:
        total += sum(v - mean for v, g in zip(values, group, strict=True) if g == name) ** 2
    return math.sqrt(total * len(names) / (len(names) - 1)) / len(values)


def test_clustered_error() -> None:
    rng = np.random.default_rng(0)
    values, group = rng.normal(size=60), rng.integers(9, size=60)
    mean, error, groups = clustered(values, group)
    assert mean == pytest.approx(values.mean())
    assert error == pytest.approx(naive_clustered(values.tolist(), group.tolist()))
    assert groups == len(set(group))
    assert clustered(values)[1] == pytest.approx(values.std(ddof=1) / math.sqrt(60))  # every row its own group
    order = rng.permutation(60)
    assert clustered(values[order], group[order])[1] == pytest.approx(error)
    # Copying every row within its group tells nothing new.
    assert clustered(np.tile(values, 3), np.tile(group, 3))[1] == pytest.approx(error)
    assert math.isnan(clustered(values, np.zeros(60))[1])


def test_mean_estimate_agrees_with_scipy_and_the_bootstrap() -> None:
    from scipy import stats

    values = np.random.default_rng(1).exponential(size=80)
    estimate = mean_estimate(values)
    wanted = stats.ttest_1samp(values, 0).confidence_interval()
    assert (estimate.low, estimate.high) == pytest.approx((wanted.low, wanted.high))
    boot = mean_estimate(values, how="bootstrap")
    assert boot == mean_estimate(values, how="bootstrap")  # seeded
    assert boot.value == estimate.value
    assert boot.high - boot.low == pytest.approx(estimate.high - estimate.low, rel=0.15)
    alone = mean_estimate([2.0])
    assert (alone.value, alone.low, alone.high, alone.n) == (2.0, -math.inf, math.inf, 1)


def test_interval_covers_the_truth_with_clusters() -> None:
    # 30 prompts of 6 pairs; accuracy differs by prompt. A count that ignores prompts covers about 75 % here.
    rng = np.random.default_rng(2)
    group = np.repeat(np.arange(30), 6)
    covered = ignored = 0
    for _ in range(400):
        chance = np.repeat(rng.beta(1.4, 0.6, size=30), 6)
        margins = np.where(rng.random(180) < chance, 1.0, -1.0)
        honest, naive = accuracy_of_margins(margins, group), accuracy_of_margins(margins)
        covered += honest.low <= 0.7 <= honest.high
        ignored += naive.low <= 0.7 <= naive.high
    assert 0.92 <= covered / 400 <= 0.98
    assert ignored / 400 < 0.85


# --- ranking -----------------------------------------------------------------------------------------------------


def test_ranking_accuracy_counts() -> None:
    chosen, rejected = np.float32([1, 2, 3, 4]), np.float32([0, 2, 5, 1])
    estimate = ranking_accuracy(chosen, rejected)
    assert estimate.value == (1 + 0.5 + 0 + 1) / 4
    assert estimate.n == 4
    assert (estimate.low, estimate.high) == wilson(0.625, 4)
    assert ranking_accuracy(chosen, rejected, ties="wrong").value == 0.5
    assert tie_share(chosen - rejected) == 0.25
    constant = ranking_accuracy([1.0] * 5, [1.0] * 5)
    assert constant.value == 0.5
    assert ranking_accuracy([1.0] * 5, [1.0] * 5, ties="wrong").value == 0.0


@given(
    st.lists(st.sampled_from([-1.0, 0.0, 2.0]), min_size=1, max_size=40),
    st.lists(st.integers(0, 5), min_size=40, max_size=40),
)
def test_accuracy_always_has_a_sane_interval(margins: list[float], group: list[int]) -> None:
    estimate = accuracy_of_margins(margins, group[: len(margins)])
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert estimate.high - estimate.low > 0.01
    # Swapping chosen and rejected mirrors it; a monotone change of the scores does nothing.
    mirrored = accuracy_of_margins([-m for m in margins], group[: len(margins)])
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((estimate.low, estimate.high), abs=1e-9)
    assert accuracy_of_margins([3 * m for m in margins], group[: len(margins)]) == estimate


def test_extreme_accuracies() -> None:
    one = accuracy_of_margins([1.0])
    assert (one.low, one.high, one.n) == (*wilson(1, 1), 1)
    right = accuracy_of_margins(np.ones(40), np.repeat(np.arange(8), 5))
    assert (right.low, right.high) == wilson(1.0, 8)  # whole groups are the trials
    wrong = accuracy_of_margins(-np.ones(40))
    assert (wrong.low, wrong.high) == wilson(0.0, 40)
    same = accuracy_of_margins(np.ones(40), ["a"] * 40)
    assert (same.low, same.high, same.n) == (*wilson(1.0, 1), 40)
    empty = accuracy_of_margins([])
    assert math.isnan(empty.value)
    assert (empty.low, empty.high, empty.n) == (0, 1, 0)
    # Clusters that all have the very same share leave the pair count, never a zero width.
    even = accuracy_of_margins([1.0, -1.0] * 10, np.repeat(np.arange(10), 2))
    assert even.high - even.low > 0.3


def test_bad_scores_are_named() -> None:
    with pytest.raises(CoalaError, match="Row 1 of the chosen scores is nan"):
        ranking_accuracy([1.0, math.nan], [0.0, 0.0])
    with pytest.raises(CoalaError, match="2 chosen and 1 rejected"):
        ranking_accuracy([1.0, 2.0], [0.0])
    with pytest.raises(CoalaError, match="as many group names"):
        ranking_accuracy([1.0], [0.0], ["a", "b"])
    with pytest.raises(CoalaError, match=r"shape \(n,\)"):
        accuracy_of_margins(np.zeros((2, 2)))
    with pytest.raises(CoalaError, match="from -1 to 2"):
        share_estimate([-1.0, 2.0])


def test_pairwise_nll_limits() -> None:
    assert pairwise_nll(np.zeros(9)).value == pytest.approx(math.log(2))
    assert pairwise_nll([800.0, 900.0]).value == pytest.approx(0)
    assert pairwise_nll([-800.0, -900.0]).value == pytest.approx(850)
    margins = [0.3, -1.2, 2.0]
    assert pairwise_nll(margins).value == pytest.approx(np.mean([math.log1p(math.exp(-m)) for m in margins]))


def test_accuracy_difference_is_paired() -> None:
    rng = np.random.default_rng(5)
    margins = rng.normal(0.5, 1, size=300)
    other = margins + rng.normal(0, 0.05, size=300)  # nearly the same head
    estimate = accuracy_difference(margins, other)
    apart = accuracy_of_margins(margins).value - accuracy_of_margins(other).value
    assert estimate.value == pytest.approx(apart)
    single = accuracy_of_margins(margins)
    assert estimate.high - estimate.low < (single.high - single.low) / 2
    same = accuracy_difference(margins, margins)
    assert same.value == 0
    assert -0.02 < same.low < 0 < same.high < 0.02
    assert accuracy_difference(other, margins).low == pytest.approx(-estimate.high)
    with pytest.raises(CoalaError, match="same pairs"):
        accuracy_difference([1.0], [1.0, 2.0])


def test_length_bins_partition_the_pairs() -> None:
    rng = np.random.default_rng(6)
    lengths = rng.integers(-40, 41, size=200)
    margins = lengths * 0.1 + rng.normal(size=200)  # a head that likes length
    rows = by_length_difference(margins, lengths, bins=4)
    assert sum(row.accuracy.n for row in rows) == 200
    assert rows[0].accuracy.high < 0.5 < rows[-1].accuracy.low
    assert [r.high for r in rows[:-1]] == [r.low for r in rows[1:]]
    fixed = by_length_difference(margins, lengths, bins=[-100, 0, 100])
    assert fixed[0].accuracy.n == int((lengths < 0).sum())
    assert len(by_length_difference(margins, np.zeros(200))) == 1
    assert by_length_difference([], []) == []
    outside = by_length_difference([1.0, 1.0], [5, 50], bins=[0, 10, 20])
    assert [row.accuracy.n for row in outside] == [1]


# --- win rates ---------------------------------------------------------------------------------------------------


@st.composite
def preferences_and_groups(draw: Any) -> tuple[list[float], list[int]]:
    p = draw(st.lists(st.floats(0, 1), min_size=1, max_size=40))
    return p, draw(st.lists(st.integers(0, 5), min_size=len(p), max_size=len(p)))


@given(preferences_and_groups())
def test_reliability_bins_partition_the_pairs(drawn: tuple[list[float], list[int]]) -> None:
    p, group = np.array(drawn[0]), drawn[1]
    found = reliability(p, group, draws=20)
    assert sum(row.observed.n for row in found.bins) == len(p)
    predicted = [row.predicted for row in found.bins]
    assert predicted == sorted(predicted)
    assert all(0.5 <= value <= 1 for value in predicted)
    weights = np.array([row.observed.n for row in found.bins]) / len(p)
    assert weights @ predicted == pytest.approx(found.confidence)
    right = np.array([row.observed.value for row in found.bins])
    # Over all bins: what ranking accuracy counts, and the calibration error.
    assert weights @ right == pytest.approx(accuracy_of_margins(p - 0.5).value)
    assert found.error.value == pytest.approx(weights @ np.abs(right - predicted), abs=1e-12)
    assert 0 <= found.error.low <= found.error.value <= found.error.high <= 1


def test_the_order_of_a_pair_is_arbitrary() -> None:
    p = np.random.default_rng(0).random(200)
    found, turned = reliability(p, draws=50), reliability(1 - p, draws=50)
    for a, b in zip(found.bins, turned.bins, strict=True):
        assert a.predicted == pytest.approx(b.predicted)
        assert a.observed.value == pytest.approx(1 - b.observed.value)


def test_reliability_tells_calibrated_from_overconfident() -> None:
    draw = np.random.default_rng(0)
    error, chance, covered = [], [], []
    for _ in range(40):
        logit = 1.5 * draw.normal(size=400)
        p = 1 / (1 + np.exp(-logit))
        right = draw.random(400) < p
        honest = reliability(np.where(right, p, 1 - p), draws=100)
        error.append(honest.error.value)
        chance.append(honest.error_by_chance)
        covered += [row.observed.low <= row.predicted <= row.observed.high for row in honest.bins]
        sure = 1 / (1 + np.exp(-3 * logit))
        boastful = reliability(np.where(right, sure, 1 - sure), draws=100)
        assert boastful.error.low > 2 * boastful.error_by_chance
        assert boastful.confidence > honest.confidence
    # What chance alone does is foreseen, and the bins' intervals hold the truth about 95 times in 100.
    assert np.mean(error) == pytest.approx(np.mean(chance), rel=0.1)
    assert 0.9 < np.mean(covered) < 0.99


def test_the_calibration_interval_counts_groups() -> None:
    draw = np.random.default_rng(2)
    p = 1 / (1 + np.exp(-2 * np.abs(draw.normal(size=60)) * np.where(draw.random(60) < 0.6, 1, -1)))
    once = reliability(p, np.arange(60)).error
    tenfold = reliability(np.repeat(p, 10), np.repeat(np.arange(60), 10)).error
    assert tenfold.high - tenfold.low > 0.7 * (once.high - once.low)
    assert "60 groups" in tenfold.method
    assert reliability(p, np.arange(60)).error == once  # the same numbers for the same seed


def test_reliability_edges() -> None:
    assert reliability([]).bins == ()
    assert reliability([]).error.n == 0
    coin = reliability([0.5] * 10)
    assert [(row.predicted, row.observed.value) for row in coin.bins] == [(0.5, 0.5)]
    assert coin.error.value == 0
    assert (reliability([0.9, 0.8], ["a", "a"]).error.low, reliability([0.9, 0.8], ["a", "a"]).error.high) == (0, 1)
    with pytest.raises(CoalaError, match="is a probability"):
        reliability([1.2])


def game(prompt: str, value: float | None, swapped: float | str | None = "none") -> list[Judgement]:
    """One comparison of a against b; ``swapped`` is P(b is better) when b is shown first."""
    rows = [Judgement(prompt, "a", "b", value, "j")]
    if swapped != "none":
        rows.append(Judgement(prompt, "b", "a", swapped, "j"))  # type: ignore[arg-type]
    return rows


def test_win_rate_counts() -> None:
    rows = game("1", 1.0, 0.0) + game("2", 0.0, 1.0) + game("3", 1.0, 1.0) + game("4", 1.0, 0.0) + game("5", None, 0.0)
    estimate = win_rate(rows)
    assert estimate.value == (1 + 0 + 0.5 + 1) / 4  # prompt 3 only shows a taste for the first place
    assert estimate.n == 4
    assert "1 failed" in estimate.method
    assert "1 tied" in estimate.method
    without = win_rate(rows, "exclude")
    assert without.value == pytest.approx(2 / 3)
    assert without.n == 3
    assert win_rate(rows, of="b").value == 1 - estimate.value


def test_a_taste_for_a_place_cancels() -> None:
    rows = [row for i in range(20) for row in game(str(i), 1.0, 1.0 if i else 0.0)]
    estimate = win_rate(rows)
    assert estimate.value == (1 + 19 / 2) / 20
    assert estimate.low < 0.35
    assert estimate.high > 0.7
    assert win_rate(rows, "exclude").n == 1


@pytest.mark.parametrize("ties", ["half", "exclude"])
@pytest.mark.parametrize(("straight", "swapped"), [(1.0, 1.0), (0.0, 0.0), (0.52, 0.5004), (0.497, 0.31)])
@pytest.mark.parametrize("n", [1, 2, 20])
def test_verdicts_that_follow_the_place_have_no_win_rate(n: int, straight: float, swapped: float, ties: Any) -> None:
    rows = [row for i in range(n) for row in game(str(i), straight, swapped)]
    found = win_rate(rows, ties)
    assert math.isnan(found.value)
    assert found.n == n
    assert "void: this judge reads only the place" in found.method
    assert f"shown {'first' if straight > 0.5 else 'second'}" in found.method
    # Ties in both orders do not make verdicts of them; one comparison that names a reply does.
    assert math.isnan(win_rate([*rows, *game("tie", 0.5, 0.5)], ties).value)
    assert not math.isnan(win_rate([*rows, *game("named", 1.0, 0.0)], ties).value)
    assert not math.isnan(win_rate([*rows, *game("leaning", 1.0, 0.5)], ties).value)
    # A failed verdict takes its comparison with it, and nothing else.
    assert math.isnan(win_rate([*rows, *game("failed", None, 0.0)], ties).value)


@pytest.mark.parametrize("first", [True, False])
def test_one_order_each_shows_a_judge_of_places_too(first: bool) -> None:
    def drawn(i: int, ours_first: bool) -> Judgement:
        names = ("a", "b") if ours_first else ("b", "a")
        return Judgement(str(i), *names, float(first), "j")

    rows = [drawn(i, i % 2 == 0) for i in range(8)]
    assert "reads only the place" in win_rate(rows, of="a").method
    # Too few to tell, asked in one order only, or with a verdict against the place.
    assert not math.isnan(win_rate(rows[:5], of="a").value)
    assert win_rate([drawn(i, True) for i in range(8)]).value == float(first)
    against = Judgement("x", "a", "b", float(not first), "j")
    assert not math.isnan(win_rate([*rows, against], of="a").value)


def test_all_ties_are_no_place() -> None:
    rows = [row for i in range(9) for row in game(str(i), 0.5, 0.5)]
    assert win_rate(rows).value == 0.5


def test_samples_of_a_prompt_are_one_group() -> None:
    apart = [row for i in range(12) for row in game(str(i), float(i % 3 > 0), float(i % 3 == 0))]
    together = [row for i in range(12) for row in game(str(i // 4), float(i % 3 > 0), float(i % 3 == 0))]
    one, many = win_rate(apart), win_rate(together)
    assert one.value == many.value == pytest.approx(2 / 3)
    assert one.n == many.n == 12
    assert many.high - many.low > one.high - one.low


def test_win_rate_edges() -> None:
    assert win_rate([]).n == 0
    assert win_rate(game("1", None)).n == 0
    single = win_rate(game("1", 1.0))
    assert (single.value, single.low, single.high) == (1.0, *wilson(1, 1))
    with pytest.raises(CoalaError, match="one contest"):
        win_rate(game("1", 1.0), of="c")
    with pytest.raises(CoalaError, match=r"\[0, 1\]"):
        win_rate(game("1", 1.5))
    two_judges = [Judgement("1", "a", "b", 1.0, "x"), Judgement("1", "b", "a", 0.0, "y")]
    assert "0 of 2 comparisons judged in both orders" in win_rate(two_judges).method


def test_real_pairwise_judgements(shared: Path) -> None:
    folder = shared / "eval_reference" / "mtbench"
    path = folder / "pairwise_judgments_phi-3_vs_phi-3-dpo_odd_questions.jsonl.gz"
    value = {"model_1": 1.0, "model_2": 0.0, "tie": 0.5}
    rows = []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            prompt = f"{row['question_id']}-{row['turn']}"
            # Winners are stored by the model they name, so the second game is already turned round. The benchmark
            # calls any disagreement of the two games a tie; an average would give 3/4 to a win and a tie.
            first, second = (value.get(row[key]) for key in ("g1_winner", "g2_winner"))
            if None not in (first, second):
                first, second = (first, second) if first == second else (0.5, 0.5)
            rows += [
                Judgement(prompt, row["model_1"], row["model_2"], first, "gpt-4"),
                Judgement(prompt, row["model_2"], row["model_1"], None if second is None else 1 - second, "gpt-4"),
            ]
    half, decided = win_rate(rows, of="phi-3"), win_rate(rows, "exclude", of="phi-3")
    assert half.n == 37
    assert half.value == pytest.approx(0.513514, abs=1e-6)
    assert decided.n == 19
    assert decided.value == pytest.approx(0.526316, abs=1e-6)
    assert half.low < 0.5 < half.high


def test_perplexity_is_the_ratio() -> None:
    logs, tokens = np.array([-10.0, -30.0, -8.0]), np.array([5, 12, 4])
    estimate = perplexity(logs, tokens)
    assert estimate.value == pytest.approx(math.exp(48 / 21))
    assert 0 < estimate.low < estimate.value < estimate.high
    assert perplexity([-5.0], [5]).high == math.inf
    assert math.isnan(perplexity([], []).value)
    assert perplexity([-1e6, -1e6], [1, 1]).value == math.inf
    same = perplexity(np.tile(logs, 4), np.tile(tokens, 4), np.tile(np.arange(3), 4))
    assert (same.low, same.high) == pytest.approx((estimate.low, estimate.high))


def test_perplexity_interval_is_the_bootstraps() -> None:
    rng = np.random.default_rng(7)
    tokens = rng.integers(5, 50, size=120)
    logs = -tokens * rng.normal(2, 0.4, size=120)
    estimate = perplexity(logs, tokens)
    draws = [rng.integers(120, size=120) for _ in range(500)]
    spread = np.std([-logs[d].sum() / tokens[d].sum() for d in draws])
    assert math.log(estimate.high / estimate.low) / (2 * 1.98) == pytest.approx(spread, rel=0.15)


def test_a_ratio_of_perplexities_is_paired() -> None:
    rng = np.random.default_rng(3)
    tokens, others = rng.integers(5, 50, size=(2, 120))
    hard = rng.normal(2, 0.6, size=120)  # of prompts: it cancels
    logs, base = -tokens * (hard + rng.normal(0.2, 0.1, size=120)), -others * (hard + rng.normal(0, 0.1, size=120))
    ratio = perplexity_ratio(logs, tokens, base, others)
    apart = perplexity(logs, tokens), perplexity(base, others)
    assert ratio.value == pytest.approx(apart[0].value / apart[1].value)
    draws = [rng.integers(120, size=120) for _ in range(800)]
    spread = np.std([base[d].sum() / others[d].sum() - logs[d].sum() / tokens[d].sum() for d in draws])
    assert math.log(ratio.high / ratio.low) / (2 * 1.98) == pytest.approx(spread, rel=0.15)
    same = perplexity_ratio(logs, tokens, logs, tokens)
    assert (same.low, same.value, same.high) == (1, 1, 1)
    assert perplexity_ratio([-1.0], [1], [-2.0], [1]).high == math.inf
    with pytest.raises(CoalaError, match="one per prompt"):
        perplexity_ratio(logs, tokens, base[1:], others[1:])


# --- judges ------------------------------------------------------------------------------------------------------


def reply(prompt: str, text: str, method: str = "a", seed: int = 0) -> Generation:
    return Generation(prompt, text, method, len(text.split()), seed, math.nan, 0.0)


WORDS = {"name": "taste", "about": "x", "bias": 0.5, "weights": {"good": 2.0, "bad": -3.0}, "pattern": "[a-z]+"}


def test_word_judge_scores_word_shares(tmp_path: Path) -> None:
    path = tmp_path / "taste.json"
    path.write_text(json.dumps(WORDS))
    taste = WordJudge.load(path)
    assert (taste.name, taste.about) == ("taste", "x")
    text = "Good, good: BAD film; so-so"
    counts = Counter(["good", "good", "bad", "film", "so", "so"])
    assert taste.score(text) == pytest.approx(0.5 + (2 * counts["good"] - 3 * counts["bad"]) / 6)
    assert taste.score("") == taste.score("1234") == 0.5
    assert taste.score("good bad") == taste.score("bad good " * 7)  # order and length do not matter
    verdict = taste.compare((), reply("p", "good"), reply("p", "bad", "b"))
    assert verdict == Judgement("p", "a", "b", 1.0, "taste")
    assert taste.compare((), reply("p", "bad"), reply("p", "good")).preference == 0.0
    assert taste.compare((), reply("p", "plain"), reply("p", "words")).preference == 0.5


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ("[1]", "one JSON object"),
        ("{", "is not JSON"),
        ('{"weights": {}}', '"weights"'),
        ('{"weights": {"a": "b"}}', '"weights"'),
        ('{"weights": {"a": 1}, "bias": "x"}', '"bias"'),
        ('{"weights": {"a": 1}, "pattern": "("}', '"pattern"'),
        ('{"weights": {"a": 1}, "pattern": 3}', '"pattern"'),
    ],
)
def test_bad_judge_files_are_explained(tmp_path: Path, document: str, words: str) -> None:
    path = tmp_path / "judge.json"
    path.write_text(document)
    with pytest.raises(CoalaError, match=words):
        WordJudge.load(path)
    with pytest.raises(CoalaError, match="could not be read"):
        WordJudge.load(tmp_path / "nowhere.json")


def test_bundled_judges_know_good_from_bad() -> None:
    import coala

    assets = Path(coala.__file__).parent / "assets"
    judges = [WordJudge.load(assets / f"film-{name}.json") for name in ("judge", "labeller")]
    assert not set(judges[0].weights) & set(judges[1].weights)
    for one in judges:
        assert one.score("a wonderful, touching and brilliant film that everyone loves") > one.score(
            "an awful, boring and stupid waste of time, the worst script"
        )


def test_head_judge_prefers_the_higher_score() -> None:
    seen: list[Sequence[Turn]] = []

    def scorer(prompt: Sequence[Turn], reply: Generation) -> float:
        seen.append(prompt)
        return math.nan if reply.text == "?" else float(len(reply.text))

    head = HeadJudge("head", scorer)
    rows = judge(
        [reply("p", "long text"), reply("q", "?")],
        [reply("p", "text", "b"), reply("q", "text", "b")],
        head,
        prompts={"p": user("Say it."), "q": user("Again.")},
    )
    assert [row.preference for row in rows] == [1.0, 0.0, None, None]
    assert seen[0] == user("Say it.")
    assert win_rate(rows).value == 1.0


# --- harness -----------------------------------------------------------------------------------------------------


def test_judge_matches_by_prompt_and_swaps() -> None:
    taste = WordJudge("taste", WORDS["weights"])  # type: ignore[arg-type]
    ours = [reply("p", "good"), reply("q", "bad")]
    theirs = [reply("q", "good", "b", seed=9), reply("p", "plain", "b", seed=9)]
    rows = judge(ours, theirs, taste)
    assert [(r.prompt_id, r.first, r.second, r.preference) for r in rows] == [
        ("p", "a", "b", 1.0),
        ("p", "b", "a", 0.0),
        ("q", "a", "b", 0.0),
        ("q", "b", "a", 1.0),
    ]
    straight = judge(ours, theirs, taste, swap=False)
    assert straight == rows[::2]
    assert win_rate(rows).value == win_rate(straight).value == 0.5


def test_judge_matches_samples_by_seed() -> None:
    taste = WordJudge("taste", WORDS["weights"])  # type: ignore[arg-type]
    ours = [reply("p", "good", seed=0), reply("p", "bad", seed=1)]
    theirs = [reply("p", "good", "b", seed=1), reply("p", "bad", "b", seed=0)]
    assert [r.preference for r in judge(ours, theirs, taste, swap=False)] == [1.0, 0.0]
    with pytest.raises(CoalaError, match="same seeds"):
        judge(ours, [reply("p", "x", "b", seed=0), reply("p", "x", "b", seed=2)], taste)
    with pytest.raises(CoalaError, match="same seeds"):
        judge(ours, theirs[:1], taste)
    with pytest.raises(CoalaError, match=r"'q', missing from ours"):
        judge(ours, [*theirs, reply("q", "x", "b")], taste)


def test_equal_methods_stay_apart() -> None:
    taste = WordJudge("taste", WORDS["weights"])  # type: ignore[arg-type]
    rows = judge([reply("p", "good")], [reply("p", "bad")], taste)
    assert {rows[0].first, rows[0].second} == {"a", "a (reference)"}
    assert win_rate(rows).value == 1.0


def test_a_failing_judge_is_counted() -> None:
    class Fails:
        name = "fails"

        def compare(self, prompt: Sequence[Turn], first: Generation, second: Generation) -> Judgement:
            if first.text == "x":
                raise RuntimeError("no answer")
            return Judgement(first.prompt_id, first.method, second.method, 1.0, self.name)

    told: list[str] = []
    rows = judge(
        [reply("p", "x"), reply("q", "y")],
        [reply("p", "z", "b"), reply("q", "z", "b")],
        Fails(),
        on_failure=lambda prompt, error: told.append(f"{prompt}: {error}"),
    )
    assert [row.preference for row in rows] == [None, 1.0, 1.0, 1.0]
    assert told == ["p: no answer"]
    estimate = win_rate(rows)
    assert estimate.n == 1
    assert "1 failed" in estimate.method


def test_nothing_to_judge() -> None:
    assert judge([], [], WordJudge("taste", {"a": 1.0})) == []
