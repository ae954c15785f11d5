"""`coala fit`: features to a certified head."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from coala.cli.flags import every, with_settings
from coala.messages import CoalaError
from coala.settings import HeadSettings

By = Literal["rater", "source", "group"]


@with_settings
def fit(
    features: Annotated[Path, typer.Argument(help="Folder of `coala extract`, RUN/features/train, or a RUN.")],
    *,
    out: Annotated[Path | None, typer.Option(help="Folder for the head (default: for a RUN, its own).")] = None,
    settings: Annotated[HeadSettings, every(HeadSettings)],
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the fit.")] = 0,
    eval_features: Annotated[
        Path | None, typer.Option("--eval", help="Folder of features to measure ranking accuracy on (default: none).")
    ] = None,
    by: Annotated[
        By | None,
        typer.Option(help="Compare raters, sources or groups, and save a head for each that deviates (default: none)."),
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(
            help="With --by: file of the pairs the features are from, as `coala align` writes it (default: none)."
        ),
    ] = None,
) -> None:
    """Fit the convex head on extracted features and print its certificate; with --by, compare the raters.

    For a RUN, whose head exists, only --by is done.

    Examples: `coala fit RUN/features/train --eval RUN/features/eval --out head`

    `coala fit RUN --by rater`
    """
    from coala.cli.output import emit, progress, say, table

    of_run = by is not None and (features / "run.json").is_file()
    if of_run and (out, eval_features, pairs, seed, settings) != (None, None, None, 0, HeadSettings()):
        raise CoalaError(
            f"found other options for {features}, expected only --by: its head exists, fix: remove the other options"
        )
    found: dict[str, Any] = {}
    if not of_run:
        from coala.alignment.fitting import fit_folder

        to = _given(out, features)
        with progress() as show:
            found = fit_folder(features, to, settings, seed=seed, eval_features=eval_features, on_progress=show)
        say(str(found.pop("head").certificate))
        table(_figures(found))
    if by is not None:
        found |= {"raters": _compared(features, None if of_run else out, by, pairs, seed)}
    emit(found)


def _given(out: Path | None, features: Path) -> Path:
    if out is not None:
        return out
    if (features / "run.json").is_file():
        raise CoalaError(
            f"{features}: found a run, which already has a head, expected features, fix: pass "
            f"{features}/features/train and "
            "--out, or --by rater to compare its raters"
        )
    raise CoalaError("found no --out, expected a folder for the head, fix: pass --out FOLDER")


def _figures(found: dict[str, Any]) -> list[list[str]]:
    from coala.alignment.results import against_chance, calibration

    by_chance = found.get("calibration_error_by_chance")
    shown = {name: value for name, value in found.items() if isinstance(value, str | int | float)}
    shown.pop("calibration_error_by_chance", None)
    rows = [[name, f"{value:.6g}" if isinstance(value, float) else str(value)] for name, value in shown.items()]
    if by_chance is None:
        return rows
    return [
        *rows,
        ["ranking accuracy", against_chance(found["accuracy"])],
        ["calibration error", calibration(found["calibration_error"], by_chance)],
    ]


def _compared(features: Path, out: Path | None, by: By, pairs: Path | None, seed: int) -> dict[str, Any]:
    """Who agrees with the others, of a run or of the head in ``out``: in words and as a table."""
    from coala.cli.output import say, table
    from coala.cli.terminal import write
    from coala.receipts import rater_effects, rater_effects_of
    from coala.report.raters import rater_head, rater_rows, rater_words
    from coala.store import plain

    if out is None:
        found = rater_effects(features, by=by, on_note=say)
    else:
        found = rater_effects_of(features, out, by=by, pairs=pairs, seed=seed, on_note=say)
    told: dict[str, Any] = plain(found)
    write()
    table(rater_rows(told), rater_head(told))
    write("\n".join(rater_words(told)))
    return told
