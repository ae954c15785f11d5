"""What every test keeps to, read from the source of all of them: no clock, no sleep, no hurry, no network, no silence.

A machine that is busy, slow or of another make must not fail a test. Time is moved by the tests (`waiting.Clock`,
`serving.Here.skip`), what takes long is waited for with `waiting.wait_for`, and `waiting.linger` is for what plays a
slow server or disk. Everything that has to do with real time is in tests/waiting.py, which alone is ignored.
"""

from __future__ import annotations

import ast
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
CLOCKS = {
    *("time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns"),
    *("process_time", "process_time_ns", "thread_time", "thread_time_ns", "clock_gettime", "default_timer"),
}
# Calls that give up after so many seconds, by the last part of their name.
WAITS = {
    *("wait", "wait_for", "join", "get", "communicate", "run", "call", "check_call", "check_output", "result"),
    *("acquire", "create_connection", "settimeout", "urlopen", "HTTPConnection", "TextIteratorStreamer"),
    *("post", "request", "stream", "put", "options", "head", "Client", "select"),
}
SHORTEST = 120  # seconds
SKIPS = {"skip", "skipif", "importorskip", "xfail"}


def name_of(node: ast.expr) -> str:
    """Dotted: ``time.sleep``; the parts that are no names are left out."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}".lstrip(".")
    return node.id if isinstance(node, ast.Name) else ""


def faults(source: str) -> Iterator[tuple[int, str]]:
    """Line and rule broken."""
    tree = ast.parse(source)
    origin = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    } | {
        alias.asname: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.asname
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            first, _, rest = name_of(node).partition(".")
            module, _, last = f"{origin.get(first, first)}{'.' * bool(rest)}{rest}".rpartition(".")
            if (module in ("time", "timeit") and last in CLOCKS) or (
                module.endswith(("datetime", "date")) and last in ("now", "utcnow", "today")
            ):
                yield node.lineno, f"reads a clock ({module}.{last})"
            if module in ("time", "asyncio", "threading", "anyio", "trio") and last == "sleep":
                yield node.lineno, f"sleeps ({module}.sleep)"
        if not isinstance(node, ast.Call):
            continue
        last = name_of(node.func).rpartition(".")[2]
        given = {word.arg: word.value for word in node.keywords}
        if last == "settings" and ast.unparse(given.get("deadline", ast.Constant(None))) != "None":
            yield node.lineno, "has a deadline of its own for examples"
        if last in WAITS:
            limit = given.get("timeout")
            if limit is None and last in ("settimeout", "wait", "wait_for", "join", "result", "communicate"):
                limit = next(iter(node.args), None)
            if limit is None and last == "create_connection" and len(node.args) > 1:
                limit = node.args[1]
            if isinstance(limit, ast.Constant) and isinstance(limit.value, int | float) and limit.value < SHORTEST:
                yield node.lineno, f"gives up after {limit.value} s"
        if last in SKIPS and "mark.xfail" not in ast.unparse(node.func):
            reason = given.get("reason") or (next(iter(node.args), None) if last == "skip" else None)
            if reason is None or (isinstance(reason, ast.Constant) and not str(reason.value).strip()):
                yield node.lineno, f"{last} without a reason"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in (f"pytest.mark.{word}" for word in SKIPS):
            called = any(isinstance(c, ast.Call) and c.func is node for c in ast.walk(tree))
            if not called:
                yield node.lineno, f"{node.attr} without a reason"


FILES = sorted(path for path in TESTS.glob("*.py") if path.name not in ("waiting.py", "conftest.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_test_depends_on_time_or_hides_that_it_is_left_out(path: Path) -> None:
    assert [f"{path.name}:{line} {what}" for line, what in sorted(set(faults(path.read_text("utf-8"))))] == []


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import time\nassert time.monotonic() - began < 3", "reads a clock"),
        ("from time import perf_counter as now\nnow()", "reads a clock"),
        ("import time as t\nt.process_time()", "reads a clock"),
        ("from datetime import datetime\ndatetime.now()", "reads a clock"),
        ("import time\ntime.sleep(1)", "sleeps"),
        ("async def f(): await asyncio.sleep(0.1)", "sleeps"),
        ("from time import sleep\nsleep(1)", "sleeps"),
        ("@settings(max_examples=3, deadline=200)\ndef f(): ...", "has a deadline"),
        ("process.communicate(timeout=60)", "gives up after 60 s"),
        ("thread.join(10)", "gives up after 10 s"),
        ("socket.create_connection(place, 5)", "gives up after 5 s"),
        ("httpx.get(url, timeout=0.5)", "gives up after 0.5 s"),
        ("pytest.skip()", "skip without a reason"),
        ("pytest.importorskip('trl')", "importorskip without a reason"),
        ("@pytest.mark.skipif(True)\ndef f(): ...", "skipif without a reason"),
        ("@pytest.mark.skip\ndef f(): ...", "skip without a reason"),
    ],
)
def test_each_rule_finds_what_it_forbids(source: str, what: str) -> None:
    assert [found for _, found in faults(source) if found.startswith(what)]


def test_each_rule_leaves_alone_what_it_does_not_mean() -> None:
    assert not list(faults("clock.time(); ', '.join(words); found.get('timeout', 3); pytest.skip('no GPU')"))
    assert not list(faults("here.skip(3); events.wait(PATIENCE); Limits(deadline=0.5, timeout=1.0)"))


def test_nothing_but_the_loopback_is_reached() -> None:
    """Not by a connection, and not by a question for an address."""
    for family, address in ((socket.AF_INET, ("192.0.2.1", 80)), (socket.AF_INET6, ("2001:db8::1", 80, 0, 0))):
        with socket.socket(family) as one:
            for reach in (one.connect, one.connect_ex):
                with pytest.raises(AssertionError, match="tried to reach"):
                    reach(address)
    with pytest.raises(AssertionError, match="tried to reach"):
        socket.getaddrinfo("models.example", 443)
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_compiled_code_is_not_shared_with_another_set_of_instructions() -> None:
    """What XLA compiled for one processor or flag may end the process on another."""

    def folder(**environment: str) -> str:
        code = "import tests.conftest, os; print(os.environ['JAX_COMPILATION_CACHE_DIR'])"
        kept = {
            key: value for key, value in os.environ.items() if key not in ("JAX_COMPILATION_CACHE_DIR", *environment)
        }
        done = subprocess.run(
            [sys.executable, "-c", code], env={**kept, **environment}, cwd=TESTS.parent, capture_output=True, check=True
        )
        return done.stdout.decode().strip()

    plain = folder(XLA_FLAGS="")
    assert folder(XLA_FLAGS="") == plain
    assert folder(XLA_FLAGS="--xla_cpu_max_isa=SSE4_2") != plain
