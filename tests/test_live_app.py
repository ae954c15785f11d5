"""The page of a session over HTTP and in a browser: what is refused, what is never lost, what a rater can see."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coala.live.app import HEADERS, LARGEST_BODY, create_app
from coala.live.jobs import Jobs
from coala.live.journal import VERDICTS, read_journal
from coala.live.pool import reply_event
from coala.live.session import FOLDER, JOURNAL, OWNER, Draw, Session
from coala.live.settings import LiveSettings
from coala.live.writer import Threads
from coala.store import RunFolder, load_json, load_pairs, run_policy
from coala.values import user
from tests.conftest import REPOSITORY
from tests.waiting import PATIENCE, wait_for

FILM = REPOSITORY / "src" / "coala" / "assets" / "film-lm"
MARKUP = "<script>alert(1)</script> & \u05e9"
TOKENS = {OWNER: "owner-token-0123456789", "rater-1": "rater-token-0123456789"}


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    """A session whose replies are there; no model is asked for any."""
    with Session(tmp_path, LiveSettings(replies=6), {"weights": "w"}, clock=lambda: "now") as made:
        made.add_prompts([user(f"{MARKUP} {i}") for i in range(10)])
        for name, token in TOKENS.items():
            made.rater(name, lambda token=token: token)  # type: ignore[misc]
        rng = np.random.default_rng(0)
        for prompt in made.journal.prompts.values():
            for k in range(6):
                feature = rng.standard_normal(5).astype("f4")
                made._deliver([reply_event(prompt.id, k, f"{MARKUP} {prompt.id} {k}", "unguided", feature)])
        yield made


@pytest.fixture
def client(session: Session) -> Iterator[TestClient]:
    idle: Any = None  # no model: threads that are not begun ask for nothing
    app = create_app(session, Threads(session, idle), Jobs(session.path.parent), title="Which?")
    site = "http://127.0.0.1:8000"
    with TestClient(app, base_url=site, follow_redirects=False, raise_server_exceptions=False) as client:
        yield client


def at(name: str, path: str = "") -> str:
    return f"/r/{TOKENS[name]}{path}"


def state(client: TestClient, name: str = OWNER) -> dict[str, Any]:
    answer = client.get(at(name, "/state"))
    assert answer.status_code == 200
    found: dict[str, Any] = answer.json()
    return found


def test_from_the_first_page_to_a_pair_and_back(client: TestClient, session: Session) -> None:
    assert client.get("/").headers["location"] == at(OWNER)
    page = client.get(at(OWNER))
    for name, value in HEADERS.items():
        assert page.headers[name] == value
    assert MARKUP not in page.text
    asked = state(client)["question"]
    assert set(asked) == {"id", "prompt", "first", "second"}  # nothing of what the head thinks, or what is held out
    said = {"question": asked["id"], "click": "c1", "verdict": "first", "tags": ["kind"]}
    following = client.post(at(OWNER, "/answer"), json=said).json()
    assert following["answered"] == 1
    assert following["question"]["id"] != asked["id"]
    assert following["last"] == {"question": asked["id"], "click": "c1", "verdict": "first"}
    assert client.post(at(OWNER, "/answer"), json=said).json()["answered"] == 1
    assert client.post(at(OWNER, "/answer"), json={**said, "click": "c2"}).status_code == 409
    back = client.post(at(OWNER, "/undo"), json={"question": asked["id"], "click": "c1"}).json()
    assert back["answered"] == 0
    assert back["question"] == asked
    assert state(client)["answered"] == 0
    # Whoever comes by another link has pairs of their own, and neither prompts nor an end.
    other = state(client, "rater-1")
    assert other["question"]["id"] not in (asked["id"], following["question"]["id"])
    assert other["jobs"] == {}
    for path, body in (("/prompt", {"text": "x"}), ("/job", {"name": "fit"})):
        assert client.post(at("rater-1", path), json=body).status_code == 403
    assert "Another prompt" in page.text
    assert "Another prompt" not in client.get(at("rater-1")).text
    assert client.post(at(OWNER, "/prompt"), json={"text": " a new one "}).status_code == 200
    work = session.work()
    assert isinstance(work, Draw)
    assert {prompt.turns for prompt, _ in work.prompts} == {user("a new one")}


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/answer", {"question": "q1", "click": "c", "verdict": "third"}, 400, "verdict"),
        ("/answer", {"question": "q1", "click": "c", "verdict": "edited"}, 400, "side"),
        ("/answer", {"question": "q1", "click": "c", "verdict": "first", "text": "x"}, 400, "side"),
        ("/answer", {"question": "../q", "click": "c", "verdict": "first"}, 400, "question"),
        ("/answer", {"question": "q99", "click": "c", "verdict": "first"}, 409, "assigned to another rater"),
        ("/answer", {"click": "c", "verdict": "first"}, 400, "question is missing"),
        ("/undo", {"question": "q99", "click": "c"}, 409, "not yours"),
        ("/prompt", {"text": " "}, 400, "not empty"),
        ("/job", {"name": "sell"}, 400, "name"),
        ("/job", {"name": "distil"}, 409, "no finished run"),
        ("/job", {"name": "fit"}, 409, "fix: click more"),
        ("/job", {"name": "reward-model"}, 409, "no finished run"),
        ("/nothing", {}, 404, "page does not exist"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(
    client: TestClient, session: Session, path: str, body: dict[str, Any], status: int, said: str
) -> None:
    state(client)
    before = (session.path / JOURNAL).read_bytes()
    answer = client.post(at(OWNER, path), json=body)
    assert answer.status_code == status
    assert said in answer.json()["error"]["message"]
    assert (session.path / JOURNAL).read_bytes() == before


def test_strangers_are_refused(client: TestClient) -> None:
    body = {"question": "q1", "click": "c", "verdict": "first"}
    path = at(OWNER, "/answer")
    assert client.get("/r/unknown-token-012345678").status_code == 404
    assert client.get(at(OWNER), headers={"Host": "evil.example"}).status_code == 403
    assert client.post(path, json=body, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert client.post(path, json=body, headers={"Origin": "http://evil.example"}).status_code == 403
    form = client.post(path, content=json.dumps(body), headers={"Content-Type": "text/plain"})
    assert form.status_code == 415
    assert client.post(path, content=b"x" * (LARGEST_BODY + 1)).status_code == 413
    assert client.put(path, json=body).status_code == 405


BODIES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
CLICKS = st.fixed_dictionaries(
    {},
    optional={
        "question": st.sampled_from(["q1", "q2", "q3"]) | BODIES,
        "click": st.sampled_from(["c1", "c2"]) | BODIES,
        "verdict": st.sampled_from(VERDICTS) | BODIES,
        "tags": st.lists(st.text(max_size=50), max_size=12) | BODIES,
        "side": st.sampled_from(["first", "second", ""]) | BODIES,
        "text": st.text(max_size=30) | BODIES,
    },
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(["/answer", "/undo", "/prompt", "/state", "/job"]),
    body=st.one_of(CLICKS.map(lambda one: json.dumps(one).encode()), BODIES.map(lambda one: json.dumps(one).encode()),
                   st.binary(max_size=200)),
)  # fmt: skip
def test_whatever_is_sent_the_journal_stays_sound(client: TestClient, session: Session, path: str, body: bytes) -> None:
    state(client)
    answer = client.post(at("rater-1", path), content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code < 500
    kept = read_journal((session.path / JOURNAL).read_bytes())
    assert kept.answered == session.journal.answered
    assert state(client)["question"] is not None or state(client)["waiting"]


def test_a_full_disk_is_told_and_the_same_click_counts_afterwards(client: TestClient, session: Session) -> None:
    import resource

    asked = state(client)["question"]["id"]
    size = (session.path / JOURNAL).stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    said = {"question": asked, "click": "c1", "verdict": "second"}
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
    try:
        answer = client.post(at(OWNER, "/answer"), json=said)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert answer.status_code == 507
    assert "could not be written" in answer.json()["error"]["message"]
    assert "is safe" in answer.json()["error"]["message"]
    assert client.post(at(OWNER, "/answer"), json=said).json()["answered"] == 1


# --- the command, killed; the browser ----------------------------------------------------------------------------


class Live:
    """`coala live` in a process of its own, which can be killed and started again on the same port."""

    def __init__(self, out: Path, prompts: Path, *options: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = out.with_name("live.log")
        self._command = [sys.executable, "-m", "coala", "live", "--model", str(FILM), "--template", "chat"]
        self._command += ["--prompts", str(prompts), "--out", str(out), "--port", str(self.port)]
        self._command += ["--max-new-tokens", "8", "--replies", "3", *options]

    def start(self) -> Live:
        with self.log.open("ab") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log, env=environment)

        def answers() -> bool:
            with suppress(OSError):
                return bool(urllib.request.urlopen(f"{self.url}/page.css", timeout=PATIENCE).status == 200)
            return False

        wait_for(answers, self.process)
        return self

    def end(self, sig: int = signal.SIGTERM) -> int:
        self.process.send_signal(sig)
        return self.process.wait(PATIENCE)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def called(place: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """What the server answers at ``path`` of the page ``place``; with a ``body``, posted."""
    request = urllib.request.Request(place + path, None if body is None else json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    return json.load(urllib.request.urlopen(request, timeout=PATIENCE))


def prompts_file(folder: Path, n: int) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"This film number {i} is"}) + "\n" for i in range(n)))
    return path


@pytest.mark.slow
@pytest.mark.nightly
def test_killed_again_and_again_no_click_is_lost_or_doubled_and_the_run_is_an_ordinary_one(tmp_path: Path) -> None:
    out = tmp_path / "run"
    live = Live(out, prompts_file(tmp_path, 12), "--ask", "active").start()
    acknowledged: dict[str, str] = {}
    place = urllib.request.urlopen(f"{live.url}/", timeout=PATIENCE).url

    call = partial(called, place)

    def killer(after: threading.Event) -> None:
        after.wait(PATIENCE)
        live.process.kill()

    n = 0
    while n < 24:
        wait_for(lambda: call("/state")["question"])
        question, click = call("/state")["question"], f"click-{n}"
        said = {"question": question["id"], "click": click, "verdict": "first" if n % 3 else "second"}
        if n in (5, 14):  # killed while the click is on its way; then sent again
            going = threading.Event()
            thread = threading.Thread(target=killer, args=(going,))
            thread.start()
            going.set()
            with suppress(OSError, ValueError):
                call("/answer", said)
            thread.join()
            live.process.wait(PATIENCE)
            live.start()
        call("/answer", said)
        acknowledged[question["id"]] = click
        n += 1
    kept = read_journal((out / FOLDER / JOURNAL).read_bytes())
    assert {name: one.click for name, one in kept.answered.items()} == acknowledged
    call("/job", {"name": "fit"})
    wait_for(lambda: not call("/state")["running"])
    assert "finished" in call("/state")["jobs"]["fit"]["said"], live.log.read_text()
    assert live.end() == 0
    pairs = load_pairs(out / "pairs-train.jsonl") + load_pairs(out / "pairs-eval.jsonl")
    assert len(pairs) == 24
    assert load_json(out / "report.json")["summary"]
    done = subprocess.run(
        [sys.executable, "-m", "coala", "align", "--recipe", str(out / "run.json"), "--out", str(out)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in live.log.read_text()


@pytest.mark.slow
@pytest.mark.nightly
def test_from_no_pairs_to_a_served_model_and_again_after_more_clicks(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Every button in its order, as docs/tutorials/from_nothing_to_a_served_model.md presses them."""
    out = tmp_path / "run"
    live = Live(out, prompts_file(tmp_path, 20), "--max-new-tokens", "16", "--replies", "4").start()
    request.addfinalizer(live.process.kill)
    place = urllib.request.urlopen(f"{live.url}/", timeout=PATIENCE).url

    call = partial(called, place)

    def click(n: int) -> None:
        for _ in range(n):
            wait_for(lambda: call("/state")["question"], live.process)
            asked = call("/state")["question"]
            better = "first" if len(asked["first"]) < len(asked["second"]) else "second"
            call("/answer", {"question": asked["id"], "click": f"click-{asked['id']}", "verdict": better})

    def press(name: str) -> str:
        call("/job", {"name": name})
        wait_for(lambda: not call("/state")["running"], live.process)
        told = call("/state")["jobs"][name]
        return f"{told['state']}: {told['said']}"

    click(60)
    assert press("fit").startswith("done: The run is finished"), live.log.read_text()
    assert press("distil").startswith(f"done: The guidance is distilled into {out / 'distilled'}.")
    served = out.with_name("run-served")
    assert press("export").startswith(f"done: The model with its guidance is {served};")
    assert call("/state")["jobs"]["export"]["commands"] == [
        [f"vllm serve {served}", "Serves it, one forward pass a token."]
    ]
    assert str(out / "exported") in press("reward-model")
    from transformers import AutoModelForCausalLM

    base, changed = (
        AutoModelForCausalLM.from_pretrained(folder).get_output_embeddings().weight.detach().double().numpy()
        for folder in (FILM, served)
    )
    left, right = run_policy(RunFolder(out)).factors()
    assert np.abs(changed - base - base @ left @ right).max() < 1e-3 * np.abs(base).max()
    assert np.abs(changed - base).max() > 1e-2 * np.abs(base).max()
    click(1)
    assert press("fit").startswith("done")
    with pytest.raises(urllib.error.HTTPError) as refused:
        call("/job", {"name": "export"})
    assert "Press Distil first" in json.load(refused.value)["error"]["message"]
    assert press("distil").startswith("done")
    assert f"{served} is there and is not of this policy" in press("export")
    assert live.end() == 0
    assert "Traceback" not in live.log.read_text()


@pytest.mark.parametrize(
    ("content", "said"), [("", "no rows"), ('{"nothing": 1}\n', "Fix|fix"), ("not json\n", "JSON")]
)
def test_a_wrong_file_of_prompts_is_refused_before_any_model_is_loaded(tmp_path: Path, content: str, said: str) -> None:
    from typer.testing import CliRunner

    from coala.cli import app
    from coala.values import CoalaError

    (tmp_path / "prompts.jsonl").write_text(content)
    command = ["live", "--model", "nowhere", "--prompts", str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "o")]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, CoalaError)
    assert any(word in str(result.exception) for word in said.split("|"))
    assert not (tmp_path / "o").exists()


def answered(page: Any, n: int) -> None:
    """Wait until the page says that so many pairs were answered by its rater."""
    page.locator("output").filter(has_text=re.compile(f"^{n}$")).wait_for()


@pytest.mark.slow
@pytest.mark.nightly
def test_the_page_by_keyboard_by_touch_in_two_tabs_and_without_a_server(browser: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    live = Live(out, prompts_file(tmp_path, 12), "--raters", "1").start()
    page, failures = browser.new_page(), []
    page.set_default_timeout(1000 * PATIENCE)
    page.on("console", lambda said: failures.append(said.text) if said.type == "error" else None)
    page.goto(live.url)
    title = page.get_by_role("heading", name="Which reply is better?")
    title.wait_for()
    first = page.locator("#first").inner_text()
    for count, key in enumerate(("1", "2", "=", "s"), 1):
        title.wait_for()
        page.keyboard.press(key)
        answered(page, count)
    page.keyboard.press("u")
    answered(page, 3)
    page.get_by_role("button", name="Better like this").first.click()
    page.locator("#edited").fill("A film that I would see again.")
    page.keyboard.press("1")  # in a text, a digit is a digit
    page.get_by_role("button", name="Save").click()
    answered(page, 4)
    assert failures == []
    # The same link in a second tab, on a phone: the same pair, and of two answers one counts.
    phone = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True).new_page()
    phone.set_default_timeout(1000 * PATIENCE)
    phone.goto(page.url)
    phone.get_by_role("heading", name="Which reply is better?").wait_for()
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390
    assert phone.locator("#first").inner_text() == page.locator("#first").inner_text() != first
    for button in phone.get_by_role("button").all():
        if button.is_visible():
            assert button.bounding_box()["height"] >= 44
    page.route("**/state", lambda route: None)  # this tab hears of nothing
    phone.get_by_role("button", name="Reply 1 is better").tap()
    answered(phone, 5)
    page.keyboard.press("2")
    page.get_by_role("alert").filter(has_text="already answered").wait_for()
    # The server is killed: the click waits in the page, and is kept once it is there again.
    phone.get_by_role("heading", name="Which reply is better?").wait_for()
    live.end(signal.SIGKILL)
    phone.get_by_role("button", name="The same").tap()
    phone.get_by_role("alert").filter(has_text="Not saved yet").wait_for()
    live.start()
    answered(phone, 6)
    kept = read_journal((out / FOLDER / JOURNAL).read_bytes())
    assert [one.verdict for one in kept.answered.values()] == ["first", "second", "same", "edited", "first", "same"]
    assert live.end() == 0
