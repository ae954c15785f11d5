"""Win rates of judged replies; whether the judge contradicts itself when the order is swapped, and favours a place.

A judge whose verdicts follow the place alone says nothing of the replies: :func:`place_alone` finds it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from coala.statistics.intervals import Float, share_estimate, void
from coala.values import CoalaError, Estimate, Judgement


def win_rate(
    judgements: Sequence[Judgement], ties: Literal["half", "exclude"] = "half", *, of: str | None = None
) -> Estimate:
    """Share of comparisons that ``of`` wins (by default the side named first in the first judgement).

    The k-th judgement of a prompt in one order and the k-th in the other are averaged into one comparison before
    anything else, which removes a judge's taste for the first place. A comparison with a failed judgement (``None``)
    in either order is left out and counted in ``method``. A comparison that ends at exactly 1/2 is a tie: it counts
    one half, or nothing with ``ties="exclude"``. Comparisons of one prompt are one group of the interval. Verdicts
    that follow the place alone have no win rate: the value is nan and ``method`` says ``void`` and why.
    """
    if not judgements:
        return Estimate(math.nan, 0.0, 1.0, 0, "win rate; no judgements")
    ours = judgements[0].first if of is None else of
    orders: dict[tuple[str, str, str], tuple[list[float | None], list[float | None]]] = {}
    for judgement in judgements:
        if ours not in (judgement.first, judgement.second) or judgement.first == judgement.second:
            raise CoalaError(
                f"The judgement of prompt {judgement.prompt_id!r} compares {judgement.first!r} with "
                f"{judgement.second!r}; expected {ours!r} on exactly one side. Count one contest at a time."
            )
        value = judgement.preference
        if value is not None and not 0 <= value <= 1:
            raise CoalaError(f"A preference of {value} on prompt {judgement.prompt_id!r}; expected a value in [0, 1].")
        swapped = judgement.second == ours
        other = judgement.first if swapped else judgement.second
        games = orders.setdefault((judgement.prompt_id, other, judgement.judge), ([], []))
        games[swapped].append(value if value is None or not swapped else 1 - value)
    values: list[float] = []
    prompts: list[str] = []
    # Preferences for the reply shown first: ours, and theirs, of comparisons judged in both orders or in one.
    twice: tuple[list[float], list[float]] = ([], [])
    once: tuple[list[float], list[float]] = ([], [])
    failed = tied = both = 0
    for (prompt_id, *_), (straight, swapped_games) in orders.items():
        for k in range(max(len(straight), len(swapped_games))):
            game = [side[k] for side in (straight, swapped_games) if k < len(side)]
            known = [value for value in game if value is not None]
            if len(known) < len(game):
                failed += 1
                continue
            value = sum(known) / len(known)
            both += len(known) == 2
            places = twice if len(known) == 2 else once
            if k < len(straight):
                places[0].append(known[0])
            if k < len(swapped_games):
                places[1].append(1 - known[-1])
            tied += value == 0.5
            if value != 0.5 or ties == "half":
                values.append(value)
                prompts.append(prompt_id)
    facts = [f"{both} of {len(values) + (tied if ties == 'exclude' else 0)} comparisons judged in both orders"]
    facts.append(f"{tied} tied and {'counted one half' if ties == 'half' else 'left out'}")
    if failed:
        facts.append(f"{failed} failed and left out")
    mixed = bool(twice[0]) and any(once)
    why = "" if mixed else place_alone(*twice) if twice[0] else place_alone_once(*once)
    if why:
        n = len(twice[0]) or sum(map(len, once))
        return void("win rate", n, ", ".join([why, *facts[2:]]))
    estimate = share_estimate(values, prompts, "win rate")
    return Estimate(estimate.value, estimate.low, estimate.high, estimate.n, f"{estimate.method}; {', '.join(facts)}")


@dataclass(frozen=True)
class Consistency:
    """Over comparisons judged in both orders (n of each estimate), comparisons of a prompt being one group.

    ``inconsistency``: share whose two verdicts do not name the same reply, or a tie both times. ``position_bias``:
    share that preferred the same *place* both times, so that the order alone decided; of these ``n_first`` the first
    place and ``n_second`` the second. ``first_place``: mean preference for the reply shown first, 1/2 without bias.
    """

    inconsistency: Estimate
    position_bias: Estimate
    first_place: Estimate
    n_first: int
    n_second: int


def remarks_on(judgements: Sequence[Judgement]) -> tuple[str, ...]:
    """What of the judge takes from a win rate over ``judgements``, in words: its place, its ties, a single order."""
    known = [judgement.preference for judgement in judgements if judgement.preference is not None]
    if not known:
        return ("no verdict: nothing was judged",) if judgements else ()
    both = _both_orders(judgements)
    straight, swapped = [row[1] for row in both], [row[2] for row in both]
    if why := place_alone(straight, swapped):
        return (f"{why}; the win rate says nothing",)
    if not _leaning(known).any():
        return (f"every one of the {len(known)} verdicts is a tie: this judge does not distinguish replies",)
    if not both:
        sides = {(judgement.first, judgement.second) for judgement in judgements}
        if len(sides) == 1:
            return ("asked in one order only: a judge of places would give such a win rate, whatever the replies",)
        ours = judgements[0].first
        firsts = [(row.first == ours, row.preference) for row in judgements if row.preference is not None]
        why = place_alone_once(*([value for is_ours, value in firsts if is_ours is side] for side in (True, False)))
        return (f"{why}; the win rate says nothing",) if why else ()
    by_place = int(((_leaning(straight) == _leaning(swapped)) & (_leaning(straight) != 0)).sum())
    if 2 * by_place > len(both):
        return (f"the place alone decided {by_place} of {len(both)} comparisons: the win rate rests on the others",)
    return ()


def _both_orders(judgements: Sequence[Judgement]) -> list[tuple[str, float, float]]:
    """Prompt and both preferences for the reply shown first, of comparisons judged in both orders."""
    orders: dict[tuple[str, str, str, str], tuple[list[float | None], list[float | None]]]
    orders = defaultdict(lambda: ([], []))
    for judgement in judgements:
        if judgement.first == judgement.second:
            raise CoalaError(
                f"The judgement of prompt {judgement.prompt_id!r} has {judgement.first!r} on both sides; expected two "
                "names. Name the sides apart."
            )
        one, other = sorted((judgement.first, judgement.second))
        games = orders[judgement.prompt_id, one, other, judgement.judge]
        games[judgement.first != one].append(judgement.preference)
    return [
        (prompt_id, straight, swapped)
        for (prompt_id, *_), games in orders.items()
        for straight, swapped in zip(*games, strict=False)
        if straight is not None and swapped is not None
    ]


def place_alone(straight: Sequence[float], swapped: Sequence[float]) -> str:
    """Why these verdicts say nothing of the replies, in words; empty if they may say something.

    ``straight[i]`` and ``swapped[i]`` in [0, 1] are the preferences for the reply shown *first* in the two orders of
    comparison i. They say nothing if, ties in both orders apart, the same place is preferred both times in every one.
    """
    lean = np.stack([_leaning(straight), _leaning(swapped)])
    decided, tied = (lean[0] == lean[1]) & (lean[0] != 0), (lean == 0).all(0)
    if not decided.any() or not (decided | tied).all():
        return ""
    first, n = int((lean[0] > 0).sum()), int(decided.sum())
    where = "reply shown first" if first == n else "reply shown second" if not first else "same place"
    return f"this judge reads only the place ({_of_all(n)} it prefers the {where} in both orders)"


def place_alone_once(straight: Sequence[float], swapped: Sequence[float]) -> str:
    """:func:`place_alone` for comparisons that were judged in one order each: ours shown first, and ours second.

    Values are preferences for the reply shown first. With fewer than three verdicts in either order a judge of the
    replies may well agree with the place, and nothing is said.
    """
    lean = np.concatenate([_leaning(straight), _leaning(swapped)])
    enough = all(np.count_nonzero(_leaning(side)) >= 3 for side in (straight, swapped))
    if not enough or len(set(lean[lean != 0].tolist())) != 1:
        return ""
    n, where = int(np.count_nonzero(lean)), "first" if lean.max() > 0 else "second"
    return f"this judge reads only the place ({_of_all(n)} it prefers the reply shown {where}, ours or not)"


def _of_all(n: int) -> str:
    return "in the only comparison" if n == 1 else f"in all {n} comparisons"


def _leaning(preference: Sequence[float] | Float) -> Float:
    """1 where the reply shown first is preferred, -1 where the other is, 0 for a tie (within 1e-9 of 1/2)."""
    away = np.asarray(preference, dtype=np.float64) - 0.5
    return np.where(np.abs(away) < 1e-9, 0.0, np.sign(away))


def consistency(judgements: Sequence[Judgement]) -> Consistency:
    """Pairs the k-th judgement of a prompt, judge and pair of sides in one order with the k-th in the other.

    Comparisons with a failure, or without a counterpart, are left out. A preference within 1e-9 of 1/2 is a tie.
    """
    both = _both_orders(judgements)
    prompts = [prompt_id for prompt_id, _, _ in both]
    games_won: Float = np.array([row[1:] for row in both], dtype=np.float64).reshape(-1, 2)
    leaning = _leaning(games_won)
    first, second = (leaning == 1).all(1), (leaning == -1).all(1)
    return Consistency(
        inconsistency=share_estimate(leaning[:, 0] != -leaning[:, 1], prompts, "verdicts that the order changed"),
        position_bias=share_estimate(first | second, prompts, "the same place preferred in both orders"),
        first_place=share_estimate(games_won.mean(1), prompts, "preference for the reply shown first"),
        n_first=int(first.sum()),
        n_second=int(second.sum()),
    )
