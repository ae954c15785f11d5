"""Benchmarks still run, at their smallest: what they measure is no matter here."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

SMALL = {
    "alternate": "",
    "comal": "--outer 1 --methods comal --seeds 0",
    "comal_text": "{stories} --out {tmp}/runs --prompts 4 --held-out 4 --answers 2 --candidates 2 --tokens 4 --outer 1 "
    "--inner 1 --methods inpo comal",
    "decoding": "--model {stories} --rounds 1 --tokens 6",
    "distil_solver": "film --prompts 8 --tokens 8 --ridges 1e-3",
    "decoding_speed": "--model {stories} --rounds 2 --tokens 6",
    "features": "--data {data} --pairs 6 --repeats 1 --models stories260K-hf --sets mathdial",
    "figures": "--out {tmp}",
    "guidance": "stories --model {stories} --prompts 2 --references 2 --only block",
    "influence": "--data {data} --pairs 200 --width 8 --most 60 --refits 5",
    "layers": "--data {data} --pairs 20 --models stories260K-hf --out {tmp}/layers.md",
    "live": "--pairs 40 --width 12 --runs 5 --most 12 --replies 3 --tokens 6 --clicks 15 --seeds 2",
    "live_session": "--clicks 3 --pause 0 --kills 1",
    "methods": "--part constructed --seeds 1 --rewards prompt --most 250 --out {tmp}/methods",
    "phase1": "--part gated --size small --seeds 1",
    "phase1_cone": "--quick --seeds 0",
    "phase1_network": "--quick --seeds 1",
    "phase2": "--seeds 1 --seconds 2",
    "raters": "--data {data} --part planted --sets film --seeds 1",
    "ranking": "--data {data} --out {tmp} --sets ultrafeedback_sample --models stories260K-hf",
    "served": "{smollm2} {smollm2} --prompts 2 --tokens 4",
    "serving": "--seconds 3 --rounds 1 --round-seconds 2 --clients 4",
    "survey_load": "--raters 3 --kills 0 --browsers 0 --questions 3",
    "synthesis": "--conversations 5 --kills 0",
}


def test_every_benchmark_is_here() -> None:
    assert {path.stem for path in (REPOSITORY / "benchmarks").glob("*.py")} == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_what_a_benchmark_imports_is_there(name: str) -> None:
    runpy.run_path(str(REPOSITORY / "benchmarks" / f"{name}.py"), run_name="looked at")


@pytest.mark.slow
@pytest.mark.release
@pytest.mark.parametrize("name", SMALL)
def test_a_benchmark_runs(name: str, shared: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    data = shared / "data"
    places = {"tmp": tmp_path, "data": data, "stories": data / "models" / "stories260K-hf"}
    if "{smollm2}" in SMALL[name]:
        places["smollm2"] = request.getfixturevalue("smollm2")
    words = SMALL[name].format(**places).split()
    command = [sys.executable, str(REPOSITORY / "benchmarks" / f"{name}.py"), *words]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert told
    assert "skipped" not in told
