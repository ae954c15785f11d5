"""RewardBench: strict accuracy by subset, example-weighted sections, and what a constant scorer gets."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coala.evaluation.reward_benchmarks import Scored, read_scores
from coala.evaluation.reward_benchmarks.rewardbench import EXAMPLES, SECTIONS
from coala.evaluation.reward_benchmarks.rewardbench import rank_rewardbench as ranking
from coala.values import CoalaError
from tests.evaluation_helpers import write_lines

SIZES = EXAMPLES | {"math-prm": 447}


def scored_rows(margin: Any, subset: Sequence[str], prompt: Sequence[str]) -> Scored:
    """Pairs whose wrong reply has score 0."""
    right = tuple(np.array([value]) for value in margin)
    return Scored(right, (np.zeros(1),) * len(right), tuple(subset), tuple(prompt), tuple(prompt))


def margins(scored: Scored) -> Any:
    return np.array([margin.item() for margin in scored.margins])


def whole(seed: int = 0) -> Scored:
    """All 2,985 pairs with subsets of different accuracy."""
    rng = np.random.default_rng(seed)
    subset = [name for name, n in SIZES.items() for _ in range(n)]
    ease = {name: rng.random() for name in SIZES}
    margin = np.array([rng.normal(2 * ease[name] - 0.5) for name in subset])
    return scored_rows(margin, tuple(subset), tuple(str(i) for i in range(len(subset))))


def test_the_tables_are_whole() -> None:
    members = [name for names in SECTIONS.values() for name in names]
    assert sorted(members) == sorted(EXAMPLES)
    assert sum(SIZES.values()) == 2985  # the benchmark's published size
    code = sum(count for name, count in EXAMPLES.items() if name.startswith("hep-"))
    assert EXAMPLES["math-prm"] == code


def test_sections_are_example_weighted_means() -> None:
    scored = whole()
    found = ranking(scored)
    assert found.remarks == ()
    accuracy = {
        name: np.mean([m > 0 for m, s in zip(margins(scored), scored.subset, strict=True) if s == name])
        for name in SIZES
    }
    for section, members in SECTIONS.items():
        naive = sum(EXAMPLES[name] * accuracy[name] for name in members) / sum(EXAMPLES[name] for name in members)
        one = found.sections[section]
        assert one.value == pytest.approx(naive, abs=1e-12)
        assert 0 <= one.low < one.value < one.high <= 1
        assert one.n == sum(SIZES[name] for name in members)
    assert found.overall.value == pytest.approx(np.mean([one.value for one in found.sections.values()]))
    by_rows = ranking(scored, weights="rows")
    chat = [m > 0 for m, s in zip(margins(scored), scored.subset, strict=True) if s in SECTIONS["Chat"]]
    assert by_rows.sections["Chat"].value == pytest.approx(np.mean(chat))
    assert by_rows.sections["Chat"].value == pytest.approx(found.sections["Chat"].value)
    assert by_rows.sections["Reasoning"].value != pytest.approx(found.sections["Reasoning"].value, abs=1e-4)


def test_a_constant_scorer_gets_nothing() -> None:
    scored = whole()
    constant = ranking(scored_rows(np.zeros(len(scored)), scored.subset, scored.group))
    assert constant.overall.value == 0
    assert constant.rows.value == 0
    assert constant.ties == 1
    # Scale and shift of the scorer do not matter.
    assert ranking(scored_rows(3 * margins(scored), scored.subset, scored.group)).sections == ranking(scored).sections


def test_parts_of_the_benchmark_are_remarked() -> None:
    few = scored_rows(
        np.array([1.0, -1.0, 0.0, 2.0]), ("mt-bench-easy", "mt-bench-easy", "own", "math-prm"), ("a", "a", "b", "c")
    )
    found = ranking(few)
    assert found.sections["Chat"].value == 0.5
    assert math.isnan(found.overall.value)
    assert set(found.sections) == {"Chat", "Reasoning"}
    assert any("Safety: 5 of 5 subsets are missing" in remark for remark in found.remarks)
    assert any("belong to no section: own" in remark for remark in found.remarks)
    assert any("published size, e.g. math-prm: 1" in remark for remark in found.remarks)
    assert found.ties == 0.25
    own = ranking(few, {"mine": ("own", "math-prm")}, {"own": 1, "math-prm": 3})
    assert own.sections["mine"].value == 0.75
    assert own.overall.value == 0.75
    with pytest.raises(CoalaError, match="weights of 1 parts"):
        ranking(few, {"mine": ("own",)}, {"own": -1})
    with pytest.raises(CoalaError, match="no scored pairs"):
        ranking(scored_rows(np.array([]), (), ()))


def test_reading_scores(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    rows: list[dict[str, Any]] = [
        {"subset": "donotanswer", "chosen_score": 1.5, "rejected_score": 1},
        {"subset": "donotanswer", "scores_chosen": [2], "scores_rejected": [2.0], "prompt": "p"},
    ]
    write_lines(path, rows)
    found = read_scores(path, "rewardbench")[""]
    assert margins(found).tolist() == [0.5, 0]
    assert found.group[1] == "p"
    table = tmp_path / "s.csv"
    table.write_text("subset,chosen_score,rejected_score\ndonotanswer,1.5,1\ndonotanswer,2,2\n")
    assert margins(read_scores(table, "rewardbench")[""]).tolist() == [0.5, 0]
    for change, words in (
        ({"chosen_score": "good"}, r"s.jsonl:1: chosen_score: found 'good', expected a number"),
        ({"chosen_score": None}, "chosen_score: found null or an empty cell"),
        ({"chosen_score": math.inf}, "found inf"),
        ({"chosen_score": 1e308, "rejected_score": -1e308}, "found a margin of inf"),
        ({"subset": " "}, "subset: found ' '"),
    ):
        path.write_text(json.dumps(rows[0] | change))
        with pytest.raises(CoalaError, match=words):
            read_scores(path, "rewardbench")
