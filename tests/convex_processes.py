"""Solves that need a process of their own: several devices, several processes, rows in a file larger than its memory.

Run as ``python -m tests.convex_processes MODE ...``; prints one line of JSON. The tests are in test_convex_scale.py.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from coala.convex import GatedNewton, GatedProgram, PairProgram, solve
from coala.convex.rows import open_rows, solve_bytes
from coala.convex.sharding import row_mesh, spread

from .menagerie_convex import Instance, PairInstance
from .waiting import linger


def programs() -> list[GatedProgram | PairProgram]:
    """Programs whose rows no number of devices divides."""
    return [
        Instance(1401, 20, 6, 0.01, 0).gated(np.float32),
        PairInstance(1101, 12, 4, 0.01, 0.01, 0, margins=True).program(np.float32),
    ]


def solved(program: GatedProgram | PairProgram) -> dict[str, Any]:
    solution = solve(program, GatedNewton(), tolerance=1e-6)
    lower = solution.objective - solution.gap
    return {"objective": solution.objective, "lower": lower, "weights": solution.value.tolist()}


def on_devices() -> dict[str, Any]:
    """Solve on a mesh of all devices; the compiled step may sum over devices, but never gather rows."""
    whole = programs()
    with jax.set_mesh(row_mesh()):
        placed = [spread(program) for program in whole]
        state = GatedNewton().init(placed[0])
        text = jax.jit(GatedNewton.step, static_argnums=0).lower(GatedNewton(), placed[0], state).compile().as_text()
        moved = [name for name in ("all-gather", "all-to-all", "collective-permute") if name in text]
        return {"devices": jax.device_count(), "moved": moved, "solved": [solved(program) for program in placed]}


def in_processes(port: str, rank: str) -> dict[str, Any]:
    """The part of process ``rank`` in a solve by two processes."""
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(rank))
    pairs = programs()[1]
    with jax.set_mesh(row_mesh()):
        return {"processes": jax.process_count(), "solved": solved(spread(pairs))}


def mapped_program(path: str, P: int) -> GatedProgram:
    X = open_rows(path)
    rng = np.random.default_rng(0)
    patterns = jnp.asarray(rng.random((X.shape[0], P)) < 0.5)
    y = jnp.asarray(np.sign(rng.standard_normal(X.shape[0])), jnp.float32)
    return GatedProgram(X, y, patterns, jnp.asarray(20.0, jnp.float32))


def anonymous_bytes() -> int:
    """Memory of this process that is not the page cache of a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def from_file(path: str) -> dict[str, Any]:
    """Solve twice, the second time with an eye on memory: the first has compiled."""
    program = mapped_program(path, 6)
    solve(program, GatedNewton(), tolerance=1e-5)
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous_bytes())
            linger(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = solved(program)
    done.set()
    watcher.join()
    n, d = program.X.shape
    return {**result, "taken": peak - before, "predicted": solve_bytes(n, d, 6, mapped=True)}


MODES = {"devices": on_devices, "process": in_processes, "file": from_file}

if __name__ == "__main__":
    print(json.dumps(MODES[sys.argv[1]](*sys.argv[2:])), flush=True)
