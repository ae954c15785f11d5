"""One step of COMAL: which answers are compared, which pairs are trained on, and what is asked of them.

The step is IPO's against the one virtual reference v = w log ref + (1 - w) log mu_k, w = eta tau. With
d(y) = log pi(y) - log v(y) and win rates w(y) against mu_k, over pairs of answers drawn from mu_k the losses are

    inpo   (d(y1) - d(y2) - eta (P(y1, y2) - 1/2))^2
    rebel  (d(y1) - d(y2) - eta (w(y1) - w(y2)))^2
    dro    (d(y) - eta w(y) + c_x)^2 with the best c_x: rebel over all pairs of a prompt
    sppo   (d(y) - eta (w(y) - 1/2))^2 for each answer
    dpo    -P log sigma((d(y1) - d(y2)) / eta) - (1 - P) log sigma((d(y2) - d(y1)) / eta), to compare with

Knows nothing of models, judges or files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from coala.comal.settings import TO_WIN_RATES, COMALSettings


@dataclass(frozen=True)
class SampledPairs:
    """One drawn answer: its ``tokens`` (the stop token among them if ``finished``) and its ``text``."""

    tokens: list[int]
    text: str
    finished: bool


@dataclass(frozen=True)
class TrainRow:
    """A pair to train on: prompt and answers in tokens, log v of each, weight and targets (see the losses)."""

    prompt: list[int]
    first: list[int]
    second: list[int]
    reference: tuple[float, float]
    weight: float
    target: tuple[float, float]


@dataclass(frozen=True)
class Selected:
    """Of one prompt: the distinct answers, the pairs to judge, and those to train on with their weights."""

    places: list[int]
    judged: list[tuple[int, int]]
    trained: dict[tuple[int, int], float]


def shard_of(n: int, size: int | None, number: int, seed: int) -> list[int]:
    """The prompts of step ``number``: the next ``size`` of an order drawn anew whenever all have been used."""
    if size is None or size >= n:
        return list(range(n))
    found: list[int] = []
    position = number * size
    while len(found) < size:
        epoch, at = divmod(position, n)
        order = np.random.default_rng([seed, epoch]).permutation(n)
        take = order[at : at + size - len(found)].tolist()
        found += take
        position += len(take)
    return found


def select(places: list[int], drawn: Sequence[Mapping[str, Any]], settings: COMALSettings, seed: int) -> Selected:
    """Which pairs of a prompt's answers to judge and to train on; an answer drawn n times takes part n times.

    An answer against itself has no gradient in a difference; it has one in SPPO, where it is kept.
    """
    counts = {place: int(drawn[place]["count"]) for place in places}
    every = [(a, b) for k, a in enumerate(places) for b in places[k + 1 :]]
    trained: dict[tuple[int, int], float] = {}
    if settings.pair_selection == "random":
        rng = np.random.default_rng([seed, drawn[places[0]]["prompt"]])
        order = rng.permutation(np.repeat(places, [counts[place] for place in places])).tolist()
        for a, b in zip(order[::2], order[1::2], strict=False):
            trained[min(a, b), max(a, b)] = trained.get((min(a, b), max(a, b)), 0.0) + 1
    elif settings.pair_selection == "all":
        n = sum(counts.values())
        # In `dro` every answer counts once: sum_i (e_i - mean e)^2 = sum_{i < j} (e_i - e_j)^2 / n.
        unit = 1 / n if settings.inner_loss == "dro" else 1.0
        trained = {(a, b): unit * counts[a] * counts[b] for a, b in every}
        trained |= {(a, a): unit * counts[a] * (counts[a] - 1) / 2 for a in places if counts[a] > 1}
    if settings.inner_loss != "sppo":
        trained = {pair: weight for pair, weight in trained.items() if pair[0] != pair[1]}
    needs_all = settings.inner_loss in TO_WIN_RATES or settings.pair_selection == "best_worst"
    return Selected(places, every if needs_all else list(trained), trained)


def targets(
    selected: Selected,
    P: Mapping[tuple[int, int], float | None],
    drawn: Sequence[Mapping[str, Any]],
    settings: COMALSettings,
    seed: int,
) -> list[dict[str, Any]]:
    """Rows of ``pairs.jsonl``; a pair whose verdict is missing is left out.

    ``target_first`` and ``target_second`` are what d(first) and d(second) should be, of which all losses but SPPO look
    at the difference only.
    """
    eta = settings.step
    rates = win_rates(selected.places, P, [int(drawn[place]["count"]) for place in selected.places])
    pairs = dict(selected.trained)
    if settings.pair_selection == "best_worst":
        known = [place for place in selected.places if math.isfinite(rates[place])]
        best, worst = max(known, key=rates.__getitem__, default=-1), min(known, key=rates.__getitem__, default=-1)
        pairs = {(best, worst): 1.0} if best != worst else {}
    rng = np.random.default_rng([seed, 1])
    rows = []
    for (a, b), weight in pairs.items():
        p = 0.5 if a == b else P[a, b] if (a, b) in P else _turned(P.get((b, a)))
        if settings.inner_loss in TO_WIN_RATES:
            if not (math.isfinite(rates[a]) and math.isfinite(rates[b])):
                continue
            wanted = eta * (rates[a] - 0.5), eta * (rates[b] - 0.5)
        elif p is None:
            continue
        elif settings.target == "bernoulli":
            # Each of the pair's `weight` draws gets a label of its own; their mean is the target of the squared loss.
            half = eta / 2 * (2 * rng.binomial(max(1, round(weight)), p) / max(1, round(weight)) - 1)
            wanted = half / 2, -half / 2
        elif settings.target == "hard":
            half = eta / 2 * float(np.sign(p - 0.5))
            wanted = half / 2, -half / 2
        else:
            wanted = eta * (p - 0.5) / 2, -eta * (p - 0.5) / 2
        row = {"first": a, "second": b, "weight": weight, "target_first": wanted[0], "target_second": wanted[1]}
        rows.append({**row, "preference": p})
    return rows


def win_rates(
    places: Sequence[int], P: Mapping[tuple[int, int], float | None], counts: Sequence[int]
) -> dict[int, float]:
    """Mean win rate of each answer over the other drawn ones (a copy of it is a tie); nan without any verdict."""
    found = {}
    for a, count in zip(places, counts, strict=True):
        total, n = 0.5 * (count - 1), count - 1
        for b, times in zip(places, counts, strict=True):
            p = P[a, b] if (a, b) in P else _turned(P.get((b, a)))
            if a != b and p is not None:
                total, n = total + times * p, n + times
        found[a] = total / n if n else math.nan
    return found


def _turned(p: float | None) -> float | None:
    return None if p is None else 1 - p


def by_prompt(drawn: Sequence[Mapping[str, Any]]) -> dict[int, list[int]]:
    """Places of the candidates of each prompt."""
    found: dict[int, list[int]] = {}
    for place, candidate in enumerate(drawn):
        found.setdefault(int(candidate["prompt"]), []).append(place)
    return found
