"""The survey's pages over HTTP: what is refused and how, what is never lost, and that nothing shows a method."""

from __future__ import annotations

import base64
import gc
import html
import http.client
import math
import re
import socket
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

import httpx
import uvicorn
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner
from uvicorn.protocols.http.h11_impl import H11Protocol

from coala.cli.survey import app as cli
from coala.statistics.intervals import wilson
from coala.survey import Records, Survey, load_survey, read_votes, save_survey
from coala.survey.app import HEADERS, LARGEST_BODY, create_app
from coala.values import CoalaError
from tests.survey_raters import ANSWER, PASSWORD, Server, crowd, made_up
from tests.waiting import PATIENCE, wait_for

FORM = {"Content-Type": "application/x-www-form-urlencoded"}
NAMES = ("QUOKKA", "WOMBAT", "NUMBAT", "BILBY")
ORGANISER = {"Authorization": "Basic " + base64.b64encode(f"any:{PASSWORD}".encode()).decode()}


@pytest.fixture
def survey() -> Survey:
    return made_up(NAMES, n=2, repeats=1, checks=1, fields=("Name",))


@pytest.fixture
def records(tmp_path: Path, survey: Survey) -> Records:
    return Records(tmp_path, survey)


@pytest.fixture
def client(survey: Survey, records: Records) -> Iterator[TestClient]:
    app = create_app(survey, records, admin_token=PASSWORD)
    with TestClient(app, follow_redirects=False, raise_server_exceptions=False) as client:
        yield client


def begin(client: TestClient) -> str:
    action = re.search(r'action="(/s/[\w-]+/begin)"', client.get("/").text)
    assert action is not None
    answer = client.post(action[1], data={"agree": "yes", "field1": "x"})
    assert answer.status_code == 303
    return action[1].removesuffix("/begin")


# --- answers -----------------------------------------------------------------------------------------------------


def test_from_consent_to_thanks(client: TestClient, records: Records) -> None:
    path = begin(client)
    page = 1
    while (answer := client.post(f"{path}/{page}", data={"choice": "B"})).headers["location"] != f"{path}/done":
        page += 1
        assert answer.headers["location"] == f"{path}/{page}"
        assert client.get(path).headers["location"] == f"{path}/{page}"  # where the personal link leads
    assert "Thank you" in client.get(f"{path}/done").text
    assert client.get(path).headers["location"] == f"{path}/done"
    (rater,) = records.raters()
    assert rater.entered == {"Name": "x"}
    assert set(rater.choices.values()) == {1}
    assert len(rater.choices) == len(rater.pages) == page == 7


def test_double_submission_back_and_begin_twice_count_once(client: TestClient, records: Records) -> None:
    path = begin(client)
    assert client.post(f"{path}/begin", data={"agree": "yes"}).headers["location"] == f"{path}/1"
    for _ in range(3):
        assert client.post(f"{path}/1", data={"choice": "A"}).headers["location"] == f"{path}/2"
    assert re.findall(r'value="(.)" required checked', client.get(f"{path}/1").text) == ["A"]
    client.post(f"{path}/1", data={"choice": "C"})
    (rater,) = records.raters()
    assert rater.choices == {0: 2}
    assert records.n_changed == 1


@pytest.mark.parametrize("choice", ["", "E", "Z", "AA", "a", "0", "\u00c0", "A,B", "' OR 1=1", "\x00"])
def test_invalid_choices_are_a_page_that_asks_again(client: TestClient, records: Records, choice: str) -> None:
    path = begin(client)
    answer = client.post(f"{path}/1", data={"choice": choice})
    assert answer.status_code == 422
    assert "Please choose one of the answers." in answer.text
    assert 'role="alert"' in answer.text
    assert len(ANSWER.findall(answer.text)) == 4
    assert records.n_answers == 0


def test_requests_out_of_place(client: TestClient, records: Records) -> None:
    path = begin(client)
    assert client.post(f"{path}/3", data={"choice": "A"}).status_code == 409
    assert client.get(f"{path}/3").headers["location"] == path  # back to where the rater is
    assert client.get(f"{path}/done").headers["location"] == path
    assert client.post(f"{path}/1", content=b"choice=A&choice=B", headers=FORM).status_code == 422
    for page in ("0", "-1", "99", "9" * 40, "x", "1.5"):
        assert client.get(f"{path}/{page}").status_code == 404, page
        assert client.post(f"{path}/{page}", data={"choice": "A"}).status_code == 404, page
    assert client.get("/s/unknown").status_code == 404
    assert client.get(f"/s/{'x' * 22}/1").status_code == 404
    assert client.post(f"/s/{'x' * 22}/1", data={"choice": "A"}).status_code == 404
    assert client.post("/s/short/begin", data={"agree": "yes"}).status_code == 404
    assert client.delete(path).status_code == 405
    assert client.get("/docs").status_code == client.get("/openapi.json").status_code == 404
    assert records.n_answers == 0


def test_bodies_that_are_too_large_or_not_a_form(client: TestClient, records: Records) -> None:
    path = begin(client)
    large = b"choice=A&x=" + b"y" * LARGEST_BODY
    assert client.post(f"{path}/1", content=large, headers=FORM).status_code == 413
    assert client.post(f"{path}/1", content=iter([large[:100], large[100:]]), headers=FORM).status_code == 413
    assert client.post(f"{path}/1", json={"choice": "A"}).status_code == 415
    assert client.post(f"{path}/1", content=b"choice=A").status_code == 415
    assert client.post(f"{path}/1", content=b"choice=%ff", headers=FORM).status_code == 400
    assert client.post(f"{path}/1", content=b"\xff\xfe", headers=FORM).status_code == 400
    assert client.post(f"{path}/1", content=b"&".join([b"a=b"] * 60), headers=FORM).status_code == 400
    assert records.n_answers == 0


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(page=st.text(max_size=8), body=st.binary(max_size=40))
def test_no_request_is_an_error_of_ours(client: TestClient, page: str, body: bytes) -> None:
    path = "/s/" + "x" * 22
    client.post(f"{path}/begin", data={"agree": "yes"})
    for answer in (
        client.post(f"{path}/1", content=b"choice=" + body, headers=FORM),
        client.post(f"/s/{quote(page, safe='', errors='replace')}/begin", content=body, headers=FORM),
        client.get(f"{path}/{quote(page, safe='', errors='replace')}"),
    ):
        assert answer.status_code < 500
        assert answer.text.startswith("<!DOCTYPE html>") or answer.status_code == 303


def test_consent_is_needed_and_what_was_entered_stays_and_is_escaped(client: TestClient, records: Records) -> None:
    action = re.search(r'action="(/s/[\w-]+/begin)"', client.get("/").text)
    assert action is not None
    answer = client.post(action[1], data={"field1": '"><script>alert(1)</script>'})
    assert answer.status_code == 422
    assert "<script>" not in answer.text
    assert "&lt;script&gt;" in answer.text
    assert records.raters() == []


def test_withdrawing_asks_first_then_the_link_opens_nothing(client: TestClient, records: Records) -> None:
    path = begin(client)
    client.post(f"{path}/1", data={"choice": "A"})
    assert client.post(f"{path}/withdraw", data={"sure": "no"}).status_code == 422
    assert records.n_answers == 1
    assert client.post(f"{path}/withdraw", data={"sure": "yes"}).status_code == 200
    assert records.n_answers == 0
    for answer in (client.get(path), client.get(f"{path}/1"), client.post(f"{path}/1", data={"choice": "A"})):
        assert answer.status_code == 410
    assert client.post(f"{path}/begin", data={"agree": "yes"}).status_code == 410


# --- pages of other sites ----------------------------------------------------------------------------------------

STRANGERS = [
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Origin": "https://evil.example"},
    {"Origin": "http://testserver:9"},
    {"Origin": "null"},
]


@pytest.mark.parametrize("stranger", STRANGERS, ids=str)
def test_forms_of_other_sites_change_nothing(client: TestClient, records: Records, stranger: dict[str, str]) -> None:
    path = begin(client)
    client.post(f"{path}/1", data={"choice": "A"})
    before = records.raters()
    for target, fields in (
        (f"{path}/1", {"choice": "B"}),
        (f"{path}/2", {"choice": "B"}),
        (f"{path}/withdraw", {"sure": "yes"}),
        (f"/s/{records.open_token()}/begin", {"agree": "yes"}),
    ):
        answer = client.post(target, data=fields, headers=stranger)
        assert answer.status_code == 403
        assert answer.text.startswith("<!DOCTYPE html>")
        assert {name: answer.headers.get(name) for name in HEADERS} == HEADERS
    refused = client.post("/admin/invitations", data={"n": 1}, headers=ORGANISER | stranger)
    assert refused.status_code == 403
    assert records.raters() == before
    # A link may stand anywhere.
    assert client.get(f"{path}/1", headers=stranger).status_code == 200
    assert client.get("/", headers=stranger).status_code == 200


@pytest.mark.parametrize("own", [{}, {"Sec-Fetch-Site": "same-origin"}, {"Origin": "http://testserver"}], ids=str)
def test_forms_of_its_own_pages_are_taken(client: TestClient, records: Records, own: dict[str, str]) -> None:
    path = begin(client)
    assert client.post(f"{path}/1", data={"choice": "A"}, headers=own).status_code == 303
    assert records.n_answers == 1


def test_links_are_known_to_the_server_alone(client: TestClient, records: Records) -> None:
    """A token that somebody made up opens nothing; those of the first page and of invitations do."""
    action = re.search(r'action="/s/([\w-]+)/begin"', client.get("/").text)
    assert action is not None
    changed = [action[1][:at] + ("A" if action[1][at] != "A" else "B") + action[1][at + 1 :] for at in range(21)]
    for token in (*changed, "x" * 22, "A" * 22, action[1] + "A", action[1][:-1], "\u00e4" * 22):
        assert client.post(f"/s/{quote(token)}/begin", data={"agree": "yes"}).status_code == 404
    assert records.raters() == []
    assert client.post(f"/s/{action[1]}/begin", data={"agree": "yes"}).status_code == 303
    (invited,) = records.invite(1)
    assert client.post(f"/s/{invited}/begin", data={"agree": "yes"}).status_code == 303


def test_links_hold_when_the_server_starts_again_and_not_elsewhere(tmp_path: Path, survey: Survey) -> None:
    (tmp_path / "other").mkdir()
    first, again, other = Records(tmp_path, survey), Records(tmp_path, survey), Records(tmp_path / "other", survey)
    token = first.open_token()
    assert first.made(token)
    assert again.made(token)
    assert not other.made(token)


def test_names_of_others_lead_nowhere(survey: Survey, records: Records) -> None:
    """By DNS rebinding a page reaches a server of this machine under a name of its own."""
    site = "https://survey.example"
    app = create_app(survey, records, admin_token=PASSWORD, local=True, site=site)
    client = TestClient(app, follow_redirects=False, base_url="http://127.0.0.1:8000")
    for host in ("evil.example", "127.0.0.1.evil.example", "[::1].evil.example", "localhost:80.evil.example", ""):
        for path in ("/", "/admin", "/page.css", "/s/x"):
            answer = client.get(path, headers={"Host": host} | ORGANISER)
            assert answer.status_code == 403
            assert "--site" in answer.text
    for host in ("localhost", "127.0.0.1:8000", "[::1]:9", "survey.example"):
        assert client.get("/", headers={"Host": host}).status_code == 200
    # A proxy that keeps the browser's word on where a form comes from but not the name; links are the site's.
    made = client.post("/admin/invitations", data={"n": 1}, headers=ORGANISER | {"Origin": site})
    assert made.status_code == 200
    assert re.search(rf"{site}/s/[\w-]{{22}}<", made.text)


# --- the organiser, headers, failures ----------------------------------------------------------------------------


def test_organiser_pages_need_the_password_and_name_no_method(client: TestClient) -> None:
    begin(client)
    wrong = "Basic " + base64.b64encode(b"any:guess").decode()
    for header in ({}, {"Authorization": wrong}, {"Authorization": "Basic !"}, {"Authorization": f"Bearer {PASSWORD}"}):
        answer = client.get("/admin", headers=header)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"].startswith("Basic")
        assert client.post("/admin/invitations", data={"n": 1}, headers=header).status_code == 401
    assert client.get("/admin", headers=ORGANISER | {"Sec-Fetch-Site": "cross-site"}).status_code == 403
    page = client.get("/admin", headers=ORGANISER)
    assert page.status_code == 200
    assert not any(name in page.text for name in NAMES)
    links = re.findall(r"/s/([\w-]{22})<", client.post("/admin/invitations", data={"n": 3}, headers=ORGANISER).text)
    assert len(set(links)) == 3
    assert client.get(f"/s/{links[0]}").status_code == 200
    for n in ("0", "-1", "1001", "x", "\u00b2", "9" * 5000):
        assert client.post("/admin/invitations", data={"n": n}, headers=ORGANISER).status_code == 422, n


def test_by_invitation_only(survey: Survey, records: Records) -> None:
    client = TestClient(create_app(survey, records, admin_token=PASSWORD, invited_only=True), follow_redirects=False)
    assert "by invitation" in client.get("/").text
    assert client.post(f"/s/{'x' * 22}/begin", data={"agree": "yes"}).status_code == 404
    (token,) = records.invite(1)
    assert client.post(f"/s/{token}/begin", data={"agree": "yes"}).headers["location"] == f"/s/{token}/1"


def test_every_answer_carries_the_security_headers_and_no_cookie(client: TestClient) -> None:
    path = begin(client)
    answers = [client.get(p) for p in ("/", "/page.css", "/keys.js", path, f"{path}/1", f"{path}/x", "/none", "/admin")]
    answers += [client.post(f"{path}/1", data={"choice": c}) for c in ("A", "?")]
    answers += [client.post(f"{path}/1", content=b"x" * LARGEST_BODY * 2, headers=FORM)]
    assert {answer.status_code for answer in answers} == {200, 303, 401, 404, 413, 422}
    for answer in answers:
        assert {name: answer.headers.get(name) for name in HEADERS} == HEADERS
        assert "set-cookie" not in answer.headers
        assert "etag" not in answer.headers
        assert "last-modified" not in answer.headers


def test_failures_of_ours_are_a_page_and_never_a_trace(
    tmp_path: Path, client: TestClient, survey: Survey, records: Records
) -> None:
    path = begin(client)
    smaller = made_up(NAMES, n=2)  # without the questions that the ballots were dealt from
    object.__setattr__(smaller, "questions", smaller.questions[:1])
    broken = TestClient(create_app(smaller, records, admin_token=PASSWORD), raise_server_exceptions=False)
    token = path.removeprefix("/s/")
    answers = []
    for _ in survey.questions:
        answers.append(broken.get(f"/s/{token}"))
        rater = records.rater(token)
        assert rater is not None
        records.answer(rater, rater.next_page or 0, 0)
    assert 500 in {answer.status_code for answer in answers}
    records.close()
    answers.append(client.post(f"{path}/1", data={"choice": "A"}))
    assert answers[-1].status_code == 503
    assert "could not be saved" in answers[-1].text
    for answer in answers:
        if answer.status_code >= 500:
            assert "Traceback" not in answer.text
            assert "Error" not in answer.text
            assert {name: answer.headers.get(name) for name in HEADERS} == HEADERS


# --- nothing lost, nothing twice ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_twenty_raters_with_bad_connections_and_a_killed_server_leave_exact_counts(tmp_path: Path) -> None:
    survey = made_up(n=4, repeats=1, checks=1)
    save_survey(tmp_path, survey)
    with Server(tmp_path) as server:
        raters = crowd(server, 20, kills=1)
        log = server.log
    assert sum(rater.cut for rater in raters) > 0
    assert "Traceback" not in log
    assert not any(rater.token in log for rater in raters)
    records = Records(tmp_path, survey)
    kept = {rater.token: rater for rater in records.raters()}
    # One answer for each rater and page, and it is the text that this rater chose.
    assert records.n_answers == sum(
        len(rater.pages) for rater in kept.values() if rater.token in {r.token for r in raters}
    )
    wanted: Counter[int] = Counter()
    for rater in raters:
        found = kept[rater.token]
        assert sorted(found.choices) == list(range(11))
        for page, place in found.choices.items():
            item = found.pages[page]
            shown = (survey.checks if item.kind == "check" else survey.questions)[item.index].answers
            assert shown[item.order[place]] == rater.picked[page + 1]
        # Independent of ballots: the method whose text this rater likes best at each question.
        for question in survey.questions:
            wanted[max(range(4), key=lambda m: rater.choice(question.answers[m]))] += 1
    assert Counter(vote.method for vote in read_votes(survey, list(kept.values())).votes) == wanted


# --- blinding ----------------------------------------------------------------------------------------------------


@dataclass
class Sight:
    """All that one rater can see of one page: its address, headers, document, and what it cost to make.

    ``work`` stands for the time it takes to come: calls of functions, which no other program adds to.
    """

    rater: int
    path: str
    headers: str
    document: str
    work: int
    methods: list[int]  # at each place; the truth, which the rater cannot see


@pytest.fixture(scope="module")
def sights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Survey, list[Sight]]:
    """Every question page of 32 raters, from a real server."""
    folder = tmp_path_factory.mktemp("blinding")
    survey = made_up(NAMES, n=8)
    save_survey(folder, survey)
    by_text = {text: m for question in survey.questions for m, text in enumerate(question.answers)}
    seen = []
    with Server(folder) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)

        def ask(method: str, path: str, **fields: str) -> tuple[http.client.HTTPResponse, str]:
            connection.request(method, path, urlencode(fields), FORM if fields else {})
            answer = connection.getresponse()
            return answer, answer.read().decode()

        for rater in range(32):
            action = re.search(r'action="(/s/[\w-]+/begin)"', ask("GET", "/")[1])
            assert action is not None
            path = ask("POST", action[1], agree="yes")[0].headers["Location"]
            while not path.endswith("/done"):
                answer, page = ask("GET", path)
                methods = [by_text[html.unescape(text)] for _, _, text in ANSWER.findall(page)]
                seen.append(Sight(rater, path, str(answer.headers), page, 0, methods))
                path = ask("POST", path, choice="A")[0].headers["Location"]
    app = create_app(survey, Records(folder, survey), admin_token=PASSWORD)
    (show,) = (r.endpoint for r in app.routes if r.path == "/s/{token}/{number}" and "GET" in r.methods)
    for sight in seen:
        _, _, token, number = sight.path.split("/")
        sight.work = calls_of(lambda token=token, number=number: show(token, int(number)))
    return survey, seen


def calls_of(work: Callable[[], Any]) -> int:
    """How many functions are called while it is done."""
    counted: Counter[str] = Counter()
    gc.disable()  # what it calls is none of the work's
    try:
        sys.setprofile(lambda frame, event, argument: counted.update([event]))
        work()
    finally:
        sys.setprofile(None)
        gc.enable()
    return counted["call"] + counted["c_call"]


def test_pages_are_not_held_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket that collects small packets waits for the other side before it sends a page."""
    save_survey(tmp_path, made_up(n=2))
    begun, made, servers, at_once = uvicorn.Server.__init__, H11Protocol.connection_made, [], []

    def begin(self: uvicorn.Server, *given: Any) -> None:
        begun(self, *given)
        servers.append(self)

    def connection(self: H11Protocol, transport: Any) -> None:
        made(self, transport)
        at_once.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr(uvicorn.Server, "__init__", begin)
    monkeypatch.setattr(H11Protocol, "connection_made", connection)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = ["serve", str(tmp_path), "--port", port]
    serving = threading.Thread(target=CliRunner().invoke, args=(cli, words), daemon=True)
    serving.start()
    wait_for(lambda: servers and servers[0].started)
    assert httpx.get(f"http://127.0.0.1:{port}/").status_code == 200
    servers[0].should_exit = True
    serving.join(PATIENCE)
    assert at_once == [1]


def bare(sight: Sight) -> str:
    """The document without the answers' texts and the personal link."""
    token = sight.path.split("/")[2]
    return re.sub(r'(<span class="text" dir="auto">).*?(</span></label>)', r"\1\2", sight.document, flags=re.S).replace(
        token, "TOKEN"
    )


def test_no_name_or_id_is_anywhere_in_what_a_rater_gets(sights: tuple[Survey, list[Sight]]) -> None:
    survey, seen = sights
    for sight in seen:
        everything = (sight.path + sight.headers + sight.document).upper()
        assert not any(name in everything for name in NAMES)
        assert not any(question.prompt_id.upper() in everything for question in survey.questions)


def test_pages_are_equal_but_for_the_order_of_the_answers(sights: tuple[Survey, list[Sight]]) -> None:
    """Two raters who see a question at one page number get the same bytes, up to order and personal link."""
    _, seen = sights
    documents = defaultdict(set)
    orders = defaultdict(set)
    for sight in seen:
        prompt = re.search(r'class="prompt" dir="auto">(.*?)</p>', sight.document, re.S)
        assert prompt is not None
        key = sight.path.rsplit("/", 1)[1], prompt[1]
        headers = re.sub(r"(?m)^date: .*$", "", sight.headers)  # the length of the document among them
        documents[key].add((bare(sight), headers))
        orders[key].add(tuple(sight.methods))
    assert {len(some) for some in documents.values()} == {1}
    assert max(len(some) for some in orders.values()) > 1


def tokens(sight: Sight, place: int, leak: str = "") -> list[str]:
    """What a rater can see of one answer, its text apart, as words for a classifier; also crossed with the place."""
    fragments = re.findall(r'<div class="answer">.*?</div>', bare(sight), re.S)
    around = re.findall(r"\w+", fragments[place] + leak)
    page = re.findall(r"\w+", f"{sight.path} {sight.headers} {bare(sight).split('<fieldset')[0]}")
    return around + [f"{place}:{word}" for word in (*page, f"work{sight.work}")]


def accuracy(train: list[tuple[list[str], int]], test: list[tuple[list[str], int]], m: int) -> tuple[float, int]:
    """Naive Bayes on the presence of words, add-one smoothing: share right of ``test``, and n."""
    counts: dict[str, Counter[int]] = defaultdict(Counter)
    total = Counter(label for _, label in train)
    for words, label in train:
        for word in set(words):
            counts[word][label] += 1
    right = 0
    for words, label in test:
        scores = [
            sum(math.log((counts[w][k] + 1) / (total[k] + 2)) for w in set(words) if w in counts) for k in range(m)
        ]
        right += scores.index(max(scores)) == label
    return right / len(test), len(test)


def test_a_classifier_of_everything_but_the_texts_does_not_find_the_method(sights: tuple[Survey, list[Sight]]) -> None:
    _, seen = sights
    m = len(NAMES)

    def guess(leak: bool = False, fixed: bool = False) -> tuple[float, float, float, int]:
        rows = []
        for sight in seen:
            for place, method in enumerate(sight.methods):
                label = place if fixed else method
                rows.append((sight.rater, tokens(sight, place, f" id{method * 7 % 5}" if leak else ""), label))
        train = [(words, label) for rater, words, label in rows if rater < 16]
        test = [(words, label) for rater, words, label in rows if rater >= 16]
        share, n = accuracy(train, test, m)
        return share, *wilson(share, n, 3.3), n  # 99.95 % one-sided: links and orders are drawn anew in each run

    share, low, high, n = guess()
    assert n == 16 * 16 * 4
    assert low <= 1 / m, f"the method is guessed in {share:.3f} [{low:.3f}, {high:.3f}] of n = {n}, chance {1 / m}"
    # The same classifier sees a leak where there is one: a number in the markup, or an order that never changes.
    assert guess(leak=True)[1] > 0.9
    assert guess(fixed=True)[1] > 0.9


def test_survey_is_found_again_by_the_server(tmp_path: Path) -> None:
    survey = made_up(n=2)
    save_survey(tmp_path, survey)
    with Server(tmp_path, "--invited-only") as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
        connection.request("GET", "/admin", headers=ORGANISER)
        answer = connection.getresponse()
        assert answer.status == 200
        assert "Only people with a personal link" in answer.read().decode()
        assert answer.headers["Server"] is None
        assert PASSWORD not in server.log  # a password that was given is not printed
    assert load_survey(tmp_path) == survey


def test_a_port_that_is_taken_is_told_before_anything_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_survey(tmp_path, made_up(n=2))
    monkeypatch.delenv("COALA_SURVEY_ADMIN_TOKEN", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(CoalaError, match=f"port {port}.*Give another --port"):
            CliRunner().invoke(cli, ["serve", str(tmp_path), "--port", port], catch_exceptions=False)
    monkeypatch.setenv("COALA_SURVEY_ADMIN_TOKEN", "short")
    with pytest.raises(CoalaError, match="has 5 characters; expected at least 16"):
        CliRunner().invoke(cli, ["serve", str(tmp_path)], catch_exceptions=False)
    assert not list(tmp_path.glob("*.sqlite*"))
