"""`coala compare`: methods x models x datasets x seeds, and one report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from coala.cli.terminal import write


def compare(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A study's YAML file, or a bundled study's name.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the comparison, continued if begun; runs/RECIPE.")
    ] = None,
    data: Annotated[Path, typer.Option(help="Folder that data: paths of the recipe lie in.")] = Path("../shared/data"),
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any setting of the study.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Plan every cell (memory, FLOPs, time); no weights are needed.")
    ] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Run failed cells again.")] = False,
    memory: Annotated[
        str | None, typer.Option(help="End and report a cell whose process takes more, such as 8GiB.")
    ] = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Write the report of the cells there are.")
    ] = False,
) -> None:
    """Compare COALA with SFT, DPO, ORPO, SimPO and reward models: the same pairs, tokens and measures, costs counted.

    Every cell (method, setting, model, dataset, seed) runs in a process of its own. Run the same command again after
    an interruption: cells that are done are skipped, training goes on from its checkpoint. A cell that fails, or runs
    out of memory, is reported with its plan.

    Examples:

    `coala compare laptop --out runs/laptop`

    `coala compare my-study.yaml --dry-run`

    `coala compare laptop --set seeds=[0] --out runs/quick`
    """
    from coala.cli.options import bytes_of
    from coala.cli.output import emit, progress, table
    from coala.compare import PLAN_HEAD, load_study, plan_rows, plan_study, run, summary_rows, write_report
    from coala.compare.cell import PLAN
    from coala.recipe import set_option
    from coala.values import CoalaError

    study = load_study(recipe, data, [set_option(option) for option in set_ or []])
    name = Path(recipe).name.removesuffix(".yaml")
    if dry_run:
        planned = plan_study(study)
        table(plan_rows(planned, study), PLAN_HEAD)
        from coala.compare import plan_total

        emit({"study": study.title, **plan_total(planned)})
        return
    folder = out or Path("runs") / name
    if report_only and not (folder / PLAN).is_file():
        raise CoalaError(
            f"{folder}: is not the folder of a comparison. Name one with --out, or leave out --report-only."
        )
    if not report_only:
        limit = bytes_of(memory)
        with progress() as show:

            def on_cell(done: int, total: int, cell: Any, note: str) -> None:
                show("cells", done, total, f"{done} of {total}  {note}")

            def on_work(cell: Any, stage: str, done: float, total: float | None, note: str) -> None:
                show(f"{cell.id}: {stage}", done, total, note)

            run(study, folder, on_cell=on_cell, on_work=on_work, retry=retry, memory=limit)
    command = f"coala compare {recipe}" + "".join(f" --set {option}" for option in set_ or [])
    content = write_report(study, folder, command=command, machine=_machine())
    head, *rows = summary_rows(content)
    table(rows, head)
    write(f"\nreport: {folder / 'report.html'}")
    emit({"out": folder, "report": folder / "report.html", **content["counts"]})


def _machine() -> dict[str, str]:
    """What the numbers were measured on, and the commit of this package where it is a checkout."""
    import os
    import platform
    import subprocess
    from importlib.metadata import PackageNotFoundError, version

    found = {"cores": str(os.cpu_count()), "Python": platform.python_version()}
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        found["processor"] = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        found["processor"] = platform.machine()
    for name in ("torch", "jax", "trl", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    for name, command in (
        ("GPU", ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]),
        ("commit", ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]),
    ):
        try:
            told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.split("\n")
        except (OSError, subprocess.SubprocessError):
            continue
        if told[0].strip():
            found[name] = told[0].strip()
    return found
