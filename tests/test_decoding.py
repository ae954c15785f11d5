"""Guided decoding: its coupling to unguided text, where replies end, text as a stream, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coala.backbone import LanguageModel, load_backbone
from coala.decoding import Guidance, generate, log_likelihood
from coala.decoding.replies import Reply, Stream
from coala.values import CoalaError, ConvexHead, Generation, SpecMismatch, Turn, user
from tests.menagerie import CONTEXT, tiny_backbone
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
from tests.tolerances import of_network


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    return tiny_models()


@pytest.fixture(scope="module")
def endless() -> LanguageModel:
    return endless_model()


# --- coupling to unguided text --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "guidance"), [*(("llama", g) for g in GUIDED), ("gpt2", GUIDED[0]), ("qwen2", GUIDED[6])], ids=str
)
def test_strength_zero_is_unguided(models: dict[str, Model], name: str, guidance: Guidance) -> None:
    backbone = models[name].backbone
    head = make_head(backbone)
    plain = generate(PROMPTS, backbone, max_new_tokens=20, seed=1)
    zero = generate(PROMPTS, backbone, head, replace(guidance, strength=0.0), max_new_tokens=20, seed=1)
    assert texts(zero) == texts(plain)
    assert {reply.method for reply in zero} == {"unguided"}
    assert texts(generate(PROMPTS, backbone, None, guidance, max_new_tokens=20, seed=1)) == texts(plain)
    assert texts(generate(PROMPTS, backbone, head, Guidance("none"), max_new_tokens=20, seed=1)) == texts(plain)
    if guidance.mode not in ("block", "best_of") or guidance.rule == "calibrated":
        # The limit along the guided path, which asks the head and peeks at candidates.
        limit = generate(
            PROMPTS, backbone, head, replace(guidance, strength=1e-12, budget=None), max_new_tokens=20, seed=1
        )
        assert texts(limit) == texts(plain)
    if guidance.mode == "shift":
        nothing = generate(PROMPTS, backbone, head, replace(guidance, budget=0.0), max_new_tokens=20, seed=1)
        assert texts(nothing) == texts(plain)
    constant = replace(head, gates=head.gates * 0, weights=head.weights * 0, linear=head.linear * 0)
    assert texts(generate(PROMPTS, backbone, constant, guidance, max_new_tokens=20, seed=1)) == texts(plain)


def test_one_candidate_is_unguided(endless: LanguageModel) -> None:
    head = make_head(endless)
    one = generate(PROMPTS, endless, head, Guidance("token", candidates=1), max_new_tokens=12, seed=1)
    assert texts(one) == texts(generate(PROMPTS, endless, max_new_tokens=12, seed=1))


@pytest.mark.parametrize("guidance", [Guidance("none"), *GUIDED, *BEAMS], ids=str)
def test_batches_and_order_change_nothing(models: dict[str, Model], guidance: Guidance) -> None:
    backbone = models["llama"].backbone
    head = make_head(backbone)
    prompts = [*PROMPTS, user("a"), user("the quick brown fox jumps over the lazy dog")]
    ids = ["v", "w", "x", "y", "z"]

    def run(order: list[int], batch_size: int) -> dict[str, str]:
        replies = generate(
            [prompts[i] for i in order],
            backbone,
            head,
            guidance,
            max_new_tokens=14,
            seed=4,
            prompt_ids=[ids[i] for i in order],
            batch_size=batch_size,
        )
        assert [reply.prompt_id for reply in replies] == [ids[i] for i in order]
        return {reply.prompt_id: reply.text for reply in replies}

    together = run([0, 1, 2, 3, 4], 16)
    assert run([0, 1, 2, 3, 4], 1) == together
    assert run([4, 2, 0, 3, 1], 2) == together
    assert run([3], 8) == {"y": together["y"]}


def test_seeds_reproduce_and_differ(endless: LanguageModel) -> None:
    head = make_head(endless)
    runs = [texts(generate(PROMPTS, endless, head, max_new_tokens=12, seed=seed)) for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert all(a != b for a, b in zip(runs[0], runs[2], strict=True))
    same = generate([PROMPTS[0]] * 2, endless, max_new_tokens=12, seed=0)
    assert same[0].text != same[1].text, "one prompt at two places gets two replies"


# --- where a reply ends ---------------------------------------------------------------------------------------------


def _inner(text: str) -> str:
    """Some characters from the middle of ``text``, none of them half a character."""
    return next(text[i : i + 2] for i in range(6, len(text) - 2) if "\N{REPLACEMENT CHARACTER}" not in text[i : i + 2])


@pytest.mark.parametrize("guidance", [Guidance("none"), *GUIDED, *BEAMS], ids=str)
def test_stop_strings(endless: LanguageModel, guidance: Guidance) -> None:
    head = make_head(endless)
    whole = generate(PROMPTS, endless, head, guidance, max_new_tokens=20, seed=6)
    for index, (prompt, reply) in enumerate(zip(PROMPTS, whole, strict=True)):
        stop = _inner(reply.text)
        pieces: list[str] = []

        def run(
            length: int,
            *,
            prompt: tuple[Turn, ...] = prompt,
            index: int = index,
            stop: tuple[str, ...] = (),
            on_token: Callable[[int, str], None] | None = None,
        ) -> Generation:
            options: dict[str, Any] = {"max_new_tokens": length, "seed": 6, "prompt_ids": [str(index)]}
            return generate([prompt], endless, head, guidance, stop=stop, on_token=on_token, **options)[0]

        cut = run(20, stop=(stop, "never seen"), on_token=lambda _, piece, pieces=pieces: pieces.append(piece))
        assert stop not in cut.text
        assert "".join(pieces) == cut.text
        if guidance.mode in ("block", "best_of", "beam") or guidance.budget is not None:
            continue  # what stops early may win or lose by it; a budget is spread over the tokens that may come
        assert cut.text == reply.text[: reply.text.find(stop)]
        assert 0 < cut.n_tokens < reply.n_tokens
        # Score and log-probability are those of just the tokens that the text needs.
        same = run(cut.n_tokens)
        assert same.text.startswith(cut.text)
        told = [same.score, same.log_prob]
        assert [cut.score, cut.log_prob] == pytest.approx(told, abs=of_network(told))
        assert cut.n_tokens == 1 or not run(cut.n_tokens - 1).text.startswith(cut.text)


@pytest.mark.parametrize("guidance", [Guidance("none"), *GUIDED, *BEAMS], ids=str)
def test_a_full_context_ends_a_reply(endless: LanguageModel, guidance: Guidance) -> None:
    head = make_head(endless)
    long = user("tell me a story about a quick brown fox " * 20)
    (reply, short) = generate([long, user("a")], endless, head, guidance, max_new_tokens=1000, seed=0)
    assert reply.n_tokens <= CONTEXT // 2
    assert short.n_tokens <= CONTEXT - len(endless.render(user("a")).tokens)
    if guidance.mode == "none":
        assert short.n_tokens > CONTEXT // 2
    (reply,) = generate([long], endless, head, guidance, max_new_tokens=3, seed=0)
    assert 0 < reply.n_tokens <= 3


def test_a_reply_that_stops_at_once_is_empty(models: dict[str, Model]) -> None:
    model = models["gpt2"]
    head = make_head(model.backbone)
    replies = generate([PROMPTS[0]] * 60, model.backbone, head, Guidance("none"), max_new_tokens=1, seed=0)
    empty = [reply for reply in replies if reply.n_tokens == 0]
    assert empty
    last = model.backbone.start([model.prompt(PROMPTS[0])], head.spec.layer).state()[0].numpy()
    for reply in empty:
        assert (reply.text, reply.log_prob) == ("", 0)
        assert reply.score == pytest.approx(float(head.score(last)), abs=1e-4)


# --- text as a stream -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [Guidance("none"), *GUIDED, *BEAMS], ids=str)
def test_pieces_add_up(models: dict[str, Model], guidance: Guidance) -> None:
    # Byte-level tokenizers: with byte fallback, one bad byte undoes the good ones decoded before it.
    for model in (models["gpt2"], models["qwen2"]):
        pieces: dict[int, list[str]] = {}
        replies = generate(
            PROMPTS,
            model.backbone,
            make_head(model.backbone),
            guidance,
            max_new_tokens=15,
            seed=0,
            on_token=lambda index, piece, pieces=pieces: pieces.setdefault(index, []).append(piece),
        )
        assert ["".join(pieces.get(index, [])) for index in range(len(PROMPTS))] == texts(replies)


@pytest.mark.parametrize("stop", [(), ("ok!", "okay"), ("\n\nHuman:",)], ids=repr)
def test_no_piece_is_half_a_character_or_half_a_stop_string(stop: tuple[str, ...]) -> None:
    text = "naïve 🎬 films: o, ok, 好电影\n\nok?"
    pieces: list[str] = []
    stream = Stream(lambda _, piece: pieces.append(piece), stop)
    reply = Reply(0, "0", 1000, lambda tokens: bytes(tokens).decode(errors="replace"), stop=stop)
    for token in text.encode():
        reply.tokens.append(token)
        assert not reply.cut_at_stop()
        stream.send(reply)
        assert not any("".join(pieces).endswith(s[:1]) for s in stop)
    stream.send(reply, last=True)
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    if not stop:
        assert len(pieces) == len(text), "nothing is held back without need"


def test_continuations_keep_the_space_that_parts_them(tmp_path: Path) -> None:
    backbone = load_backbone(tiny_backbone("llama", tmp_path / "llama"), device="cpu", template="continuation")
    prompts = [user(f"the {word}") for word in ("quick", "lazy", "good", "bad", "long", "little")] * 4
    replies = generate(prompts, backbone, max_new_tokens=4, seed=0)
    assert any(reply.text.startswith(" ") for reply in replies)


# --- plain decoding and likelihood against transformers -------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_is_that_of_transformers(models: dict[str, Model], name: str) -> None:
    import torch

    model = models[name]
    replies = generate(PROMPTS, model.backbone, max_new_tokens=12, seed=0, temperature=0.0)
    for turns, reply in zip(PROMPTS, replies, strict=True):
        row = torch.tensor([model.prompt(turns)])
        out = model.plain.generate(
            row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=12, pad_token_id=0
        )
        tokens = [token for token in out[0, row.shape[1] :].tolist() if token not in model.backbone.stop_tokens]
        assert reply.text == model.backbone.decode(tokens).removeprefix(" ")
        assert reply.n_tokens == len(tokens)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_likelihood_is_that_of_transformers(models: dict[str, Model], name: str) -> None:
    model = models[name]
    answers = ["a good film", "", "once upon a time there was a little girl who liked to read"]
    found = log_likelihood(PROMPTS, answers, model.backbone)
    assert log_likelihood(PROMPTS, answers, model.backbone, batch_size=1) == [
        (pytest.approx(value, abs=1e-4), n) for value, n in found
    ]
    naive = model.naive(make_head(model.backbone), Guidance("token"), 0)
    for turns, answer, (value, n) in zip(PROMPTS, answers, found, strict=True):
        row = model.backbone.render(turns, answer)
        tokens = row.tokens[row.start :]
        assert n == len(tokens)
        assert value == pytest.approx(naive.log_prob(row.tokens[: row.start], tokens), abs=1e-3)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"mode": "tree"},
            "mode is 'tree'; expected one of token, block, prefix, shift, best_of, beam, distilled, none",
        ),
        ({"rule": "softmax"}, "rule is 'softmax'; expected one of calibrated, min-max, raw, z-score"),
        ({"strength": -1.0}, "strength is -1.0; expected a finite number of at least 0"),
        ({"strength": math.nan}, "strength is nan"),
        ({"every": 0}, "every is 0; expected a whole number of at least 1"),
        ({"candidates": 2.5}, "candidates is 2.5; expected a whole number"),
        ({"top_k": -1}, "top_k is -1; expected a whole number of at least 0"),
        ({"top_p": 0.0}, r"top_p is 0.0; expected a number in \(0, 1\]"),
        ({"top_p": "0.9"}, "top_p is '0.9'"),
        ({"block_tokens": True}, "block_tokens is True"),
        ({"width": 0}, "width is 0; expected a whole number of at least 1"),
        ({"mode": "shift", "budget": -1.0}, "budget is -1.0; expected a finite number of nats of at least 0"),
        ({"mode": "shift", "budget": math.inf}, "budget is inf"),
        ({"mode": "token", "budget": 3.0}, "budget is 3 in mode 'token', .* Use mode 'shift'"),
    ],
)
def test_guidance_is_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CoalaError, match=message):
        Guidance(**settings)


def test_guidance_of_the_paper() -> None:
    paper = Guidance.paper()
    assert (paper.mode, paper.interval, paper.candidates, paper.top_k, paper.top_p) == ("prefix", 5, 5, 50, 0.9)
    assert replace(Guidance(), mode="prefix").interval == 5
    assert replace(Guidance(), mode="prefix", rule="min-max", strength=2.0) == replace(paper, every=None)


def test_mistakes_are_named(endless: LanguageModel, models: dict[str, Model]) -> None:
    def run(head: ConvexHead | None = None, guidance: Guidance = Guidance(), **settings: Any) -> None:  # noqa: B008
        generate(PROMPTS, endless, head, guidance, **{"max_new_tokens": 3, "seed": 0, **settings})

    with pytest.raises(CoalaError, match="max_new_tokens is 0"):
        run(max_new_tokens=0)
    with pytest.raises(CoalaError, match="temperature is -1"):
        run(temperature=-1.0)
    with pytest.raises(CoalaError, match="stop is the string"):
        run(stop="end")
    with pytest.raises(CoalaError, match="empty"):
        run(stop=["a", ""])
    with pytest.raises(CoalaError, match="3 prompts need as many prompt ids; found 1"):
        run(prompt_ids=["a"])
    with pytest.raises(CoalaError, match="batch_size is 0"):
        run(batch_size=0)
    for mode in ("block", "best_of"):
        with pytest.raises(CoalaError, match=f"'{mode}' .* are identical at temperature 0"):
            run(make_head(endless), Guidance(mode), temperature=0.0)
    with pytest.raises(CoalaError, match="3 prompts need as many texts"):
        log_likelihood(PROMPTS, ["a"], endless)
    with pytest.raises(SpecMismatch) as caught:
        run(make_head(models["gpt2"].backbone))
    assert "gpt2" in str(caught.value)
    assert str(endless.name) in str(caught.value)
    assert generate([], endless, max_new_tokens=3, seed=0) == []


def test_overflowing_hidden_states_are_named(endless: LanguageModel) -> None:
    head = make_head(endless)
    huge = replace(head, linear=np.full_like(head.linear, 3e38))
    with pytest.raises(CoalaError, match="scores are not finite"):
        generate(PROMPTS, endless, huge, max_new_tokens=3, seed=0)


# --- a trained model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [Guidance("token"), Guidance(), Guidance("shift", budget=15.0)], ids=str)
def test_a_trained_model_is_guided(shared: Path, guidance: Guidance) -> None:
    backbone = load_backbone(shared / "data/models/stories260K-hf", device="cpu", template="continuation")
    width = backbone.width
    linear = np.append(np.random.default_rng(0).normal(size=width), 0)
    head = ConvexHead(np.zeros((0, width + 1)), np.zeros((0, width + 1)), linear, backbone.spec(3, "mean"))
    prompts = [user(text) for text in ("Once upon a time", "The dog was", "Lily and Ben", "One day")] * 2
    plain = generate(prompts, backbone, head, Guidance("none"), max_new_tokens=24, seed=0)
    guided = generate(prompts, backbone, head, guidance, max_new_tokens=24, seed=0)
    assert np.mean([reply.score for reply in guided]) > np.mean([reply.score for reply in plain]) + 0.5
    found = log_likelihood(prompts, texts(plain), backbone)
    same = [(value, reply) for (value, n), reply in zip(found, plain, strict=True) if n == reply.n_tokens]
    assert len(same) > 3, "the text of most replies has the tokens it was generated with"
    for value, reply in same:
        assert value == pytest.approx(reply.log_prob, abs=0.05)
