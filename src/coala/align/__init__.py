"""One alignment from pairs to report: the stages in their order, and what a finished run holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coala.align.course import carry_out
from coala.align.evidence import evidence_notes
from coala.align.job import OnProgress
from coala.align.results import load_run, make_report, summary_rows
from coala.recipe import Recipe
from coala.store import Run
from coala.values import CoalaError

__all__ = ["OnProgress", "align", "evidence_notes", "load_run", "make_report", "summary_rows"]


def align(
    recipe: Recipe,
    run: Run,
    *,
    on_progress: OnProgress | None = None,
    separate: bool | None = None,
    cache: Path | None = None,
    n_workers: int = 1,
) -> dict[str, Any]:
    """Carry out ``recipe`` in ``run`` and return the report's content; finished stages are skipped.

    ``separate`` runs every stage in a process of its own (default: when the machine has an NVIDIA GPU). Features are
    taken from the folder ``cache`` if it has them, and added to it: by model, settings and pairs, for any head;
    ``n_workers`` processes of this machine extract them together, each with the model in memory. Raises
    :class:`~coala.values.CoalaError` for input that cannot be used, for a run started with other settings, and for
    one that another process is at work in.
    """
    recipe = recipe.located()
    with run.held():
        new = not (run.path / "run.json").exists()
        run.start(recipe.model_dump(mode="json"))
        try:
            if on_progress is None:
                carry_out(recipe, run, separate=separate, cache=cache, n_workers=n_workers)
            else:
                carry_out(recipe, run, on_progress, separate, cache, n_workers)
        except CoalaError:
            # Input that could not be used leaves nothing behind, so that the mended command starts afresh.
            if new and not (run.path / "features").exists():
                run.restart()
            raise
        return make_report(run)
