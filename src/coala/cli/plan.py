"""`coala plan`: what a run will cost, before it runs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from coala.cli.flags import Given, Of, with_settings
from coala.cli.options import RecipeFile, SetOption, TrustCode, Workers, bytes_of
from coala.messages import CoalaError
from coala.settings import EvaluationSettings, GuidanceSettings, HeadSettings, ModelSettings, PairSettings


@with_settings
def plan(
    pairs: Annotated[
        list[str] | None, typer.Argument(metavar="PAIRS...", help="File(s) of training pairs, or a hub dataset.")
    ] = None,
    *,
    model: Annotated[Given, Of(ModelSettings)],
    config: Annotated[
        Path | None, typer.Option(help="File config.json with the model's sizes (default: the model's own).")
    ] = None,
    rows: Annotated[int | None, typer.Option(help="Number of pairs to plan for (default: the pairs given).")] = None,
    tokens_per_prompt: Annotated[int | None, typer.Option(help="Tokens per prompt (default: counted).")] = None,
    tokens_per_reply: Annotated[int | None, typer.Option(help="Tokens per reply (default: counted).")] = None,
    gpu_memory: Annotated[
        str | None, typer.Option(help="GPU memory to plan for, such as 24GiB (default: what is free here).")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory to plan for, such as 64GiB (default: what is free here).")
    ] = None,
    disk: Annotated[
        str | None, typer.Option(help="Disk space to plan for, such as 100GiB (default: what is free here).")
    ] = None,
    probe: Annotated[
        float, typer.Option(min=0, help="Time to spend encoding rows for the estimate, in seconds; 0 skips it.")
    ] = 5.0,
    recipe: RecipeFile = None,
    which: Annotated[Given, Of(PairSettings)],
    head: Annotated[Given, Of(HeadSettings)],
    guidance: Annotated[Given, Of(GuidanceSettings)],
    evaluation: Annotated[Given, Of(EvaluationSettings)],
    n_workers: Workers = 1,
    set_: SetOption = None,
    trust_remote_code: TrustCode = False,
) -> None:
    """Estimate tokens, FLOPs, memory, disk and time of `coala align` before it runs; fails if it cannot fit.

    A model without weights is planned from its config.json. If memory or disk is too small, the flags that make it fit
    are listed and the exit code is 2. No weights are downloaded; local ones are loaded to estimate the time.

    Examples:

    `coala plan pairs.jsonl --model ./my-model`

    `coala plan pairs.jsonl --config llama/config.json --gpu-memory 24GiB --rows 65606`

    `coala plan --config llama/config.json --rows 65606 --tokens-per-prompt 200 --tokens-per-reply 150`
    """
    from coala.cli.output import emit, table
    from coala.plan.plan import make_plan
    from coala.plan.text import table_rows
    from coala.plan.tokens import Guess
    from coala.recipe import load_recipe, set_option

    if (tokens_per_prompt is None) != (tokens_per_reply is None):
        raise CoalaError("Found only one of --tokens-per-prompt and --tokens-per-reply, expected both or neither.")
    guess = None
    if tokens_per_prompt is not None and tokens_per_reply is not None:
        guess = Guess(tokens_per_prompt, tokens_per_reply)
    # A plan may do without pairs, and sizes tell what a name would.
    own = {"name": None if config is None else str(config), **model}
    given = {"pairs": pairs or (None if recipe else []), **which, "model": own}
    given |= {"head": head, "guidance": guidance, "evaluation": evaluation}
    found = make_plan(
        load_recipe(recipe, given, *map(set_option, set_ or [])),
        probe_seconds=probe,
        memory=bytes_of(memory),
        device_memory=bytes_of(gpu_memory),
        disk=bytes_of(disk),
        config=config,
        rows=rows,
        guess=guess,
        n_workers=n_workers,
    )
    table(table_rows(found))
    emit(asdict(found))
    found.require()
