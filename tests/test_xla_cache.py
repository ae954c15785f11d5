"""Compiled programs kept from run to run: where, how many, and that a broken one changes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from coala.cli import xla_cache
from coala.cli.xla_cache import cache_folder, keep_compiled
from coala.store import save_features
from tests.test_values import random_features

NAME = "JAX_COMPILATION_CACHE_DIR"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(NAME, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # Set and taken back, so that what is set in the test does not outlive it.
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    return tmp_path


def fitted(features: Path, out: Path) -> tuple[str, str]:
    """The JSON line and stderr of `coala fit` in a process of its own."""
    code = "from coala.cli import main; main()"
    command = [sys.executable, "-c", code, "fit", str(features), "--out", str(out), "--method", "linear"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMP")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1], done.stderr


@pytest.mark.slow
@pytest.mark.nightly
def test_a_second_process_reads_what_the_first_compiled_and_a_broken_file_is_compiled_anew(
    home: Path, tmp_path: Path
) -> None:
    save_features(tmp_path / "features", random_features(40, 6))
    told, _ = fitted(tmp_path / "features", tmp_path / "head")
    kept = {path.name: path.read_bytes() for path in cache_folder().glob("*-cache")}
    assert len(kept) > 3
    again, _ = fitted(tmp_path / "features", tmp_path / "again")
    assert {path.name: path.read_bytes() for path in cache_folder().glob("*-cache")} == kept
    for place, name in enumerate(sorted(kept)):
        half = len(kept[name]) // 2
        (cache_folder() / name).write_bytes([kept[name][:half], bytes(half), b"", os.urandom(half)][place % 4])
    broken, errors = fitted(tmp_path / "features", tmp_path / "broken")
    assert "Error" not in errors
    # Each was compiled once more, and is whole again for the next.
    programs = [path for path in cache_folder().iterdir() if path.name in kept]
    assert len(programs) == len(kept)
    assert all(xla_cache._is_whole(path) for path in programs)
    gaps = [json.loads(line)["relative_gap"] for line in (told, again, broken)]
    assert gaps[0] == gaps[1] == gaps[2]


def test_a_folder_that_was_named_is_left_alone(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAME, "elsewhere")
    keep_compiled()
    assert os.environ[NAME] == "elsewhere"


def test_without_a_place_to_write_nothing_is_kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "file"))
    keep_compiled()
    assert NAME not in os.environ


def test_nothing_is_made_before_something_is_compiled(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    keep_compiled()
    assert os.environ[NAME] == str(cache_folder())
    assert not list(home.iterdir())


def damaged(whole: bytes) -> dict[str, bytes]:
    return {
        "empty": b"",
        "one byte": whole[:1],
        "half": whole[: len(whole) // 2],
        "all but one": whole[:-1],
        "zeros": bytes(len(whole)),
        "noise": os.urandom(len(whole)),
        "changed": whole[:40] + bytes([whole[40] ^ 1]) + whole[41:],
    }


@pytest.mark.parametrize("how", sorted(damaged(bytes(99))))
def test_a_file_that_a_kill_left_half_written_is_deleted(home: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    folder = cache_folder()
    folder.mkdir(parents=True)
    whole = zlib.compress(os.urandom(500))
    (folder / "sound-cache").write_bytes(whole)
    keep_compiled()
    # Damaged after the first look, and in the same moment at the worst.
    (folder / "broken-cache").write_bytes(damaged(whole)[how])
    del os.environ[NAME]
    keep_compiled()
    assert {path.name for path in folder.iterdir()} == {"sound-cache", xla_cache.LOOKED}
    assert (folder / "sound-cache").read_bytes() == whole


def test_what_was_looked_at_is_not_read_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    folder = cache_folder()
    folder.mkdir(parents=True)
    for age, name in enumerate(("old-cache", "new-cache")):
        (folder / name).write_bytes(zlib.compress(bytes(100)))
        os.utime(folder / name, (age + 1, age + 1))
    keep_compiled()
    looked: list[str] = []
    monkeypatch.setattr(xla_cache, "_is_whole", lambda path: bool(looked.append(path.name)) or True)
    del os.environ[NAME]
    keep_compiled()
    assert looked == ["new-cache"]


def test_the_oldest_go_when_there_is_too_much(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(xla_cache, "MOST_BYTES", 1000)
    folder = cache_folder()
    folder.mkdir(parents=True)
    for age, name in enumerate("abcdefghijkl"):
        (folder / name).write_bytes(bytes(100))
        os.utime(folder / name, (age, age))
    keep_compiled()
    assert sorted(path.name for path in folder.iterdir()) == list("hijkl")
