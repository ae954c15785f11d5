"""Ratings of the two replies beside them, however they are spelt: do they contradict the columns, or tie?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from coala.data.findings import Fault, Finding
from coala.data.records import RowRecord, names
from coala.data.turns import number
from coala.data.unread import tokens_of

_SIDES = {
    **dict.fromkeys(("chosen", "better", "preferred", "accepted", "winner", "win"), "chosen"),
    **dict.fromkeys(("rejected", "worse", "dispreferred", "declined", "loser", "lose"), "rejected"),
}
_MEASURES = names("score scores rating ratings reward rewards grade grades utility")
_RANKS = frozenset(("rank", "ranks", "ranking"))
_DEPTH = 3


Ratings = dict[tuple[str, ...], dict[str, tuple[str, float]]]


def ratings(row: Mapping[str, Any]) -> Ratings:
    """Ratings by what they measure, each with a side's column and number: ``chosen-rating``, ``score.rejected``, ..."""
    found: Ratings = {}
    for place, value in _numbers(row, "", 0):
        if (known := _meaning(place)) is not None:
            side, measure = known
            try:
                found.setdefault(measure, {}).setdefault(side, (place, number(value, place)))
            except Fault:
                continue
    return {measure: both for measure, both in found.items() if len(both) == 2}


@lru_cache(4096)
def _meaning(place: str) -> tuple[str, tuple[str, ...]] | None:
    """The side a column rates and what it measures, if it is a rating of one side."""
    words = [word for part in place.split(".") for word in tokens_of(part)]
    sides = [_SIDES[word] for word in words if word in _SIDES]
    if len(sides) != 1 or not (_MEASURES | _RANKS) & set(words):
        return None
    return sides[0], tuple(sorted(word for word in words if word not in _SIDES))


def rated_columns(row: Mapping[str, Any], rated: Ratings) -> set[str]:
    """The columns that hold ratings of both sides."""
    places = [place for both in rated.values() for place, _ in both.values()]
    return {key for key in row if any(place == key or place.startswith(f"{key}.") for place in places)}


def _numbers(row: Mapping[str, Any], inside: str, depth: int) -> Iterator[tuple[str, Any]]:
    for key, value in row.items():
        place = f"{inside}.{key}" if inside else str(key)
        if isinstance(value, Mapping) and depth < _DEPTH:
            yield from _numbers(value, place, depth + 1)
        elif isinstance(value, list) and len(value) == 1 and not isinstance(value[0], Mapping | list):
            yield place, value[0]
        elif isinstance(value, int | float | str) and (not isinstance(value, str) or len(value) < 32):
            yield place, value


def check_ratings(record: RowRecord, rated: Ratings) -> Iterator[Finding]:
    """At most one warning for a row: the strongest sign of swapped labels a file can give."""
    for measure, both in rated.items():
        (better, high), (worse, low) = both["chosen"], both["rejected"]
        if _RANKS & set(measure):
            high, low = -high, -low
        if high < low:
            found, mend = f"the better rating in {worse}", "check whether chosen and rejected are swapped"
        elif high == low:
            found, mend = f"the same rating in {better} and {worse}", "leave such pairs out: they carry no preference"
        else:
            continue
        expected = f"the better one in {better}"
        yield Finding(record.file, record.row, better, found, expected, mend, severity="warning")
        return
