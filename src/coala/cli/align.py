"""`coala align`: preference pairs in, a certified head, guided replies and a report out."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from coala.cli.options import TrustCode


def align(
    pairs: Annotated[
        list[str] | None, typer.Argument(metavar="PAIRS...", help="Training pairs: file(s) or a hub dataset.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Local model folder or hub name.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder; a run found there is continued.")] = Path(
        "runs/run"
    ),
    eval_pairs: Annotated[
        list[str] | None, typer.Option("--eval", help="Held-out pairs; without it whole groups of PAIRS are held out.")
    ] = None,
    format: Annotated[str | None, typer.Option(help="Format of the pairs; recognised if not given.")] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out rows with errors (the report lists them) instead of stopping.")
    ] = False,
    recipe: Annotated[Path | None, typer.Option(help="YAML file with any of the settings; flags win.")] = None,
    template: Annotated[str | None, typer.Option(help="auto, chat, dialogue or continuation.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, or offload (what does not fit waits).")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    adapter: Annotated[str | None, typer.Option(help="LoRA adapter of the model: a folder or hub name.")] = None,
    quantise: Annotated[str | None, typer.Option(help="8bit or 4bit, by bitsandbytes.")] = None,
    layer: Annotated[
        str | None, typer.Option(help="Hidden state to read; -1 is the last, auto the cheapest that is as good.")
    ] = None,
    pooling: Annotated[str | None, typer.Option(help="mean (over the reply), mean_all, last or attn.")] = None,
    prefixes: Annotated[int | None, typer.Option(help="Fit on this many prefixes of every reply.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens per forward pass.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest prompt plus reply.")] = None,
    method: Annotated[str | None, typer.Option(help="learnt, direct, two-phase or linear.")] = None,
    gate_on: Annotated[
        str | None, typer.Option(help="What gates look at: reply, prompt, or auto (both compete; encodes prompts too).")
    ] = None,
    reference_scale: Annotated[
        float | None, typer.Option(help="CVX-DPO: margin of this times the model's log ratio (computes those too).")
    ] = None,
    paper: Annotated[bool, typer.Option("--paper", help="Two-phase with the published settings.")] = False,
    mode: Annotated[
        str | None, typer.Option(help="Guidance: token, block, prefix, shift, best_of, beam or none.")
    ] = None,
    strength: Annotated[float | None, typer.Option(help="Guidance strength.")] = None,
    prompts: Annotated[int | None, typer.Option(help="Held-out prompts to answer for the report.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Length of those replies.")] = None,
    judge: Annotated[str | None, typer.Option(help="Word-judge file that compares guided with unguided.")] = None,
    eval_fraction: Annotated[float | None, typer.Option(help="Share of groups held out.")] = None,
    seed: Annotated[int | None, typer.Option(help="Fixes split, fit and sampling.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any setting of the recipe.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(envvar="COALA_CACHE", help="Folder of features shared by runs: reused, added to.")
    ] = None,
    n_workers: Annotated[
        int, typer.Option("--workers", min=1, help="Processes that share the extraction, each with the model.")
    ] = 1,
    restart: Annotated[bool, typer.Option("--restart", help="Delete what RUN holds and begin anew.")] = False,
    trust_remote_code: TrustCode = False,
) -> None:
    """Read and check pairs, extract features, fit the convex head, evaluate and report: all of it, resumable.

    Run the same command again after an interruption: what is finished is skipped.

    Examples:

    `coala align pairs.jsonl --model ./my-model --out runs/mine`

    `coala align train.jsonl.gz --eval test.jsonl.gz -m ./my-model -o runs/mine --mode block --set head.tolerance=1e-6`

    `coala align pairs.jsonl --model ./my-model --out runs/mine --workers 4`
    """
    from coala.cli.options import whole_number
    from coala.recipe import load_recipe, set_option

    overrides: dict[str, Any] = {
        "pairs": pairs or None,
        "eval_pairs": eval_pairs or None,
        "format": format,
        "skip_bad": skip_bad or None,
        "eval_fraction": eval_fraction,
        "seed": seed,
        "model": {
            "name": model,
            "template": template,
            "layer": layer if layer is None or layer == "auto" else whole_number(layer),
            "pooling": pooling,
            "prefixes": prefixes,
            "batch_tokens": batch_tokens,
            "device": device,
            "dtype": dtype,
            "adapter": adapter,
            "quantise": quantise,
            "max_tokens": max_tokens,
            "trust_remote_code": trust_remote_code or None,
        },
        "head": {
            "method": method,
            "gate_on": gate_on,
            "reference_scale": reference_scale,
            "paper": paper or None,
        },
        "guidance": {"mode": mode, "strength": strength},
        "evaluation": {"prompts": prompts, "max_new_tokens": max_new_tokens, "judge": judge},
    }
    settings = load_recipe(recipe, overrides, *map(set_option, set_ or []))
    run_and_show(settings, out, restart, cache=cache, n_workers=n_workers)


def run_and_show(
    settings: Any,
    out: Path,
    restart: bool = False,
    samples: int = 0,
    cache: Path | None = None,
    n_workers: int = 1,
) -> None:
    """Carry out a recipe, print the summary table and, on the last line, the summary as JSON."""
    from coala.align import align as run_align
    from coala.align import summary_rows
    from coala.align.job import check_model
    from coala.align.plan import make_plan
    from coala.align.plan_lines import first_lines
    from coala.cli.screen import emit, progress, say, side_by_side, table
    from coala.store import Run
    from coala.values import CoalaError

    run = Run(out)
    if restart:
        run.restart()
    planned = None
    if not (run.path / "run.json").exists():
        # Pairs that are not here are for the first stage to name.
        if all(Path(name).exists() for name in (*settings.pairs, *settings.eval_pairs)):
            check_model(settings)
        # What cannot fit is refused now, with the flag that would make it fit, not after hours.
        # Input that cannot be read is for the stages to name, in their order.
        with suppress(CoalaError):
            planned = make_plan(settings, probe_seconds=0, n_workers=n_workers)
            for line in first_lines(planned):
                say(line)
        if planned is not None:
            planned.require(certain=True)
    with progress() as show:
        content = run_align(settings, run, on_progress=show, cache=cache, n_workers=n_workers)
    table(summary_rows(content))
    for sample in content.get("samples", [])[:samples]:
        print(f"\n{sample['prompt']}\n")
        side_by_side(sample["unguided"], sample["guided"], ("unguided", "guided"))
    print(f"\nreport: {run.path / 'report.html'}")
    emit({"run": run.path, "report": run.path / "report.html", **content["summary"]})
