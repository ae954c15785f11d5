"""The processes that cells run in: one begun anew where its peak memory is reported, one forked where it is not.

Loading torch, transformers, TRL and JAX takes seconds, a small cell little more. Where no accelerator is at work, one
process for each set of libraries loads them once and is forked for every cell. A fork shares its parent's pages, so
its peak is not what such work takes on its own: cells that say what it takes begin anew. Knows nothing of results.
"""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path

from coala.compare.cell import carry_out, libraries, library_set
from coala.compare.matrix import Cell, says_peak
from coala.compare.progress import OnStage, unheard
from coala.compare.study import Study
from coala.processes import Child, Parent
from coala.store import save_json
from coala.values import CoalaError

_POLL = 0.05
_TOLD = 4000


class Processes:
    """Carries out cells of the study in ``out``, one at a time; a context manager, for it keeps processes to fork."""

    def __init__(self, study: Study, out: Path) -> None:
        self._study, self._out = study, out
        self._parents: dict[str, Child] = {}
        self._ends = ExitStack()
        # One file for what all of them write to stderr: they share its place in it with us.
        self._errors = self._ends.enter_context(tempfile.TemporaryFile())  # noqa: SIM115

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.close()

    def carry_out(self, cell: Cell, memory: int | None = None, listen: OnStage = unheard) -> tuple[int, bool]:
        """The exit code of the cell's process, and whether it was ended for taking more than ``memory`` bytes.

        ``listen`` is told how far it is.

        What a process that did not end by itself wrote last to stderr is left in the cell's folder.
        """
        # A GPU's driver that was asked anything does not survive a fork, nor do the libraries of other systems.
        forked = self._study.device == "cpu" and sys.platform == "linux" and not says_peak(self._study, cell)
        self._errors.seek(0)
        self._errors.truncate()
        try:
            code, over = (self._forked if forked else self._anew)(cell, memory, listen)
        except CoalaError as error:
            self._errors.write(str(error).encode())
            code, over = 2, False
        if code not in (0, 1):
            self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - _TOLD))
            told = self._errors.read().decode(errors="replace")
            save_json(self._out / "cells" / cell.id / "stderr.json", {"stderr": told})
        return code, over

    def _anew(self, cell: Cell, memory: int | None, listen: OnStage) -> tuple[int, bool]:
        with Child(_alone, self._out, cell.id, errors=self._errors) as child:
            found = _watched(child, child.pid, memory, listen)
            child.join()
            return found

    def _forked(self, cell: Cell, memory: int | None, listen: OnStage) -> tuple[int, bool]:
        name = library_set(self._study, cell)
        parent = self._parents.get(name)
        if parent is None or parent.ended:
            parent = self._ends.enter_context(Child(fork_for_each, self._out, name, errors=self._errors))
            self._parents[name] = parent
        parent.ask(cell.id)
        try:
            pid = parent.hear()
        except EOFError:
            return 2, False
        try:
            return _watched(parent, pid, memory, listen)
        except BaseException:
            with suppress(ProcessLookupError):
                os.kill(pid, 9)
            raise


def _watched(child: Child, pid: int, memory: int | None, listen: OnStage) -> tuple[int, bool]:
    """The exit code that ``child`` tells of the process ``pid``, and whether that took too much and was killed."""
    over = False
    while True:
        try:
            told = child.hear(None if memory is None or over else _POLL)
        except TimeoutError:
            told = None
        except EOFError:
            code = child.join()
            return (2 if code in (0, 1) else code), over
        if isinstance(told, int):
            return told, over
        if told is not None:
            listen(*told)
        if memory is not None and not over and _resident(pid) > memory:
            os.kill(pid, 9)
            over = True


def _alone(parent: Parent, out: Path, cell: str) -> None:
    parent.tell(carry_out(out, cell, lambda *told: parent.tell(told)))


def _in_fork(parent: Parent, out: Path, cell: str) -> int:
    parent.tell(os.getpid())
    return carry_out(out, cell, lambda *told: parent.tell(told), forked=True)


def fork_for_each(parent: Parent, out: Path, name: str) -> None:
    """Load a set of libraries, then fork for every cell that is asked for.

    Told are its pid, how far it is, and its exit code.
    """
    libraries(name)
    while True:
        pid = parent.fork(_in_fork, parent, out, parent.asked())
        parent.tell(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def _resident(pid: int) -> int:
    """Bytes of memory a process holds now; 0 where the system does not tell."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as status:
            return next((int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS:")), 0)
    except OSError:
        return 0
