"""One cell, in a process of its own: do its work, write what came of it, or why nothing did."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

from coala.compare.cell_context import CellContext, Costs
from coala.compare.loading import study_of
from coala.compare.matrix import Cell, cells
from coala.compare.progress import OnStage, unheard
from coala.compare.study import Study
from coala.store import claim, load_json, load_object, save_json
from coala.values import CoalaError

CELL = "cell.json"
PLAN = "compare.json"


def carry_out(out: Path, name: str, tell: OnStage = unheard, *, forked: bool = False) -> int:
    """Do the cell ``name`` of the study in ``out``; 0 if it is done, 1 if it failed and says why in its file.

    ``tell`` is told how far it is. ``forked`` says that the process shares its libraries with another, so that its peak
    memory says nothing.
    """
    study = study_of(load_json(out / PLAN)["study"])
    cell = next(cell for cell in cells(study) if cell.id == name)
    folder = out / "cells" / name
    stamp = load_json(out / PLAN)["stamps"][name]
    # The process of a comparison that was killed may still be at it.
    with claim(folder / ".lock", wait=True):
        done = read(folder)
        if done is not None and done["status"] == "done":
            return 0
        try:
            result, costs = _done(study, cell, out, tell)
        except Exception as error:  # noqa: BLE001  a failed cell is a result too, whatever failed
            if not isinstance(error, CoalaError) and not out_of_memory(error):
                save_json(folder / "traceback.json", {"traceback": traceback.format_exc()})
            write(folder, stamp, "failed", {"error": worded(error), "memory": out_of_memory(error)})
            return 1
        for part in costs.values() if forked else ():
            part["measured"]["peak_bytes"] = {}
        write(folder, stamp, "done", {"result": result, "costs": costs})
        if cell.kind == "train":
            from coala.compare.trained import tidy

            tidy(CellContext(study, cell, out))
    return 0


def read(folder: Path) -> dict[str, Any] | None:
    """A cell's file, if it is written."""
    path = folder / CELL
    if not path.is_file():
        return None
    return load_object(path, "status", "inputs")


def write(folder: Path, stamp: str, status: str, content: dict[str, Any]) -> None:
    """The cell's file: whole or not at all, so that a cell is done or is begun again."""
    save_json(folder / CELL, {"status": status, "inputs": stamp, **content})


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of host or device."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(
        sign in text for sign in ("out of memory", "can't allocate memory", "not enough memory", "resource_exhausted")
    )


def worded(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return text if isinstance(error, CoalaError) else f"{type(error).__name__}: {text}"


def _done(study: Study, cell: Cell, out: Path, tell: OnStage) -> tuple[dict[str, Any], dict[str, Any]]:
    libraries(library_set(study, cell))
    context, costs = CellContext(study, cell, out, tell), Costs()
    if cell.kind == "train":
        from coala.compare.trained import train_cell

        return train_cell(context, costs), costs.parts
    if cell.kind == "count":
        from coala.compare.heads import count_head
        from coala.compare.trained import count_training

        return (count_training if context.method.trained else count_head)(context), costs.parts
    from coala.compare import benchmarks, controls, heads, lessons, output_policies, steered

    at_work = {
        "base": heads.base_cell,
        "features": heads.features_cell,
        "head": heads.head_cell,
        "adamw": controls.adamw_cell,
        "layers": controls.layers_cell,
        "cues": controls.cues_cell,
        "prompt": steered.prompt_cell,
        "guided": steered.guided_cell,
        "teacher": lessons.teacher_cell,
        "distilled": output_policies.distilled_cell,
        "lm-steer": output_policies.lm_steer_cell,
        "mean-difference": output_policies.mean_difference_cell,
        "bias": output_policies.bias_cell,
        "benchmark": benchmarks.benchmark_cell,
    }
    return at_work[cell.kind](context, costs), costs.parts


def library_set(study: Study, cell: Cell) -> str:
    """Which set of :func:`libraries` a cell needs."""
    method = next((m for m in study.methods if m.name == cell.method), None)
    if cell.kind == "train" or (cell.kind == "count" and method is not None and method.trained):
        return "train"
    return "features" if cell.kind == "features" else "head"


def libraries(name: str) -> None:
    """Load what cells will need before anything is measured, so that memory at the start is that of libraries."""
    import coala.backbone

    if name == "train":
        import coala.baselines
        from coala.baselines import trl, trl_adapter

        trl_adapter.require(trl("sft"))
        import trl as _trl

        _trl.SFTTrainer, _trl.DPOTrainer  # type: ignore[attr-defined]  # noqa: B018 - loads the lazy modules
    else:
        import coala.alignment.stages
        import coala.features
    if name == "head":
        import coala.convex
        import coala.decoding  # noqa: F401
