"""The store: round trips, atomic writes, digests, and the run folder's promises."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coala.store import (
    FeatureStore,
    Run,
    StoreError,
    digest,
    file_digest,
    load_features,
    load_generations,
    load_head,
    load_judgements,
    load_pairs,
    save_features,
    save_generations,
    save_head,
    save_judgements,
    save_pairs,
    write_atomic,
)
from coala.values import ConvexHead, FeatureSet, FeatureSpec, Generation, Judgement, Pair, Turn

SPEC = FeatureSpec("model", "", "weights", "chat:0", 3, "mean", False, 64)
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


def test_head_and_features_round_trip(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    head = ConvexHead(draw.normal(size=(2, 5)), draw.normal(size=(2, 5)), draw.normal(size=5), SPEC, {"gap": 1e-9})
    save_head(tmp_path / "head", head)
    loaded = load_head(tmp_path / "head")
    assert loaded.spec == head.spec
    assert loaded.certificate == head.certificate
    for name in ("gates", "weights", "linear"):
        assert getattr(loaded, name).tobytes() == getattr(head, name).tobytes()
    features = FeatureSet(draw.normal(size=(3, 4)), draw.normal(size=(3, 4)), np.array(["a", "b", "ü"]), SPEC)
    save_features(tmp_path / "features", features)
    again = load_features(tmp_path / "features")
    assert again.chosen.tobytes() == features.chosen.tobytes()
    assert list(again.group) == ["a", "b", "ü"]


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
        run = Run(tmp_path / "run")
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
        run = Run(tmp_path / "run")
        run.start({"model": "a"})
        run.start({"model": "a"})
        with pytest.raises(StoreError, match="model was 'a', now 'b'"):
            run.start({"model": "b"})

    def test_a_folder_that_is_no_run_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "precious").write_text("data")
        with pytest.raises(StoreError, match="not a run folder"):
            Run(tmp_path).start({})
        with pytest.raises(StoreError, match="not a run folder"):
            Run(tmp_path).restart()
        assert (tmp_path / "precious").read_text() == "data"
