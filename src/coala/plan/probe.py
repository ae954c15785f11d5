"""Seconds of a run, told from encoding some of its batches for a few seconds and decoding a few tokens.

Knows batches and their FLOPs; nothing of memory, disk or what a run does besides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from coala.costs import Stopwatch, extraction_flops
from coala.plan.tokens import Counts
from coala.recipe import Recipe
from coala.values import Estimate, user

if TYPE_CHECKING:
    from coala.backbone import LanguageModel
    from coala.features.prefix_tree import PrefixTree


PROBE_TOKENS = 3  # decoded to tell how long a step takes


def probed(recipe: Recipe, backbone: LanguageModel, counts: Counts, seconds: float) -> Estimate:
    """Seconds of the whole extraction, from encoding some of its rows for about so many seconds.

    Of batches drawn evenly over the FLOPs of all, longest rows to shortest, those trees are read that the time left
    allows; what is read first, and perhaps alone, is the cheapest tree of all. The interval is that of the slowest and
    fastest batch per FLOP.
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

    def timed(rows: range) -> tuple[float, float]:
        return _timed(recipe, backbone, survey, rows, counts), float(cost[rows.start : rows.stop].sum())

    rates, spent, n = measured_rates(survey.trees(), batches, cost, _spread(len(batches), ends), timed, seconds)
    total = float(counts.scale) * sum(
        float(extraction_flops(shape, s.lengths, own=s.own_lengths, layer=layer)) for s in counts.surveys.values()
    )
    work = sum(flops for _, flops in rates)
    rate = sum(took for took, _ in rates) / work
    each = [took / flops for took, flops in rates]
    how = f"{n} of {len(batches)} batches, or a part of them, in {spent:.1f} s after loading the model"
    how += "; the interval is that of the fastest and slowest" if len(rates) > 1 else ""
    return Estimate(total * rate, total * min(each), total * max(each), len(rates), how)


def measured_rates(
    trees: Sequence[range],
    batches: Sequence[range],
    cost: NDArray[np.float64],
    order: Iterable[int],
    timed: Callable[[range], tuple[float, float]],
    seconds: float,
) -> tuple[list[tuple[float, float]], float, int]:
    """Seconds and FLOPs of parts of batches, the seconds spent in all, and how many batches were looked into.

    ``timed`` reads rows and tells both. No part is begun that would end after ``seconds`` at the pace so far, but for
    the cheapest tree, which is read first.
    """
    smallest = min(trees, key=lambda tree: float(cost[tree.start : tree.stop].sum()))
    # The first pass of a process is slower than any other: it is left out if there is time for one more.
    first = timed(smallest)
    spent, found = first[0], [first]
    if 2 * spent <= seconds:
        found = [timed(smallest)]
        spent += found[0][0]
    n = 0
    rest: list[tuple[float, float]] = []
    for place in order:
        known = rest or found
        rate = sum(took for took, _ in known) / sum(flops for _, flops in known)
        part = affordable(trees, batches[place], cost, (seconds - spent) / rate)
        if part is not None:
            rest.append(timed(part))
            spent, n = spent + rest[-1][0], n + 1
        if spent >= seconds:
            break
    return rest or found, spent, n


def affordable(trees: Sequence[range], batch: range, cost: NDArray[np.float64], most: float) -> range | None:
    """Consecutive trees of a batch, the first that can be afforded on, that cost no more than ``most`` together."""
    start = stop = None
    for tree in trees:
        if not batch.start <= tree.start < batch.stop:
            continue
        if cost[tree.start if start is None else start : tree.stop].sum() <= most:
            start, stop = tree.start if start is None else start, tree.stop
        elif start is not None:
            break
    return None if start is None or stop is None else range(start, stop)


def reply_seconds(recipe: Recipe, backbone: LanguageModel, counts: Counts, per_flop: float) -> float:
    """Seconds of unguided and guided replies that all run to their full length, from decoding a few tokens.

    Prompts cost as in extraction, ``per_flop``; a step of decoding reads all weights, whatever few rows there are, and
    is timed. What a mode looks ahead to counts as one more step each time.
    """
    from coala.alignment.parts import guidance_of
    from coala.alignment.replies import rows_at_once
    from coala.decoding import Guidance, generate

    new = recipe.evaluation.max_new_tokens
    guidance = guidance_of(recipe).at(recipe.evaluation.temperature)
    rows = rows_at_once(backbone)
    few = min(PROBE_TOKENS, new)
    prompts = [user("a")] * min(rows, max(1, len(counts.prompts)))

    def step(n: int) -> float:
        with Stopwatch() as watch:
            generate(prompts, backbone, None, Guidance(mode="none"), max_new_tokens=n, seed=0, batch_size=rows)
        return watch.seconds

    step(1)
    per_step = step(few) / few
    prefill = sum(extraction_flops(backbone.shape, [tokens]) for tokens in counts.prompts) * per_flop
    n = len(counts.prompts)
    portions = -(-n // rows) + (1 + (guidance.looked_at > 0)) * -(-n // max(1, rows // guidance.rows))
    return 2 * prefill + portions * new * per_step


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


def _timed(recipe: Recipe, backbone: LanguageModel, survey: PrefixTree, rows: range, counts: Counts) -> float:
    """Seconds that whole trees take, from tokens to features."""
    from coala.features import extract
    from coala.features.prefix_tree import PrefixTree
    from coala.values import Pair

    model, part = recipe.model, slice(rows.start, rows.stop)
    alone = np.arange(len(rows))
    plan = PrefixTree(
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
