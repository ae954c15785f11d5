"""Reviews with a sentiment, as in IMDb: pairs of a positive and a negative one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import zip_longest

from coala.data.findings import Fault, Finding
from coala.data.formats.reader import Located, RowReading
from coala.data.records import RowRecord
from coala.data.turns import digest, label, named_group, same_reply, sound_text, text
from coala.values import Pair, user

REVIEW_PROMPT = "Write a review of a film you have seen."
Review = tuple[RowRecord, str]
_BREAK = re.compile(r"<br\s*/?>")
_SENTIMENT = {"1": True, "pos": True, "positive": True, "0": False, "neg": False, "negative": False}


def read_imdb(records: Iterable[RowRecord]) -> RowReading:
    """Reviews ``text, label, movie``: a positive one chosen, a negative one rejected, under one fixed prompt.

    Each review is used at most once. Reviews of one film are paired first, in file order; what a film has left over
    goes to films with the opposite left over, such that every film belongs to one family of films. The family is the
    group, so no film straddles a split. Without ``movie`` the k-th positive review meets the k-th negative one.
    """
    films: dict[str, tuple[list[Review], list[Review]]] = {}
    for record in records:
        row = record.value
        try:
            said = sound_text(_BREAK.sub("\n", text(row, "text")), "text")
            positive = label(row, "label", _SENTIMENT)
            film = named_group(row, ("movie",)) or ""
        except Fault as fault:
            yield fault.at(record.file, record.row)
            continue
        films.setdefault(film, ([], []))[0 if positive else 1].append((record, said))
    made: list[tuple[Review, Review, str]] = []
    family = _families({film: len(good) - len(bad) for film, (good, bad) in films.items()})
    left: dict[str, tuple[list[Review], list[Review]]] = {}
    for film, (good, bad) in films.items():
        both = min(len(good), len(bad))
        made += [(a, b, family[film]) for a, b in zip(good, bad, strict=False)]
        rest = left.setdefault(family[film], ([], []))
        rest[0].extend(good[both:])
        rest[1].extend(bad[both:])
    unused, example = 0, None
    for name, (good, bad) in left.items():
        for a, b in zip_longest(good, bad):
            if a and b:
                made.append((a, b, name))
            else:
                unused += 1
                example = example or a or b
    prompt = user(REVIEW_PROMPT)
    for (record, good_text), (_, bad_text), name in sorted(made, key=lambda one: one[0][0].row):
        if not same_reply(good_text, bad_text):
            yield Located(record.file, record.row, Pair(prompt, good_text, bad_text, name or digest(good_text)))
    if example:
        found = f"{unused} reviews without a partner of the other sentiment; they were left out"
        yield Finding(example[0].file, None, "label", found, "as many of each", "add reviews", severity="warning")


def _families(surplus: Mapping[str, int]) -> dict[str, str]:
    """Films to the name of their family: first fit of the other sign's films into the larger surplus, largest first."""
    family = {film: film for film in surplus}
    order = {film: k for k, film in enumerate(surplus)}
    signs = [
        sorted((f for f in surplus if s * surplus[f] > 0), key=lambda f: (-abs(surplus[f]), order[f])) for s in (1, -1)
    ]
    waiting, hosts = sorted(signs, key=len, reverse=True)
    room = {film: abs(surplus[film]) for film in hosts}
    open_hosts = list(hosts)
    for film in waiting:
        size = abs(surplus[film])
        host = next((h for h in open_hosts if room[h] >= size), None)
        if host is not None:
            family[film] = family[host]
            room[host] -= size
            if not room[host]:
                open_hosts.remove(host)
    return family
