"""Blocks, best-of-n and beams: what they search and find."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coala.backbone import LanguageModel, load_backbone
from coala.decoding import Guidance, generate
from coala.values import user
from tests.menagerie import DECODERS, tiny_backbone
from tests.test_decoding_naive import (
    ARCHITECTURES,
    BEAMS,
    GUIDED,
    PROMPTS,
    Model,
    endless_model,
    make_head,
    texts,
    tiny_models,
)


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    return tiny_models()


@pytest.fixture(scope="module")
def endless() -> LanguageModel:
    return endless_model()


# --- the best of several samples ------------------------------------------------------------------------------------


def test_the_best_block_beats_the_first(endless: LanguageModel) -> None:
    head = make_head(endless)
    # One block: the reply with the best score of five, the first of which is the unguided one.
    best = generate(PROMPTS, endless, head, Guidance("block", rule="min-max"), max_new_tokens=10, seed=0)
    plain = generate(PROMPTS, endless, head, Guidance("none"), max_new_tokens=10, seed=0)
    # Where the first is the best of the five, the scores differ by rounding: the batches had different shapes.
    assert all(b.score >= p.score - 1e-5 * abs(p.score) for b, p in zip(best, plain, strict=True))
    assert any(b.score > p.score + 1e-3 for b, p in zip(best, plain, strict=True))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_best_of_has_the_best_score_of_its_samples(models: dict[str, Model], name: str) -> None:
    """The samples are drawn and scored by the naive implementation."""
    model = models[name]
    head = make_head(model.backbone)
    replies = generate(PROMPTS, model.backbone, head, Guidance("best_of", 1e6, candidates=4), max_new_tokens=9, seed=1)
    naive = model.naive(head, Guidance("best_of"), seed=1)
    for index, (turns, reply) in enumerate(zip(PROMPTS, replies, strict=True)):
        prompt = model.prompt(turns)
        samples = [naive.sample(prompt, [], str(index), branch, 9)[0] for branch in range(4)]
        scores = [naive.score(prompt, sample) for sample in samples]
        assert reply.score == pytest.approx(max(scores), abs=1e-3)
        assert reply.text == model.backbone.decode(samples[int(np.argmax(scores))]).removeprefix(" ")


def test_the_best_of_one_is_unguided(models: dict[str, Model]) -> None:
    backbone = models["llama"].backbone
    settings: dict[str, Any] = {"max_new_tokens": 12, "seed": 1}
    one = generate(PROMPTS, backbone, make_head(backbone), Guidance("best_of", candidates=1), **settings)
    assert texts(one) == texts(generate(PROMPTS, backbone, **settings))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_block_for_the_whole_reply_is_best_of(models: dict[str, Model], name: str) -> None:
    backbone = models[name].backbone
    head = make_head(backbone)
    settings: dict[str, Any] = {"max_new_tokens": 15, "seed": 2, "stop": ("th",)}
    block = generate(PROMPTS, backbone, head, Guidance("block", block_tokens=15), **settings)
    best = generate(PROMPTS, backbone, head, Guidance("best_of"), **settings)
    assert [(r.text, r.score, r.log_prob) for r in block] == [(r.text, r.score, r.log_prob) for r in best]


# --- beams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_head", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_beam_of_one_without_strength_is_greedy(models: dict[str, Model], name: str, with_head: bool) -> None:
    backbone = models[name].backbone
    head = make_head(backbone) if with_head else None
    beam = Guidance("beam", width=1, strength=0.0)
    found = generate(PROMPTS, backbone, head, beam, max_new_tokens=12, seed=0)
    greedy = generate(PROMPTS, backbone, head, max_new_tokens=12, seed=0, temperature=0.0, guidance=Guidance("none"))
    assert texts(found) == texts(greedy)
    assert [r.log_prob for r in found] == pytest.approx([r.log_prob for r in greedy], abs=1e-4)


@pytest.mark.parametrize("guidance", BEAMS, ids=str)
def test_a_beam_leaves_nothing_to_chance(endless: LanguageModel, guidance: Guidance) -> None:
    head = make_head(endless)
    runs = [texts(generate(PROMPTS, endless, head, guidance, max_new_tokens=12, seed=seed)) for seed in (0, 1)]
    assert runs[0] == runs[1]


def test_without_a_head_a_beam_searches_by_log_probability_alone(endless: LanguageModel) -> None:
    beam = Guidance("beam", width=6, candidates=6, top_p=1.0)
    found = generate(PROMPTS, endless, None, beam, max_new_tokens=6, seed=0)
    assert texts(found) == texts(
        generate(PROMPTS, endless, make_head(endless), replace(beam, strength=0.0), max_new_tokens=6, seed=0)
    )
    greedy = generate(PROMPTS, endless, max_new_tokens=6, seed=0, temperature=0.0)
    assert all(b.log_prob >= g.log_prob - 1e-6 for b, g in zip(found, greedy, strict=True))
    assert any(b.log_prob > g.log_prob + 0.1 for b, g in zip(found, greedy, strict=True))


def test_a_wide_beam_finds_the_optimum(endless: LanguageModel) -> None:
    """Two tokens from three candidates each: a beam that holds all nine is exhaustive."""
    head = make_head(endless)
    beam = Guidance("beam", width=9, candidates=3, strength=0.7, rule="raw", top_k=3, top_p=1.0)
    (found,) = generate(PROMPTS[:1], endless, head, beam, max_new_tokens=2, seed=0)
    every = generate(PROMPTS[:1] * 400, endless, head, Guidance("none", top_k=3, top_p=1.0), max_new_tokens=2, seed=0)
    values = {r.text: r.log_prob / 2 + 0.7 * r.score for r in every if r.n_tokens == 2}
    assert len(values) >= 8
    assert found.log_prob / 2 + 0.7 * found.score >= max(values.values()) - 1e-4


# --- every cache ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_every_mode_runs_on_every_cache(name: str, tmp_path: Path) -> None:
    """Tree or copied: the same replies alone as in a batch, and as with the cache copied for each candidate."""
    backbone = load_backbone(tiny_backbone(name, tmp_path), device="cpu")
    head = make_head(backbone, layer=-1)  # where every family has its full width
    prompts = [*PROMPTS, user("a b c")]
    for guidance in (GUIDED[0], GUIDED[4], GUIDED[5], GUIDED[6], BEAMS[0]):
        settings: dict[str, Any] = {"max_new_tokens": 6, "seed": 3, "prompt_ids": list("abcd")}
        together = generate(prompts, backbone, head, guidance, **settings)
        alone = generate(prompts, backbone, head, guidance, **settings, batch_size=1)
        assert texts(alone) == texts(together)
        assert [r.log_prob for r in alone] == pytest.approx([r.log_prob for r in together], abs=1e-2)
