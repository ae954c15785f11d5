"""`coala serve` as people run it: what it refuses to start with, how it ends, and the page in a real browser."""

from __future__ import annotations

import json
import re
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

import httpx
from typer.testing import CliRunner

from coala.cli import app as cli
from coala.values import CoalaError

from .serving import Here, There
from .waiting import PATIENCE, wait_for

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


def invoke(*words: Any, **environment: str) -> str:
    """The error that the command ends with."""
    done = CliRunner().invoke(cli, ["serve", *map(str, words)], env={"COALA_API_KEY": None, **environment})
    assert isinstance(done.exception, CoalaError), done.output
    return str(done.exception)


def test_others_than_loopback_need_a_key(served_run: Path) -> None:
    said = invoke(served_run, "--host", "0.0.0.0")
    assert "COALA_API_KEY" in said
    assert "--no-key" in said
    assert "MINE" in invoke(served_run, "--host", "0.0.0.0", "--api-key-env", "MINE")
    assert "at least 16" in invoke(served_run, COALA_API_KEY="short")
    assert "hard to guess" in invoke(served_run, COALA_API_KEY="ein Schlüssel mit Umlaut")


def test_what_cannot_be_served_is_said_before_anything_is_loaded(served_run: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "Cannot listen" in invoke(served_run, "--port", taken.getsockname()[1])
    assert "not a run folder" in invoke(tmp_path, "--port", "45871")
    assert "deadline is 0" in invoke(served_run, "--deadline", "0")


def test_help_has_examples() -> None:
    done = CliRunner().invoke(cli, ["serve", "--help"])
    assert done.exit_code == 0
    assert "coala serve runs/demo" in done.output
    for option in ("--host", "--port", "--max-rows", "--queue", "--deadline", "--max-body", "--api-key-env"):
        assert option in done.output


@pytest.mark.slow
@pytest.mark.nightly
def test_it_ends_in_order_and_says_what_it_did(served_run: Path) -> None:
    """Requests at hand are finished, new ones refused, the command ends with 0 and its summary."""
    key = "a key that is hard to guess"
    with There(served_run, "--grace", "300", COALA_API_KEY=key) as there:
        bearer = {"Authorization": f"Bearer {key}"}
        assert httpx.get(f"{there.url}/v1/models").status_code == 401
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 160, "stream": True}
        done: dict[str, Any] = {}
        with (
            httpx.stream("POST", f"{there.url}/v1/chat/completions", json=body, headers=bearer) as answer,
            httpx.Client(headers=bearer) as kept,
        ):
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            kept.get(f"{there.url}/healthz")
            ending = threading.Thread(target=lambda: done.update(there.end()))
            ending.start()
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        written = sum('"delta": {"content"' in line for line in rest)
        assert written > 60  # it was far from its end when it was told to end
        ending.join(PATIENCE)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{there.url}/healthz")
        assert done["served"] == "tiny"
        assert done["requests"] >= 3
        assert done["tokens"] >= 160
        assert "Traceback" not in there.log
        assert key not in there.log


@pytest.mark.slow
@pytest.mark.nightly
def test_what_is_not_done_in_time_is_cut_off(served_run: Path) -> None:
    with There(served_run, "--grace", "1", "--max-tokens", "16000", "--deadline", "300") as there:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 16000, "stream": True}
        with httpx.stream("POST", f"{there.url}/v1/chat/completions", json=body, timeout=PATIENCE) as answer:
            lines = answer.iter_lines()
            next(lines)
            assert there.end(signal.SIGINT)["served"] == "tiny"
            with pytest.raises(httpx.HTTPError):
                list(lines)


# --- the page -------------------------------------------------------------------------------------------------------


class Page:
    """The playground in a fresh window, with what the browser complained of and asked for."""

    def __init__(self, browser: Any, url: str, **window: Any) -> None:
        self.context = browser.new_context(**window)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.asked: list[tuple[str, Any]] = []
        self.page.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda one: self.asked.append((one.url, one.post_data and json.loads(one.post_data))))
        self.page.on("dialog", lambda dialog: self.complaints.append(f"dialog {dialog.message}"))
        self.page.goto(url)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


def bodies(page: Page, path: str) -> list[Any]:
    return [body for url, body in page.asked if url.endswith(path)]


@pytest.mark.slow
@pytest.mark.nightly
def test_guided_and_unguided_side_by_side(browser: Any, served_run: Path) -> None:
    from coala.alignment import load_parts
    from coala.decoding import generate
    from coala.values import user

    backbone, head, guidance = load_parts(served_run)
    guidance = guidance.changed(rule="min-max")
    prompt = "<img src=x onerror=alert(1)> tell me <b>more"
    with Here(backbone, head, guidance=guidance) as here, Page(browser, here.url) as seen:
        page = seen.page
        page.get_by_label("Prompt").fill(prompt)
        slider = page.get_by_role("slider", name=re.compile("Strength"))
        page.get_by_label("Mode").select_option("block")  # which has no strength by that rule: the slider means tokens
        assert page.locator("#strength-shown").inner_text() == "does nothing here"
        slider.focus()
        for _ in range(8):
            page.keyboard.press("ArrowRight")
        assert slider.input_value() == "4"
        assert page.locator("#strength-shown").inner_text() == "4"
        page.get_by_label("Tokens").fill("300")
        page.get_by_label("Seed").fill("11")
        # Text appears while it is written: what is shown grows.
        page.evaluate(
            """() => {
                const reply = document.querySelector("#guided .reply");
                window.lengths = [];
                const note = () => window.lengths.push(reply.textContent.length);
                new MutationObserver(note).observe(reply, { childList: true });
            }"""
        )
        page.get_by_role("button", name="Compare").click()
        page.locator("#guided .strip span").first.wait_for(state="attached")
        lengths = page.evaluate("window.lengths")
        assert len(set(lengths)) > 5
        assert lengths == sorted(lengths)
        asked = {body["model"]: body for body in bodies(seen, "/v1/chat/completions")}
        assert asked["tiny"]["guidance"] == {"mode": "token", "strength": 4}
        # What is shown is what the library writes.
        rules = {"unguided": {"mode": "none"}, "guided": {"strength": 4.0}}
        from dataclasses import replace

        for side, rule in rules.items():
            (wanted,) = generate(
                [user(prompt)],
                backbone,
                head,
                replace(guidance, **rule),
                max_new_tokens=300,
                seed=11,  # type: ignore[arg-type]
            )
            card = page.locator(f"#{side}")
            assert card.locator(".reply").text_content() == wanted.text
            assert card.locator(".score").text_content() == f"score {wanted.score:.3f}"
            pieces = card.locator(".strip span")
            assert "".join(pieces.all_text_contents()) == wanted.text
            shades = set(pieces.evaluate_all("all => all.map((one) => one.className)"))
            assert len(shades) > 2
        # One scale for both: the darkest ends belong to the lowest and the highest score of all.
        scored = page.locator(".strip span").evaluate_all("all => all.map((one) => [Number(one.title), one.className])")
        assert min(scored)[1] == "h0"
        assert max(scored)[1] == "h8"
        assert seen.complaints == []
        assert all(url.startswith((here.url, "data:")) for url, _ in seen.asked)


@pytest.mark.slow
def test_markup_that_a_model_writes_stays_text(browser: Any, served_run: Path) -> None:
    """Scores of hostile text: the strip shows it letter by letter and nothing of it becomes an element."""
    from coala.alignment import load_parts

    hostile = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
    with Here(*load_parts(served_run)[:2]) as here, Page(browser, here.url) as seen:
        page = seen.page
        page.get_by_label("Prompt").fill(hostile)
        page.evaluate("(text) => heat({ guided: text }, undefined)", hostile)
        page.evaluate("() => { document.querySelector('#replies').hidden = false; }")
        page.locator("#guided .strip span").first.wait_for(state="attached")
        assert page.locator("#guided .strip").text_content() == hostile
        assert page.locator(".strip img, .strip script").count() == 0
        assert page.evaluate("window.hacked") is None
        assert seen.complaints == []


@pytest.mark.slow
def test_best_of_n_on_a_phone_and_problems_are_told(browser: Any, served_run: Path) -> None:
    from coala.alignment import load_parts

    with Here(*load_parts(served_run)[:2]) as here, Page(browser, here.url, **PHONE) as seen:
        page = seen.page
        page.get_by_role("button", name="Best of N").tap()
        assert page.locator("#table").is_hidden()  # the browser asks for a prompt
        page.get_by_label("Prompt").fill("tell me a story")
        page.get_by_label("Replies").fill("6")
        page.get_by_label("Tokens").fill("12")
        page.get_by_role("button", name="Best of N").tap()
        page.locator("#table tbody tr").nth(5).wait_for()
        rows = page.locator("#table tbody tr")
        assert rows.count() == 6
        scores = [float(text) for text in page.locator("#table tbody td:nth-child(2)").all_inner_texts()]
        assert scores == sorted(scores, reverse=True)
        assert len(set(page.locator("#table tbody td.text").all_text_contents())) == 6
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        for button in page.get_by_role("button").all():
            assert button.bounding_box()["height"] >= 44  # a finger's width
        page.get_by_label("Prompt").fill("日" * 7000)
        page.get_by_role("button", name="Compare").tap()
        page.get_by_role("alert").wait_for()
        assert "context holds" in page.get_by_role("alert").inner_text()
        assert page.get_by_role("button", name="Compare").is_enabled()


@pytest.mark.slow
def test_stop_ends_the_replies_and_a_key_is_asked_for(browser: Any, served_run: Path) -> None:
    from coala.alignment import load_parts

    key = "a key that is hard to guess"
    with Here(*load_parts(served_run)[:2], key=key, local=False) as here, Page(browser, here.url) as seen:
        page = seen.page
        page.get_by_label("Prompt").fill("hello")
        page.get_by_label("Tokens").fill("1024")
        page.get_by_label("API key").fill("wrong")
        page.get_by_role("button", name="Compare").click()
        page.get_by_role("alert").wait_for()
        assert "key" in page.get_by_role("alert").inner_text()
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Compare").click()
        wait_for(lambda: len(page.locator("#guided .reply").text_content()) > 20)
        page.get_by_role("button", name="Stop").click()
        wait_for(lambda: here.worker.unfinished == 0)
        wait_for(lambda: page.get_by_role("button", name="Compare").is_enabled())
        assert page.get_by_role("alert").is_hidden()
        assert key not in page.content()
