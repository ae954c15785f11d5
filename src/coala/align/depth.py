"""The layer to read: the cheapest whose held-out loss is within the noise of the best, on a sample of the pairs.

Layers differ by less than the noise on most data, and a backbone cut at layer l of L costs l/L of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from coala.values import CoalaError, FeatureSpec, Pair

if TYPE_CHECKING:
    from coala.backbone import LanguageModel

MOST_PAIRS = 1000
MOST_LAYERS = 8


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


def choose_layer(
    pairs: Sequence[Pair],
    backbone: LanguageModel,
    spec: FeatureSpec,
    *,
    layers: Sequence[int] | None = None,
    most_pairs: int = MOST_PAIRS,
    batch_tokens: int = 4096,
    seed: int = 0,
    on_batch: Callable[[int, int, int], None] | None = None,
) -> list[LayerScore]:
    """Scores of ``layers`` (default: up to eight, evenly spaced, the last among them), the lowest first, one chosen.

    All layers come from one pass over at most ``most_pairs`` pairs in whole groups drawn with ``seed``; each gets a
    linear head with its own ridge, validated on folds of whole groups. Chosen is the lowest layer whose loss is not
    above the best one's by more than the standard error of the difference. ``spec`` gives everything but the layer.

    Raises:
        CoalaError: for pairs of fewer than two groups, of which nothing can be held out.
    """
    import jax

    from coala.convex import fit
    from coala.convex.validation import clustered_error
    from coala.features import extract_many

    n_layers = backbone.n_layers
    if layers is None:
        layers = sorted({round(x) for x in np.linspace(0, n_layers, min(MOST_LAYERS, n_layers) + 1)[1:]})
    sample = _whole_groups(pairs, most_pairs, seed)
    if len({pair.group for pair in sample}) < 2:
        raise CoalaError(
            f"The layer is chosen on held-out groups, and the {len(pairs)} pairs are of one group. "
            "Name the layer (--layer -1 for the last), or give pairs with groups."
        )
    specs = [backbone.spec(layer, spec.pooling, spec.ends_with_eos, spec.max_tokens) for layer in layers]
    found = extract_many(sample, backbone, specs, batch_tokens=batch_tokens, on_batch=on_batch)
    # Small fits; where the model is on a GPU, the card is torch's.
    with jax.default_device(jax.devices("cpu")[0]):
        held_out = [fit(features, method="linear", seed=seed).held_out for features in found]
    rows = [h for h in held_out if h is not None]
    best = min(rows, key=lambda row: row.loss)
    scores = [
        LayerScore(
            layer=layer,
            cost=layer / n_layers,
            nll=row.loss,
            excess=row.loss - best.loss,
            excess_error=clustered_error(row.losses - best.losses, found[0].group),
            accuracy=row.accuracy,
        )
        for layer, row in zip(layers, rows, strict=True)
    ]
    chosen = next(score for score in scores if score.excess <= score.excess_error)
    return [LayerScore(**{**vars(score), "chosen": score is chosen}) for score in scores]


def _whole_groups(pairs: Sequence[Pair], most: int, seed: int) -> list[Pair]:
    """At most ``most`` pairs (or one group) of groups drawn at random, in the order they came."""
    if len(pairs) <= most:
        return list(pairs)
    names = sorted({pair.group for pair in pairs})
    sizes: dict[str, int] = dict.fromkeys(names, 0)
    for pair in pairs:
        sizes[pair.group] += 1
    kept: set[str] = set()
    total = 0
    for place in np.random.default_rng(seed).permutation(len(names)):
        if kept and total + sizes[names[place]] > most:
            continue
        kept.add(names[place])
        total += sizes[names[place]]
    return [pair for pair in pairs if pair.group in kept]


def layer_table(scores: Sequence[LayerScore]) -> list[dict[str, Any]]:
    """As saved and shown."""
    return [dict(vars(score)) for score in scores]
