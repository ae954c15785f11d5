"""The server by the official client: what it answers is what the library makes, whoever asks besides."""

from __future__ import annotations

import asyncio
import json
import math
import re
import socket
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
pytest.importorskip("openai", reason="the client that is served is not installed")

import httpx
import openai

from coala.alignment import load_parts
from coala.decoding import Engine, Guidance, Request, generate
from coala.export.rewards import score_replies
from coala.serve import Limits
from coala.serve.detokenize import PieceReader
from coala.serve.scoring import score
from coala.serve.worker import Ended, Failed, Ticket, Worker
from coala.values import CoalaError, Turn, user

from .serving import Here
from .waiting import PATIENCE, wait_for

PROMPT = "tell me a story"
MESSAGES: Any = [{"role": "user", "content": PROMPT}]
PLAIN = Guidance("none")


@pytest.fixture(scope="session")
def parts(served_run: Path) -> tuple[Any, Any, Guidance]:
    return load_parts(served_run)


@pytest.fixture(scope="module")
def here(parts: tuple[Any, Any, Guidance]) -> Iterator[Here]:
    with Here(*parts[:2], guidance=parts[2]) as server:
        yield server


@pytest.fixture(scope="module")
def client(here: Here) -> Any:
    return openai.OpenAI(base_url=f"{here.url}/v1", api_key="none is asked for", max_retries=0)


def post(here: Here, path: str, body: Any, **options: Any) -> httpx.Response:
    return httpx.post(f"{here.url}{path}", json=body, timeout=PATIENCE, **options)


def replies(
    parts: Any, n: int, *, prompts: list[str] | None = None, guidance: Guidance | None = None, **rest: Any
) -> Any:
    """What the library replies; ids as the server gives them."""
    backbone, head, default = parts
    asked = [user(text) for text in prompts or [PROMPT] for _ in range(n)]
    return generate(asked, backbone, head, guidance or default, **rest)


# --- the protocol ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "guidance"), [("tiny", None), ("tiny-unguided", PLAIN)])
def test_replies_are_those_of_the_library(client: Any, parts: Any, model: str, guidance: Guidance | None) -> None:
    (wanted,) = replies(parts, 1, guidance=guidance, max_new_tokens=12, seed=5)
    found = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=12, seed=5)
    choice = found.choices[0]
    assert choice.message.content == wanted.text
    assert choice.message.role == "assistant"
    assert choice.finish_reason == ("stop" if wanted.n_tokens < 12 else "length")
    assert found.usage.prompt_tokens == len(parts[0].render(user(PROMPT)).tokens)
    assert found.usage.completion_tokens == wanted.n_tokens
    assert found.usage.total_tokens == found.usage.prompt_tokens + wanted.n_tokens
    assert choice.coala["score"] == pytest.approx(wanted.score, abs=1e-4)
    assert choice.coala["log_prob"] == pytest.approx(wanted.log_prob, abs=1e-3)
    assert found.coala == {"seed": 5, "guidance": wanted.method}
    turn = {"render": "turn"}
    text = client.completions.create(model=model, prompt=PROMPT, max_tokens=12, seed=5, extra_body=turn)
    assert text.choices[0].text == wanted.text
    assert text.coala == {**found.coala, **turn, "note": None}


@pytest.mark.parametrize("mode", ["token", "prefix", "shift", "block", "best_of", "beam", "none"])
def test_every_mode_of_guidance(client: Any, parts: Any, mode: Any) -> None:
    guidance = {"mode": mode, "strength": 4.0, "candidates": 3, "width": 2, "block_tokens": 4}
    (wanted,) = replies(parts, 1, guidance=Guidance(**guidance), max_new_tokens=9, seed=2)
    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 9, "seed": 2, "extra_body": {"guidance": guidance}}
    found = client.chat.completions.create(**asked)
    assert found.choices[0].message.content == wanted.text
    assert found.choices[0].coala["divergence"] == (
        None if mode != "shift" else pytest.approx(wanted.divergence, abs=1e-4)
    )
    pieces = [c.choices[0].delta.content or "" for c in client.chat.completions.create(**asked, stream=True)]
    assert "".join(pieces) == wanted.text


def test_temperature_0_of_a_run_that_samples_blocks_is_guided_token_by_token(parts: Any) -> None:
    """Clients that know nothing of modes ask for it; who names a mode that cannot be is told so."""
    backbone, head, _ = parts
    with Here(backbone, head, guidance=Guidance("block", strength=5.0)) as here:
        body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 9, "temperature": 0}
        found = post(here, "/v1/chat/completions", body).json()
        rule = Guidance("token", strength=5.0)
        (wanted,) = replies(parts, 1, guidance=rule, max_new_tokens=9, seed=0, temperature=0.0)
        assert found["choices"][0]["message"]["content"] == wanted.text
        assert found["coala"]["guidance"] == str(rule)
        assert post(here, "/v1/chat/completions", {**body, "guidance": {"mode": "block"}}).status_code == 400
        for change, wanted in (
            ({"strength": 3}, "block, calibrated 3"),
            ({"strength": 3, "rule": "min-max"}, "token, min-max 3"),
            ({"candidates": 2}, "block, calibrated 5, 2 x 5"),
        ):
            asked = {**body, "temperature": 1, "guidance": change}
            assert post(here, "/v1/chat/completions", asked).json()["coala"]["guidance"].startswith(wanted)


def test_a_stream_adds_up_to_the_whole_reply(client: Any) -> None:
    asked = {
        "model": "tiny",
        "messages": MESSAGES,
        "max_tokens": 30,
        "seed": 1,
        "n": 3,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = client.chat.completions.create(**asked)
    texts, tokens, ends, usage = ["", "", ""], [[], [], []], {}, None
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        assert chunk.object == "chat.completion.chunk"
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            tokens[choice.index] += choice.logprobs.content if choice.logprobs else []
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage == whole.usage
    for found, choice in zip(tokens, whole.choices, strict=True):
        assert [one.token for one in found] == [one.token for one in choice.logprobs.content]
        assert [one.logprob for one in found] == pytest.approx(
            [one.logprob for one in choice.logprobs.content], abs=1e-4
        )


def test_choices_differ_and_are_those_of_their_ids(client: Any, parts: Any) -> None:
    wanted = replies(parts, 2, prompts=["one", "and two"], max_new_tokens=8, seed=9)
    asked = {"model": "tiny", "prompt": ["one", "and two"], "n": 2, "max_tokens": 8, "seed": 9}
    found = client.completions.create(**asked, extra_body={"render": "turn"})
    assert [choice.text for choice in found.choices] == [one.text for one in wanted]
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert len({one.text for one in wanted}) == 4
    rows = [len(parts[0].render(user(text)).tokens) for text in ("one", "and two")]
    assert found.usage.prompt_tokens == sum(rows)
    assert found.usage.completion_tokens == sum(one.n_tokens for one in wanted)


def test_log_probabilities_are_the_models_own(client: Any, parts: Any) -> None:
    """Against a forward pass of the model over the tokens; and pieces add up to the text."""
    import torch

    backbone = parts[0]
    asked = {
        "model": "tiny",
        "messages": MESSAGES,
        "max_tokens": 15,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 4,
    }
    found = client.chat.completions.create(**asked, extra_body={"guidance": "none"}).choices[0]
    told = found.logprobs.content
    assert "".join(one.token for one in told) == found.message.content
    assert sum(one.logprob for one in told) == pytest.approx(found.coala["log_prob"], abs=1e-4)
    row = backbone.render(user(PROMPT)).tokens
    prefix = backbone.start([row])
    for one in told:
        log_probs = prefix.log_probs()[0]
        top = torch.topk(log_probs, 4)
        assert one.logprob == pytest.approx(float(top.values[0]), abs=1e-4)  # greedy takes the likeliest
        assert [other.logprob for other in one.top_logprobs] == pytest.approx(top.values.tolist(), abs=1e-4)
        assert bytes(one.bytes).decode() == one.token
        prefix.push(top.indices[:1])
    asked = {"model": "tiny-unguided", "prompt": PROMPT, "max_tokens": 15, "temperature": 0, "logprobs": 4}
    old = client.completions.create(**asked, extra_body={"render": "turn"}).choices[0]
    assert old.logprobs.tokens == [one.token for one in told]
    assert old.logprobs.token_logprobs == pytest.approx([one.logprob for one in told], abs=1e-4)
    for offset, token in zip(old.logprobs.text_offset, old.logprobs.tokens, strict=True):
        assert old.text[offset : offset + len(token)] == token


@pytest.mark.parametrize("prompt", ["once upon a", "", " well", "a good film\n\nHuman:"])
def test_completions_continue_the_text_as_it_stands(client: Any, parts: Any, prompt: str) -> None:
    """Greedy and unguided they are the likeliest tokens behind the text's own, found by forward passes alone."""
    import torch

    backbone = parts[0]
    tokens = [int(token) for token in backbone.tokenizer.encode(prompt)] or [backbone.tokenizer.bos_token_id]
    wanted: list[int] = []
    with torch.no_grad():
        for _ in range(10):
            logits = backbone.transformer(torch.tensor([[*tokens, *wanted]])).logits[0, -1]
            wanted.append(int(logits.argmax()))
    assert not backbone.stop_tokens & set(wanted)
    asked = {"model": "tiny-unguided", "prompt": prompt, "max_tokens": 10, "temperature": 0}
    found = client.completions.create(**asked)
    whole = backbone.tokenizer.decode([*tokens, *wanted], skip_special_tokens=True)
    assert found.choices[0].text == whole[len(prompt) :]
    assert found.usage.prompt_tokens == len(tokens)
    assert found.coala["render"] == "raw"
    assert found.coala["note"] is None
    guided = client.completions.create(**{**asked, "model": "tiny"})
    assert "fitted on replies in the model's dialogue template" in guided.coala["note"]
    pieces = [piece.choices[0].text for piece in client.completions.create(**asked, stream=True)]
    assert "".join(pieces) == found.choices[0].text


def test_stop_strings_end_replies_before_them(client: Any) -> None:
    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 40, "seed": 4}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    assert len(whole) > 12
    stop = whole[6:8]
    for more in ({}, {"logprobs": True}):
        cut = client.chat.completions.create(**asked, **more, stop=["never written", stop]).choices[0]
        assert cut.message.content == whole[: whole.index(stop)]
        assert cut.finish_reason == "stop"
        pieces = list(client.chat.completions.create(**asked, **more, stop=stop, stream=True))
        assert "".join(p.choices[0].delta.content or "" for p in pieces) == whole[: whole.index(stop)]
        if more:
            told = [t.token for p in pieces if p.choices[0].logprobs for t in p.choices[0].logprobs.content]
            assert told == [one.token for one in cut.logprobs.content]
            assert "".join(told).startswith(cut.message.content)


def test_best_of_returns_the_best_scores_first(client: Any, parts: Any) -> None:
    drawn = replies(parts, 6, guidance=PLAIN, max_new_tokens=8, seed=3)
    best = sorted(drawn, key=lambda one: -one.score)[:2]
    asked = {"model": "tiny", "messages": MESSAGES, "n": 2, "max_tokens": 8, "seed": 3}
    more = {"extra_body": {"best_of": 6, "guidance": "none"}}
    found = client.chat.completions.create(**asked, **more)
    assert [choice.message.content for choice in found.choices] == [one.text for one in best]
    assert found.usage.completion_tokens == sum(one.n_tokens for one in drawn)  # all that were written
    texts = ["", ""]
    for chunk in client.chat.completions.create(**asked, **more, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [one.text for one in best]


def test_a_seed_is_drawn_told_and_gives_the_reply_again(client: Any) -> None:
    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12}
    first, second = client.chat.completions.create(**asked), client.chat.completions.create(**asked)
    assert first.coala["seed"] != second.coala["seed"]
    again = client.chat.completions.create(**asked, seed=first.coala["seed"])
    assert again.choices[0].message.content == first.choices[0].message.content


def test_stop_tokens_end_replies(client: Any, parts: Any) -> None:
    """Without a bound on the likelihood the stop token is drawn now and then."""
    wanted = replies(parts, 12, guidance=Guidance("none", top_k=0, top_p=1.0), max_new_tokens=200, seed=0)
    more = {"guidance": "none", "top_k": 0}
    asked = {"model": "tiny", "messages": MESSAGES, "n": 12, "seed": 0, "max_tokens": 200, "top_p": 1}
    found = client.chat.completions.create(**asked, extra_body=more)
    assert [choice.message.content for choice in found.choices] == [one.text for one in wanted]
    ends = ["length" if one.n_tokens == 200 else "stop" for one in wanted]
    assert [choice.finish_reason for choice in found.choices] == ends
    assert set(ends) == {"length", "stop"}
    assert found.usage.completion_tokens == sum(one.n_tokens for one in wanted)


def test_conversations_and_parts_of_text(client: Any, parts: Any) -> None:
    turns = [Turn("system", "be kind"), Turn("user", "hello there"), Turn("assistant", "hi"), Turn("user", "and then")]
    (wanted,) = generate([turns], *parts, max_new_tokens=6, seed=0)
    messages: Any = [{"role": turn.role, "content": turn.text} for turn in turns]
    messages[0]["role"] = "developer"
    messages[3]["content"] = [{"type": "text", "text": "and "}, {"type": "text", "text": "then"}]
    found = client.chat.completions.create(model="tiny", messages=messages, max_tokens=6, seed=0)
    assert found.choices[0].message.content == wanted.text


def test_requests_that_name_none_have_the_servers_temperature_and_system_prompt(parts: Any) -> None:
    asked = Turn("user", "hello there")
    backbone, head, guidance = parts
    with Here(backbone, head, guidance=guidance, temperature=0.3, system="be kind") as server:
        for turns, temperature in (((asked,), None), ((Turn("system", "be rude"), asked), 0.8)):
            behind = turns if len(turns) > 1 else (Turn("system", "be kind"), asked)
            (wanted,) = generate([behind], *parts, max_new_tokens=6, seed=0, temperature=temperature or 0.3)
            body = {"model": "tiny", "max_tokens": 6, "seed": 0, "temperature": temperature}
            messages = [{"role": turn.role, "content": turn.text} for turn in turns]
            found = httpx.post(f"{server.url}/v1/chat/completions", json={**body, "messages": messages}).json()
            assert found["choices"][0]["message"]["content"] == wanted.text


def test_the_models_are_listed(client: Any, here: Here) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "tiny-unguided"]
    assert client.models.retrieve("tiny-unguided").owned_by == "coala"
    assert httpx.get(f"{here.url}/healthz").json() == {"status": "ok", "model": "tiny"}


# --- scores ---------------------------------------------------------------------------------------------------------

REPLIES = [
    "once upon a time",
    "I am well, thank you!",
    "no",
    "",
    "naïve 日本語 \U0001f600",
    "a long evening, it's 2024",
]


def test_scores_are_those_of_extracted_features(here: Here, parts: Any) -> None:
    backbone, head, _ = parts
    wanted = score_replies([user(PROMPT)] * len(REPLIES), REPLIES, head, backbone)
    found = post(here, "/v1/score", {"model": "tiny", "prompt": PROMPT, "replies": REPLIES, "positions": True}).json()
    np.testing.assert_allclose([one["score"] for one in found["data"]], wanted, atol=1e-4)
    rows = [backbone.render(user(PROMPT), reply) for reply in REPLIES]
    assert found["usage"]["prompt_tokens"] == sum(len(row.tokens) for row in rows)
    for reply, row, one in zip(REPLIES, rows, found["data"], strict=True):
        assert "".join(position["text"] for position in one["positions"]) == reply
        assert len(one["positions"]) == row.stop - row.start
        if one["positions"]:
            assert one["positions"][-1]["score"] == pytest.approx(one["score"], abs=1e-4)
    # A reply's score after t tokens is that of a reply of these t tokens.
    some = found["data"][0]["positions"][:3]
    cut = score_replies([user(PROMPT)], ["".join(position["text"] for position in some)], head, backbone)
    if len(backbone.render(user(PROMPT), "".join(p["text"] for p in some)).tokens) == rows[0].start + 3:
        assert some[-1]["score"] == pytest.approx(float(cut[0]), abs=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "mean_all", "last"])
def test_positions_of_every_pooling_are_scores_of_prefixes(parts: Any, pooling: str, monkeypatch: Any) -> None:
    """Against one forward pass for each prefix by itself; whatever the size of a piece of work."""
    from dataclasses import replace

    import torch

    from coala.backbone import POOLINGS

    backbone, head, _ = parts
    head = replace(head, spec=backbone.spec(1, pooling, ends_with_eos=pooling == "last"))
    monkeypatch.setattr("coala.serve.scoring.BATCH_TOKENS", 40)
    work = score([user(PROMPT), user("short")], [REPLIES[0], REPLIES[5]], head, backbone, positions=True)
    pauses = 0
    while True:
        try:
            next(work)
            pauses += 1
        except StopIteration as end:
            found = end.value
            break
    assert pauses > 2  # long work lets others in between
    for prompt, reply, one in zip((PROMPT, "short"), (REPLIES[0], REPLIES[5]), found, strict=True):
        row = backbone.render(user(prompt), reply)
        gate = backbone.hidden([backbone.render(user(prompt)).tokens], 1)
        whole = torch.tensor([gate.shape[1]])
        features = POOLINGS[pooling].pool(gate, torch.tensor([0]), whole).numpy()
        for t, value in enumerate(one.scores, 1):
            hidden = backbone.hidden([row.tokens[: row.start + t]], 1)
            stop = torch.tensor([row.start + t])
            pooled = POOLINGS[pooling].pool(hidden, torch.tensor([row.start]), stop).numpy()
            assert value == pytest.approx(float(head.score(pooled, features)[0]), abs=1e-3)


def test_rerank_orders_by_score(here: Here, parts: Any) -> None:
    wanted = score_replies([user(PROMPT)] * len(REPLIES), REPLIES, parts[1], parts[0])
    documents: list[Any] = [*REPLIES[:-1], {"text": REPLIES[-1]}]
    found = post(here, "/v1/rerank", {"model": "tiny", "query": PROMPT, "documents": documents}).json()
    assert [one["index"] for one in found["results"]] == np.argsort(-wanted, kind="stable").tolist()
    body = {"model": "tiny", "query": MESSAGES, "documents": documents, "top_n": 2, "return_documents": True}
    best = post(here, "/v1/rerank", body).json()["results"]
    assert [one["index"] for one in best] == [one["index"] for one in found["results"][:2]]
    assert [one["document"]["text"] for one in best] == [REPLIES[one["index"]] for one in best]


def test_pieces_add_up_whatever_the_tokens(parts: Any) -> None:
    backbone = parts[0]
    reader = PieceReader(backbone)
    draw = np.random.default_rng(0)
    for _ in range(30):
        tokens = draw.integers(1, 340, size=12).tolist()
        pieces = reader.pieces(tokens)
        assert len(pieces) == 12
        assert "".join(pieces) == backbone.decode(tokens).removeprefix(" ")


# --- many at once ---------------------------------------------------------------------------------------------------


def test_requests_at_once_share_the_model_and_get_what_they_would_get_alone(
    here: Here, parts: Any, client: Any
) -> None:
    wanted = {seed: replies(parts, 1, max_new_tokens=40, seed=seed)[0].text for seed in range(10)}
    most = 0

    def ask(seed: int) -> str:
        nonlocal most
        pieces = []
        for chunk in client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=40, seed=seed, stream=True
        ):
            most = max(most, here.worker.running)
            pieces.append(chunk.choices[0].delta.content or "")
        return "".join(pieces)

    with ThreadPoolExecutor(10) as pool:
        assert dict(zip(wanted, pool.map(ask, wanted), strict=True)) == wanted
    assert most > 3


def test_beyond_the_queue_requests_are_told_when_to_come_back(parts: Any) -> None:
    with Here(*parts[:2], Limits(max_rows=1, queue=2)) as here:
        client = openai.OpenAI(base_url=f"{here.url}/v1", api_key="-", max_retries=0)
        long: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 1000, "stream": True}
        streams = [client.chat.completions.create(**long) for _ in range(3)]
        for body in ({"n": 1}, {"n": 3}):
            with pytest.raises(openai.RateLimitError) as refused:
                client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=4, **body)
            assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60
            assert refused.value.code == "queue_full"
        scored = post(here, "/v1/score", {"model": "tiny", "prompt": PROMPT, "replies": ["x"]})
        assert scored.status_code == 429
        streams[0].close()
        wait_for(lambda: here.worker.unfinished < 3)
        for stream in streams[1:]:
            stream.close()
        wait_for(lambda: here.worker.unfinished == 0)
        assert client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=4).usage.completion_tokens > 0


def test_who_hangs_up_is_written_no_further(here: Here, client: Any) -> None:
    stream = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=1000, stream=True)
    next(iter(stream))
    assert here.worker.unfinished == 1
    stream.close()
    wait_for(lambda: here.worker.unfinished == 0)
    slow = {"model": "tiny", "messages": MESSAGES, "max_tokens": 1000, "n": 4}
    body = json.dumps(slow).encode()
    with socket.create_connection(("127.0.0.1", here.port)) as waiting:  # the same for one who waits for a whole reply
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        waiting.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(lambda: here.worker.unfinished == 4)
    wait_for(lambda: here.worker.unfinished == 0)
    told = 'coala_requests_total{address="/v1/chat/completions",status="499"}'
    wait_for(lambda: told in httpx.get(f"{here.url}/metrics").text)


def test_the_deadline_ends_requests(parts: Any) -> None:
    limits = Limits(deadline=3600.0, max_tokens=16_000)  # replies of a minute or more: they end by the deadline
    with Here(*parts[:2], limits) as here, ThreadPoolExecutor(1) as elsewhere:
        client = openai.OpenAI(base_url=f"{here.url}/v1", api_key="-")  # which must not retry by itself
        asked: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 16_000}
        waiting = elsewhere.submit(client.chat.completions.create, **asked)
        wait_for(lambda: here.worker.unfinished == 1)
        here.skip(limits.deadline / 2)
        assert here.worker.unfinished == 1
        here.skip(limits.deadline / 2)
        with pytest.raises(openai.APIStatusError) as late:
            waiting.result()
        assert late.value.status_code == 408
        assert late.value.code == "deadline_exceeded"
        wait_for(lambda: here.worker.unfinished == 0)
        stream = iter(client.chat.completions.create(**asked, stream=True))
        pieces = [next(stream) for _ in range(5)]  # what was written has been sent
        here.skip(limits.deadline)
        with pytest.raises(openai.APIError, match="deadline"):
            deque(stream, maxlen=0)
        assert all(piece.choices for piece in pieces)
        wait_for(lambda: here.worker.unfinished == 0)


def test_a_failure_of_the_engine_costs_the_replies_at_hand_and_no_more(parts: Any) -> None:
    backbone, head, guidance = parts

    class Failing(Engine):
        """Breaks at the third step that any of its kind makes."""

        steps = 0

        def step(self) -> bool:
            Failing.steps += 1
            if Failing.steps == 3:
                raise RuntimeError("out of memory, say")
            return super().step()

    worker = Worker(lambda: Failing(backbone, head), 8)
    news: list[list[Any]] = [[], [], []]

    def ticket(which: int) -> Ticket:
        request = Request(user(PROMPT), guidance, 6, 0)
        return Ticket(news[which].append, submit=lambda engine, _: engine.submit(request))

    async def run() -> None:
        worker.start()
        for tickets in ([ticket(0), ticket(1)], [ticket(2)]):
            worker.take(tickets)
            await asyncio.to_thread(wait_for, lambda: not worker.unfinished)
        await worker.close()

    asyncio.run(run())
    assert [type(some[-1]) for some in news] == [Failed, Failed, Ended]
    assert news[2][-1].result.generation.text == replies(parts, 1, max_new_tokens=6, seed=0)[0].text
    assert worker.failures == 1


def test_a_reply_that_fails_is_an_error_without_a_trace(served_run: Path) -> None:
    """A model whose weights have become nan: every forward pass fails, the server does not."""
    import torch

    backbone, head, guidance = load_parts(served_run)
    with Here(backbone, head, guidance=guidance) as here, torch.no_grad():
        weight = backbone._network.causal.get_input_embeddings().weight
        whole = weight.clone()
        body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 4, "seed": 0}
        weight.fill_(math.nan)
        for path, asked in (
            ("/v1/chat/completions", body),
            ("/v1/score", {"model": "tiny", "prompt": PROMPT, "replies": ["x"]}),
        ):
            answer = post(here, path, asked)
            assert answer.status_code == 500
            assert answer.json()["error"]["type"] == "server_error"
            assert "Traceback" not in answer.text
            assert "nan" not in answer.text
        weight.copy_(whole)
        assert post(here, "/v1/chat/completions", body).status_code == 200


def test_a_long_chore_does_not_hold_up_streams(here: Here, client: Any) -> None:
    """Tokens go on coming while many replies are scored."""
    body = {"model": "tiny", "prompt": PROMPT, "replies": ["a good film is a good friend " * 30] * 200}
    asked: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 400, "stream": True}
    with ThreadPoolExecutor(1) as pool:
        scoring = pool.submit(post, here, "/v1/score", body)
        during = [not scoring.done() for _ in client.chat.completions.create(**asked)]
        assert scoring.result().status_code == 200
    assert sum(during) > 5, "the chore was over too soon to tell"


# --- what is counted ------------------------------------------------------------------------------------------------


def test_metrics_count_what_happened(parts: Any) -> None:
    with Here(*parts[:2]) as here:
        client = openai.OpenAI(base_url=f"{here.url}/v1", api_key="-", max_retries=0)
        usages = [
            client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=5, seed=s).usage
            for s in range(3)
        ]
        list(client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=5, seed=0, stream=True))
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="other", messages=MESSAGES)
        for i in range(40):
            httpx.get(f"{here.url}/nowhere/{i}")
        answer = httpx.get(f"{here.url}/metrics")
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        text = answer.text
        names = set()
        values: dict[str, float] = {}
        for line in text.splitlines():
            if line.startswith("#"):
                names.add(line.split()[2])
                continue
            found = re.fullmatch(r'(\w+)(\{(?:\w+="(?:[^"\\]|\\.)*",?)+\})? (\S+)', line)
            assert found, line
            assert re.sub("_(bucket|sum|count)$", "", found[1]) in names or found[1] in names
            values[found[1] + (found[2] or "")] = float(found[3])
        chat = 'address="/v1/chat/completions"'
        assert values[f'coala_requests_total{{{chat},status="200"}}'] == 4
        assert values[f'coala_requests_total{{{chat},status="404"}}'] == 1
        assert values['coala_requests_total{address="other",status="404"}'] == 40
        assert sum("other" in key for key in values) < 25  # addresses that clients make up do not fill the memory
        written = sum(usage.completion_tokens for usage in usages) + usages[0].completion_tokens
        assert values['coala_tokens_total{kind="written"}'] == written
        assert values['coala_tokens_total{kind="read"}'] == 4 * usages[0].prompt_tokens
        assert values["coala_first_text_seconds_count"] == 4
        buckets = [v for k, v in values.items() if k.startswith("coala_request_seconds_bucket") and chat in k]
        assert buckets == sorted(buckets)
        assert buckets[-1] == values[f"coala_request_seconds_count{{{chat}}}"] == 5
        assert values["coala_replies_in_hand"] == 0


# --- what cannot be served ------------------------------------------------------------------------------------------


def test_encoders_and_foreign_heads_are_refused_at_the_start(parts: Any, tmp_path: Path) -> None:
    from dataclasses import replace

    from coala.backbone import load_backbone
    from coala.serve.app import Served

    from .menagerie import tiny_backbone

    _, head, guidance = parts
    encoder = load_backbone(tiny_backbone("bert", tmp_path / "bert"), device="cpu")
    with pytest.raises(CoalaError, match="language-model head"):
        Served("x", encoder, replace(head, spec=encoder.spec()), guidance)
    other = load_backbone(tiny_backbone("gpt2", tmp_path / "gpt2"), device="cpu")
    with pytest.raises(CoalaError, match="loaded model is"):
        Served("x", other, head, guidance)


@pytest.mark.parametrize(
    "change",
    [{"max_rows": 0}, {"queue": -1}, {"deadline": 0}, {"deadline": math.nan}, {"max_body": 1.5}, {"max_tokens": True}],
)
def test_limits_that_cannot_be(change: dict[str, Any]) -> None:
    with pytest.raises(CoalaError, match=f"The server's {next(iter(change))} is"):
        Limits(**change)


def test_what_a_client_sees_is_json_all_the_way(here: Here) -> None:
    """Events are JSON without what JSON does not have, in an encoding that every reader knows."""
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 30, "stream": True, "temperature": 2, "logprobs": True}
    answer = post(here, "/v1/chat/completions", body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    for event in events[:-2]:
        assert "\n" not in event
        json.loads(event.removeprefix("data: "), parse_constant=pytest.fail)


def test_threads_end_with_the_server(parts: Any) -> None:
    before = threading.active_count()
    with Here(*parts[:2]) as here:
        assert httpx.get(f"{here.url}/healthz").status_code == 200
    wait_for(lambda: threading.active_count() <= before)
