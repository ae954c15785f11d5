"""`coala comal`: results on stdout with one JSON line, pages that say what was computed and nothing else."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from coala.cli import comal
from coala.nash import PreferenceGame, solve
from coala.nash.page import game_page
from coala.nash.paper import ENTRIES, tail_estimate
from coala.values import CoalaError

PAPER = [[0.5, 0.1, 0.8], [0.9, 0.5, 0.1], [0.2, 0.9, 0.5]]
GAME = {"P": PAPER, "labels": ["a", "b", "c"], "start": [0.2, 0.5, 0.3]}
HOSTILE = '<script>alert("x")</script> & \' {{ 7 * 7 }} $\\frac{a}{b}$ \u202e\u0000'


def run(*arguments: Any) -> tuple[list[str], dict[str, Any]]:
    result = CliRunner().invoke(comal.app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    lines = result.stdout.strip().split("\n")
    return lines, json.loads(lines[-1], parse_constant=pytest.fail)


@pytest.fixture
def game_file(tmp_path: Path) -> Path:
    path = tmp_path / "game.json"
    path.write_text(json.dumps(GAME))
    return path


class Page(HTMLParser):
    """Tags, their attributes and the words outside of figures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(re.sub(r"<(svg|style)\b.*?</\1>", "", text, flags=re.DOTALL))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data


def test_solves_a_game_from_a_file(game_file: Path) -> None:
    lines, found = run("game", game_file)
    expected = solve(PreferenceGame(PAPER), GAME["start"])
    assert found["converged"] is True
    assert found["gap"] == expected.gap
    assert found["policy"] == dict(zip("abc", np.asarray(expected.policy).tolist(), strict=True))
    assert found["nash"] == pytest.approx({"a": 4 / 11, "b": 3 / 11, "c": 4 / 11})
    assert found["nash_unique"] is True
    assert lines[0].split() == ["update", "gap", "KL", "a", "b", "c"]
    assert lines[3].split() == ["1", "5.88e-02", "2.11e-02", "0.274917", "0.279723", "0.445360"]
    assert lines[-2].split() == ["Nash", "0", "0", "0.363636", "0.272727", "0.363636"]


def test_every_option_reaches_the_solver(game_file: Path) -> None:
    options = ["--inner", "inpo", "--beta", 4, "--tau", 0.2, "--outer", 5, "--inner-steps", 7]
    _, found = run("game", game_file, *options, "--pairs-per-step", 50, "--oracle", "probabilities", "--seed", 3)
    expected = solve(
        PreferenceGame(PAPER),
        GAME["start"],
        inner="inpo",
        eta=0.25,
        tau=0.2,
        outer=5,
        inner_steps=7,
        pairs_per_step=50,
        oracle="probabilities",
        seed=3,
    )
    assert found["gap"] == expected.gap
    assert found["updates"] == 5
    _, found = run("game", game_file, "--tol", 1e-3)
    assert found["updates"] < 20
    assert found["gap"] <= 1e-3


def test_warnings_are_told_on_stderr_and_in_the_result(game_file: Path) -> None:
    result = CliRunner().invoke(comal.app, ["game", str(game_file), "--method", "mwu", "--outer", "50"])
    assert "warning: mwu moves away" in result.stderr
    assert "warning: mwu" not in result.stdout
    assert json.loads(result.stdout.strip().split("\n")[-1])["warnings"]


def test_prompts_with_games_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "games.json"
    other = {"P": [[0.5, 0.7], [0.3, 0.5]], "labels": ["yes", "no"], "weight": 0.25}
    path.write_text(json.dumps({"prompts": {"first": {"P": PAPER, "weight": 0.75}, "second": other}}))
    lines, found = run("game", path, "--out", tmp_path / "page.html")
    assert found["nash"]["second"] == {"yes": 1.0, "no": 0.0}
    assert "second" in lines
    assert "Prompt: second" in (tmp_path / "page.html").read_text()


def test_an_answer_never_played_gives_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "game.json"
    path.write_text(json.dumps({"P": PAPER, "start": [0.4, 0.6, 0.0]}))
    lines, found = run("game", path, "--out", tmp_path / "page.html")
    assert found["kl"] is None
    assert found["gap"] == pytest.approx(0.8)
    assert "inf" in lines[2]


def test_games_of_many_answers_show_the_most_played(tmp_path: Path) -> None:
    n = 12
    P = np.full((n, n), 0.5)
    P[0, 1:], P[1:, 0] = 0.6, 0.4
    path = tmp_path / "game.json"
    path.write_text(json.dumps({"P": P.tolist()}))
    lines, found = run("game", path, "--outer", 3, "--out", tmp_path / "page.html")
    assert len(lines[0].split()) == 3 + 8
    assert len(found["policy"]) == n


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "could not be read"),
        ("{", "is not JSON"),
        ("[1, 2]", "holds a list"),
        ('{"P": [[0.5, 0.2], [0.7, 0.5]]}', "expected 1"),
        ('{"P": [[0.5, NaN], [0.7, 0.5]]}', "nan in row 1"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "game.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CoalaError, match=message):
        run("game", path)


@pytest.mark.parametrize("out", ["page.pdf", "page"])
def test_what_can_be_written(game_file: Path, out: str) -> None:
    for command in (["game", game_file], ["paper"]):
        with pytest.raises(CoalaError, match=r"expected a page \(\.html\)"):
            run(*command, "--out", game_file.parent / out)


def test_help_tells_the_form_of_the_file() -> None:
    words = CliRunner().invoke(comal.app, ["game", "--help"]).stdout
    for part in ('"labels": ["a", "b", "c"]', '"prompts"', "P[i][j]", "coala comal game game.json"):
        assert part in words


# --- pages -------------------------------------------------------------------------------------------------------


def test_the_page_of_a_game(game_file: Path, tmp_path: Path) -> None:
    run("game", game_file, "--out", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    for words in ("comal: gap", "Converged.", "It is the only one.", "0.363636", "game.json"):
        assert words in page.words
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    # Self-contained: the only addresses are the names of XML's vocabularies.
    assert {a for a in re.findall(r"https?://[^\"' )]+", text) if "w3.org" not in a} == set()
    assert text.count("<svg") == 3
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert all(reference in ids for reference in re.findall(r'(?:href="|url\()#([^")]+)', text))
    run("game", game_file, "--out", tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == text


def test_a_figure_alone(game_file: Path, tmp_path: Path) -> None:
    import xml.etree.ElementTree

    run("game", game_file, "--out", tmp_path / "path.svg")
    assert xml.etree.ElementTree.fromstring((tmp_path / "path.svg").read_text()).tag.endswith("svg")


@pytest.mark.parametrize("n", [3, 4])
def test_labels_cannot_break_the_page(n: int) -> None:
    P = np.full((n, n), 0.5)
    result = solve(
        PreferenceGame({HOSTILE: P}, labels={HOSTILE: [HOSTILE, "_b", *(str(i) for i in range(n - 2))]}), outer=2
    )
    text = game_page(result, HOSTILE)
    assert "<script" not in text
    assert "{{ 7" in Page(text).words
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        import xml.etree.ElementTree

        xml.etree.ElementTree.fromstring(svg)


@pytest.mark.slow
@pytest.mark.nightly
def test_the_papers_experiment(tmp_path: Path) -> None:
    _, found = run("paper", "--out", tmp_path / "paper.html", "--pairs", 1000, "--seeds", 1)
    text = (tmp_path / "paper.html").read_text()
    words = Page(text).words
    for entry in ENTRIES:
        assert entry.name in words
    converging = {name for name, gap in found["noiseless"].items() if gap < 1e-9}
    assert converging == {entry.name for entry in ENTRIES if re.match("COMAL|Mirror|OMWU", entry.name)}
    assert found["noiseless"]["INPO"] == pytest.approx(0.0588277, abs=1e-6)
    for name, estimate in found["sampled"].items():
        assert estimate["n"] == 1
        assert estimate["low"] <= estimate["value"] <= estimate["high"]
        assert (estimate["value"] < 0.05) == (name in converging)
    assert "0.056 0.231 0.160 0.226 0.327" in words  # selection of best and worst, five answers, four candidates
    # Two triangles per sampled method, one for exact inner games; gap and distance, noiseless and sampled.
    assert text.count("<svg") == 2 * len(ENTRIES) - 1 + 4
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert len(text) < 2_000_000


def test_intervals_over_seeds() -> None:
    from scipy.stats import t

    values = np.array([0.01, 0.02, 0.04])
    found = tail_estimate(values)
    low, high = t.interval(0.95, 2, values.mean(), values.std(ddof=1) / np.sqrt(3))
    assert (found.value, found.low, found.high) == pytest.approx((values.mean(), max(0, low), high))
    one = tail_estimate(values[:1])
    assert (one.low, one.high, one.n) == (0, 1, 1)
