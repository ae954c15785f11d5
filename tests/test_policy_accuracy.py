"""Likelihoods of given replies under guidance, and the share of pairs that log-ratios rank right."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from coala.alignment.policy import Guided, policy_accuracy
from coala.backbone import LanguageModel
from coala.decoding import (
    Engine,
    Guidance,
    Request,
    guided_likelihoods,
    lifted,
    log_likelihood,
    model_log_ratios,
    unknown_likelihood,
)
from coala.statistics.policy import accuracy_of_log_ratios
from coala.statistics.scores import ranking_accuracy
from coala.values import CoalaError, Pair, user
from tests.test_decoding_naive import GUIDED, PROMPTS, Model, endless_model, make_head, naive_noise, tiny_models
from tests.tolerances import NETWORK

SHIFTS = [guidance for guidance in GUIDED if guidance.mode == "shift"]
ROOM = 7


@pytest.fixture(scope="module")
def endless() -> LanguageModel:
    return endless_model()


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    return tiny_models()


def written(backbone: LanguageModel, head: Any, guidance: Guidance, temperature: float = 1.0) -> list[Any]:
    """Jobs of replies of exactly ROOM tokens, or fewer."""
    engine = Engine(backbone, head)
    jobs = [
        engine.submit(Request(prompt, guidance, ROOM, seed, temperature, prompt_id=str(number)))
        for number, prompt in enumerate(PROMPTS)
        for seed in (1, 2)
    ]
    while engine.step():
        pass
    assert all(job.generation is not None for job in jobs)
    return jobs


# --- the likelihood of a guided reply ----------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", SHIFTS, ids=str)
@pytest.mark.parametrize("gate_on", ["reply", "prompt"])
def test_a_sampled_reply_is_read_as_it_was_written(endless: LanguageModel, guidance: Guidance, gate_on: Any) -> None:
    """What reading a reply spends is what was recorded while it was sampled, whatever the batch."""
    head = make_head(endless, gate_on=gate_on)
    jobs = written(endless, head, guidance, temperature=0.8)
    prompts, tokens = [job.request.prompt for job in jobs], [job.tokens for job in jobs]
    read = guided_likelihoods(prompts, tokens, endless, head, guidance, temperature=0.8, max_new_tokens=ROOM)
    assert all(one.inside for one in read)
    for job, one in zip(jobs, read, strict=True):
        assert job.generation.divergence == pytest.approx(one.divergence, abs=NETWORK * ROOM)
        assert one.n_tokens == ROOM == job.generation.n_tokens
    assert max(one.divergence for one in read) > 0.1
    alone = guided_likelihoods(prompts[:1], tokens[:1], endless, head, guidance, temperature=0.8, max_new_tokens=ROOM)
    assert alone[0].guided == pytest.approx(read[0].guided, abs=NETWORK * ROOM)


@pytest.mark.parametrize(
    "guidance",
    [SHIFTS[-1], *(pytest.param(one, marks=pytest.mark.nightly) for one in (*SHIFTS[:-1], lifted(SHIFTS[-1])))],
    ids=str,
)
def test_likelihoods_equal_the_naive_distribution(models: dict[str, Model], guidance: Guidance) -> None:
    """Every token's probability from an implementation that encodes everything anew; each is what the noise chose."""
    model = models["llama"]
    head = make_head(model.backbone)
    jobs = [job for job in written(model.backbone, head, guidance) if job.tokens]
    assert jobs
    prompts, tokens = [job.request.prompt for job in jobs], [job.tokens for job in jobs]
    read = guided_likelihoods(prompts, tokens, model.backbone, head, guidance, max_new_tokens=ROOM)
    for job, one in zip(jobs, read, strict=True):
        naive = model.naive(head, guidance, job.request.seed)
        prompt = model.prompt(job.request.prompt)
        guided = unguided = 0.0
        for step, token in enumerate(job.tokens):
            before = job.tokens[:step]
            base = naive.nucleus(naive.encode(prompt + before)[1])
            shifts = naive.shifts(prompt, before, ROOM) if step % guidance.interval == 0 and len(base) > 1 else {}
            weights = {t: value + shifts.get(t, 0.0) for t, value in base.items()}
            total = math.log(sum(math.exp(value) for value in weights.values()))
            guided, unguided = guided + weights[token] - total, unguided + base[token]
            noise = {t: naive_noise(job.request.seed, job.request.prompt_id, 0, step, t) for t in weights}
            assert max(weights, key=lambda t: weights[t] + noise[t]) == token
        assert one.guided == pytest.approx(guided, abs=NETWORK * ROOM)
        assert one.unguided == pytest.approx(unguided, abs=NETWORK * ROOM)


def test_all_one_token_replies_have_probability_one_together(endless: LanguageModel) -> None:
    head = make_head(endless)
    guidance = Guidance("shift", strength=3.0, top_k=9, top_p=0.95)
    vocabulary = [[token] for token in range(endless.shape.vocabulary)]
    read = guided_likelihoods([PROMPTS[0]] * len(vocabulary), vocabulary, endless, head, guidance, batch_size=64)
    for side in ("guided", "unguided"):
        assert sum(math.exp(getattr(one, side)) for one in read) == pytest.approx(1, abs=1e-6)
    assert sum(one.inside for one in read) <= 9
    free = guided_likelihoods(
        [PROMPTS[0]] * len(vocabulary), vocabulary, endless, head, lifted(guidance), batch_size=64
    )
    assert all(one.inside for one in free)
    assert sum(math.exp(one.guided) for one in free) == pytest.approx(1, abs=1e-6)


def test_without_strength_the_ratio_is_zero(endless: LanguageModel) -> None:
    head, texts = make_head(endless), ["once upon a time", "no", ""]
    for guidance in (Guidance("shift", strength=0.0), Guidance("shift", budget=0.0), Guidance("none")):
        free = guided_likelihoods(PROMPTS, texts, endless, head, lifted(guidance), max_new_tokens=8)
        assert [one.log_ratio for one in free] == [0, 0, 0]
    silent = replace(head, least_slope=0.0)  # a head without evidence guides nothing
    free = guided_likelihoods(PROMPTS, texts, endless, silent, Guidance("shift", top_k=0, top_p=1.0))
    assert [one.log_ratio for one in free] == [0, 0, 0]
    # Without restriction, unguided is the base model.
    base = log_likelihood(PROMPTS, texts, endless)
    assert [one.unguided for one in free] == pytest.approx([value for value, _ in base], abs=NETWORK * 20)
    assert [one.n_tokens for one in free] == [n for _, n in base]


def test_modes_without_a_likelihood_say_so(endless: LanguageModel) -> None:
    head = make_head(endless)
    for mode in ("block", "best_of", "token", "prefix", "beam"):
        guidance = Guidance(mode)  # type: ignore[arg-type]
        assert unknown_likelihood(guidance) == f"likelihood not known in mode {mode}"
        with pytest.raises(CoalaError, match=f"likelihood not known in mode {mode}. Fix: use mode shift"):
            guided_likelihoods(PROMPTS, ["a"] * 3, endless, head, guidance)
    for known in (Guidance("shift"), Guidance("none"), Guidance("block", strength=0.0)):
        assert unknown_likelihood(known, head) == ""
    assert "temperature 0" in unknown_likelihood(Guidance("shift"), head, 0.0)
    with pytest.raises(CoalaError, match="a budget without max_new_tokens"):
        guided_likelihoods(PROMPTS, ["a"] * 3, endless, head, Guidance("shift", budget=2.0))
    with pytest.raises(CoalaError, match="3 prompts need as many texts; found 1"):
        guided_likelihoods(PROMPTS, ["a"], endless, head, Guidance("shift"))


def test_a_trained_models_ratio_is_the_difference_of_likelihoods(models: dict[str, Model]) -> None:
    base = models["gpt2"].backbone
    texts = ["once upon a time", "no", "fine"]
    assert model_log_ratios(PROMPTS, texts, base, base).tolist() == [0, 0, 0]


# --- the share of pairs -------------------------------------------------------------------------------------------


def test_the_share_counted_by_hand() -> None:
    draw = np.random.default_rng(0)
    n = 200
    chosen, rejected, free, other = draw.normal(size=(4, n)).round(1)
    chosen[draw.random(n) < 0.4] = -np.inf
    rejected[draw.random(n) < 0.4] = -np.inf
    groups = [str(i // 2) for i in range(n)]

    def right(i: int) -> float:
        a, b = chosen[i], rejected[i]
        if math.isinf(a) and math.isinf(b):
            a, b = free[i], other[i]
        return float(a > b) + 0.5 * float(a == b)

    found = accuracy_of_log_ratios(chosen, rejected, groups, lifted=(free, other))
    assert found.accuracy.value == pytest.approx(np.mean([right(i) for i in range(n)]))
    assert 0 < found.accuracy.low < found.accuracy.value < found.accuracy.high < 1
    assert "100 groups" in found.accuracy.method
    known = np.isfinite(chosen).astype(int) + np.isfinite(rejected)
    assert (found.inside, found.by_support, found.outside) == tuple(int((known == k).sum()) for k in (2, 1, 0))
    assert f"{found.by_support} are ranked by support alone" in found.note
    assert found.lifted is not None
    assert found.lifted.value == ranking_accuracy(free, other, groups).value
    # Pairs outside without lifted ratios are ties; finite ratios are ranked as scores are, and need no note.
    bare = accuracy_of_log_ratios([-math.inf, 1.0], [-math.inf, 0.0])
    assert bare.accuracy.value == 0.75
    assert "1 as ties" in bare.note
    plain = accuracy_of_log_ratios(free, other, groups)
    assert plain.accuracy.value == ranking_accuracy(free, other, groups).value
    assert (plain.note, plain.lifted) == ("", None)
    for wrong in ([math.nan], [math.inf]):
        with pytest.raises(CoalaError, match="nan or inf"):
            accuracy_of_log_ratios(wrong, [0.0])
    with pytest.raises(CoalaError, match="finite one of each reply"):
        accuracy_of_log_ratios([0.0], [0.0], lifted=([-math.inf], [0.0]))


def test_policies_of_both_kinds(endless: LanguageModel, models: dict[str, Model]) -> None:
    head = make_head(endless)
    texts = ["once upon a time", "I am well, thank you!", "no", "the quick brown fox", "a long evening"]
    pairs = [Pair(user(f"question {i}?"), texts[i % 5], texts[(i + 2) % 5], str(i)) for i in range(12)]
    guidance = Guidance("shift", strength=2.0, top_k=40, top_p=0.98)
    told: list[tuple[int, int]] = []
    found = policy_accuracy(pairs, endless, Guided(head, guidance), on_texts=lambda *now: told.append(now))
    assert told[-1] == (48, 48)
    ratios = [
        [one.log_ratio for one in guided_likelihoods([p.prompt for p in pairs], side, endless, head, rule)]
        for rule in (guidance, lifted(guidance))
        for side in ([p.chosen for p in pairs], [p.rejected for p in pairs])
    ]
    again = accuracy_of_log_ratios(*ratios[:2], [p.group for p in pairs], lifted=(ratios[2], ratios[3]))
    assert found == again
    assert found.inside + found.by_support + found.outside == 12
    # Turned pairs are ranked the other way round.
    turned = [Pair(p.prompt, p.rejected, p.chosen, p.group) for p in pairs]
    assert policy_accuracy(turned, endless, Guided(head, guidance)).accuracy.value == pytest.approx(
        1 - found.accuracy.value
    )
    unguided = policy_accuracy(pairs, endless, Guided(head, Guidance("shift", strength=0.0, top_k=0, top_p=1.0)))
    assert unguided.accuracy.value == 0.5
    same = policy_accuracy(pairs, endless, endless, limit=5)
    assert (same.accuracy.value, same.accuracy.n) == (0.5, 5)
    assert Guided(head, Guidance("block")).unknown == "likelihood not known in mode block"
    with pytest.raises(CoalaError, match="Found no pairs"):
        policy_accuracy([], endless, endless)
