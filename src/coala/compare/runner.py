"""Bring every cell of a study up to date, in a process each, and say what failed with its plan.

A cell that is done is skipped; one that was begun goes on from what it saved. Whatever happens to a process, the next
cell begins: cells that need a failed one fail with its name.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from coala.backbone.files import WHEEL, find
from coala.compare.cell import CELL, PLAN, read, write
from coala.compare.data import prepare
from coala.compare.matrix import Cell, cells, spec_of
from coala.compare.processes import Processes
from coala.compare.progress import OnStage, unheard
from coala.compare.study import Study
from coala.store import RunFolder, digest, file_digest, save_json
from coala.values import CoalaError


class OnCell(Protocol):
    """Called before and after each cell: cells done, cells in all, the cell at work or just ended, and a note."""

    def __call__(self, done: int, total: int, cell: Cell, note: str) -> None: ...


class OnWork(Protocol):
    """Called while a cell runs: what it is at, units done, units in all (None: unknown) and a note."""

    def __call__(self, cell: Cell, stage: str, done: float, total: float | None, note: str) -> None: ...


def _unheard(cell: Cell, stage: str, done: float, total: float | None, note: str) -> None:
    pass


def _silent(done: int, total: int, cell: Cell, note: str) -> None:
    pass


def run(
    study: Study,
    out: Path,
    *,
    on_cell: OnCell = _silent,
    on_work: OnWork = _unheard,
    on_pairs: OnStage = unheard,
    retry: bool = False,
    memory: int | None = None,
    only: Callable[[Cell], bool] | None = None,
) -> None:
    """Carry out ``study`` in the folder ``out``.

    ``on_pairs`` hears how far pairs are that the study samples of a model, before the first cell.
    ``retry`` begins failed cells anew; ``memory`` ends a cell whose process takes more bytes and reports it. The study
    may have grown since ``out`` was begun (seeds, methods, datasets); cells that are there and would now be other ones
    are refused. Raises :class:`CoalaError` for pairs that cannot be read, and for a folder at work or of another study.
    """
    out = Path(out)
    if out.exists() and any(p.name != ".lock" for p in out.iterdir()) and not (out / PLAN).is_file():
        raise CoalaError(f"{out}: exists and is not a comparison folder. Fix: use another --out.")
    for model in study.models.values():
        if model.path.startswith(WHEEL):
            find(model.path, None)  # told now, and not by each cell
    with RunFolder(out).held():
        stamped = prepare(study, out, on_pairs)
        everything = cells(study)
        content: dict[str, str] = {}
        stamps = {
            cell.id: digest(_by_content(spec_of(study, cell), content), stamped[cell.dataset]) for cell in everything
        }
        _refuse_other(out, everything, stamps)
        save_json(out / PLAN, {"study": study.model_dump(mode="json"), "stamps": stamps})
        with Processes(study, out) as processes:
            for number, cell in enumerate(everything):
                if only is not None and not only(cell):
                    continue
                on_cell(number, len(everything), cell, cell.id)
                note = _bring(study, cell, out, stamps[cell.id], retry, memory, processes, on_work)
                on_cell(number + 1, len(everything), cell, f"{cell.id}: {note}")


def _by_content(value: Any, content: dict[str, str]) -> Any:
    """Files and folders as what is in them: cells are the same where these have moved, and not where they have changed.

    ``content`` has the digests that are known.
    """
    if isinstance(value, dict):
        return {name: _by_content(one, content) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_by_content(one, content) for one in value]
    if isinstance(value, str) and value.startswith("/") and value not in content and os.path.exists(value):
        content[value] = file_digest(Path(value))
    return content.get(value, value) if isinstance(value, str) else value


def _refuse_other(out: Path, everything: list[Cell], stamps: dict[str, str]) -> None:
    for cell in everything:
        found = read(out / "cells" / cell.id)
        if found is not None and found["inputs"] != stamps[cell.id]:
            raise CoalaError(
                f"{out}: the cell {cell.id} was made with other settings or pairs than the study has now. Fix: use "
                f"another --out, or delete {out / 'cells' / cell.id} to rerun it."
            )


def _bring(
    study: Study,
    cell: Cell,
    out: Path,
    stamp: str,
    retry: bool,
    memory: int | None,
    processes: Processes,
    on_work: OnWork,
) -> str:
    folder = out / "cells" / cell.id
    found = read(folder)
    if found is not None and (found["status"] == "done" or not retry):
        return f"already {found['status']}"
    if found is not None:
        (folder / CELL).rename(folder / "failed-before.json")
    missing = [name for name in cell.needs if (read(out / "cells" / name) or {}).get("status") != "done"]
    if missing:
        _fail(study, cell, out, stamp, f"it needs {', '.join(missing)}, which failed", planned=False)
        return "failed: " + missing[0] + " is not there"
    began = time.monotonic()
    code, over = processes.carry_out(cell, memory, partial(on_work, cell))
    found = read(folder)
    if over:
        _fail(study, cell, out, stamp, f"its process used more than the {memory or 0:,} bytes it may use")
    elif found is None:
        killed = " (killed, perhaps out of memory)" if code == -9 else ""
        _fail(study, cell, out, stamp, f"its process ended with exit code {code}{killed}")
    elif found["status"] == "failed" and "plan" not in found:
        _fail(study, cell, out, stamp, found["error"], memory=bool(found.get("memory")))
    final = read(folder)
    assert final is not None
    told = final["status"] if final["status"] == "done" else f"failed: {final['error']}"
    return f"{told} in {time.monotonic() - began:.0f} s"


def _fail(
    study: Study, cell: Cell, out: Path, stamp: str, error: str, *, planned: bool = True, memory: bool = True
) -> None:
    from coala.compare.planning import plan_cell

    plan: Any = None
    if planned:
        try:
            plan = plan_cell(study, cell, out)
        except CoalaError as unplannable:
            plan = {"unknown": str(unplannable)}
    write(out / "cells" / cell.id, stamp, "failed", {"error": error, "memory": memory, "plan": plan})
