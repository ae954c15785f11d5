"""How far raters agree beyond chance: Fleiss' kappa and Krippendorff's alpha, with bootstrap intervals over items."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from coala.statistics.intervals import Float, bootstrap
from coala.values import CoalaError, Estimate

Metric = Literal["nominal", "ordinal", "interval"]


def fleiss_kappa(counts: ArrayLike, *, draws: int = 1000, seed: int = 0) -> Estimate:
    """Kappa of ``counts`` (items, categories): how many raters put an item into a category, as many for every item.

    (P - P_e) / (1 - P_e) with P the mean share of agreeing pairs of raters and P_e the sum of squared category shares
    (Fleiss 1971). nan where all ratings are of one category: nothing could have differed.
    """
    table = np.asarray(counts, dtype=np.float64)
    if table.ndim != 2 or not table.size or not np.isfinite(table).all() or (table < 0).any():
        raise CoalaError(f"Expected counts of shape (items, categories), none negative; found {table.shape}.")
    raters = table.sum(axis=1)
    if raters[0] < 2 or (raters != raters[0]).any():
        raise CoalaError(
            f"Items have from {raters.min():g} to {raters.max():g} ratings; Fleiss' kappa needs the same number for "
            "each, at least two. Use Krippendorff's alpha, which allows missing ratings."
        )
    m = raters[0]
    agreement = (np.square(table).sum(axis=1) - m) / (m * (m - 1))

    def kappa(rows: NDArray[np.intp]) -> float:
        share = table[rows].sum(axis=0) / (len(rows) * m)
        chance = float(share @ share)
        return (float(agreement[rows].mean()) - chance) / (1 - chance) if chance < 1 else math.nan

    return bootstrap(kappa, len(table), draws=draws, seed=seed, name=f"Fleiss' kappa, {m:g} ratings per item")


def krippendorff_alpha(
    ratings: Sequence[Sequence[Any]],
    metric: Metric = "nominal",
    *,
    draws: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Alpha = 1 - observed / expected disagreement of ``ratings``, per item a sequence of values, None for missing.

    Pairs of ratings of one item weigh 1/(ratings - 1); the expected disagreement is that of pairs drawn from all
    ratings of items with two or more (Krippendorff 2011). Squared distances: 1 for unequal ("nominal"), the squared
    number of ratings between two ranks ("ordinal"), the squared difference ("interval"). n counts items with at least
    two ratings. nan where no two ratings differ.
    """
    items = [[value for value in item if not _missing(value)] for item in ratings]
    items = [item for item in items if len(item) > 1]
    if metric not in ("nominal", "ordinal", "interval"):
        raise CoalaError(f"The metric is {metric!r}; expected nominal, ordinal or interval.")
    if not items:
        raise CoalaError("No item has two ratings; agreement needs at least two of one item.")
    try:
        values = sorted({value for item in items for value in item})
    except TypeError:
        raise CoalaError("Ratings are of kinds that cannot be ordered; expected all texts or all numbers.") from None
    if metric == "interval" and not all(isinstance(v, int | float | np.number) and math.isfinite(v) for v in values):
        raise CoalaError("The interval metric needs finite numbers; found a rating that is not one.")
    place = {value: i for i, value in enumerate(values)}
    table = np.zeros((len(items), len(values)))
    for i, item in enumerate(items):
        for value in item:
            table[i, place[value]] += 1
    m = table.sum(axis=1)

    def alpha(rows: NDArray[np.intp]) -> float:
        some = table[rows]
        weight = 1 / (m[rows] - 1)
        # Ordered pairs of unlike raters: all pairs of an item but each rating with itself.
        together = (some.T * weight) @ some - np.diag(weight @ some)
        total = together.sum(axis=0)
        distance = _distances(values, total, metric)
        expected = float(total @ distance @ total) / (total.sum() - 1)
        return 1 - float((together * distance).sum()) / expected if expected > 0 else math.nan

    name = f"Krippendorff's alpha, {metric}"
    return bootstrap(alpha, len(items), draws=draws, seed=seed, name=name)


def _distances(values: Sequence[Any], total: Float, metric: Metric) -> Float:
    if metric == "nominal":
        return 1.0 - np.eye(len(values))
    # Ordinal: the ratings passed on the way from one rank to another, half of those at either end.
    scale = np.cumsum(total) - total / 2 if metric == "ordinal" else np.array(values, dtype=np.float64)
    return np.asarray(np.square(scale[:, None] - scale[None, :]))


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
