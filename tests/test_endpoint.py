"""The client of chat servers: answers as servers write them, proxies, waits, a ledger, keys and limits of tokens."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import threading
from contextlib import suppress
from typing import Any

import pytest

import coala.endpoint.client
from coala.endpoint import (
    Client,
    Completion,
    Ledger,
    OutOfBudget,
    RequestFailed,
    RetryPolicy,
    Server,
    Usage,
    bare,
    change_for,
    is_loopback,
)
from coala.endpoint.secrets import strike
from coala.endpoint.transport import Answer, Connections, Unanswered
from coala.values import CoalaError
from tests.judge_server import JudgeServer, say
from tests.waiting import PATIENCE, Clock

KEY = "sk-a+secret/of=mine"

# --- HTTP --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", b"abc"),
        (
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"2\r\nab\r\n1;x\r\nc\r\n0\r\nt: 1\r\n\r\n",
            b"abc",
        ),
        (b"HTTP/1.0 200 OK\r\n\r\nabc", b"abc"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
        (b"SSH-2.0\r\n\r\n", None),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -3\r\n\r\nabc", None),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\nabc", None),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nabc", None),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", None),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", None),
        (b"", None),
        (b"\xff" * 3_000_000, None),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc", None),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: identity\r\nContent-Length: 3\r\n\r\nabc", b"abc"),
        (b"HTTP/1.1 103 Early Hints\r\n\r\n" * 40 + b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b""),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\na\r\n" * 5000 + b"0\r\n\r\n", b"a" * 5000),
    ],
)  # fmt: skip
def test_answers_as_servers_write_them(raw: bytes, body: bytes | None) -> None:
    async def main() -> Answer:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(raw)
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        connections = Connections()
        try:
            port = server.sockets[0].getsockname()[1]
            return await connections.post(Server.of(f"http://127.0.0.1:{port}/x"), b"{}", 2.0)
        finally:
            await connections.close()
            server.close()

    if body is None:
        with pytest.raises(Unanswered) as raised:
            asyncio.run(main())
        assert raised.value.sent
    else:
        assert asyncio.run(main()).body == body


def test_interim_answers_without_an_end_are_left() -> None:
    async def main() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            with suppress(ConnectionError):
                while True:
                    writer.write(b"HTTP/1.1 103 Early Hints\r\n\r\n")
                    await writer.drain()

        server, connections = await asyncio.start_server(serve, "127.0.0.1", 0), Connections()
        port = server.sockets[0].getsockname()[1]
        try:
            await connections.post(Server.of(f"http://127.0.0.1:{port}"), b"{}", 0.2)
        finally:
            await connections.close()
            server.close()

    with pytest.raises(Unanswered, match=r"no answer within 0\.2 s") as raised:
        asyncio.run(main())
    assert raised.value.kind == "timeout"


# --- when to send again, and what it may take --------------------------------------------------------------------


class Scripted:
    """Answers in turn, the last one again and again; ``bodies`` is what arrived."""

    def __init__(self, *answers: Answer | Unanswered) -> None:
        self.answers, self.bodies = list(answers), list[bytes]()

    async def __call__(self, server: Server, body: bytes, timeout: float) -> Answer:
        self.bodies.append(body)
        await Clock().asleep(0)  # others may come in between
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Unanswered):
            raise answer
        return answer


GOOD = Answer(200, {}, say("yes", tokens=(7, 3))["body"])
SERVER = Server("http://127.0.0.1/v1/chat/completions", {})


def busy(**headers: str) -> Answer:
    return Answer(503, {name.replace("_", "-"): value for name, value in headers.items()}, b"busy")


def cost(found: Completion | None) -> Usage:
    return Usage(uncertain=20) if found is None else Usage(found.prompt_tokens or 0, found.completion_tokens or 0)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits of clients, which take no time; the clock stands at 1000 s of 1970."""
    made: list[float] = []

    async def pause(client: Client, seconds: float) -> None:
        made.append(seconds)
        clock.move(seconds)

    clock = Clock()
    monkeypatch.setattr(coala.endpoint.client, "time", clock)
    monkeypatch.setattr(Client, "_pause", pause)
    return made


def ask(post: Scripted, policy: RetryPolicy | None = None, ledger: Ledger | None = None, **request: Any) -> Completion:
    async def main() -> Completion:
        client = Client(policy or RetryPolicy(), ledger or Ledger((None, None, None)), post=post)
        return await client.ask(SERVER, request, cost)

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry_after": "3"}, 3.0),
        ({"retry_after_ms": "1500", "retry_after": "3"}, 1.5),
        ({"retry_after": "-4"}, 0.0),
        ({"retry_after": "Thu, 01 Jan 1970 00:16:50 GMT"}, 10.0),
        ({"retry_after": "Thu, 01 Jan 1970 00:16:50 -0000"}, 10.0),
        ({"retry_after": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0.0),
        ({"retry_after": "9" * 30}, 86_400.0),
        *(({"retry_after": text}, None) for text in ("", "soon", "nan", "inf", "Thu, 99 Jan 1970 00:00:00 GMT")),
    ],
)
def test_retry_after_in_every_form(headers: dict[str, str], seconds: float | None, waits: list[float]) -> None:
    assert ask(Scripted(busy(**headers), GOOD), RetryPolicy(first_wait=0.1)).text == "yes"
    (wait,) = waits
    if seconds is None:
        assert 0.05 <= wait <= 0.1
    else:
        # A little longer, lest all who were refused come back at once.
        assert seconds <= wait <= seconds + min(0.1, 0.1 * seconds)


def test_waits_double_up_to_the_longest_and_are_spread(waits: list[float]) -> None:
    policy = RetryPolicy(attempts=9, first_wait=1.0, longest_wait=20.0)
    with pytest.raises(RequestFailed) as raised:
        ask(Scripted(busy()), policy, seed=1)
    assert (raised.value.attempts, raised.value.kind, raised.value.said) == (9, "server error", "busy")
    first = list(waits)
    assert all(0.5 * most <= wait <= most for wait, most in zip(first, (1, 2, 4, 8, 16, 20, 20, 20), strict=True))
    waits.clear()
    with pytest.raises(RequestFailed):
        ask(Scripted(busy()), policy, seed=1)
    assert waits == first  # a function of the request
    waits.clear()
    with pytest.raises(RequestFailed):
        ask(Scripted(busy()), policy, seed=2)
    assert len({*waits, *first}) == 16


def test_what_asks_for_too_long_or_cannot_pass_fails_at_once(waits: list[float]) -> None:
    quota = Answer(429, {}, b'{"error": {"code": "insufficient_quota"}}')
    for answer in (busy(retry_after="61"), quota, Answer(400, {}, b""), Unanswered("not read", "too large", sent=True)):
        with pytest.raises(RequestFailed) as raised:
            ask(Scripted(answer, GOOD), RetryPolicy(longest_asked=60.0))
        assert raised.value.attempts == 1
    assert waits == []
    for status in (408, 409, 425, 429, 500, 501, 503, 529):
        assert ask(Scripted(Answer(status, {}, b""), GOOD)).text == "yes"


@pytest.mark.parametrize(
    ("trouble", "spent"),
    [
        (busy(), 0),
        (Unanswered("connection", "refused", sent=False), 0),
        (Unanswered("timeout", "no answer", sent=True), 20),
        (Answer(200, {}, b"{"), 20),
    ],
    ids=["refused", "not sent", "sent", "torn"],
)
def test_a_ledger_counts_what_may_have_been_carried_out(
    trouble: Answer | Unanswered, spent: int, waits: list[float]
) -> None:
    ledger = Ledger((None, 1000, None))
    assert ask(Scripted(trouble, GOOD), ledger=ledger).completion_tokens == 3
    assert (ledger.spent, ledger.reserved) == ((2, spent + 10, 0), (0, 0, 0))


@pytest.mark.parametrize(
    ("limit", "most", "name"),
    [((5, None, None), 5, "calls"), ((None, 64, None), 5, "tokens"), ((None, 1, None), 0, "tokens")],
)
def test_many_at_a_time_never_pass_a_limit(limit: Any, most: int, name: str) -> None:
    async def main() -> tuple[list[Any], Ledger]:
        ledger, post = Ledger(limit), Scripted(GOOD)
        client = Client(RetryPolicy(), ledger, post=post)
        asked = [client.ask(SERVER, {"n": n}, cost) for n in range(12)]
        return await asyncio.gather(*asked, return_exceptions=True), ledger

    found, ledger = asyncio.run(main())
    short = [one for one in found if isinstance(one, OutOfBudget)]
    # Those who wait for others to settle are served, as long as what is left may pay for them: 20 are set aside of 64.
    assert len(found) - len(short) == ledger.spent[0] == most
    assert {one.args[0] for one in short} == {name}
    assert ledger.reserved == (0, 0, 0)


# --- keys and addresses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["", "x", "host/v1", "ftp://h/v1", "http:///v1", "http://h:x/v1", "http://h\n/v1"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(CoalaError, match="is not an address"):
        Server.of(url)


def test_who_is_asked_and_as_whom() -> None:
    server = Server.of("http://me:w%40rd@h/v1/?api-version=3", headers={"OpenAI-Project": "p"})
    assert server.url == "http://h/v1/chat/completions?api-version=3"
    assert server.headers["Authorization"] == "Basic " + base64.b64encode(b"me:w@rd").decode()
    assert server.headers["OpenAI-Project"] == "p"
    assert Server.of("http://me:word@h/v1", KEY).headers["Authorization"] == f"Bearer {KEY}"
    assert "Authorization" not in Server.of("http://h/v1").headers
    assert bare("http://me:word@h/v1") == "http://h/v1"


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("http://localhost:8000/v1", True),
        ("http://127.0.0.5/v1", True),
        ("http://[::1]:8000/v1", True),
        ("http://127.0.0.1.example/v1", False),
        ("http://localhost@api.example/v1", False),
    ],
)
def test_what_leads_to_this_machine(url: str, here: bool) -> None:
    assert is_loopback(url) is here


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("http", "https", "all", "no"):
        monkeypatch.delenv(f"{name}_proxy", raising=False)
        monkeypatch.delenv(f"{name.upper()}_PROXY", raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("variables", "url", "proxy"),
    [
        ({}, "http://api.example/v1", None),
        ({"HTTP_PROXY": "http://p:1"}, "http://api.example/v1", "http://p:1"),
        ({"http_proxy": "p:1"}, "http://api.example/v1", "http://p:1"),
        ({"HTTP_PROXY": "http://p:1"}, "https://api.example/v1", None),
        ({"HTTPS_PROXY": "http://me:word@p:1"}, "https://api.example/v1", "http://me:word@p:1"),
        ({"ALL_PROXY": "http://p:1"}, "https://api.example/v1", "http://p:1"),
        ({"ALL_PROXY": "http://p:1", "NO_PROXY": "other.example,api.example"}, "https://api.example/v1", None),
        ({"ALL_PROXY": "http://p:1", "NO_PROXY": ".example"}, "https://api.example/v1", None),
        ({"ALL_PROXY": "http://p:1"}, "http://127.0.0.1:8000/v1", None),
        ({"ALL_PROXY": "http://p:1"}, "http://localhost:8000/v1", None),
    ],
)
def test_proxies_are_those_of_the_environment(
    variables: dict[str, str], url: str, proxy: str | None, environment: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    assert Server.of(url).proxy == proxy


def test_other_proxies_are_refused_without_their_password(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("ALL_PROXY", "socks5://me:word@p:1")
    with pytest.raises(CoalaError, match=r"the proxy socks5://p:1 for api\.example; expected one of http"):
        Server.of("https://api.example/v1")


def test_requests_go_through_a_proxy(environment: pytest.MonkeyPatch) -> None:
    async def main(url: str) -> Answer:
        connections = Connections()
        try:
            return await connections.post(Server.of(url), b"{}", PATIENCE)
        finally:
            await connections.close()

    proxy = JudgeServer(lambda body, before: say("by way of the proxy"))
    environment.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1").replace("://", "://me:word@"))
    answer = asyncio.run(main("http://api.invalid/v1"))
    assert json.loads(answer.body)["choices"][0]["message"]["content"] == "by way of the proxy"
    assert proxy.headers[0]["host"] == "api.invalid"
    assert proxy.headers[0]["proxy-authorization"] == "Basic " + base64.b64encode(b"me:word").decode()
    proxy.close()

    # What is encrypted passes through a tunnel, and the key is not shown to the proxy.
    listening, seen = socket.create_server(("127.0.0.1", 0)), list[bytes]()

    def refuse() -> None:
        connection, _ = listening.accept()
        with connection:
            seen.append(connection.recv(2**16))
            connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")

    thread = threading.Thread(target=refuse, daemon=True)
    thread.start()
    environment.setenv("HTTPS_PROXY", f"http://127.0.0.1:{listening.getsockname()[1]}")
    with pytest.raises(Unanswered) as raised:
        asyncio.run(main("https://api.invalid/v1"))
    assert (raised.value.kind, raised.value.sent) == ("connection", False)
    thread.join()
    listening.close()
    assert seen[0].startswith(b"CONNECT api.invalid:443 ")


def test_striking_knows_the_forms_of_a_key_and_leaves_words_alone() -> None:
    from urllib.parse import quote

    forms = [KEY, quote(KEY, safe=""), base64.b64encode(KEY.encode()).decode(), f"Bearer {KEY}"]
    for form in forms:
        assert strike(f"<{form}>", [KEY]).removesuffix(">").rstrip("=") == "<***"
    assert strike("a bookkeeper", ["", "k", "none"]) == "a bookkeeper"
    assert strike("Authorization: Bearer k", ["k"]) == "Authorization: ***"


# --- a limit of tokens -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "name", "limit", "lasts"),
    [
        ("max_tokens comes to 2048; this server takes at most 1024 tokens a reply.", "max_tokens", 1024, True),
        ("max_tokens is too large: 2048. This model supports at most 900 completion tokens", "max_tokens", 900, True),
        ("max_tokens: Input should be less than or equal to 1,024", "max_tokens", 1024, True),
        ("max_tokens is too large", "max_tokens", 1024, True),
        (
            "'max_tokens' or 'max_completion_tokens' is too large: 2048. This model's maximum context length is 2048 "
            "tokens and your request has 800 input tokens (2048 > 2048 - 800).",
            "max_tokens",
            1248,
            False,
        ),
        (
            "This model's maximum context length is 4097 tokens. However, you requested 5048 tokens (3000 in the "
            "messages, 2048 in the completion).",
            "max_tokens",
            1097,
            False,
        ),
        (
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' "
            "instead.",
            "max_completion_tokens",
            2048,
            True,
        ),
    ],
)
def test_refusals_name_what_to_ask(words: str, name: str, limit: int, lasts: bool) -> None:
    request = {"model": "m", "max_tokens": 2048, "temperature": 0}
    change = change_for(words, request)
    assert change is not None
    assert (change.name, change.limit, change.lasts) == (name, limit, lasts)
    assert change.applied(request) == {"model": "m", "temperature": 0, name: limit}


@pytest.mark.parametrize(
    "words",
    [
        "The prompt has 9031 tokens; the model's context holds 8192, so the reply has no room.",
        "temperature: 3 is more than 2",
        "seed is not supported",
        "",
    ],
)
def test_other_refusals_change_nothing(words: str) -> None:
    assert change_for(words, {"max_tokens": 2048}) is None
    assert change_for("max_tokens is too large", {}) is None
