"""The stages one after the other, in this process or each in one of its own.

On a machine with a GPU each stage runs in a process of its own, so that torch and JAX never share the card. Knows
nothing of what a stage does.
"""

from __future__ import annotations

from pathlib import Path

from coala.alignment.context import StageContext
from coala.alignment.stages import STAGES
from coala.callbacks import OnNote, OnProgress, quiet, silent
from coala.processes import Child, Parent
from coala.recipe import Recipe
from coala.store import RunFolder
from coala.values import CoalaError


def carry_out(
    recipe: Recipe,
    run: RunFolder,
    show: OnProgress | None = None,
    note: OnNote = quiet,
    *,
    separate: bool | None = None,
    cache: Path | None = None,
    n_workers: int = 1,
) -> None:
    """Bring every stage of ``recipe`` up to date in ``run``; features are looked up in and added to ``cache``.

    ``separate`` runs each stage in a process of its own (default: when the machine has an NVIDIA GPU). ``n_workers``
    processes share the extraction, which changes nothing of its outcome.
    """
    show = silent if show is None else show
    if separate is None:
        separate = Path("/proc/driver/nvidia/version").exists()
    if separate:
        for stage in STAGES:
            _in_a_process(stage, recipe, run, show, note, cache, n_workers)
    else:
        given = StageContext(recipe, run, show, note, cache, n_workers)
        for work in STAGES.values():
            work(given)


def _in_a_process(
    stage: str, recipe: Recipe, run: RunFolder, show: OnProgress, note: OnNote, cache: Path | None, n_workers: int
) -> None:
    with Child(_work_and_tell, stage, recipe, run.path, cache, n_workers) as child:
        for message in child.told():
            if isinstance(message, str):
                note(message)
            else:
                show(*message)
        code = child.join()
    if code:
        raise CoalaError(
            f"The stage {stage!r} ended with exit code "
            f"{code}{' (killed, perhaps out of memory)' if code == -9 else ''}. Finished work is saved; rerun the "
            "same command to resume."
        )


def _work_and_tell(parent: Parent, stage: str, recipe: Recipe, path: Path, cache: Path | None, n_workers: int) -> None:
    def show(stage: str, done: float, total: float | None, note: str = "") -> None:
        parent.tell((stage, done, total, note))

    STAGES[stage](StageContext(recipe, RunFolder(path), show, parent.tell, cache, n_workers))
