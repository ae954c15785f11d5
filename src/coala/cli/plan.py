"""`coala plan`: what a run will cost, before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from coala.choices import Method, Quantise, Template
from coala.cli.options import DEVICE_HELP, DTYPE_OPTION, LAYER_OPTION, TrustCode


def plan(
    pairs: Annotated[
        list[str] | None, typer.Argument(metavar="PAIRS...", help="Training pairs: file(s) or a hub dataset.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Local model folder or hub name; weights are not needed.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A config.json to take the model's sizes from.")] = None,
    rows: Annotated[int | None, typer.Option(help="Plan for so many pairs like those given.")] = None,
    tokens_per_prompt: Annotated[int | None, typer.Option(help="Tokens of every prompt, instead of counting.")] = None,
    tokens_per_reply: Annotated[int | None, typer.Option(help="Tokens of every reply, instead of counting.")] = None,
    gpu_memory: Annotated[
        str | None, typer.Option(help="Plan for a GPU with this much, such as 24GiB; default: what is free here.")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="Memory there will be; default: what is free here.")] = None,
    disk: Annotated[str | None, typer.Option(help="Disk there will be; default: what is free here.")] = None,
    probe: Annotated[float, typer.Option(min=0, help="Seconds to encode rows for, to tell the time; 0: none.")] = 5.0,
    eval_pairs: Annotated[
        list[str] | None, typer.Option("--eval", help="Held-out pairs; without it whole groups of PAIRS are held out.")
    ] = None,
    format: Annotated[str | None, typer.Option(help="Format of the pairs (default: recognised).")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out rows with errors.")] = False,
    recipe: Annotated[Path | None, typer.Option(help="YAML file with any of the settings; flags win.")] = None,
    template: Annotated[Template | None, typer.Option(help="How conversations are rendered.")] = None,
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    dtype: Annotated[str | None, DTYPE_OPTION] = None,
    quantise: Annotated[Quantise | None, typer.Option(help="By bitsandbytes.")] = None,
    layer: Annotated[str | None, LAYER_OPTION] = None,
    prefixes: Annotated[int | None, typer.Option(help="Fit on this many prefixes of every reply.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest prompt plus reply.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens of a forward pass.")] = None,
    method: Annotated[Method | None, typer.Option(help="How the head is fitted.")] = None,
    prompts: Annotated[int | None, typer.Option(help="Held-out prompts to answer for the report.")] = None,
    n_workers: Annotated[int, typer.Option("--workers", min=1, help="Processes that share the extraction.")] = 1,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any setting of the recipe.")
    ] = None,
    trust_remote_code: TrustCode = False,
) -> None:
    """Tokens, FLOPs, memory, disk and time of `coala align`, told before anything is done; refuses what cannot fit.

    Without weights a model is planned from its config.json. Where something is short, the flags that make it fit are
    named, and the exit code is 2. No weights are fetched; those that are here are loaded to tell the time.

    Examples:

    `coala plan pairs.jsonl --model ./my-model`

    `coala plan pairs.jsonl --config llama/config.json --gpu-memory 24GiB --rows 65606`

    `coala plan --config llama/config.json --rows 65606 --tokens-per-prompt 200 --tokens-per-reply 150`
    """
    from dataclasses import asdict

    from coala.cli.options import bytes_of
    from coala.cli.output import emit, table
    from coala.plan.plan import make_plan
    from coala.plan.text import table_rows
    from coala.plan.tokens import Guess
    from coala.recipe import load_recipe, set_option
    from coala.values import CoalaError

    if (tokens_per_prompt is None) != (tokens_per_reply is None):
        raise CoalaError("One of --tokens-per-prompt and --tokens-per-reply was given; expected both or neither.")
    guess = None
    if tokens_per_prompt is not None and tokens_per_reply is not None:
        guess = Guess(tokens_per_prompt, tokens_per_reply)
    overrides: dict[str, Any] = {
        # None would leave the recipe without pairs, which a plan may do.
        "pairs": pairs or (None if recipe else []),
        "eval_pairs": eval_pairs or None,
        "format": format,
        "skip_bad": skip_bad or None,
        "model": {
            "name": model or (None if config is None else str(config)),
            "template": template,
            "layer": layer,
            "prefixes": prefixes,
            "device": device,
            "dtype": dtype,
            "quantise": quantise,
            "max_tokens": max_tokens,
            "batch_tokens": batch_tokens,
        },
        "head": {"method": method},
        "evaluation": {"prompts": prompts},
    }
    found = make_plan(
        load_recipe(recipe, overrides, *map(set_option, set_ or [])),
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
