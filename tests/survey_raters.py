"""Raters for the tests and the benchmark of the survey: the server as a process, and people who read its pages by HTTP.

A rater knows only what a browser is given. Each picks an answer by its text (a hash with the rater's own salt), so that
what was chosen can be told from the texts alone, whatever order the server showed them in.
"""

from __future__ import annotations

import hashlib
import html
import http.client
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlencode

from coala.survey import Survey, SurveyPrompt, build
from coala.values import Generation

from .waiting import PATIENCE, linger, wait_for

PASSWORD = "an organiser's password"
ANSWER = re.compile(r'value="([A-Z])" required( checked)?>.*?<span class="text" dir="auto">(.*?)</span></label>', re.S)
WORDS = ("light", "water", "energy", "history", "balance", "motion", "number", "pressure", "signal", "memory", "field")


def made_up(
    methods: tuple[str, ...] = ("COALA", "DPO", "ORPO", "SFT"),
    categories: tuple[str, ...] = ("edu", "imdb"),
    n: int = 8,
    **settings: object,
) -> Survey:
    """A survey of texts made of words; the methods' answers differ in length, as real ones do."""
    rng = random.Random(7)
    prompts = [SurveyPrompt(f"{c}-{i}", f"Prompt {i} of {c} <b>&amp;", c) for c in categories for i in range(n)]
    generations = {
        method: [
            Generation(
                p.prompt_id, " ".join(rng.choices(WORDS, k=rng.randint(4, 10 + 10 * place))), "none", 1, 0, 0.0, 0.0
            )
            for p in prompts
        ]
        for place, method in enumerate(methods)
    }
    return build(generations, prompts, **({"per_category": n} | settings))  # type: ignore[arg-type]


class Server:
    """`coala survey serve` in a process of its own, which can be killed and started again on the same port."""

    def __init__(self, folder: Path, *options: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._folder, self._options = folder, options
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Server:
        code = "from coala.cli.survey import app; app()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, "serve", str(self._folder), "--port", str(self.port), *self._options],
            env=os.environ | {"COALA_SURVEY_ADMIN_TOKEN": PASSWORD},
            stderr=(self._folder / "server.log").open("ab"),
        )

        def answers() -> bool:
            assert self._process is not None
            assert self._process.poll() is None, f"the server did not start: {self.log}"
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), PATIENCE).close()
                return True
            return False

        wait_for(answers)
        return self

    def kill(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def log(self) -> str:
        return (self._folder / "server.log").read_text()


@dataclass
class HttpRater:
    """Answers the whole survey through one server, whatever breaks; ``picked`` holds page number -> text chosen."""

    port: int
    salt: int
    trouble: float = 0.1
    token: str = ""
    picked: dict[int, str] = field(default_factory=dict)
    receipts: int = 0
    cut: int = 0

    def __post_init__(self) -> None:
        self._rng = random.Random(self.salt)

    def choice(self, text: str) -> str:
        return hashlib.sha256(f"{self.salt} {text}".encode()).hexdigest()

    def run(self) -> None:
        path = "/"
        for _ in range(10_000):  # steps; a page takes a few
            try:
                path = self._step(path)
            except (OSError, http.client.HTTPException):
                # The server is down or has hung up: come back by the personal link, or fill in the first page again.
                linger(0.02 + 0.1 * self._rng.random())
                path = f"/s/{self.token}" if self.picked else path
                continue
            if path == "":
                return
        raise AssertionError(f"rater {self.salt} did not finish; page {len(self.picked) + 1}")

    def _step(self, path: str) -> str:
        status, page, location = self._ask("GET", path)
        if location:
            return location
        if status == 404 and path.endswith(self.token):
            return "/"  # the first page was sent but never arrived
        assert status == 200, (status, page[:300])
        if "Thank you" in page:
            return ""
        if (form := re.search(r'action="/s/([\w-]+)/begin"', page)) is not None:
            # A browser that lost the answer sends the same form again.
            self.token = self.token or form.group(1)
            status, page, location = self._ask("POST", f"/s/{self.token}/begin", {"agree": "yes"})
            assert status == 303, page[:300]
            return location
        number = int(re.search(r'action="/s/[\w-]+/(\d+)"', page).group(1))  # type: ignore[union-attr]
        # Whatever was acknowledged is there after any number of kills.
        assert number > self.receipts, f"page {number} again, but {self.receipts} answers were acknowledged"
        answers = {letter: html.unescape(text) for letter, _, text in ANSWER.findall(page)}
        letter = max(answers, key=lambda one: self.choice(answers[one]))
        self.picked[number] = answers[letter]
        target, fields = f"/s/{self.token}/{number}", {"choice": letter}
        luck = self._rng.random()
        if luck < self.trouble:
            self._send_and_hang_up(target, fields)
            self.cut += 1
            return f"/s/{self.token}"
        if luck < 1.5 * self.trouble:
            self._ask("POST", target, fields)  # a double click
        status, page, location = self._ask("POST", target, fields)
        assert status == 303, page[:300]
        self.receipts = number
        if number > 1 and self._rng.random() < self.trouble:
            self._look_back(number)
        return location

    def _look_back(self, number: int) -> None:
        """The back button, and the form there sent again unchanged."""
        status, page, _ = self._ask("GET", f"/s/{self.token}/{number}")
        kept = [(letter, html.unescape(text)) for letter, checked, text in ANSWER.findall(page) if checked]
        assert status == 200
        assert [text for _, text in kept] == [self.picked[number]]
        self._ask("POST", f"/s/{self.token}/{number}", {"choice": kept[0][0]})

    def _ask(self, method: str, path: str, fields: dict[str, str] | None = None) -> tuple[int, str, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            body = None if fields is None else urlencode(fields)
            headers = {} if fields is None else {"Content-Type": "application/x-www-form-urlencoded"}
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(), answer.headers.get("Location", "")
        finally:
            connection.close()

    def _send_and_hang_up(self, path: str, fields: dict[str, str]) -> None:
        body = urlencode(fields)
        with socket.create_connection(("127.0.0.1", self.port), PATIENCE) as raw:
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-www-form-urlencoded\r\n"
            whole = f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()
            # Sometimes not even the whole request gets out.
            raw.sendall(whole[: self._rng.choice([len(whole), len(whole), len(whole) - 3, len(head) // 2])])


def crowd(server: Server, n: int, kills: int, *, trouble: float = 0.1) -> list[HttpRater]:
    """``n`` raters at once while the server is killed ``kills`` times at random moments and started again."""
    raters = [HttpRater(server.port, salt, trouble) for salt in range(n)]
    failures: list[BaseException] = []

    def answer(rater: HttpRater) -> None:
        try:
            rater.run()
        except BaseException as error:  # noqa: BLE001 - shown by the caller's thread
            failures.append(error)

    threads = [threading.Thread(target=answer, args=(rater,)) for rater in raters]
    for thread in threads:
        thread.start()
    for kill in range(kills):
        # When about a share (kill + 1)/(kills + 1) of the work of the fastest has been done.
        goal = (kill + 1) / (kills + 1)
        pages = goal * _pages(server)

        def ready(pages: float = pages) -> bool:
            alive = any(thread.is_alive() for thread in threads)
            return not alive or bool(failures) or sum(rater.receipts for rater in raters) / n >= pages

        wait_for(ready)
        assert any(thread.is_alive() for thread in threads), "all had finished before the kill"
        server.kill()
        server.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return raters


def _pages(server: Server) -> int:
    from coala.survey import ballot, load_survey

    return len(ballot(load_survey(server._folder), 0))
