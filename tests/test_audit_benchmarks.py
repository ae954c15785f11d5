"""The audit of benchmarks: best of several, subsets, what is shown first, systems beside the cues, and wrong inputs."""

from __future__ import annotations

import gzip
import json
import math
import random
import re
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coala.audit import audit_items, audit_preferences, read_set
from coala.audit.comparisons import ALL, Comparisons
from coala.audit.likelihood import reply_likelihoods
from coala.audit.page import render
from coala.callbacks import silent
from coala.cli import app
from coala.evaluation.reward_benchmarks import Item
from coala.values import CoalaError, Pair, Turn
from tests.evaluation_helpers import called, write_lines
from tests.menagerie import tiny_backbone
from tests.test_audit import WORDS, Page


def said(rng: random.Random, low: int = 4, high: int = 30) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def best_of(n: int, k: int = 4, seed: int = 0, right: str = "drawn") -> list[Item]:
    """Items of k replies of random words, the right one drawn, or the shortest."""
    rng = random.Random(seed)
    items = []
    for number in range(n):
        replies = [said(rng) for _ in range(k)]
        if right == "shortest":
            replies.sort(key=len)
        order = tuple(rng.sample(range(k), k))
        asked = (Turn("user", said(rng)),)
        items.append(Item(str(number), "", asked, (replies[0],), tuple(replies[1:]), f"g{number // 2}", order))
    return items


def raw(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


# --- what is counted ---------------------------------------------------------------------------------------------


@given(st.data())
def test_credit_is_the_share_of_the_top_that_is_right(data: st.DataObject) -> None:
    c, r = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    scores = data.draw(st.lists(st.integers(0, 2), min_size=c + r, max_size=c + r))
    texts = [f"t{k}" for k in range(c + r)]
    pair = Item("p", "", (Turn("user", "q"),), ("a",), ("b",))
    item = Item("i", "", (Turn("user", "q"),), tuple(texts[:c]), tuple(texts[c:]))
    both = Comparisons((pair, item))
    values = np.array([1.0, 1.0, *scores], dtype=np.float64)
    top = [k for k, score in enumerate(scores) if score == max(scores)]
    expected = [0.5, sum(k < c for k in top) / len(top)]
    assert both.credits(both.difference(values)) == pytest.approx(expected)
    assert both.chance == pytest.approx([0.5, c / (c + r)])
    assert np.bincount(both.item, both.weight) == pytest.approx([1, 1])


def test_labels_by_lot_leave_every_cue_at_one_in_four() -> None:
    found = audit_items(best_of(300), deals=1)
    assert found.whole.chance == 0.25
    for one in found.cues:
        # Four standard errors, of two items a group.
        assert abs(one.accuracy.value - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 300), one
    assert sum(one.accuracy.low <= 0.25 <= one.accuracy.high for one in found.cues) >= 0.8 * len(found.cues)
    assert "chance is 25.0 %" in found.verdicts[0]
    assert any(sentence.startswith("None of ") and "above chance" in sentence for sentence in found.verdicts)


def test_the_best_of_many_cues_that_may_be_luck_is_called_that() -> None:
    found = audit_items(best_of(60, seed=6), deals=1)  # labels by lot
    best = max((one for one in found.cues if one.fitted), key=lambda one: one.accuracy.value)
    assert best.accuracy.low > found.whole.chance  # on its own it would have passed for a cue
    assert "may be luck" in found.verdicts[1]


def test_the_shortest_of_four_by_counting() -> None:
    items = [*best_of(60, right="shortest"), *best_of(60, seed=1)]
    found = audit_items(items, deals=1)
    naive = []
    for item in items:
        least = min(map(len, item.replies))
        naive.append(sum(len(t) == least for t in item.chosen) / sum(len(t) == least for t in item.replies))
    assert found.cue("shorter").accuracy.value == pytest.approx(np.mean(naive))
    assert found.cue("longer").accuracy.value < 0.25 < found.cue("shorter").accuracy.value
    assert found.cue("length").accuracy.low > 0.4


def test_what_is_shown_first_turns_with_the_order() -> None:
    rng = random.Random(0)
    items, turned = [], []
    for k in range(80):
        first, asked, both = rng.random() < 0.8, said(rng), (said(rng), said(rng))
        items.append(Item.of_two(str(k), "", asked, both, first))
        turned.append(Item.of_two(str(k), "", asked, both[::-1], not first))
    straight, swapped = (audit_items(some, deals=1) for some in (items, turned))
    share = sum(item.places == (0, 1) for item in items) / 80
    assert straight.cue("shown first").accuracy.value == pytest.approx(share)
    assert swapped.cue("shown first").accuracy.value == pytest.approx(1 - share)
    # What is right does not turn, so that a classifier of the order and every other rule see the same.
    for name in ("order", "longer", "less markdown"):
        assert straight.cue(name).accuracy.value == pytest.approx(swapped.cue(name).accuracy.value), name
    silent_set = audit_items([Item(one.id, "", one.prompt, one.chosen, one.rejected) for one in items], deals=1)
    assert "shown first" not in [one.name for one in silent_set.cues]


def test_subsets_make_up_the_whole() -> None:
    items = [Item(str(k), f"s{k % 3}", one.prompt, one.chosen, one.rejected) for k, one in enumerate(best_of(90))]
    found = audit_items(items, deals=1)
    assert [part.name for part in found.parts] == ["s0", "s1", "s2"]
    for name in ("longer", ALL):
        summed = sum(part.n * part.cue(name).accuracy.value for part in found.parts)
        assert summed / 90 == pytest.approx(found.cue(name).accuracy.value)


# --- systems beside the cues -------------------------------------------------------------------------------------


def lengths(items: list[Item]) -> np.ndarray:
    return np.array([float(len(text)) for item in items for text in item.replies])


def of_two(n: int, longer_wins: float, seed: int = 0) -> list[Item]:
    """Pairs whose longer reply is right with this probability."""
    rng = random.Random(seed)
    items = []
    for k in range(n):
        short, long = sorted((said(rng, 4, 15), said(rng, 16, 30)), key=len)
        both = (long, short) if rng.random() < longer_wins else (short, long)
        items.append(Item(str(k), "", (Turn("user", said(rng)),), both[:1], both[1:], f"g{k}"))
    return items


def test_a_set_labelled_by_length_leaves_a_length_system_nothing() -> None:
    items = of_two(150, 1.0)
    found = audit_items(items, scores={"ruler": lengths(items)}, deals=1)
    assert found.cue("longer").accuracy.value == found.cue("length").accuracy.value == 1.0
    (ruler,) = found.systems
    assert ruler.accuracy.value == 1.0
    # The cues are never wrong: nothing tells the system from them, and it knows next to nothing beyond them.
    assert math.isnan(ruler.survives.value)
    assert "the cues are never wrong" in ruler.survives.method
    assert abs(ruler.beyond.value) < 0.1
    assert abs(ruler.with_cues.value - 1) < 0.02
    assert ruler.along.n == 150
    assert math.isnan(ruler.against.value)


@pytest.mark.nightly
def test_the_lead_of_a_noisy_cue_does_not_survive_and_that_of_another_system_does() -> None:
    items = of_two(400, 0.8)
    rng = np.random.default_rng(1)
    right = (rng.random(400) < 0.8).astype(float) * 2 - 1
    blind = np.stack([right, -right], axis=1).ravel() * np.repeat(rng.uniform(0.5, 2, 400), 2)
    found = audit_items(items, scores={"ruler": lengths(items), "reader": blind}, deals=1)
    ruler, reader = found.systems
    assert abs(ruler.accuracy.value - reader.accuracy.value) < 0.06
    assert abs(ruler.survives.value) < 0.15
    assert abs(ruler.even.value - 0.5) < 0.05
    assert ruler.beyond.value < 0.1
    assert ruler.against.value < 0.1 < 0.9 < ruler.along.value
    # The reader knows what length does not: it is as good where length is wrong, though both together are right no
    # more often than one of two equals.
    assert reader.survives.low > 0.8
    assert reader.against.low > 0.6
    assert reader.beyond.low > 0.4
    # Without cues to lean on nothing of its information goes either.
    alone = audit_items(of_two(400, 0.5, seed=2), scores={"reader": blind}, deals=1).systems[0]
    assert alone.beyond.value > 0.85
    assert alone.with_cues.value > alone.accuracy.value - 0.03


def test_a_system_at_chance_has_no_lead_to_survive() -> None:
    items = of_two(120, 0.9)
    noise = np.random.default_rng(3).standard_normal(240)
    (one,) = audit_items(items, scores={"noise": noise}, deals=1).systems
    assert math.isnan(one.survives.value)
    assert "no lead" in one.survives.method
    with pytest.raises(CoalaError, match=r"expected 240 finite numbers, one of each reply"):
        audit_items(items, scores={"noise": noise[1:]}, deals=1)


# --- files -------------------------------------------------------------------------------------------------------


QUESTIONS = [
    {"question_id": 1, "category": "writing", "turns": ["Write.", "Shorter."]},
    {"question_id": 2, "category": "math", "turns": ["Add.", "Again."]},
]
ANSWERS = [
    {"question_id": q, "model_id": m, "choices": [{"index": 0, "turns": [f"{m} says {q}", f"{m} again"]}]}
    for q in (1, 2)
    for m in ("a", "b")
]


def test_games_of_mtbench_are_items_with_what_was_shown_first(tmp_path: Path) -> None:
    games = [
        {"question_id": 1, "turn": 1, "model_1": "a", "model_2": "b", "g1_winner": "model_1", "g2_winner": "model_2"},
        {"question_id": 2, "turn": 2, "model_1": "a", "model_2": "b", "g1_winner": "tie", "g2_winner": "model_1"},
        {"question_id": 2, "turn": 1, "model_1": "a", "model_2": "c", "g1_winner": "model_1", "g2_winner": "error"},
    ]
    files = [write_lines(tmp_path / f"{k}.jsonl", rows) for k, rows in enumerate((games, QUESTIONS, ANSWERS))]
    found = read_set(files[0], questions=files[1], answers=files[2])
    told = [(one.prompt[0].text, one.chosen[0], one.rejected[0], one.places, one.subset) for one in found.items]
    assert told == [
        ("Write.", "a says 1", "b says 1", (0, 1), "writing"),
        # In game 2 model 2 is shown first.
        ("Write.", "b says 1", "a says 1", (0, 1), "writing"),
        ("Add.\n\nAgain.", "a again", "b again", (1, 0), "math"),
    ]
    assert {one.group for one in found.items} == {"1", "2"}
    assert found.remarks == (
        "1 ties are left out",
        "1 games have no verdict and are left out",
        "1 games are skipped because their answers are missing",
    )
    with pytest.raises(CoalaError, match="add --questions FILE and --answers FILE"):
        read_set(files[0])


def test_games_of_arena_hard_and_annotations_of_alpaca(tmp_path: Path) -> None:
    questions = write_lines(tmp_path / "q.jsonl", [{"uid": "x", "category": "hard", "prompt": "Sort it."}])
    said_by = [
        {"uid": "x", "model": m, "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]}
        for m, text in (("base", "from the base"), ("ours", {"answer": "ours, longer by far"}))
    ]
    answers = write_lines(tmp_path / "a.jsonl", said_by)
    games = [{"judgment": "[[A>>B]]"}, {"judgment": "[[A=B]]"}]
    rows = write_lines(tmp_path / "j.jsonl", [{"uid": "x", "model": "ours", "baseline": "base", "games": games}])
    (item,) = read_set(rows, questions=questions, answers=answers).items
    assert (item.chosen, item.rejected, item.places) == (("from the base",), ("ours, longer by far",), (0, 1))
    about = {"generator_1": "base", "generator_2": "ours", "dataset": "koala"}
    annotations = write_lines(
        tmp_path / "n.jsonl",
        [
            {"instruction": f"Do {k}.", "output_1": f"one {k}", "output_2": f"two {k}", "preference": p, **about}
            for k, p in enumerate((1.9, 1.5, 1.2))
        ],
    )
    found = read_set(annotations)
    assert [one.chosen[0] for one in found.items] == ["two 0", "one 2"]
    assert found.remarks == ("1 ties are left out",)
    assert found.items[0].places == ()


def test_recognised_by_the_first_row(tmp_path: Path, shared: Path) -> None:
    data = shared / "data"
    shown_first = {}
    for name in ("llmbar", "autoj_pairwise", "shp"):
        found = read_set(data / name / "test.jsonl.gz")
        shown_first[name] = sum(one.places == (0, 1) for one in found.items), len(found.items)
    assert shown_first["llmbar"] == (sum(row["label"] == 1 for row in raw(data / "llmbar" / "test.jsonl.gz")), 418)
    labels = Counter(row["label"] for row in raw(data / "autoj_pairwise" / "test.jsonl.gz"))
    assert shown_first["autoj_pairwise"] == (labels[0], labels[0] + labels[1])
    assert shown_first["shp"][1] == 713
    rows = [{"prompt": f"q{k}", "chosen": ["a"], "rejected": ["b", "c"], "subset": "Focus", "id": k} for k in range(3)]
    assert read_set(write_lines(tmp_path / "two.jsonl", rows)).items[0].rejected == ("b", "c")
    plain = [{"prompt": f"q{k}", "chosen": f"a {k}", "rejected": f"b {k}", "kind": "xy"[k % 2]} for k in range(4)]
    by_kind = read_set(write_lines(tmp_path / "plain.jsonl", plain), by="kind", subset=["x"])
    assert [one.subset for one in by_kind.items] == ["x", "x"]
    assert len(by_kind.pairs) == 2


def test_longer_wins_by_counting_the_files(shared: Path) -> None:
    """Vicuna's reviews and RM-Bench's nine comparisons, without our readers."""
    folder = shared / "data" / "vicuna_bench"
    answers = {row["answer_id"]: row["text"] for row in raw(folder / "answer.jsonl.gz")}
    won, first = [], []
    for row in raw(folder / "gpt4_review.jsonl.gz"):
        a, b = (answers[row[f"answer{side}_id"]] for side in (1, 2))
        if row["score"][0] != row["score"][1]:
            ahead = row["score"][0] > row["score"][1]
            won.append(0.5 if len(a) == len(b) else float((len(a) > len(b)) == ahead))
            first.append(ahead)
    files = {name: folder / f"{name}.jsonl.gz" for name in ("gpt4_review", "question", "answer")}
    found = read_set(files["gpt4_review"], questions=files["question"], answers=files["answer"])
    data = Comparisons(found.items)
    assert data.credits(data.rules()["longer"]).mean() == pytest.approx(np.mean(won))
    assert data.credits(data.rules()["shown first"]).mean() == pytest.approx(np.mean(first))
    chat = shared / "data" / "rm_bench" / "chat.jsonl.gz"
    nine = read_set(chat, subset=["chat hard"]).items
    naive = [
        (len(row["chosen"][i]) > len(row["rejected"][j])) + 0.5 * (len(row["chosen"][i]) == len(row["rejected"][j]))
        for row in raw(chat)
        for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    data = Comparisons(nine)
    assert data.credits(data.rules()["longer"]).mean() == pytest.approx(np.mean(naive))
    assert len(nine) == 3 * 129


@pytest.mark.nightly
def test_published_scores_beside_the_cues(shared: Path, tmp_path: Path) -> None:
    """The command on JudgeBench's coding pairs: accuracies as the files give them, a page with all of it."""
    folder, out = shared / "data" / "judgebench", tmp_path / "page.html"
    pairs, scores = folder / "gpt-4o-2024-05-13.jsonl.gz", folder / "reward_model_scores.jsonl.gz"
    options = ["--scores", scores, "--subset", "livecodebench", "--deals", 1, "--out", out]
    result, table, told = called(app, "audit", pairs, *options)
    source = {row["pair_id"]: row["source"] for row in raw(pairs)}
    kept = [row for row in raw(scores) if source[row["pair_id"]] == "livecodebench"]
    assert result["items"] == len(kept) == 42
    for name, one in result["systems"].items():
        margins = [np.subtract(*row["scores"][name][:: 1 if row["label"] == "A>B" else -1]) for row in kept]
        # A tie counts one half, not as wrong.
        assert one["accuracy"]["value"] == pytest.approx(np.mean((np.sign(margins) + 1) / 2))
        assert one["tied"] == np.mean(np.equal(margins, 0))
        assert name in table
        assert one["against"]["n"] + one["along"]["n"] <= 42
    coding = [row for row in raw(pairs) if row["source"] == "livecodebench"]
    texts = [(len(row["response_A"]), len(row["response_B"]), row["label"] == "A>B") for row in coding]
    longer = [0.5 if a == b else float((a > b) == first) for a, b, first in texts]
    assert result["rules"]["longer"]["value"] == pytest.approx(np.mean(longer))
    assert "chance is 50.0 %" in told
    page = Page()
    page.feed(out.read_text(encoding="utf-8"))
    assert page.open == []
    assert page.outside == []
    assert "Skywork-Reward-Gemma-2-27B" in page.text


def test_the_page_shows_subsets_and_escapes_names() -> None:
    items = [
        Item(str(k), "<b>x" if k % 2 else "y", one.prompt, one.chosen, one.rejected)
        for k, one in enumerate(best_of(40))
    ]
    scores = np.random.default_rng(0).standard_normal(160)
    html = render(audit_items(items, scores={"<i>sys": scores}, deals=1, remarks=["7 ties are left out"]), "T")
    assert "<b>x" not in html
    assert "<i>sys" not in html
    page = Page()
    page.feed(html)
    assert page.open == []
    for text in ("<b>x", "<i>sys", "7 ties are left out", "chance 25.0 %"):
        assert text in page.text


@pytest.mark.nightly
def test_likelihoods_are_those_of_the_replies(tmp_path: Path) -> None:
    from coala.backbone import load_backbone
    from coala.baselines import TrainSettings
    from coala.baselines.likelihoods import log_likelihoods

    model = load_backbone(tiny_backbone("llama", tmp_path / "model"), device="cpu")
    items = [*best_of(3, k=3), *best_of(1, k=2, seed=1)]
    found = reply_likelihoods(items, model, silent)
    expected = []
    for item in items:
        for text in item.replies:
            one = log_likelihoods(model, [Pair(item.prompt, text, text, "g")], TrainSettings(max_length=None))
            expected.append((one.chosen[0], one.chosen[0] / one.chosen_tokens[0]))
    assert found == pytest.approx(np.array(expected), rel=1e-4)
    with_model = audit_items(items, likelihood=found, deals=1)
    assert {"likelier", "less likely per token", "base likelihood"} <= {one.name for one in with_model.cues}
    naive = [np.argmax(found[k : k + n, 0]) == 0 for k, n in ((0, 3), (3, 3), (6, 3), (9, 2))]
    assert with_model.cue("likelier").accuracy.value == pytest.approx(np.mean(naive))
    with pytest.raises(CoalaError, match=r"expected \(11, 2\)"):
        audit_items(items, likelihood=found[1:])


# --- what cannot be used -----------------------------------------------------------------------------------------

GOOD = {"prompt": "q", "chosen": "a good reply", "rejected": "a bad one"}
WRONG = {
    "one side": ([{"prompt": "q", "chosen": "a"}, {"prompt": "p", "chosen": "b"}], (), "rejected"),
    "a single pair": ([GOOD], (), "1 item in 1 group, expected at least two groups"),
    "one group": ([{**GOOD, "group": "g"}, {**GOOD, "chosen": "c", "group": "g"}], (), "2 items in 1 group"),
    "replies alike": (
        [
            {"prompt": f"q{k}", "input": f"q{k}", "output_1": "x", "output_2": "x", "label": 1, "subset": "Natural"}
            for k in (1, 2)
        ],
        (),
        "the same text right and wrong in all 2 items, expected replies that differ",
    ),
    "one reply a prompt": (
        [{"prompt": "q", "chosen": ["a"], "rejected": [], "subset": "Focus", "id": "1"}],
        ("--bench", "rewardbench2"),
        "rejected: found 0 texts",
    ),
    "unknown subset": (
        [{**GOOD, "subset": "Chat"}, {**GOOD, "prompt": "p", "subset": "Code"}],
        ("--subset", "Chats"),
        "the subset 'Chats', expected one of Chat, Code",
    ),
    "no subsets": ([GOOD, {**GOOD, "prompt": "p"}], ("--subset", "x"), "these rows have no subsets"),
    "no such column": ([GOOD, {**GOOD, "prompt": "p"}], ("--by", "kind"), "no column 'kind' among chosen, prompt"),
    "scores too few": (
        [GOOD, {**GOOD, "prompt": "p"}],
        ("--scores", "SCORES"),
        "Found 1 rows of scores for 2 items",
    ),
    "label unknown": (
        [{"input": "q", "output_1": "x", "output_2": "y", "label": 3, "subset": "Natural"}],
        (),
        "label: found 3, expected one of 1, 2",
    ),
    "reviews alone": ([{"question_id": 1, "answer1_id": "x", "answer2_id": "y", "score": [1, 2]}], (), "--questions"),
    "a benchmark to balance": (
        [{**GOOD, "subset": "Chat"}, {**GOOD, "prompt": "p", "subset": "Code"}],
        ("--balance", "length", "--balanced", "left.jsonl"),
        "a benchmark with --balance, expected plain pairs",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_used_is_said_in_a_sentence(name: str, tmp_path: Path) -> None:
    rows, options, words = WRONG[name]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    scores = write_lines(tmp_path / "scores.jsonl", [{"chosen_score": 1, "rejected_score": 0}])
    arguments = [scores if one == "SCORES" else one for one in options]
    with pytest.raises(CoalaError) as told:
        called(app, "audit", path, *arguments)
    assert words in str(told.value)
    assert re.search(r"[Ff]ix: |--questions", str(told.value)), told.value
    assert "Traceback" not in str(told.value)


def test_empty_replies_are_counted_and_a_missing_file_is_said(tmp_path: Path) -> None:
    items = [*best_of(20), Item("e", "", (Turn("user", "q"),), ("",), ("x", " "), "e")]
    assert audit_items(items, deals=1).counts["empty replies"] == 2
    for bench in ("auto", "judgebench", "rmbench"):
        with pytest.raises(CoalaError, match=r"(?i)no such file|not found|no file"):
            audit_preferences(tmp_path / "absent.jsonl", bench)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n{"prompt": \n')
    with pytest.raises(CoalaError, match=r"bad\.jsonl:2"):
        audit_preferences(bad)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["content", "turns", "a"]), inner),
    max_leaves=4,
)
FORMS: dict[str, dict[str, Any]] = {
    "judgebench": {
        "pair_id": "1",
        "source": "x",
        "question": "q",
        "response_A": "a",
        "response_B": "b",
        "label": "A>B",
    },
    "llmbar": {"input": "q", "output_1": "a", "output_2": "b", "label": 1, "subset": "Natural"},
    "autoj": {"prompt": "q", "response 1": "a", "response 2": "b", "label": 2, "scenario": "s"},
    "rewardbench2": {"prompt": "q", "chosen": ["a"], "rejected": ["b", "c"], "subset": "Math", "id": "1"},
    "vicuna": {"question_id": 1, "answer1_id": "x", "answer2_id": "y", "score": [1, 2]},
    "arena": {"question_id": 1, "model": "a", "baseline": "b", "games": [{"score": "A>B"}, {"judgment": "[[B>A]]"}]},
    "alpaca": {
        "instruction": "q",
        "output_1": "a",
        "output_2": "b",
        "preference": 1.7,
        "generator_1": "x",
        "generator_2": "y",
    },
}


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_rows_of_strangers_end_in_a_sentence(tmp_path: Path, data: st.DataObject) -> None:
    bench = data.draw(st.sampled_from(sorted(FORMS)))
    row = dict(FORMS[bench])
    for _ in range(data.draw(st.integers(1, 2))):
        row[data.draw(st.sampled_from(sorted(row)))] = data.draw(VALUES)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    questions = write_lines(tmp_path / "q.jsonl", QUESTIONS)
    answers = write_lines(tmp_path / "a.jsonl", [{**one, "answer_id": "xy"[k % 2]} for k, one in enumerate(ANSWERS)])
    for kind in (bench, "auto"):
        with suppress(CoalaError):
            read_set(path, kind, questions=questions, answers=answers)
