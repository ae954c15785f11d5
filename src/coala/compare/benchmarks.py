"""Benchmarks of reward models, ranked by the heads of one place: features once, then every head's scores.

CELL/NAME/shards/   features of the benchmark's replies, while they are made
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from coala.compare.cell_context import CellContext, Costs
from coala.compare.every_layer import extracted, loaded
from coala.compare.matrix import GATED_POOLING, benchmark_of
from coala.compare.study import Benchmark, StudyMethod
from coala.store import load_head
from coala.values import CoalaError, FeatureSet, FeatureSpec

if TYPE_CHECKING:
    from coala.evaluation.reward_benchmarks import Item, Ranking, RewardBenchmark, Scored


def benchmark_cell(context: CellContext, costs: Costs) -> dict[str, Any]:
    """What every head of this place, the rule "longer" and published scores are worth on the same items."""
    from coala.evaluation.reward_benchmarks import read_scores

    name = benchmark_of(context.cell)
    settings = context.dataset.benchmarks[name]
    whole = read_benchmark(name, settings)
    places = sample(whole.items, settings.prompts, context.study.split.seed)
    part = replace(whole, items=tuple(whole.items[i] for i in places))
    methods = _scorers(context)
    pairs, specs = part.pairs, _specs(context, methods, context.backbone.n_layers)
    with costs.of("evaluation") as about, extracted(context, name, pairs, specs) as (found, plan):
        about["tokens"] = plan.facts["tokens"]
    features = {(spec.layer, spec.pooling): one for spec, one in zip(specs, found, strict=True)}
    scored: dict[str, Scored] = {
        method.name: part.scored(_scores(context, method, features, [text for _, text in part.replies]))
        for method in methods
    }
    scored["longer reply"] = part.by_rule("longer")
    published = {} if settings.scores is None else read_scores(settings.scores, name, whole)
    scored |= {scorer: rows.of(places) for scorer, rows in published.items()}
    return {
        "benchmark": name,
        "items": len(part.items),
        "of": len(whole.items),
        "replies": len(pairs),
        "cut": plan.facts["truncated_replies"] // 2,
        "rankings": {scorer: _plain(part.rank(rows)) for scorer, rows in scored.items()},
        "published": sorted(published),
        "ours": [method.name for method in methods],
    }


def read_benchmark(name: str, settings: Benchmark) -> RewardBenchmark:
    """The benchmark called ``name``; of LLMBar the rows that RewardBench has, by its formula."""
    from coala.evaluation.reward_benchmarks import FORMS, read_llmbar

    read = read_llmbar if name == "llmbar" else FORMS[name].read
    return read(settings.path)


def sample(items: tuple[Item, ...], most: int | None, seed: int) -> list[int]:
    """Places of at most ``most`` items, drawn by a hash of ``seed`` and id from each subset in turn."""
    if most is None or most >= len(items):
        return list(range(len(items)))
    queues: dict[str, list[int]] = {}
    for place in sorted(range(len(items)), key=lambda i: hashlib.sha256(f"{seed}\0{items[i].id}".encode()).digest()):
        queues.setdefault(items[place].subset, []).append(place)
    kept: list[int] = []
    while len(kept) < most:
        for name in sorted(queues):
            if queues[name] and len(kept) < most:
                kept.append(queues[name].pop(0))
    return sorted(kept)


def _scorers(context: CellContext) -> list[StudyMethod]:
    names = {need.rpartition(".s")[0].rpartition(".")[2] for need in context.cell.needs}
    return [method for method in context.study.methods if method.name in names]


def _specs(context: CellContext, methods: list[StudyMethod], n_layers: int) -> list[FeatureSpec]:
    """What these methods read, each layer and pooling once; all layers where one has a gate at each."""
    wanted: dict[tuple[int, str], FeatureSpec] = {}
    for method in methods:
        if not method.reads:
            continue
        spec = loaded(context, "train", method=method).spec
        wanted[spec.layer, spec.pooling] = spec
        for layer in range(1, n_layers + 1) if method.kind == "layers" else ():
            wanted.setdefault((layer, GATED_POOLING), replace(spec, layer=layer, pooling=GATED_POOLING))
    if not wanted:
        raise CoalaError(
            f"{context.cell.id}: none of its methods reads features; expected one of kind coala or layers."
        )
    return list(wanted.values())


def _scores(
    context: CellContext, method: StudyMethod, features: Mapping[tuple[int, str], FeatureSet], texts: list[str]
) -> Any:
    """Scores (m,) of the replies by one method; features hold each reply on both sides."""
    from coala.compare.controls import GatedLayers
    from coala.data.cues import CueRule

    dataset, model, init = context.cell.place
    cell = f"{dataset}.{model}.{init}.{method.name}.s{context.study.seeds[0]}"
    folder = context.out / "cells" / cell
    if method.kind == "cues":
        rule = CueRule(context.result(cell)["weights"])
        return np.array([rule.score(text) for text in texts])
    if method.kind == "layers":
        layers = sorted(layer for layer, pooling in features if pooling == GATED_POOLING and layer > 0)
        states = np.stack([features[layer, GATED_POOLING].chosen for layer in layers], 1)
        return GatedLayers.load(folder / "layers.safetensors").score(states)
    head = load_head(folder / "head")
    return head.score(features[head.spec.layer, head.spec.pooling].chosen).astype(np.float64)


def _plain(ranking: Ranking) -> dict[str, Any]:
    return {
        "subsets": {name: asdict(estimate) for name, estimate in ranking.subsets.items()},
        "sections": {name: asdict(estimate) for name, estimate in ranking.sections.items()},
        "overall": asdict(ranking.overall),
        "rows": asdict(ranking.rows),
        "ties": ranking.ties,
        "matrix": [[asdict(cell) for cell in row] for row in ranking.matrix],
        "remarks": list(ranking.remarks),
    }
