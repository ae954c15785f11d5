"""The survey's results against the published survey, plain re-computation and simulation."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm
from typer.testing import CliRunner

from coala.cli.survey import app
from coala.statistics.intervals import share_estimate
from coala.statistics.votes import two_way_error, two_way_share
from coala.store import plain
from coala.survey import Records, Results, Survey, SurveyPrompt, SurveyQuestion, Votes, analyse, build, save_survey
from coala.survey.page import results_page, verdicts
from coala.survey.records import new_token
from coala.survey.results import ALL
from coala.survey.votes import Attendance, Checked, Repeated, Vote
from coala.values import CoalaError, Generation
from tests.survey_raters import made_up

METHODS = ("SFT", "ORPO", "COALA", "DPO")


def asked(n: int, categories: Sequence[str] = ("edu",), **settings: Any) -> Survey:
    questions = [
        SurveyQuestion(f"{c}{i}", c, f"prompt {i} <of> {c}", tuple(f"{m} {i}" for m in METHODS))
        for c in categories
        for i in range(n)
    ]
    return Survey("A title & more", METHODS, dict.fromkeys(categories, "Best?"), tuple(questions), **settings)


def votes_of(table: np.ndarray, **changes: Any) -> Votes:
    """Votes from methods (raters, questions), -1 for none."""
    votes = [
        Vote(r, q, int(m), (int(m) + r) % 4, float(1 + r))
        for r, row in enumerate(table)
        for q, m in enumerate(row)
        if m >= 0
    ]
    n = len(table)
    empty = Votes(tuple(votes), (), (), (), Attendance(0, n, n, n, 0))
    return replace(empty, **changes)


def test_published_counts_give_the_published_percentages_and_walds_interval(shared: Path) -> None:
    reference = json.loads((shared / "eval_reference" / "survey" / "survey_reference.json").read_text())
    counts, printed = reference["questions_complete"], reference["questions_printed_percent"]
    columns = [np.repeat(range(4), [question[m] for m in METHODS]) for question in counts.values()]
    table = np.stack(columns, axis=1)
    results = analyse(asked(len(counts)), votes_of(table), of="COALA", draws=20)
    for question, name in zip(results.questions, counts, strict=True):
        assert question.n == reference["n"]
        for method, percent in printed[name].items():
            if percent is not None:
                assert 100 * question.shares[method].value == pytest.approx(percent, abs=0.05)
    # One question alone: 107 votes of 107 raters, where the paper's interval is as it should be but for Wald's form.
    for i, name in enumerate(counts):
        (part,) = analyse(asked(1), votes_of(table[:, i : i + 1]), draws=20).parts
        for rate in part.rates:
            share = counts[name][rate.method] / 107
            half = 1.96 * math.sqrt(share * (1 - share) / 107)
            assert rate.published.high - share == pytest.approx(half, abs=1e-12)
            assert rate.over_raters.low <= share <= rate.over_raters.high
    table11 = reference["computed_half_width"]["EDU"]["COALA"]
    assert 100 * 1.96 * math.sqrt(0.391 * 0.609 / 107) == pytest.approx(table11, abs=1e-4)


def test_two_way_error_is_the_sum_over_pairs_of_votes_that_share_a_rater_or_question() -> None:
    rng = np.random.default_rng(0)
    r, q = rng.integers(12, size=150), rng.integers(9, size=150)
    x = (rng.random(150) < 0.2 + 0.03 * r + 0.02 * q).astype(float)
    mean, error, labels = two_way_error(x, r, q)
    e = x - x.mean()

    def meat(same: np.ndarray, groups: int) -> float:
        return groups / (groups - 1) * float(e @ same @ e) / 150**2

    by_r, by_q = r[:, None] == r, q[:, None] == q
    wanted = meat(by_r, 12) + meat(by_q, 9) - meat(np.eye(150), 150)
    assert mean == x.mean()
    assert wanted > max(meat(by_r, 12), meat(by_q, 9))  # the floor is not what is tested here
    assert error**2 == pytest.approx(wanted, rel=1e-12)
    assert labels.max() == 8
    assert two_way_error(x, q, r)[1] == pytest.approx(error, rel=1e-12)


@pytest.mark.slow
def test_only_the_interval_over_both_covers_when_raters_and_questions_differ() -> None:
    """Truth over many surveys drawn from one population of raters and questions, share of the first method."""
    rng = np.random.default_rng(1)
    surveys, raters, questions = 300, 20, 15
    r, q = np.repeat(range(raters), questions), np.tile(range(questions), raters)
    hits = {"both": 0, "raters": 0, "questions": 0, "votes": 0}
    # A probit with variances 0.3 and 0.3 on a unit of noise has the mean share of its latent sum.
    truth = float(norm.cdf(-0.4 / math.sqrt(1.6)))
    for _ in range(surveys):
        latent = rng.normal(0, math.sqrt(0.3), raters)[r] + rng.normal(0, math.sqrt(0.3), questions)[q] - 0.4
        x = (latent + rng.normal(size=len(r)) > 0).astype(float)
        found = {
            "both": two_way_share(x, r, q, "share"),
            "raters": share_estimate(x, r),
            "questions": share_estimate(x, q),
            "votes": share_estimate(x),
        }
        for name, one in found.items():
            hits[name] += one.low <= truth <= one.high
    coverage = {name: count / surveys for name, count in hits.items()}
    assert coverage["both"] > 0.92, coverage
    assert coverage["raters"] < 0.9, coverage
    assert coverage["questions"] < 0.9, coverage
    assert coverage["votes"] < 0.7, coverage


def test_no_difference_is_found_where_there_is_none_and_a_large_one_is() -> None:
    rng = np.random.default_rng(2)
    survey = asked(10)
    false = 0
    for _ in range(60):
        (part,) = analyse(survey, votes_of(rng.integers(4, size=(12, 10))), draws=1).parts
        false += any(d.over_both.adjusted < 0.05 for d in part.differences)
    assert false <= 8  # 5 % of 60 is 3; P(more than 8) is below 0.01
    table = np.where(rng.random((12, 10)) < 0.7, 2, rng.integers(4, size=(12, 10)))
    results = analyse(survey, votes_of(table), of="COALA", draws=10)
    (part,) = results.parts
    found = {d.over_both.first + d.over_both.second: d for d in part.differences}
    assert found["SFTCOALA"].over_both.adjusted < 0.01
    assert found["SFTCOALA"].over_both.difference.value < 0
    for d in part.differences:
        for one in (d.over_raters, d.over_both):
            assert one.adjusted >= one.p_value
    assert "its lead over" in verdicts(results)[0]


def test_shares_sum_to_one_and_do_not_depend_on_names_or_order_of_raters() -> None:
    rng = np.random.default_rng(3)
    table = rng.integers(-1, 4, size=(9, 12))
    survey = asked(6, ("edu", "imdb"))
    results = analyse(survey, votes_of(table), draws=30)
    shuffled = analyse(survey, votes_of(table[rng.permutation(9)]), draws=30)
    assert [part.name for part in results.parts] == ["edu", "imdb", ALL]
    assert sum(part.n_votes for part in results.parts[:2]) == results.parts[2].n_votes == (table >= 0).sum()
    for part, other in zip(results.parts, shuffled.parts, strict=True):
        assert sum(rate.over_both.value for rate in part.rates) == pytest.approx(1)
        for a, b in zip(part.rates, other.rates, strict=True):
            assert a.over_both.low == pytest.approx(b.over_both.low)
            assert a.votes == (table[:, :6] == METHODS.index(a.method)).sum() or part.name != "edu"
    assert results.parts[0].kappa is None  # with gaps only alpha is defined
    full = analyse(survey, votes_of(np.abs(table)), draws=30)
    assert full.parts[0].kappa is not None
    assert full.parts[0].alpha is not None


def test_perfect_agreement_has_alpha_one_and_intervals_of_some_width() -> None:
    table = np.tile([0, 1, 2, 3, 0, 2], (5, 1))
    (part,) = analyse(asked(6), votes_of(table), draws=50).parts
    assert part.alpha is not None
    assert part.alpha.value == 1
    for rate in part.rates:
        assert rate.over_both.low < rate.over_both.value < rate.over_both.high


def test_exclusions_checks_and_repeats_are_counted_and_reported_both_ways() -> None:
    table = np.array([[0, 0, 1], [0, 0, 1], [3, 3, 3]])
    checked = tuple(Checked(r, 0, r < 2) for r in range(3))
    repeated = (Repeated(0, 0, True), Repeated(1, 0, False), Repeated(2, 0, True))
    votes = votes_of(table, checked=checked, repeated=repeated, excluded=((2, "failed 1 of 1"),))
    results = analyse(asked(3, repeats=1), votes, draws=20)
    assert results.excluded == {"failed 1 of 1": 1}
    assert results.checks_passed is not None
    assert (results.checks_passed.value, results.checks_passed.n) == (pytest.approx(2 / 3), 3)
    assert results.repeats_same is not None
    assert (results.repeats_same.value, results.repeats_same.n) == (0.5, 2)
    assert results.repeats_by_chance == 1.0  # the two counted raters agree on question 0
    assert results.parts[0].n_votes == 6
    assert results.everybody[0].n_votes == 9
    assert results.seconds is not None
    assert results.seconds.value == 1.5  # of six votes of 1 s and 2 s
    places = sum(one.value for one in results.positions)
    assert places == pytest.approx(1)


def test_nothing_to_count_is_explained() -> None:
    with pytest.raises(CoalaError, match="nobody has answered yet"):
        analyse(asked(2), votes_of(np.full((2, 2), -1)))
    with pytest.raises(CoalaError, match="all raters are excluded"):
        analyse(asked(2), votes_of(np.zeros((1, 2)), excluded=((0, "why"),)))
    with pytest.raises(CoalaError, match="no method 'KTO' in this survey"):
        analyse(asked(2), votes_of(np.zeros((1, 2))), of="KTO")


def results_of(n: int) -> Results:
    """Of ``n`` questions in each of two categories."""
    return analyse(asked(n, ("edu", "imdb")), votes_of(np.random.default_rng(0).integers(4, size=(8, 2 * n))), draws=20)


@pytest.mark.parametrize("table", [[[2]], [[2, 2]], [[0], [0], [1]]], ids=["one vote", "one rater", "one question"])
def test_tiny_surveys_have_wide_intervals_and_a_page(table: list[list[int]]) -> None:
    votes = np.array(table)
    results = analyse(asked(votes.shape[1]), votes_of(votes), draws=10)
    for rate in results.parts[0].rates:
        assert rate.over_both.high - rate.over_both.low > 0.7  # as after one trial
    for one in results.parts[0].differences:
        assert (one.over_both.difference.low, one.over_both.difference.high) == (-1, 1)
    json.dumps(plain(results), allow_nan=False)
    assert "</html>" in results_page(results)


class Outline(HTMLParser):
    """Addresses, scripts and unclosed elements of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        assert tag != "script"
        if tag not in ("meta", "br", "link", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_self_contained_escaped_and_deterministic() -> None:
    results = results_of(3)
    page = results_page(results)
    assert page == results_page(results)
    outline = Outline(page)
    assert outline.addresses == []
    assert outline.open == []
    assert "http" not in page.replace("http-equiv", "")
    assert "prompt 1 &lt;of&gt; edu" in page
    assert "A title &amp; more" in page
    for rate in results.parts[0].rates:
        assert f"{100 * rate.over_both.low:.1f} to {100 * rate.over_both.high:.1f}" in page


def test_command_prints_tables_writes_a_page_and_ends_in_json(tmp_path: Path) -> None:
    survey = made_up(METHODS, n=3, repeats=1, checks=1)
    save_survey(tmp_path, survey)
    records = Records(tmp_path, survey)
    for number in range(5):
        token = new_token()
        records.begin(token, {})
        rater = records.rater(token)
        assert rater is not None
        for page, item in enumerate(rater.pages[: 4 if number == 4 else None]):
            records.view(rater, page)
            right = survey.checks[0].right if item.kind == "check" and number else 2
            wrong = (survey.checks[0].right + 1) % 4
            choice = wrong if item.kind == "check" and not number else right
            records.answer(rater, page, item.order.index(choice))
    found = CliRunner().invoke(
        app,
        ["results", str(tmp_path), "--of", "COALA", "--save-votes", str(tmp_path / "v.jsonl")],
        catch_exceptions=False,
    )
    assert found.exit_code == 0, found.output
    *lines, last = found.stdout.splitlines()
    result = json.loads(last, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    table = "\n".join(lines)
    assert result["attendance"] == {"answered": 5, "began": 5, "finished": 4, "invited": 0, "withdrawn": 0}
    assert result["excluded"] == {"failed 1 of 1 attention checks, at most 0 allowed": 1}
    assert "left out: 1, failed 1 of 1 attention checks" in table
    assert result["parts"][-1]["rates"][2]["over_both"]["value"] == 1.0
    assert result["repeats_same"]["value"] == 1.0
    assert "1 of 5 raters did not finish" in found.stderr
    assert Path(result["page"]) == tmp_path / "results.html"
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["everybody"][-1]["n_raters"] == saved["parts"][-1]["n_raters"] + 1
    assert Outline((tmp_path / "results.html").read_text()).open == []
    rows = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    assert len(rows) == saved["parts"][-1]["n_votes"]
    assert {row["method"] for row in rows} == {"COALA"}


def test_survey_built_from_generations_keeps_each_methods_own_text_in_the_results() -> None:
    prompts = [SurveyPrompt(str(i), "p", "all") for i in range(2)]
    generations = {m: [Generation(str(i), f"{m}{i}", "none", 1, 0, 0.0, 0.0) for i in range(2)] for m in METHODS}
    survey = build(generations, prompts, per_category=0)
    results = analyse(survey, votes_of(np.array([[1, 1], [1, 1]])), draws=10)
    winner = max(results.parts[0].rates, key=lambda rate: rate.votes).method
    assert survey.questions[0].answers[survey.methods.index(winner)] == "ORPO0"
