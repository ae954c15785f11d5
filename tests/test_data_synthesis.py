"""Synthesis against a real HTTP server on loopback that fails in every way: nothing lost, doubled or overspent."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import coala.endpoint.client
from coala.cli import app
from coala.data import read_pairs
from coala.data.agents import Agent, Draw, SynthesisError, SynthesisLimits, SynthesisRecipe, draw, instructions
from coala.data.endpoint import TOKENS_PER_MESSAGE, TOKENS_PER_REQUEST
from coala.data.journal import Journal, read_journal
from coala.data.screening import cleaned, fault
from coala.data.synthesis import Summary, synthesize
from coala.data.synthesis_file import keys_of
from coala.endpoint import Client, Post, Server, Usage
from coala.endpoint.transport import Answer, Connections, Unanswered
from coala.values import CoalaError
from tests.waiting import PATIENCE, Clock, wait_for

# --- the endpoint ------------------------------------------------------------------------------------------------

SENTENCE = "the sum of two angles is found when you draw a line from one corner and count what is left on each side"
WORDS = SENTENCE.split()


def scripted(request: dict[str, Any]) -> tuple[str, str]:
    """Words and finish reason: a function of the request alone. A few are empty, refused, cut or out of role."""
    raw = json.dumps([request["model"], request["messages"], request["temperature"], request["seed"]]).encode()
    key = hashlib.sha256(raw).digest()
    words = " ".join(WORDS[byte % len(WORDS)] for byte in key[:20]) + f" ({key[:6].hex()})"
    match key[30] if request.get("faulty", True) else 255:
        case 0 | 1:
            return "", "stop"
        case 2 | 3:
            return "I'm sorry, but I can't assist with that.", "stop"
        case 4 | 5:
            return f"{words}\nStudent: yes\nTutor: {words}", "stop"
        case 6 | 7:
            return words, "length"
    return words, "stop"


def billed(request: dict[str, Any], text: str) -> tuple[int, int]:
    prompt = sum(len(m["content"]) // 4 + 5 for m in request["messages"]) + 7
    return prompt, min(request["max_tokens"], len(text) // 4 + 1)


class Scripted(asyncio.Protocol):
    """HTTP/1.1 with keep-alive; ``house`` holds what is counted and decides which first requests fail, and how."""

    def __init__(self, house: House) -> None:
        self.house, self.buffer = house, b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].lower()
            size = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
            if len(self.buffer) < end + 4 + size:
                return
            body, self.buffer = self.buffer[end + 4 : end + 4 + size], self.buffer[end + 4 + size :]
            self.house.answer(self, body)

    def send(self, status: int, body: bytes, *headers: str, announced: int | None = None, close: bool = False) -> None:
        lines = [f"HTTP/1.1 {status} x", f"Content-Length: {len(body) if announced is None else announced}", *headers]
        if not self.transport.is_closing():
            self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
            if close:
                self.transport.close()


class House:
    """What all connections share: the bill, the arrivals, and the faults still to come."""

    def __init__(self, faults: bool = True, delay: float = 0.0, clock: Clock | None = None) -> None:
        self.faults, self.delay, self.clock = faults, delay, clock or Clock()
        self.silent = False  # hangs up instead of saying nothing for ever
        self.bill = [0, 0]
        self.arrivals: list[float] = []
        self.seen: Counter[bytes] = Counter()
        self.answers: Counter[str] = Counter()
        self.first: list[tuple[int, str]] = []  # statuses and Retry-After of the very first answers
        self.port = 0

    def answer(self, connection: Scripted, body: bytes) -> None:
        self.arrivals.append(self.clock.time())
        key = hashlib.sha256(body).digest()
        self.seen[key] += 1
        if self.first:
            status, wait = self.first.pop(0)
            connection.send(status, b'{"error": "scripted"}', *([f"Retry-After: {wait}"] if wait else []))
            return
        kind = key[0] % 24 if self.faults and self.seen[key] == 1 else 99
        if kind == 0:
            self.answers["429"] += 1
            connection.send(429, b'{"error": "slow down"}', "Retry-After: 0.02")
        elif kind == 1:
            self.answers["500"] += 1
            connection.send(500, b"oops")
        elif kind == 2:
            self.answers["never"] += 1
            if not self.silent:
                connection.transport.close()
        else:
            request = json.loads(body)
            text, finish = scripted(request)
            prompt, completion = billed(request, text)
            self.bill[0] += prompt
            self.bill[1] += completion
            message = {"role": "assistant", "content": text}
            answer = {
                "model": request["model"] + "-1",
                "choices": [{"message": message, "finish_reason": finish}],
                "usage": {"prompt_tokens": prompt, "completion_tokens": completion},
            }
            raw = json.dumps(answer).encode()
            if kind == 3:
                self.answers["torn JSON"] += 1
                connection.send(200, raw[: len(raw) // 2])
            elif kind == 4:
                self.answers["torn stream"] += 1
                connection.send(200, raw[: len(raw) // 2], announced=len(raw), close=True)
            elif self.delay:
                asyncio.get_running_loop().call_later(self.delay * key[1] / 128, connection.send, 200, raw)
            else:
                connection.send(200, raw)

    async def serve(self, ready: Callable[[int], None], port: int = 0) -> None:
        server = await asyncio.get_running_loop().create_server(lambda: Scripted(self), "127.0.0.1", port)
        ready(server.sockets[0].getsockname()[1])
        async with server:
            await server.serve_forever()


@contextmanager
def running(house: House) -> Iterator[str]:
    """The base URL of a server in a thread of its own."""
    ready = threading.Event()
    loop = asyncio.new_event_loop()

    def opened(port: int) -> None:
        house.port = port
        ready.set()

    async def main() -> None:
        with pytest.raises(asyncio.CancelledError):
            await house.serve(opened)

    task: list[asyncio.Task[None]] = []

    def work() -> None:
        task.append(loop.create_task(main()))
        loop.run_until_complete(task[0])

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert ready.wait(PATIENCE)
    yield f"http://127.0.0.1:{house.port}/v1"
    loop.call_soon_threadsafe(task[0].cancel)
    thread.join(PATIENCE)
    loop.close()


def recipe_for(url: str, n: int = 20, **changes: Any) -> SynthesisRecipe:
    def agent(system: str) -> Agent:
        return Agent(
            system=system,
            model=f"model-of-{system[:7]}",
            base_url=url,
            key="",
            max_tokens=60,
            input_price=2.5,
            output_price=10.0,
        )

    limits = SynthesisLimits(**{"backoff": 0.005, "timeout": PATIENCE, "concurrency": 32, **changes.pop("limits", {})})
    return SynthesisRecipe(
        student=agent("Student of {field}, {mood}, {language}"),
        tutor=agent("Tutor of {field}"),
        fields=("algebra", "chess", "music"),
        moods=("calm", "cross"),
        conversations=n,
        limits=limits,
        **changes,
    )


async def no_record(line: bytes) -> None:
    """A run that nobody continues."""


def hold(
    recipe: SynthesisRecipe,
    journal: Journal | None = None,
    lines: list[bytes] | None = None,
    house: House | None = None,
) -> Summary:
    """With ``house``, :func:`patient` towards it."""

    async def record(line: bytes) -> None:
        if lines is not None:
            lines.append(line)

    async def main() -> Summary:
        connections = Connections()
        try:
            post = patient(house, connections) if house else None
            return await synthesize(recipe, journal or Journal(), record, post=post)
        finally:
            await connections.close()

    return asyncio.run(main())


def patient(house: House, connections: Connections) -> Post:
    """Waits for ever for what ``house`` is going to say, and gives up at once where it is going to be silent."""
    asked = set[bytes]()

    async def post(server: Server, body: bytes, timeout: float) -> Answer:
        key = hashlib.sha256(body).digest()
        if key in asked or key[0] % 24 != 2:
            asked.add(key)
            return await connections.post(server, body, timeout)
        asked.add(key)
        while True:
            try:
                return await connections.post(server, body, 0.05)
            except Unanswered as error:
                if error.sent:
                    wait_for(lambda: house.seen[key])
                    raise

    return post


def kept(lines: list[bytes]) -> dict[int, dict[str, Any]]:
    found = [json.loads(line) for line in lines]
    made = [event for event in found if event["kind"] == "kept"]
    assert len({event["index"] for event in made}) == len(made)
    return {event["index"]: event["conversation"] for event in made}


def by_hand(recipe: SynthesisRecipe, index: int) -> tuple[list[str], Draw] | None:
    """What two agents would say with no network between them, attempt after attempt: the definition, in a loop."""
    for number in range(recipe.limits.attempts):
        drawn = draw(recipe, index, number)
        said: list[str] = []
        for place in range(drawn.turns):
            me = "tutor" if place % 2 else "student"
            agent = recipe.tutor if place % 2 else recipe.student
            system, opening = instructions(recipe, drawn, me)  # type: ignore[arg-type]
            chat = [("system", system)] + ([] if place % 2 else [("user", opening)])
            chat += [("assistant" if k % 2 == place % 2 else "user", text) for k, text in enumerate(said)]
            request = {
                "model": agent.model,
                "messages": [{"role": role, "content": text} for role, text in chat],
                "temperature": drawn.temperature,
                "seed": (drawn.seed + place) % 2**31,
            }
            text, finish = scripted(request)
            if finish != "stop" or not text or "sorry" in text or "Student:" in text:
                break
            said.append(text)
        else:
            return said, drawn
    return None


# --- whole runs --------------------------------------------------------------------------------------------------


def test_two_hundred_conversations_through_every_fault() -> None:
    house = House(delay=0.01)
    house.silent = True
    lines: list[bytes] = []
    with running(house) as url:
        recipe = recipe_for(url, 200)
        summary = hold(recipe, lines=lines, house=house)
    found = kept(lines)
    assert summary.kept + summary.given_up == 200
    assert summary.kept == len(found) > 190
    assert min(house.answers[kind] for kind in ("429", "500", "never", "torn JSON", "torn stream")) > 5
    assert {"student: refusal", "tutor: role", "tutor: empty", "tutor: cut"} <= set(summary.dropped)
    for index in range(200):
        expected = by_hand(recipe, index)
        if expected is None:
            assert index not in found
        else:
            said, drawn = expected
            assert [turn["text"] for turn in found[index]["turns"]] == said
            assert [turn["role"] for turn in found[index]["turns"]] == (["user", "assistant"] * 4)[: len(said)]
            about = found[index]["provenance"]
            assert (about["attempt"], about["temperature"], about["seed"]) == (
                drawn.attempt,
                drawn.temperature,
                drawn.seed,
            )
            assert about["answered"] == {"student": "model-of-Student-1", "tutor": "model-of-Tutor o-1"}
    # What came back torn was billed, and is counted for at least what it cost.
    assert summary.spent.tokens >= sum(house.bill)
    assert summary.retries == sum(house.answers.values())
    assert read_journal(b"".join(lines)).spent == summary.spent


def test_cut_replies_are_kept_if_the_agent_says_so() -> None:
    house = House(delay=0.0)
    with running(house) as url:
        recipe = recipe_for(url, 60)
        told = hold(recipe, lines=[]).dropped
        recipe = replace(recipe, **{s: replace(recipe.agent(s), keep_cut=True) for s in ("student", "tutor")})
        kept_too = hold(recipe, lines=[]).dropped
    assert any(reason.endswith("cut") for reason in told)
    assert not any(reason.endswith("cut") for reason in kept_too)
    assert any(reason.endswith("refusal") for reason in kept_too)


def test_without_torn_answers_the_bill_is_exact() -> None:
    house = House(faults=False)
    lines: list[bytes] = []
    with running(house) as url:
        summary = hold(recipe_for(url, 40), lines=lines)
    assert (summary.spent.prompt, summary.spent.completion, summary.spent.uncertain) == (*house.bill, 0)
    assert summary.spent.nanodollars == house.bill[0] * 2500 + house.bill[1] * 10_000
    total = Counter[str]()
    for line in lines:
        total.update(json.loads(line).get("usage", {}))
    assert dict(total) == asdict(summary.spent)


@pytest.mark.parametrize("faults", [False, True])
@pytest.mark.parametrize("limit", [{"tokens": 30_000}, {"dollars": 0.1}, {"tokens": 700}], ids=str)
def test_a_budget_is_never_passed(limit: dict[str, Any], faults: bool) -> None:
    house = House(faults=faults)
    lines: list[bytes] = []
    with running(house) as url:
        recipe = recipe_for(url, 400, limits=limit)
        first = hold(recipe, lines=lines)
        dear = house.bill[0] * 2500 + house.bill[1] * 10_000
        assert first.stopped == "the budget is spent"
        if "tokens" in limit:
            assert sum(house.bill) <= first.spent.tokens <= limit["tokens"]
            used = first.spent.tokens / limit["tokens"]
        else:
            assert dear <= first.spent.nanodollars <= limit["dollars"] * 1e9
            used = first.spent.nanodollars / (limit["dollars"] * 1e9)
        if not faults:
            assert (sum(house.bill), dear) == (first.spent.tokens, first.spent.nanodollars)
        if not faults and first.kept:
            # Little is left over, and little went into conversations that could not be finished.
            assert used > 0.8
            events = [json.loads(line) for line in lines]
            wasted = [Usage(**event["usage"]).tokens for event in events if event.get("reason") == "budget"]
            assert sum(wasted) < 0.15 * first.spent.tokens
        # Continued without a limit, it becomes what it would have been at once.
        journal = read_journal(b"".join(lines))
        assert journal.lost().tokens == 0
        hold(replace(recipe, conversations=40, limits=SynthesisLimits(backoff=0.005, timeout=PATIENCE)), journal, lines)
    found = kept(lines)
    for index in range(40):
        expected = by_hand(recipe, index)
        assert ([turn["text"] for turn in found[index]["turns"]] if index in found else None) == (
            expected and expected[0]
        )


def test_no_tokenizer_of_bytes_passes_what_is_set_aside(shared: Path) -> None:
    from tokenizers import Tokenizer

    text = "".join(chr(k) for k in range(32, 0x3000, 7)) + "\U0001f600" * 20
    for path in sorted((shared / "data" / "models").glob("*/tokenizer.json")):
        n = len(Tokenizer.from_file(str(path)).encode(text).ids)
        assert n <= len(text.encode()) + TOKENS_PER_MESSAGE + TOKENS_PER_REQUEST, path


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock that the endpoint's waits go by, and move."""
    clock = Clock()
    monkeypatch.setattr(coala.endpoint.client, "time", clock)
    monkeypatch.setattr(Client, "_pause", lambda client, seconds: clock.asleep(seconds))
    return clock


def test_retry_after_holds_all_requests_back(clock: Clock) -> None:
    house = House(faults=False, clock=clock)
    house.first = [(429, "40")]
    with running(house) as url:
        hold(recipe_for(url, 6, limits={"concurrency": 1, "timeout": PATIENCE}))
    # As long as is asked for, and a little longer, lest all who were refused come back at once.
    assert 40 <= house.arrivals[1] - house.arrivals[0] < 40.01
    assert house.arrivals[-1] == house.arrivals[1]


def test_a_rate_is_kept(clock: Clock) -> None:
    times = []

    async def post(server: Server, body: bytes, timeout: float) -> Answer:
        times.append(clock.time())
        message = {"message": {"content": scripted(json.loads(body))[0]}, "finish_reason": "stop"}
        return Answer(200, {}, json.dumps({"choices": [message]}).encode())

    recipe = recipe_for("http://127.0.0.1/v1", 10, limits={"requests_per_minute": 6})
    summary = asyncio.run(synthesize(recipe, Journal(), no_record, post=post))
    assert summary.requests == len(times) > 50
    assert min(b - a for a, b in pairwise(times)) == pytest.approx(10)
    assert max(b - a for a, b in pairwise(times)) == pytest.approx(10)


def test_refused_and_silent_endpoints_are_explained() -> None:
    house = House(faults=False)
    house.first = [(401, "")]
    with running(house) as url:
        keyed = recipe_for(url, 3)
        keyed = replace(keyed, student=replace(keyed.student, key="MY_KEY"))
        with pytest.raises(SynthesisError, match=r"status 401.*Set the environment variable MY_KEY"):
            hold(keyed)
    with pytest.raises(
        SynthesisError, match=r"no usable answer after 3 requests \(last: .*\)\. Finished conversations"
    ):
        hold(recipe_for("http://127.0.0.1:9/v1", 3, limits={"retries": 2}))
    with pytest.raises(CoalaError, match="is not an address"):
        hold(recipe_for("http:///v1", 1))


def test_equal_conversations_come_once() -> None:
    async def parrot(server: Server, body: bytes, timeout: float) -> Answer:
        request = json.loads(body)
        text = f"Words {request['seed'] % 3} after {len(request['messages'])} messages."
        message = {"message": {"content": text}, "finish_reason": "stop"}
        return Answer(200, {}, json.dumps({"choices": [message]}).encode())

    recipe = recipe_for("http://127.0.0.1/v1", 40, turns=(2, 2), distinct="opening")
    lines: list[bytes] = []

    async def record(line: bytes) -> None:
        lines.append(line)

    summary = asyncio.run(synthesize(recipe, Journal(), record, post=parrot))
    openings = [one["turns"][0]["text"] for one in kept(lines).values()]
    assert sorted(openings) == [f"Words {k} after 2 messages." for k in range(3)]
    assert summary.given_up == 37
    assert summary.dropped["duplicate"] == 37 * recipe.limits.attempts + sum(
        one["provenance"]["attempt"] for one in kept(lines).values()
    )
    # An endpoint that names no usage is counted for the most it can have used.
    assert summary.spent.prompt == summary.spent.completion == 0 < summary.spent.uncertain


def test_a_journal_of_another_recipe_is_refused() -> None:
    recipe = recipe_for("http://127.0.0.1/v1")
    journal = Journal(identity=recipe.identity)
    with pytest.raises(SynthesisError, match=r"another recipe \(seed was 0, now 1\)"):
        asyncio.run(synthesize(replace(recipe, seed=1), journal, no_record))


KEY = "sk-a-long-secret"


def test_a_key_that_an_endpoint_echoes_is_struck_out() -> None:
    recipe = replace(recipe_for("http://me:word@127.0.0.1/v1", 1), limits=SynthesisLimits(retries=0, concurrency=1))
    recipe = replace(recipe, student=replace(recipe.student, key="K"), tutor=replace(recipe.tutor, key="K"))

    def answering(status: int, **headers: str) -> Any:
        async def post(server: Server, body: bytes, timeout: float) -> Answer:
            sent = server.headers
            assert sent["Authorization"] == f"Bearer {KEY}"
            assert sent["Accept-Encoding"] == "identity"
            said = {"choices": [{"message": {"content": f"I saw {KEY} in {body[-9:]!r}"}}], "model": KEY}
            return Answer(status, headers, json.dumps(said).encode())

        return post

    lines: list[bytes] = []

    async def record(raw: bytes) -> None:
        lines.append(raw)

    asyncio.run(synthesize(recipe, Journal(), record, keys={"K": KEY}, post=answering(200)))
    assert any(b"I saw ***" in raw for raw in lines)
    assert not any(KEY.encode() in raw for raw in lines)
    for status, words in ((400, r"\*\*\*"), (503, r"\*\*\*"), (307, "redirects are not followed")):
        post = answering(status, location=f"http://else.where/{KEY}")
        with pytest.raises(SynthesisError, match=words) as raised:
            asyncio.run(synthesize(recipe, Journal(), no_record, keys={"K": KEY}, post=post))
        assert KEY not in str(raised.value)
        assert "word@" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "url", "confirmed", "words"),
    [
        ("OPENAI_API_KEY", "https://api.example/v1", False, ""),
        ("MY_SECRET", "http://127.0.0.1:8000/v1", False, ""),
        ("MY_SECRET", "http://[::1]:8000/v1", False, ""),
        ("MY_SECRET", "https://api.example/v1", False, "expected a variable named as an API key"),
        ("MY_SECRET", "https://api.example/v1", True, ""),
        ("OPENAI_API_KEY", "http://api.example/v1", False, "unencrypted; expected https"),
        ("OPENAI_API_KEY", "http://127.0.0.1.api.example/v1", False, "unencrypted"),
        ("OPENAI_API_KEY", "http://localhost@api.example/v1", False, "unencrypted"),
        ("OPENAI_API_KEY", "http://api.example/v1", True, ""),
    ],
)
def test_a_recipe_says_which_key_goes_where(
    name: str,
    url: str,
    confirmed: bool,
    words: str,
) -> None:
    said: list[str] = []
    recipe = recipe_for(url)
    recipe = replace(recipe, student=replace(recipe.student, key=name), tutor=replace(recipe.tutor, key=name))
    if words:
        with pytest.raises(SynthesisError, match=words) as raised:
            keys_of(recipe, {name: KEY}, (), "r.yaml", said.append)
        assert f"--send-key {name}" in str(raised.value)
        assert KEY not in str(raised.value)
        return
    assert keys_of(recipe, {name: KEY}, (name,) * confirmed, "r.yaml", said.append) == {name: KEY}
    assert said == [f"sends the value of ${name} to {url} (named in r.yaml)"]


def test_thoughts_are_no_part_of_a_conversation() -> None:
    recipe = replace(recipe_for("http://127.0.0.1/v1", 2), limits=SynthesisLimits(retries=0, concurrency=1, attempts=2))
    n = 0

    async def post(server: Server, body: bytes, timeout: float) -> Answer:
        nonlocal n
        n += 1
        text = "<think>I will never say" if n == 1 else f"<think>Let me see.</think>\n\nIt is {n}."
        return Answer(200, {}, json.dumps({"choices": [{"message": {"content": text}}]}).encode())

    lines: list[bytes] = []

    async def record(raw: bytes) -> None:
        lines.append(raw)

    summary = asyncio.run(synthesize(recipe, Journal(), record, post=post))
    said = [turn["text"] for held in kept(lines).values() for turn in held["turns"]]
    assert summary.kept == 2
    assert sum(summary.dropped.values()) == 1
    assert all(text.startswith("It is ") for text in said)


# --- screening ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("speaker", "text", "why"),
    [
        ("student", "I'm sorry, I can't see why the sign flips.", None),
        ("student", "I'm sorry, but I can\u2019t help with that.", "refusal"),
        ("tutor", "As an AI language model, I have no feelings.", "refusal"),
        ("tutor", "You cannot divide by zero, but I can't help smiling.", None),
        ("tutor", "It is 4.\n\nStudent: Thanks!", "role"),
        ("tutor", "**Student**: Thanks!", "role"),
        ("tutor", "In this role-play I will be the tutor.", "role"),
        ("student", "Hello! How can I help you today?", "role"),
        ("tutor", "Hello! How can I help you today?", None),
        ("student", "Thanks. I have a quiz tomorrow!", None),
        ("tutor", "...", "empty"),
        ("tutor", "Fine: three things follow.", None),
    ],
)
def test_screening(speaker: Any, text: str, why: str | None) -> None:
    assert fault(cleaned(text, speaker), "stop", speaker, []) == why


def test_own_labels_are_taken_off_and_repeats_seen() -> None:
    assert cleaned(" **Tutor:** Yes. \n", "tutor") == "Yes."
    assert cleaned("Student: Why?", "student") == "Why?"
    assert fault("Why  so?", "stop", "student", ["why so?", "Because."]) == "repeat"
    assert fault("Why so?", "stop", "tutor", ["Why so?"]) is None
    assert fault("Why so", "length", "tutor", ["x"]) == "cut"


# --- the command -------------------------------------------------------------------------------------------------


def written(tmp_path: Path, recipe: SynthesisRecipe) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(asdict(recipe)))
    return path


def expected_rows(recipe: SynthesisRecipe) -> list[list[str]]:
    return [made[0] for k in range(recipe.conversations) if (made := by_hand(recipe, k))]


def rows(path: Path) -> list[list[str]]:
    return [[turn["text"] for turn in json.loads(line)["turns"]] for line in path.read_text().splitlines()]


def test_the_command_writes_stops_goes_on_and_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, out = CliRunner(), tmp_path / "talk.jsonl"
    with running(House()) as url:
        recipe = recipe_for(url, 30)
        path = written(tmp_path, recipe)
        stopped = runner.invoke(app, ["data", "synthesize", str(path), "--out", str(out), "--tokens", "20000"])
        assert stopped.exit_code == 3, stopped.output
        assert json.loads(stopped.stdout.splitlines()[-1])["spent"]["prompt"] < 20_000
        assert 0 < len(rows(out)) < 30
        # A torn last line, as a kill leaves it.
        with (tmp_path / "talk.jsonl.journal").open("ab") as journal:
            journal.write(b'{"kind":"kept","index":29,"conv')
        done = runner.invoke(app, ["data", "synthesize", str(path), "--out", str(out)])
        assert done.exit_code == 0, done.output
        assert rows(out) == expected_rows(recipe)
        pairs = list(read_pairs(out, "conversations"))
        assert len(pairs) == sum(max(0, len(said) // 2 - 1) for said in rows(out))
        other = runner.invoke(
            app, ["data", "synthesize", str(written(tmp_path, replace(recipe, seed=5))), "--out", str(out)]
        )
        assert "use another recipe (seed was 0, now 5)" in str(other.exception)
        keyed = replace(recipe, tutor=replace(recipe.tutor, key="NO_SUCH_KEY"))
        monkeypatch.delenv("NO_SUCH_KEY", raising=False)
        unset = runner.invoke(app, ["data", "synthesize", str(written(tmp_path, keyed)), "--out", str(out)])
        assert "environment variable NO_SUCH_KEY, which is not set" in str(unset.exception)


def test_two_runs_never_share_a_journal(tmp_path: Path) -> None:
    import fcntl

    out = tmp_path / "talk.jsonl"
    with (tmp_path / "talk.jsonl.journal").open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        path = written(tmp_path, recipe_for("http://127.0.0.1:9/v1"))
        result = CliRunner().invoke(app, ["data", "synthesize", str(path), "--out", str(out)])
    assert "another run is writing there" in str(result.exception)


def command_for(recipe: Path, out: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "coala", "data", "synthesize", str(recipe), "--out", str(out), *options]


@pytest.mark.slow
def test_killed_and_stopped_it_is_as_if_it_never_was(tmp_path: Path) -> None:
    """Killed twice, then out of budget, then finished: nothing is lost, doubled or overspent."""
    house, out, n, most = House(delay=0.02), tmp_path / "talk.jsonl", 60, 60_000
    journal = tmp_path / "talk.jsonl.journal"
    with running(house) as url:
        recipe = recipe_for(url, n, limits={"concurrency": 8})
        path = written(tmp_path, recipe)
        for more in (60, 67):
            # Killed after so many more requests: in the middle of things whatever the machine's speed.
            goal = len(house.arrivals) + more
            command = command_for(path, out, "--tokens", str(most))
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            wait_for(lambda goal=goal: len(house.arrivals) >= goal, process)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        stopped = CliRunner().invoke(app, command_for(path, out, "--tokens", str(most))[3:])
        assert stopped.exit_code == 3, stopped.output
        assert sum(house.bill) <= most
        events = [json.loads(line) for line in journal.read_text().splitlines()]
        assert [event for event in events if event["kind"] == "resumed"]
        assert events[-1]["kind"] == "ended"
        assert sum(sum(v for k, v in event.get("usage", {}).items() if k != "nanodollars") for event in events) <= most
        assert 0 < len(rows(out)) < n
        done = CliRunner().invoke(app, command_for(path, out)[3:])
        assert done.exit_code == 0, done.output
    assert rows(out) == expected_rows(recipe)
    events = [json.loads(line) for line in journal.read_text().splitlines()]
    assert sorted(event["index"] for event in events if event["kind"] in ("kept", "given up")) == list(range(n))


def test_an_interrupt_leaves_what_is_finished(tmp_path: Path) -> None:
    house, out = House(faults=False, delay=0.05), tmp_path / "talk.jsonl"
    with running(house) as url:
        recipe = recipe_for(url, 400, limits={"concurrency": 8})
        command = command_for(written(tmp_path, recipe), out)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        wait_for(lambda: len(house.arrivals) >= 200, process)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, said
    assert "finished work is saved" in said
    journal = read_journal((tmp_path / "talk.jsonl.journal").read_bytes())
    assert 0 < len(rows(out)) == len(journal.kept) < 400
