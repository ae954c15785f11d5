"""Seconds of an extraction, told from encoding some of its batches for a few seconds.

Knows batches and their FLOPs; nothing of memory, disk or what a run does besides.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from coala.align.counting import Counts
from coala.costs import Stopwatch, extraction_flops
from coala.recipe import Recipe
from coala.values import Estimate, user

if TYPE_CHECKING:
    from coala.backbone import LanguageModel
    from coala.features.plan import Survey


def probed(recipe: Recipe, backbone: LanguageModel, counts: Counts, seconds: float) -> Estimate:
    """Seconds of the whole extraction, from encoding some of its batches for about so many seconds.

    Batches are drawn evenly over the FLOPs of all, longest rows to shortest; of a batch that would take too long only
    the first trees. The interval is that of the slowest and fastest batch per FLOP.
    """
    part = max(counts.surveys, key=lambda name: int(counts.surveys[name].own_lengths.sum()))
    survey = counts.surveys[part]
    shape = backbone.shape
    layer = None if recipe.log_ratios else backbone.spec(_layer(recipe)).layer
    cost = np.array(
        [
            extraction_flops(shape, [a], own=[b], layer=layer)
            for a, b in zip(survey.lengths, survey.own_lengths, strict=True)
        ],
        dtype=np.float64,
    )
    # A layer of 0 is the embedding, which costs no product.
    cost = np.maximum(cost, 1.0)
    batches = survey.batches(recipe.model.batch_tokens)
    ends = np.cumsum([cost[batch.start : batch.stop].sum() for batch in batches])
    smallest = min(survey.trees(), key=lambda tree: float(cost[tree.start : tree.stop].sum()))
    _timed(recipe, backbone, survey, smallest, counts)  # the first pass of a process is slower than any other
    rate = _timed(recipe, backbone, survey, smallest, counts) / float(cost[smallest.start : smallest.stop].sum())
    spent, work, rates = 0.0, 0.0, []
    for place in _spread(len(batches), ends):
        batch = _cut(survey, batches[place], cost, (seconds - spent) / rate)
        took, flops = _timed(recipe, backbone, survey, batch, counts), float(cost[batch.start : batch.stop].sum())
        spent, work = spent + took, work + flops
        rates.append(took / flops)
        rate = spent / work
        if spent >= seconds:
            break
    total = float(counts.scale) * sum(
        float(extraction_flops(shape, s.lengths, own=s.own_lengths, layer=layer)) for s in counts.surveys.values()
    )
    how = f"{len(rates)} of {len(batches)} batches in {spent:.1f} s; the interval is that of the fastest and slowest"
    return Estimate(total * rate, total * min(rates), total * max(rates), len(rates), how)


def _layer(recipe: Recipe) -> int:
    return -1 if recipe.model.layer == "auto" else recipe.model.layer


def _spread(n: int, ends: NDArray[np.float64]) -> Iterator[int]:
    """Every batch once, first those in the middle of ever finer parts of the whole cost."""
    seen: set[int] = set()
    for i in range(1, 4 * n):
        share, digit, rest = 0.0, 0.5, i
        while rest:  # the digits of i mirrored at the point
            share, digit, rest = share + digit * (rest & 1), digit / 2, rest >> 1
        place = int(np.searchsorted(ends, share * ends[-1]))
        if place not in seen:
            seen.add(place)
            yield place


def _cut(survey: Survey, batch: range, cost: NDArray[np.float64], most: float) -> range:
    """The first trees of a batch, one at least, that cost no more than ``most`` together."""
    stops = [tree.stop for tree in survey.trees() if batch.start <= tree.start < batch.stop]
    affordable = [stop for stop in stops if cost[batch.start : stop].sum() <= most]
    return range(batch.start, affordable[-1] if affordable else stops[0])


def _timed(recipe: Recipe, backbone: LanguageModel, survey: Survey, rows: range, counts: Counts) -> float:
    """Seconds that whole trees take, from tokens to features."""
    from coala.features import extract
    from coala.features.plan import Survey
    from coala.values import Pair

    model, part = recipe.model, slice(rows.start, rows.stop)
    alone = np.arange(len(rows))
    plan = Survey(
        survey.tokens[part],
        survey.start[part],
        survey.stop[part],
        survey.dropped[part],
        survey.parent[part] - rows.start,
        survey.shared[part],
        np.stack([alone, alone], axis=1),
    )
    pairs = [Pair(user(""), "", "", "")] * len(rows)
    spec = backbone.spec(_layer(recipe), model.pooling, model.ends_with_eos, model.max_tokens)
    with Stopwatch() as watch:
        extract(
            pairs, backbone, spec, plan=plan, batch_tokens=model.batch_tokens, prefixes=model.prefixes,
            log_ratios=recipe.log_ratios,
        )  # fmt: skip
    return watch.seconds
