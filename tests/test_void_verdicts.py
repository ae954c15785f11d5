"""Verdicts that say nothing have no figure: places, failures, ties and constant grades, in every command."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coala.cli.evaluate import app
from coala.evaluation.win_rates import place_alone, place_alone_once, remarks_on
from coala.store import save_generations, save_pairs
from coala.values import Estimate, Generation, Judgement, Pair, prompt_id, user
from tests.evaluation_helpers import called, write_lines
from tests.judge_server import JudgeServer, Reply, fail, say

Start = Callable[[Callable[[dict[str, Any]], Reply]], str]


@pytest.fixture
def start() -> Iterator[Start]:
    servers: list[JudgeServer] = []

    def begin(script: Callable[[dict[str, Any]], Reply]) -> str:
        servers.append(JudgeServer(lambda body, before: script(body)))
        return servers[-1].url

    yield begin
    for server in servers:
        server.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two sides' replies to four prompts, and questions with answers."""
    pairs = [Pair(user(f"question {i}"), "a", "b", str(i)) for i in range(4)]
    save_pairs(tmp_path / "pairs-eval.jsonl", pairs)
    for method in ("guided", "unguided"):
        replies = [
            Generation(prompt_id(pair.prompt), f"{method} {pair.group}", method, 2, 0, math.nan, 0.0) for pair in pairs
        ]
        save_generations(tmp_path / f"generations-{method}.jsonl", replies)
    write_lines(tmp_path / "q.jsonl", [{"question_id": i, "turns": ["one?", "two?"]} for i in range(2)])
    rows = [{"question_id": i, "model_id": "x", "choices": [{"turns": ["a", "b"]}]} for i in range(2)]
    write_lines(tmp_path / "a.jsonl", rows)
    return tmp_path


def judged(folder: Path, url: str, *more: object) -> tuple[dict[str, Any], str, str]:
    sides = [folder / f"generations-{name}.jsonl" for name in ("guided", "unguided")]
    return called(app, "judge", *sides, "--base-url", url, "--model", "m", "--attempts", 1, *more)


@pytest.mark.parametrize(("said", "place"), [("[[A]]", "first"), ("[[B]]", "second")])
def test_a_judge_of_places_has_no_win_rate(folder: Path, start: Start, said: str, place: str) -> None:
    result, table, _ = judged(folder, start(lambda body: say(said)))
    rate = result["win_rate"]
    assert (rate["value"], rate["low"], rate["high"], rate["n"]) == (None, None, None, 4)
    assert result["position_bias"]["value"] == 1
    (remark,) = result["remarks"]
    assert "reads only the place" in remark
    assert f"the reply shown {place}" in remark
    assert "void (n=4)" in table
    step = "[[A>B]]" if place == "first" else "[[B>A]]"
    arena, table, _ = judged(folder, start(lambda body: say(step)), "--judge", "arena")
    assert arena["win_rate"]["value"] is None
    assert arena["arena"]["value"] is None
    assert "50.0" not in table.split("position bias")[0]


def test_all_failed_is_no_number_and_the_words_are_shown(folder: Path, start: Start) -> None:
    result, table, told = judged(folder, start(lambda body: fail(400)))
    assert result["win_rate"] | {"method": ""} == {"value": None, "low": None, "high": None, "n": 0, "method": ""}
    assert result["failures"] == {"rejected": 8}
    assert "scripted 400" in result["failure_words"]["rejected"]
    assert "no verdicts" in table
    assert "scripted 400" in table
    assert "nan" not in table
    assert "scripted 400" in told
    out = folder / "g.jsonl"
    common = ["--base-url", start(lambda body: fail(400)), "--model", "m", "--attempts", 1, "--out", out]
    result, table, _ = called(app, "grade", folder / "q.jsonl", folder / "a.jsonl", *common)
    overall = result["scores"]["x"]["overall"]
    assert (overall["value"], overall["low"], overall["high"], overall["n"]) == (None, None, None, 0)
    assert "no verdicts" in table
    assert "scripted 400" in table
    assert "nan" not in table
    assert "10.000" not in table
    saved, table, _ = called(app, "mtbench", out)
    assert saved["scores"]["x"]["overall"]["low"] is None
    assert "nan" not in table
    assert "10.0" not in table


def test_ties_alone_and_constant_grades_are_told(folder: Path, start: Start) -> None:
    result, _, _ = judged(folder, start(lambda body: say("[[C]]")))
    assert result["win_rate"]["value"] == 0.5
    assert result["remarks"] == ["every one of the 8 verdicts is a tie: this judge does not distinguish replies"]
    common = ["--base-url", start(lambda body: say("[[5]]")), "--model", "m", "--out", folder / "g.jsonl"]
    result, _, _ = called(app, "grade", folder / "q.jsonl", folder / "a.jsonl", *common)
    assert result["scores"]["x"]["overall"]["value"] == 5
    assert result["remarks"] == ["x: every one of the 4 ratings is 5: this judge does not distinguish replies"]


def test_another_out_judges_nothing_again(folder: Path, start: Start) -> None:
    url = start(lambda body: say("[[A]]" if "guided 0" in str(body) else "[[C]]"))
    first, _, _ = judged(folder, url, "--out", folder / "one" / "j.jsonl")
    other, _, _ = judged(folder, url, "--out", folder / "other" / "j.jsonl")
    assert (first["cost"]["calls"], other["cost"]["calls"], other["cost"]["kept"]) == (8, 0, 8)
    # Answers that an earlier judging has kept beside its OUT are read there; two places are told of.
    shutil.move(folder / "verdicts.sqlite", folder / "one" / "verdicts.sqlite")
    assert judged(folder, url, "--out", folder / "one" / "j.jsonl")[0]["cost"]["calls"] == 0
    judged(folder, url, "--out", folder / "other" / "j.jsonl")
    _, _, told = judged(folder, url, "--out", folder / "one" / "j.jsonl")
    assert "are not read. Give --cache" in told


# --- saved judgements ------------------------------------------------------------------------------------------------


def test_saved_games_that_follow_the_place(tmp_path: Path) -> None:
    base = {"turn": 1, "model_1": "a", "model_2": "b", "judge": "j"}
    rows = [base | {"question_id": i, "g1_judgment": "[[A]]", "g2_judgment": "[[A]]"} for i in range(5)]
    result, table, _ = called(app, "mtbench", write_lines(tmp_path / "m.jsonl", rows))
    for one in result["matches"].values():
        assert [one[name]["value"] for name in ("win_rate", "loss_rate", "adjusted", "excluding_ties")] == [None] * 4
        assert one["ties"] == 5
    assert "void" in table
    assert "0.5" not in table
    rows.append(base | {"question_id": 9, "g1_judgment": "[[A]]", "g2_judgment": "[[B]]"})
    result, _, _ = called(app, "mtbench", write_lines(tmp_path / "m.jsonl", rows))
    assert result["matches"]["a"]["adjusted"]["value"] == pytest.approx(3.5 / 6)


def test_saved_arena_that_follows_the_place(tmp_path: Path) -> None:
    def row(i: int, *said: str) -> dict[str, Any]:
        return {"question_id": i, "model": "me", "baseline": "base", "games": [{"judgment": text} for text in said]}

    rows = [row(i, "[[B>A]]", "[[B>>A]]") for i in range(4)] + [row(9, "[[B>A]]", "none")]
    result, table, _ = called(app, "arena", write_lines(tmp_path / "j.jsonl", rows), "--baseline", "base")
    score = result["scores"]["me"]
    assert (score["score"]["value"], score["published_interval"]["value"], score["rating"]) == (None, None, None)
    assert any("reads only the place" in remark for remark in result["remarks"])
    assert "void" in table
    assert "nan" not in table
    rows.append(row(10, "[[B>A]]", "[[A>B]]"))
    result, _, _ = called(app, "arena", write_lines(tmp_path / "j.jsonl", rows), "--baseline", "base")
    assert result["scores"]["me"]["score"]["value"] is not None


def test_saved_annotations_that_follow_the_place(tmp_path: Path) -> None:
    def row(i: int, swapped: bool, preference: float) -> dict[str, Any]:
        texts = {"output_1": "x" * (i + 1), "output_2": "y" * 3, "generator_1": "base", "generator_2": "me"}
        return {"instruction": f"{i}", **texts, "preference": preference, "judge_saw_swapped_order": swapped}

    # Ours is shown first where the order is swapped: the place wins everywhere.
    rows = [row(i, i % 2 == 0, 1.9 if i % 2 == 0 else 1.1) for i in range(8)]
    result, table, _ = called(app, "alpaca", write_lines(tmp_path / "a.jsonl", rows))
    assert result["raw"]["win_rate"]["value"] is None
    assert result["raw"]["standard_error"] is None
    assert "void" in table
    assert "nan" not in table
    result, _, _ = called(app, "alpaca", write_lines(tmp_path / "a.jsonl", [*rows, row(9, True, 1.2)]))
    assert result["raw"]["win_rate"]["value"] is not None


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_empty_cells_are_null_and_nulls_are_called_so(tmp_path: Path, ending: str) -> None:
    rows = [
        {"instruction": f"q{i}", "output_1": "a", "generator_1": "b", "output_2": "c", "generator_2": "me"}
        for i in range(3)
    ]
    values = [2.0, None, 1.0]

    def written(name: str, rows: list[dict[str, Any]]) -> Path:
        path = tmp_path / f"{name}.{ending}"
        if ending == "jsonl":
            return write_lines(path, rows)
        lines = [",".join(rows[0]), *(",".join("" if v is None else str(v) for v in row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
        return path

    whole = [row | {"preference": value} for row, value in zip(rows, values, strict=True)]
    result, _, _ = called(app, "alpaca", written("whole", whole))
    assert (result["raw"]["win_rate"]["value"], result["raw"]["n_missing"]) == (50, 1)
    for field in ("output_2", "generator_1"):
        bad = [*whole[:2], whole[2] | {field: None}]
        with pytest.raises(Exception, match=f"{field}: found null") as raised:
            called(app, "alpaca", written("bad", bad))
        assert "no such field" not in str(raised.value)


# --- laws ------------------------------------------------------------------------------------------------------------


def test_a_place_needs_a_verdict_and_no_verdict_against_it() -> None:
    assert place_alone([], []) == ""
    assert place_alone([0.5, 0.5], [0.5, 0.5]) == ""
    assert place_alone([1, 0.5], [1, 0.5]) != ""
    assert place_alone([1, 1], [1, 0]) == ""
    assert place_alone([1, 1], [1, 0.5]) == ""
    assert "same place" in place_alone([1, 0], [1, 0])
    assert place_alone_once([1, 1], [1, 1]) == ""
    assert place_alone_once([1] * 3, [1] * 3) != ""
    assert place_alone_once([1] * 3, [0] * 3) == ""
    assert place_alone_once([1] * 9, []) == ""


def test_a_place_that_mostly_decides_is_told_with_its_count() -> None:
    rows = [
        judgement
        for i in range(5)
        for judgement in (Judgement(str(i), "a", "b", 1.0, "j"), Judgement(str(i), "b", "a", float(i > 0), "j"))
    ]
    assert remarks_on(rows) == (
        "the place alone decided 4 of 5 comparisons: the win rate rests on the others",
    )  # fmt: skip
    assert "one order only" in remarks_on(rows[::2])[0]
    assert remarks_on([]) == ()


def test_an_estimate_of_nothing_is_no_number() -> None:
    for n, method, words in ((0, "mean; no rating", "none (n=0)"), (3, "share; void: why", "void (n=3)")):
        assert str(Estimate(math.nan, 1.0, 10.0, n, method)) == words
