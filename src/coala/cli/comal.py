"""`coala comal`: Nash policies of preference games, the user's own and the paper's."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coala.cli import comal_matrix, comal_train
from coala.cli.terminal import write

if TYPE_CHECKING:
    from coala.nash.solvers import Result

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Nash policies of preference games (COMAL).")
app.command("train", epilog=comal_train.EPILOG)(comal_train.train)
app.command("matrix", epilog=comal_matrix.EPILOG)(comal_matrix.matrix)
SHOWN = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
COLUMNS = 8  # answers whose probabilities fit beside each other


class Method(StrEnum):
    """What runs."""

    comal = "comal"
    mwu = "mwu"
    ipo = "ipo"
    dpo = "dpo"
    sppo = "sppo"
    inpo = "inpo"
    mirror_prox = "mirror_prox"
    omwu = "omwu"


class Inner(StrEnum):
    """What solves the inner games of comal."""

    exact = "exact"
    md = "md"
    inpo = "inpo"
    sppo = "sppo"
    dro = "dro"
    rebel = "rebel"


class Oracle(StrEnum):
    """What a judge tells of a drawn pair."""

    labels = "labels"
    probabilities = "probabilities"


GAME_FILE = """
\b
FILE holds one game, or one per prompt:
  {"P": [[0.5, 0.1, 0.8], [0.9, 0.5, 0.1], [0.2, 0.9, 0.5]],
   "labels": ["a", "b", "c"], "start": [0.2, 0.5, 0.3]}
  {"prompts": {"first": {"P": [...], "labels": [...], "start": [...], "weight": 0.7}, "second": {...}}}

P[i][j] is the probability that answer i beats answer j, so P[i][j] + P[j][i] = 1. labels, start (uniform) and weight
(equal) may be left out.

\b
Examples: `coala comal game game.json --out game.html`
  `coala comal game game.json --method comal --inner md --eta 0.3 --tau 0.1 --inner-steps 25`
"""


@app.command(epilog=GAME_FILE)
def game(
    file: Annotated[Path, typer.Argument(metavar="FILE.json", help="The game; its form is described below.")],
    method: Annotated[Method, typer.Option(help="Which method runs.")] = Method.comal,
    inner: Annotated[Inner, typer.Option(help="comal: Newton (`exact`) or a loss with inner steps.")] = Inner.exact,
    eta: Annotated[float | None, typer.Option(help="Step size, not its inverse (default: 0.3).")] = None,
    beta: Annotated[float | None, typer.Option(help="Instead of --eta: its inverse, as in preference losses.")] = None,
    tau: Annotated[float, typer.Option(help="Strength of the regularisation (comal, inpo).")] = 0.1,
    outer: Annotated[
        int | None,
        typer.Option(min=1, help="Number of updates (default: 200 for comal, else 5000).", show_default=False),
    ] = None,
    inner_steps: Annotated[
        int | None, typer.Option(min=1, help="comal: inner updates per outer update (default: 25).")
    ] = None,
    pairs_per_step: Annotated[
        int | None, typer.Option(min=1, help="Draw so many pairs per step (default: exact expectations).")
    ] = None,
    oracle: Annotated[Oracle | None, typer.Option(help="What the judge of a drawn pair tells; `labels`.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the drawn pairs.")] = 0,
    tol: Annotated[float | None, typer.Option(help="Stop at this duality gap.")] = None,
    out: Annotated[Path | None, typer.Option(help="Page to write (.html), or the figure of the path (.svg).")] = None,
) -> None:
    """Solve a game: print its Nash policy, the path of the method and the duality gap."""
    from coala.cli.output import emit, progress, say
    from coala.nash import load_game, solve
    from coala.values import CoalaError

    if out is not None and out.suffix not in (".html", ".svg"):
        raise CoalaError(f"--out {out} ends in {out.suffix or 'nothing'}; expected a page (.html) or a figure (.svg).")
    problem, start = load_game(file)
    updates = outer or (200 if method is Method.comal else 5000)
    with progress() as show:
        result = solve(
            problem,
            start,
            method=method.value,
            inner=inner.value,
            eta=eta,
            beta=beta,
            tau=tau,
            outer=outer,
            inner_steps=inner_steps,
            pairs_per_step=pairs_per_step,
            oracle=oracle.value if oracle else None,
            seed=seed,
            tol=tol,
            on_update=lambda update, gap: show("solve", update, updates, f"gap {gap:.1e}"),
        )
    for note in result.notes:
        say(str(note))
    _print_path(result)
    if out is not None:
        _write(out, result, file)
    emit(
        {
            "method": result.method,
            "converged": result.converged,
            "reason": result.reason,
            "updates": len(result.history) - 1,
            "gap": result.gap,
            "kl": result.history.kl[-1],
            "policy": _named(result, result.policy),
            "nash": _named(result, result.nash.strategy),
            "nash_unique": result.nash.unique,
            "warnings": [note.text for note in result.notes if note.level == "warning"],
            "out": None if out is None else str(out),
        }
    )


@app.command(epilog="Example: `coala comal paper --out comal.html`")
def paper(
    out: Annotated[Path, typer.Option(help="Page to write (.html).")],
    pairs: Annotated[int, typer.Option(min=1, help="Pairs drawn per proximal step in the sampled runs.")] = 10_000,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each sampled method.")] = 5,
) -> None:
    """Run the paper's synthetic experiment (its Figures 1 and 2), noiseless and sampled, and write one page."""
    from coala.cli.output import emit, progress, table
    from coala.nash.page import paper_page
    from coala.nash.paper import run_selections, run_study
    from coala.store import write_atomic
    from coala.values import CoalaError

    if out.suffix != ".html":
        raise CoalaError(f"--out {out} ends in {out.suffix or 'nothing'}; expected a page (.html).")
    with progress() as show:
        study = run_study(pairs=pairs, seeds=seeds, on_run=lambda done, total, name: show("runs", done, total, name))
        selections = run_selections()
    write_atomic(out, paper_page(study, selections))
    noisy = {row.entry.name: row.tail_gap for row in study.sampled}
    rows = [
        [
            row.entry.name,
            f"{row.first.gap:.2e}",
            str(row.first.converged).lower(),
            str(noisy.get(row.entry.name) or "-"),
        ]
        for row in study.noiseless
    ]
    table(rows, ["method", "gap, no noise", "converged", f"gap, {pairs} pairs per step: mean [95 %]"])
    emit(
        {
            "out": out,
            "pairs_per_step": pairs,
            "seeds": seeds,
            "noiseless": {row.entry.name: row.first.gap for row in study.noiseless},
            "sampled": noisy,
        }
    )


def _print_path(result: Result) -> None:
    """Nash strategy and the policies of a few updates, a table per prompt."""
    import numpy as np

    from coala.cli.output import table

    solved, history = result.game, result.history
    last = len(history) - 1
    updates = [update for update in SHOWN if update < last] + [last]
    nash = solved.parts(result.nash.strategy)
    for prompt, names, strategy, z in zip(solved.prompts, solved.names, nash, history.log_policy, strict=True):
        if prompt:
            write(f"\n{prompt}")
        shown = np.sort(np.argsort(-np.maximum(strategy, np.exp(z[-1])), kind="stable")[:COLUMNS])
        rows = [
            [str(t), f"{history.gap[t]:.2e}", f"{history.kl[t]:.2e}", *(f"{p:.6f}" for p in np.exp(z[t, shown]))]
            for t in updates
        ]
        rows.append(["Nash", "0", "0", *(f"{p:.6f}" for p in strategy[shown])])
        table(rows, ["update", "gap", "KL", *(names[i] for i in shown)])


def _write(out: Path, result: Result, file: Path) -> None:
    from coala.nash.page import game_page
    from coala.store import write_atomic

    write_atomic(out, result.plot_simplex() if out.suffix == ".svg" else game_page(result, file.name))


def _named(result: Result, policy: Any) -> dict[str, Any]:
    """Probabilities by label, by prompt first where there are several."""
    solved = result.game
    parts = [
        dict(zip(names, part.tolist(), strict=True))
        for names, part in zip(solved.names, solved.parts(policy), strict=True)
    ]
    return dict(zip(solved.prompts, parts, strict=True)) if solved.contextual else parts[0]
