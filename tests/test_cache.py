"""Answers that were kept and are gone are told of: SQLite itself takes a damaged log for a shorter one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from coala.store.verdict_cache import VerdictCache


def snapshot(path: Path, n: int, folder: Path) -> Path:
    """A copy of a cache of ``n`` answers as a kill leaves it: the log is not yet in the file."""
    with VerdictCache(path) as cache:
        for i in range(n):
            cache.put(f"key {i}", f"answer {i}" * 50)
        folder.mkdir()
        for one in path.parent.glob(f"{path.name}*"):
            if not one.name.endswith("-shm"):
                shutil.copy(one, folder / one.name)
    return folder / path.name


def wal(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


@pytest.mark.parametrize("harm", ["cut", "flip", "delete", "replace"])
def test_a_damaged_log_is_told_of_once(tmp_path: Path, harm: str) -> None:
    path = snapshot(tmp_path / "v.sqlite", 12, tmp_path / "killed")
    raw = wal(path).read_bytes()
    if harm == "cut":
        wal(path).write_bytes(raw[: len(raw) // 2])
    elif harm == "flip":
        middle = len(raw) // 2
        wal(path).write_bytes(raw[:middle] + bytes(byte ^ 255 for byte in raw[middle : middle + 8]) + raw[middle + 8 :])
    elif harm == "delete":
        wal(path).unlink()
    else:
        older = snapshot(tmp_path / "w.sqlite", 3, tmp_path / "older")
        shutil.copy(older, path)
        shutil.copy(wal(older), wal(path))
    with VerdictCache(path) as cache:
        lost = 12 - len(cache)
        assert lost > 0
        assert f"{lost} of 12 answers that were kept here are gone" in cache.damage
        cache.put("key new", "answer")
    with VerdictCache(path) as cache:
        assert cache.damage == ""
        assert len(cache) == 13 - lost


def test_a_kill_a_close_and_a_new_start_are_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "v.sqlite"
    killed = snapshot(path, 5, tmp_path / "killed")
    for one in (killed, path):
        with VerdictCache(one) as cache:
            assert (cache.damage, len(cache)) == ("", 5)
            cache.put("key 0", "another answer")
        with VerdictCache(one) as cache, VerdictCache(one) as other:
            assert (cache.damage, other.damage, len(cache)) == ("", "", 5)
    # Without the count, or with the file deleted on purpose, there is nothing to compare.
    path.with_name("v.sqlite-count").unlink()
    with VerdictCache(path) as cache:
        assert cache.damage == ""
    path.unlink()
    with VerdictCache(path) as cache:
        assert (cache.damage, len(cache)) == ("", 0)


def test_a_cache_of_an_earlier_version_is_taken_over(tmp_path: Path) -> None:
    import sqlite3

    path = tmp_path / "v.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA application_id = 0x434F414C")
        connection.execute("CREATE TABLE verdicts (key TEXT PRIMARY KEY, answer TEXT NOT NULL) WITHOUT ROWID")
        connection.execute("INSERT INTO verdicts VALUES ('k', 'a')")
    connection.close()
    with VerdictCache(path) as cache:
        assert (cache.get("k"), cache.damage) == ("a", "")
        cache.put("l", "b")
    assert int(path.with_name("v.sqlite-count").read_text()) == 2
