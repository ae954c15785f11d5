"""Splitting pairs into training and evaluation without cutting a group in two."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable

from coala.data.findings import DataError, Finding
from coala.values import Pair


def split(pairs: Iterable[Pair], eval_fraction: float = 0.1, *, seed: int) -> tuple[list[Pair], list[Pair]]:
    """(training, evaluation) by whole groups; about ``eval_fraction`` of the pairs are for evaluation.

    Groups are taken in the order of a hash of ``seed`` and their name, as long as each brings the share nearer to what
    was asked, so the same pairs in another order are split alike. Each side keeps the order of ``pairs`` and gets at
    least one group. Raises :class:`DataError` for a fraction outside (0, 1) and for fewer than two groups.
    """
    pairs = list(pairs)
    if not 0 < eval_fraction < 1:
        raise DataError([_whole(f"eval_fraction is {eval_fraction}", "more than 0 and less than 1", "give e.g. 0.1")])
    sizes = Counter(pair.group for pair in pairs)
    if len(sizes) < 2:
        found = f"{len(pairs)} pairs in {len(sizes)} group" + ("" if len(sizes) == 1 else "s")
        mend = "use more pairs, a finer group column, or a separate evaluation file"
        raise DataError([_whole(found, "at least two groups, as a group is never cut in two", mend)])
    order = sorted(sizes, key=lambda group: (_rank(seed, group), group))
    wanted, taken = eval_fraction * len(pairs), 0
    held_out: set[str] = set()
    for group in order:
        if abs(taken + sizes[group] - wanted) < abs(taken - wanted) and len(held_out) < len(sizes) - 1:
            held_out.add(group)
            taken += sizes[group]
    held_out = held_out or {min(order, key=lambda group: sizes[group])}
    return [p for p in pairs if p.group not in held_out], [p for p in pairs if p.group in held_out]


def _rank(seed: int, group: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{group}".encode("utf-8", "surrogatepass")).digest()


def _whole(found: str, expected: str, mend: str) -> Finding:
    return Finding("split", None, "", found, expected, mend)
