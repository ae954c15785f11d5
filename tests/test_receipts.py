"""Receipts of a run: influence in its report, forgetting that leaves nothing behind, kills at every moment."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from coala.alignment import align_recipe, make_report
from coala.alignment.fitting import fit_settings
from coala.cli import app
from coala.convex.forgetting import forget
from coala.receipts import forget_pairs, pair_influence
from coala.receipts.forgetting import RECORDED
from coala.recipe import load_recipe
from coala.report import Evaluation, add_evaluation
from coala.store import (
    RunFolder,
    StoreError,
    file_digest,
    link_features,
    load_features,
    load_head,
    load_json,
    load_lines,
    load_pairs,
    save_features,
    save_head,
    save_json,
    save_lines,
    save_pairs,
)
from coala.values import CoalaError, FeatureSet, Pair, user

from .menagerie import tiny_backbone
from .menagerie_convex import pairs_of
from .test_align import pair_rows, write_rows
from .test_influence import solved

N, HELD_OUT, D = 40, 16, 4


def a_pair(i: int) -> Pair:
    return Pair(user(f"what is {i // 2}?"), f"a fine reply {i}", f"a poor reply {i}", f"g{i // 2}", f"r{i % 3}")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of features that are drawn: everything a run holds but a model."""
    run = RunFolder(tmp_path_factory.mktemp("runs") / "run")
    rng = np.random.default_rng(0)
    direction = rng.standard_normal(D)
    both = pairs_of(lambda x: 1.5 * x @ direction, N + HELD_OUT, D, rng, per_group=2, shift=1.0)
    pairs = [a_pair(i) for i in range(N + HELD_OUT)]
    recipe = load_recipe(None, {"pairs": ["pairs.jsonl"], "model": {"name": "no-model"}}, {})
    run.start(recipe.plain())
    for name, rows in (("train", np.arange(N)), ("eval", np.arange(N, N + HELD_OUT))):
        save_pairs(run.path / f"pairs-{name}.jsonl", [pairs[i] for i in rows])
        save_features(run.path / "features" / name, both.take(rows))
    head = solved(load_features(run.path / "features/train"))
    save_head(run.path / "head", head)
    save_json(run.path / "head/fit.json", {"path": [], "history": [], "linear": head.linear})
    files = {
        "pairs": ["pairs-train.jsonl", "pairs-eval.jsonl"],
        "features-train": ["features/train/features.safetensors", "features/train/features.json"],
        "features-eval": ["features/eval/features.safetensors", "features/eval/features.json"],
        "head": ["head/head.safetensors", "head/head.json", "head/fit.json"],
    }
    read: dict[str, dict[str, Any]] = {
        "pairs": {"pairs": ["the source"]},
        **{f"features-{part}": {"pairs": file_digest(run.path / f"pairs-{part}.jsonl")} for part in ("train", "eval")},
        "head": {"features": file_digest(run.path / "features/train/features.safetensors")},
    }
    quoted = {
        "findings": [{"severity": "note", "text": "a fine reply 0 is short"}],
        "reads": ["example: a fine reply 0"],
    }
    for stage, names in files.items():
        run.finish(stage, read[stage], names, {"seconds": 0.0, **quoted})
    save_lines(run.path / "generations-unguided.jsonl", [])
    save_lines(run.path / "generations-guided.jsonl", [])
    evaluation = Evaluation("arena", "run", "an arena", "coala eval arena", [], {"head": run.path / "head/head.json"})
    make_report(run)
    add_evaluation(run, evaluation)
    return run.path


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def remaining(features: FeatureSet, gone: set[int], first: int = 0) -> FeatureSet:
    return features.take(np.array([i not in gone for i in range(first, first + len(features))]))


# --- influence ---------------------------------------------------------------------------------------------------


def test_influence_is_kept_shown_and_stale_once_the_head_is_another(run: Path, tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    result = CliRunner().invoke(app, ["influence", str(run), "--top", "3", "--attack", "3", "--out", str(lines)])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    rows = list(load_lines(lines))
    assert len(rows) == N
    for side, sign in (("raises", 1), ("lowers", -1)):
        listed = found["lists"][side]
        assert listed["proved"] == len(listed["rows"]) == 3
        best = sorted(rows, key=lambda row: -sign * row["change"])[:3]
        assert {row["name"] for row in best} == {row["name"] for row in listed["rows"]}
        assert all(max(sign * row["effect"], 0) >= listed["outside"] - 1e-9 for row in listed["rows"])
    page = (run / "report.html").read_text()
    assert "The pairs that helped most" in page
    assert "Proved complete" in page
    assert found["lists"]["raises"]["rows"][0]["chosen"] in page
    assert "Made with another head" not in page
    again = replace(load_head(run / "head"), linear=load_head(run / "head").linear * 1.01)
    save_head(run / "head", again)
    make_report(RunFolder(run))
    assert "Made with another head" in (run / "report.html").read_text()


@pytest.mark.parametrize(("by", "units"), [("group", N // 2), ("rater", 3)])
def test_groups_and_raters_are_left_out_whole(run: Path, by: Any, units: int) -> None:
    found = pair_influence(run, by=by, top=2, metric="accuracy")
    assert found["units"] == units
    names = {pair.group if by == "group" else pair.rater for pair in load_pairs(run / "pairs-train.jsonl")}
    for side in ("raises", "lowers"):
        assert {row["name"] for row in found["lists"][side]["rows"]} <= names
    # As a refit of the others says, at the same ridge and in the same coordinates.
    for row in found["lists"]["raises"]["rows"]:
        assert len(row["lines"]) == row["pairs"] == (2 if by == "group" else row["pairs"])


def test_the_margin_of_a_held_out_pair_is_measured(run: Path) -> None:
    head, held_out = load_head(run / "head"), load_features(run / "features/eval")
    found = pair_influence(run, pair=2, top=1)
    assert found["value"] == pytest.approx(float(head.margins(held_out)[1]), abs=1e-5)
    with pytest.raises(CoalaError, match=f"1 to {HELD_OUT}"):
        pair_influence(run, pair=HELD_OUT + 1)
    with pytest.raises(CoalaError, match="expected one of them"):
        pair_influence(run, pair=1, reply="x")
    with pytest.raises(CoalaError, match="give --prompt"):
        pair_influence(run, reply="x")


# --- forgetting --------------------------------------------------------------------------------------------------


def test_forgetting_leaves_nothing_of_the_pairs(run: Path) -> None:
    train, held_out = load_features(run / "features/train"), load_features(run / "features/eval")
    before = {name: file_digest(run / name) for name in RECORDED}
    old = load_head(run / "head")
    pair_influence(run)  # whose receipt quotes pairs
    (run / "head" / ".head.json.x.tmp").write_text("a fine reply 1")  # what a kill left
    (run / "distilled" / "states-1").mkdir(parents=True)  # a teacher's states are of the pairs' own replies
    (run / "distilled" / "states-1" / "chosen.bin").write_bytes(train.chosen[2].tobytes())
    run.with_name("run-served.gguf").write_text("of the old head")
    gone = {2, 3, N, N + 1}
    result = CliRunner().invoke(app, ["forget", str(run), "--group", "g1", "--group", f"g{N // 2}"])
    assert result.exit_code == 0, result.output
    receipt = json.loads(result.stdout.splitlines()[-1])
    assert (receipt["removed_train"], receipt["removed_held_out"]) == (2, 2)
    texts = [text.encode() for i in gone for text in (f'a fine reply {i}"', f'a poor reply {i}"', f"what is {i // 2}?")]
    vectors = [
        array[i - first].tobytes()
        for features, first in ((train, 0), (held_out, N))
        for i in gone
        if first <= i < first + len(features)
        for array in (features.chosen, features.rejected)
    ]
    for path in run.rglob("*"):
        if path.is_file():
            raw = path.read_bytes()
            assert not [piece for piece in [*texts, *vectors] if piece in raw], path
    assert receipt["digests"]["before"] == before
    assert receipt["digests"]["after"] == {name: file_digest(run / name) for name in RECORDED}
    expected = forget(remaining(train, gone), old)
    np.testing.assert_array_equal(load_head(run / "head").linear, expected.head.linear)
    assert receipt["distance"] == pytest.approx(expected.distance)
    assert receipt["distance"] <= receipt["bound"]
    assert receipt["gap_after"] <= 1e-9 < receipt["gap_before"]
    left = load_features(run / "features/eval")
    np.testing.assert_array_equal(left.chosen, remaining(held_out, gone, N).chosen)
    moved = np.abs(load_head(run / "head").margins(left) - old.margins(left)).max()
    assert receipt["margins_moved"] == pytest.approx(float(moved))
    # What was made from the old head is gone or called stale.
    assert not (run / "generations-guided.jsonl").exists()
    assert not list((run / "receipts").glob("influence-*"))
    assert not (run / "distilled").exists()
    for made in ("an arena", "distilled: deleted", "run-served.gguf: exported from the old head"):
        assert any(made in line for line in receipt["stale_files"]), made
    assert "Stale: made with the head before" in (run / "report.html").read_text()
    # Every stage is done on what remains: nothing is read or fitted again.
    folder = RunFolder.open(run)
    for stage in ("pairs", "features-train", "features-eval", "head"):
        record = folder.record(stage)
        assert record is not None
        assert folder.done(stage, record["inputs"])
    assert folder.record("head")["inputs"]["features"] == file_digest(run / "features/train/features.safetensors")  # type: ignore[index]
    assert len(folder.forgotten) == 4


def test_what_a_session_of_clicks_keeps_is_not_claimed(run: Path) -> None:
    (run / "live").mkdir()
    receipt = forget_pairs(run, groups=["g1"])
    assert receipt["claimed"][0].startswith("Outside of live, no file of this run holds the pairs")
    assert any("keeps every click" in line for line in receipt["not_claimed"])


@pytest.mark.nightly
def test_pairs_are_named_by_rater_file_or_line(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "gone.jsonl"
    save_pairs(file, [a_pair(5)])
    result = CliRunner().invoke(app, ["forget", str(run), "--pairs", str(file), "--line", "1"])
    assert result.exit_code == 0, result.output
    assert [pair.chosen for pair in load_pairs(run / "pairs-train.jsonl")][:5] == [
        f"a fine reply {i}" for i in (1, 2, 3, 4, 6)
    ]
    receipt = forget_pairs(run, raters=["r2"])
    assert "r2" not in {pair.rater for pair in load_pairs(run / "pairs-train.jsonl")}
    assert receipt["remaining_train"] == len(load_features(run / "features/train")) == 26
    assert len(list((run / "receipts").glob("forget-*.json"))) == 2
    assert (
        len(RunFolder.open(run).forgotten) == N + HELD_OUT - receipt["remaining_train"] - receipt["remaining_held_out"]
    )


def test_what_cannot_be_forgotten_is_said_and_changes_nothing(run: Path) -> None:
    before = file_digest(run)
    everyone = [f"g{i}" for i in range(N // 2)]
    refused: list[tuple[dict[str, Any], str]] = [
        ({"groups": ["nobody"]}, "found group 'nobody'"),
        ({"raters": ["nobody"]}, "found rater 'nobody'"),
        ({"pairs": [a_pair(999)]}, "found 1 of 1 pairs"),
        ({"lines": [0]}, "found line 0"),
        ({}, "nothing to forget"),
        ({"groups": everyone}, "all 40 pairs to fit on"),
        ({"groups": [f"g{i}" for i in range(N // 2, (N + HELD_OUT) // 2)]}, "all 16 pairs to measure on"),
    ]
    for asked, message in refused:
        with pytest.raises(CoalaError, match=message):
            forget_pairs(run, **asked)
    assert file_digest(run) == before
    shutil.rmtree(run / "features" / "train")
    with pytest.raises(StoreError, match="found no features"):
        forget_pairs(run, groups=["g1"])
    with pytest.raises(StoreError, match="found no features"):
        pair_influence(run)


@pytest.mark.nightly
def test_copies_in_a_cache_go_too_and_others_are_told(run: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for name, part in (("a", "train"), ("b", "eval")):
        link_features(run / "features" / part, cache / name)
    link_features(run / "features/train", tmp_path / "elsewhere")
    receipt = forget_pairs(run, groups=["g1"], cache=cache)
    assert [path.name for path in cache.iterdir()] == []
    assert any("features/train have 1 more name" in text for text in receipt["not_claimed"])
    assert not any("features/eval have" in text for text in receipt["not_claimed"])


def state(run: Path) -> Mapping[str, str]:
    """What a reader who opens the run finds."""
    RunFolder.open(run)
    return {name: file_digest(run / name) for name in (*RECORDED, "stages") if (run / name).exists()}


def killed_at(step: int, work: Callable[[], object]) -> bool:
    """Do ``work`` in a process that is killed for good at its ``step``-th change of a name; whether it was."""
    child = os.fork()
    if child == 0:
        left = step

        def counted(change: Callable[..., Any]) -> Callable[..., Any]:
            def called(*args: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return change(*args, **options)

            return called

        os.replace, os.unlink, os.rmdir = map(counted, (os.replace, os.unlink, os.rmdir))
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def kill_everywhere(made: Path, tmp_path: Path, steps: Iterable[int]) -> set[str]:
    """The states that are found after kills at ``steps``, each followed by forgetting again."""
    whole = Path(shutil.copytree(made, tmp_path / "whole"))
    old = state(whole)
    forget_pairs(whole, groups=["g1"])
    new = state(whole)
    found = set()
    for step in steps:
        run = Path(shutil.copytree(made, tmp_path / f"killed-{step}"))
        if not killed_at(step, lambda run=run: forget_pairs(run, groups=["g1"])):  # type: ignore[misc]
            break
        here = state(run)
        assert here in (old, new), step
        found.add("old" if here == old else "new")
        if here == old:
            forget_pairs(run, groups=["g1"])
            assert state(run) == new
        with RunFolder(run).held():  # whoever works in it next sweeps
            assert not (run / ".pending").exists()
        assert not [path for path in run.rglob("*") if path.is_file() and b'a fine reply 2"' in path.read_bytes()]
        shutil.rmtree(run)
    return found


def test_a_run_killed_while_it_forgets_is_the_old_or_the_new_one(made: Path, tmp_path: Path) -> None:
    assert kill_everywhere(made, tmp_path, (4, 30)) == {"old", "new"}


@pytest.mark.nightly
def test_killed_at_any_change_of_a_name_it_is_the_old_or_the_new_one(made: Path, tmp_path: Path) -> None:
    assert kill_everywhere(made, tmp_path, range(1, 200, 3)) == {"old", "new"}


# --- on a model --------------------------------------------------------------------------------------------------


@pytest.mark.nightly
def test_a_real_run_forgets_goes_on_and_does_not_read_again(tmp_path: Path) -> None:
    model = tiny_backbone("llama", tmp_path / "model")
    rows = pair_rows(60, 20)
    source = write_rows(tmp_path / "pairs.jsonl", rows)
    base = {"pairs": [str(source)], "eval_fraction": 0.25, "model": {"name": str(model), "device": "cpu"}}
    recipe = load_recipe(None, {**base, "evaluation": {"prompts": 2, "max_new_tokens": 4}}, {})
    run = RunFolder(tmp_path / "run")
    align_recipe(recipe, run)
    scored = pair_influence(run.path, reply="good fine", prompt="tell me story 1", top=2)
    assert scored["lists"]["raises"]["rows"]
    pairs = load_pairs(run.path / "pairs-train.jsonl")
    gone = [pair for pair in pairs if pair.group == pairs[0].group]
    features = load_features(run.path / "features/train")
    receipt = forget_pairs(run.path, groups=[pairs[0].group], from_scratch=True)
    # A fit that never saw them, byte for byte.
    rest = features.take(np.array([pair not in gone for pair in pairs]))
    fresh = fit_settings(rest, recipe.head, seed=recipe.seed, near=tmp_path, on_step=lambda *told: None).head
    head = load_head(run.path / "head")
    for name in ("linear", "gates", "weights", "temperature"):
        np.testing.assert_array_equal(getattr(head, name), getattr(fresh, name))
    assert receipt["removed_train"] == len(gone)
    kept = file_digest(run.path / "head")
    content = align_recipe(recipe, run)  # only the replies are written again
    assert file_digest(run.path / "head") == kept
    assert content["summary"]["n_train"] == len(pairs) - len(gone)
    assert (run.path / "generations-guided.jsonl").exists()
    # The source changes but still has the pairs: they are not read again.
    write_rows(source, [*rows, *pair_rows(4, 4, seed=1)])
    align_recipe(recipe, run)
    everyone = [*load_pairs(run.path / "pairs-train.jsonl"), *load_pairs(run.path / "pairs-eval.jsonl")]
    assert not {pair.chosen for pair in gone} & {pair.chosen for pair in everyone}
    assert load_json(run.path / "forgotten.json")["pairs"]


@pytest.mark.nightly
def test_a_head_with_gates_keeps_them_and_says_so(run: Path) -> None:
    train = load_features(run / "features/train")
    rng = np.random.default_rng(2)
    gates = np.concatenate([rng.standard_normal((1, D)), np.zeros((1, 1))], axis=1)
    head = solved(train, gates=gates)
    assert head.n_neurons == 1
    assert np.abs(head.weights).max() > 0
    save_head(run / "head", head)
    told: list[str] = []
    found = pair_influence(run, top=2, on_note=told.append)
    assert any("--from-scratch" in line for line in told)
    assert len(found["lists"]["raises"]["rows"]) == 2
    with pytest.raises(CoalaError, match="expected a linear one"):
        pair_influence(run, attack=2)
    receipt = forget_pairs(run, lines=[1, 2])
    new = load_head(run / "head")
    np.testing.assert_array_equal(new.gates, head.gates)
    assert receipt["bound"] is None
    assert receipt["beside"]["log_odds_apart"] >= 0  # what gates chosen again would give
    assert "Gates chosen again would give" in (run / "report.html").read_text()
    assert any("gates were" in text for text in receipt["not_claimed"])
    assert receipt["gap_after"] <= 1e-8
    linear = np.asarray(load_json(run / "head/fit.json")["linear"])
    assert np.abs(linear - new.linear).max() > 0  # the linear control is a head of its own
