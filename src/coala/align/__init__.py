"""One alignment from pairs to report: the stages in their order, and what a finished run holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coala.align.changes import adopt
from coala.align.checks import check_settings
from coala.align.context import OnNote, OnProgress, quiet
from coala.align.evidence import evidence_notes
from coala.align.processes import carry_out
from coala.align.results import load_run, make_report, summary_rows
from coala.recipe import Recipe
from coala.store import Run
from coala.values import CoalaError

__all__ = [
    "OnNote",
    "OnProgress",
    "align",
    "check_settings",
    "evidence_notes",
    "load_run",
    "make_report",
    "summary_rows",
]


def align(
    recipe: Recipe,
    run: Run,
    *,
    on_progress: OnProgress | None = None,
    on_note: OnNote | None = None,
    separate: bool | None = None,
    cache: Path | None = None,
    n_workers: int = 1,
) -> dict[str, Any]:
    """Carry out ``recipe`` in ``run`` and return the report's content; finished stages are skipped.

    Settings are checked before any work (:func:`check_settings`). A run that was started with another head, guidance or
    evaluation keeps what does not depend on them and redoes the rest; with other pairs or another model it is refused.
    ``separate`` runs every stage in a process of its own (default: when the machine has an NVIDIA GPU). Features are
    taken from the folder ``cache`` if it has them, and added to it: by model, settings and pairs, for any head;
    ``n_workers`` processes of this machine extract them together, each with the model in memory. ``on_note`` is told
    what is decided on the way. Raises :class:`~coala.values.CoalaError` for input that cannot be used, for a run whose
    features are of other settings, and for one that another process is at work in.
    """
    recipe = recipe.located()
    note = quiet if on_note is None else on_note
    check_settings(recipe, run, cache)
    with run.held():
        new = not (run.path / "run.json").exists()
        for line in adopt(recipe, run):
            note(line)
        try:
            carry_out(recipe, run, on_progress, note, separate=separate, cache=cache, n_workers=n_workers)
        except CoalaError:
            # Input that could not be used leaves nothing behind, so that the mended command starts afresh.
            if new and not (run.path / "features").exists():
                run.restart()
            raise
        return make_report(run)
