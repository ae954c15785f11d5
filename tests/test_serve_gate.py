"""What the server refuses and how: bad input, strangers, too much, too slow. It stays up, and never shows a trace."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coala.alignment import load_parts
from coala.serve import Limits
from coala.serve.gate import HEADERS

from .serving import Here
from .waiting import PATIENCE, wait_for

JSON = {"Content-Type": "application/json"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
KEY = "a key that is hard to guess"
POSTED = ("/v1/chat/completions", "/v1/completions", "/v1/score", "/v1/rerank")


@pytest.fixture(scope="module")
def parts(served_run: Path) -> Any:
    return load_parts(served_run)


@pytest.fixture(scope="module")
def here(parts: Any) -> Iterator[Here]:
    limits = Limits(max_rows=16, max_body=60_000, max_tokens=50, max_texts=9, body_time=PATIENCE, head_time=PATIENCE)
    with Here(*parts[:2], limits) as server:
        yield server
        assert server.worker.failures == 0
        assert server.worker.unfinished == 0


def refused(answer: httpx.Response, *statuses: int) -> dict[str, Any]:
    """The error object of an answer that must be a refusal, with all headers and no word of the program."""
    assert answer.status_code in (statuses or range(400, 500)), answer.text
    assert {name: answer.headers.get(name) for name in HEADERS} == HEADERS
    assert answer.headers["content-type"] == "application/json"
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].endswith(".")
    assert error["type"].endswith("_error")
    for word in ("Traceback", "File ", "pydantic", "site-packages", "coala."):
        assert word not in answer.text
    return error


def serves(here: Here) -> bool:
    return httpx.post(f"{here.url}/v1/chat/completions", json=CHAT, timeout=PATIENCE).status_code == 200


# --- bad input ------------------------------------------------------------------------------------------------------

WRONG = [
    ({"temperature": -1}, "temperature"),
    ({"temperature": 2.5}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -5}, "max_tokens"),
    ({"max_tokens": 51}, "max_tokens"),
    ({"max_completion_tokens": 10**30}, "max_completion_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"best_of": 999}, "best_of"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**64}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": [""]}, "stop.0"),
    ({"stop": {"a": 1}}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"logprobs": 3}, "logprobs"),
    ({"top_logprobs": 21}, "top_logprobs"),
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": "x"}] * 1001}, "messages"),
    ({"frequency_penalty": 0.5}, "frequency_penalty"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format.type"),
    ({"guidance": "strong"}, "guidance"),
    ({"guidance": {"mode": "magic"}}, "guidance.mode"),
    ({"guidance": {"strength": -1}}, "guidance.strength"),
    ({"guidance": {"strength": 1e300}}, "guidance.strength"),
    ({"guidance": {"candidates": 17}}, "guidance.candidates"),
    ({"guidance": {"budget": 3}}, "guidance"),
    ({"guidance": {"mode": "token", "budget": 3}}, "guidance"),
    ({"guidance": {"power": 3}}, "guidance.power"),
    ({"guidance": {"mode": "block"}, "temperature": 0}, None),
    ({"unheard_of": 1}, "unheard_of"),
    ({"model": "gpt-4"}, "model"),
    ({"model": "../../etc/passwd"}, "model"),
    ({"model": ""}, "model"),
    ({"model": None}, "model"),
]


def bounds_of(settings: Any) -> dict[str, dict[str, Any]]:
    """By setting, the bounds and choices of its JSON schema."""
    names = ("minimum", "exclusiveMinimum", "maximum", "enum")
    found = {}
    for name, about in TypeAdapter(settings).json_schema()["properties"].items():
        entries = [about, *about.get("anyOf", ())]
        found[name] = {key: entry[key] for entry in entries for key in names if key in entry}
    return found


def test_a_request_guides_within_the_bounds_of_a_recipe() -> None:
    from coala.serve.schemas import GuidanceSettings as OfRequests
    from coala.settings import GuidanceSettings

    recipe, request = bounds_of(GuidanceSettings), bounds_of(OfRequests)
    assert list(recipe) == [*request, "rater"]  # whose head it is: loaded once, with the server
    assert sum(map(len, recipe.values())) > 8
    for name in request:
        assert recipe[name].items() <= request[name].items(), name


@pytest.mark.parametrize(("change", "param"), WRONG, ids=lambda value: str(value)[:50])
def test_fields_that_do_not_fit_are_named(here: Here, change: dict[str, Any], param: str | None) -> None:
    error = refused(httpx.post(f"{here.url}/v1/chat/completions", json={**CHAT, **change}), 400, 404)
    assert (error["param"] or "").startswith(param or ""), error
    assert error["param"] is None or param is not None


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400"])
@pytest.mark.parametrize("name", ["temperature", "top_p", "max_tokens", "seed", "strength"])
def test_numbers_that_are_none(here: Here, name: str, number: str) -> None:
    field = f'"guidance": {{"strength": {number}}}' if name == "strength" else f'"{name}": {number}'
    text = json.dumps({k: v for k, v in CHAT.items() if k != name})[:-1] + f", {field}}}"
    refused(httpx.post(f"{here.url}/v1/chat/completions", content=text, headers=JSON), 400)


BODIES = {
    "empty": b"",
    "cut": b'{"model": "tiny"',
    "words": b"hello",
    "list": b"[]",
    "null": b"null",
    "number": b"7",
    "deep": b"[" * 19_000,
    "deep objects": b'{"a":' * 3_900,
    "not utf-8": b'{"model": "\xff\xfe"}',
    "utf-16": json.dumps(CHAT).encode("utf-16"),
    "overlong": b'{"model": "\xc0\xaf"}',
    "many digits": b'{"seed": ' + b"9" * 10_000 + b"}",
    "nul": b"\x00",
}


@pytest.mark.parametrize("path", POSTED)
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_bodies_that_are_no_request(here: Here, path: str, body: bytes) -> None:
    refused(httpx.post(f"{here.url}{path}", content=body, headers=JSON), 400)


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
def test_text_that_is_no_text(here: Here, text: str) -> None:
    for path, body in (
        (POSTED[0], {**CHAT, "messages": [{"role": "user", "content": text}]}),
        (POSTED[0], {**CHAT, "stop": text}),
        (POSTED[1], {"model": "tiny", "prompt": text}),
        (POSTED[2], {"model": "tiny", "prompt": "x", "replies": [text]}),
        (POSTED[3], {"model": text, "query": "x", "documents": ["x"]}),
    ):
        refused(httpx.post(f"{here.url}{path}", content=json.dumps(body), headers=JSON), 400)


def test_what_no_template_can_break(here: Here) -> None:
    """Control characters, markup and special tokens are text like any other."""
    for text in (
        "\x00\x01\x1b[31m",
        "<script>alert(1)</script>",
        "<|endoftext|>",
        "{{ 7 * 7 }}",
        "\u202e\u200b",
        "🙂" * 50,
    ):
        body = {**CHAT, "messages": [{"role": "user", "content": text}]}
        answer = httpx.post(f"{here.url}/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "application/json"


def test_a_prompt_beyond_the_context_is_refused_and_one_that_just_fits_is_not(here: Here, parts: Any) -> None:
    from coala.values import user

    context = parts[0].max_tokens
    word = " friend"
    text = "a" + word * 700
    assert len(parts[0].render(user(text), max_tokens=10**6).tokens) < context
    answer = httpx.post(
        f"{here.url}/v1/completions", json={"model": "tiny", "prompt": text, "max_tokens": 2}, timeout=PATIENCE
    )
    assert answer.status_code == 200
    long = {"model": "tiny", "prompt": "日" * 6000, "max_tokens": 2, "stream": True}
    error = refused(httpx.post(f"{here.url}/v1/completions", json=long), 400)
    assert error["code"] == "context_length_exceeded"


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(POSTED),
    body=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda some: (
            st.lists(some, max_size=3)
            | st.dictionaries(
                st.sampled_from(["model", "messages", "prompt", "n", "guidance", "query", "documents"]), some
            )
        ),
        max_leaves=8,
    ),
)
def test_no_body_is_an_error_of_ours(here: Here, path: str, body: Any) -> None:
    refused(httpx.post(f"{here.url}{path}", content=json.dumps(body), headers=JSON), 400, 404)


# --- addresses ------------------------------------------------------------------------------------------------------


def raw(here: Here, head: str, body: bytes = b"") -> str:
    """What a hand-written request is answered; clients would tidy it."""
    with socket.create_connection(("127.0.0.1", here.port), PATIENCE) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode("latin-1") + b"\r\n\r\n" + body)
        found = b""
        while chunk := connection.recv(65536):
            found += chunk
        return found.decode("latin-1")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models/../../../etc/passwd",
        "/v1/models/..%2f..%2fetc%2fpasswd",
        "/v1/models/%00",
        "/v1/models/%ff%fe",
        "/v1/models/tiny%0d%0aX-Evil:%201",
        "/v1/models/" + "a" * 5000,
        "/v1/models/tiny/",
        "/v1/models/tiny%20",
        "//etc/passwd",
        "/playground.js/../app.py",
        "/pages/playground.html",
        "/docs",
        "/redoc",
        "/v1",
        "/v1/",
    ],
)
def test_addresses_that_lead_nowhere(here: Here, path: str) -> None:
    said = raw(here, f"GET {path} HTTP/1.1\nHost: localhost\nConnection: close")
    assert said.startswith("HTTP/1.1 404"), said[:100]
    assert '"error"' in said
    assert "root:" not in said
    assert "X-Evil" not in said.partition("\r\n\r\n")[0]


def test_methods_that_an_address_does_not_take(here: Here) -> None:
    for method, path in (("GET", POSTED[0]), ("DELETE", "/v1/models/tiny"), ("PUT", "/"), ("POST", "/healthz")):
        answer = httpx.request(method, f"{here.url}{path}")
        refused(answer, 405)
        assert answer.headers["allow"]
    assert raw(here, "BREW / HTTP/1.1\nHost: localhost\nConnection: close").startswith("HTTP/1.1 405")
    for request in ("GET\n", "\x16\x03\x01", "GET / HTTP/1.1\nHost: a\nContent-Length: x"):
        assert raw(here, request).startswith("HTTP/1.1 400")
    assert serves(here)


# --- strangers ------------------------------------------------------------------------------------------------------


def test_keys(parts: Any) -> None:
    with Here(*parts[:2], key=KEY, local=False) as here:
        for header in (
            {},
            {"Authorization": "Bearer"},
            {"Authorization": "Bearer wrong"},
            {"Authorization": f"Bearer {KEY}x"},
            {"Authorization": f"Basic {KEY}"},
            {"Authorization": KEY},
            {"Authorization": b"Bearer \xff\xfe"},
        ):
            for path in (*POSTED, "/v1/models", "/v1/models/tiny", "/metrics", "/v1/nowhere"):
                method = "POST" if path in POSTED else "GET"
                answer = httpx.request(method, f"{here.url}{path}", headers=header)  # type: ignore[arg-type]
                error = refused(answer, 401)
                assert error["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
                assert KEY not in answer.text
        right = {"Authorization": f"bearer {KEY}"}
        assert httpx.get(f"{here.url}/v1/models", headers=right).status_code == 200
        assert httpx.get(f"{here.url}/metrics", headers=right).status_code == 200
        assert httpx.post(f"{here.url}{POSTED[0]}", json=CHAT, headers=right).status_code == 200
        assert httpx.get(f"{here.url}/healthz").status_code == 200
        assert KEY not in httpx.get(here.url).text
        # A server with a key answers under any name.
        assert httpx.get(f"{here.url}/healthz", headers={"Host": "models.example"}).status_code == 200
        schema = httpx.get(f"{here.url}/openapi.json").json()
        assert schema["paths"]["/v1/score"]["post"]["security"]


def test_pages_of_other_sites_reach_nothing(here: Here) -> None:
    body = json.dumps(CHAT)
    for path in ("/", "/v1/models", "/healthz"):  # a name that leads here by DNS rebinding
        refused(httpx.get(f"{here.url}{path}", headers={"Host": "evil.example"}), 403)
    for host in ("127.0.0.1.evil.example", "localhost.evil.example:80", "[::2]", "[::1].evil.example", "evil"):
        refused(httpx.get(f"{here.url}/", headers={"Host": host}), 403)
    for host in ("localhost", "localhost:8000", "127.0.0.1", "[::1]:8000", "LOCALHOST"):
        assert httpx.get(f"{here.url}/", headers={"Host": host}).status_code == 200
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):  # sent without asking
        answer = httpx.post(f"{here.url}{POSTED[0]}", content=body, headers={"Content-Type": kind})
        refused(answer, 415)
    for site in ("cross-site", "same-site"):
        refused(httpx.post(f"{here.url}{POSTED[0]}", content=body, headers={**JSON, "Sec-Fetch-Site": site}), 403)
    for origin in ("http://evil.example", "null", "http://localhost:1"):
        refused(httpx.post(f"{here.url}{POSTED[0]}", content=body, headers={**JSON, "Origin": origin}), 403)
    assert httpx.post(f"{here.url}{POSTED[0]}", content=body, headers={**JSON, "Origin": here.url}).status_code == 200
    preflight = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    answer = httpx.options(f"{here.url}{POSTED[0]}", headers=preflight)
    refused(answer, 405)
    assert not any(name.startswith("access-control") for name in answer.headers)


# --- too much, too slow ---------------------------------------------------------------------------------------------


def test_large_bodies(here: Here) -> None:
    large = json.dumps({**CHAT, "user": "x" * 60_000}).encode()
    refused(httpx.post(f"{here.url}{POSTED[0]}", content=large, headers=JSON), 413)
    refused(httpx.post(f"{here.url}{POSTED[0]}", content=iter([large[:9], large[9:]]), headers=JSON), 413)
    # A client that asks first is told before it sends.
    head = f"POST {POSTED[0]} HTTP/1.1\nHost: localhost\nContent-Type: application/json\nExpect: 100-continue"
    assert raw(here, f"{head}\nContent-Length: 999999999").startswith("HTTP/1.1 413")
    # One that sends for ever is not read for ever.
    endless = (b"x" * 10_000 for _ in range(10_000))
    with suppress(httpx.TransportError):  # it may be hung up on while it sends
        refused(httpx.post(f"{here.url}{POSTED[0]}", content=endless, headers=JSON), 413)
    for encoding in ("gzip", "deflate", "br"):
        refused(httpx.post(f"{here.url}{POSTED[0]}", content=b"x", headers={**JSON, "Content-Encoding": encoding}), 415)
    assert serves(here)


def test_more_than_the_limits(here: Here) -> None:
    for path, body in (
        ("/v1/score", {"model": "tiny", "prompt": "x", "replies": ["x"] * 10}),
        ("/v1/rerank", {"model": "tiny", "query": "x", "documents": ["x"] * 10}),
        ("/v1/completions", {"model": "tiny", "prompt": ["x"] * 9}),
        ("/v1/score", {"model": "tiny-unguided", "prompt": "x", "replies": ["x"]}),
        ("/v1/score", {"model": "tiny", "prompt": "x", "replies": []}),
    ):
        refused(httpx.post(f"{here.url}{path}", json=body), 400)


@pytest.mark.parametrize("sent", ["", "GET / HT", "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nX-A: "])
def test_clients_that_never_finish_their_headers_are_hung_up_on(here: Here, sent: str) -> None:
    with socket.create_connection(("127.0.0.1", here.port), PATIENCE) as connection:
        connection.sendall(sent.encode())
        for _ in range(4):  # byte after byte: each is read, none buys more time
            # Who is served comes after this connection in the queue of new ones.
            assert httpx.get(f"{here.url}/healthz", timeout=PATIENCE).status_code == 200
            connection.setblocking(False)
            with pytest.raises(BlockingIOError):
                connection.recv(1)
            connection.settimeout(PATIENCE)
            if sent:
                connection.sendall(b"a")
            here.skip(0.24 * PATIENCE)
        here.skip(0.05 * PATIENCE)
        with suppress(ConnectionResetError):
            assert connection.recv(1) == b""


def test_a_body_that_does_not_come(here: Here) -> None:
    head = f"POST {POSTED[0]} HTTP/1.1\nHost: localhost\nContent-Type: application/json\nContent-Length: 100"
    whole = head.replace("\n", "\r\n").encode() + b'\r\n\r\n{"model":'
    with socket.create_connection(("127.0.0.1", here.port), PATIENCE) as connection:
        connection.sendall(whole)
        assert serves(here)
        here.skip(PATIENCE)
        assert connection.recv(12) == b"HTTP/1.1 408"
    with socket.create_connection(("127.0.0.1", here.port), PATIENCE) as connection:  # or stops half way
        connection.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n{")
    assert serves(here)


def test_a_client_that_does_not_read_is_given_up(parts: Any) -> None:
    """What it left unread is bounded, and so is the time that its replies are kept for."""
    with Here(*parts[:2], Limits(read_time=0.5, max_tokens=3000)) as here:
        body = json.dumps(
            {
                **CHAT,
                "max_tokens": 3000,
                "stream": True,
                "logprobs": True,
                "top_logprobs": 20,
                "n": 4,
                "guidance": "none",
            }
        )
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", here.port))
            head = f"POST {POSTED[0]} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            wait_for(lambda: here.worker.unfinished == 4)
            wait_for(lambda: here.worker.unfinished == 0)
        assert serves(here)


# --- by its own description -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.nightly
def test_schemathesis_finds_nothing(parts: Any, tmp_path: Path) -> None:
    """Requests that fit the OpenAPI document are taken, others refused, and every answer is as the document says."""
    pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    with Here(*parts[:2], Limits(max_tokens=8)) as here:
        command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run"]
        done = subprocess.run(
            [*command, f"{here.url}/openapi.json", "-n", "40", "--phases", "coverage,fuzzing", "--seed", "7"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=PATIENCE,
            env={**os.environ, "NO_COLOR": "1"},
            check=False,
        )
        assert done.returncode == 0, done.stdout[-4000:]
        assert "8 selected / 8 total" in done.stdout
        assert here.worker.failures == 0
