"""Judges behind an endpoint: a scripted server on the loopback; counts are exact and nothing is bought twice."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import coala.endpoint.client
from coala.endpoint import Client
from coala.endpoint.completion import read_completion
from coala.evaluation import JudgeFailure, JudgeStopped, OpenAIJudge, judge_many, read_instructions, win_rate
from coala.evaluation.judges import Answer, Budget, Patience, read_verdict
from coala.evaluation.judges.endpoint import OpenAIEndpoint
from coala.store.verdict_cache import VerdictCache
from coala.values import CoalaError, Generation, user
from tests.evaluation_helpers import reply
from tests.judge_server import HANG_UP, JudgeServer, Script, fail, say, user_text
from tests.waiting import PATIENCE, Clock, wait_for

QUICK = Patience(attempts=4, first_wait=0.01, longest_wait=2.0, timeout=PATIENCE)
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


def sides(n: int) -> tuple[list[Generation], list[Generation], dict[str, Any]]:
    """n prompts; ours has the word GOOD where the number is even, theirs where it is odd."""
    ours = [reply(f"p{i}", f"{'GOOD' if i % 2 == 0 else 'poor'} mine {i}") for i in range(n)]
    theirs = [reply(f"p{i}", f"{'poor' if i % 2 == 0 else 'GOOD'} other {i}", "theirs") for i in range(n)]
    return ours, theirs, {f"p{i}": user(f"question {i}") for i in range(n)}


def honest(body: dict[str, Any], before: int) -> dict[str, Any]:
    """Prefers the reply with GOOD, whatever the order."""
    shown = user_text(body)
    return say(f"Because. [[{'A' if shown.index('GOOD') < shown.index('poor') else 'B'}]]")


def make(server: JudgeServer, name: str = "pairwise", **options: Any) -> OpenAIJudge:
    options = {"model": "m", "base_url": server.url, "key": "k", "patience": QUICK, **options}
    return OpenAIJudge(read_instructions(name), **options)


def number_of(body: dict[str, Any]) -> int:
    found = re.search(r"question (\d+)", user_text(body))
    assert found
    return int(found[1])


# --- verdicts ----------------------------------------------------------------------------------------------------


def test_an_honest_judge_costs_one_call_per_order(serve: Serve) -> None:
    meeting, arrived = threading.Barrier(2, timeout=PATIENCE), count()

    def met(body: dict[str, Any], before: int) -> dict[str, Any]:
        if next(arrived) < 2:
            meeting.wait()  # the first two are asked at a time
        return honest(body, before)

    server = serve(met)
    ours, theirs, prompts = sides(6)
    progress: list[tuple[int, int]] = []
    found = judge_many(
        ours, theirs, make(server), prompts=prompts, concurrency=4, on_progress=lambda *at: progress.append(at)
    )
    assert [row.preference for row in found.judgements] == [1, 0, 0, 1] * 3
    assert [row.prompt_id for row in found.judgements] == [f"p{i // 2}" for i in range(12)]
    assert progress == [(i, 12) for i in range(1, 13)]
    assert (found.cost.calls, found.cost.answers, found.cost.kept) == (12, 12, 0)
    assert len(server.requests) == 12
    assert (found.cost.prompt_tokens, found.cost.completion_tokens, found.cost.unmetered) == (120, 60, 0)
    assert (found.failures, found.n_unjudged, found.stopped) == ({}, 0, "")
    assert found.consistency.inconsistency.value == found.consistency.position_bias.value == 0
    assert found.consistency.first_place.value == 0.5
    assert win_rate(found.judgements).value == 0.5
    assert found.judgements[0].judge == "pairwise m"
    assert 2 <= server.most <= 4
    body = server.requests[0]
    assert (body["model"], body["temperature"], body["seed"], body["max_tokens"]) == ("m", 0, 0, 1024)
    assert "question" in body["messages"][1]["content"]
    assert "[[C]]" in body["messages"][0]["content"]
    assert server.headers[0]["authorization"] == "Bearer k"


def test_a_judge_of_the_first_place_is_found_out(serve: Serve) -> None:
    # Always A but for two prompts of ten, where it is honest.
    server = serve(lambda body, before: honest(body, 0) if number_of(body) < 2 else say("[[A]]"))
    ours, theirs, prompts = sides(10)
    found = judge_many(ours, theirs, make(server), prompts=prompts, concurrency=3)
    about = found.consistency
    assert (about.n_first, about.n_second) == (8, 0)
    assert about.position_bias.value == about.inconsistency.value == 0.8
    assert about.first_place.value == pytest.approx(0.9)
    assert about.position_bias.low < 0.8 < about.position_bias.high
    assert about.position_bias.n == 10
    assert win_rate(found.judgements).value == 0.5


def test_weighted_preferences_are_those_of_the_log_probabilities(serve: Serve) -> None:
    def script(body: dict[str, Any], before: int) -> dict[str, Any]:
        i = number_of(body)
        if i == 2:
            return say("X", top=[("X", -0.1), ("Y", -3.0)], finish="length")
        if i == 3:
            return say("m")  # no log-probabilities at all
        return say("m", top=[("m", -0.2), ("M", -2.0)] if i == 0 else [("m", -0.01)], finish="length")

    server = serve(script)
    ours, theirs, prompts = sides(4)
    found = judge_many(ours, theirs, make(server, "weighted"), prompts=prompts)
    p = math.exp(-0.2) / (math.exp(-0.2) + math.exp(-2.0))
    assert [row.preference for row in found.judgements[:4]] == pytest.approx([p, p, 1.0, 1.0], abs=1e-12)
    assert found.failures == {"no log-probabilities": 2, "no verdict": 2}
    body = server.requests[0]
    assert (body["logprobs"], body["top_logprobs"], body["max_tokens"]) == (True, 5, 1)


def test_structured_verdicts_are_asked_for_and_read_strictly(serve: Serve, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "judge.yaml").write_text(
        "mode: pairwise\nparser: json\nlabels: [first, second, neither]\nmodel: mine\nprompts: [{user: p.txt}]\n"
    )
    (folder / "p.txt").write_text('{question} {"braces": 1} {answer_a} {answer_b}')
    good = json.dumps({"reason": "x", "verdict": "second"})
    bad = [
        good[:-4],
        good + good,
        "[[A]]",
        json.dumps({"reason": "x", "verdict": "A"}),
        json.dumps({"verdict": "first"}),
        '{"reason": "", "verdict": "first", "verdict": "second"}',
        json.dumps({"reason": "x", "verdict": ["first"]}),
        json.dumps({"reason": "x", "verdict": "first", "more": 1}),
        "[" * 100_000,
        "null",
    ]
    answers = [good, *bad]
    server = serve(lambda body, before: say(answers[number_of(body)]))
    ours, theirs, prompts = sides(len(answers))
    chosen = make(server, str(folder), model=None)
    found = judge_many(ours, theirs, chosen, prompts=prompts, swap=False, concurrency=2)
    assert [row.preference for row in found.judgements] == [0.0] + [None] * len(bad)
    assert found.failures == {"no verdict": len(bad)}
    body = server.requests[0]
    assert body["model"] == "mine"
    assert body["response_format"]["json_schema"]["schema"]["properties"]["verdict"]["enum"] == [
        "first",
        "second",
        "neither",
    ]
    assert '{"braces": 1}' in user_text(body)


def test_every_kind_of_failure_is_counted_and_none_is_a_verdict(serve: Serve) -> None:
    def script(body: dict[str, Any], before: int) -> dict[str, Any]:
        refusal = say("")
        refusal["body"] = refusal["body"].replace(b'"content": ""', b'"content": null, "refusal": "I will not."')
        return [
            say("no verdict here"),
            say("[[A]] or rather [[B]]"),
            say("It is clear that [[A]]", finish="length"),
            say("", finish="content_filter"),
            refusal,
            fail(400),
            fail(500),
            say("[[A]]"),
        ][number_of(body)]

    server = serve(script)
    ours, theirs, prompts = sides(8)
    told: list[str] = []
    found = judge_many(
        ours, theirs, make(server), prompts=prompts, swap=False, on_failure=lambda p, e: told.append(f"{p} {e}")
    )
    assert [row.preference for row in found.judgements] == [None] * 7 + [1.0]
    assert found.failures == {"cut short": 1, "no verdict": 2, "refused": 2, "rejected": 1, "server error": 1}
    assert len(server.requests) == found.cost.calls == 7 + QUICK.attempts
    assert found.cost.answers == 6
    assert len(told) == 7
    assert any("scripted 400" in line for line in told)
    rate = win_rate(found.judgements)
    assert (rate.value, rate.n) == (1.0, 1)
    assert "7 failed" in rate.method


# --- the endpoint ------------------------------------------------------------------------------------------------


def flaky(*before_it_works: dict[str, Any]) -> Script:
    return lambda body, before: before_it_works[before] if before < len(before_it_works) else honest(body, before)


@pytest.mark.parametrize(
    "troubles",
    [
        (fail(500), fail(503)),
        (HANG_UP, HANG_UP),
        ({"body": b'{"choices": [{"mess'}, {"body": b"<html>busy</html>", "headers": {"Content-Type": "text/html"}}),
        (say("[[A]]", missing=40), {"body": b'{"choices": []}'}),
        ({"body": b"null"}, {"body": b'{"choices": [{"message": {"content": 7}}]}'}),
        ({**HANG_UP, "silent": True}, fail(408)),
        (fail(429), fail(409)),
    ],
    ids=["5xx", "hang up", "no JSON", "cut on the way", "other JSON", "timeout", "429"],
)
def test_trouble_is_tried_again_and_counted(serve: Serve, troubles: tuple[dict[str, Any], ...]) -> None:
    server = serve(flaky(*troubles))
    ours, theirs, prompts = sides(1)
    silent = any(trouble.get("silent") for trouble in troubles)
    patience = replace(QUICK, timeout=1.0, attempts=20) if silent else QUICK
    found = judge_many(ours, theirs, make(server, patience=patience), prompts=prompts, swap=False)
    assert [row.preference for row in found.judgements] == [1.0]
    # A busy machine may be too late for a client that waits for a second only; what is sent is counted all the same.
    assert len(server.requests) >= 3 if silent else len(server.requests) == 3
    assert (found.cost.calls, found.cost.answers) == (len(server.requests), 1)


def test_retry_after_is_waited_out_by_all(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, times = Clock(), []
    monkeypatch.setattr(coala.endpoint.client, "time", clock)
    monkeypatch.setattr(Client, "_pause", lambda client, seconds: clock.asleep(seconds))

    def at_first(body: dict[str, Any], before: int) -> dict[str, Any]:
        times.append(clock.time())
        return fail(429, {"Retry-After": "1"}) if len(times) == 1 else honest(body, 0)

    server = serve(at_first)
    ours, theirs, prompts = sides(4)
    found = judge_many(ours, theirs, make(server), prompts=prompts, swap=False, concurrency=1)
    assert len(times) == 5
    assert 1.0 <= times[1] - times[0] < 2.0
    assert times[4] == times[1]
    assert found.failures == {}

    # With several threads: the first request is refused, and those that come after it wait as well.
    lock, arrived = threading.Lock(), []

    def once(body: dict[str, Any], before: int) -> dict[str, Any]:
        with lock:
            arrived.append(clock.time())
            alone = len(arrived) == 1
        return fail(429, {"retry-after-ms": "600"}) if alone else honest(body, 0) | {"delay": 0.1}

    many = serve(once)
    judge_many(ours, theirs, make(many), prompts=prompts, swap=False, concurrency=2)
    assert len(arrived) == 5
    # One other may have been under way already.
    assert sum(at - arrived[0] >= 0.59 for at in arrived) >= 3


def test_retry_after_may_be_a_date_and_a_long_one_ends_all(serve: Serve) -> None:
    date = "Fri, 31 Dec 2199 23:59:59 GMT"
    server = serve(lambda body, before: fail(429, {"Retry-After": date}))
    ours, theirs, prompts = sides(3)
    found = judge_many(ours, theirs, make(server), prompts=prompts)
    assert len(server.requests) == 1
    assert re.search(r"asks to wait \d{10} s", found.stopped)
    assert found.n_unjudged == 3
    assert found.judgements == ()
    past = serve(flaky(fail(503, {"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"})))
    assert judge_many(ours[:1], theirs[:1], make(past), prompts=prompts).cost.calls == 4


@pytest.mark.parametrize(
    ("reply_with", "words"),
    [
        (fail(401), "Check the key"),
        (fail(403), "Check the key"),
        (fail(404), "the model's name"),
        (fail(429, code="insufficient_quota"), "quota is spent"),
    ],
)
def test_what_cannot_mend_itself_stops_at_once(serve: Serve, reply_with: dict[str, Any], words: str) -> None:
    server = serve(lambda body, before: reply_with)
    ours, theirs, prompts = sides(5)
    found = judge_many(ours, theirs, make(server), prompts=prompts)
    assert words in found.stopped
    assert len(server.requests) == 1
    assert (found.n_unjudged, found.failures) == (5, {})


def test_an_endpoint_that_always_fails_is_given_up(serve: Serve) -> None:
    server = serve(lambda body, before: fail(400))
    ours, theirs, prompts = sides(40)
    patience = Patience(attempts=2, first_wait=0.01, give_up_after=7)
    found = judge_many(ours, theirs, make(server, patience=patience), prompts=prompts)
    assert len(server.requests) == 7
    assert "7 requests" in found.stopped
    assert "scripted 400" in found.stopped
    assert found.failures == {"rejected": 6}
    # Failures between answers are no such thing, however many.
    mixed = serve(lambda body, before: honest(body, 0) if number_of(body) % 3 == 0 else fail(400))
    found = judge_many(ours, theirs, make(mixed, patience=patience), prompts=prompts)
    assert (found.stopped, found.failures) == ("", {"rejected": 52})


COMPLETION = json.loads(say("[[A]]", top=[("m", -0.1), ("M", -3.0)])["body"])
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def paths(value: Any, so_far: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [so_far, *(path for key, part in inner for path in paths(part, (*so_far, key)))]


@given(st.sampled_from(paths(COMPLETION)), JUNK, st.integers(0, 400))
def test_any_body_is_an_answer_or_worth_another_try(path: tuple[Any, ...], junk: Any, cut: int) -> None:
    body = {"whole": json.loads(json.dumps(COMPLETION))}
    place: Any = body
    for key in ("whole", *path)[:-1]:
        place = place[key]
    place[("whole", *path)[-1]] = junk
    raw = json.dumps(body["whole"]).encode()
    for sent in (raw, raw[: len(raw) - cut]):
        try:
            answer = read_completion(sent)
        except ValueError:
            continue
        assert Answer.from_json(answer.to_json()) == answer
        told = read_instructions("weighted")
        try:
            assert 0 <= read_verdict(answer, told).preference <= 1
        except JudgeFailure as failure:
            assert failure.kind  # noqa: PT017


def test_nobody_there() -> None:
    ours, theirs, prompts = sides(1)
    patience = Patience(attempts=2, first_wait=0.01)
    gone = OpenAIJudge(read_instructions("pairwise"), model="m", base_url="http://127.0.0.1:9/v1", patience=patience)
    found = judge_many(ours, theirs, gone, prompts=prompts)
    assert found.failures == {"connection": 2}
    assert found.cost.calls == 4


def test_settings_that_cannot_be_meant() -> None:
    with pytest.raises(CoalaError, match="no key"):
        OpenAIEndpoint(None, "")
    with pytest.raises(CoalaError, match="names no model"):
        OpenAIJudge(read_instructions("pairwise"), base_url="http://127.0.0.1:9/v1")
    for bad in ({"attempts": 0}, {"timeout": 0.0}, {"first_wait": -1.0}):
        with pytest.raises(CoalaError, match="expected"):
            Patience(**bad)  # type: ignore[arg-type]
    with pytest.raises(CoalaError, match="0 or more"):
        Budget(calls=-1)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:8000/v1",
        "http://127.0.0.1:8000/v1/",
        "http://Host:80/v1//",
        "https://Host:443/v1",
        "https://h",
        "http://me:w%40rd@h/v1",
        "http://b\u00fccher.example/a%20b/~user",
        "http://[::1]:8000/v1/../v2",
    ],
)
def test_answers_are_kept_under_the_address_as_openais_client_writes_it(url: str) -> None:
    openai = pytest.importorskip("openai", reason="the client that is compared with is not installed")
    assert OpenAIEndpoint(url, "k").identity == str(openai.OpenAI(base_url=url, api_key="k").base_url).rstrip("/")
    assert OpenAIEndpoint(None, "k").identity == "https://api.openai.com/v1"


def test_who_asks(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    from coala.cli.options import JudgeFlags

    for name, value in {"ORG_ID": "org", "PROJECT_ID": "", "CUSTOM_HEADERS": "X-One: 1\nnone\nX-Two:2:3"}.items():
        monkeypatch.setenv(f"OPENAI_{name}", value)
    headers = JudgeFlags(model="m", key_env="KEY").by("pairwise").service.headers
    assert headers == {"OpenAI-Organization": "org", "X-One": "1", "X-Two": "2:3"}
    server = serve(honest)
    ours, theirs, prompts = sides(1)
    judge_many(ours, theirs, make(server, headers=headers), prompts=prompts, swap=False)
    named = server.url.replace("://", "://me:word@")
    judge_many(ours, theirs, make(server, base_url=named), prompts=prompts, swap=False)
    judge_many(ours, theirs, make(server, key=None), prompts=prompts, swap=False)
    sent = [(one["authorization"], one.get("openai-organization"), one.get("x-two")) for one in server.headers]
    # A name and password in the address are meant for it.
    assert sent == [("Bearer k", "org", "2:3"), ("Basic bWU6d29yZA==", None, None), ("Bearer none", None, None)]


def test_without_usage_tokens_are_taken_from_the_text(serve: Serve) -> None:
    server = serve(lambda body, before: say("[[A]]" + "x" * 295, tokens=None))
    ours, theirs, prompts = sides(1)
    found = judge_many(ours, theirs, make(server), prompts=prompts, swap=False)
    assert (found.cost.unmetered, found.cost.completion_tokens) == (1, 100)
    assert found.cost.prompt_tokens > len(user_text(server.requests[0])) / 4


# --- budgets, keeping, resuming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("concurrency", [1, 5])
def test_a_budget_of_calls_is_never_exceeded_and_resumes(serve: Serve, tmp_path: Path, concurrency: int) -> None:
    server = serve(flaky(fail(500)))  # every verdict takes two calls
    ours, theirs, prompts = sides(6)
    spent, parts = 0, []
    with VerdictCache(tmp_path / "v.sqlite") as cache:
        while True:
            chosen = make(server, keeper=cache, budget=Budget(calls=9))
            found = judge_many(ours, theirs, chosen, prompts=prompts, concurrency=concurrency)
            assert found.cost.calls <= 9
            spent += found.cost.calls
            parts.append(found)
            if not found.stopped:
                break
            assert "budget of 9 calls is spent" in found.stopped
            assert found.failures == {}
            assert len(found.judgements) == 2 * (6 - found.n_unjudged)
        assert len(cache) == 12
    assert spent == len(server.requests)
    assert sum(part.cost.answers for part in parts) == 12  # each verdict was bought once
    assert server.distinct == 12
    assert [row.preference for row in parts[-1].judgements] == [1, 0, 0, 1] * 3
    # An order that was bought without its counterpart is kept, not shown.
    assert len(parts[0].judgements) <= parts[0].cost.answers


def test_a_budget_of_tokens_stops_after_it(serve: Serve) -> None:
    server = serve(honest)  # 15 tokens each
    ours, theirs, prompts = sides(10)
    found = judge_many(ours, theirs, make(server, budget=Budget(tokens=60)), prompts=prompts)
    assert (found.cost.tokens, found.cost.calls) == (60, 4)
    assert "budget of 60 tokens" in found.stopped
    assert found.n_unjudged == 8
    none = judge_many(ours, theirs, make(server, budget=Budget(calls=0)), prompts=prompts)
    assert none.n_unjudged == 10
    assert none.cost.calls == 0


def test_a_second_run_buys_nothing_and_what_matters_is_in_the_key(serve: Serve, tmp_path: Path) -> None:
    server = serve(honest)
    ours, theirs, prompts = sides(3)
    with VerdictCache(tmp_path / "v.sqlite") as cache:

        def calls(ours: list[Generation] = ours, prompts: Any = prompts, **options: Any) -> int:
            found = judge_many(ours, theirs, make(server, keeper=cache, **options), prompts=prompts)
            assert found.cost.answers + found.cost.kept == 6
            return found.cost.calls

        assert calls() == 6
        assert calls() == 0
        assert calls(model="other") == 6
        assert calls(sampling={"temperature": 0.5}) == 6
        assert calls(sampling={"seed": None}) == 6
        assert calls(ours=[reply(ours[0].prompt_id, "GOOD new"), *ours[1:]]) == 2
        assert calls(prompts={**prompts, "p1": user("another question 1")}) == 2
        assert calls(key="another key") == 0
        assert calls() == 0
    assert "seed" not in server.requests[20]


def test_an_unreadable_answer_is_kept_until_it_is_asked_for_again(serve: Serve, tmp_path: Path) -> None:
    mood = ["hm"]
    server = serve(lambda body, before: say(mood[0]) if number_of(body) == 0 else honest(body, 0))
    ours, theirs, prompts = sides(2)
    with VerdictCache(tmp_path / "v.sqlite") as cache:
        for expected in (4, 0):
            found = judge_many(ours, theirs, make(server, keeper=cache), prompts=prompts)
            assert (found.cost.calls, found.failures) == (expected, {"no verdict": 2})
        mood[0] = "[[C]]"
        again = judge_many(ours, theirs, make(server, keeper=cache, ask_again=True), prompts=prompts)
        assert (again.cost.calls, again.failures) == (2, {})
        assert [row.preference for row in again.judgements] == [0.5, 0.5, 0.0, 1.0]
        assert judge_many(ours, theirs, make(server, keeper=cache, ask_again=True), prompts=prompts).cost.calls == 0


def test_threads_that_want_one_verdict_buy_it_once(serve: Serve) -> None:
    server = serve(lambda body, before: honest(body, 0) | {"delay": 0.05})
    one = reply("p", "GOOD")
    ours = [Generation("p", one.text, "ours", 1, seed, math.nan, 0.0) for seed in range(8)]
    theirs = [Generation("p", "poor", "theirs", 1, seed, math.nan, 0.0) for seed in range(8)]
    found = judge_many(ours, theirs, make(server), prompts={"p": user("question 0")}, concurrency=8)
    assert (found.cost.calls, found.cost.kept) == (2, 14)
    assert len(found.judgements) == 16


def test_a_grading_judge_compares_by_grades(serve: Serve) -> None:
    server = serve(lambda body, before: say(f"[[{9 if 'GOOD' in user_text(body) else 4}]]"))
    ours, theirs, prompts = sides(3)
    found = judge_many(ours, theirs, make(server, "grade"), prompts=prompts)
    assert [row.preference for row in found.judgements] == [1, 0, 0, 1, 1, 0]
    assert found.cost.calls == 6  # one grade per reply: the other order takes the same ones
    assert found.consistency.inconsistency.value == 0


class Halt(Exception):
    """Raised by a callback, as Ctrl-C would be."""


@pytest.mark.parametrize("concurrency", [1, 4])
def test_an_interrupt_loses_nothing(serve: Serve, tmp_path: Path, concurrency: int) -> None:
    server = serve(lambda body, before: honest(body, 0) | {"delay": 0.02})
    ours, theirs, prompts = sides(8)

    def halt(done: int, total: int) -> None:
        if done == 5:
            raise Halt

    with VerdictCache(tmp_path / "v.sqlite") as cache:
        chosen = make(server, keeper=cache)
        with pytest.raises(Halt):
            judge_many(ours, theirs, chosen, prompts=prompts, concurrency=concurrency, on_progress=halt)
        reached = len(server.requests)
        assert 5 <= reached <= 5 + concurrency
        assert len(cache) == reached  # also what was in flight
        found = judge_many(ours, theirs, chosen, prompts=prompts, concurrency=concurrency)  # the same judge goes on
        assert found.cost.calls == 16 - reached
    assert len(server.requests) == server.distinct == 16


def test_an_interrupt_does_not_wait_for_the_server_to_be_ready(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    later = fail(429, {"Retry-After": str(4 * PATIENCE)})
    server = serve(lambda body, before: honest(body, 0) if number_of(body) == 0 else later)
    ours, theirs, prompts = sides(4)

    judge = make(server, patience=Patience(longest_wait=10 * PATIENCE))
    waiting: list[float] = []

    pause = Client._pause

    async def watched(client: Client, seconds: float) -> None:
        waiting.append(seconds)
        await pause(client, seconds)

    monkeypatch.setattr(Client, "_pause", watched)

    def halt(done: int, total: int) -> None:
        wait_for(lambda: waiting)  # another has met its 429
        raise Halt

    # Whoever sat out the wait that is asked for would hang this test.
    with pytest.raises(Halt):
        judge_many(ours, theirs, judge, prompts=prompts, concurrency=4, on_progress=halt)
    assert max(waiting) > PATIENCE


CHILD = """
import sys
from coala.store.verdict_cache import VerdictCache
from coala.evaluation import judge_many
from tests.test_judges_endpoint import make, sides
class Server: url = sys.argv[1]
ours, theirs, prompts = sides(int(sys.argv[3]))
with VerdictCache(sys.argv[2]) as cache:
    found = judge_many(ours, theirs, make(Server, keeper=cache), prompts=prompts, concurrency=int(sys.argv[4]))
print(found.cost.calls, found.cost.kept, len(found.judgements))
"""


def child(server: JudgeServer, cache: Path, n: int, concurrency: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, server.url, str(cache), str(n), str(concurrency)]
    root = Path(__file__).resolve().parent.parent
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=root, text=True, env={**os.environ}, **pipes)  # type: ignore[call-overload, no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("kills", [(9,), pytest.param((4, 11, 17), marks=pytest.mark.nightly)], ids=len)
def test_kill_9_loses_at_most_what_was_in_flight(serve: Serve, tmp_path: Path, kills: tuple[int, ...]) -> None:
    server = serve(lambda body, before: honest(body, 0) | {"delay": 0.03})
    path, n, concurrency = tmp_path / "v.sqlite", 12, 2
    for at in kills:
        process = child(server, path, n, concurrency)
        wait_for(lambda at=at: len(server.requests) >= at, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.communicate()
    out, _ = child(server, path, n, concurrency).communicate(timeout=PATIENCE)
    calls, kept, rows = map(int, out.split())
    assert calls + kept == rows == 24
    assert server.distinct == 24
    # No more was asked for again than what was in flight.
    assert len(server.requests) <= 24 + len(kills) * concurrency
    with VerdictCache(path) as cache:
        assert len(cache) == 24


def test_two_processes_share_a_cache(serve: Serve, tmp_path: Path) -> None:
    server = serve(lambda body, before: honest(body, 0) | {"delay": 0.005})
    path = tmp_path / "v.sqlite"
    processes = [child(server, path, 15, 3) for _ in range(2)]
    for process in processes:
        out, errors = process.communicate(timeout=PATIENCE)
        calls, kept, rows = map(int, out.split())
        assert calls + kept == rows == 30
        assert errors == ""  # connections are closed before the process ends
    with VerdictCache(path) as cache:
        assert len(cache) == server.distinct == 30
        found = judge_many(*sides(15)[:2], make(server, keeper=cache), prompts=sides(15)[2])
        assert found.cost.calls == 0
        assert [row.preference for row in found.judgements] == ([1, 0, 0, 1] * 8)[:30]


# --- the cache file ------------------------------------------------------------------------------------------------


def test_cache_refuses_what_is_not_its_own(tmp_path: Path) -> None:
    import sqlite3

    (tmp_path / "text").write_text("not a database, and long enough to be sure of it" * 40)
    with pytest.raises(CoalaError, match="not a database"):
        VerdictCache(tmp_path / "text")
    other = sqlite3.connect(tmp_path / "other.sqlite")
    other.execute("CREATE TABLE mine (x)")
    other.commit()
    other.close()
    with pytest.raises(CoalaError, match="not a COALA verdict cache"):
        VerdictCache(tmp_path / "other.sqlite")
    with pytest.raises(CoalaError, match="no such folder"):
        VerdictCache(tmp_path / "nowhere" / "v.sqlite")


def test_cache_keeps_any_text_across_threads(tmp_path: Path) -> None:
    texts = {f"k{i}": f"\x00 \N{SNOWMAN} '\" {i}" for i in range(40)}
    with VerdictCache(tmp_path / "v.sqlite") as cache, VerdictCache(tmp_path / "v.sqlite") as other:
        threads = [
            threading.Thread(target=lambda c=c: [c.put(k, v) for k, v in texts.items()]) for c in (cache, other, cache)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {key: other.get(key) for key in texts} == texts
        assert other.get("nothing") is None
        assert len(cache) == 40
        cache.put("k0", "new")
        assert other.get("k0") == "new"


def test_a_prompt_that_is_not_known_stops_before_a_call(serve: Serve) -> None:
    server = serve(honest)
    ours, theirs, _ = sides(2)
    found = judge_many(ours, theirs, make(server))
    assert "needs the prompts" in found.stopped
    assert server.requests == []
    with pytest.raises(JudgeStopped, match="grades single answers"):
        make(server, "grade").verdict(user("q"), ours[0], theirs[0])
    with pytest.raises(JudgeFailure):
        make(serve(lambda body, before: say("?"))).compare(user("q"), ours[0], theirs[0])
