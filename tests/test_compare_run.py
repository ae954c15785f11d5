"""A comparison carried out: every kind of cell, a kill on the way, cells that run out of memory, and the report."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="a comparison trains its baselines with the extra baselines")

from coala.compare import cells, content_of, run, summary_rows, write_report
from coala.compare.cell import PLAN, carry_out, read
from coala.compare.loading import study_of
from coala.compare.matrix import Cell, says_peak
from coala.compare.processes import Processes
from coala.compare.study import Study
from coala.store import load_json, save_pairs
from coala.values import CoalaError
from tests.menagerie import tiny_backbone
from tests.test_compare import pairs_of
from tests.waiting import wait_for

pytestmark = pytest.mark.slow
CHANGE = {"epochs": 1, "gradient_checkpointing": False, "batch_size": 4, "save_every": 1}
METHODS: list[dict[str, Any]] = [
    {"name": "sft", "kind": "sft", "inits": ["base"]},
    {"name": "dpo", "kind": "dpo"},
    {"name": "reward", "kind": "reward", "inits": ["base"]},
    {"name": "linear", "kind": "coala", "head": {"method": "linear"}, "guidance": {"mode": "shift"}},
    {
        "name": "cvx-dpo",
        "kind": "coala",
        "reference": "paper",
        "head": {"method": "two-phase", "paper": True, "n_patterns": 4},
        "guidance": None,
        "inits": ["base"],
    },
    {"name": "adamw", "kind": "adamw", "inits": ["base"], "rates": [1e-3, 1e-2]},
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and pairs."""
    folder = tmp_path_factory.mktemp("made")
    tiny_backbone("llama", folder / "model")
    save_pairs(folder / "pairs.jsonl", pairs_of(24, 2))
    return folder


def study(made: Path, **change: Any) -> Study:
    about: dict[str, Any] = {
        "title": "tiny",
        "models": {"tiny": {"path": str(made / "model"), "max_tokens": 64}},
        "datasets": {"d": {"pairs": [str(made / "pairs.jsonl")], "inits": ["base", "sft"]}},
        "settings": {"full": {"source": "trl", "adapter": False, "rates": [1e-3, 1e-2], "change": CHANGE}},
        "methods": METHODS,
        "seeds": [0],
        "split": {"test": 0.3, "validation": 0.3},
        "evaluation": {
            "prompts": 3,
            "max_new_tokens": 6,
            "kl_prompts": 2,
            "curve_points": 3,
            "curve_pairs": 6,
            "layer_sample": 16,
        },
        "device": "cpu",
        **change,
    }
    return study_of(about)


def statuses(out: Path) -> dict[str, str]:
    """By cell; ``missing`` where nothing is written."""
    stamps = load_json(out / PLAN)["stamps"]
    return {name: (read(out / "cells" / name) or {"status": "missing"})["status"] for name in stamps}


def decided(content: Any) -> Any:
    """A report's content without what was measured of time and memory."""
    if isinstance(content, dict):
        return {key: decided(value) for key, value in content.items() if key != "measured"}
    if isinstance(content, list):
        return [decided(value) for value in content]
    return content


def small_study(made: Path, **change: Any) -> Study:
    """One baseline and one head, from one start."""
    few = [method for method in METHODS if method["name"] in ("dpo", "linear")]
    return study(made, methods=few, datasets={"d": {"pairs": [str(made / "pairs.jsonl")]}}, **change)


@pytest.fixture(scope="module")
def small(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small study, its cells carried out in this process: each of its own would load its libraries anew.

    What a fit counts here lacks the programs that this process had made before.
    """
    out = tmp_path_factory.mktemp("out") / "small"

    def here(self: Processes, cell: Cell, *_: Any, **__: Any) -> tuple[int, bool]:
        return carry_out(out, cell.id), False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Processes, "carry_out", here)
        run(small_study(made), out)
    return out


@pytest.fixture(scope="module")
def apart(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small study, every cell in a process as in use; beside it, what those processes told."""
    out, told = tmp_path_factory.mktemp("out") / "apart", []
    run(small_study(made), out, on_work=lambda cell, *how_far: told.append([cell.id, *how_far]))
    (out.parent / "told.json").write_text(json.dumps(told))
    return out


@pytest.fixture(scope="module")
def whole(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "whole"
    run(study(made), out)
    return out


def test_a_baseline_and_a_head_are_compared(made: Path, small: Path, tmp_path: Path) -> None:
    given = small_study(made)
    assert set(statuses(small).values()) == {"done"}, [
        (c.id, (read(small / "cells" / c.id) or {}).get("error")) for c in cells(given)
    ]
    content = write_report(given, small)
    assert content["counts"] == {"cells": len(cells(given)), "done": len(cells(given)), "failed": 0, "missing": 0}
    (base,) = content["places"]
    rows = {row["label"]: row for row in base["methods"]}
    assert [*rows] == ["base", "dpo (full)", "linear"]
    # These replies can be told apart by a word; a method that learns at all ranks them right.
    for label in ("dpo (full)", "linear"):
        assert rows[label]["accuracy"]["value"] > 0.9, label
        assert rows[label]["kl"]["value"] >= 0
    assert len(rows["dpo (full)"]["curves"][0]) > 1
    assert {entry["minus"] for entry in base["differences"]} == {"base", "dpo (full)"}
    assert all(entry["p"] <= entry["p_holm"] <= 1 for entry in base["differences"])
    assert content["untuned"] == ["dpo (full)"]
    assert "<script" not in (small / "report.html").read_text()
    assert summary_rows(content)[0][0] == "data, model"
    tex = (small / "report.tex").read_text()
    assert tex.count(r"\begin{tabular}") == tex.count(r"\end{tabular}") > 2
    notes: list[str] = []
    run(given, small, on_cell=lambda done, total, cell, note: notes.append(note))
    assert all(note.endswith("already done") for note in notes if ": " in note)
    # Nor where its files lie elsewhere; but not where what lies there is another model.
    moved = shutil.copytree(made, tmp_path / "moved")
    notes.clear()
    run(small_study(moved), small, on_cell=lambda done, total, cell, note: notes.append(note))
    assert notes
    assert all(note.endswith("already done") for note in notes if ": " in note)
    config = next(moved.rglob("config.json"))
    config.write_text(config.read_text() + " ")
    with pytest.raises(CoalaError, match="made with other settings"):
        run(small_study(moved), small)
    full = {"source": "trl", "adapter": False, "rates": [1e-3, 1e-2], "change": {**CHANGE, "clip": 2.0}}
    with pytest.raises(CoalaError, match="made with other settings"):
        run(small_study(made, settings={"full": full}), small)


@pytest.mark.nightly
def test_every_cell_is_done_and_reported(made: Path, whole: Path) -> None:
    given = study(made)
    assert set(statuses(whole).values()) == {"done"}, [
        (c.id, (read(whole / "cells" / c.id) or {}).get("error")) for c in cells(given)
    ]
    content = write_report(given, whole)
    assert content["counts"] == {"cells": len(cells(given)), "done": len(cells(given)), "failed": 0, "missing": 0}
    base, after = content["places"]
    labels = [row["label"] for row in base["methods"]]
    assert labels == ["base", "sft (full)", "dpo (full)", "reward (full)", "linear", "cvx-dpo", "adamw"]
    rows = {row["label"]: row for row in base["methods"]}
    # These replies can be told apart by a word; a method that learns at all ranks them right.
    for label in ("dpo (full)", "reward (full)", "linear"):
        assert rows[label]["accuracy"]["value"] > 0.9, label
    assert rows["linear"]["kl"]["value"] >= 0
    assert rows["dpo (full)"]["kl"]["value"] > 0
    assert [step for step, _ in rows["dpo (full)"]["curves"][0]] == sorted(
        {step for step, _ in rows["dpo (full)"]["curves"][0]}
    )
    assert len(rows["dpo (full)"]["curves"][0]) > 1
    assert {entry["minus"] for entry in base["differences"]} == set(labels) - {"linear"}
    assert all(entry["p"] <= entry["p_holm"] <= 1 for entry in base["differences"])
    assert after["init"] == "sft"
    assert content["untuned"] == ["dpo (full)", "reward (full)", "sft (full)"]
    page = (whole / "report.html").read_text()
    assert "cannot be reproduced" in page
    assert "<script" not in page
    assert summary_rows(content)[0][0] == "data, model"
    tex = (whole / "report.tex").read_text()
    assert tex.count(r"\begin{tabular}") == tex.count(r"\end{tabular}") > 4


def test_costs_are_counted_and_add_up(made: Path, small: Path) -> None:
    rows = {row["label"]: row["costs"] for row in content_of(small_study(made), small)["places"][0]["methods"]}
    dpo, linear = rows["dpo (full)"], rows["linear"]
    # Padding and fused attention's second look at its scores add to the formula, logits that TRL leaves out take off.
    assert 0.9 < dpo["counter"]["run"] / dpo["flops"]["run"] < 1.2
    assert dpo["flops"]["search"] < 2 * dpo["flops"]["run"]
    assert linear["counter"]["run"] == linear["counter"]["features"] + linear["counter"]["head"]
    assert linear["counter"]["features"] < 0.25 * dpo["counter"]["run"]
    assert linear["of"]["dpo (full)"]["flops"] == linear["counter"]["run"] / dpo["counter"]["run"]
    assert dpo["of"]["dpo (full)"]["flops"] == 1
    assert dpo["measured"]["seconds"]["mean"] > 0


def test_no_test_pair_decides_a_rate(made: Path, small: Path) -> None:
    found = read(small / "cells" / "d.tiny.base.dpo.full.s0")
    assert found is not None
    trials = found["result"]["trials"]
    n = {trial["accuracy"]["n"] for trial in trials}
    validation = (small / "data/d/validation.jsonl").read_text().count("\n")
    assert n == {validation}
    best = max(trials, key=lambda t: (t["accuracy"]["value"], -t["nll"], -t["rate"]))
    assert found["result"]["rate"] == best["rate"]


@pytest.mark.nightly
def test_a_fork_that_dies_says_why_and_processes_work_after_it(made: Path, small: Path) -> None:
    given = small_study(made)
    base = next(cell for cell in cells(given) if cell.kind == "base")
    gone = replace(base, id="gone")
    with Processes(given, small) as processes:
        assert processes.carry_out(gone) == (2, False)
        assert "StopIteration" in (small / "cells/gone/stderr.json").read_text()
        assert processes.carry_out(base) == (0, False)
        peak = next(cell for cell in cells(given) if says_peak(given, cell))
        assert processes.carry_out(peak) == (0, False)
    assert not (small / "cells" / base.id / "stderr.json").exists()
    shutil.rmtree(small / "cells/gone")


@pytest.mark.nightly
def test_peaks_are_those_of_processes_that_share_nothing(made: Path, whole: Path) -> None:
    given = study(made)
    told = {cell.id: (read(whole / "cells" / cell.id) or {})["costs"] for cell in cells(given)}
    for cell in cells(given):
        peaks = [
            part["measured"].get("peak_bytes") for part in told[cell.id].values() if "peak_bytes" in part["measured"]
        ]
        assert all(bool(peak) == says_peak(given, cell) for peak in peaks), cell.id
    assert any(not says_peak(given, cell) and told[cell.id] for cell in cells(given))
    rows = {row["label"]: row["costs"] for row in content_of(given, whole)["places"][0]["methods"]}
    measured = rows["dpo (full)"]["measured"]
    assert measured["peak_bytes"]["host"] > measured["own_bytes"]["host"] > 0


@pytest.mark.nightly
def test_cells_tell_how_far_they_are_from_forks_and_from_processes_begun_anew(made: Path, apart: Path) -> None:
    told = {(cell, stage) for cell, stage, *_ in json.loads((apart.parent / "told.json").read_text())}
    by_id = {cell.id: cell for cell in cells(small_study(made))}
    assert ("d.tiny.base.base", "replies") in told
    assert {says_peak(small_study(made), by_id[cell]) for cell, _ in told} == {True, False}


@pytest.mark.nightly
def test_killed_twice_and_resumed_it_reports_the_same(made: Path, apart: Path, tmp_path: Path) -> None:
    """The whole group is killed, first in the middle of a training, then in that of a head."""
    out, given = tmp_path / "out", small_study(made)
    about = tmp_path / "study.json"
    about.write_text(json.dumps(given.model_dump(mode="json")))
    code = (
        "import json, sys; from pathlib import Path; from coala.compare import run; "
        "from coala.compare.loading import study_of; "
        f"run(study_of(json.loads(Path({str(about)!r}).read_text())), Path({str(out)!r}))"
    )
    for waited in ("d.tiny.base.dpo.full.s0/trials/0.001.json", "d.tiny.base.linear.s0"):
        process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
        wait_for((out / "cells" / waited).exists, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert "missing" in statuses(out).values()
    run(given, out)
    assert set(statuses(out).values()) == {"done"}
    assert decided(content_of(given, out)) == decided(content_of(given, apart))


@pytest.mark.nightly
def test_a_second_run_does_nothing_and_a_grown_study_only_what_is_new(made: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(whole, out)
    notes: list[str] = []
    run(study(made), out, on_cell=lambda done, total, cell, note: notes.append(note))
    assert all(note.endswith("already done") for note in notes if ": " in note)
    with pytest.raises(CoalaError, match="made with other settings"):
        run(study(made, split={"test": 0.3, "validation": 0.3, "seed": 0}, beta=0.7), out)


@pytest.mark.nightly
def test_cells_without_memory_fail_with_their_plan_and_the_others_go_on(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = study(made, methods=[METHODS[3]], datasets={"d": {"pairs": [str(made / "pairs.jsonl")]}}, count_flops=False)
    run(given, out, memory=60_000_000)
    assert set(statuses(out).values()) == {"failed"}
    content = write_report(given, out)
    failed = {entry["cell"]: entry for entry in content["failures"]}
    assert "more than the 60,000,000 bytes" in failed["d.tiny.base.features-Llast-mean"]["error"]
    assert sum(failed["d.tiny.base.features-Llast-mean"]["plan"]["bytes"].values()) > 60_000_000
    assert "it needs" in failed["d.tiny.base.linear.s0"]["error"]
    page = (out / "report.html").read_text()
    assert "Cells that failed" in page
    run(given, out)
    assert set(statuses(out).values()) == {"failed"}, "failed cells are begun anew only when asked"
    run(given, out, retry=True)
    assert set(statuses(out).values()) == {"done"}


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("rates", "told"), [([1e30, 1e31], "diverged at every rate"), ([1e30], "not finite")], ids=["swept", "one rate"]
)
def test_training_that_diverges_at_every_rate_is_reported(
    made: Path, tmp_path: Path, rates: list[float], told: str
) -> None:
    out = tmp_path / "out"
    settings = {"full": {"source": "trl", "adapter": False, "rates": rates, "change": {**CHANGE, "clip": 1e30}}}
    given = study(
        made,
        settings=settings,
        methods=[METHODS[1]],
        datasets={"d": {"pairs": [str(made / "pairs.jsonl")]}},
    )
    run(given, out)
    failures = {entry["cell"]: entry["error"] for entry in content_of(given, out)["failures"]}
    assert told in failures["d.tiny.base.dpo.full.s0"]


@pytest.mark.nightly
def test_an_adapter_is_merged_into_what_others_start_from(made: Path, tmp_path: Path) -> None:
    import numpy as np

    from coala.backbone import load_backbone
    from coala.baselines import Lora, TrainSettings, log_likelihoods, train, whole_model

    settings = TrainSettings(
        learning_rate=1e-2, epochs=1, batch_size=4, bf16=False, gradient_checkpointing=False, lora=Lora(4, 8)
    )
    pairs = pairs_of(8)
    trained = train("sft", pairs, made / "model", out=tmp_path / "run", settings=settings, device="cpu")
    merged = load_backbone(whole_model(trained, tmp_path / "merged"), device="cpu")
    adapted, base = trained.backbone(device="cpu"), load_backbone(made / "model", device="cpu")
    found, wanted, before = (log_likelihoods(model, pairs, settings).chosen for model in (merged, adapted, base))
    assert np.abs(found - wanted).max() < 1e-4
    assert np.abs(found - before).max() > 1e-2
    assert merged.template == base.template
