"""An endpoint that is not to be trusted: what it sends is bounded, what it echoes is struck out."""

from __future__ import annotations

import gzip
import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import coala.endpoint.transport
from coala.endpoint.transport import LARGEST
from coala.evaluation import JudgeFailure, JudgeStopped, OpenAIJudge, read_instructions
from coala.evaluation.judges import Answer, Patience, asked
from coala.evaluation.judges.endpoint import _loop
from tests.judge_server import JudgeServer, Script, say
from tests.waiting import PATIENCE, skip

KEY = "sk-a+secret/of=mine"
EXCHANGE = asked(["question"], [["one"], ["two"]])
Serve = Callable[[Script], JudgeServer]


@pytest.fixture
def serve() -> Iterator[Serve]:
    servers: list[JudgeServer] = []

    def start(script: Script) -> JudgeServer:
        servers.append(JudgeServer(script))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def judge(url: str, name: str = "pairwise", attempts: int = 1, **options: Any) -> OpenAIJudge:
    patience = Patience(attempts=attempts, first_wait=0.01, timeout=options.pop("timeout", PATIENCE))
    return OpenAIJudge(read_instructions(name), model="m", base_url=url, key=KEY, patience=patience, **options)


def test_redirects_are_not_followed(serve: Serve) -> None:
    other = serve(lambda body, before: say("[[A]]"))
    for status in (301, 302, 307, 308):
        there = f"{other.url}/chat/completions"
        server = serve(lambda body, before, s=status, t=there: {"status": s, "headers": {"Location": t}, "body": b""})  # type: ignore[misc]
        with pytest.raises(JudgeStopped, match="redirects are not followed") as raised:
            judge(server.url).settle(EXCHANGE)
        assert other.url in str(raised.value)
    assert other.requests == []


@pytest.mark.parametrize("status", [200, 400])
def test_compressed_and_oversized_answers_are_not_read(serve: Serve, status: int) -> None:
    bomb = gzip.compress(bytes(64 * 2**20))
    server = serve(lambda body, before: {"status": status, "body": bomb, "headers": {"Content-Encoding": "gzip"}})
    with pytest.raises(JudgeFailure, match="compressed") as raised:
        judge(server.url).settle(EXCHANGE)
    assert raised.value.kind == "not read"
    assert server.headers[0]["accept-encoding"] == "identity"
    large = serve(lambda body, before: {"status": status, "body": b"x" * (LARGEST + 1)})
    with pytest.raises(JudgeFailure, match="over 16 MiB"):
        judge(large.url).settle(EXCHANGE)


@pytest.mark.parametrize(
    ("head", "rest", "words"),
    [
        (b"Transfer-Encoding: chunked", b"10000\r\n" + bytes(0x10000) + b"\r\n", "over 16 MiB"),
        (b"Content-Type: text/event-stream", b"data: {}\n\n" * 1000, "over 16 MiB"),
        (b"Content-Length: 9000000", None, "No whole answer within"),
    ],
    ids=["chunks", "events", "drip"],
)
def test_answers_without_an_end_are_left(
    head: bytes, rest: bytes | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, content = threading.Event(), coala.endpoint.transport._content

    async def watched(response: Any) -> bytes:
        begun.set()
        return await content(response)

    monkeypatch.setattr(coala.endpoint.transport, "_content", watched)
    listening = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        connection, _ = listening.accept()
        with connection:
            connection.recv(2**16)
            try:
                connection.sendall(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n")
                while True:
                    connection.sendall(rest or b" ")
                    if rest is None:
                        assert begun.wait(PATIENCE)
                        skip(_loop(), PATIENCE / 10)
            except OSError:
                return

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    # A byte now and then keeps any wait for the next one short: the whole answer has a limit.
    with pytest.raises(JudgeFailure, match=words):
        judge(url).settle(EXCHANGE)
    listening.close()
    thread.join()


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ({"body": b"<html>hello</html>", "headers": {"Content-Type": "text/html"}}, "it is 'text/html'; expected"),
        ({"body": b"data: {}\n\n", "headers": {"Content-Type": "text/event-stream"}}, "it is 'text/event-stream'"),
        ({"body": b"[" * 200_000}, "not a chat completion"),
        ({"body": b'{"choices": ' + b'{"a":' * 100_000}, "not a chat completion"),
        ({"body": b"9" * 100_000}, "not a chat completion"),
    ],
    ids=["html", "events", "deep list", "deep object", "long number"],
)
def test_what_is_no_completion_is_one_line(serve: Serve, reply: dict[str, Any], words: str) -> None:
    server = serve(lambda body, before: reply)
    with pytest.raises(JudgeFailure, match=words) as raised:
        judge(server.url).settle(EXCHANGE)
    assert raised.value.kind == "malformed"
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300


def test_a_key_that_comes_back_is_struck_out(serve: Serve) -> None:
    for status in (400, 401, 404, 500):
        error = json.dumps({"error": {"message": f"bad key {KEY} in " + "x" * 150 + KEY}}).encode()
        server = serve(lambda body, before, s=status, e=error: {"status": s, "body": e})  # type: ignore[misc]
        with pytest.raises((JudgeFailure, JudgeStopped)) as raised:
            judge(server.url).settle(EXCHANGE)
        assert "***" in str(raised.value)
        assert "secret" not in str(raised.value)
    kept: dict[str, str] = {}

    class Kept:
        def get(self, key: str) -> str | None:
            return kept.get(key)

        def put(self, key: str, answer: str) -> None:
            kept[key] = answer

    server = serve(lambda body, before: say(f"Your header was Bearer {KEY}. [[A]]"))
    assert judge(server.url, keeper=Kept()).settle(EXCHANGE).label == "A"
    (text,) = kept.values()
    assert Answer.from_json(text).text == "Your header was ***. [[A]]"
    password = judge(serve(lambda body, before: {"status": 401, "body": b"{}"}).url.replace("://", "://me:word@"))
    with pytest.raises(JudgeStopped) as stopped:
        password.settle(EXCHANGE)
    assert "word@" not in str(stopped.value)


# --- a limit of tokens -----------------------------------------------------------------------------------------------


def test_a_lower_limit_is_asked_for_kept_and_told(serve: Serve) -> None:
    def script(body: dict[str, Any], before: int) -> dict[str, Any]:
        if body["max_tokens"] > 300:
            said = f"max_tokens comes to {body['max_tokens']}; this server takes at most 300 tokens a reply."
            return {"status": 400, "body": json.dumps({"error": {"message": said}}).encode()}
        return say("[[A]]")

    server = serve(script)
    asks = judge(server.url)
    for i in range(3):
        assert asks.settle(asked([f"question {i}"], [["one"], ["two"]])).label == "A"
    # Refused once, and remembered.
    assert [body["max_tokens"] for body in server.requests] == [1024, 300, 300, 300]
    assert asks.cost.calls == 4
    (remark,) = asks.remarks
    assert "at most 300 tokens" in remark
    assert "1,024" in remark
    # A server that is never content is a failure with its words, after a few tries.
    stubborn = serve(
        lambda body, before: {"status": 400, "body": b'{"error": {"message": "max_tokens is too large for me"}}'}
    )
    with pytest.raises(JudgeFailure, match="too large for me") as raised:
        judge(stubborn.url).settle(EXCHANGE)
    assert raised.value.kind == "rejected"
    assert [body["max_tokens"] for body in stubborn.requests] == [1024, 512, 256, 128, 64]


def test_parts_and_reasoning_are_read_for_what_they_are(serve: Serve) -> None:
    def with_message(**message: Any) -> dict[str, Any]:
        document = json.loads(say("")["body"])
        document["choices"][0]["message"] |= message
        return {"body": json.dumps(document).encode()}

    parts = [{"type": "thinking", "thinking": "[[B]]"}, {"type": "text", "text": "[[A]]"}]
    server = serve(lambda body, before: with_message(content=parts))
    assert judge(server.url).settle(EXCHANGE).label == "A"
    for field in ("reasoning_content", "reasoning"):
        server = serve(lambda body, before, f=field: with_message(content=None, **{f: "so [[A]]"}))  # type: ignore[misc]
        with pytest.raises(JudgeFailure, match="thought and said nothing"):
            judge(server.url).settle(EXCHANGE)
        server = serve(lambda body, before, f=field: with_message(content="[[B]]", **{f: "so [[A]]"}))  # type: ignore[misc]
        assert judge(server.url).settle(EXCHANGE).label == "B"
