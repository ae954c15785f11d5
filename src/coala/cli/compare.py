"""`coala compare`: methods x models x datasets x seeds, and one report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coala.cli.options import bytes_of
from coala.cli.terminal import write
from coala.cli.tracking import Track, tracked
from coala.messages import CoalaError

if TYPE_CHECKING:
    from coala.compare import Study
    from coala.compare.matrix import Cell
    from coala.settings import TrackerName


def compare(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="YAML file of a study, or the name of a bundled study.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Output folder; an existing comparison is resumed (default: runs/RECIPE)."),
    ] = None,
    data: Annotated[Path, typer.Option(help="Folder of the recipe's data: paths.")] = Path("../shared/data"),
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Override a setting of the study. Repeatable."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only plan every cell (memory, FLOPs, time); needs no weights.")
    ] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Retry failed cells.")] = False,
    memory: Annotated[
        str | None, typer.Option(help="Memory limit of a cell's process, such as 8GiB (default: none).")
    ] = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Only write the report of the finished cells.")
    ] = False,
    track: Track = None,
) -> None:
    """Compare COALA with SFT, DPO, ORPO, SimPO and reward models on the same pairs, tokens and metrics, with costs.

    Every cell (method, setting, model, dataset, seed) runs in its own process. Rerun the same command to resume:
    finished cells are skipped and training continues from its checkpoint. A cell that fails or runs out of memory is
    reported with its plan.

    Examples:

    `coala compare laptop --out runs/laptop`

    `coala compare my-study.yaml --dry-run`

    `coala compare laptop --set seeds=[0] --out runs/quick`
    """
    from coala.cli.output import emit, table
    from coala.compare import load_study, summary_rows, write_report
    from coala.costs.measured import machine
    from coala.recipe import set_option

    study = load_study(recipe, data, [set_option(option) for option in set_ or []])
    if dry_run:
        _show_plan(study)
        return
    folder = out or Path("runs") / Path(recipe).name.removesuffix(".yaml")
    if report_only:
        _require_comparison(folder)
    else:
        _carry_out(study, folder, retry, bytes_of(memory), track)
    command = " ".join([f"coala compare {recipe}", *(f"--set {option}" for option in set_ or [])])
    content = write_report(study, folder, command=command, machine=machine())
    head, *rows = summary_rows(content)
    table(rows, head)
    write(f"\nreport: {folder / 'report.html'}")
    emit({"out": folder, "report": folder / "report.html", **content["counts"]})


def _carry_out(study: Study, folder: Path, retry: bool, memory: int | None, track: TrackerName | None) -> None:
    """Bring every cell up to date; what each found is told to the tracker, if there is one."""
    from coala.cli.output import progress
    from coala.compare import run
    from coala.compare.cell import read

    with tracked(track, folder, study.model_dump(mode="json")) as told, progress() as show:

        def on_cell(done: int, total: int, cell: Cell, note: str) -> None:
            show("cells", done, total, f"{done} of {total}  {note}")
            if note != cell.id and (record := read(folder / "cells" / cell.id)) is not None:
                told.log({cell.id: {"done": record["status"] == "done", **record.get("result", {})}})

        run(
            study,
            folder,
            on_cell=on_cell,
            on_work=lambda cell, stage, *rest: show(f"{cell.id}: {stage}", *rest),
            on_pairs=show,
            retry=retry,
            memory=memory,
        )


def _require_comparison(folder: Path) -> None:
    from coala.compare.cell import PLAN

    if not (folder / PLAN).is_file():
        raise CoalaError(f"{folder}: is not a comparison folder. Fix: name one with --out, or remove --report-only.")


def _show_plan(study: Study) -> None:
    from coala.cli.output import emit, table
    from coala.compare import PLAN_HEAD, plan_rows, plan_study, plan_total

    planned = plan_study(study)
    table(plan_rows(planned, study), PLAN_HEAD)
    emit({"study": study.title, **plan_total(planned)})
