"""The survey as a value, ballots, records and the command that builds one."""

from __future__ import annotations

import itertools
import json
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import chi2_contingency, chisquare
from typer.testing import CliRunner

import coala.survey.records
from coala.cli.survey import app
from coala.store import save_generations
from coala.survey import Check, Records, Survey, SurveyPrompt, ballot, build, load_survey, read_votes, save_survey
from coala.survey.ballot import answer_order
from coala.survey.form import clean
from coala.survey.records import COUNT, FILE, new_token
from coala.values import CoalaError, Generation
from tests.survey_raters import made_up
from tests.waiting import Clock


def reply(prompt: str, text: str) -> Generation:
    return Generation(prompt, text, "none", 1, 0, float("nan"), -1.0)


def two(n: int, **changes: str) -> dict[str, list[Generation]]:
    return {m: [reply(str(i), changes.get(m, f"{m} says {i}")) for i in range(n)] for m in ("one", "other")}


PROMPTS = [SurveyPrompt(str(i), f"prompt {i}", "all") for i in range(6)]


# --- building ----------------------------------------------------------------------------------------------------


def test_build_is_deterministic_and_seed_draws_other_questions() -> None:
    first, again, other = (build(two(6), PROMPTS, per_category=3, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.digest == again.digest
    assert {q.prompt_id for q in first.questions} != {q.prompt_id for q in other.questions}
    assert first.digest != other.digest
    for question in first.questions:
        assert question.answers == tuple(f"{m} says {question.prompt_id}" for m in first.methods)


def test_default_is_the_papers_25_per_category() -> None:
    prompts = [SurveyPrompt(f"{c}{i}", "p", c) for c in ("edu", "imdb") for i in range(30)]
    generations = {m: [reply(p.prompt_id, m + p.prompt_id) for p in prompts] for m in ("COALA", "DPO", "ORPO", "SFT")}
    survey = build(generations, prompts)
    assert [len(survey.of_category(c)) for c in survey.categories] == [25, 25]


def test_prompts_with_equal_answers_or_missing_methods_are_left_out_and_counted() -> None:
    generations = two(6)
    generations["one"][0] = reply("0", "same\r\n")
    generations["other"][0] = reply("0", "  same")
    del generations["other"][5]
    survey = build(generations, PROMPTS, per_category=0)
    assert [q.prompt_id for q in survey.questions] == ["1", "2", "3", "4"]
    assert survey.remarks == (
        "prompts that not all methods answered are left out (other lacks 1)",
        "1 prompts to which two methods gave the same text are left out",
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"per_category": 7}, "has 6 prompts that all of 'one', 'other' answered.*expected 7"),
        ({"asks": {"edu": "?"}}, "category 'edu'; the prompts are of 'all'"),
        ({"repeats": 2, "per_category": 3}, "2 repeated questions per category; expected 0 to 1"),
        ({"checks": 99}, "99 attention checks; expected from 0 to 32"),
        ({"own_checks": [Check("?", ("a", "b"), 2)]}, "number 2 is right"),
        ({"consent": " "}, "consent text is empty"),
        ({"min_seconds": float("nan")}, "at least nan seconds"),
    ],
)
def test_what_cannot_be_built_is_explained(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CoalaError, match=message):
        build(two(6), PROMPTS, **({"per_category": 0} | change))


def test_generations_that_do_not_match_are_explained() -> None:
    with pytest.raises(CoalaError, match="compares at least two"):
        build({"one": two(6)["one"]}, PROMPTS)
    with pytest.raises(CoalaError, match="'one' answers prompt '0' twice"):
        build({"one": two(6)["one"] * 2, "other": two(6)["other"]}, PROMPTS)
    with pytest.raises(CoalaError, match=r"4 of 6 prompts .* no text, the first '2'"):
        build(two(6), PROMPTS[:2])
    with pytest.raises(CoalaError, match="hold id '0' twice"):
        build(two(6), [*PROMPTS, PROMPTS[0]])


def test_what_cannot_be_seen_does_not_tell_texts_apart() -> None:
    assert clean(" a\u200b \r\nb\u202e\x00\x1b\t\n\n") == "a\nb"
    joined = "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \U0001f468\u200d\U0001f469\u200d\U0001f467"
    assert clean(joined) == joined  # joiners of letters and of emoji are seen


def test_survey_file_round_trip_and_changed_file_is_refused(tmp_path: Path) -> None:
    survey = made_up(repeats=1, checks=3, fields=("Name",), asks={"imdb": "Most positive?"}, min_seconds=1.5)
    path = save_survey(tmp_path, survey)
    assert load_survey(tmp_path) == survey
    path.write_text(path.read_text().replace("Most positive?", "Most negative?"))
    with pytest.raises(CoalaError, match="was changed after it was built"):
        load_survey(tmp_path)
    path.write_text("{}")
    with pytest.raises(CoalaError, match="not a survey of format 1"):
        load_survey(tmp_path)
    with pytest.raises(CoalaError, match="is not a survey"):
        load_survey(tmp_path / "nowhere")


def test_made_checks_have_one_answer_of_the_kind_asked_for() -> None:
    from coala.survey.form import WORDS

    survey = made_up(checks=32)
    assert len({(c.prompt, c.answers[c.right]) for c in survey.checks}) > 8
    for check in survey.checks:
        kinds = [
            next(k for k, words in WORDS.items() if text.rstrip(".").split()[-1] in words) for text in check.answers
        ]
        asked = check.prompt.rstrip(".").split("names ")[1]
        assert kinds.count(asked) == 1
        assert kinds[check.right] == asked
    assert len({check.right for check in survey.checks}) == 4


# --- ballots -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [2, 3, 4, 5, 7])
def test_answers_are_balanced_over_raters_and_over_neighbours(m: int) -> None:
    survey = made_up(tuple("ABCDEFG"[:m]), ("edu", "imdb"), n=2 * m)
    raters = 2 * m  # two blocks: what an odd number of methods needs for its neighbours
    orders = {(q, r): answer_order(survey, q, r) for q in range(len(survey.questions)) for r in range(raters)}
    for q in range(len(survey.questions)):
        for block in (range(m), range(m, 2 * m)):
            for position in range(m):
                assert {orders[q, r][position] for r in block} == set(range(m))
        follows = Counter(pair for r in range(raters) for pair in itertools.pairwise(orders[q, r]))
        assert set(follows.values()) == {2}
        assert len(follows) == m * (m - 1)


def next_places(pages: list[list[int]]) -> list[tuple[list[int], int]]:
    """For each method and page: its places on the two pages before, and its place."""
    return [
        ([earlier.index(method), before.index(method)], now.index(method))
        for earlier, before, now in zip(pages, pages[1:], pages[2:], strict=False)
        for method in range(4)
    ]


def test_orders_seen_so_far_do_not_tell_the_next() -> None:
    """Who recognised a method on two pages still does not know where it is on the next."""
    survey = made_up(n=8)
    raters = [[list(i.order) for i in ballot(survey, place)] for place in range(400)]
    rng = np.random.default_rng(0)
    # What is not done: a rater's methods never twice in one place over four pages.
    balanced = [_latin(rng) for _ in range(400)]
    for pages, found in ((raters, False), (balanced, True)):
        table = np.zeros((16, 4))
        for rater in pages:
            for (a, b), now in next_places(rater):
                table[4 * a + b, now] += 1
        assert table.sum() > 3000
        p_value = chi2_contingency(table[table.any(axis=1)]).pvalue
        assert p_value < 1e-6 if found else p_value > 0.001


def _latin(rng: np.random.Generator) -> list[list[int]]:
    return [[int((x + row) % 4) for x in range(4)] for row in rng.permutation(4)]


def test_place_and_page_number_do_not_tell_the_method() -> None:
    survey = made_up(n=8)
    by_page, by_question = np.zeros((16 * 4, 4)), np.zeros((16 * 4, 4))
    for place in range(400):
        for page, item in enumerate(ballot(survey, place)):
            for position, method in enumerate(item.order):
                by_page[4 * page + position, method] += 1
                by_question[4 * item.index + position, method] += 1
    assert chisquare(by_page.ravel()).pvalue > 0.001
    assert (by_question == 100).all()  # exactly balanced


@pytest.mark.parametrize("place", range(9))
def test_ballot_holds_everything_once_and_repeats_late_in_another_order(place: int) -> None:
    survey = made_up(n=10, repeats=3, checks=4)
    dealt = ballot(survey, place)
    assert dealt == ballot(survey, place)
    questions = [item.index for item in dealt if item.kind == "question"]
    assert sorted(questions) == list(range(20))
    assert sorted(item.index for item in dealt if item.kind == "check") == list(range(4))
    assert dealt[0].kind == "question"
    first = {item.index: (page, item.order) for page, item in enumerate(dealt) if item.kind == "question"}
    repeats = [(page, item) for page, item in enumerate(dealt) if item.kind == "repeat"]
    per_category = Counter(survey.questions[item.index].category for _, item in repeats)
    assert per_category == {"edu": 3, "imdb": 3}
    for page, item in repeats:
        before, order = first[item.index]
        assert page - before > 5
        assert all(a != b for a, b in zip(order, item.order, strict=True))
    kinds = [survey.questions[item.index].category for item in dealt if item.kind != "check"]
    assert len(list(itertools.groupby(kinds))) == 2  # categories are not mixed
    assert kinds[0] == survey.categories[place % 2]
    where = [page for page, item in enumerate(dealt) if item.kind == "check"]
    assert max(b - a for a, b in itertools.pairwise(where)) <= 2 * len(dealt) / 4


def test_orders_depend_on_the_texts_not_on_the_seed_alone() -> None:
    survey = made_up(n=8)
    other = made_up(n=8, title="Another title")
    assert survey.seed == other.seed
    assert [answer_order(survey, q, 0) for q in range(16)] != [answer_order(other, q, 0) for q in range(16)]


# --- records -----------------------------------------------------------------------------------------------------


@pytest.fixture
def survey() -> Survey:
    return made_up(n=2, repeats=1, checks=1)


@pytest.fixture
def records(tmp_path: Path, survey: Survey) -> Records:
    return Records(tmp_path, survey)


def begun(records: Records) -> str:
    token = new_token()
    assert records.begin(token, {})
    return token


def test_answers_count_once_may_change_and_come_in_order(records: Records) -> None:
    token = begun(records)
    rater = records.rater(token)
    assert rater is not None
    with pytest.raises(LookupError):
        records.answer(rater, 1, 0)
    for _ in range(3):
        records.answer(rater, 0, 2)
    assert (records.n_answers, records.n_changed) == (1, 0)
    records.answer(rater, 0, 1)
    found = records.rater(token)
    assert found is not None
    assert found.choices == {0: 1}
    assert found.next_page == 1
    assert (records.n_answers, records.n_changed) == (1, 1)


def test_beginning_twice_is_beginning_once_and_places_of_those_who_withdraw_are_dealt_again(records: Records) -> None:
    tokens = [begun(records) for _ in range(3)]
    dealt = [records.rater(token).pages for token in tokens]  # type: ignore[union-attr]
    assert records.begin(tokens[1], {"Name": "again"})
    assert records.rater(tokens[1]).entered == {}  # type: ignore[union-attr]
    assert [records.rater(token).pages for token in tokens] == dealt  # type: ignore[union-attr]
    records.withdraw(records.rater(tokens[1]))  # type: ignore[arg-type]
    assert records.rater(begun(records)).pages == dealt[1]  # type: ignore[union-attr]
    assert not records.begin("short", {})
    assert not records.begin(new_token(), {}, invited_only=True)
    assert records.begin(records.invite(1)[0], {}, invited_only=True)


def test_withdrawing_leaves_nothing_of_a_rater_in_the_files(tmp_path: Path, records: Records) -> None:
    token = new_token()
    records.begin(token, {"Name": "Philippa Featherstonehaugh"})
    rater = records.rater(token)
    assert rater is not None
    records.answer(rater, 0, 0)
    assert any(b"Featherstonehaugh" in path.read_bytes() for path in tmp_path.glob("answers.sqlite*"))
    records.withdraw(rater)
    assert not any(b"Featherstonehaugh" in path.read_bytes() for path in tmp_path.glob("answers.sqlite*"))
    assert records.n_answers == 0
    with pytest.raises(LookupError):
        records.answer(rater, 0, 0)
    (gone,) = records.raters()
    assert gone.withdrawn
    assert not gone.entered


def test_answers_of_another_survey_or_a_damaged_file_are_refused(tmp_path: Path, records: Records) -> None:
    records.close()
    with pytest.raises(CoalaError, match="answers to another survey"):
        Records(tmp_path, made_up(n=3))
    for path in tmp_path.glob("answers.sqlite*"):
        path.write_bytes(b"not a database at all" * 300)
    with pytest.raises(CoalaError, match="if it is damaged, restore a backup"):
        Records(tmp_path, made_up(n=2, repeats=1, checks=1))


def test_records_are_synced_before_they_are_acknowledged(tmp_path: Path, records: Records) -> None:
    token = begun(records)
    assert records._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert records._db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    records.answer(records.rater(token), 0, 1)  # type: ignore[arg-type]
    # Another connection sees it at once: nothing is left in an open transaction.
    with sqlite3.connect(tmp_path / "answers.sqlite") as other:
        assert other.execute("SELECT choice FROM answers").fetchall() == [(1,)]


@pytest.mark.parametrize("damage", ["none", "gone", "cut", "overwritten", "uncounted"])
def test_answers_that_a_damaged_log_loses_are_missed(
    tmp_path: Path, survey: Survey, records: Records, damage: str
) -> None:
    """As a kill leaves the files: SQLite itself opens them all, with fewer answers."""
    rater = records.rater(begun(records))
    assert rater is not None
    for page in range(3):
        records.answer(rater, page, 0)
    there = tmp_path / "there"
    there.mkdir()
    for name in (FILE, f"{FILE}-wal", COUNT):
        (there / name).write_bytes((tmp_path / name).read_bytes())
    log = there / f"{FILE}-wal"
    whole = log.read_bytes()
    if damage == "gone":
        log.unlink()
    elif damage == "cut":
        log.write_bytes(whole[:-100])
    elif damage == "overwritten":
        at = len(whole) // 2
        log.write_bytes(whole[:at] + bytes(byte ^ 255 for byte in whole[at : at + 100]) + whole[at + 100 :])
    elif damage == "uncounted":
        (there / COUNT).unlink()
    if damage in ("none", "uncounted"):
        again = Records(there, survey)
        assert again.n_answers == 3
        again.close()
        return
    with pytest.raises(CoalaError, match=r"answers are missing.*restore a backup"):
        Records(there, survey)
    (there / COUNT).unlink()  # as it says
    if damage != "gone":
        assert Records(there, survey).n_answers < 3


def test_no_method_is_named_where_answers_are_kept(tmp_path: Path) -> None:
    survey = made_up(("QUOKKA", "WOMBAT"), n=2)
    records = Records(tmp_path, survey)
    rater = records.rater(begun(records))
    assert rater is not None
    records.answer(rater, 0, 0)
    records.close()
    assert not any(b"QUOKKA" in p.read_bytes() or b"WOMBAT" in p.read_bytes() for p in tmp_path.glob("*.sqlite*"))


def test_votes_are_read_by_method_whatever_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    survey = made_up(n=4, repeats=2, checks=2)
    records = Records(tmp_path, survey)
    clock = Clock()
    monkeypatch.setattr(coala.survey.records, "time", clock)
    for number in range(3):
        rater = records.rater(begun(records))
        assert rater is not None
        for page, item in enumerate(rater.pages):
            # Always the third method; rater 1 fails a check, rater 2 takes the second method at repeats.
            wanted = 2 if item.kind == "question" or number < 2 else 1
            if item.kind == "check":
                right = survey.checks[item.index].right
                wanted = (right + 1) % 4 if number == 1 and item.index == 0 else right
            records.view(rater, page)
            clock.move(3)
            records.answer(rater, page, item.order.index(wanted))
    votes = read_votes(survey, records.raters())
    assert {vote.method for vote in votes.votes} == {2}
    assert len(votes.votes) == 3 * 8
    assert [reason for _, reason in votes.excluded] == ["failed 1 of 2 attention checks, at most 0 allowed"]
    assert len(votes.counted()) == 2 * 8
    assert Counter(one.same for one in votes.repeated) == {True: 8, False: 4}
    assert {vote.seconds for vote in votes.votes} == {3}
    slow = made_up(n=4, repeats=2, checks=2, max_failed_checks=1, min_seconds=60)
    assert {reason for _, reason in read_votes(slow, records.raters()).excluded} == {"median below 60 s per question"}


# --- the command -------------------------------------------------------------------------------------------------


def run(*arguments: object) -> dict[str, Any]:
    found = CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return dict(json.loads(found.stdout.splitlines()[-1]))


def test_command_builds_from_files_of_several_methods(tmp_path: Path) -> None:
    for method, replies in two(6).items():
        save_generations(tmp_path / f"generations-{method}.jsonl", replies)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt_id": str(i), "prompt": f"prompt {i}"}) for i in range(6)))
    (tmp_path / "consent.txt").write_text("You agree.")
    files = [tmp_path / "generations-one.jsonl", f"zwei={tmp_path / 'generations-other.jsonl'}"]
    own = tmp_path / "checks.jsonl"
    own.write_text(json.dumps({"prompt": "Choose b", "answers": ["a", "b"], "right": 1}))
    options = ["--per-category", 4, "--ask", "Which?", "--field", "Name", "--repeats", 1, "--checks", 1]
    options += ["--consent", tmp_path / "consent.txt", "--check-file", own]
    result = run("build", *files, "--prompts", f"film={prompts}", "--out", tmp_path / "s", *options)
    assert result["methods"] == ["one", "zwei"]
    assert result["questions"] == {"film": 4}
    assert result["pages_per_rater"] == 4 + 1 + 2 == len(ballot(load_survey(tmp_path / "s"), 0))
    survey = load_survey(tmp_path / "s")
    assert survey.asks == {"film": "Which?"}
    assert survey.consent == "You agree."
    assert survey.checks[1] == Check("Choose b", ("a", "b"), 1)
    Records(tmp_path / "s", survey).close()
    with pytest.raises(CoalaError, match="holds answers to a survey already"):
        run("build", *files, "--prompts", prompts, "--out", tmp_path / "s", "--per-category", 4)
    with pytest.raises(CoalaError, match="Two files are of a method 'one'"):
        run("build", files[0], files[0], "--prompts", prompts, "--out", tmp_path / "t")
    with pytest.raises(CoalaError, match=r"prompts.jsonl: holds no replies"):
        run("build", prompts, files[1], "--prompts", prompts, "--out", tmp_path / "t")
    with pytest.raises(CoalaError, match=r"prompts.jsonl:1: answers: found"):
        run("build", *files, "--prompts", prompts, "--out", tmp_path / "t", "--check-file", prompts)
    with pytest.raises(CoalaError, match="instruction or prompt or turns: found no such field"):
        run("build", *files, "--prompts", files[0], "--out", tmp_path / "t")
    save_survey(tmp_path / "empty", survey)
    with pytest.raises(CoalaError, match="has no answers yet"):
        run("results", tmp_path / "empty")


def test_command_reads_prompts_of_a_runs_pairs(tmp_path: Path) -> None:
    from coala.store import save_pairs
    from coala.values import Pair, prompt_id, user

    pairs = [Pair(user(f"prompt {i}"), "a", "b", str(i)) for i in range(4)]
    save_pairs(tmp_path / "pairs-eval.jsonl", pairs)
    for method in ("guided", "unguided"):
        replies = [reply(prompt_id(pair.prompt), f"{method} {i}") for i, pair in enumerate(pairs)]
        save_generations(tmp_path / f"generations-{method}.jsonl", replies)
    files = [tmp_path / f"generations-{method}.jsonl" for method in ("guided", "unguided")]
    run("build", *files, "--prompts", tmp_path / "pairs-eval.jsonl", "--out", tmp_path / "s", "--per-category", 0)
    survey = load_survey(tmp_path / "s")
    # Beside the generations they are found without being named.
    assert run("build", *files, "--out", tmp_path / "t", "--per-category", 0)["digest"] == survey.digest
    (tmp_path / "pairs-eval.jsonl").unlink()
    with pytest.raises(CoalaError, match=r"no pairs-eval\.jsonl next to the generations"):
        run("build", *files, "--out", tmp_path / "u")
    assert [q.prompt for q in survey.questions] == [f"prompt {i}" for i in range(4)]
    assert survey.questions[2].answers == ("guided 2", "unguided 2")
