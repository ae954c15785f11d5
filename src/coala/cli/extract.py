"""`coala extract`: pairs to features, resumable."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from coala.choices import Pooling, Quantise, Template
from coala.cli.options import DEVICE_HELP, DTYPE_OPTION, LAYER_OPTION, TrustCode


class Engine(StrEnum):
    """Where the workers of an extraction run."""

    processes = "processes"
    ray = "ray"


def extract(
    pairs: Annotated[list[str], typer.Argument(metavar="PAIRS...", help="Pairs: file(s) or a hub dataset.")],
    model: Annotated[str, typer.Option("--model", "-m", help="Local model folder or hub name.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the features; resumed if begun.")],
    format: Annotated[str, typer.Option(help="Format of the pairs.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Commit of a hub model.")] = None,
    template: Annotated[Template, typer.Option(help="How conversations are rendered.")] = "auto",
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    dtype: Annotated[str, DTYPE_OPTION] = "auto",
    adapter: Annotated[str | None, typer.Option(help="LoRA adapter of the model: a folder or hub name.")] = None,
    quantise: Annotated[Quantise | None, typer.Option(help="By bitsandbytes.")] = None,
    layer: Annotated[str, LAYER_OPTION] = "-1",
    pooling: Annotated[Pooling, typer.Option(help="How states become one vector; mean is over the reply.")] = "mean",
    max_tokens: Annotated[int | None, typer.Option(help="Longest prompt plus reply.")] = None,
    prefixes: Annotated[int, typer.Option(min=1, help="Pool at this many prefixes of every reply.")] = 1,
    prompt_features: Annotated[
        bool, typer.Option("--prompt-features", help="Encode prompts by themselves too: what gates on the prompt read.")
    ] = False,
    log_ratios: Annotated[
        bool,
        typer.Option("--log-ratios", help="Also log p(chosen) - log p(rejected) under the model, for a reference."),
    ] = False,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens per forward pass.")] = 4096,
    n_workers: Annotated[int, typer.Option("--workers", min=1, help="Processes that share the work.")] = 1,
    engine: Annotated[Engine, typer.Option(help="Where workers run: processes of this machine, or Ray tasks.")] = (
        Engine.processes
    ),
    ray_address: Annotated[str | None, typer.Option(help="Ray cluster; without it one is started here.")] = None,
    trust_remote_code: TrustCode = False,
) -> None:
    """Encode chosen and rejected replies with the frozen model; written as they come, so that a killed run resumes.

    Example: `coala extract pairs.jsonl --model ./my-model --out features`
    """
    from coala.alignment.layer_choice import choose_layer
    from coala.backbone import load_backbone
    from coala.cli.output import emit, progress, say, table
    from coala.data.doctor import gather
    from coala.features import ExtractionTask, survey, workers
    from coala.features import extract as extract_features
    from coala.store import FeatureStore, RunFolder, load_object, save_features, save_json

    with RunFolder(out).held(), progress() as show:
        gathered = gather(pairs, format)
        gathered.raise_for_errors()
        for warning in gathered.warnings:
            say(str(warning))
        found = list(gathered.pairs)
        loading: dict[str, Any] = {
            "model": model,
            "revision": revision,
            "template": template,
            "device": device,
            "dtype": dtype,
            "adapter": adapter,
            "quantise": quantise,
            "trust_remote_code": trust_remote_code,
        }
        backbone = load_backbone(**loading)

        def shown(stage: str, in_all: int) -> Callable[[int, int, int], None]:
            return lambda done, total, tokens: show(stage, tokens, in_all, f"{done:,} of {total:,} pairs")

        spec = backbone.spec(pooling=pooling, max_tokens=max_tokens)
        plan = survey(found, backbone, spec, prompt_features=prompt_features)
        rows: list[dict[str, Any]] = []
        number = layer
        if layer == "auto":
            # Chosen once: what resumes a killed run reads the same layer.
            if not (out / "layer.json").exists():
                choice = choose_layer(
                    found,
                    backbone,
                    spec,
                    plan=plan,
                    batch_tokens=batch_tokens,
                    on_batch=lambda done, total, tokens: show("layer", done, total, "pairs of a sample, all layers"),
                )
                save_json(out / "layer.json", choice.to_dict())
            kept = load_object(out / "layer.json", "layer", "scores", "told")
            say(kept["told"])
            rows, number = kept["scores"], kept["layer"]
        spec = backbone.spec(int(number), pooling, max_tokens=max_tokens)
        for line in backbone.reads(spec, found[0] if found else None):
            say(line)
        shards = FeatureStore(out / "shards")
        options: dict[str, Any] = {
            "prefixes": prefixes,
            "batch_tokens": batch_tokens,
            "prompt_features": prompt_features,
            "log_ratios": log_ratios,
        }
        job = ExtractionTask(loading, found, spec, options, shards.folder)
        with workers(job, n_workers, engine=engine.value, address=ray_address, on_note=say):
            features = extract_features(
                found,
                backbone,
                spec,
                **options,
                store=shards,
                plan=plan,
                on_batch=shown("extract", plan.facts["tokens"]),
                on_note=say,
            )
        save_features(out, features)
        shards.discard()
    if rows:
        head = ["layer", "of a forward", "held-out NLL", "above the best ± s.e.", "accuracy"]
        table([_worded(row) for row in rows], head)
    emit({"out": out, "layer": spec.layer, "n_pairs": len(features), "width": features.width, **plan.facts})


def _worded(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['layer']}{' (chosen)' if row['chosen'] else ''}",
        f"{100 * row['cost']:.0f} %",
        f"{row['nll']:.4f}",
        f"{row['excess']:+.4f} ± {row['excess_error']:.4f}",
        f"{100 * row['accuracy']:.1f} %",
    ]
