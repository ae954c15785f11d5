"""The official client's own types against the server: every field it may send, every field it reads back."""

from __future__ import annotations

import itertools
import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
pytest.importorskip("openai", reason="the client that is served is not installed")

import httpx
import openai
import typing_extensions
from openai.types import Completion, ErrorObject, Model
from openai.types import completion_create_params as text_params
from openai.types.chat import (
    ChatCompletion,
    ChatCompletionAssistantMessageParam,
    ChatCompletionChunk,
    ChatCompletionDeveloperMessageParam,
    ChatCompletionStreamOptionsParam,
    ChatCompletionSystemMessageParam,
    ChatCompletionUserMessageParam,
)
from openai.types.chat import completion_create_params as chat_params
from pydantic import BaseModel

from coala.alignment import load_parts
from coala.serve import schemas
from coala.serve.bodies import parse
from coala.serve.errors import Refusal

from .serving import Here

USER = {"role": "user", "content": "tell me a story"}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [USER], "max_tokens": 4, "seed": 1}
TEXT: dict[str, Any] = {"model": "tiny", "prompt": "once upon", "max_tokens": 4, "seed": 1}
# Words that are the checking program's, not a reader's.
FOREIGN = ("Input should", "validation", "valid string", "List should", "String should", "pydantic", "permitted")


def fields(kind: Any) -> dict[str, Any]:
    return typing_extensions.get_type_hints(kind)


ASKED = {
    "chat": (chat_params.CompletionCreateParamsStreaming, schemas.ChatRequest, CHAT),
    "text": (text_params.CompletionCreateParamsStreaming, schemas.CompletionRequest, TEXT),
}
SAID = {
    "assistant": ChatCompletionAssistantMessageParam,
    "user": ChatCompletionUserMessageParam,
    "system": ChatCompletionSystemMessageParam,
    "developer": ChatCompletionDeveloperMessageParam,
}
EVERY = [(kind, name) for kind, (params, _, _) in ASKED.items() for name in fields(params)]
# Fields that bear on the reply; what they do is tested elsewhere.
HONOURED = {
    *("messages", "model", "prompt", "max_tokens", "max_completion_tokens", "temperature", "top_p", "n", "best_of"),
    *("seed", "stop", "stream", "stream_options", "logprobs", "top_logprobs"),
}


def samples(hint: Any, depth: int = 0) -> list[Any]:
    """Values of a type as JSON has them: every choice of a literal, an object with all its fields, and so on."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Required, typing.NotRequired, typing_extensions.Required, typing.Annotated):
        return samples(inside[0], depth)
    if origin is typing.Literal:
        return list(inside)
    if origin in (typing.Union, types.UnionType):
        return [value for one in inside for value in samples(one, depth)]
    if typing_extensions.is_typeddict(hint):
        parts = {name: samples(one, depth + 1)[:2] for name, one in fields(hint).items()} if depth < 4 else {}
        longest = max(map(len, parts.values()), default=1)
        return [{name: values[at % len(values)] for name, values in parts.items() if values} for at in range(longest)]
    if origin is dict or hint is dict:
        return [{}, {"a": value}] if (value := (samples(inside[1], depth + 1) or ["b"])[0]) is not None else [{}]
    if origin is not None:  # lists and what may be given as one
        return [[], *([value] for value in samples(inside[0], depth + 1)[:3])] if inside else [[]]
    plain = {str: ["some text"], int: [1], float: [0.5], bool: [True, False], type(None): [None]}
    return plain.get(hint, ["some text"])


def verdict(model: type[BaseModel], body: dict[str, Any]) -> Refusal | BaseModel:
    try:
        return parse(json.dumps(body).encode(), model)
    except Refusal as refusal:
        return refusal


def told(refusal: Refusal, *names: str) -> None:
    """A refusal names what it is of, in plain words and in the protocol's form."""
    assert refusal.status == 400
    assert set(refusal.body["error"]) == {"message", "type", "param", "code"}
    ErrorObject.model_validate(refusal.body["error"], strict=True)
    assert not any(word in refusal.message for word in FOREIGN), refusal.message
    assert any((refusal.param or "").startswith(name) for name in names), (names, refusal.param, refusal.message)
    assert "knows no such field" not in refusal.message, f"new in the protocol? {refusal.message}"


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_every_field_of_the_protocol_is_taken_or_refused_by_name(kind: str, name: str) -> None:
    """A field that the client's next version adds fails here until somebody has decided on it."""
    params, model, base = ASKED[kind]
    found = []
    for value in samples(fields(params)[name]):
        found.append(verdict(model, {**base, name: value}))
        if isinstance(found[-1], Refusal):
            told(found[-1], name)
    assert found
    if name in HONOURED:
        assert any(not isinstance(one, Refusal) for one in found)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, name in EVERY if name not in ("model", "messages")])
def test_null_is_as_good_as_leaving_out(kind: str, name: str) -> None:
    _, model, base = ASKED[kind]
    without = {key: value for key, value in base.items() if key != name}
    assert verdict(model, {**base, name: None}) == verdict(model, without)
    assert not isinstance(verdict(model, {**base, name: None, "what_comes_next": None}), Refusal)


@pytest.mark.parametrize(("role", "name"), [(role, name) for role, kind in SAID.items() for name in fields(kind)])
def test_every_field_of_a_turn_is_taken_or_refused_by_name(role: str, name: str) -> None:
    turn = {"role": role, "content": "hello"}
    for value in samples(fields(SAID[role])[name]):
        found = verdict(schemas.ChatRequest, {**CHAT, "messages": [{**turn, name: value}, USER]})
        if isinstance(found, Refusal):
            told(found, f"messages.0.{name}")
        elif name not in ("role", "content"):
            assert isinstance(found, schemas.ChatRequest)
            assert found.messages[0].text == "hello"
    if name not in ("role", "content"):
        for empty in (None, []) if name not in ("name", "refusal", "audio", "function_call") else (None,):
            said = {**CHAT, "messages": [{**turn, name: empty}, USER]}
            assert not isinstance(verdict(schemas.ChatRequest, said), Refusal)


def test_stream_options_and_parts() -> None:
    for name, hint in fields(ChatCompletionStreamOptionsParam).items():
        for value in (*samples(hint), None):
            asked = {**CHAT, "stream": True, "stream_options": {name: value}}
            assert not isinstance(verdict(schemas.ChatRequest, asked), Refusal)
    parts = [{"type": "text", "text": "tell "}, {"type": "text", "text": "me", "annotations": None}]
    found = verdict(schemas.ChatRequest, {**CHAT, "messages": [{"role": "user", "content": parts}]})
    assert isinstance(found, schemas.ChatRequest)
    assert found.messages[0].text == "tell me"
    assert not isinstance(verdict(schemas.ChatRequest, {**CHAT, "messages": [{**USER, "content": []}]}), Refusal)


@pytest.mark.parametrize("role", ["tool", "function", "robot"])
def test_turns_of_others_are_refused_by_name(role: str) -> None:
    found = verdict(schemas.ChatRequest, {**CHAT, "messages": [USER, {"role": role, "content": "4"}]})
    assert isinstance(found, Refusal)
    told(found, "messages.1.role")


# --- against the server itself --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def here(served_run: Path) -> Iterator[Here]:
    backbone, head, guidance = load_parts(served_run)
    with Here(backbone, head, guidance=guidance) as server:
        yield server


@pytest.fixture(scope="module")
def client(here: Here) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{here.url}/v1", api_key="none is asked for", max_retries=0)


def ask(here: Here, kind: str, body: dict[str, Any]) -> httpx.Response:
    path = "/v1/chat/completions" if kind == "chat" else "/v1/completions"
    return httpx.post(f"{here.url}{path}", json=body, timeout=300)


def test_what_does_not_bear_on_the_reply_changes_nothing(here: Here) -> None:
    """All that is taken and not honoured, together."""
    for kind, (params, model, base) in ASKED.items():
        more = {}
        for name, hint in fields(params).items():
            taken = [v for v in samples(hint) if not isinstance(verdict(model, {**base, name: v}), Refusal)]
            if name not in HONOURED and taken:
                more[name] = next((value for value in taken if value), taken[0])
        assert {"user"} <= set(more) if kind == "text" else {"store", "metadata", "user", "prediction"} <= set(more)
        plain, found = ask(here, kind, base), ask(here, kind, {**base, **more})
        assert found.status_code == plain.status_code == 200, found.text
        assert found.json()["choices"] == plain.json()["choices"]
        assert found.json()["usage"] == plain.json()["usage"]


def test_what_the_server_sent_can_be_sent_back(client: openai.OpenAI) -> None:
    messages: list[Any] = [USER]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=4, seed=1)
    reply = answer.choices[0].message
    assert reply.content
    nothing = {"annotations": [], "audio": None, "function_call": None, "tool_calls": None, "refusal": None}
    ways: list[Any] = [
        reply,
        reply.model_dump(),
        reply.to_dict(),
        json.loads(reply.model_dump_json()),
        {"role": "assistant", "content": reply.content, **nothing, "tool_calls": [], "reasoning_content": None},
    ]
    following = set()
    for said in ways:
        asked = [*messages, said, {"role": "user", "content": "and then?"}]
        again = client.chat.completions.create(model="tiny", messages=asked, max_tokens=4, seed=2)
        following.add(again.choices[0].message.content)
        assert again.usage is not None
        assert again.usage.prompt_tokens > answer.usage.prompt_tokens  # type: ignore[union-attr]
    assert len(following) == 1


SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "several": {"n": 2},
    "with alternatives": {"logprobs": True, "top_logprobs": 3},
    "with log-probabilities": {"logprobs": True},
    "best of": {"n": 2, "best_of": 3},
    "stopped": {"stop": ["e", "a", "o", "t"]},
    "guided by a budget": {"guidance": {"mode": "shift", "budget": 2}},
    "unguided": {"model": "tiny-unguided", "temperature": 0},
}


def known(found: Any, model: Any) -> None:
    """No field is one that the client's types do not have, but for ``coala``."""
    for name, value in found:
        if name == "coala":
            continue
        assert name in model.model_fields, name
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, BaseModel):
                known(one, type(one))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", ASKED)
def test_every_answer_is_one_of_the_clients_types(here: Here, kind: str, shape: dict[str, Any]) -> None:
    """In strict mode, whole and as a stream, down to the last field."""
    more = dict(shape)
    if kind == "text" and "logprobs" in more:
        more["logprobs"] = more.pop("top_logprobs", 0)
    body = {**ASKED[kind][2], **more}
    answer = ask(here, kind, body)
    assert answer.status_code == 200, answer.text
    whole: Any = ChatCompletion if kind == "chat" else Completion
    found = whole.model_validate(answer.json(), strict=True)
    known(found, whole)
    part: Any = ChatCompletionChunk if kind == "chat" else Completion
    streamed = ask(here, kind, {**body, "stream": True, "stream_options": {"include_usage": True}})
    lines = [line.removeprefix("data: ") for line in streamed.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    ends = 0
    for line in lines:
        event = json.loads(line)
        for choice in event["choices"]:
            ends += choice["finish_reason"] is not None
            if kind == "text" and choice["finish_reason"] is None:
                choice["finish_reason"] = "stop"  # the protocol has null in a stream, the client's type has not
        known(part.model_validate(event, strict=True), part)
    assert ends == len(found.choices)
    assert event["usage"] == answer.json()["usage"]


def test_models_and_errors_are_of_the_clients_types(here: Here, client: openai.OpenAI) -> None:
    for one in httpx.get(f"{here.url}/v1/models").json()["data"]:
        known(Model.model_validate(one, strict=True), Model)
    for body, status in (({"model": "other"}, 404), ({"n": 0}, 400), ({"tools": [{"type": "function"}]}, 400)):
        answer = ask(here, "chat", {**CHAT, **body})
        assert answer.status_code == status
        ErrorObject.model_validate(answer.json()["error"], strict=True)
    with pytest.raises(openai.BadRequestError, match=r"tools: not supported by this server\. Fix: leave it out"):
        client.chat.completions.create(model="tiny", messages=[USER], tools=[{"type": "function"}])  # type: ignore


def test_samples_are_of_every_kind() -> None:
    """The values that the tests above are made of are not empty ones alone."""
    every = [samples(hint) for params, _, _ in ASKED.values() for hint in fields(params).values()]
    kinds = {type(value) for value in itertools.chain(*every)}
    assert {str, int, float, bool, list, dict, type(None)} <= kinds
    assert min(map(len, every)) >= 1
