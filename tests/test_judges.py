"""Judges without a network: folders, parsers against published verdicts, rules, replays, a real local model."""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coala.evaluation import (
    JudgeFailure,
    JudgeStopped,
    LanguageModelJudge,
    ReplayJudge,
    RuleJudge,
    consistency,
    judge,
    judge_many,
    mtbench,
    read_instructions,
    win_rate,
)
from coala.evaluation.arena import ANCHOR, parse_verdict, score
from coala.evaluation.arena_judging import battles
from coala.evaluation.grading import Answered, grade_many, read_answered
from coala.evaluation.judges import (
    SHIPPED,
    Answer,
    ChatJudge,
    Cost,
    Instructions,
    JudgePrompt,
    asked,
    read_rating,
    read_verdict,
)
from coala.values import CoalaError, Generation, Judgement, Turn, user
from tests.evaluation_helpers import reply, write_lines


class Scripted:
    """An endpoint that is a function of the messages' text; counts its calls."""

    identity = "scripted"

    def __init__(self, answer: Callable[[str], Answer | str]) -> None:
        self.answer, self.asked = answer, []  # type: ignore[var-annotated]

    @property
    def cost(self) -> Cost:
        return Cost(calls=len(self.asked), answers=len(self.asked))

    def ask(self, request: Mapping[str, Any]) -> Answer:
        self.asked.append(request)
        found = self.answer("\n".join(message["content"] for message in request["messages"]))
        return Answer(found) if isinstance(found, str) else found

    def begin(self) -> None: ...

    def interrupt(self) -> None: ...


def rows_of(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# --- folders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_judges_show_every_part_once(name: str) -> None:
    told = read_instructions(name)
    assert told.name == told.mode == name
    for prompt in told.prompts:
        marks = {f"question_{i}": f"<Q{i}>" for i in (1, 2)}
        turns = ["<Q1>", "<Q2>"][: prompt.turns]
        sides = [["<A1>", "<A2>"], ["<B1>", "<B2>"]][: 1 if name == "grade" else 2]
        shown = asked(turns, [side[: prompt.turns] for side in sides], ["<R1>", "<R2>"] if prompt.reference else [])
        assert told.prompt_for(shown) is prompt
        text = "\n".join(message["content"] for message in prompt.fill(shown))
        for mark in [*turns, *(m for side in sides for m in side[: prompt.turns])]:
            assert mark in text
        assert ("<R1>" in text) == prompt.reference
        assert ("<R2>" in text) == (prompt.reference and prompt.turns == 2)
        assert not re.search(r"\{[a-z_0-9]+\}", text)
        assert marks
        if told.mode != "grade":  # the first side is shown first
            assert text.index("<A1>") < text.index("<B1>")
    said = " ".join(prompt.system + prompt.user for prompt in told.prompts)
    wanted = {"pairwise": "[[C]]", "weighted": "m or M", "grade": "[[6]]", "arena": "[[B>>A]]"}[name]
    assert wanted in said
    assert told.sampling["temperature"] == 0


@given(st.text(), st.text(), st.text())
def test_texts_are_never_taken_for_places(question: str, first: str, second: str) -> None:
    prompt = JudgePrompt("p", "", "Q:{question}|A:{answer_a}|B:{answer_b}|{other}{")
    for extra in ("", "{answer_b}", "{question}", "\\1"):
        filled = prompt.fill(asked([question], [[first + extra], [second]]))
        assert filled == [{"role": "user", "content": f"Q:{question}|A:{first + extra}|B:{second}|{{other}}{{"}]


def write(folder: Path, yaml: str, text: str = "{question} {answer_a} {answer_b}") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "judge.yaml").write_text(yaml)
    (folder / "p.txt").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("mode: duel\nprompts: [{user: p.txt}]", "mode is 'duel'; expected one of pairwise, weighted, grade, arena"),
        ("mode: pairwise\nparser: token\nprompts: [{user: p.txt}]", "can be read by brackets or json"),
        ("mode: pairwise\nlabels: [1, 2, 3]\nprompts: [{user: p.txt}]", "in brackets they are A, B, C"),
        ("mode: weighted\nlabels: [m, m]\nprompts: [{user: p.txt}]", "needs 2 different"),
        ("mode: pairwise\nprompts: [{user: q.txt}]", "could not be read"),
        ("mode: pairwise\nprompts: []", "there is no prompt"),
        ("mode: pairwise\nprompts: p.txt", "expected a list"),
        ("mode: pairwise\nprompts: [{user: p.txt, turn: 2}]", "a prompt has 'turn'"),
        ("mode: pairwise\nprompts: [{user: p.txt, turns: 3}]", "1 or 2 turns"),
        ("mode: pairwise\nprompts: [{user: p.txt, reference: true}]", "lacks {ref_answer_1}"),
        ("mode: grade\nprompts: [{user: p.txt}]", "lacks {answer}"),
        ("mode: pairwise\nsampling: {temprature: 0}\nprompts: [{user: p.txt}]", "sampling has 'temprature'"),
        ("mode: pairwise\nsampling: {seed: x}\nprompts: [{user: p.txt}]", "expected int"),
        ("mode: pairwise\nsampling: 3\nprompts: [{user: p.txt}]", "sampling must be fields"),
        ("mode: pairwise\nprompt: [{user: p.txt}]", "has 'prompt'"),
        ("mode: [", "is not YAML"),
        ("- x", "expected the fields"),
    ],
)
def test_bad_folders_are_explained(tmp_path: Path, yaml: str, words: str) -> None:
    with pytest.raises(CoalaError, match=re.escape(words)):
        read_instructions(write(tmp_path / "bad", yaml))


def test_places_that_do_not_fit_are_explained(tmp_path: Path) -> None:
    yaml = "mode: pairwise\nprompts: [{user: p.txt}]"
    for text, words in [
        ("{question} {answer_a}", "lacks {answer_b}"),
        ("{question} {answer_a} {answer_b} {ref_answer_1}", "has {ref_answer_1}, for which"),
        ("{question} {answer_a} {answer_b} {answer_a_2}", "has {answer_a_2}"),
    ]:
        with pytest.raises(CoalaError, match=re.escape(words)):
            read_instructions(write(tmp_path / "bad", yaml, text))
    two = write(tmp_path / "two", "mode: pairwise\nprompts: [{user: p.txt}, {user: q.txt}]")
    (two / "q.txt").write_text("{question} {answer_a} {answer_b} again")
    with pytest.raises(CoalaError, match="are both for 1 turns without reference"):
        read_instructions(two)
    with pytest.raises(CoalaError, match="expected one of pairwise, weighted, grade, arena, a folder"):
        read_instructions("nonsense")
    told = read_instructions(write(tmp_path / "one", yaml))
    with pytest.raises(JudgeStopped, match="no prompt for 2 turns"):
        told.prompt_for(asked(["a", "b"], [["c", "d"], ["e", "f"]]))
    with pytest.raises(CoalaError, match="1 or 2 questions"):
        asked(["a"], [["b", "c"]])


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    yaml = "mode: pairwise\nprompts: [{user: p.txt}]"
    first = read_instructions(write(tmp_path / "one", yaml))
    assert read_instructions(write(tmp_path / "two", yaml + " # remark")).digest == first.digest
    assert read_instructions(write(tmp_path / "two", yaml + "\nmodel: x")).digest != first.digest
    assert read_instructions(write(tmp_path / "two", yaml, "{question} {answer_a}: {answer_b}")).digest != first.digest
    assert replace(first, sampling={"seed": 1}).digest != first.digest
    assert len({read_instructions(name).digest for name in SHIPPED}) == len(SHIPPED)


# --- parsers -------------------------------------------------------------------------------------------------------

PIECES = st.lists(
    st.sampled_from(
        [
            "[[A]]",
            "[[B]]",
            "[[C]]",
            "[[A>>B]]",
            "[[A=B]]",
            "[B>A]",
            "[[7]]",
            "[[10.5]]",
            "[8]",
            "a[0]",
            "[[",
            "]]",
            '{"reason": "x", "verdict": "A"}',
            '{"reason": "", "rating": 7}',
            "A",
            "9",
            "\n",
            "no",
            "\x00",
        ]
    )
    | st.text(max_size=5),
    max_size=6,
).map("".join)


@given(PIECES, st.sampled_from(SHIPPED), st.booleans(), st.sampled_from(["stop", "length", "content_filter", "?"]))
def test_any_answer_is_a_verdict_or_a_failure(text: str, name: str, as_json: bool, finish: str) -> None:
    told = read_instructions(name)
    if as_json and name != "weighted":
        told = replace(told, parser="json")
    answer = Answer(text, finish)
    value: float | None
    try:
        value = read_rating(answer, told) if name == "grade" else read_verdict(answer, told).preference
    except JudgeFailure as failure:
        value, kind = None, failure.kind
    if value is None:
        assert kind in {"no verdict", "cut short", "refused", "no log-probabilities"}
        return
    assert finish not in ("length", "content_filter")
    assert 1 <= value <= 10 if name == "grade" else value in (0, 0.5, 1)
    if name == "pairwise" and not as_json:  # an independent reading: exactly one kind of verdict is there
        kinds = {letter for letter in "ABC" if f"[[{letter}]]" in text}
        assert kinds == {{1: "A", 0: "B", 0.5: "C"}[value]}


@given(st.dictionaries(st.sampled_from(["m", "M", "x", " m"]), st.floats(-50, 0), max_size=4))
def test_weighted_verdicts_swap(top: dict[str, float]) -> None:
    told = read_instructions("weighted")
    listed = tuple(top.items())
    swapped = tuple(({"m": "M", "M": "m"}.get(token, token), value) for token, value in listed)
    if "m" in top or "M" in top:
        first, second = (read_verdict(Answer("", "length", top=one), told).preference for one in (listed, swapped))
        assert first + second == pytest.approx(1, abs=1e-12)
        weights = {token: math.exp(top[token]) if token in top else 0.0 for token in "mM"}
        assert first == pytest.approx(weights["m"] / (weights["m"] + weights["M"]), abs=1e-12)
    else:
        with pytest.raises(JudgeFailure):
            read_verdict(Answer("", top=listed), told)


def test_answers_are_kept_as_they_came() -> None:
    for answer in (Answer("x\N{SNOWMAN}"), Answer("", "length", "no", (("m", -0.1), ("M", -2.0)), 3, None)):
        assert Answer.from_json(answer.to_json()) == answer


def test_published_verdicts_are_read_as_published(shared: Path) -> None:
    folder = shared / "eval_reference"
    grade, pair, five = (read_instructions(name) for name in ("grade", "pairwise", "arena"))
    single = rows_of(folder / "mtbench" / "single_judgments_phi-3-dpo.jsonl.gz")
    assert [read_rating(Answer(row["judgment"]), grade) for row in single] == [row["score"] for row in single]
    games = rows_of(folder / "mtbench" / "pairwise_judgments_phi-3_vs_phi-3-dpo_odd_questions.jsonl.gz")
    differing = 0
    for row in games:
        for game, first_is in ((1, "model_1"), (2, "model_2")):
            wanted = row[f"g{game}_winner"]
            try:
                value = read_verdict(Answer(row[f"g{game}_judgment"]), pair).preference
            except JudgeFailure:
                differing += wanted != "error"
                continue
            differing += value != {"tie": 0.5, first_is: 1.0}.get(wanted, 0.0)
    assert (len(single), len(games), differing) == (160, 38, 0)
    raw = [game for row in rows_of(folder / "arena_hard" / "raw_judgments_first40.jsonl.gz") for game in row["games"]]
    for game in raw:
        if game["score"] is None:
            with pytest.raises(JudgeFailure):
                read_verdict(Answer(game["judgment"]), five)
        else:
            assert read_verdict(Answer(game["judgment"]), five).label == game["score"]
    assert len(raw) == 80


def test_published_preferences_from_log_probabilities(shared: Path) -> None:
    told = read_instructions("weighted")
    n = 0
    for path in sorted((shared / "eval_reference" / "alpaca").glob("annotations_*.jsonl.gz")):
        for row in rows_of(path):
            top = row.get("top_logprobs")
            if not top or not {token for token, _ in top} & {"m", "M"}:
                continue
            first = read_verdict(Answer("", "length", top=tuple(map(tuple, top))), told).preference  # type: ignore[arg-type]
            shown = 1 + first if row["judge_saw_swapped_order"] else 2 - first
            assert shown == pytest.approx(row["preference"], abs=1e-6)
            n += 1
    assert n > 2390


# --- whole benchmarks, the judge's answers replayed ------------------------------------------------------------------


def test_mtbench_graded_end_to_end_gives_the_published_means(shared: Path, tmp_path: Path) -> None:
    folder = shared / "eval_reference" / "mtbench"
    published = rows_of(folder / "single_judgments_phi-3-dpo.jsonl.gz")
    said = {(row["question_id"], row["turn"]): row for row in published}
    questions = rows_of(folder / "questions.jsonl.gz")
    lines = [
        {
            "question_id": one["question_id"],
            "model_id": "phi-3-dpo",
            "choices": [{"turns": [f"<answer {one['question_id']} {turn}>" for turn in (1, 2)]}],
        }
        for one in questions
    ]
    answers = tmp_path / "answers.jsonl"
    write_lines(answers, lines)
    answered = read_answered(folder / "questions.jsonl.gz", answers, folder / "reference_answers_gpt-4.jsonl.gz")

    def replay(text: str) -> str:
        number, turn = max((int(m[1]), int(m[2])) for m in re.finditer(r"<answer (\d+) (\d)>", text))
        row = said[number, turn]
        reference = "Reference" in text or "reference answer" in text
        assert reference == ("math" in row["judge"][1])
        return str(row["judgment"])

    templates = read_instructions(folder / "judge_prompts.jsonl.gz", kind="single")
    chosen = ChatJudge(templates, Scripted(replay), model="gpt-4")
    found = grade_many(answered, chosen)
    assert (found.n_grades, found.n_unjudged, found.failures, found.cost.calls) == (160, 0, {}, 160)
    # The template is chosen as the benchmark chose it, for every question and turn.
    names = {(int(row["question_id"]), row["turn"]): row["judge"] for row in found.rows}
    assert names == {key: row["judge"] for key, row in said.items()}
    out = tmp_path / "graded.jsonl"
    write_lines(out, found.rows)
    ratings, remarks = mtbench.read_ratings(out)
    assert remarks == ()
    scores = mtbench.scores(ratings)["phi-3-dpo"]
    wanted = json.loads((folder / "expected.json").read_text())["single"]["phi-3-dpo"]
    assert scores.overall.value == pytest.approx(wanted["mean_over_rows"], abs=1e-12)
    assert [scores.by_turn[turn].value for turn in (1, 2)] == pytest.approx([wanted["turn1"], wanted["turn2"]])
    assert {name: one.value for name, one in scores.by_category.items()} == pytest.approx(wanted["by_category"])
    # Our own wording chooses the same kinds of prompt.
    ours = grade_many(answered[:4], ChatJudge(read_instructions("grade"), Scripted(replay_any), model="m"))
    assert len(ours.rows) == 8
    assert ours.failures == {}


def replay_any(text: str) -> str:
    return "[[5]]"


def test_failed_grades_are_errors_of_the_benchmark(tmp_path: Path) -> None:
    items = [Answered(str(i), "math", "m", ("q",), (f"<{i}>",), ("r",)) for i in range(4)]
    chosen = ChatJudge(
        read_instructions("grade"),
        Scripted(lambda text: "no idea" if "<2>" in text else "[[11]]" if "<3>" in text else "[[8]]"),
        model="j",
    )
    told: list[str] = []
    found = grade_many(items, chosen, concurrency=2, on_failure=lambda question, _: told.append(question))
    assert sorted(told) == ["2", "3"]
    assert found.failures == {"no verdict": 2}
    out = tmp_path / "rows.jsonl"
    write_lines(out, found.rows)
    scores = mtbench.scores(mtbench.read_ratings(out)[0])["m"]
    assert (scores.overall.value, scores.n_errors, scores.n_rows) == (8.0, 2, 4)
    as_json = ChatJudge(
        replace(read_instructions("grade"), parser="json"),
        Scripted(lambda text: '{"reason": "worth [[2]]", "rating": 7.5}'),
        model="j",
    )
    write_lines(out, grade_many(items, as_json).rows)
    assert mtbench.scores(mtbench.read_ratings(out)[0])["m"].overall.value == 7.5  # not the 2 of its reason


def test_answers_to_other_questions_are_refused(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "turns": ["a", "b"]}')
    for row, words in [
        ({"question_id": 2, "model_id": "m", "choices": [{"turns": ["x", "y"]}]}, "a question of the question file"),
        ({"question_id": 1, "model_id": "m", "choices": [{"turns": ["x"]}]}, "Fix: answer every turn"),
        ({"question_id": 1, "model_id": "m", "choices": []}, "a list of objects with turns"),
        ({"question_id": 1, "model_id": "m", "choices": [{"turns": [1]}]}, "a list of texts"),
    ]:
        (tmp_path / "a.jsonl").write_text(json.dumps(row))
        with pytest.raises(CoalaError, match=words):
            read_answered(tmp_path / "q.jsonl", tmp_path / "a.jsonl")


def test_arena_judged_end_to_end_gives_the_published_counts(shared: Path) -> None:
    folder = shared / "eval_reference" / "arena_hard"
    rows = rows_of(folder / "raw_judgments_first40.jsonl.gz")
    want = json.loads((folder / "expected.json").read_text())["raw_judgments"]
    # Game 0 has the baseline as A, game 1 the model.
    said = {(str(row["question"]), game): one["judgment"] for row in rows for game, one in enumerate(row["games"])}

    def replay(text: str) -> str:
        question = re.search(r"<question (\d+)>", text)
        assert question
        return said[question[1], int(text.index("<ours>") < text.index("<theirs>"))]

    names = [str(row["question"]) for row in rows]
    ours = [reply(name, "<ours>", "m") for name in names]
    theirs = [reply(name, "<theirs>", "gpt-4-0314") for name in names]
    prompts = {name: user(f"<question {name}>") for name in names}
    endpoint = Scripted(replay)
    chosen = ChatJudge(read_instructions("arena"), endpoint, model="j")
    found = judge_many(ours, theirs, chosen, prompts=prompts, concurrency=4)
    assert found.failures == {"no verdict": want["null_games"]}
    fought = battles(ours, theirs, chosen, prompts)
    assert len(endpoint.asked) == 80  # nothing was asked for the battles
    assert (len(fought), fought.n_failed) == (want["weighted_battles"], want["null_games"])
    assert score(fought, "gpt-4-0314")["m"].score.value == pytest.approx(want["weighted_mean_win_rate"], abs=1e-9)
    won = [
        one.preference if one.first == "m" else 1 - one.preference
        for one in found.judgements
        if one.preference is not None
    ]
    assert [won.count(1), won.count(0), won.count(0.5)] == [want["games"][name] for name in ("win", "loss", "tie")]
    with pytest.raises(CoalaError, match="mode arena"):
        battles(ours, theirs, ChatJudge(read_instructions("pairwise"), endpoint, model="j"), prompts)
    assert ANCHOR == 1000
    assert parse_verdict("[[A=B]]") == "A=B"


def test_published_templates_of_comparisons(shared: Path) -> None:
    path = shared / "eval_reference" / "mtbench" / "judge_prompts.jsonl.gz"
    told = read_instructions(path)
    assert (told.mode, told.labels) == ("pairwise", ("A", "B", "C"))
    assert {prompt.name: (prompt.turns, prompt.reference) for prompt in told.prompts} == {
        "pair-v2": (1, False),
        "pair-v2-multi-turn": (2, False),
        "pair-math-v1": (1, True),
        "pair-math-v1-multi-turn": (2, True),
    }
    rows = {row["name"]: row for row in rows_of(path)}
    for turns, references in ((1, 0), (2, 0), (1, 1), (2, 2)):
        shown = asked(["q1 {x}", "q2"][:turns], [["a1", "a2"][:turns], ["b1", "b2"][:turns]], ["r1", "r2"][:references])
        prompt = told.prompt_for(shown)
        filled = prompt.fill(shown)
        # What str.format makes of the published template.
        assert filled[1]["content"] == rows[prompt.name]["prompt_template"].format(**shown.places())
        assert filled[0]["content"] == rows[prompt.name]["system_prompt"]
    with pytest.raises(CoalaError, match="no template of type"):
        read_instructions(path, kind="other")  # type: ignore[arg-type]


# --- order effects -------------------------------------------------------------------------------------------------


def game(prompt: str, straight: float | None, swapped: float | None) -> list[Judgement]:
    """``swapped`` is what the judge says of b when shown first."""
    return [Judgement(prompt, "a", "b", straight, "j"), Judgement(prompt, "b", "a", swapped, "j")]


def test_order_effects_by_hand() -> None:
    rows = [
        *game("1", 1, 0),  # consistent
        *game("2", 0.5, 0.5),  # a tie both times
        *game("3", 1, 1),  # the first place both times
        *game("4", 0, 0),  # the second place both times
        *game("5", 1, 0.5),  # a win, then a tie
        *game("6", None, 1),
        Judgement("7", "a", "b", 1.0, "j"),
    ]
    about = consistency(rows)
    assert (about.inconsistency.value, about.inconsistency.n) == (pytest.approx(3 / 5), 5)
    assert about.position_bias.value == pytest.approx(2 / 5)
    assert (about.n_first, about.n_second) == (1, 1)
    assert about.first_place.value == pytest.approx((0.5 + 0.5 + 1 + 0 + 0.75) / 5)
    for pair, value in (((0.5, 0.5), 0), ((1, 0.5), 1), ((0.5, 0), 1), ((0.9, 0.2), 0), ((0, 0), 1)):
        assert consistency(game("1", *pair)).inconsistency.value == value
    assert math.isnan(consistency([]).inconsistency.value)
    with pytest.raises(CoalaError, match="on both sides"):
        consistency([Judgement("1", "a", "a", 1.0, "j")])


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.sampled_from([0.0, 0.3, 0.5, 1.0])), min_size=1))
def test_order_effects_do_not_depend_on_names(values: list[tuple[float, float]]) -> None:
    rows = [row for i, pair in enumerate(values) for row in game(str(i), *pair)]
    about = consistency(rows)
    assert about.position_bias.value <= about.inconsistency.value + 1e-12
    assert about.first_place.value == pytest.approx(sum(map(sum, values)) / 2 / len(values))
    renamed = [replace(r, first={"a": "z", "b": "y"}[r.first], second={"a": "z", "b": "y"}[r.second]) for r in rows]
    again = consistency(renamed)
    assert (again.inconsistency, again.position_bias) == (about.inconsistency, about.position_bias)
    assert again.first_place.value == pytest.approx(about.first_place.value)


# --- rules and replays -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "better", "worse"),
    [
        ("longer", "four", "two"),
        ("shorter", "two", "four"),
        ("contains:please", "Yes, PLEASE do", "no"),
        (r"regex:^\d+:\d$", "12:3", "12:34"),
        ("json", '{"a": [1, null]}', "{'a': 1}"),
        ("json", "0.5", "NaN"),
        ("varied", "one two three four five", "one two three one two three"),
        ("house-style", "Ice is cold. Do you like it?", "Ice is cold."),
    ],
)
def test_rules(rule: str, better: str, worse: str) -> None:
    chosen = RuleJudge.parse(rule)
    rows = judge([reply("p", better), reply("q", worse)], [reply("p", worse, "b"), reply("q", better, "b")], chosen)
    assert [row.preference for row in rows] == [1, 0, 0, 1]
    assert judge([reply("p", better)], [reply("p", better, "b")], chosen)[0].preference == 0.5
    assert chosen.name.startswith("rule ")


EVERY_RULE = ["longer", "shorter", "contains:a", "regex:.", "json", "varied", "house-style"]


@given(st.text(), st.text(), st.sampled_from(EVERY_RULE))
def test_rules_swap(first: str, second: str, rule: str) -> None:
    chosen = RuleJudge.parse(rule)
    straight = chosen.compare((), reply("p", first), reply("p", second, "b")).preference
    swapped = chosen.compare((), reply("p", second, "b"), reply("p", first)).preference
    assert straight is not None
    assert swapped is not None
    assert straight + swapped == 1


@pytest.mark.parametrize(
    ("rule", "words"),
    [("louder", "no rule"), ("contains", "needs an argument"), ("json:x", "takes no"), ("regex:(", "not a regular")],
)
def test_bad_rules(rule: str, words: str) -> None:
    with pytest.raises(CoalaError, match=words):
        RuleJudge.parse(rule)


def test_a_replay_gives_what_was_stored() -> None:
    ours = [reply(str(i), "x" * i) for i in range(6)]
    theirs = [reply(str(i), "yyy", "b") for i in range(6)]
    stored = judge(ours, theirs, RuleJudge("longer"))
    again = judge_many(ours, theirs, ReplayJudge(stored), concurrency=3)
    assert list(again.judgements) == stored
    stored[2] = replace(stored[2], preference=None)
    part = judge_many(ours, theirs, ReplayJudge(stored[:10]))
    assert part.failures == {"not stored": 2, "stored failure": 1}
    assert win_rate(part.judgements).n == 4
    with pytest.raises(CoalaError, match="two judgements"):
        ReplayJudge([*stored, replace(stored[0], preference=0.5)])
    with pytest.raises(CoalaError, match="no judgement"):
        ReplayJudge([])


# --- the harness -----------------------------------------------------------------------------------------------------


class Stops:
    """Stops after ``n`` verdicts."""

    name = "stops"

    def __init__(self, n: int) -> None:
        self.left = n

    def compare(self, prompt: Sequence[Turn], first: Generation, second: Generation) -> Judgement:
        if not self.left:
            raise JudgeStopped("enough")
        self.left -= 1
        return Judgement(first.prompt_id, first.method, second.method, 1.0, self.name)


@pytest.mark.parametrize("n", range(9))
def test_half_judged_comparisons_are_left_out(n: int) -> None:
    ours, theirs = [reply(str(i), "") for i in range(4)], [reply(str(i), "", "b") for i in range(4)]
    found = judge_many(ours, theirs, Stops(n))
    assert len(found.judgements) == n // 2 * 2
    assert (found.n_comparisons, found.n_unjudged) == (4, 4 - n // 2)
    assert found.stopped == ("enough" if n < 8 else "")
    if n < 8:
        with pytest.raises(JudgeStopped, match=f"{4 - n // 2} of 4 comparisons are not judged"):
            judge(ours, theirs, Stops(n))


def test_concurrency_changes_nothing_and_has_to_be_positive() -> None:
    ours, theirs = [reply(str(i), "x" * i) for i in range(30)], [reply(str(i), "y" * 9, "b") for i in range(30)]
    one, many = (judge_many(ours, theirs, RuleJudge("longer"), concurrency=n) for n in (1, 7))
    assert one.judgements == many.judgements
    assert one.consistency == many.consistency
    with pytest.raises(CoalaError, match="concurrency is 0"):
        judge_many(ours, theirs, RuleJudge("longer"), concurrency=0)
    assert judge_many([], [], RuleJudge("longer"), concurrency=3).judgements == ()


# --- a local model ----------------------------------------------------------------------------------------------------


def test_a_local_model_judges_by_the_labels() -> None:
    told = read_instructions("weighted")
    seen: list[str] = []

    def log_probs(prompt: Sequence[Turn], replies: Sequence[str]) -> list[float]:
        text = prompt[-1].text
        seen.append(text)
        first = text.index("good") < text.index("bad")
        return [-0.5, -1.5] if first else [-1.5, -0.5]

    chosen = LanguageModelJudge("lm", told, log_probs)
    rows = judge([reply("p", "good")], [reply("p", "bad", "b")], chosen, prompts={"p": user("Say it.")})
    p = 1 / (1 + math.exp(-1))
    assert [row.preference for row in rows] == pytest.approx([p, 1 - p])
    assert "Say it." in seen[0]
    assert "Answer with exactly one letter" in seen[0]
    for bad in ([math.nan, 0.0], [-math.inf, -math.inf], [0.0]):
        with pytest.raises(JudgeFailure):
            LanguageModelJudge("lm", told, lambda p, r, bad=bad: bad).compare(
                user("q"), reply("p", "a"), reply("p", "b")
            )
    extreme = LanguageModelJudge("lm", told, lambda p, r: [-2000.0, 0.0]).compare(
        user("q"), reply("p", "a"), reply("p", "b")
    )
    assert extreme.preference == pytest.approx(0)
    with pytest.raises(CoalaError, match="mode weighted"):
        LanguageModelJudge("lm", read_instructions("pairwise"), log_probs)
    with pytest.raises(JudgeStopped, match="needs the prompts"):
        chosen.compare((), reply("p", "good"), reply("p", "bad"))


class Full:
    """A keeper that cannot keep; what it holds cannot be made out."""

    def get(self, key: str) -> str | None:
        return '{"text": 1'

    def put(self, key: str, answer: str) -> None:
        raise CoalaError("the disk is full")


def test_what_cannot_be_kept_is_not_bought_on() -> None:
    endpoint = Scripted(lambda text: "[[A]]")
    chosen = ChatJudge(read_instructions("pairwise"), endpoint, model="m", keeper=Full())
    ours, theirs = [reply(str(i), "x") for i in range(5)], [reply(str(i), "y", "b") for i in range(5)]
    found = judge_many(ours, theirs, chosen, prompts={str(i): user("q") for i in range(5)})
    assert found.stopped == "the disk is full"
    assert len(endpoint.asked) == 1


def test_the_key_holds_the_folder_and_the_endpoint() -> None:
    shown = asked(["q"], [["a"], ["b"]])
    told = read_instructions("weighted")
    keys = set()
    for instructions, identity in ((told, "x"), (replace(told, labels=("M", "m")), "x"), (told, "y")):
        endpoint = Scripted(lambda text: "")
        endpoint.identity = identity
        chosen = ChatJudge(instructions, endpoint, model="m")
        keys.add(chosen.key(chosen.request(shown)))
    assert len(keys) == 3


def test_sampling_can_be_changed_and_instructions_checked() -> None:
    told = read_instructions("pairwise")
    chosen = ChatJudge(told, Scripted(lambda text: "[[A]]"), model="m", sampling={"seed": None, "top_p": 0.5})
    request = chosen.request(asked(["q"], [["a"], ["b"]]))
    assert "seed" not in request
    assert (request["top_p"], request["temperature"]) == (0.5, 0)
    with pytest.raises(CoalaError, match="sampling has 'nonsense'"):
        ChatJudge(told, Scripted(lambda text: ""), model="m", sampling={"nonsense": 1})
    with pytest.raises(CoalaError, match="mode is"):
        Instructions("x", "duel", told.prompts)  # type: ignore[arg-type]
    with pytest.raises(JudgeStopped, match="compares two"):
        chosen.rate(asked(["q"], [["a"]]))
