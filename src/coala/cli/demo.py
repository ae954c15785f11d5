"""`coala demo`: the main job on the bundled film model and pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder; continued if begun.")] = Path("runs/demo"),
    restart: Annotated[bool, typer.Option("--restart", help="Delete what the folder holds and start over.")] = False,
) -> None:
    """Align the bundled film-review model to positive reviews: offline, on a CPU, in about a minute.

    The judge that compares guided with unguided replies shares no word and no training film with the scorer that
    labelled the pairs.

    Example: `coala demo --out runs/demo`
    """
    from importlib.resources import files

    from coala.cli.align import run_and_show
    from coala.recipe import load_recipe

    assets = Path(str(files("coala") / "assets"))
    settings = load_recipe(
        Path(str(files("coala") / "recipes" / "demo.yaml")),
        {
            "pairs": [str(assets / "film_pairs.jsonl.gz")],
            "eval_pairs": [str(assets / "film_pairs_test.jsonl.gz")],
            "model": {"name": str(assets / "film-lm")},
            "evaluation": {"judge": str(assets / "film-judge.json"), "labeller": str(assets / "film-labeller.json")},
        },
    )
    run_and_show(settings, out, restart, samples=3)
