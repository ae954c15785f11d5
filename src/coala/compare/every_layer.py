"""Features of every layer and pooling from one pass, and which of them validation picks; features put together.

CELL/layers/LAYER-POOLING/PART   features of every layer, for ``pooling: auto`` and for methods that read all layers
CELL/PART                        those of the layer and pooling that are picked, as any other cell of features has them
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coala.compare.cell_context import CellContext, Costs, keep_compiled
from coala.compare.matrix import ALL, POOLINGS_TRIED
from coala.compare.study import StudyMethod
from coala.store import FeatureStore, load_features, save_features
from coala.values import FeatureSet, FeatureSpec, Pair

if TYPE_CHECKING:
    from coala.features import PrefixTree

PARTS = ("train", "test")
# Layers a linear head is validated on, evenly spaced, the last among them.
LAYERS_TRIED = 8


def loaded(
    context: CellContext, part: str, dataset: str | None = None, method: StudyMethod | None = None
) -> FeatureSet:
    """The features this cell's method reads, here or of another dataset."""
    return load_features(context.features_folder(dataset, method) / part, mmap=True)


def of_layer(context: CellContext, layer: int, pooling: str, part: str, dataset: str | None = None) -> FeatureSet:
    """Features of one layer of a cell that has them all; those of a joined dataset are put together."""
    name = dataset or context.cell.dataset
    if joins := context.study.datasets[name].joins:
        return together({one: of_layer(context, layer, pooling, part, one) for one in joins})
    _, model, init = context.cell.place
    folder = context.out / "cells" / f"{name}.{model}.{init}.features-{ALL}"
    return load_features(_of(folder, layer, pooling, part), mmap=True)


@contextmanager
def extracted(
    context: CellContext,
    part: str,
    pairs: Sequence[Pair],
    specs: Sequence[FeatureSpec],
    *,
    prompt_features: bool = False,
    prefixes: int = 1,
    log_ratios: bool = False,
) -> Iterator[tuple[list[FeatureSet], PrefixTree]]:
    """Features of ``pairs`` under each of ``specs``, from one pass, and what the pass read.

    A killed extraction is resumed from its shards, which are deleted after the block: it saves the features.
    """
    from coala.features import extract, survey

    plan = survey(pairs, context.backbone, specs[0], prompt_features=prompt_features)
    shards = FeatureStore(context.folder / part / "shards")

    def tell(done: int, total: int, tokens: int) -> None:
        # By tokens: long rows come first.
        context.show(f"features of {part}", tokens, plan.facts["tokens"], f"{done:,} of {total:,} pairs")

    found = extract(
        pairs,
        context.backbone,
        specs,
        prefixes=prefixes,
        prompt_features=prompt_features,
        log_ratios=log_ratios,
        batch_tokens=context.model.batch_tokens,
        store=shards,
        plan=plan,
        on_batch=tell,
    )
    yield found, plan
    shards.discard()


def every_layer(context: CellContext, costs: Costs) -> dict[str, Any]:
    """Features of all layers, each pooling, of training and test pairs; the layer and pooling picked on the first."""
    from coala.costs import extraction_flops

    backbone = context.backbone
    keys = [(layer, pooling) for layer in range(1, backbone.n_layers + 1) for pooling in POOLINGS_TRIED]
    ends, most = context.model.ends_with_eos, context.model.max_tokens
    specs = [backbone.spec(layer, pooling, ends, most) for layer, pooling in keys]
    facts: dict[str, Any] = {}
    for part in PARTS:
        pairs = context.part(part)
        with costs.of("features" if part == "train" else "evaluation") as about:
            with extracted(context, part, pairs, specs) as (found, plan):
                for key, features in zip(keys, found, strict=True):
                    save_features(_of(context.folder, *key, part), features)
            about["flops"] = extraction_flops(backbone.shape, plan.lengths, own=plan.own_lengths)
            about["pair_by_pair"] = extraction_flops(backbone.shape, plan.lengths[plan.index.reshape(-1)])
            about["pairs"], about["tokens"] = len(pairs), plan.facts["tokens"]
        if part == "train":
            facts = plan.facts
    return {**_picked(context, costs, backbone.n_layers), **facts}


def joined(context: CellContext, costs: Costs, method: StudyMethod) -> dict[str, Any]:
    """The features of the datasets that this one joins, put together; a layer and pooling are picked anew on all."""
    parts = [context.result(context.features_folder(one, method).name) for one in context.dataset.joins]
    spent = [context.costs(context.features_folder(one, method).name)["features"] for one in context.dataset.joins]
    sums = {name: sum(part[name] for part in spent) for name in ("flops", "pair_by_pair")}
    with costs.of("features", **sums) as about:
        about["measured"] = {"seconds": sum(part["measured"]["seconds"] for part in spent)}
        for part in PARTS if not method.all_layers else ():
            features = together({one: loaded(context, part, one, method) for one in context.dataset.joins})
            save_features(context.folder / part, features)
    n_layers = parts[0]["n_layers"]
    told_of = _picked(context, costs, n_layers) if method.all_layers else {"spec": parts[0]["spec"], "layers": []}
    return {"n_layers": n_layers, **told_of, "tokens": sum(found["tokens"] for found in parts)}


def together(parts: dict[str, FeatureSet]) -> FeatureSet:
    """Features of several datasets as of one, their groups named after the dataset each is of."""
    sets = list(parts.values())
    groups = [f"{name}:{group}" for name, features in parts.items() for group in features.group]
    return replace(
        sets[0],
        chosen=np.concatenate([features.chosen for features in sets]),
        rejected=np.concatenate([features.rejected for features in sets]),
        group=np.array(groups, dtype=str),
    )


def _picked(context: CellContext, costs: Costs, n_layers: int) -> dict[str, Any]:
    """The layer and pooling whose linear head has the least loss on held-out groups of the training pairs.

    Its features are put where those of any cell lie. Every candidate is told of, as layers are where they are chosen
    by themselves, and none is cheaper: all were read.
    """
    from coala.convex import fit
    from coala.statistics.intervals import clustered

    keep_compiled(context)
    layers = sorted({round(x) for x in np.linspace(0, n_layers, min(LAYERS_TRIED, n_layers) + 1)[1:]})
    keys = [(layer, pooling) for pooling in POOLINGS_TRIED for layer in layers]
    rows: list[dict[str, Any]] = []
    held_out = {}
    with costs.of("search", flops=0):
        for number, key in enumerate(keys):
            context.show("layer and pooling", number, len(keys))
            features = of_layer(context, *key, "train")
            found = fit(features, method="linear", seed=context.study.split.seed).held_out
            if found is not None:
                held_out[key] = found
    best = min(held_out, key=lambda key: held_out[key].loss) if held_out else (n_layers, POOLINGS_TRIED[0])
    for (layer, pooling), found in held_out.items():
        excess = found.losses - held_out[best].losses
        rows.append(
            {
                "layer": layer,
                "pooling": pooling,
                "cost": 1.0,
                "nll": found.loss,
                "excess": float(excess.mean()),
                "excess_error": clustered(excess, features.group)[1],
                "accuracy": found.accuracy,
                "chosen": (layer, pooling) == best,
            }
        )
    for part in PARTS:
        chosen = of_layer(context, best[0], best[1], part)
        shutil.rmtree(context.folder / part, ignore_errors=True)
        save_features(context.folder / part, chosen)
    return {"spec": asdict(chosen.spec), "n_layers": n_layers, "layers": rows}


def _of(folder: Path, layer: int, pooling: str, part: str) -> Path:
    return folder / "layers" / f"{layer}-{pooling}" / part
