"""Pairs to a folder of features: the model that settings name, the layer, workers and shards; resumable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from coala.alignment.context import loading
from coala.callbacks import OnNote, OnProgress
from coala.settings import ModelSettings
from coala.store import FeatureStore, RunFolder, load_object, save_features, save_json
from coala.values import FeatureSet, FeatureSpec, Pair

if TYPE_CHECKING:
    from coala.backbone import LanguageModel
    from coala.features.prefix_tree import PrefixTree


@dataclass(frozen=True)
class Extracted:
    """Features as saved, what is known of their cost, and a row for each layer that was tried."""

    features: FeatureSet
    facts: Mapping[str, Any]
    layers: Sequence[Mapping[str, Any]]


def extract_folder(
    sources: Sequence[str],
    out: Path,
    model: ModelSettings,
    *,
    format: str = "auto",
    n_workers: int = 1,
    engine: Literal["processes", "ray"] = "processes",
    ray_address: str | None = None,
    on_progress: OnProgress,
    on_note: OnNote,
) -> Extracted:
    """Encode the pairs of ``sources`` as ``model`` says into the folder ``out``; called again it resumes.

    Raises :class:`~coala.values.CoalaError` for pairs with errors and for a folder another process is at work in.
    """
    from coala.backbone import load_backbone
    from coala.data.doctor import gather
    from coala.features import survey

    with RunFolder(out).held():
        gathered = gather(sources, format)
        gathered.raise_for_errors()
        for warning in gathered.warnings:
            on_note(str(warning))
        pairs = list(gathered.pairs)
        backbone = load_backbone(**loading(model))
        wants = {"prompt_features": bool(model.prompt_features), "log_ratios": bool(model.log_ratios)}
        spec = backbone.spec(-1, model.pooling, model.ends_with_eos, model.max_tokens)
        plan = survey(pairs, backbone, spec, prompt_features=wants["prompt_features"])
        rows: Sequence[Mapping[str, Any]] = []
        layer = model.layer
        if layer == "auto":
            chosen = _chosen_layer(out, pairs, backbone, spec, plan, model, on_progress)
            on_note(chosen["told"])
            rows, layer = chosen["scores"], int(chosen["layer"])
        spec = backbone.spec(layer, model.pooling, model.ends_with_eos, model.max_tokens)
        for line in backbone.reads(spec, pairs[0] if pairs else None):
            on_note(line)
        features = encode(
            out,
            pairs,
            backbone,
            spec,
            model=model,
            options={"prefixes": model.prefixes, "batch_tokens": model.batch_tokens, **wants},
            plan=plan,
            n_workers=n_workers,
            engine=engine,
            address=ray_address,
            on_tokens=lambda tokens, in_all, note: on_progress("extract", tokens, in_all, note),
            on_note=on_note,
        )
    return Extracted(features, plan.facts, rows)


def _chosen_layer(
    out: Path,
    pairs: Sequence[Pair],
    backbone: LanguageModel,
    spec: FeatureSpec,
    plan: PrefixTree,
    model: ModelSettings,
    on_progress: OnProgress,
) -> dict[str, Any]:
    """What ``layer.json`` says; the layer is chosen once: what resumes a killed run reads the same."""
    path = out / "layer.json"
    if not path.exists():
        save_layer(path, pairs, backbone, spec, plan, model, on_progress=on_progress)
    return load_object(path, "layer", "scores", "told")


def save_layer(
    path: Path,
    pairs: Sequence[Pair],
    backbone: LanguageModel,
    spec: FeatureSpec,
    plan: PrefixTree,
    model: ModelSettings,
    *,
    seed: int = 0,
    on_progress: OnProgress,
) -> None:
    """Choose the layer on a sample of ``pairs`` and write what it is worth beside the others to ``path``."""
    from coala.alignment.layer_choice import choose_layer

    choice = choose_layer(
        pairs,
        backbone,
        spec,
        plan=plan,
        batch_tokens=model.batch_tokens,
        seed=seed,
        on_batch=lambda done, total, tokens: on_progress("layer", done, total, "pairs of a sample, all layers"),
    )
    save_json(path, choice.to_dict())


def encode(
    folder: Path,
    pairs: Sequence[Pair],
    backbone: LanguageModel,
    spec: FeatureSpec,
    *,
    model: ModelSettings,
    options: Mapping[str, Any],
    plan: PrefixTree,
    n_workers: int = 1,
    engine: Literal["processes", "ray"] = "processes",
    address: str | None = None,
    on_tokens: Callable[[int, int, str], None],
    on_note: OnNote,
) -> FeatureSet:
    """Extract features shard by shard, save them in ``folder`` and delete the shards.

    ``options`` are those of ``coala.features.extract``; Other processes load ``model`` themselves.
    ``on_tokens`` hears tokens done, tokens in all and a note.
    """
    from coala.features import ExtractionTask, extract, workers

    shards = FeatureStore(folder / "shards")
    in_all = plan.facts["tokens"]
    task = ExtractionTask(loading(model), list(pairs), spec, dict(options), shards.folder)
    # Whoever finds no shard to make would load the model for nothing.
    helpful = max(1, min(n_workers, len(plan.shards(options["batch_tokens"]))))
    with workers(task, helpful, engine=engine, address=address, on_note=on_note):
        features = extract(
            pairs,
            backbone,
            spec,
            **options,
            store=shards,
            plan=plan,
            # Tokens, not pairs: long rows go first, so the first pairs cost the most.
            on_batch=lambda done, total, tokens: on_tokens(tokens, in_all, f"{done:,} of {total:,} pairs"),
            on_note=on_note,
        )
    save_features(folder, features)
    shards.discard()
    return features


def layer_rows(layers: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """A header and a row for each layer that was tried."""
    head = ["layer", "of a forward", "held-out NLL", "above the best ± s.e.", "accuracy"]
    return head, [
        [
            f"{row['layer']}{' (chosen)' if row['chosen'] else ''}",
            f"{100 * row['cost']:.0f} %",
            f"{row['nll']:.4f}",
            f"{row['excess']:+.4f} ± {row['excess_error']:.4f}",
            f"{100 * row['accuracy']:.1f} %",
        ]
        for row in layers
    ]
