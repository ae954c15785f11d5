"""`coala eval`: tables for people, one JSON line for programs, remarks on stderr."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from coala.cli.evaluate import app
from coala.leaderboards.alpaca import LengthControl
from coala.values import CoalaError

from .evaluation_helpers import called
from .evaluation_helpers import write_lines as write


def run(*arguments: object) -> tuple[dict[str, Any], str, str]:
    return called(app, *arguments)


@pytest.fixture
def reference(shared: Path) -> Path:
    return shared / "eval_reference"


def test_alpaca_prints_reference_length_and_n(reference: Path) -> None:
    folder = reference / "alpaca"
    files = ["--calibration", folder / "df_gamed_surrogate.csv.gz"]
    files += ["--difficulty", folder / "instruction_difficulty_recovered.csv"]
    expected = json.loads((folder / "expected.json").read_text())["models"]["vicuna-13b-v1.5"]
    result, table, _ = run(
        "alpaca", folder / "annotations_vicuna-13b-v1.5.jsonl.gz", *files, "--penalty", "none", "--draws", 20
    )
    controlled = result["length_controlled"]
    wanted = expected["plain_mle_with_surrogate"]["length_controlled_winrate"]
    assert controlled["win_rate"]["value"] == pytest.approx(wanted, abs=1e-6)
    assert controlled["win_rate"]["low"] < wanted < controlled["win_rate"]["high"]
    assert result["raw"]["win_rate"]["value"] == pytest.approx(expected["leaderboard"]["win_rate"], abs=1e-8)
    assert "n = 805, against gpt4_1106_preview (2049 characters)" in table
    assert "48 / 753 / 4" in table
    assert "1061 characters" in table
    fixed, _, _ = run(
        "alpaca", folder / "annotations_vicuna-13b-v1.5.jsonl.gz", *files, "--penalty", 21.54434690031882, "--draws", 0
    )
    assert fixed["length_controlled"]["win_rate"]["value"] == pytest.approx(10.484438, abs=0.002)
    assert fixed["length_controlled"]["win_rate"]["low"] is None  # not finite: null


def test_alpaca_without_calibration_and_with_outputs(tmp_path: Path) -> None:
    row = {"generator_1": "b", "generator_2": "m", "output_1": "abc", "output_2": "", "instruction": "x"}
    path = write(tmp_path / "a.jsonl", [row | {"preference": 1.5}, row | {"preference": None}])
    outputs = write(tmp_path / "o.jsonl", [{"output": "abcde"}])
    result, table, remarks = run("alpaca", path, "--outputs", outputs)
    assert "length-controlled" not in table
    assert result["raw"]["average_length"] == 5
    assert result["raw"]["standard_error"] is None
    assert "note: 1 rows have no preference" in remarks
    assert "repeat an instruction" in remarks
    assert len(result["remarks"]) == 4


def test_alpaca_options_are_explained(tmp_path: Path) -> None:
    with pytest.raises(CoalaError, match="needs two files"):
        run("alpaca", tmp_path / "x", "--calibration", tmp_path / "y")
    for bad in ("0", "-3", "nan", "lasso"):
        with pytest.raises(CoalaError, match=r"expected a positive number, `cv` or `none`"):
            run("alpaca", tmp_path / "x", f"--penalty={bad}")
    with pytest.raises(CoalaError, match=r"none.jsonl: found no such file"):
        run("alpaca", tmp_path / "none.jsonl")


def test_mtbench_tells_ratings_from_games(reference: Path) -> None:
    folder = reference / "mtbench"
    result, table, _ = run("mtbench", folder / "single_judgments_phi-3-dpo.jsonl.gz")
    assert result["scores"]["phi-3-dpo"]["overall"]["value"] == pytest.approx(8.2, abs=1e-12)
    assert result["scores"]["phi-3-dpo"]["by_turn"]["2"]["n"] == 80
    assert "humanities" in table
    result, table, _ = run("mtbench", folder / "pairwise_judgments_phi-3_vs_phi-3-dpo_odd_questions.jsonl.gz")
    assert result["matches"]["phi-3"]["adjusted"]["value"] == pytest.approx(0.5135135135135135, abs=1e-12)
    assert "10 / 9 / 18" in table


def test_mtbench_questions_and_remarks(tmp_path: Path) -> None:
    row = {"question_id": 5, "model": "m", "turn": 1, "judgment": "[[100]]"}
    path = write(tmp_path / "j.jsonl", [row, row])
    questions = write(tmp_path / "q.jsonl", [{"question_id": 5, "category": "poems"}])
    result, table, remarks = run("mtbench", path, "--questions", questions)
    assert result["scores"]["m"]["overall"]["value"] is None
    assert result["scores"]["m"]["n_errors"] == 2
    assert "poems" in table
    assert "note: m: 1 rows repeat" in remarks


def test_arena_scores_and_ratings(reference: Path) -> None:
    folder = reference / "arena_hard"
    result, table, _ = run("arena", folder / "battles_vs_gpt-4-0314.csv.gz", "--draws", 200)
    score = result["scores"]["gpt-3.5-turbo-0125"]
    assert score["score"]["value"] == pytest.approx(23.34, abs=0.005)
    assert score["rating"] == pytest.approx(793.3939, abs=1e-3)
    assert table.index("Qwen") < table.index("gpt-3.5")  # best first
    result, _, remarks = run("arena", folder / "raw_judgments_first40.jsonl.gz", "--model", "m", "--board", "v2.0")
    assert result["scores"]["m"]["score"]["value"] == pytest.approx(3.217822, abs=1e-6)
    assert result["failed_games"] == 2
    assert "note: 2 games have no verdict" in remarks


def test_arena_with_style(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    questions = range(60)
    rows = [{"question": q, "model": "m", "winner": str(rng.choice(["model", "baseline", "tie"]))} for q in questions]
    path = write(tmp_path / "b.jsonl", rows)
    for name in ("m", "base=1"):
        write(
            tmp_path / f"{name}.jsonl",
            [{"question": q, "output": "# a\n" + "word " * int(rng.integers(1, 90))} for q in questions],
        )
    styles = ["--style", f"m={tmp_path / 'm.jsonl'}"]
    both = [*styles, "--style", f"base={tmp_path}/x"]
    for version in ("v2.0", "v0.1"):
        good = [*styles, "--style", f"b={tmp_path / 'm.jsonl'}"]
        result, table, _ = run("arena", path, "--baseline", "b", *good, "--draws", 20, "--board", version)
        found = result["style_controlled"]
        # The same answers on both sides: nothing to control for.
        assert found["coefficients"]["tokens"] == 0
        plain = result["scores"]["m"]["score"]["value"]
        assert found["scores"]["m"]["value"] == pytest.approx(plain, abs=1e-4 if version == "v2.0" else 2)
        assert "style controlled" in table
    with pytest.raises(CoalaError, match="missing 'b'"):
        run("arena", path, "--baseline", "b", *styles)
    with pytest.raises(CoalaError, match="expected NAME=ANSWERS"):
        run("arena", path, "--baseline", "b", "--style", "m")
    with pytest.raises(CoalaError, match="no such file"):
        run("arena", path, "--baseline", "b", *both)
    write(tmp_path / "few.jsonl", [{"question": 1, "output": "x"}])
    with pytest.raises(CoalaError, match="have none for question '0'"):
        run("arena", path, "--baseline", "b", *styles, "--style", f"b={tmp_path / 'few.jsonl'}")


def test_arena_refuses_self_battles(tmp_path: Path) -> None:
    path = write(tmp_path / "b.jsonl", [{"question": 1, "model": "gpt-4-0314", "winner": "tie"}])
    with pytest.raises(CoalaError, match="self-battles"):
        run("arena", path)


def test_rewardbench_table(tmp_path: Path) -> None:
    rows = [{"subset": "donotanswer", "chosen_score": i % 3, "rejected_score": 1} for i in range(9)]
    result, table, remarks = run("rewardbench", write(tmp_path / "s.jsonl", rows))
    assert result["sections"]["Safety"]["value"] == pytest.approx(1 / 3)
    assert result["ties"] == pytest.approx(1 / 3)
    assert result["overall"]["value"] is None
    assert "donotanswer" in table
    assert "subsets are missing" in remarks
    by_rows, _, _ = run("rewardbench", tmp_path / "s.jsonl", "--weights", "rows")
    assert by_rows["subsets"] == result["subsets"]


def test_every_command_has_an_example() -> None:
    for name in ("alpaca", "mtbench", "arena", "rewardbench", "rewardbench2", "rmbench", "judgebench", "policy"):
        found = CliRunner().invoke(app, [name, "--help"])
        assert found.exit_code == 0
        assert f"Example: `coala eval {name}" in found.stdout.replace("\n", " ")


def test_published_stopping_is_asked_for_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    files = {name: tmp_path / f"{name}.csv" for name in ("calibration", "difficulty")}
    with pytest.raises(CoalaError, match=r"pip install 'coala-align\[liblinear\]'"):
        LengthControl(**files, stopping="liblinear")
    assert LengthControl(**files).files == files
    assert LengthControl(stopping="liblinear").files == {}
