"""One alignment from pairs to report: the stages in their order, and what a finished run holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coala.alignment.changes import adopt
from coala.alignment.checks import check_settings
from coala.alignment.evidence import evidence_notes
from coala.alignment.parts import load_parts
from coala.alignment.processes import carry_out
from coala.alignment.results import make_report, summary_rows
from coala.alignment.run import Run, load_run
from coala.callbacks import OnNote, OnProgress, quiet
from coala.recipe import Recipe, recipe_of
from coala.store import RunFolder, load_pairs, save_pairs
from coala.values import CoalaError, Pair

__all__ = [
    "OnNote",
    "OnProgress",
    "Run",
    "align",
    "align_recipe",
    "check_settings",
    "evidence_notes",
    "load_parts",
    "load_run",
    "make_report",
    "summary_rows",
]


def align_recipe(
    recipe: Recipe,
    run: RunFolder,
    *,
    on_progress: OnProgress | None = None,
    on_note: OnNote | None = None,
    separate: bool | None = None,
    cache: Path | None = None,
    n_workers: int = 1,
) -> dict[str, Any]:
    """Carry out ``recipe`` in the folder ``run`` and return the report's content; finished stages are skipped.

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


def align(
    pairs: Path | str | Sequence[Path | str] | Sequence[Pair],
    *,
    model: str | Path,
    out: Path | str,
    on_progress: OnProgress | None = None,
    on_note: OnNote | None = None,
    cache: Path | None = None,
    n_workers: int = 1,
    **settings: Any,
) -> Run:
    """Align ``model``, a folder or hub name, with ``pairs`` in the folder ``out``, and return the finished run.

    ``pairs`` is a file, several, or pairs themselves, which are then kept beside the folder as ``OUT.pairs.jsonl``. All
    else of a recipe goes by its own name: ``head={"method": "linear"}, evaluation={"prompts": 0}, seed=1``; the model's
    other settings as ``model_settings={"layer": "auto"}``. Called again it resumes, or returns what is finished; the
    rest is as in :func:`align_recipe`.

        run = coala.align("pairs.jsonl", model="./my-model", out="runs/mine")
        print(run.head.certificate.statement)
        print(run.generate(["How do I ask for a rise?"])[0].text)
    """
    files: list[Any] = [pairs] if isinstance(pairs, str | Path) else list(pairs)
    if files and all(isinstance(pair, Pair) for pair in files):
        kept = Path(f"{out}.pairs.jsonl")
        if not kept.exists():
            save_pairs(kept, files)
        elif load_pairs(kept) != files:
            raise CoalaError(
                f"{kept}: found other pairs, from an earlier run. Fix: use another out, or delete that file."
            )
        files = [kept]
    elif not all(isinstance(file, str | Path) for file in files):
        kinds = sorted({type(file).__name__ for file in files})
        raise CoalaError(f"pairs: found {', '.join(kinds)}, expected a file, several files, or Pair objects.")
    about = {"name": str(model), **settings.pop("model_settings", {})}
    recipe = recipe_of({"pairs": [str(file) for file in files], "model": about, **settings})
    options: dict[str, Any] = {"on_progress": on_progress, "on_note": on_note, "cache": cache, "n_workers": n_workers}
    align_recipe(recipe, RunFolder(out), **options)
    return load_run(out, trust_remote_code=recipe.model.trust_remote_code)
