"""Oracles and win-rate matrices: antisymmetry, failures kept apart, intransitive heads, intervals over prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit

from coala.comal.matrix import empirical_nash, win_rate_matrix
from coala.comal.model_oracles import features, from_coala_head, from_pairwise_lm, from_reward_model
from coala.comal.oracles import Example, Oracle, ask, from_callable, from_judge, from_majority, from_scores, from_table
from coala.comal.pair_head import choose_pair_head, fit_pair_head
from coala.nash import PreferenceGame
from coala.store.verdict_cache import VerdictCache
from coala.values import CoalaError, ConvexHead, Pair, user
from tests.menagerie import tiny_backbone
from tests.test_nash_game import games, seeds
from tests.tolerances import NETWORK

CYCLE = PreferenceGame([[0.5, 0.1, 0.8], [0.9, 0.5, 0.1], [0.2, 0.9, 0.5]], labels=["a", "b", "c"])


def examples(n: int) -> list[Example]:
    return [{"prompt": user(f"question {i}")} for i in range(n)]


def test_a_majority_of_orders_may_go_in_a_circle() -> None:
    orders = ("abc", "bca", "cab")
    voters = [from_scores(lambda _, answers, o=order: [-o.index(x) for x in answers], order) for order in orders]
    majority = from_majority(voters, "Condorcet")
    said = ask(majority, examples(4), ["a", "b", "c", "a"], ["b", "c", "a", "a"])
    assert [verdict.preference for verdict in said] == [1, 1, 1, 0.5]
    silent = from_callable(lambda *_: None, "silent")
    assert ask(from_majority([*voters, silent], "x"), examples(1), ["a"], ["b"])[0].preference is None
    with pytest.raises(CoalaError, match="one voter at least"):
        from_majority([], "none")


# --- asking ------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8))
def test_both_orders_are_averaged_and_add_up_to_one(said: list[tuple[float, float]]) -> None:
    rows = examples(len(said))

    def biased(example: Example, a: str, b: str) -> float:
        forward, backward = said[rows.index(example)]
        return forward if a < b else backward

    oracle = from_callable(biased, "biased")
    one = ask(oracle, rows, ["x"] * len(said), ["y"] * len(said), batch_size=3)
    other = ask(oracle, rows, ["y"] * len(said), ["x"] * len(said))
    for (forward, backward), p, q in zip(said, one, other, strict=True):
        assert p.preference is not None
        assert q.preference is not None
        assert p.preference == pytest.approx((forward + 1 - backward) / 2)
        assert p.preference + q.preference == pytest.approx(1)
        assert p.disagreement == q.disagreement == pytest.approx(abs(forward + backward - 1))


def test_a_failure_in_either_order_is_no_verdict() -> None:
    oracle = from_callable(lambda e, a, b: None if a == "x" else 0.3, "half")
    assert [v.preference for v in ask(oracle, examples(2), ["x", "z"], ["y", "y"])] == [None, pytest.approx(0.5)]


@pytest.mark.parametrize("value", [1.2, -0.1, math.nan])
def test_what_is_no_probability_is_refused(value: float) -> None:
    with pytest.raises(CoalaError, match=r"'wild' said .* of 'question 0'; expected the probability"):
        ask(from_callable(lambda e, a, b: value, "wild"), examples(1), ["x"], ["y"])
    with pytest.raises(CoalaError, match="gave 1 verdicts for 2 pairs"):
        ask(Oracle(lambda e, a, b: [0.5], "short", True), examples(2), ["x"] * 2, ["y"] * 2)
    with pytest.raises(CoalaError, match='needs a "prompt" of turns'):
        ask(from_callable(lambda e, a, b: value, "wild"), [{"prompt": "text"}], ["x"], ["y"])


def test_verdicts_are_bought_once(tmp_path: Path) -> None:
    bought: list[tuple[str, str]] = []

    def judge(example: Example, a: str, b: str) -> float | None:
        bought.append((a, b))
        return None if b == "fails" else 0.7

    rows, firsts, seconds = examples(3), ["x", "y", "z"], ["u", "fails", "w"]
    with VerdictCache(tmp_path / "verdicts.sqlite") as keeper:
        first = ask(from_callable(judge, "judge"), rows, firsts, seconds, keeper=keeper)
        assert len(bought) == 6
        assert ask(from_callable(judge, "judge"), rows, firsts, seconds, keeper=keeper) == first
        assert bought[6:] == [("y", "fails")]  # what failed is asked for again, what succeeded is not
        ask(from_callable(judge, "other"), rows[:1], ["x"], ["u"], keeper=keeper)
        ask(from_callable(judge, "judge"), [{**rows[0], "source": 1}], ["x"], ["u"], keeper=keeper)
        assert len(bought) == 11  # another judge, and another example of the same prompt


# --- scores and tables -------------------------------------------------------------------------------------------


@given(games, games, st.integers(0, 1))
def test_a_table_answers_as_its_game(one: Any, two: Any, number: int) -> None:
    game = PreferenceGame({"one": one, "two": two})
    oracle = from_table(game, prompt=lambda example: str(example["name"]))
    labels, P = game.names[number], game.matrices[number]
    example = {"prompt": user("?"), "name": game.prompts[number]}
    pairs = [(a, b) for a in labels for b in labels]
    found = ask(oracle, [example] * len(pairs), [a for a, _ in pairs], [f" {b}" for _, b in pairs])
    np.testing.assert_array_equal(np.array([v.preference for v in found]).reshape(P.shape), P)
    assert [v.preference for v in ask(oracle, [example] * 2, ["?", "?"], [labels[0], "?"])] == [None, 0.5]


def test_a_table_needs_its_prompts() -> None:
    with pytest.raises(CoalaError, match=r"no prompt 'question 0'; it has \['q'\]"):
        ask(from_table(PreferenceGame({"q": CYCLE.matrices[0]})), examples(1), ["1"], ["2"])


@given(st.lists(st.floats(-30, 30), min_size=3, max_size=6), st.floats(0.1, 3))
def test_scores_are_transitive_and_agree_with_the_logistic_function(scores: list[float], scale: float) -> None:
    texts = [str(i) for i in range(len(scores))]

    def score(rows: Sequence[Example], answers: Sequence[str]) -> list[float]:
        return [scores[int(answer)] for answer in answers]

    bt, hard = from_scores(score, "s", scale=scale), from_scores(score, "s", link="majority")
    n = len(scores)
    pairs = [(a, b) for a in texts for b in texts]
    P, M = (
        np.array([v.preference for v in ask(o, examples(n * n), *zip(*pairs, strict=True))]).reshape(n, n)
        for o in (bt, hard)
    )
    difference = np.subtract.outer(scores, scores)
    np.testing.assert_allclose(P, expit(scale * difference), rtol=1e-12)
    np.testing.assert_array_equal(M, np.where(difference > 0, 1, np.where(difference < 0, 0, 0.5)))


def test_a_score_that_is_not_finite_is_no_verdict() -> None:
    oracle = from_scores(lambda e, y: [math.inf if t == "bad" else 0.0 for t in y], "s")
    found = ask(oracle, examples(3), ["bad", "good", "bad"], ["good", "good", "bad"])
    assert [v.preference for v in found] == [None, 0.5, None]
    with pytest.raises(CoalaError, match="scores of shape"):
        ask(from_scores(lambda e, y: [0.0], "s"), examples(2), ["x"] * 2, ["y"] * 2)
    with pytest.raises(CoalaError, match="Link 'probit'"):
        from_scores(lambda e, y: [], "s", link="probit")  # type: ignore[arg-type]


def test_a_judge_that_fails_has_no_verdict() -> None:
    from coala.evaluation import JudgeFailure, RuleJudge

    longer = from_judge(RuleJudge("longer"))
    assert [v.preference for v in ask(longer, examples(3), ["aa", "b", "c"], ["b", "aa", "d"])] == [1, 0, 0.5]

    class Failing:
        name = "failing"

        def compare(self, *_: Any) -> Any:
            raise JudgeFailure("no verdict", "cannot tell")

    assert ask(from_judge(Failing()), examples(1), ["x"], ["y"])[0].preference is None


# --- a head on pair features -------------------------------------------------------------------------------------


def circle(n: int) -> Any:
    angle = 2 * np.pi * np.arange(n) / n
    return np.c_[np.cos(angle), np.sin(angle)]


@given(seeds, st.integers(2, 6), st.integers(1, 6))
@settings(max_examples=25)
def test_swapping_the_answers_negates_the_margin(seed: int, width: int, rank: int) -> None:
    draw = np.random.default_rng(seed)
    a, b, p = draw.normal(size=(20, width)), draw.normal(size=(20, width)), draw.random(20)
    head = fit_pair_head(a, b, p, rank=rank, ridge=0.05)
    np.testing.assert_allclose(head.probability(a, b) + head.probability(b, a), 1, atol=1e-12)
    np.testing.assert_allclose(head.margin(a, a), 0, atol=1e-12)
    swapped = fit_pair_head(b, a, 1 - p, rank=rank, ridge=0.05)
    np.testing.assert_allclose(swapped.margin(a, b), head.margin(a, b), atol=1e-7)


def test_a_pair_head_learns_a_cycle_that_no_score_can() -> None:
    h = circle(3)
    i, j = np.array([(i, j) for i in range(3) for j in range(3) if i != j]).T
    P = CYCLE.matrices[0]
    head = fit_pair_head(h[i], h[j], P[i, j], ridge=1e-8)
    # Three logits, three parameters (two of the score, one turn): all probabilities are met.
    np.testing.assert_allclose(head.probability(h[i], h[j]), P[i, j], atol=1e-4)
    score_only = fit_pair_head(h[i] @ [[1.0], [0.3]], h[j] @ [[1.0], [0.3]], P[i, j], ridge=1e-8)
    wins = score_only.probability(h[[0, 1, 2]] @ [[1.0], [0.3]], h[[1, 2, 0]] @ [[1.0], [0.3]]) > 0.5
    assert 0 < wins.sum() < 3


def test_the_pair_head_is_the_minimiser_scipy_finds() -> None:
    draw = np.random.default_rng(3)
    a, b, p = draw.normal(size=(60, 4)), draw.normal(size=(60, 4)), draw.random(60)
    head = fit_pair_head(a, b, p, rank=4, ridge=0.01)
    x, y = (a - head.mean) @ head.projection, (b - head.mean) @ head.projection
    upper = [(r, s) for r in range(4) for s in range(r + 1, 4)]

    def loss(theta: Any) -> float:
        margin = (x - y) @ theta[:4]
        for value, (r, s) in zip(theta[4:], upper, strict=True):
            margin = margin + value * (x[:, r] * y[:, s] - x[:, s] * y[:, r])
        q = expit(margin)
        return float(-(p * np.log(q) + (1 - p) * np.log(1 - q)).mean() + 0.005 * theta @ theta)

    best = minimize(loss, np.zeros(10), method="BFGS", options={"gtol": 1e-7})
    assert head.objective <= best.fun + 1e-9
    assert head.objective - head.gap <= best.fun + 1e-12
    assert head.gap < 1e-12


def test_a_pair_head_refuses_what_it_cannot_fit() -> None:
    with pytest.raises(CoalaError, match="one shape"):
        fit_pair_head(np.zeros((2, 3)), np.zeros((3, 3)))
    with pytest.raises(CoalaError, match="probabilities"):
        fit_pair_head(np.zeros((2, 3)), np.ones((2, 3)), [0.5, 1.5])
    with pytest.raises(CoalaError, match="positive ridge"):
        fit_pair_head(np.zeros((2, 3)), np.ones((2, 3)), ridge=0)


# --- models ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from coala.backbone import load_backbone

    return load_backbone(tiny_backbone("gpt2", tmp_path_factory.mktemp("backbone")))


def test_heads_judge_by_the_features_of_extraction(backbone: Any) -> None:
    from coala.features import extract

    spec = backbone.spec(-1, "mean")
    rows = [
        Pair(user(f"tell me a story {i}"), "once upon a time", f"a bad film {i}" * (i + 1), str(i)) for i in range(3)
    ]
    asked: list[Example] = [{"prompt": pair.prompt} for pair in rows]
    a, b = [pair.chosen for pair in rows], [pair.rejected for pair in rows]
    drawn = extract(rows, backbone, spec)
    np.testing.assert_allclose(features(backbone, spec, asked, a, batch_size=2), drawn.chosen, atol=NETWORK)
    draw = np.random.default_rng(0)
    none = np.zeros((0, backbone.width + 1))
    head = ConvexHead(none, none, draw.normal(size=backbone.width + 1), spec, temperature=2.0)
    said = [v.preference for v in ask(from_coala_head(head, backbone, "head"), asked, a, b)]
    np.testing.assert_allclose(said, expit((head.score(drawn.chosen) - head.score(drawn.rejected)) / 2), rtol=1e-3)
    pair_head = fit_pair_head(drawn.chosen, drawn.rejected, [0.9, 0.2, 0.6])
    said = [v.preference for v in ask(from_coala_head(pair_head, backbone, "pairs", spec=spec), asked, a, b)]
    np.testing.assert_allclose(said, pair_head.probability(drawn.chosen, drawn.rejected), atol=1e-4)
    with pytest.raises(CoalaError, match="needs `spec`"):
        from_coala_head(pair_head, backbone, "pairs")


def test_a_language_model_sees_both_answers(backbone: Any, tmp_path: Path) -> None:
    from coala.decoding import log_likelihood

    (tmp_path / "judge.yaml").write_text("mode: weighted\nparser: token\nlabels: [m, M]\nprompts:\n  - {user: p.txt}\n")
    (tmp_path / "p.txt").write_text("{question} m: {answer_a} M: {answer_b}")
    short = from_pairwise_lm(backbone, str(tmp_path))
    found = ask(short, examples(1), ["yes"], ["no"])[0]
    logits = []
    for a, b in (("yes", "no"), ("no", "yes")):
        prompt = user(f"question 0 m: {a} M: {b}")
        (m, _), (M, _) = log_likelihood([prompt, prompt], ["m", "M"], backbone)
        logits.append(m - M)
    assert found.preference == pytest.approx((expit(logits[0]) + 1 - expit(logits[1])) / 2, abs=NETWORK)
    assert found.disagreement == pytest.approx(abs(expit(logits[0]) + expit(logits[1]) - 1), abs=NETWORK)
    oracle = from_pairwise_lm(backbone)
    # The shipped instructions are longer than this model's context: not judged rather than judged on a stump.
    assert ask(oracle, examples(1), ["yes"], ["no"])[0].preference is None


def test_a_reward_model_is_bradley_terry_whatever_the_batch() -> None:
    import torch
    from transformers import GPT2Config, GPT2ForSequenceClassification

    from tests.menagerie import _gpt2_tokenizer

    tokenizer = _gpt2_tokenizer()
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=96, num_labels=1)
    config.pad_token_id = tokenizer.eos_token_id
    model = GPT2ForSequenceClassification(config).eval()
    asked, a, b = examples(3), ["a", "a longer answer", "hello"], ["it is well", "b", "once upon a time"]
    one, many = (from_reward_model(model, tokenizer, "rm", batch_size=size, max_tokens=90) for size in (1, 4))
    first = [v.preference for v in ask(one, asked, a, b)]
    np.testing.assert_allclose([v.preference for v in ask(many, asked, a, b)], first, atol=NETWORK)
    with torch.no_grad():
        scores = [
            float(model(input_ids=torch.tensor([tokenizer.encode(f"Human: question 0\n\nAssistant: {text}")])).logits)
            for text in ("a", "it is well")
        ]
    assert first[0] == pytest.approx(expit(scores[0] - scores[1]), abs=NETWORK)


# --- the matrix --------------------------------------------------------------------------------------------------


@given(seeds, st.integers(2, 4), st.integers(1, 12), st.sampled_from(["hard", "mean"]))
@settings(max_examples=30)
def test_win_rates_add_up_to_a_hundred(seed: int, m: int, n: int, mode: Any) -> None:
    draw = np.random.default_rng(seed)
    answers = {f"policy {i}": [str(draw.integers(4)) for _ in range(n)] for i in range(m)}
    table = draw.random((4, 4))
    np.fill_diagonal(table, 0.5)
    oracle = from_callable(lambda e, a, b: float(table[int(a), int(b)]), "t")
    found = win_rate_matrix(answers, examples(n), oracle, mode=mode)
    np.testing.assert_allclose(found.percent + found.percent.T, 100, atol=1e-9)
    np.testing.assert_array_equal(np.diag(found.percent), 50)
    P = (table + 1 - table.T) / 2
    P = P if mode == "mean" else (np.sign(P - 0.5) + 1) / 2
    for i, j in np.ndindex(m, m):
        here, there = found.intervals[i][j], found.intervals[j][i]
        expected = np.mean(
            [P[int(a), int(b)] for a, b in zip(*(list(answers.values())[k] for k in (i, j)), strict=True)]
        )
        if i != j:
            assert here.value == pytest.approx(100 * expected)
            assert (here.low, here.high) == pytest.approx((100 - there.high, 100 - there.low), abs=1e-6)
            assert here.low - 1e-9 <= here.value <= here.high + 1e-9
            assert here.n == n


def test_what_has_no_verdict_is_left_out_and_counted() -> None:
    oracle = from_table(CYCLE)
    found = win_rate_matrix({"one": ["a", "?", "b"], "two": ["b", "a", "b"]}, examples(3), oracle)
    assert found.failures == 1
    assert found.percent[0, 1] == 25  # a loses to b, b ties with b
    assert found.intervals[0][1].n == 2
    with pytest.raises(CoalaError, match="no pair with a verdict"):
        win_rate_matrix({"one": ["?"], "two": ["a"]}, examples(1), oracle)
    with pytest.raises(CoalaError, match="'two' has 1 answers for 3 prompts"):
        win_rate_matrix({"one": ["a"] * 3, "two": ["a"]}, examples(3), oracle)


def test_the_average_may_count_the_policy_itself() -> None:
    found = win_rate_matrix({"one": ["a"] * 4, "two": ["b"] * 4}, examples(4), from_table(CYCLE), mode="mean")
    np.testing.assert_allclose(found.average(), [10, 90])
    np.testing.assert_allclose(found.average(include_self=True), [30, 70])


def test_the_mixture_of_policies_is_the_nash_strategy_of_their_game() -> None:
    answers = {label: [label] * 5 for label in "abc"}
    found = win_rate_matrix(answers, examples(5), from_table(CYCLE), mode="mean").nash()
    np.testing.assert_allclose(list(found.mixture.values()), np.array([4, 3, 4]) / 11, atol=1e-9)
    assert found.unique
    assert found.gap == pytest.approx({"a": 0.8, "b": 0.8, "c": 0.6})
    alone = empirical_nash([[50, 80], [20, 50]], ["new", "old"])
    assert alone.gap == pytest.approx({"new": 0.0, "old": 0.6})
    assert alone.mixture["new"] == pytest.approx(1)


def test_the_ridge_of_a_pair_head_is_the_one_that_does_best_on_held_out_groups() -> None:
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(2, 300, 6))
    group = [str(i // 3) for i in range(300)]
    # Noise: the stronger the ridge the better. A circle: a weak one is.
    swap = draw.random(300)[:, None] < 0.5
    head, losses = choose_pair_head(np.where(swap, a, b), np.where(swap, b, a), group)
    assert set(losses) == {"0.001", "0.01", "0.1", "1"}
    assert f"{head.ridge:g}" == min(losses, key=losses.__getitem__) == "1"
    turned = a[:, :1] * b[:, 1:2] - a[:, 1:2] * b[:, :1] > 0
    head, losses = choose_pair_head(np.where(turned, a, b), np.where(turned, b, a), group)
    assert head.ridge <= 0.01
    assert losses[f"{head.ridge:g}"] < 0.4
    assert np.abs(head.skew).max() > 5 * np.abs(head.linear).max()
    assert choose_pair_head(a, b, ["same"] * 300)[1] == {}
