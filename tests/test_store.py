"""The store: round trips, atomic writes, digests, and the run folder's promises."""

from __future__ import annotations

import errno
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coala.store import (
    FeatureStore,
    RunFolder,
    StoreError,
    digest,
    file_digest,
    load_features,
    load_generations,
    load_head,
    load_judgements,
    load_pairs,
    plain,
    save_features,
    save_generations,
    save_head,
    save_judgements,
    save_pairs,
    write_atomic,
)
from coala.values import Certificate, ConvexHead, Estimate, FeatureSet, FeatureSpec, Generation, Judgement, Pair, Turn

SPEC = FeatureSpec("model", "", "weights", "chat:0", 3, "mean", False, 64)
CERTIFICATE = Certificate(
    program="pairwise",
    statement="No other weights are better.",
    objective=0.5,
    lower_bound=0.4999,
    violation=0.0,
    n_patterns=2,
    status="converged",
    tolerance=1e-4,
    precision="float32",
    seed=3,
    versions={"numpy": "2"},
    facts={"method": "learnt", "cv": {"folds": 4, "linear": None}},
)
# Lone surrogates are refused by the readers, so they never reach the store.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
PAIRS = st.builds(
    Pair,
    prompt=st.lists(
        st.builds(Turn, st.sampled_from(["system", "user", "assistant"]), TEXT), min_size=1, max_size=4
    ).map(tuple),
    chosen=TEXT,
    rejected=TEXT,
    group=TEXT,
)


@given(pairs=st.lists(PAIRS, max_size=5))
def test_pairs_round_trip(pairs: list[Pair], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    save_pairs(path, pairs)
    assert load_pairs(path) == pairs


@pytest.mark.parametrize("gate_on", ["reply", "prompt"])
def test_heads_round_trip(gate_on: Any, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    arrays = [draw.normal(size=shape) for shape in ((2, 5), (2, 5), 5)]
    head = ConvexHead(*arrays, SPEC, gate_on=gate_on, temperature=0.7, certificate=CERTIFICATE)
    save_head(tmp_path / "head", head)
    loaded = load_head(tmp_path / "head")
    assert (loaded.spec, loaded.gate_on, loaded.temperature) == (SPEC, gate_on, 0.7)
    assert loaded.certificate == CERTIFICATE
    for name in ("gates", "weights", "linear"):
        assert getattr(loaded, name).tobytes() == getattr(head, name).tobytes()
    save_head(tmp_path / "bare", replace(head, certificate=None))
    assert load_head(tmp_path / "bare").certificate is None


def test_heads_of_before_still_load(tmp_path: Path) -> None:
    save_head(tmp_path, ConvexHead(np.ones((2, 3)), np.ones((2, 3)), np.ones(3), SPEC))
    about = json.loads((tmp_path / "head.json").read_text())
    kept = {name: about[name] for name in ("spec", "sha256")}
    known = {"objective": 0.5, "lower_bound": 0.4, "status": "converged", "tolerance": 1e-4, "seed": 0}
    old = {**known, "method": "two-phase", "n_neurons": 2, "statement": "S", "gap": 0.1, "cv": {"folds": 4}}
    (tmp_path / "head.json").write_text(json.dumps({**kept, "certificate": old}))
    loaded = load_head(tmp_path)
    assert (loaded.gate_on, loaded.temperature) == ("reply", 1.0)
    found = loaded.certificate
    assert found is not None
    assert (found.program, found.n_patterns, found.gap, found.precision) == ("two-phase", 2, 0.5 - 0.4, "unknown")
    assert found.facts == {"method": "two-phase", "n_neurons": 2, "gap": 0.1, "cv": {"folds": 4}}
    (tmp_path / "head.json").write_text(json.dumps({**kept, "certificate": {}}))
    assert load_head(tmp_path).certificate is None
    (tmp_path / "head.json").write_text(json.dumps({**kept, "certificate": {"method": "two-phase"}}))
    with pytest.raises(StoreError, match=r"certificate of the head is not whole.*objective"):
        load_head(tmp_path)


def some_features(n: int, *, whole: bool) -> FeatureSet:
    draw = np.random.default_rng(0)
    extra = {"prompt": draw.normal(size=(n, 4)), "log_ratio": draw.normal(size=n)} if whole else {}
    group = np.array([f"ü{i}" for i in range(n)])
    return FeatureSet(draw.normal(size=(n, 4)), draw.normal(size=(n, 4)), group, SPEC, **extra)


@pytest.mark.parametrize("n", [0, 3])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("mmap", [False, True])
def test_features_round_trip(n: int, whole: bool, mmap: bool, tmp_path: Path) -> None:
    features = some_features(n, whole=whole)
    save_features(tmp_path, features)
    again = load_features(tmp_path, mmap=mmap)
    assert again.spec == SPEC
    assert again.group.tolist() == features.group.tolist()
    for name in ("chosen", "rejected", "prompt", "log_ratio"):
        mine, theirs = getattr(again, name), getattr(features, name)
        assert (mine is None) == (theirs is None) == (not whole and name in ("prompt", "log_ratio"))
        if mine is not None:
            assert mine.dtype == theirs.dtype
            assert mine.tobytes() == theirs.tobytes()
            assert lies_on_disk(mine) == (mmap and n > 0)


def lies_on_disk(array: Any) -> bool:
    while array is not None and not isinstance(array, np.memmap):
        array = getattr(array, "base", None)
    return array is not None


@pytest.mark.parametrize("mmap", [False, True])
def test_damaged_features_are_refused(mmap: bool, tmp_path: Path) -> None:
    save_features(tmp_path, some_features(3, whole=True))
    path = tmp_path / "features.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(StoreError, match=r"not the file features\.json describes"):
        load_features(tmp_path, mmap=mmap)
    path.unlink()
    with pytest.raises(StoreError, match=r"features\.safetensors is missing"):
        load_features(tmp_path, mmap=mmap)


def test_generations_and_judgements_round_trip(tmp_path: Path) -> None:
    generations = [Generation("p", 'a "text"\n', "guided", 3, 0, 1.5, -2.0)]
    judgements = [Judgement("p", "guided", "unguided", 0.5, "j"), Judgement("q", "guided", "unguided", None, "j")]
    save_generations(tmp_path / "g.jsonl", generations)
    save_judgements(tmp_path / "j.jsonl", judgements)
    assert load_generations(tmp_path / "g.jsonl") == generations
    assert load_judgements(tmp_path / "j.jsonl") == judgements


def test_a_head_of_two_fits_is_refused(tmp_path: Path) -> None:
    head = ConvexHead(np.zeros((0, 3)), np.zeros((0, 3)), np.ones(3), SPEC)
    save_head(tmp_path / "head", head)
    data = (tmp_path / "head" / "head.safetensors").read_bytes()
    (tmp_path / "head" / "head.safetensors").write_bytes(data[:-1] + b"\x01")
    with pytest.raises(StoreError, match=r"not the file head\.json describes"):
        load_head(tmp_path / "head")
    (tmp_path / "head" / "head.safetensors").unlink()
    with pytest.raises(StoreError, match=r"head\.safetensors is missing"):
        load_head(tmp_path / "head")


@pytest.mark.parametrize(
    ("code", "words"), [(errno.ENOSPC, "disk is full"), (errno.EACCES, "may not write"), (errno.EIO, "same command")]
)
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    path = tmp_path / "value.json"
    write_atomic(path, "old")

    def fail(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StoreError, match=words):
        write_atomic(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["value.json"]


def test_a_path_through_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("data")
    with pytest.raises(StoreError, match=r"file/x: could not be written.*--out"):
        write_atomic(tmp_path / "file" / "x", b"data")


def test_plain_values_are_what_json_holds() -> None:
    value = {
        1: [math.nan, 1.0, (math.inf,)],
        "array": np.array([[1.0, math.nan]], np.float32),
        "number": np.int64(3),
        "yes": np.bool_(True),
        "path": Path("a/b"),
        "set": {"b", "a"},
        "turn": Turn("user", "hi"),
        "estimate": Estimate(0.5, -math.inf, 1.0, 3, "m"),
        "nothing": [Estimate(math.nan, 0.0, 1.0, 0, "none")],
    }
    kept = {
        "1": [None, 1.0, [None]],
        "array": [[1.0, None]],
        "number": 3,
        "yes": True,
        "path": "a/b",
        "set": ["a", "b"],
        "turn": {"role": "user", "text": "hi"},
        "estimate": {"value": 0.5, "low": None, "high": 1.0, "n": 3, "method": "m"},
        # The ends of an estimate of nothing are what is possible at all, not what was found.
        "nothing": [{"value": None, "low": None, "high": None, "n": 0, "method": "none"}],
    }
    assert plain(value) == kept
    assert json.loads(json.dumps(plain(value), allow_nan=False)) == kept
    assert plain(plain(value)) == kept
    with pytest.raises(TypeError, match="object has no JSON form"):
        plain({"x": object()})


def test_digest_separates_values() -> None:
    a = np.arange(6, dtype=np.float32)
    values: list[Any] = [
        a,
        a.reshape(2, 3),
        a.astype(np.float64),
        a.tobytes(),
        [0, 1],
        "01",
        b"01",
        {"a": 1},
        {"a": "1"},
    ]
    assert len({digest(v) for v in values}) == len(values)
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest("a", "b") != digest("ab")


def test_file_digest_of_a_folder_sees_names_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    first = file_digest(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert file_digest(tmp_path) != first


class TestFeatureStore:
    PLAN = {"pairs": "digest", "shards": [[0, 2], [2, 3]]}  # noqa: RUF012

    def test_resumes_with_the_shards_that_are_sound(self, tmp_path: Path) -> None:
        store = FeatureStore(tmp_path)
        assert store.begin(self.PLAN) == set()
        store.write(0, {"h": np.ones((2, 3), np.float32)})
        store.write(1, {"h": np.zeros((1, 3), np.float32)})
        (tmp_path / "shard-00001.safetensors").write_bytes(b"half")
        assert FeatureStore(tmp_path).begin(self.PLAN) == {0}
        assert not (tmp_path / "shard-00001.safetensors").exists()
        np.testing.assert_array_equal(store.read(0)["h"], np.ones((2, 3)))

    def test_another_plan_is_refused_and_both_sides_named(self, tmp_path: Path) -> None:
        FeatureStore(tmp_path).begin(self.PLAN)
        with pytest.raises(StoreError, match="pairs: 'digest' there, 'other' now"):
            FeatureStore(tmp_path).begin({**self.PLAN, "pairs": "other"})


class TestRun:
    def test_skips_what_is_done_and_notices_changes(self, tmp_path: Path) -> None:
        run = RunFolder(tmp_path / "run")
        run.start({"model": "a"})
        assert not run.done("s", {"in": 1})
        write_atomic(run.path / "out.json", "{}")
        run.finish("s", {"in": 1}, ["out.json"], {"n": 3})
        assert run.done("s", {"in": 1})
        assert run.facts("s") == {"n": 3}
        assert not run.done("s", {"in": 2})
        write_atomic(run.path / "out.json", "changed")
        assert not run.done("s", {"in": 1})

    def test_other_settings_are_refused_and_both_sides_named(self, tmp_path: Path) -> None:
        run = RunFolder(tmp_path / "run")
        run.start({"model": {"name": "a", "layer": -1}})
        run.start({"model": {"name": "a", "layer": -1}})
        with pytest.raises(StoreError, match=r"\n  model\.layer: -1 -> 20\n"):
            run.start({"model": {"name": "a", "layer": 20}})

    def test_a_folder_that_is_no_run_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "precious").write_text("data")
        with pytest.raises(StoreError, match="not a run folder"):
            RunFolder(tmp_path).start({})
        with pytest.raises(StoreError, match="not a run folder"):
            RunFolder(tmp_path).restart()
        assert (tmp_path / "precious").read_text() == "data"


@pytest.mark.parametrize("content", ["{}", "[]", '"x"', "null", None])
def test_a_folder_that_holds_no_features_is_told(tmp_path: Path, content: str | None) -> None:
    if content is None:
        (tmp_path / "features.json").mkdir()
    else:
        (tmp_path / "features.json").write_text(content)
    with pytest.raises(StoreError, match=r"features\.json"):
        load_features(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="found no such file"):
        load_features(tmp_path / "file")
