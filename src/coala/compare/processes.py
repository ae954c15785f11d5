"""The processes that cells run in: one begun anew where its peak memory is reported, one forked where it is not.

Loading torch, transformers, TRL and JAX takes seconds, a small cell little more. Where no accelerator is at work, one
process for each set of libraries loads them once and is forked for every cell. A fork shares its parent's pages, so
its peak is not what such work takes on its own: cells that say what it takes begin anew. Knows nothing of results.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from coala.compare.cell import carry_out, libraries, library_set
from coala.compare.matrix import Cell, says_peak
from coala.compare.study import Study
from coala.store import save_json

_POLL = 0.05
_LISTEN = 0.5
_TOLD = 4000


class Processes:
    """Carries out cells of the study in ``out``, one at a time; a context manager, for it keeps processes to fork."""

    def __init__(self, study: Study, out: Path) -> None:
        self._study, self._out = study, out
        self._parents: dict[str, subprocess.Popen[bytes]] = {}
        # One file for what all of them write to stderr: they share its place in it with us.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed at the end of the block

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for parent in self._parents.values():
            parent.kill()
            parent.wait()
            for pipe in (parent.stdin, parent.stdout):
                assert pipe is not None
                with suppress(OSError):
                    pipe.close()
        self._errors.close()

    def carry_out(
        self, cell: Cell, memory: int | None = None, listen: Callable[[], None] = lambda: None
    ) -> tuple[int, bool]:
        """The exit code of the cell's process, and whether it was ended for taking more than ``memory`` bytes.

        ``listen`` is called now and then while it runs.

        What a process that did not end by itself wrote last to stderr is left in the cell's folder.
        """
        # A GPU's driver that was asked anything does not survive a fork, nor do the libraries of other systems.
        forked = self._study.device == "cpu" and sys.platform == "linux" and not says_peak(self._study, cell)
        self._errors.seek(0)
        self._errors.truncate()
        code, over = (self._forked if forked else self._anew)(cell, memory, listen)
        if code not in (0, 1):
            self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - _TOLD))
            told = self._errors.read().decode(errors="replace")
            save_json(self._out / "cells" / cell.id / "stderr.json", {"stderr": told})
        return code, over

    def _anew(self, cell: Cell, memory: int | None, listen: Callable[[], None]) -> tuple[int, bool]:
        command = [sys.executable, "-m", "coala.compare", str(self._out), cell.id]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=self._errors) as process:
            try:
                while True:
                    with suppress(subprocess.TimeoutExpired):
                        return process.wait(_LISTEN if memory is None else _POLL), False
                    listen()
                    if memory is not None and _resident(process.pid) > memory:
                        process.kill()
                        process.wait()
                        return process.returncode, True
            except BaseException:
                process.kill()
                raise

    def _forked(self, cell: Cell, memory: int | None, listen: Callable[[], None]) -> tuple[int, bool]:
        parent = self._parent(library_set(self._study, cell))
        if parent is None:
            return 2, False
        assert parent.stdin is not None
        assert parent.stdout is not None
        pid, over = 0, False
        with suppress(BrokenPipeError):
            parent.stdin.write(f"{cell.id}\n".encode())
            pid = int(parent.stdout.readline() or 0)
        if not pid:
            return 2, False
        try:
            while not select.select([parent.stdout], [], [], _LISTEN if memory is None or over else _POLL)[0]:
                listen()
                if memory is not None and not over and _resident(pid) > memory:
                    os.kill(pid, 9)
                    over = True
        except BaseException:
            with suppress(ProcessLookupError):
                os.kill(pid, 9)
            raise
        return int(parent.stdout.readline() or 2), over

    def _parent(self, name: str) -> subprocess.Popen[bytes] | None:
        """The process with these libraries that is to be forked; None if it ends before it is ready."""
        found = self._parents.get(name)
        if found is None or found.poll() is not None:
            command = [sys.executable, "-m", "coala.compare", str(self._out), "--fork", name]
            pipe = subprocess.PIPE
            # Unbuffered: what was read ahead would not be waited for.
            found = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._errors, bufsize=0)
            self._parents[name] = found
            assert found.stdout is not None
            if not found.stdout.readline():
                return None
        return found


def fork_for_each(out: Path, name: str) -> int:
    """Load a set of libraries, then fork for every cell that stdin names; its pid and its exit code go to stdout."""
    libraries(name)
    os.write(1, b"ready\n")
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os._exit(_in_fork(out, line.strip()))
        os.write(1, f"{pid}\n".encode())
        status = os.waitpid(pid, 0)[1]
        os.write(1, f"{os.waitstatus_to_exitcode(status)}\n".encode())
    return 0


def _in_fork(out: Path, cell: str) -> int:
    # Nothing may go on here that the parent was doing, whatever is raised.
    try:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1):
            os.dup2(nowhere, stream)
        return carry_out(out, cell, forked=True)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        return 2


def _resident(pid: int) -> int:
    """Bytes of memory a process holds now; 0 where the system does not tell."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as status:
            return next((int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS:")), 0)
    except OSError:
        return 0
