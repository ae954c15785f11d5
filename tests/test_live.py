"""A session: what a click does, what a kill leaves, what is asked and what is held out; on a real, tiny model."""

from __future__ import annotations

import json
import os
import re
import resource
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coala.backbone import load_backbone
from coala.convex.prepare import Standardisation
from coala.convex.sequential import solved
from coala.live.figures import accuracy_figure, figures, waiting_for
from coala.live.finish import begin, recipe_in, write_pairs
from coala.live.journal import VERDICTS, Journal, JournalError, LivePrompt, line, read_journal
from coala.live.learner import EARLY_RIDGE, Learner, chosen_at, coordinates
from coala.live.pool import Pool, choose, reply_event, set_aside
from coala.live.session import FOLDER, JOURNAL, REPLIES, Conflict, Draw, Read, Session
from coala.live.settings import LiveSettings
from coala.live.writer import Backbone, Threads, carry_out
from coala.statistics.anytime import running_mean
from coala.store import StoreError, load_pairs
from coala.values import CoalaError, Turn, user
from tests.menagerie import tiny_backbone
from tests.waiting import PATIENCE, wait_for

SETTINGS = LiveSettings(max_new_tokens=6, replies=3, ahead=30, batch=8)
PROMPTS = [user(f"tell me a story of {what}") for what in ("a fox", "a dog", "a film", "a girl", "a friend", "a day")]
IDENTITY = {"weights": "w", "layer": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder = tiny_backbone("gpt2", tmp_path_factory.mktemp("live") / "model")
    backbone = load_backbone(folder, device="cpu")
    return Backbone(backbone, backbone.spec(), SETTINGS.max_new_tokens, 1.0, 0)


def fill(session: Session, model: Backbone) -> None:
    """All the work there is, in this thread."""
    while (work := session.work()) is not None:
        carry_out(work, session, model, lambda: None)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, model: Backbone) -> dict[str, bytes]:
    """The files of a session without a click, whose replies are drawn."""
    folder = tmp_path_factory.mktemp("drawn")
    with Session(folder, SETTINGS, IDENTITY) as made:
        made.add_prompts(PROMPTS)
        fill(made, model)
    return {name: (folder / FOLDER / name).read_bytes() for name in (JOURNAL, REPLIES)}


@pytest.fixture
def session(tmp_path: Path, drawn: dict[str, bytes]) -> Iterator[Session]:
    (tmp_path / FOLDER).mkdir()
    for name, raw in drawn.items():
        (tmp_path / FOLDER / name).write_bytes(raw)
    with Session(tmp_path, SETTINGS, IDENTITY, clock=lambda: "now") as made:
        yield made


def longer(asked: Any) -> str:
    return (
        "first" if (len(asked.first.text), asked.first.text) > (len(asked.second.text), asked.second.text) else "second"
    )


def clicked(session: Session, n: int, rater: str = "owner") -> list[str]:
    """``n`` answers by length; the ids of their questions."""
    done = []
    for _ in range(n):
        question = session.question(rater)
        assert question is not None
        session.answer(rater, question.id, f"click-{question.id}", longer(question))
        done.append(question.id)
    return done


def again(session: Session, model: Backbone | None = None) -> Session:
    """The session as another process finds it, were this one killed now: from the bytes on the disk alone."""
    folder = session.path.parent.with_name(session.path.parent.name + "-again")
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    for name in (JOURNAL, REPLIES):
        (folder / FOLDER / name).write_bytes((session.path / name).read_bytes())
    return Session(folder, SETTINGS, IDENTITY)


# --- clicks ------------------------------------------------------------------------------------------------------


def test_a_click_is_on_the_disk_before_it_is_answered_and_counts_once(session: Session) -> None:
    question = session.question("owner")
    assert question is not None
    assert session.question("owner") == question  # until it is answered, in any tab
    for _ in range(3):
        session.answer("owner", question.id, "c1", "first")
        kept = read_journal((session.path / JOURNAL).read_bytes())
        assert [(one.id, one.click) for one in kept.answered.values()] == [(question.id, "c1")]
    with pytest.raises(Conflict, match="already answered"):
        session.answer("owner", question.id, "c2", "second")
    with pytest.raises(Conflict, match="assigned to another rater"):
        session.answer("rater-1", question.id, "c3", "second")
    other = session.question("rater-1")
    following = session.question("owner")
    assert other is not None
    assert following is not None
    assert len({question.id, other.id, following.id}) == 3
    with session.lock:
        raw = (session.path / JOURNAL).read_bytes()
    assert raw.count(b'"kind":"answered"') == 1


def test_undo_leaves_nothing_behind_and_an_old_click_does_not_come_back(session: Session) -> None:
    clicked(session, 6)
    learner = session.learner
    assert learner is not None
    learner.settle()
    before, pairs = learner.program.weights.copy(), session.journal.pairs(held_out=False)
    question = session.question("owner")
    while question is not None and question.held_out:
        session.answer("owner", question.id, f"click-{question.id}", "skip")
        question = session.question("owner")
    assert question is not None
    session.answer("owner", question.id, "wrong", longer(question))
    assert np.linalg.norm(learner.program.weights - before) > 1e-3
    for _ in range(2):
        session.undo("owner", question.id, "wrong")
    learner.settle()
    assert np.linalg.norm(learner.program.weights - before) <= 1e-4
    assert session.journal.pairs(held_out=False) == pairs
    assert session.question("owner") == question
    session.answer("owner", question.id, "wrong", longer(question))  # comes late from the network
    assert question.id not in session.journal.answered
    session.answer("owner", question.id, "right", "same")
    session.undo("owner", question.id, "wrong")
    assert session.journal.answered[question.id].verdict == "same"


@given(cut=st.integers(0, 400), data=st.data())
def test_killed_at_any_byte_a_session_goes_on_with_what_was_acknowledged(cut: int, data: st.DataObject) -> None:
    raw = journal_bytes()
    kept = read_journal(raw[: len(raw) - min(cut, len(raw))])
    whole = raw[: len(raw) - min(cut, len(raw))].split(b"\n")[:-1]
    assert kept.size == sum(len(one) + 1 for one in whole)
    assert len(kept.answered) == sum(b'"answered"' in one for one in whole)
    # What is sent again after it changes nothing that is there, and adds what is not.
    for event in map(json.loads, raw.split(b"\n")[:-1]):
        kept.apply(event) if event["kind"] != "begun" or kept.identity is None else None
    assert kept.answered == read_journal(raw).answered


def journal_bytes() -> bytes:
    reply = {"id": "p-0", "text": "a\n\u00e9", "policy": "unguided"}
    asked = {"kind": "asked", "prompt": "p", "first": reply, "second": {**reply, "id": "p-1"}, "held_out": False}
    asked |= {"how": "random", "rater": "owner", "margin": 0.0, "n_taught": 0}
    events = [
        {"kind": "begun", "version": 1, "identity": IDENTITY},
        {"kind": "prompt", "id": "p", "turns": [["user", "x"]], "aside": False},
    ]
    for i in range(5):
        events += [
            {**asked, "id": f"q{i}"},
            {"kind": "answered", "id": f"q{i}", "click": f"c{i}", "verdict": "first", "at": ""},
        ]
    return b"".join(map(line, events))


@pytest.mark.parametrize(
    "spoilt",
    [b"hello\nthere\n", b'{"kind":"asked"}\n' + journal_bytes(), journal_bytes().replace(b'"q2"', b'"q2', 1)],
)
def test_a_spoilt_journal_is_refused_in_a_sentence(spoilt: bytes) -> None:
    with pytest.raises(JournalError, match="Fix: "):
        read_journal(spoilt)


@given(st.binary(max_size=300))
def test_whatever_bytes_a_journal_holds_it_is_read_or_refused(raw: bytes) -> None:
    for mixed in (raw, journal_bytes() + raw, raw + journal_bytes()):
        try:
            read_journal(mixed)
        except JournalError:
            continue


def test_a_session_goes_on_where_it_was(session: Session, model: Backbone) -> None:
    clicked(session, 8)
    undone = session.journal.last_answer("owner")
    assert undone is not None
    session.undo("owner", undone.id, undone.click)
    question = session.question("owner")
    assert session.learner is not None
    session.learner.settle()
    with again(session) as other:
        assert other.question("owner") == question
        assert other.journal.answered == session.journal.answered
        assert other.learner is not None
        other.learner.settle()
        assert np.linalg.norm(other.learner.program.weights - session.learner.program.weights) < 1e-4
        assert other.work() is None
        assert list(other.pool.replies) == list(session.pool.replies)


def test_two_servers_or_another_model_are_refused(session: Session, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="another run is writing there"), Session(tmp_path, SETTINGS, IDENTITY):
        pass
    with again(session):
        pass
    folder = tmp_path.with_name(tmp_path.name + "-again")
    with pytest.raises(CoalaError, match="another layer"), Session(folder, SETTINGS, {**IDENTITY, "layer": 2}):
        pass


def test_a_full_disk_is_refused_in_a_sentence_and_loses_nothing(session: Session) -> None:
    """The system itself refuses: no file may grow beyond a few bytes more than the journal has."""
    clicked(session, 3)
    question = session.question("owner")
    assert question is not None
    before = (session.path / JOURNAL).read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, hard))
    try:
        with pytest.raises(StoreError, match="could not be written"):
            session.answer("owner", question.id, "full", "first")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (session.path / JOURNAL).read_bytes() == before
    assert question.id not in session.journal.answered
    session.answer("owner", question.id, "full", "first")
    assert read_journal((session.path / JOURNAL).read_bytes()).answered[question.id].verdict == "first"


def test_raters_at_the_same_time_lose_and_double_nothing(session: Session) -> None:
    def clicks(rater: str) -> None:
        for _ in range(5):
            question = session.question(rater)
            if question is not None:
                for _ in range(2):
                    session.answer(rater, question.id, f"{rater}-{question.id}", longer(question))

    raters = [threading.Thread(target=clicks, args=(f"rater-{i}",)) for i in range(3)]
    for one in raters:
        one.start()
    for one in raters:
        one.join()
    kept = read_journal((session.path / JOURNAL).read_bytes())
    assert kept.answered == session.journal.answered
    assert all(kept.asked[one].rater in answer.click for one, answer in kept.answered.items())
    pairs = [frozenset((one.first.id, one.second.id)) for one in kept.asked.values()]
    assert len(pairs) == len(set(pairs))


# --- what is fitted, and what is held out ------------------------------------------------------------------------


def test_what_is_fitted_is_what_was_clicked_and_no_held_out_click(session: Session) -> None:
    n = clicked(session, 12)
    learner = session.learner
    assert learner is not None
    learner.settle()
    fitted = [one for one in n if not session.journal.asked[one].held_out]
    assert len(fitted) < 12
    assert len(learner) == len(fitted)
    rows = []
    for name in fitted:
        asked, answer = session.journal.asked[name], session.journal.answered[name]
        both = session.journal.preferred(answer)
        assert both is not None
        rows.append(learner.row(*(session.pool.features[asked.prompt, text] for text in both)))
    afresh = solved(np.stack(rows), learner.program.ridge)
    assert np.linalg.norm(afresh.weights - learner.program.weights) <= (
        afresh.optimality.radius + learner.optimality.radius
    )
    for asked in session.journal.asked.values():
        assert session.journal.prompts[asked.prompt].aside == asked.held_out
    head = learner.head(session_spec(learner))
    margin = learner.margin(session.pool.features[asked.prompt, both[0]], session.pool.features[asked.prompt, both[1]])
    scores = [head.score(session.pool.features[asked.prompt, text]) for text in both]
    assert float(scores[0] - scores[1]) == pytest.approx(margin, abs=1e-4)


def session_spec(learner: Learner) -> Any:
    from coala.values import FeatureSpec

    return FeatureSpec("m", "", "w", "t", 1, "mean", False, 96)


def test_every_click_is_told_as_what_it_is(session: Session, model: Backbone) -> None:
    for number in range(14):
        question = session.question("owner")
        assert question is not None
        verdict = "edited" if question.held_out else VERDICTS[number % len(VERDICTS)]
        side = {"side": "first", "text": f"edit {number}"} if verdict == "edited" else {}
        session.answer("owner", question.id, f"click-{number}", verdict, **side)  # type: ignore[arg-type]
    fill(session, model)
    clicks, *_ = figures(session)
    held_out = [session.journal.asked[name].held_out for name in session.journal.answered]
    verdicts = [one.verdict for one in session.journal.answered.values()]
    assert clicks.value == "14"
    assert sum(map(int, re.findall(r"\d+", clicks.how))) == 14
    edited = sum(v == "edited" and aside for v, aside in zip(verdicts, held_out, strict=True))
    assert edited > 0
    assert f"{edited} held out and edited" in clicks.how


def test_outcomes_are_those_of_the_head_before_the_click(session: Session) -> None:
    clicked(session, 14)
    expected = []
    for name, answer in session.journal.answered.items():
        asked = session.journal.asked[name]
        if asked.held_out and answer.verdict in ("first", "second"):
            right = (asked.margin > 0) == (answer.verdict == "first")
            expected.append(0.5 if asked.margin == 0 else float(right))
    assert session.journal.outcomes() == expected
    assert expected
    told = accuracy_figure(running_mean(expected))
    assert f"n = {len(expected)} " in told.how
    assert "not shown to be better" in told.how


def test_an_edit_becomes_a_pair_once_its_feature_is_there(session: Session, model: Backbone) -> None:
    question = session.question("owner")
    while question is not None and question.held_out:
        session.answer("owner", question.id, f"c{question.id}", "skip")
        question = session.question("owner")
    assert question is not None
    session.answer(
        "owner", question.id, "e", "edited", side="second", text="a good friend", tags=[" kind ", "kind", ""]
    )
    assert session.learner is not None
    n = len(session.learner)
    work = session.work()
    assert isinstance(work, Read)
    assert [text for _, text in work.texts] == ["a good friend"]
    fill(session, model)
    assert len(session.learner) == n + 1
    ((pair, answer),) = [one for one in session.journal.pairs(held_out=False) if one[1].id == question.id]
    assert (pair.chosen, pair.rejected, pair.rater) == ("a good friend", question.second.text, "owner")
    assert answer.tags == ("kind",)
    with again(session) as other:
        assert other.work() is None  # the feature is kept, too
    following, before = session.question("owner"), (session.path / JOURNAL).read_bytes()
    assert following is not None
    with pytest.raises(JournalError, match="edit without"):
        session.answer("owner", following.id, "x", "edited", side="first", text=" ")
    assert (session.path / JOURNAL).read_bytes() == before


@pytest.mark.parametrize("way", ["random", "active", "mixed"])
def test_a_fifth_is_held_out_whoever_asks_and_however_often(way: Any) -> None:
    """The coin is that of the question's number; asking again while one waits changes nothing."""
    rng = np.random.default_rng(0)
    pool, prompts = Pool(), [LivePrompt(f"p{i}", user(str(i)), set_aside(i, 0.2, 3)) for i in range(40)]
    assert sum(prompt.aside for prompt in prompts) == 8
    assert not prompts[0].aside
    for prompt in prompts:
        for k in range(6):
            pool.apply(reply_event(prompt.id, k, f"{prompt.id} {k}", "unguided", rng.standard_normal(4).astype("f4")))
    learner = Learner(coordinates(rng.standard_normal((20, 4)).astype("f4")))
    asked: list[Any] = []
    for _ in range(300):
        wanted = LiveSettings(ask=way)
        following = choose(pool, prompts, asked, learner, wanted, "owner")
        assert following == choose(pool, prompts, asked, learner, wanted, "owner")
        assert following is not None
        asked.append(following)
    held = [one for one in asked if one.held_out]
    assert 40 <= len(held) <= 80  # 60 expected; a hundred times rarer than one in a million beyond
    assert all(one.how == "random" for one in held)
    share = np.mean([one.how == "active" for one in asked if not one.held_out])
    assert abs(share - {"random": 0.0, "mixed": 0.5, "active": 0.9}[way]) < 0.12


# --- the ridge ---------------------------------------------------------------------------------------------------


@settings(max_examples=12)
@given(st.integers(0, 60), st.integers(0, 5))
def test_the_ridge_is_a_function_of_the_pairs_at_hand(gone: int, seed: int) -> None:
    """However pairs came and went, a settled learner has the ridge and weights of one that saw what is left alone."""
    rng = np.random.default_rng(seed)
    standardisation = Standardisation(np.zeros(3), np.ones(3), 1.0, np.eye(4))
    rows = rng.standard_normal((24, 4))
    there, afresh = Learner(standardisation), Learner(standardisation)
    for i, row in enumerate(rows):
        there.teach(str(i), i, row, f"g{i // 2}")
        if i in (10, 16):
            there.settle()
    left = [i for i in range(24) if i % 7 != gone % 7 or i < gone % 5]
    for i in set(range(24)) - set(left):
        there.forget(str(i))
    for i in left:
        afresh.teach(str(i), i, rows[i], f"g{i // 2}")
    there.settle(), afresh.settle()
    assert there.program.ridge == afresh.program.ridge
    assert there.due is None
    radius = there.optimality.radius + afresh.optimality.radius
    assert np.linalg.norm(there.program.weights - afresh.program.weights) <= radius + 1e-12


def test_when_the_ridge_is_chosen() -> None:
    assert [chosen_at(n) for n in (0, 9, 10, 14, 15, 22, 23, 34, 35)] == [0, 0, 10, 10, 15, 15, 23, 23, 35]
    assert Learner(Standardisation(np.zeros(3), np.ones(3), 1.0, np.eye(4))).program.ridge == EARLY_RIDGE


# --- the model behind it -----------------------------------------------------------------------------------------


class Held(Backbone):
    """The same model, which waits at a gate: as one that takes twenty seconds a reply."""

    gate: threading.Event

    def write(self, draws: Any, head: Any, on_token: Callable[[], None]) -> list[tuple[str, str]]:
        assert self.gate.wait(PATIENCE)
        return super().write(draws, head, on_token)


def test_a_slow_model_keeps_nobody_waiting(tmp_path: Path, model: Backbone) -> None:
    """A page is answered while a reply is drawn; what it is told of the wait is what is known of it."""
    slow = Held(**vars(model))
    object.__setattr__(slow, "gate", threading.Event())
    ticks = iter(range(0, 10**6, 20))
    with Session(tmp_path, SETTINGS, IDENTITY) as session:
        threads = Threads(session, slow, clock=lambda: float(next(ticks)))
        assert "no prompt" in waiting_for(session, threads.trouble, threads.wait)
        session.add_prompts(PROMPTS)
        threads.start()
        wait_for(lambda: threads.wait is not None)
        assert session.question("owner") is None
        assert "not known yet" in waiting_for(session, threads.trouble, threads.wait)
        assert figures(session)[0].value == "0"
        slow.gate.set()
        wait_for(lambda: session.question("owner") is not None)
        assert threads.seconds_each is not None
        assert "at the pace so far" in waiting_for(session, "", (1.0, 40.0))
        assert "longer than before" in waiting_for(session, "", (90.0, -5.0))
        clicked(session, 1)
    threads.join()


def test_what_keeps_replies_from_coming_is_told(tmp_path: Path, model: Backbone) -> None:
    long = [user("word " * 400)]

    class Broken(Backbone):
        def features(self, texts: Sequence[tuple[LivePrompt, str]]) -> Any:
            raise CoalaError("found no memory, expected some.")

    with Session(tmp_path, SETTINGS, IDENTITY) as session:
        session.add_prompts(long)
        threads = Threads(session, Broken(**vars(model)))
        threads.start()
        wait_for(lambda: threads.trouble)
        said = waiting_for(session, threads.trouble, None)
        assert "found no memory" in said
        assert "Clicks are safe" in said
    threads.join()


def test_the_current_policy_guides_every_second_reply_once_there_is_a_head(tmp_path: Path, model: Backbone) -> None:
    rng = np.random.default_rng(0)
    learner = Learner(coordinates(rng.standard_normal((30, model.backbone.width)).astype("f4")))
    for i in range(12):
        learner.teach(str(i), i, rng.standard_normal(learner.program.width), f"g{i}")
    prompt = LivePrompt("p", PROMPTS[0], False)
    made = model.write([(prompt, 0), (prompt, 1)], learner.head(model.spec), lambda: None)
    assert [policy for _, policy in made] == ["unguided", "guided"]
    with Session(tmp_path, LiveSettings(policy="current"), IDENTITY) as session:
        assert session.current_head(model.spec) is None


# --- as a run ----------------------------------------------------------------------------------------------------


def test_pairs_of_a_session_are_pairs_with_provenance(session: Session, tmp_path: Path) -> None:
    with pytest.raises(CoalaError, match="at least 2 of each"):
        write_pairs(tmp_path, session.journal)
    clicked(session, 14)
    n, held_out = write_pairs(tmp_path, session.journal)
    kept = load_pairs(session.path / "pairs.jsonl")
    assert len(kept) == n
    assert kept == [pair for pair, _ in session.journal.pairs(held_out=False)]
    assert len(load_pairs(session.path / "pairs-held-out.jsonl")) == held_out
    assert not {pair.group for pair in kept} & {pair.group for pair, _ in session.journal.pairs(held_out=True)}
    row = json.loads((session.path / "pairs.jsonl").read_text().splitlines()[0])
    assert {"click", "question", "at", "tags", "rater"} <= set(row)
    from coala.data import read_pairs

    assert [(pair.chosen, pair.group, pair.rater) for pair in read_pairs(str(session.path / "pairs.jsonl"))] == [
        (pair.chosen, pair.group, pair.rater) for pair in kept
    ]


def test_every_click_is_accounted_for_before_anything_can_be_fitted(tmp_path: Path, model: Backbone) -> None:
    with Session(tmp_path, SETTINGS, IDENTITY) as session:
        session.add_prompts(PROMPTS)
        work = session.work()
        assert isinstance(work, Draw)
        carry_out(work, session, model, lambda: None)
        assert session.learner is None
        clicked(session, 1)
        assert "0 to learn from and 1 more once 12 replies are written, 0 held out" in figures(session)[0].how
        fill(session, model)
        assert session.learner is not None
        assert "1 to learn from, 0 held out" in figures(session)[0].how


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    new = tmp_path / "new"
    recipe = recipe_in(new, {"name": "m"}, 8, 0)
    assert not new.exists()
    begin(new, recipe)
    with pytest.raises(CoalaError, match="not started by `coala live`"):
        recipe_in(new, {"name": "m"}, 8, 0)  # a run without clicks
    (new / FOLDER).mkdir()
    (new / FOLDER / JOURNAL).touch()
    assert recipe_in(new, {"name": "m"}, 9, 1) == recipe  # the run keeps what it was begun with
    with pytest.raises(CoalaError, match=r"model.name: m -> other"):
        recipe_in(new, {"name": "other"}, 8, 0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(CoalaError, match="is not a run folder"):
        recipe_in(tmp_path / "full", {"name": "m"}, 8, 0)


@pytest.mark.parametrize("wrong", [{"held_out": 0.0}, {"held_out": 1.0}, {"temperature": 0.0}])
def test_settings_that_would_measure_or_compare_nothing_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(CoalaError, match="expected"):
        LiveSettings(**wrong)  # type: ignore[arg-type]


def test_a_prompt_of_several_turns_and_one_typed_in_come_first(tmp_path: Path) -> None:
    with Session(tmp_path, SETTINGS, IDENTITY) as session:
        session.add_prompts(PROMPTS)
        (name,) = session.add_prompts([(Turn("system", "be kind"), Turn("user", "hello"))], typed=True)
        assert session.add_prompts([(Turn("system", "be kind"), Turn("user", "hello"))]) == [name]
        work = session.work()
        assert isinstance(work, Draw)
        assert {prompt.id for prompt, _ in work.prompts} == {name}
        assert len(session.journal.prompts) == 7
        assert session.rater("owner", lambda: "t" * 22) == session.rater("owner", lambda: "u" * 22)
        assert os.fstat(session._journal_file).st_size == (session.path / JOURNAL).stat().st_size
    assert Journal().open_question("nobody") is None
