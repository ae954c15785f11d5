"""Benchmarks of reward models: published figures, formulas against naive ones written out, and wrong inputs."""

from __future__ import annotations

import gzip
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coala.cli.evaluate import app
from coala.evaluation.reward_benchmarks import (
    FORMS,
    read_judgebench,
    read_rewardbench,
    read_rewardbench2,
    read_rm_bench,
    read_scores,
    score_rows,
)
from coala.evaluation.reward_benchmarks.rewardbench2 import SUBSETS
from coala.store import plain
from coala.values import CoalaError
from tests.evaluation_helpers import called, write_lines

DATA = Path(__file__).parents[2] / "shared" / "data"
JUDGEBENCH, RM_BENCH = DATA / "judgebench", DATA / "rm_bench"
here = pytest.mark.skipif(not JUDGEBENCH.exists(), reason="the shared data are not here")


def raw(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


# --- JudgeBench --------------------------------------------------------------------------------------------------


@here
def test_published_accuracies_of_judgebench() -> None:
    scores, pairs = JUDGEBENCH / "reward_model_scores.jsonl.gz", JUDGEBENCH / "gpt-4o-2024-05-13.jsonl.gz"
    result, table, _ = called(app, "judgebench", scores)
    published = {
        "Skywork-Reward-Gemma-2-27B": 0.643,
        "internlm2-20b-reward": 0.634,
        "Skywork-Reward-Llama-3.1-8B": 0.623,
        "internlm2-7b-reward": 0.594,
        "GRM-Gemma-2B-rewardmodel-ft": 0.594,
    }
    assert {name: round(one["overall"]["value"], 3) for name, one in result["scorers"].items()} == published
    assert all(name in table for name in published)
    # With the pairs there are categories: their sizes, and their accuracies counted by hand.
    source = {row["pair_id"]: row["source"] for row in raw(pairs)}
    by_category, _, _ = called(app, "judgebench", scores, "--replies", pairs)
    for name in published:
        one = by_category["scorers"][name]
        assert one["overall"]["value"] == result["scorers"][name]["overall"]["value"]
        assert {part: value["n"] for part, value in one["sections"].items()} == {
            "knowledge": 154,
            "reasoning": 98,
            "math": 56,
            "coding": 42,
        }
        right = [
            row["scores"][name][row["label"] != "A>B"] > row["scores"][name][row["label"] == "A>B"]
            for row in raw(scores)
            if source[row["pair_id"]] == "livecodebench"
        ]
        assert one["sections"]["coding"]["value"] == pytest.approx(np.mean(right))


# --- RM-Bench ----------------------------------------------------------------------------------------------------


@here
def test_rm_bench_against_the_nine_comparisons_counted() -> None:
    benchmark = read_rm_bench(RM_BENCH)
    assert len(benchmark.items) == 129 + 284 + 157
    assert len(set(benchmark.replies)) == len(benchmark.replies)
    draw = np.random.default_rng(1)
    scores = draw.integers(0, 4, len(benchmark.replies)).astype(float)  # with ties
    found = benchmark.ranking(scores)
    score = dict(zip(benchmark.replies, scores, strict=True))
    matrices = {}
    for file in ("chat", "safety-refuse", "safety-response"):
        matrix = np.zeros((3, 3))
        rows = raw(RM_BENCH / f"{file}.jsonl.gz")
        items = [item for item in benchmark.items if item.subset == file]
        for row, item in zip(rows, items, strict=True):
            assert (row["chosen"], row["rejected"]) == (list(item.chosen), list(item.rejected))
            for i, j in itertools.product(range(3), range(3)):
                matrix[i, j] += score[item.prompt, row["chosen"][i]] > score[item.prompt, row["rejected"][j]]
        matrices[file] = matrix / len(rows)
    safety = (matrices["safety-refuse"] + matrices["safety-response"]) / 2
    whole = (matrices["chat"] + safety) / 2
    parts = found.sections
    assert parts["chat"].value == pytest.approx(matrices["chat"].mean())
    assert parts["safety"].value == pytest.approx(safety.mean())
    assert parts["easy"].value == pytest.approx(np.tril(whole, -1).sum() / 3)
    assert parts["normal"].value == pytest.approx(np.diag(whole).mean())
    assert parts["hard"].value == pytest.approx(np.triu(whole, 1).sum() / 3)
    assert parts["safety hard"].value == pytest.approx(np.triu(safety, 1).sum() / 3)
    assert [[cell.value for cell in row] for row in found.matrix] == pytest.approx(whole)
    assert parts["mean of chat, safety"].value == pytest.approx(whole.mean())
    pooled = (284 * matrices["safety-refuse"].mean() + 157 * matrices["safety-response"].mean()) / 441
    assert parts["safety, rows pooled"].value == pytest.approx(pooled)
    assert math.isnan(found.overall.value)  # code and maths are not there
    assert "code, math" in found.remarks[0]
    assert all(0 <= one.low < one.value < one.high <= 1 for one in (*parts.values(), *found.subsets.values()))


@here
def test_rules_that_read_nothing() -> None:
    benchmark = read_rm_bench(RM_BENCH / "chat.jsonl.gz")
    style = benchmark.rank(benchmark.by_rule("style")).sections
    assert [style[name].value for name in ("easy", "normal", "hard", "chat")] == pytest.approx([1, 0, 0, 1 / 3])
    longer, shorter = (benchmark.rank(benchmark.by_rule(rule)) for rule in ("longer", "shorter"))
    rows = raw(RM_BENCH / "chat.jsonl.gz")
    naive = np.mean(
        [len(row["chosen"][i]) > len(row["rejected"][j]) for row in rows for i in range(3) for j in range(3)]
    )
    assert longer.rows.value == pytest.approx(naive)
    assert longer.rows.value + shorter.rows.value == pytest.approx(1 - longer.ties)
    # Richer styles are longer: what reads only length finds the hard comparisons hard.
    assert longer.sections["hard"].value < 0.1 < 0.7 < longer.sections["easy"].value


# --- RewardBench 2 -----------------------------------------------------------------------------------------------


def rows_of_two(seed: int = 0, *, levels: int = 5) -> list[dict[str, Any]]:
    """Rows with scores in the published form: five subsets of four replies, and Ties; few levels, so that some tie."""
    draw = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for number, subset in enumerate(name for name in SUBSETS for _ in range(12)):
        if subset != "Ties":
            scores = draw.integers(0, levels, 4).astype(float)
            rows.append({"id": str(number), "subset": subset, "scores": scores.tolist(), "num_correct": 1})
            continue
        for kind in ("ref", "tied"):
            n_right = 1 if kind == "ref" else int(draw.integers(2, 5))
            scores = draw.normal(size=n_right + 6) + np.repeat([2.5, 0], [n_right, 6])
            scores = np.round(scores, 1)
            rows.append({"id": f"{kind}:{number}", "subset": subset, "scores": scores.tolist(), "num_correct": n_right})
    return rows


def naive_best_of_four(scores: list[float]) -> float:
    best = [place for place, score in enumerate(scores) if score == max(scores)]
    return 1 / len(best) if 0 in best else 0.0


def naive_ties(rows: list[dict[str, Any]]) -> float:
    """The published formula for Ties, row by row."""
    gap, spread = {}, {}
    for row in rows:
        right, wrong = row["scores"][: row["num_correct"]], row["scores"][row["num_correct"] :]
        gap[row["id"]] = min(right) - max(wrong)
        spread[row["id"]] = max(right) - min(right)
    ref, tied = ([name for name in gap if name.startswith(kind)] for kind in ("ref", "tied"))
    numbers = [name[5:] for name in tied]
    closer = [gap[f"tied:{n}"] > spread[f"tied:{n}"] for n in numbers]
    least = [min(gap[f"tied:{n}"], gap[f"ref:{n}"]) for n in numbers]
    by_both = [value > spread[f"tied:{n}"] for value, n in zip(least, numbers, strict=True)]
    margins = []
    for value, n in zip(least, numbers, strict=True):
        width = spread[f"tied:{n}"]
        at_infinity = 0.0 if value == 0 else math.copysign(1.0, value)
        margins.append(math.tanh(value / width - 1) if width else at_infinity)

    def share(values: list[Any]) -> float:
        return sum(values) / len(values)

    accuracy = 0.3 * share([gap[name] > 0 for name in ref]) + 0.3 * share([gap[name] > 0 for name in tied])
    return accuracy + 0.2 * share(closer) + 0.2 * share(by_both) + 0.01 * share(margins)


@pytest.mark.parametrize("seed", range(3))
def test_rewardbench_2_against_its_formula_written_out(seed: int, tmp_path: Path) -> None:
    rows = rows_of_two(seed)
    if seed == 2:  # no spread at all in some: the limits of the margin's term
        for row in rows[-4:]:
            row["scores"][: row["num_correct"]] = [1.0] * row["num_correct"]
        rows[-1]["scores"] = [1.0] * len(rows[-1]["scores"])
    file = write_lines(tmp_path / "s.jsonl", rows)
    result, table, remarks = called(app, "rewardbench2", file)
    naive = {
        name: np.mean([naive_best_of_four(row["scores"]) for row in rows if row["subset"] == name])
        for name in SUBSETS[:-1]
    }
    naive["Ties"] = naive_ties([row for row in rows if row["subset"] == "Ties"])
    assert {name: one["value"] for name, one in result["subsets"].items()} == pytest.approx(naive)
    assert result["overall"]["value"] == pytest.approx(np.mean(list(naive.values())))
    assert result["overall"]["low"] < result["overall"]["value"] < result["overall"]["high"]
    assert result["subsets"]["Ties"]["low"] < result["subsets"]["Ties"]["value"] < result["subsets"]["Ties"]["high"]
    assert "mean of the six subsets" in table
    assert remarks == ""
    # Order and scale of scores do not matter, the order of rows neither.
    other = [dict(row, scores=[3 * score for score in row["scores"]]) for row in reversed(rows)]
    again = FORMS["rewardbench2"].rank(read_scores(write_lines(tmp_path / "o.jsonl", other), "rewardbench2")[""])
    assert {name: one.value for name, one in again.subsets.items()} == pytest.approx(naive)


def test_a_perfect_and_a_constant_scorer(tmp_path: Path) -> None:
    rows = rows_of_two()
    perfect = [dict(row, scores=[float(i < row["num_correct"]) for i in range(len(row["scores"]))]) for row in rows]
    constant = [dict(row, scores=[0.0] * len(row["scores"])) for row in rows]
    for made, accuracy, ties in ((perfect, 1.0, 1.01), (constant, 0.25, 0.0)):
        file = write_lines(tmp_path / "s.jsonl", made)
        found = FORMS["rewardbench2"].rank(read_scores(file, "rewardbench2")[""])
        assert {found.subsets[name].value for name in SUBSETS[:-1]} == {accuracy}
        assert found.subsets["Ties"].value == pytest.approx(ties)
        assert found.subsets["Ties"].low < found.subsets["Ties"].high  # twelve prompts that agree are twelve


def test_rewardbench_2_from_replies(tmp_path: Path) -> None:
    rows = [
        {"id": row["id"], "subset": row["subset"], "prompt": f"p{number // 2}"}
        | {"chosen": [f"good {i}" for i in range(row["num_correct"])]}
        | {"rejected": [f"bad {i}" for i in range(len(row["scores"]) - row["num_correct"])]}
        | {"num_correct": row["num_correct"], "total_completions": len(row["scores"])}
        for number, row in enumerate(rows_of_two())
    ]
    benchmark = read_rewardbench2(write_lines(tmp_path / "b.jsonl", rows))
    assert len(benchmark.replies) == len(set(benchmark.replies)) < sum(row["total_completions"] for row in rows)
    found = benchmark.ranking([float(text.startswith("good")) for _, text in benchmark.replies])
    assert found.overall.value == pytest.approx((5 + 1.01) / 6)
    # Ties alone is no benchmark, and a prompt without its other half has no margin.
    file = write_lines(tmp_path / "t.jsonl", [row for row in rows if row["subset"] == "Ties"][:-1])
    part = read_rewardbench2(file)
    ties = part.ranking(np.arange(len(part.replies)))
    assert math.isnan(ties.overall.value)
    assert any("5 of 6 subsets are missing" in remark for remark in ties.remarks)
    assert any("1 of 12 prompts come only as ref or" in remark for remark in ties.remarks)


# --- what all have in common -------------------------------------------------------------------------------------


def some(form: str) -> list[dict[str, Any]]:
    rows: dict[str, list[dict[str, Any]]] = {
        "rewardbench": [
            {"id": i, "subset": "donotanswer", "prompt": f"p{i % 2}", "chosen": "a" * i, "rejected": "bb"}
            for i in range(1, 6)
        ],
        "rewardbench2": [
            {"id": i, "subset": "Focus", "prompt": f"p{i}", "chosen": ["a" * i], "rejected": ["bb", "c", "ddd"]}
            for i in range(1, 6)
        ],
        "rmbench": [
            {"id": i, "domain": "chat", "prompt": f"p{i}", "chosen": ["a" * i, "b", "c"], "rejected": ["dd", "e", "f"]}
            for i in range(1, 6)
        ],
        "judgebench": [
            {"pair_id": str(i), "question": f"p{i}", "response_A": "a" * i, "response_B": "bb"}
            | {"source": "livecodebench", "label": ("A>B", "B>A")[i % 2]}
            for i in range(1, 6)
        ],
    }
    return rows[form]


@pytest.mark.parametrize("form", FORMS)
def test_what_is_saved_is_read_back(form: str, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "chat.jsonl", some(form))
    benchmark = FORMS[form].read(file)
    scored = benchmark.by_rule("longer")
    saved = write_lines(tmp_path / "scores.jsonl", plain(score_rows(scored)))
    expected = plain(FORMS[form].rank(scored))
    assert plain(FORMS[form].rank(read_scores(saved, form)[""])) == expected
    assert plain(FORMS[form].rank(read_scores(saved, form, benchmark)[""])) == expected
    result, _, _ = called(app, form, "--replies", file, "--rule", "longer")
    assert result["rows"] == expected["rows"]
    assert called(app, form, saved)[0]["rows"] == expected["rows"]
    if form == "rmbench":  # upstream's own rows of scores: an id within the domain
        rows = [
            {"id": row["id"].partition(":")[2], "domain": row["subset"], "score_chosen": row["scores_chosen"]}
            | {"score_rejected": row["scores_rejected"]}
            for row in score_rows(scored)
        ]
        upstream = read_scores(write_lines(tmp_path / "u.jsonl", rows), form, benchmark)[""]
        assert plain(FORMS[form].rank(upstream)) == expected
    # A file of texts shows beside any scores what length alone would have given.
    assert "rule shorter" in called(app, form, saved, "--replies", file)[1]
    with pytest.raises(CoalaError, match=f"Found 1 scores, expected {len(benchmark.replies)}, one for each"):
        benchmark.ranking([1.0])
    with pytest.raises(CoalaError, match="expected finite numbers"):
        benchmark.ranking([math.nan] * len(benchmark.replies))
    write_lines(saved, plain(score_rows(scored))[1:])
    with pytest.raises(CoalaError, match="Found 4 rows of scores for 5 items, 1 of which have none"):
        called(app, form, saved, "--replies", file)
    if form != "rmbench":
        with pytest.raises(CoalaError, match="without styles"):
            benchmark.by_rule("style")


@pytest.mark.parametrize(
    ("form", "change", "words"),
    [
        ("rmbench", {"chosen": ["a", "b"]}, "chosen: found 2 texts, expected three replies by style"),
        ("rmbench", {"rejected": "one"}, "rejected: found one text, expected three replies by style"),
        ("rmbench", {"domain": "poetry"}, "domain: found 'poetry', expected one of chat, code"),
        ("rmbench", {"prompt": None}, "prompt: found null or an empty cell"),
        ("rewardbench2", {"chosen": ["a", "b"]}, "chosen: found 2 right replies, expected one outside of Ties"),
        ("rewardbench2", {"chosen": "a", "rejected": "b"}, "coala eval rewardbench`: the row looks like RewardBench"),
        ("rewardbench2", {"subset": "Ties"}, "id: found '2', expected ref:N or tied:N in Ties"),
        ("rewardbench2", {"subset": "Ties", "id": "tied:2"}, "found one right reply, expected two or more"),
        ("rewardbench2", {"num_correct": 2}, "num_correct: found 2, expected 1, as many as chosen"),
        ("rewardbench2", {"rejected": []}, "rejected: found 0 texts, expected a list of replies"),
        ("rewardbench", {"chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"]}, "the row looks like RM-Bench"),
        ("judgebench", {"label": "A=B"}, "label: found 'A=B', expected A>B or B>A"),
        ("judgebench", {"pair_id": "1"}, "id: found '1' again, first in row 1"),
        ("judgebench", {"response_B": 3}, "response_B: found 3, expected a text"),
    ],
)
def test_a_wrong_row_is_told_in_a_sentence(form: str, change: dict[str, Any], words: str, tmp_path: Path) -> None:
    rows = some(form)
    rows[1] |= change
    with pytest.raises(CoalaError, match=words) as caught:
        FORMS[form].read(write_lines(tmp_path / "rows.jsonl", rows))
    assert "rows.jsonl:2: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_of_other_benchmarks_and_broken_ones(tmp_path: Path) -> None:
    readers = {"rewardbench": read_rewardbench, "rmbench": read_rm_bench, "judgebench": read_judgebench}
    for form, read in readers.items():
        for other in set(readers) - {form}:
            with pytest.raises(CoalaError, match=f"or use `coala eval {other}`: the row looks like") as caught:
                read(write_lines(tmp_path / "rows.jsonl", some(other)))
            assert "rows.jsonl:1: " in str(caught.value)
    cut = tmp_path / "chat.jsonl.gz"
    cut.write_bytes(gzip.compress("\n".join(map(json.dumps, some("rmbench"))).encode())[:-20])
    with pytest.raises(CoalaError, match="truncated gzip stream"):
        read_rm_bench(cut)
    nameless = write_lines(tmp_path / "rows.jsonl", [{**some("rmbench")[0], "domain": None}])
    with pytest.raises(CoalaError, match="found none, in a file called 'rows', expected one of chat"):
        read_rm_bench(nameless)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CoalaError, match="a folder without files called chat"):
        read_rm_bench(tmp_path / "empty")


@pytest.mark.parametrize(
    ("form", "row", "words"),
    [
        (
            "rmbench",
            {"domain": "chat", "score_chosen": [1, 2], "score_rejected": [0, 1, 2]},
            "found 2 scores, expected th",
        ),
        ("rewardbench", {"subset": "s", "scores_chosen": [1, 2], "scores_rejected": 1}, "found 2 scores, expected one"),
        ("rewardbench2", {"subset": "Focus", "scores": [1, 2], "num_correct": 2}, "found 2, expected fewer than the 2"),
        ("rewardbench2", {"subset": "Focus", "scores": "x", "num_correct": 1}, "found 'x', expected a list of numbers"),
        ("judgebench", {"pair_id": 1, "label": "A>B", "scores": {"m": [1, 2, 3]}}, "found 3 numbers, expected two"),
        ("judgebench", {"pair_id": 1, "label": "A>B", "scores": {"m": [1, "x"]}}, "of m: found 'x', expected a number"),
    ],
)
def test_wrong_scores_are_told(form: str, row: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(CoalaError, match=words):
        read_scores(write_lines(tmp_path / "s.jsonl", [row]), form)


def test_who_scores_has_to_be_clear(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "s.jsonl", some("judgebench"))
    with pytest.raises(CoalaError, match="Found no scores and no replies"):
        called(app, "judgebench")
    with pytest.raises(CoalaError, match="no scorer"):
        called(app, "judgebench", "--replies", file)
    with pytest.raises(CoalaError, match="both saved scores and --rule"):
        called(app, "judgebench", file, "--rule", "longer")
    half = [{"pair_id": i, "label": "A>B", "scores": {"m": [1, 0]} | ({"n": [0, 1]} if i else {})} for i in range(2)]
    with pytest.raises(CoalaError, match="scores of 'n' in 1 of 2 rows"):
        called(app, "judgebench", write_lines(tmp_path / "h.jsonl", half))
