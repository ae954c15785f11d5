"""`coala comal`: Nash policies of preference games, the user's own and the paper's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from coala.cli import comal_matrix, comal_train
from coala.cli.flags import with_settings
from coala.cli.terminal import write
from coala.messages import CoalaError

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Nash policies of preference games (COMAL).")
app.command("train", epilog=comal_train.EPILOG)(comal_train.train)
app.command("matrix", epilog=comal_matrix.EPILOG)(comal_matrix.matrix)


GAME_FILE = """
\b
FILE holds one game, or one per prompt:
  {"P": [[0.5, 0.1, 0.8], [0.9, 0.5, 0.1], [0.2, 0.9, 0.5]],
   "labels": ["a", "b", "c"], "start": [0.2, 0.5, 0.3]}
  {"prompts": {"first": {"P": [...], "labels": [...], "start": [...], "weight": 0.7}, "second": {...}}}

P[i][j] is the probability that answer i beats answer j, so P[i][j] + P[j][i] = 1. labels, start (uniform) and weight
(equal) are optional.

\b
Examples: `coala comal game game.json --out game.html`
  `coala comal game game.json --method comal --inner md --eta 0.3 --tau 0.1 --inner-steps 25`
"""


@dataclass(frozen=True, kw_only=True)
class SolverFlags:
    """Arguments of ``coala.nash.solve``."""

    method: Annotated[
        Literal["comal", "mwu", "ipo", "dpo", "sppo", "inpo", "mirror_prox", "omwu"],
        typer.Option(help="Algorithm to run."),
    ] = "comal"
    inner: Annotated[
        Literal["exact", "md", "inpo", "sppo", "dro", "rebel"],
        typer.Option(help="Solver of the inner game, for comal: Newton (`exact`) or inner steps on a loss."),
    ] = "exact"
    eta: Annotated[float | None, typer.Option(help="Step size (default: 0.3).")] = None
    beta: Annotated[
        float | None, typer.Option(help="1 / eta, as in preference losses; instead of --eta (default: 1/0.3).")
    ] = None
    tau: Annotated[float, typer.Option(help="Strength of the regularisation (comal, inpo).")] = 0.1
    outer: Annotated[
        int | None,
        typer.Option(min=1, help="Number of updates (default: 200 for comal, else 5000).", show_default=False),
    ] = None
    inner_steps: Annotated[
        int | None, typer.Option(min=1, help="Number of inner updates per outer update, for comal (default: 25).")
    ] = None
    pairs_per_step: Annotated[
        int | None, typer.Option(min=1, help="Pairs sampled per step (default: exact expectations).")
    ] = None
    oracle: Annotated[
        Literal["labels", "probabilities"] | None,
        typer.Option(help="Output of the judge for a sampled pair (default: labels)."),
    ] = None
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the sampled pairs.")] = 0
    tol: Annotated[float | None, typer.Option(help="Duality gap at which to stop (default: never).")] = None


@app.command(epilog=GAME_FILE)
@with_settings
def game(
    file: Annotated[Path, typer.Argument(metavar="FILE.json", help="File of the game, in the format below.")],
    *,
    settings: SolverFlags,
    out: Annotated[
        Path | None, typer.Option(help="Page (.html) or figure of the path (.svg) to write (default: none).")
    ] = None,
) -> None:
    """Solve a game: print its Nash policy, the iterates of the method and the duality gap."""
    from coala.cli.output import emit, progress, say, table
    from coala.nash import load_game, solve
    from coala.nash.page import game_page
    from coala.nash.text import path_tables, summary
    from coala.store import write_atomic

    if out is not None and out.suffix not in (".html", ".svg"):
        raise CoalaError(f"--out {out} ends in {out.suffix or 'nothing'}; expected a page (.html) or a figure (.svg).")
    problem, start = load_game(file)
    updates = settings.outer or (200 if settings.method == "comal" else 5000)
    with progress() as show:
        result = solve(
            problem,
            start,
            **vars(settings),
            on_update=lambda update, gap: show("solve", update, updates, f"gap {gap:.1e}"),
        )
    for note in result.notes:
        say(str(note))
    for prompt, head, rows in path_tables(result):
        if prompt:
            write(f"\n{prompt}")
        table(rows, head)
    if out is not None:
        write_atomic(out, result.plot_simplex() if out.suffix == ".svg" else game_page(result, file.name))
    emit({**summary(result), "out": None if out is None else str(out)})


@app.command(epilog="Example: `coala comal paper --out comal.html`")
def paper(
    out: Annotated[Path, typer.Option(help="Page to write (.html).")],
    pairs: Annotated[int, typer.Option(min=1, help="Pairs sampled per proximal step in the sampled runs.")] = 10_000,
    seeds: Annotated[int, typer.Option(min=1, help="Number of runs of each sampled method.")] = 5,
) -> None:
    """Run the paper's synthetic experiment (its Figures 1 and 2), noiseless and sampled, and write one page."""
    from coala.cli.output import emit, progress, table
    from coala.nash.page import paper_page
    from coala.nash.paper import run_selections, run_study
    from coala.nash.text import study_summary, study_table
    from coala.store import write_atomic

    if out.suffix != ".html":
        raise CoalaError(f"--out {out} ends in {out.suffix or 'nothing'}; expected a page (.html).")
    with progress() as show:
        study = run_study(pairs=pairs, seeds=seeds, on_run=lambda done, total, name: show("runs", done, total, name))
        selections = run_selections()
    write_atomic(out, paper_page(study, selections))
    head, rows = study_table(study)
    table(rows, head)
    emit({"out": out, "pairs_per_step": pairs, "seeds": seeds, **study_summary(study)})
