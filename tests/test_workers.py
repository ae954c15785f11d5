"""Faults: killed, cut short, damaged, run twice at once; what comes out is what an unbroken run gives, bit by bit."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import coala.features.prefix_tree
import coala.store.files
from coala.backbone import LanguageModel, load_backbone
from coala.cli import app
from coala.features import ExtractionTask, extract, workers
from coala.plan.memory import OTHERS
from coala.plan.plan import make_plan
from coala.plan.text import first_lines, table_rows
from coala.plan.tokens import Guess
from coala.recipe import recipe_of
from coala.store import FeatureStore, RunFolder, StoreError, claim, load_features, load_json
from coala.values import CoalaError

from .menagerie import tiny_backbone
from .test_align import pair_rows, values_of, write_rows
from .test_features import contents, same, some_pairs
from .test_plan import published
from .waiting import PATIENCE, linger, wait_for

HERE = Path(__file__).resolve().parent.parent
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(HERE / "src"), str(HERE)]),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_backbone("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def backbone(folder: Path) -> LanguageModel:
    # Without a header all rows would begin with, and so be one tree.
    return load_backbone(folder, template="continuation")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coala.features.prefix_tree, "SHARD_ROWS", 8)


# --- locks -------------------------------------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from coala.store import claim
with claim(Path(sys.argv[1]), int(sys.argv[2])) as mine:
    print(mine, flush=True)
    sys.stdin.read()
"""


def holding(lock: Path, place: int) -> subprocess.Popen[bytes]:
    """A process that holds the place until it is killed, or this one ends."""
    command = [sys.executable, "-c", HOLD, str(lock), str(place)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT)


def test_a_place_is_held_by_one_process_and_freed_by_its_death(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    other = holding(lock, 3)
    assert other.stdout is not None
    assert other.stdout.readline() == b"True\n"
    with claim(lock, 3) as mine, claim(lock, 4) as another:
        assert (mine, another) == (False, True)
    other.send_signal(signal.SIGKILL)
    other.wait()
    with claim(lock, 3, wait=True) as mine:
        assert mine


def test_a_run_folder_is_refused_to_a_second_process(folder: Path, tmp_path: Path) -> None:
    pairs, out = write_rows(tmp_path / "pairs.jsonl", pair_rows(10, 5)), tmp_path / "out"
    other = holding(out / ".lock", 0)
    assert other.stdout is not None
    other.stdout.readline()
    for command in (["extract", str(pairs)], ["align", str(pairs)]):
        refused = CliRunner().invoke(app, [*command, "--model", str(folder), "--out", str(out)])
        assert isinstance(refused.exception, StoreError)
        assert "another process is at work" in str(refused.exception)
    other.kill()
    other.wait()
    done = CliRunner().invoke(app, ["extract", str(pairs), "--model", str(folder), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in out.iterdir()) == ["features.json", "features.safetensors"]


def test_a_run_that_never_began_leaves_no_folder(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run").held():
        assert (tmp_path / "run").exists()
    assert not (tmp_path / "run").exists()


# --- damaged and full --------------------------------------------------------------------------------------------


def test_a_changed_byte_is_found_told_and_mended(backbone: LanguageModel, tmp_path: Path) -> None:
    pairs, spec, store = some_pairs(24), backbone.spec(), FeatureStore(tmp_path / "shards")
    whole = extract(pairs, backbone, spec, batch_tokens=200, store=store)
    before = contents(store.folder)
    victim = sorted(store.folder.glob("shard-*"))[1]
    raw = bytearray(victim.read_bytes())
    raw[-5] ^= 1
    victim.write_bytes(raw)
    with pytest.raises(StoreError, match="not those that were written"):
        store.read(1)
    notes: list[str] = []
    again = extract(pairs, backbone, spec, batch_tokens=200, store=store, on_note=notes.append)
    assert same(again, whole)
    assert contents(store.folder) == before
    assert len(notes) == 1
    assert victim.name in notes[0]


def test_a_full_disk_is_an_error_and_what_was_done_is_kept(
    backbone: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, spec, store = some_pairs(24), backbone.spec(), FeatureStore(tmp_path / "shards")
    whole = extract(pairs, backbone, spec, batch_tokens=200)
    fsync, left = os.fsync, [6]

    def full(handle: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(coala.store.files.os, "fsync", full)
    with pytest.raises(StoreError, match="disk is full"):
        extract(pairs, backbone, spec, batch_tokens=200, store=store)
    kept = sorted(store.folder.glob("shard-*"))
    assert kept
    assert not list(store.folder.glob("*.tmp"))
    monkeypatch.setattr(coala.store.files.os, "fsync", fsync)
    assert same(extract(pairs, backbone, spec, batch_tokens=200, store=store), whole)


# --- several processes -------------------------------------------------------------------------------------------


def job_of(folder: Path, backbone: LanguageModel, store: Path, n: int = 40) -> ExtractionTask:
    # The other processes know nothing of what a test patches here; shards are as small by an option.
    coala.features.prefix_tree.SHARD_ROWS = 2048
    return ExtractionTask(
        {"model": str(folder), "template": "continuation"},
        some_pairs(n),
        backbone.spec(),
        {"batch_tokens": 200, "shard_rows": 8},
        store,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "killed", [pytest.param(False, marks=pytest.mark.nightly), True], ids=["in peace", "one killed"]
)
def test_workers_share_and_change_nothing(
    folder: Path, backbone: LanguageModel, tmp_path: Path, killed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(folder, backbone, tmp_path / "shards")
    alone = extract(job.pairs, backbone, job.spec, batch_tokens=200)
    notes: list[str] = []
    store = FeatureStore(job.store)
    write = FeatureStore.write

    def last(self: FeatureStore, shard: int, arrays: Any) -> None:
        wait_for(lambda: list(job.store.glob("shard-*.safetensors")))  # another's
        write(self, shard, arrays)

    monkeypatch.setattr(FeatureStore, "write", last)
    with workers(job, 3, on_note=notes.append) as others:
        if killed:
            os.kill(others[0].pid, signal.SIGKILL)
        features = extract(job.pairs, backbone, job.spec, **job.options, store=store)
    assert same(features, alone)
    assert notes == (["A worker ended with code -9; the others did its work."] if killed else [])


@pytest.mark.slow
def test_a_ray_cluster_gives_the_same(folder: Path, backbone: LanguageModel, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs the extra 'ray'")
    job = job_of(folder, backbone, tmp_path / "shards")
    with workers(job, 2, engine="ray"):
        features = extract(job.pairs, backbone, job.spec, **job.options, store=FeatureStore(job.store))
    assert same(features, extract(job.pairs, backbone, job.spec, batch_tokens=200))


@pytest.mark.slow
def test_a_ray_worker_killed_mid_run_changes_nothing(folder: Path, backbone: LanguageModel, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs the extra 'ray'")
    job = job_of(folder, backbone, tmp_path / "shards", 200)
    killed: list[int] = []

    def kill() -> bool:
        if len(list(job.store.glob("shard-*"))) < 2:
            return False
        found = subprocess.run(["pgrep", "-f", "^ray::"], capture_output=True, text=True, check=False)
        for pid in map(int, found.stdout.split()):
            if b"work" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
                return True
        return False

    thread = threading.Thread(target=wait_for, args=(kill,))
    thread.start()
    with workers(job, 2, engine="ray"):
        features = extract(job.pairs, backbone, job.spec, **job.options, store=FeatureStore(job.store))
    thread.join()
    assert killed
    assert same(features, extract(job.pairs, backbone, job.spec, batch_tokens=200))


KILLS = int(os.environ.get("COALA_KILLS", "3"))


@pytest.mark.slow
@pytest.mark.nightly
def test_kills_at_random_moments_lose_nothing(folder: Path, backbone: LanguageModel, tmp_path: Path) -> None:
    """At random shards; COALA_KILLS: how often (20 were survived by hand)."""
    pairs = write_rows(tmp_path / "pairs.jsonl", pair_rows(2000, 100))
    command = [sys.executable, "-m", "coala", "extract", str(pairs), "--model", str(folder), "--batch-tokens", "300"]
    whole = [*command, "--out", str(tmp_path / "whole")]
    subprocess.run(whole, env=ENVIRONMENT, check=True, capture_output=True)
    draw = np.random.default_rng()
    out = tmp_path / "killed"
    survived = attempts = 0
    while survived < KILLS and attempts < 10 * KILLS:
        attempts += 1
        process = subprocess.Popen([*command, "--out", str(out)], env=ENVIRONMENT, stderr=subprocess.DEVNULL)
        linger(10 ** draw.uniform(-1, 1))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            survived += 1
        else:
            for path in out.iterdir():
                path.unlink()
        process.wait()
    subprocess.run([*command, "--out", str(out)], env=ENVIRONMENT, check=True, capture_output=True)
    assert survived == KILLS
    assert same(load_features(out), load_features(tmp_path / "whole"))
    assert sorted(p.name for p in out.iterdir()) == ["features.json", "features.safetensors"]


def test_no_workers_are_refused(folder: Path, backbone: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(CoalaError, match="expected at least 1"), workers(job_of(folder, backbone, tmp_path), 0):
        pass


@pytest.mark.slow
@pytest.mark.nightly
def test_the_command_with_workers(folder: Path, tmp_path: Path) -> None:
    pairs = write_rows(tmp_path / "pairs.jsonl", pair_rows(30, 10))
    for name, more in (("one", []), ("two", ["--workers", "2"])):
        command = ["extract", str(pairs), "--model", str(folder), "--out", str(tmp_path / name), *more]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.stderr
    one, two = (load_features(tmp_path / name) for name in ("one", "two"))
    assert same(one, two)
    assert np.isfinite(one.chosen).all()


# --- a whole alignment -------------------------------------------------------------------------------------------


def helpers_of(process: subprocess.Popen[str], wanted: int) -> list[int]:
    """The processes that ``process`` has started to extract, once there are so many."""

    def pids() -> list[int]:
        found = subprocess.run(["pgrep", "-P", str(process.pid), "-a"], capture_output=True, text=True, check=False)
        return [int(line.split()[0]) for line in found.stdout.splitlines() if "coala.processes" in line]

    wait_for(lambda: len(pids()) >= wanted, process)
    return pids()


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.nightly
def test_an_alignment_shared_interrupted_and_killed_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    pairs = write_rows(tmp_path / "pairs.jsonl", pair_rows(6000, 600))
    words = ["align", str(pairs), "--model", str(folder), "--method", "linear", "--prompts", "2"]
    command = [sys.executable, "-m", "coala", *words, "--max-new-tokens", "4", "--batch-tokens", "300"]
    options: dict[str, Any] = {"env": ENVIRONMENT, "stdout": subprocess.DEVNULL, "text": True}
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    subprocess.run([*command, "--out", str(whole)], check=True, stderr=subprocess.DEVNULL, **options)
    shared_command = [*command, "--out", str(shared), "--workers", "3"]
    for end in (signal.SIGINT, signal.SIGKILL):
        # A group of its own, so that Ctrl-C reaches the helpers too, as in a terminal.
        process = subprocess.Popen(shared_command, stderr=subprocess.PIPE, start_new_session=True, **options)
        helpers = helpers_of(process, 2)
        (os.killpg if end == signal.SIGINT else os.kill)(process.pid, end)
        _, said = process.communicate(timeout=PATIENCE)
        wait_for(lambda pids=helpers: not any(alive(pid) for pid in pids))
        assert process.returncode == (130 if end == signal.SIGINT else -9)
        if end == signal.SIGINT:
            assert "finished work is saved" in said
            assert "Traceback" not in said
        assert not (shared / "features/train/features.json").exists(), "it was over before it could be ended"
    done = subprocess.run(shared_command, check=True, stderr=subprocess.PIPE, **options)
    assert "3 workers need up to" not in done.stderr  # the plan is told when a run begins, not when it goes on
    assert values_of(shared) == values_of(whole)
    for part in ("train", "eval"):
        one, three = (load_json(run / f"stages/features-{part}.json")["facts"] for run in (whole, shared))
        assert {**one, "seconds": 0, "peak_bytes": 0} == {**three, "seconds": 0, "peak_bytes": 0}


@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "gpu"])
def test_the_plan_says_what_workers_need(tmp_path: Path, on_gpu: bool) -> None:
    config = published(tmp_path, "gpt2")
    settings = recipe_of({"pairs": [], "model": {"name": "gpt2", "device": "cuda" if on_gpu else "cpu"}})
    place = "device" if on_gpu else "host"

    def plan(n_workers: int, gib: float) -> Any:
        room = {"memory": 10**12, "device_memory": 10**12, "disk": 10**12}
        room["device_memory" if on_gpu else "memory"] = int(gib * 2**30)
        return make_plan(
            settings, config=config, rows=5000, guess=Guess(100, 100), probe_seconds=0, n_workers=n_workers, **room
        )

    def needed(found: Any) -> int:
        return sum(getattr(found, f"{place}_bytes")["extraction"].values())

    one, four = plan(1, 1000), plan(4, 1000)
    assert needed(four) == 4 * needed(one)
    assert not any(OTHERS in line for line in (*first_lines(one), *map(str, table_rows(one))))
    assert any("4 workers need up to" in line for line in first_lines(four))
    assert any(OTHERS in row[0] for row in table_rows(four))
    # Room for two and a half of them.
    short = plan(4, 2.5 * needed(one) / 2**30)
    assert short.shortages
    assert "--workers 2" in short.mends
    assert not short.together
    assert not plan(2, 2.5 * needed(one) / 2**30).shortages
    # Not even for one: smaller passes make room for four, or besides taking one.
    tight = plan(4, 0.97 * needed(one) / 2**30)
    assert tight.shortages
    assert tight.mends[0] == "--workers 1"
    assert len(tight.mends) == 2
    assert tight.together
