"""`coala extract`: pairs to features, resumable."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def extract(
    pairs: Annotated[list[str], typer.Argument(metavar="PAIRS...", help="Pairs: file(s) or a hub dataset.")],
    model: Annotated[str, typer.Option("--model", "-m", help="Local model folder or hub name.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the features; continued if begun.")],
    format: Annotated[str, typer.Option(help="Format of the pairs.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Commit of a hub model.")] = None,
    template: Annotated[str, typer.Option(help="auto, chat, dialogue or continuation.")] = "auto",
    layer: Annotated[int, typer.Option(help="Hidden state to read; -1 is the last.")] = -1,
    pooling: Annotated[str, typer.Option(help="mean, mean_all or last.")] = "mean",
    max_tokens: Annotated[int | None, typer.Option(help="Longest prompt plus reply.")] = None,
    prompt_features: Annotated[
        bool, typer.Option("--prompt-features", help="Encode prompts by themselves too: what gates on the prompt read.")
    ] = False,
    log_ratios: Annotated[
        bool,
        typer.Option("--log-ratios", help="Also log p(chosen) - log p(rejected) under the model, for a reference."),
    ] = False,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens per forward pass.")] = 4096,
) -> None:
    """Encode chosen and rejected replies with the frozen model; written shard by shard, a killed run goes on.

    Example: `coala extract pairs.jsonl --model ./my-model --out features`
    """
    from coala.backbone import load_backbone
    from coala.cli.screen import emit, progress
    from coala.data import read_pairs
    from coala.features import extract as extract_features
    from coala.features import survey
    from coala.store import FeatureStore, save_features

    found = list(read_pairs(pairs, format))
    backbone = load_backbone(model, revision=revision, template=template)
    spec = backbone.spec(layer=layer, pooling=pooling, max_tokens=max_tokens)
    shards = FeatureStore(out / "shards")
    plan = survey(found, backbone, spec, prompt_features=prompt_features)
    in_all = plan.facts["tokens"]
    with progress() as show:
        features = extract_features(
            found,
            backbone,
            spec,
            batch_tokens=batch_tokens,
            prompt_features=prompt_features,
            log_ratios=log_ratios,
            store=shards,
            plan=plan,
            on_batch=lambda done, total, tokens: show("extract", tokens, in_all, f"{done:,} of {total:,} pairs"),
        )
    save_features(out, features)
    shards.discard()
    emit({"out": out, "n_pairs": len(features), "width": features.width, **plan.facts})
