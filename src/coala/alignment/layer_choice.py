"""The layer to read: the lowest that is as good as the best, where a small sample of the pairs can tell; else the last.

Layers differ by less than the noise on most data, and a backbone cut at layer l of L costs l/L of the whole. What is
saved must not be spent on finding out, and a layer picked from noise is worse than the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coala.values import FeatureSpec, Pair

if TYPE_CHECKING:
    from coala.backbone import LanguageModel
    from coala.convex.validation import HeldOut
    from coala.features.prefix_tree import PrefixTree

# The sample reads at most this share of the tokens that all pairs take, and has at most so many pairs.
SHARE = 0.1
MOST_PAIRS = 1000
MOST_LAYERS = 8
# With fewer pairs or groups held-out losses differ by noise alone.
FEWEST_PAIRS, FEWEST_GROUPS = 100, 20
# The best of several layers is better than a coin by chance more often than one would be.
ABOVE_COIN = 2.0


@dataclass(frozen=True)
class LayerScore:
    """A linear head on one layer, on pairs held out by whole groups.

    ``nll`` is the mean loss, ``excess`` how far it lies above that of the best layer, with the standard error of that
    paired difference; ``cost`` the layer's share of a forward pass.
    """

    layer: int
    cost: float
    nll: float
    excess: float
    excess_error: float
    accuracy: float
    chosen: bool = False


@dataclass(frozen=True)
class LayerChoice:
    """The ``layer`` to read of ``n_layers``, ``why``, what every layer is worth (none were tried: empty), and the cost.

    ``pairs`` were read, at all layers: ``share`` of the tokens that reading all pairs takes.
    """

    layer: int
    n_layers: int
    why: str
    scores: tuple[LayerScore, ...]
    pairs: int
    share: float

    def __str__(self) -> str:
        cost = f"; trying them took {100 * self.share:.1f} % of the extraction's tokens" if self.scores else ""
        return f"--layer auto: layer {self.layer} of {self.n_layers}, {self.why}{cost}"

    def to_dict(self) -> dict[str, Any]:
        """As saved."""
        return {**asdict(self), "scores": [asdict(score) for score in self.scores], "told": str(self)}


def choose_layer(
    pairs: Sequence[Pair],
    backbone: LanguageModel,
    spec: FeatureSpec,
    *,
    plan: PrefixTree | None = None,
    layers: Sequence[int] | None = None,
    share: float = SHARE,
    most_pairs: int = MOST_PAIRS,
    batch_tokens: int = 4096,
    seed: int = 0,
    on_batch: Callable[[int, int, int], None] | None = None,
) -> LayerChoice:
    """The lowest of ``layers`` (default: up to eight, evenly spaced, the last among them) that is as good as the best.

    All layers come from one pass over a sample of whole groups drawn with ``seed``, of at most ``most_pairs`` pairs
    and ``share`` of the tokens that all pairs take; each gets a linear head with its own ridge, validated on folds of
    whole groups. As good is a loss not above the best one's by more than the standard error of the difference, and
    below a coin's. It is the last layer where the sample cannot tell: it is too small, no layer is clearly better than
    a coin, or all are within that error of the best. ``spec`` gives everything but the layer, ``plan`` is what
    :func:`coala.features.survey` made of the pairs, if the caller has it.
    """
    import jax

    from coala.convex import fit
    from coala.features import extract, survey

    n_layers = backbone.n_layers
    if layers is None:
        layers = sorted({round(x) for x in np.linspace(0, n_layers, min(MOST_LAYERS, n_layers) + 1)[1:]})
    last = max(layers)
    plan = survey(pairs, backbone, spec) if plan is None else plan
    most = share * plan.facts["tokens"]
    places = _sample(pairs, plan, most_pairs, most, seed, shares=backbone.shares)
    sample: list[Pair] = []
    read: PrefixTree | None = None
    tokens = 0
    while places:
        sample = [pairs[place] for place in sorted(places)]
        read = survey(sample, backbone, spec)
        if (tokens := read.facts["tokens"]) <= most:
            break
        # What rows share in the whole they may not share in the sample.
        places = places[: min(len(places) - 1, int(len(places) * most / tokens))]
        sample = []
    groups = len({pair.group for pair in sample})
    if read is None or len(sample) < FEWEST_PAIRS or groups < FEWEST_GROUPS:
        why = (
            f"the last: {100 * share:g} % of the tokens are {_n(len(sample), 'pair')} in {_n(groups, 'group')}, too "
            f"few to compare layers ({FEWEST_PAIRS} in {FEWEST_GROUPS} are needed)"
        )
        return LayerChoice(last, n_layers, why, (), 0, 0.0)
    specs = [backbone.spec(layer, spec.pooling, spec.ends_with_eos, spec.max_tokens) for layer in layers]
    found = extract(sample, backbone, specs, batch_tokens=batch_tokens, plan=read, on_batch=on_batch)
    # Small fits; where the model is on a GPU, the card is torch's.
    with jax.default_device(jax.devices("cpu")[0]):
        held_out = [fit(features, method="linear", seed=seed).held_out for features in found]
    rows = [row for row in held_out if row is not None]
    chosen, why, scores = _judged(layers, rows, found[0].group, n_layers)
    scores = [replace(score, chosen=score.layer == chosen) for score in scores]
    why = f"{why} on {_n(len(sample), 'pair')}"
    return LayerChoice(chosen, n_layers, why, tuple(scores), len(sample), tokens / max(1, plan.facts["tokens"]))


def _judged(
    layers: Sequence[int], rows: Sequence[HeldOut], group: NDArray[np.str_], n_layers: int
) -> tuple[int, str, list[LayerScore]]:
    """The layer to take, why, and what each is worth."""
    from coala.statistics.intervals import clustered

    place = min(range(len(rows)), key=lambda i: rows[i].loss)
    best, top = rows[place], layers[place]
    scores = [
        LayerScore(
            layer=layer,
            cost=layer / n_layers,
            nll=row.loss,
            excess=row.loss - best.loss,
            excess_error=clustered(row.losses - best.losses, group)[1],
            accuracy=row.accuracy,
        )
        for layer, row in zip(layers, rows, strict=True)
    ]
    as_good = [score for score in scores if score.excess <= score.excess_error]
    if math.log(2) - best.loss <= ABOVE_COIN * best.error:
        return max(layers), "the last: no layer is clearly better than chance", scores
    if len(as_good) == len(scores):
        return max(layers), "the last: all layers are within one standard error of the best", scores
    chosen = next(score.layer for score in as_good if score.nll < math.log(2))
    if chosen == top:
        return chosen, "the best, and the lowest within one standard error of it,", scores
    return chosen, f"the lowest within one standard error of the best, layer {top},", scores


def _sample(
    pairs: Sequence[Pair], plan: PrefixTree, most_pairs: int, most_tokens: float, seed: int, *, shares: bool
) -> list[int]:
    """The places of pairs of whole groups drawn at random, within both limits, group by group in the order drawn."""
    from coala.features import distinct_tokens

    members: dict[str, list[int]] = {}
    for place, pair in enumerate(pairs):
        members.setdefault(pair.group, []).append(place)
    names = sorted(members)
    kept: list[int] = []
    total = 0
    for drawn in np.random.default_rng(seed).permutation(len(names)):
        places = members[names[drawn]]
        rows = [plan.tokens[row] for row in np.unique(plan.index[places])]
        cost = distinct_tokens(rows) if shares else sum(map(len, rows))
        if len(kept) + len(places) <= most_pairs and total + cost <= most_tokens:
            kept += places
            total += cost
    return kept


def _n(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
