"""What a tracker is told comes back from the tracker itself, and one that fails ends no run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from coala import trackers
from coala.trackers import numbers_of, tracking
from coala.values import CoalaError, Estimate

SETTINGS = {"model": {"name": "film-lm", "layer": -1}, "pairs": ["a.jsonl"], "head": {"tolerance": 1e-4}}
FOUND = {"accuracy": Estimate(0.75, 0.5, 1.0, 4, "Wilson"), "none": float("nan"), "pairs": 4, "text": "not a number"}


def told(name: Any, run: Path, **options: Any) -> list[str]:
    """A small run told to the tracker ``name``; the lines it says."""
    notes: list[str] = []
    with tracking(name, run, SETTINGS, on_note=notes.append, **options) as found:
        show = found.following()
        for done in range(301):
            show("fit", done, 300)
        found.log({"loss": 0.5, "rates": [1, 2]})
        found.log({"loss": 0.25})
        found.summarise(FOUND)
    return notes


def test_numbers_are_those_of_values_and_mappings_and_nothing_else() -> None:
    assert numbers_of(FOUND) == {
        "accuracy/value": 0.75,
        "accuracy/low": 0.5,
        "accuracy/high": 1.0,
        "accuracy/n": 4.0,
    } | {"pairs": 4.0}


def test_lines_hold_settings_every_step_and_the_summary(tmp_path: Path) -> None:
    (note,) = told("jsonl", tmp_path / "mine")
    lines = [json.loads(line) for line in (tmp_path / "mine.tracking.jsonl").read_text().splitlines()]
    assert str(tmp_path / "mine.tracking.jsonl") in note
    assert lines[0] == {"settings": SETTINGS}
    assert lines[-1] == {"summary": numbers_of(FOUND), "finished": True}
    steps = lines[1:-1]
    assert [line["step"] for line in steps] == list(range(102))
    assert [line.get("percent/fit") for line in steps[:100]] == list(range(1, 101))  # however often it was shown
    assert [line["loss"] for line in steps[100:]] == [0.5, 0.25]


def test_a_run_that_fails_is_told_as_one(tmp_path: Path) -> None:
    with pytest.raises(CoalaError, match="of the run"), tracking("jsonl", tmp_path / "mine", {}):
        raise CoalaError("of the run")
    last = (tmp_path / "mine.tracking.jsonl").read_text().splitlines()[-1]
    assert json.loads(last) == {"finished": False, "summary": {}}


def test_nobody_is_told_without_a_tracker(tmp_path: Path) -> None:
    assert told(None, tmp_path / "mine") == []
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_fails_at_its_start_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (note,) = told("jsonl", tmp_path / "file" / "mine")
    assert note.startswith("jsonl failed (")
    assert note.endswith("; the run continues without it")


def test_a_tracker_that_fails_later_is_told_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(trackers.Lines):
        def log(self, numbers: Mapping[str, float], step: int) -> None:
            if step == 3:
                raise OSError("no space left")
            super().log(numbers, step)

    monkeypatch.setitem(trackers._TRACKERS, "jsonl", Full)  # type: ignore[arg-type]
    assert told("jsonl", tmp_path / "mine") == ["jsonl failed (no space left); the run continues without it"]
    assert len((tmp_path / "mine.tracking.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("name", ["mlflow", "trackio", "wandb"])
def test_a_package_that_is_not_there_is_named_before_anything_is_done(
    name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with (
        pytest.raises(CoalaError, match=rf"pip install 'coala-align\[{name}\]'"),
        tracking(name, tmp_path / "mine", {}),
    ):
        pytest.fail("the run began")


# --- the commands ------------------------------------------------------------------------------------------------


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def command(*words: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "coala", *map(str, words)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.nightly
def test_align_tells_its_settings_its_stages_and_its_summary(tmp_path: Path) -> None:
    from tests.menagerie import tiny_backbone
    from tests.test_align import pair_rows, write_rows

    model = tiny_backbone("llama", tmp_path / "model")
    source = write_rows(tmp_path / "pairs.jsonl", pair_rows(60, 20))
    words = ("--prompts", 2, "--max-new-tokens", 4, "--track", "jsonl")
    command("align", source, "--model", model, "--out", tmp_path / "run", *words)
    first, *steps, last = lines_of(tmp_path / "run.tracking.jsonl")
    assert first["settings"]["evaluation"]["prompts"] == 2
    assert {"percent/features-train", "percent/head"} <= {name for line in steps for name in line}
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    expected = numbers_of(report["summary"]) | numbers_of({"perplexity": report["perplexity"]})
    assert last == {"summary": expected, "finished": True}
    assert {"accuracy_eval/value", "accuracy_eval/low", "perplexity/guided/value"} <= set(expected)


@pytest.mark.nightly
def test_compare_tells_each_cell_as_its_file_has_it(tmp_path: Path) -> None:
    from tests.menagerie import tiny_backbone
    from tests.test_align import pair_rows, write_rows

    tiny_backbone("llama", tmp_path / "model")
    write_rows(tmp_path / "pairs.jsonl", pair_rows(60, 20))
    study = {
        "title": "tiny",
        "models": {"tiny": {"path": str(tmp_path / "model"), "max_tokens": 64}},
        "datasets": {"d": {"pairs": [str(tmp_path / "pairs.jsonl")]}},
        "methods": [{"name": "linear", "kind": "coala", "head": {"method": "linear"}, "guidance": None}],
        "seeds": [0],
        "evaluation": {"prompts": 2, "max_new_tokens": 4, "kl_prompts": 2},
        "device": "cpu",
    }
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    command("compare", tmp_path / "study.yaml", "--out", tmp_path / "out", "--track", "jsonl")
    told = {name: value for line in lines_of(tmp_path / "out.tracking.jsonl") for name, value in line.items()}
    cells = {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "out").glob("cells/*/cell.json")}
    assert cells
    for name, cell in cells.items():
        assert cell["status"] == "done"
        expected = numbers_of({name: cell["result"]})
        assert {key: told[key] for key in expected} == expected


# --- the trackers' own libraries, in processes of their own: they keep threads, and settings of the environment ----


def in_a_process(name: str, folder: Path, read: str) -> Any:
    """What ``read`` prints as JSON after a run told to ``name`` in ``folder``; nothing else may be on stdout."""
    pytest.importorskip(name, reason=f"the extra {name} brings it")
    code = f"from tests.test_trackers import *\nnotes = told({name!r}, Path({str(folder / 'mine')!r}))\n{read}"
    kept = {"TRACKIO_DIR": str(folder / "trackio"), "HOME": str(folder), "MLFLOW_DISABLE_TELEMETRY": "true"}
    kept |= {"MLFLOW_ALLOW_FILE_STORE": "true"}
    shut = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "WANDB_ERROR_REPORTING": "false"}
    root = Path(__file__).resolve().parent.parent
    path = os.pathsep.join([str(root / "src"), str(root)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **kept, **shut, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.nightly
def test_mlflow_gives_back_what_it_was_told(tmp_path: Path) -> None:
    read = f"""
from mlflow import MlflowClient
client = MlflowClient(tracking_uri={(tmp_path / "mlruns").as_uri()!r})
(run,) = client.search_runs([client.get_experiment_by_name("coala").experiment_id])
losses = [one.value for one in client.get_metric_history(run.info.run_id, "loss")]
print(json.dumps([notes, run.info.status, run.info.run_name, run.data.params, run.data.metrics, losses]))"""
    notes, status, name, params, metrics, losses = in_a_process("mlflow", tmp_path, read)
    assert (status, name, losses) == ("FINISHED", "mine", [0.5, 0.25])
    assert params == {"model.name": "film-lm", "model.layer": "-1", "pairs": "['a.jsonl']", "head.tolerance": "0.0001"}
    assert metrics["percent/fit"] == 100
    assert {name: metrics[f"summary/{name}"] for name in numbers_of(FOUND)} == numbers_of(FOUND)
    assert len(notes) == 1
    assert "mlflow ui" in notes[0]


@pytest.mark.nightly
def test_wandb_keeps_what_it_was_told_and_stays_offline(tmp_path: Path) -> None:
    read = f"""
from wandb.proto.wandb_internal_pb2 import Record
(file,) = Path({str(tmp_path)!r}).glob("wandb/offline-run-*/run-*.wandb")
records = [Record.FromString(one) for one in logged(file.read_bytes())]
history = [{{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in one.history.item}} for one in records]
(config,) = [{{i.key: json.loads(i.value_json) for i in one.run.config.update}} for one in records if one.run.run_id]
found = {{i.key or "/".join(i.nested_key): json.loads(i.value_json) for one in records for i in one.summary.update}}
print(json.dumps([notes, history, config, found]))"""
    (note,), history, config, summary = in_a_process("wandb", tmp_path, read)
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert f"wandb sync {folder}" in note
    assert [row["loss"] for row in history if "loss" in row] == [0.5, 0.25]
    assert [row["percent/fit"] for row in history if "percent/fit" in row] == list(range(1, 101))
    assert {name: config[name] for name in SETTINGS} == SETTINGS
    assert {name: summary[name] for name in numbers_of(FOUND)} == numbers_of(FOUND)


def logged(raw: bytes) -> Iterator[bytes]:
    """The records of wandb's file: a head of 7 bytes, then LevelDB's log of blocks of 32 KiB."""
    place, parts = 7, b""
    while place + 7 <= len(raw):
        if 32768 - place % 32768 < 7:  # what is left of a block holds no record
            place += 32768 - place % 32768
            continue
        size, kind = int.from_bytes(raw[place + 4 : place + 6], "little"), raw[place + 6]
        parts += raw[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


@pytest.mark.nightly
def test_trackio_gives_back_what_it_was_told(tmp_path: Path) -> None:
    read = """
from trackio.sqlite_storage import SQLiteStorage
(run,) = SQLiteStorage.get_runs("coala")
print(json.dumps([notes, run, SQLiteStorage.get_logs("coala", run)], default=str))"""
    notes, run, logs = in_a_process("trackio", tmp_path, read)
    assert run == "mine"
    assert [row["loss"] for row in logs if "loss" in row] == [0.5, 0.25]
    assert [row["percent/fit"] for row in logs if "percent/fit" in row] == list(range(1, 101))
    assert {name: logs[-1][f"summary/{name}"] for name in numbers_of(FOUND)} == numbers_of(FOUND)
    assert len(notes) == 1
