"""`coala distil` killed at any step, on a full disk, and of a head at chance: the same bytes in the end, or a line."""

from __future__ import annotations

import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import coala
from coala.distil.stage import distil
from coala.policies import DistilledPolicy
from coala.settings import DistilSettings
from coala.store import file_digest, load_json, save_json
from coala.values import CoalaError

from .menagerie import tiny_backbone
from .test_align import ENVIRONMENT, pair_rows, write_rows
from .test_distil_bases import full_after

pytestmark = pytest.mark.nightly

# Ends the command for good before its n-th file gets its name, or tells on the last line how many there were.
KILLED = """
import os, signal, sys
left = seen = int(sys.argv[1])
def count(event, arguments):
    global left
    if event == "os.rename":
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(count)
from coala.cli import app
try:
    app(sys.argv[2:], standalone_mode=False)
finally:
    print(seen - left)
"""
WORDS = ["--prompts", "20", "--candidates", "2", "--json", "--to", "checkpoint", "--out"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupted")
    tiny_backbone("llama", folder / "model")
    write_rows(folder / "pairs.jsonl", pair_rows(40, 30))
    coala.align(
        folder / "pairs.jsonl",
        model=folder / "model",
        out=folder / "run",
        head={"method": "linear"},
        guidance={"rule": "min-max"},
        evaluation={"prompts": 0, "max_new_tokens": 6},
    )
    return folder / "run"


def carried_out(run: Path, out: Path, step: int = 1 << 30) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", KILLED, str(step), "distil", str(run), *WORDS, str(out)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)


def values(run: Path, out: Path) -> dict[str, Any]:
    """What was made, by its digest."""
    names = ("policy.safetensors", "policy.json", "path.json")
    return {name: file_digest(run / "distilled" / name) for name in names} | {"out": file_digest(out)}


def test_a_kill_at_any_step_and_the_same_command_again_give_the_same_bytes(run: Path, tmp_path: Path) -> None:
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    done = carried_out(whole, tmp_path / "whole-out")
    assert done.returncode == 0, done.stderr
    steps = int(done.stdout.strip().splitlines()[-1])
    wanted = values(whole, tmp_path / "whole-out")
    # Among the replies, the shards of states, the policy's files, and those of the checkpoint.
    for step in sorted({2, steps // 3, 2 * steps // 3, steps - 2, steps}):
        killed, out = Path(shutil.copytree(run, tmp_path / f"run-{step}")), tmp_path / f"out-{step}"
        assert carried_out(killed, out, step).returncode == -signal.SIGKILL
        assert not out.exists()
        again = carried_out(killed, out)
        assert again.returncode == 0, again.stderr
        assert values(killed, out) == wanted, step


def test_a_full_disk_is_a_sentence_and_the_same_call_again_goes_on(run: Path, tmp_path: Path) -> None:
    settings = DistilSettings(teacher="weighted", rank=2, ridge=0.1)
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    wanted = distil(whole, settings)
    largest = max(path.stat().st_size for path in (whole / "distilled").rglob("*") if path.is_file())
    full = Path(shutil.copytree(run, tmp_path / "full"))
    for n_bytes in (0, 1000, largest // 2, largest - 1):
        with full_after(n_bytes), pytest.raises(CoalaError, match="could not be written") as caught:
            distil(full, settings)
        assert "\n" not in str(caught.value)
        assert not (full / "distilled" / "policy.json").exists()
    assert (distil(full, settings).change == wanted.change).all()
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != largest - 1


def test_a_head_at_chance_is_told_and_no_certificate_speaks_for_it(run: Path, tmp_path: Path) -> None:
    chance = Path(shutil.copytree(run, tmp_path / "chance"))
    about = chance / "head" / "head.json"
    save_json(about, load_json(about) | {"least_slope": 0.0})
    told: list[str] = []
    policy = distil(chance, DistilSettings(teacher="weighted", rank=2, ridge=0.1), on_note=told.append)
    assert sum("at chance" in line for line in told) == 1
    assert policy.certificate is not None
    assert "does not say" in policy.certificate.statement
    assert DistilledPolicy.load(chance / "distilled").certificate == policy.certificate
