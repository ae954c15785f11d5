"""Compiled programs kept from run to run: where, how many, and that a broken one changes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from coala.cli import compiled
from coala.cli.compiled import cache_folder, keep_compiled
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
def test_a_second_process_reads_what_the_first_compiled_and_a_broken_file_is_compiled_anew(
    home: Path, tmp_path: Path
) -> None:
    save_features(tmp_path / "features", random_features(40, 6))
    told, _ = fitted(tmp_path / "features", tmp_path / "head")
    kept = {path.name: path.read_bytes() for path in cache_folder().iterdir()}
    assert len(kept) > 3
    again, _ = fitted(tmp_path / "features", tmp_path / "again")
    assert {path.name: path.read_bytes() for path in cache_folder().iterdir()} == kept
    for path in cache_folder().iterdir():
        path.write_bytes(path.read_bytes()[:100])
    broken, errors = fitted(tmp_path / "features", tmp_path / "broken")
    assert "Error" not in errors
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


def test_the_oldest_go_when_there_is_too_much(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(compiled, "MOST_BYTES", 1000)
    folder = cache_folder()
    folder.mkdir(parents=True)
    for age, name in enumerate("abcdefghijkl"):
        (folder / name).write_bytes(bytes(100))
        os.utime(folder / name, (age, age))
    keep_compiled()
    assert sorted(path.name for path in folder.iterdir()) == list("hijkl")
