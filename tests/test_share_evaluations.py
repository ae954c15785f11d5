"""A run's evaluations in the Hub's form and in Every Eval Ever's, held to those projects' own schemas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from coala.export.evaluations import share_evaluations
from coala.recipe import load_recipe
from coala.report.evaluations import Contrast, Evaluation, Measure, Side, save_evaluation
from coala.store import RunFolder
from coala.values import CoalaError, Estimate

RATE = Estimate(0.625, 0.5, 0.75, 40, "Wilson")
LOSS = Estimate(0.5, 0.25, 0.75, 40, "bootstrap over groups")
MORE = Estimate(0.125, 0.1, 0.2, 40, "paired")
NONE = Estimate(float("nan"), 0.0, 1.0, 0, "Wilson")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "mine")
    made.start(load_recipe(None, {"pairs": ["x"], "model": {"name": "/models/film-lm"}}, {}).plain())
    replies = tmp_path / "mine" / "replies.jsonl"
    replies.write_text("{}\n")
    judged = Evaluation(
        kind="judge",
        of="guided against unguided",
        title="Judged by words",
        command="coala eval judge mine",
        measures=[
            Measure("win rate", RATE, "share", 0.5),
            Measure("log loss (nats per pair)", LOSS, "plain"),
            Measure("excluding ties", NONE, "percent"),
            Measure("position bias", RATE),
        ],
        contrasts=[Contrast("short sentences", [Side("unguided", LOSS), Side("guided", RATE, MORE)])],
        files={"replies": replies},
        judge={"name": "words"},
        settings={"seed": 0},
    )
    save_evaluation(made, judged)
    return made


def shared(run: RunFolder, out: Path, **options: Any) -> Any:
    return share_evaluations(run.path, out, model="me/film-guided", organisation="Me", **options)


def test_every_number_keeps_its_value_its_interval_and_its_n(run: RunFolder, tmp_path: Path) -> None:
    (path,) = shared(run, tmp_path / "out").every_eval_ever
    record = json.loads(path.read_text())
    results = {one["metric_config"]["metric_name"]: one for one in record["evaluation_results"]}
    assert list(results) == ["win rate", "log loss (nats per pair)", "short sentences"]
    for name, estimate in {"win rate": RATE, "log loss (nats per pair)": LOSS, "short sentences": RATE}.items():
        score = results[name]["score_details"]
        interval = score["uncertainty"]["confidence_interval"]
        assert (score["score"], interval["lower"], interval["upper"]) == (estimate.value, estimate.low, estimate.high)
        assert score["uncertainty"]["num_samples"] == estimate.n
    assert [one["metric_config"]["lower_is_better"] for one in results.values()] == [False, True, False]
    details = results["short sentences"]["score_details"]["details"]
    assert (details["unguided value"], details["less unguided value"]) == ("0.5", "0.125")
    assert "/models" not in path.read_text()  # where a model lay is nobody else's business


def test_what_has_no_value_or_no_data_set_is_named(run: RunFolder, tmp_path: Path) -> None:
    found = shared(run, tmp_path / "out")
    assert found.hub == ()
    assert any("excluding ties has no value" in line for line in found.left_out)
    assert any(".eval_results" in line for line in found.left_out)


def test_the_hub_reads_its_form_back(run: RunFolder, tmp_path: Path) -> None:
    from huggingface_hub import parse_eval_result_entries

    (path,) = shared(run, tmp_path / "out", datasets={"judge": "someone/prompts:films"}).hub
    assert path.parent.name == ".eval_results"
    (entry,) = parse_eval_result_entries(yaml.safe_load(path.read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("someone/prompts", "films", 62.5)
    assert entry.notes is not None
    assert "[50, 75], n = 40, Wilson" in entry.notes


def test_files_written_again_replace_themselves(run: RunFolder, tmp_path: Path) -> None:
    first, again = (shared(run, tmp_path / "out") for _ in range(2))
    assert first.every_eval_ever == again.every_eval_ever
    assert len(list((tmp_path / "out").rglob("*.json"))) == 1


def test_every_eval_ever_takes_the_record(run: RunFolder, tmp_path: Path) -> None:
    pytest.importorskip("every_eval_ever", reason="its package needs Python 3.12")
    from every_eval_ever.validator.validation_core import validate_aggregate

    (path,) = shared(run, tmp_path / "out", datasets={"judge": "someone/prompts"}).every_eval_ever
    report = validate_aggregate(path, repo_path=path.relative_to(tmp_path / "out").as_posix(), run_semantic_checks=True)
    assert report.valid, report.errors
    assert report.warnings == []


def test_an_evaluation_of_other_files_is_left_out(run: RunFolder, tmp_path: Path) -> None:
    (run.path / "replies.jsonl").write_text("{}\n{}\n")
    found = shared(run, tmp_path / "out")
    assert found.every_eval_ever == ()
    assert any("evaluate again" in line for line in found.left_out)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": "film"}, "owner/name"),
        ({"datasets": {"judge": "nowhere"}}, "owner/name"),
        ({"datasets": {"arena": "a/b"}}, "expected one for judge"),
    ],
)
def test_names_that_are_none_are_refused(run: RunFolder, tmp_path: Path, options: Any, said: str) -> None:
    given = {"model": "me/film", "organisation": "Me", **options}
    with pytest.raises(CoalaError, match=said):
        share_evaluations(run.path, tmp_path / "out", **given)
