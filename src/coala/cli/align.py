"""`coala align`: preference pairs in, a certified head, guided replies and a report out."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from coala.choices import GateOn, Method, Mode, Pooling, Quantise, Template
from coala.cli.options import DEVICE_HELP, DTYPE_OPTION, LAYER_OPTION, TrustCode
from coala.cli.terminal import write


def align(
    pairs: Annotated[
        list[str] | None, typer.Argument(metavar="PAIRS...", help="Training pairs: file(s) or a hub dataset.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Local model folder or hub name.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder; a run found there is resumed.")] = Path(
        "runs/run"
    ),
    eval_pairs: Annotated[
        list[str] | None, typer.Option("--eval", help="Held-out pairs (default: whole groups of PAIRS are held out).")
    ] = None,
    format: Annotated[str | None, typer.Option(help="Format of the pairs (default: recognised).")] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out rows with errors (the report lists them) instead of stopping.")
    ] = False,
    recipe: Annotated[Path | None, typer.Option(help="YAML file with any of the settings; flags win.")] = None,
    template: Annotated[Template | None, typer.Option(help="How conversations are rendered.")] = None,
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    dtype: Annotated[str | None, DTYPE_OPTION] = None,
    adapter: Annotated[str | None, typer.Option(help="LoRA adapter of the model: a folder or hub name.")] = None,
    quantise: Annotated[Quantise | None, typer.Option(help="By bitsandbytes.")] = None,
    layer: Annotated[str | None, LAYER_OPTION] = None,
    pooling: Annotated[
        Pooling | None, typer.Option(help="How states become one vector; mean is over the reply.")
    ] = None,
    prefixes: Annotated[int | None, typer.Option(help="Fit on this many prefixes of every reply.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens per forward pass.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest prompt plus reply.")] = None,
    method: Annotated[Method | None, typer.Option(help="How the head is fitted.")] = None,
    gate_on: Annotated[
        GateOn | None, typer.Option(help="What gates look at; auto: both compete, and prompts are encoded too.")
    ] = None,
    reference_scale: Annotated[
        float | None, typer.Option(help="CVX-DPO: margin of this times the model's log ratio (computes those too).")
    ] = None,
    paper: Annotated[bool, typer.Option("--paper", help="Two-phase with the published settings.")] = False,
    mode: Annotated[Mode | None, typer.Option(help="How the head guides decoding.")] = None,
    strength: Annotated[float | None, typer.Option(help="Guidance strength.")] = None,
    prompts: Annotated[int | None, typer.Option(help="Held-out prompts to answer for the report.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Length of those replies.")] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            help="Compares guided with unguided replies: head:RUN, rule:NAME[:ARGUMENT], words:FILE or a file of words."
        ),
    ] = None,
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
    restart: Annotated[bool, typer.Option("--restart", help="Delete what RUN holds and start over.")] = False,
    trust_remote_code: TrustCode = False,
) -> None:
    """Read and check pairs, extract features, fit the convex head, evaluate and report: all of it, resumable.

    Rerun the same command to resume after an interruption: finished work is kept. With another head, guidance, judge or
    length of replies, what does not depend on them is kept and the rest redone.

    Examples:

    `coala align pairs.jsonl --model ./my-model --out runs/mine`

    `coala align train.jsonl.gz --eval test.jsonl.gz -m ./my-model -o runs/mine --mode block --set head.tolerance=1e-6`

    `coala align pairs.jsonl --model ./my-model --out runs/mine --workers 4`
    """
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
            "layer": layer,
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
    from coala.alignment import align_recipe, check_settings, evidence_notes, summary_rows
    from coala.alignment.stages import guidance_of
    from coala.cli.output import emit, insistent, progress, say, side_by_side, table
    from coala.plan.plan import make_plan
    from coala.plan.text import first_lines
    from coala.store import RunFolder, load_head
    from coala.values import CoalaError

    run = RunFolder(out)
    check_settings(settings, run, cache, restart=restart)
    planned = None
    if restart or not (run.path / "run.json").exists():
        # What cannot fit is refused now, with the flag that would make it fit, not after hours.
        # Input that cannot be read is for the stages to name, in their order.
        with suppress(CoalaError):
            planned = make_plan(settings, probe_seconds=0, n_workers=n_workers)
            for line in first_lines(planned):
                say(line)
        if planned is not None:
            planned.require(certain=True)
    if restart:
        run.restart()
    with progress() as shown, insistent(shown) as show:
        content = align_recipe(settings, run, on_progress=show, on_note=say, cache=cache, n_workers=n_workers)
    table(summary_rows(content))
    for note in evidence_notes(run.path, load_head(run.path / "head"), guidance_of(settings)):
        say(f"note: {note}")
    for sample in content.get("samples", [])[:samples]:
        write(f"\n{sample['prompt']}\n")
        side_by_side(sample["unguided"], sample["guided"], ("unguided", "guided"))
    write(f"\nreport: {run.path / 'report.html'}")
    emit({"run": run.path, "report": run.path / "report.html", **content["summary"]})
