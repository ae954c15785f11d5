"""The distributions that guided decoding samples, the rules that put scores on a scale, and budgets."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from coala.backbone import LanguageModel
from coala.decoding import Guidance, generate, reweight
from coala.decoding.budget import STRENGTHS, Account, centred, divergence
from coala.decoding.guidance import RULES, reach, scaled
from coala.decoding.sampling import gumbel, restrict, stream_key
from coala.values import CoalaError, ConvexHead
from tests.test_decoding_naive import PROMPTS, Naive, endless_model, make_head, naive_noise


@pytest.fixture(scope="module")
def endless() -> LanguageModel:
    return endless_model()


# --- distributions --------------------------------------------------------------------------------------------------


def _chi_square(counts: np.ndarray, probs: np.ndarray) -> float:
    """p-value of observed ``counts`` under ``probs``; rare outcomes are merged."""
    from scipy import stats

    n = counts.sum()
    order = np.argsort(-probs)
    counts, probs = counts[order], probs[order]
    common = int((probs * n >= 8).sum())
    observed = np.append(counts[:common], counts[common:].sum())
    expected = np.append(probs[:common], probs[common:].sum()) * n
    kept = expected > 0
    return float(stats.chisquare(observed[kept], expected[kept] * observed[kept].sum() / expected[kept].sum()).pvalue)


def _first_token_counts(
    backbone: LanguageModel, head: ConvexHead | None, guidance: Guidance, tokens: list[int], n: int
) -> np.ndarray:
    replies = generate([PROMPTS[0]] * n, backbone, head, guidance, max_new_tokens=1, seed=9, batch_size=400)
    row = backbone.render(PROMPTS[0]).tokens
    log_probs = backbone.start([row]).log_probs()[0].numpy()
    # Tokens are told apart by their log-probability under the base model.
    values = np.array([log_probs[token] for token in tokens])
    found = [int(np.abs(values - reply.log_prob).argmin()) for reply in replies if reply.n_tokens]
    return np.bincount(found, minlength=len(tokens))


def test_strength_zero_samples_the_restricted_base_distribution(endless: LanguageModel) -> None:
    naive_nucleus = Naive(None, frozenset(), None, Guidance(), 0).nucleus  # type: ignore[arg-type]
    allowed = naive_nucleus(endless.start([endless.render(PROMPTS[0]).tokens]).log_probs()[0].numpy())
    tokens = list(allowed)
    probs = np.exp([allowed[token] for token in tokens])
    for guidance in (Guidance("token", strength=1e-12), Guidance("none")):
        counts = _first_token_counts(endless, make_head(endless), guidance, tokens, 1200)
        assert _chi_square(counts, probs) > 1e-3


def test_with_the_whole_nucleus_the_choice_is_an_exact_tilt(endless: LanguageModel) -> None:
    """p(c) exp(strength * score(c)), the optimum of a KL-regularised reward."""
    guidance = Guidance("token", strength=0.5, rule="raw", candidates=6, top_k=6, top_p=1.0)
    head = make_head(endless)
    prefix = endless.start([endless.render(PROMPTS[0]).tokens], head.spec.layer)
    nucleus = restrict(prefix.log_probs(), temperature=1.0, top_k=6, top_p=1.0)
    import torch

    scores = head.score(prefix.peek(torch.from_numpy(nucleus.tokens))[0].numpy())
    tilted = np.exp(nucleus.log_probs[0]) * np.exp(0.5 * scores)
    counts = _first_token_counts(endless, head, guidance, nucleus.tokens[0].tolist(), 1200)
    assert _chi_square(counts, tilted / tilted.sum()) > 1e-3
    assert _chi_square(counts, np.exp(nucleus.log_probs[0])) < 1e-6, "and not the base distribution"


def test_noise_is_gumbel_and_independent() -> None:
    keys = [stream_key(7, str(i // 50), i % 5, i % 50) for i in range(4000)]
    assert len(set(keys)) == 4000
    noise = gumbel(keys, np.tile(np.arange(20), (4000, 1)))
    assert noise.mean() == pytest.approx(np.euler_gamma, abs=0.02)
    assert noise.std() == pytest.approx(math.pi / math.sqrt(6), abs=0.02)
    assert np.abs(np.corrcoef(noise.T) - np.eye(20)).max() < 0.08
    assert np.abs(np.corrcoef(noise[1:, 0], noise[:-1, 0])[0, 1]) < 0.06
    assert noise[3, 4] == pytest.approx(naive_noise(7, "0", 3, 3, 4), rel=1e-12)
    shuffled = np.array([[4, 0, 19]])
    assert np.array_equal(gumbel(keys[:1], shuffled)[0], noise[0, [4, 0, 19]]), "a token keeps its noise"


@pytest.mark.parametrize(("top_k", "top_p", "temperature"), [(50, 0.9, 1.0), (0, 0.5, 1.5), (3, 1.0, 0.5), (0, 1.0, 1)])
def test_nucleus_is_that_of_transformers(top_k: int, top_p: float, temperature: float) -> None:
    import torch

    log_probs = torch.log_softmax(torch.randn(4, 200, generator=torch.Generator().manual_seed(0)) * 3, -1)
    found = restrict(log_probs, temperature=temperature, top_k=top_k, top_p=top_p)
    naive = Naive(None, frozenset(), None, Guidance(top_k=top_k, top_p=top_p), 0, temperature)  # type: ignore[arg-type]
    for row in range(4):
        inside = np.isfinite(found.log_probs[row])
        mine = dict(zip(found.tokens[row, inside].tolist(), found.log_probs[row, inside].tolist(), strict=True))
        assert mine == pytest.approx(naive.nucleus(log_probs[row].numpy()), abs=1e-6)


def test_nan_log_probabilities_are_refused() -> None:
    import torch

    with pytest.raises(CoalaError, match="not finite"):
        restrict(torch.full((1, 5), float("nan")), temperature=1.0, top_k=3, top_p=0.9)


# --- rules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", list(RULES))
def test_rule_contract(rule: Any) -> None:
    rng = np.random.default_rng(0)
    base = np.log(rng.dirichlet(np.ones(5), size=40))
    base[::4, 3:] = -np.inf  # a nucleus of three tokens
    scores = rng.normal(size=(40, 5)) * 10 ** rng.uniform(-3, 3, size=(40, 1))
    normal = base - np.log(np.exp(base).sum(-1, keepdims=True))
    assert reweight(base, scores, 0.0, rule) == pytest.approx(normal)
    for strength in (0.5, 2.0):
        tilted = reweight(base, scores, strength, rule)
        assert np.exp(tilted).sum(-1) == pytest.approx(1)
        assert (np.isneginf(tilted) == np.isneginf(base)).all()
        gained = tilted - np.where(np.isfinite(normal), normal, 0.0)
        for row in range(40):
            seen = np.isfinite(base[row])
            by_score = gained[row, seen][np.argsort(scores[row, seen])]
            assert (np.diff(by_score) >= -1e-9).all(), "a better score never gains less"
    same = reweight(base, np.ones_like(scores), 3.0, rule)
    assert same == pytest.approx(normal), "equal scores change nothing"


def test_min_max_is_scale_free_and_ignores_rounding() -> None:
    base = np.log(np.full((1, 3), 1 / 3))
    scores = np.array([[1.0, 2.0, 4.0]])
    assert reweight(base, scores, 2.0) == pytest.approx(reweight(base, 1e-4 * scores - 0.01, 2.0))
    # The scores of the head are float32; a difference in the last bit is none.
    assert reweight(base, np.float32([[7, np.nextafter(np.float32(7), np.float32(8)), 7]]), 2.0) == pytest.approx(base)


@pytest.mark.parametrize(
    "guidance",
    [
        *(Guidance(mode) for mode in ("token", "prefix", "shift", "block", "best_of")),
        *(Guidance("token", rule=rule) for rule in ("raw", "min-max")),
        Guidance("shift", rule="min-max"),
    ],
    ids=str,
)
def test_more_strength_never_lowers_the_mean_score(endless: LanguageModel, guidance: Guidance) -> None:
    head = make_head(endless)
    means = [
        np.mean(
            [
                reply.score
                for reply in generate(
                    PROMPTS * 8, endless, head, replace(guidance, strength=s), max_new_tokens=11, seed=0, batch_size=24
                )
            ]
        )
        for s in (0.0, 0.5, 4.0, 32.0)
    ]
    assert (np.diff(means) > 0).all(), means


@pytest.mark.parametrize("rule", list(RULES))
def test_reach_bounds_what_a_rule_sets_apart(rule: Any) -> None:
    rng = np.random.default_rng(1)
    for k in (2, 3, 5, 8):
        scores = rng.normal(size=(3000, k)) ** 3  # with outliers
        widest = np.ptp(scaled(scores, np.ones_like(scores, dtype=bool), rule), axis=1).max()
        assert widest <= reach(rule, k) + 1e-9
    two = scaled(np.array([[0.0, 1.0]]), np.ones((1, 2), dtype=bool), rule)
    assert rule in ("raw", "calibrated") or np.ptp(two) == pytest.approx(reach(rule, 2)), "no smaller bound holds"


# --- budgets --------------------------------------------------------------------------------------------------------


def _steps(n: int, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of the k likeliest of nine tokens, and tilts."""
    rng = np.random.default_rng(seed)
    log_probs = -np.sort(-np.log(rng.dirichlet(np.full(9, 0.5), size=n)), axis=1)[:, :k]
    log_probs[::5, k - 1] = -np.inf
    return log_probs, centred(log_probs, rng.normal(size=(n, k)))


def test_divergence_is_that_of_scipy_and_grows_with_strength() -> None:
    from scipy.special import rel_entr, softmax

    log_probs, tilt = _steps(30, 4, 0)
    costs = divergence(log_probs, tilt, STRENGTHS)
    assert (np.diff(costs, axis=1) >= -1e-9).all()
    for row in range(30):
        rest = max(1 - np.exp(log_probs[row]).sum(), 0.0)
        p = np.append(np.exp(log_probs[row]), rest)
        f = np.append(tilt[row], 0.0)
        for at in range(0, len(STRENGTHS), 7):
            with np.errstate(divide="ignore"):
                q = softmax(np.log(p) + STRENGTHS[at] * f)
            assert costs[row, at] == pytest.approx(rel_entr(q, p).sum(), rel=1e-6, abs=1e-9)


def test_scored_tokens_are_centred() -> None:
    log_probs, tilt = _steps(30, 4, 1)
    assert (np.exp(log_probs) * tilt).sum(1) == pytest.approx(0, abs=1e-12)
    assert np.isfinite(tilt).all()


def _paid(costs: np.ndarray, strength: float) -> float:
    return 0.0 if strength == 0 else float(costs[list(STRENGTHS).index(strength)])


@pytest.mark.parametrize("budget", [0.3, 3.0, 30.0])
@pytest.mark.parametrize("length", [1, 7, 60])
def test_no_account_is_overdrawn(budget: float, length: int) -> None:
    for seed in range(5):
        log_probs, tilt = _steps(length, 5, seed)
        tilt[3::4] = 0.0  # steps at which there is nothing to choose
        costs = divergence(log_probs, tilt, STRENGTHS)
        account = Account(budget)
        for step in range(length):
            account.spent += _paid(costs[step], account.strength(costs[step], length - step))
        assert account.spent <= budget + 1e-12
        most = costs[:, -1].sum()
        # A reply of many like steps spends nearly all it can.
        assert length < 60 or account.spent > 0.8 * min(budget, most)


def test_like_steps_have_like_strengths() -> None:
    """One strength throughout gains most for its nats; the budget finds it step by step."""
    log_probs, tilt = _steps(300, 5, 3)
    costs = divergence(log_probs, tilt, STRENGTHS)
    fixed = np.flatnonzero(STRENGTHS == 1.0)[0]
    account = Account(float(costs[:, fixed].sum()))
    used = []
    for step in range(300):
        used.append(account.strength(costs[step], 300 - step))
        account.spent += _paid(costs[step], used[-1])
    assert np.median(used[30:]) == pytest.approx(1.0, rel=0.25)
    assert np.quantile(used[30:270], 0.9) / np.quantile(used[30:270], 0.1) < 2


def test_a_spent_budget_stops_the_guidance() -> None:
    account = Account(2.0, spent=1.9999)
    assert account.closed
    assert account.strength(np.zeros_like(STRENGTHS), 1) == 0
    assert not Account(None, spent=100.0).closed


@pytest.mark.parametrize("budget", [0.5, 4.0, 16.0])
def test_replies_keep_to_their_budget_and_gain_by_it(endless: LanguageModel, budget: float) -> None:
    head = make_head(endless)
    settings: dict[str, Any] = {"max_new_tokens": 12, "seed": 0, "batch_size": 24}
    replies = generate(PROMPTS * 8, endless, head, Guidance("shift", rule="min-max", budget=budget), **settings)
    spent = [reply.divergence for reply in replies if reply.divergence is not None]
    assert len(spent) == 24
    assert max(spent) <= budget + 1e-9
    assert np.mean(spent) > 0.6 * min(budget, 12)
    plain = generate(PROMPTS * 8, endless, head, Guidance("none"), **settings)
    assert np.mean([r.score for r in replies]) > np.mean([r.score for r in plain])


def test_a_shift_samples_the_distribution_whose_divergence_it_reports(endless: LanguageModel) -> None:
    import torch

    head = make_head(endless)
    guidance = Guidance("shift", rule="min-max", strength=1.5, candidates=3, top_k=8, top_p=1.0)
    prefix = endless.start([endless.render(PROMPTS[0]).tokens], head.spec.layer)
    nucleus = restrict(prefix.log_probs(), temperature=1.0, top_k=8, top_p=1.0)
    scores = head.score(prefix.peek(torch.from_numpy(nucleus.tokens[:, :3]))[0].numpy()).astype(float)
    p = np.exp(nucleus.log_probs[0])
    f = np.zeros(8)
    f[:3] = (scores - scores.min()) / np.ptp(scores)
    f[:3] -= (p[:3] * f[:3]).sum() / p[:3].sum()
    q = p * np.exp(1.5 * f)
    q /= q.sum()
    counts = _first_token_counts(endless, head, guidance, nucleus.tokens[0].tolist(), 1200)
    assert _chi_square(counts, q) > 1e-3
    assert _chi_square(counts, p) < 1e-6, "and not the base distribution"
    reply = generate([PROMPTS[0]], endless, head, guidance, max_new_tokens=1, seed=0)[0]
    assert reply.divergence is not None
    assert reply.divergence == pytest.approx((q * np.log(q / p)).sum(), rel=1e-4)


@pytest.mark.parametrize(
    ("mode", "rows", "looked_at", "written"),
    [
        ("none", 1, 0, 1),
        ("token", 1, 5, 1),
        ("prefix", 1, 5, 1),
        ("shift", 1, 6, 1),
        ("block", 5, 0, 5),
        ("best_of", 5, 0, 5),
        ("beam", 4, 20, 1),
    ],
)
def test_what_a_mode_takes_of_the_model(mode: Any, rows: int, looked_at: int, written: int) -> None:
    guidance = Guidance(mode, candidates=5, width=4)
    assert (guidance.rows, guidance.looked_at, guidance.written) == (rows, looked_at, written)
