"""Guidance by the calibrated rule: as strong as what held-out pairs vouch for, in every mode."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from coala.backbone import LanguageModel
from coala.choices import Mode
from coala.decoding import Guidance, generate
from coala.decoding.sampling import restrict, uniform
from coala.decoding.search import kept
from coala.values import CoalaError, ConvexHead
from tests.test_decoding_naive import PROMPTS, endless_model, make_head, texts
from tests.test_decoding_rules import _chi_square, _first_token_counts

MODES: tuple[Mode, ...] = ("token", "prefix", "shift", "block", "best_of", "beam")
SETTINGS: dict[str, Any] = {"max_new_tokens": 10, "seed": 3}


@pytest.fixture(scope="module")
def endless() -> LanguageModel:
    return endless_model()


@pytest.mark.parametrize("mode", MODES)
def test_the_unit_of_scores_means_nothing(endless: LanguageModel, mode: Mode) -> None:
    head = make_head(endless)
    guidance = Guidance(mode, strength=4.0)
    texts_of = [
        texts(generate(PROMPTS, endless, _scaled(head, factor), guidance, **SETTINGS))
        for factor in (1.0, 2.0**-9, 2.0**11)
    ]
    assert texts_of[0] == texts_of[1] == texts_of[2]


@pytest.mark.parametrize("mode", MODES)
def test_a_head_without_evidence_changes_nothing_at_any_strength(endless: LanguageModel, mode: Mode) -> None:
    head = replace(make_head(endless), least_slope=0.0)
    found = generate(PROMPTS, endless, head, Guidance(mode, strength=1e6), **SETTINGS)
    plain = Guidance("beam", strength=0.0) if mode == "beam" else Guidance("none")
    assert texts(found) == texts(generate(PROMPTS, endless, head, plain, **SETTINGS))
    # Other rules do not ask for evidence.
    if mode != "beam":
        assert texts(generate(PROMPTS, endless, head, Guidance(mode, rule="min-max"), **SETTINGS)) != texts(found)


@pytest.mark.parametrize("mode", MODES)
def test_little_evidence_is_little_guidance(endless: LanguageModel, mode: Mode) -> None:
    """Evidence and strength are one factor: half the evidence is half the strength."""
    head = make_head(endless)
    assert head.least_slope is not None
    half = replace(head, least_slope=head.least_slope / 2)
    found = generate(PROMPTS, endless, half, Guidance(mode, strength=8.0), **SETTINGS)
    assert texts(found) == texts(generate(PROMPTS, endless, head, Guidance(mode, strength=4.0), **SETTINGS))
    unknown = replace(head, least_slope=None, temperature=1 / head.least_slope)
    assert texts(generate(PROMPTS, endless, unknown, Guidance(mode, strength=4.0), **SETTINGS)) == texts(found)


@pytest.mark.parametrize("mode", ["block", "best_of"])
def test_without_bound_the_best_sample_wins(endless: LanguageModel, mode: Mode) -> None:
    head = make_head(endless)
    limit = generate(PROMPTS * 3, endless, head, Guidance(mode, strength=1e9), **SETTINGS)
    best = generate(PROMPTS * 3, endless, head, Guidance(mode, rule="min-max"), **SETTINGS)
    assert texts(limit) == texts(best)


def test_one_of_several_samples_has_the_distribution_of_its_weights(endless: LanguageModel) -> None:
    """Replies of one token, by all that three candidates can be."""
    import torch

    head = make_head(endless)
    guidance = Guidance("best_of", strength=2.0, candidates=3, top_k=4, top_p=1.0)
    prefix = endless.start([endless.render(PROMPTS[0]).tokens], head.spec.layer)
    nucleus = restrict(prefix.log_probs(), temperature=1.0, top_k=4, top_p=1.0)
    p = np.exp(nucleus.log_probs[0])
    scores = head.score(prefix.peek(torch.from_numpy(nucleus.tokens))[0].numpy()).astype(float)
    weights = np.exp(2.0 * head.evidence * (scores - scores.max()))
    expected = np.zeros(4)
    for drawn in map(list, itertools.product(range(4), repeat=3)):
        np.add.at(expected, drawn, p[drawn].prod() * weights[drawn] / weights[drawn].sum())
    counts = _first_token_counts(endless, head, guidance, nucleus.tokens[0].tolist(), 1200)
    assert _chi_square(counts, expected) > 1e-3
    assert _chi_square(counts, p) < 1e-6, "and not the base distribution"


@pytest.mark.parametrize("seed", range(4))
def test_each_candidate_is_kept_for_its_share_and_the_first_wherever_possible(seed: int) -> None:
    rng = np.random.default_rng(seed)
    k, grid = int(rng.integers(2, 7)), 20_000
    log_weights = rng.normal(size=k) * 3.0 ** rng.integers(-2, 3)
    log_weights[rng.integers(k)] = log_weights[0]  # perhaps a tie
    shares = np.exp(log_weights) / np.exp(log_weights).sum()
    chance = (np.arange(grid) + 0.5) / grid
    found, moved = np.zeros(k), 0.0
    for first in range(k):  # each candidate is the first as often as the others
        order = np.r_[first, np.delete(np.arange(k), first)]
        which = kept(np.tile(log_weights[order], (grid, 1)), chance)
        found += np.bincount(order[which], minlength=k) / (k * grid)
        moved += (which > 0).mean() / k
    # Each of the at most k + 1 places where the choice changes is met to within one step of the grid.
    assert found == pytest.approx(shares, abs=(k + 1) / grid)
    assert moved == pytest.approx(np.maximum(shares - 1 / k, 0).sum(), abs=(k + 1) / grid), "total variation"


def test_equal_and_lost_candidates() -> None:
    chance = uniform(list(range(1000)))
    assert 0 < chance.min() < 0.01 < 0.99 < chance.max() < 1
    assert (kept(np.zeros((1000, 5)), chance) == 0).all()
    assert (kept(np.tile([0.0, 1e9, -1e9], (1000, 1)), chance) == 1).all()
    assert (kept(np.zeros((1000, 1)), chance) == 0).all()


def test_a_budget_bounds_what_the_evidence_calls_for(endless: LanguageModel) -> None:
    head = make_head(endless)

    def spent(**settings: Any) -> np.ndarray:
        found = generate(PROMPTS * 4, endless, head, Guidance("shift", **settings), **SETTINGS)
        return np.array([reply.divergence for reply in found])

    free = spent(strength=0.5)
    assert spent(strength=0.5, budget=1000.0) == pytest.approx(free), "a budget is not spent for its own sake"
    bounded = spent(strength=1e6, budget=2.0)
    assert bounded.max() <= 2.0 + 1e-9
    assert bounded.mean() > 1.0


def test_settings_say_what_they_do() -> None:
    assert (Guidance().rule, Guidance().mode) == ("calibrated", "block")
    assert Guidance(rule="min-max").strength == Guidance.paper().strength == 2.0
    assert Guidance().changed(rule="min-max") == Guidance(rule="min-max")
    assert Guidance().changed(rule="min-max", strength=3.0).mode == "token", "the best wins, at any strength"
    assert Guidance().changed(strength=3.0) == Guidance(strength=3.0)
    for mode in MODES:  # the usual strength is the mode's own; another one stays
        assert Guidance().changed(mode=mode) == Guidance(mode)
        assert Guidance(strength=3.0).changed(mode=mode) == Guidance(mode, strength=3.0)
    assert Guidance().at(0.0) == Guidance("token")
    assert Guidance(strength=3.0).at(0.0) == Guidance("token", strength=3.0)
    assert Guidance("beam").at(0.0) == Guidance("beam")
    named = {str(Guidance(mode, rule=rule, strength=3)) for mode in MODES for rule in ("calibrated", "min-max")}
    assert len(named) == 2 * len(MODES)


def test_a_slope_is_a_number_of_at_least_zero(endless: LanguageModel) -> None:
    for slope in (-1.0, float("inf"), float("nan")):
        with pytest.raises(CoalaError, match=r"least slope is .*; expected a finite number of at least 0"):
            replace(make_head(endless), least_slope=slope)


def _scaled(head: ConvexHead, factor: float) -> ConvexHead:
    assert head.least_slope is not None
    return replace(
        head,
        weights=head.weights * np.float32(factor),
        linear=head.linear * np.float32(factor),
        temperature=head.temperature * factor,
        least_slope=head.least_slope / factor,
    )
