"""What a format is: a :class:`Reader`, and the located pairs it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from coala.data.files import Record
from coala.data.findings import Fault, Finding
from coala.data.turns import Row
from coala.values import Pair


@dataclass(frozen=True)
class Located:
    """A pair and where it came from."""

    file: str
    row: int
    pair: Pair


Reading = Iterator[Located | Finding]


@dataclass(frozen=True)
class Reader:
    """One format. ``about`` says in a line what its rows look like.

    ``matches`` tells from one row whether this is the format, and never raises. ``pairs`` turns the records of one
    file into located pairs, with a :class:`~coala.data.findings.Finding` for each row that gives none.
    """

    name: str
    about: str
    matches: Callable[[Row], bool]
    pairs: Callable[[Iterable[Record]], Reading]


def by_row(make: Callable[[Row], list[Pair]]) -> Callable[[Iterable[Record]], Reading]:
    """The ``pairs`` of a format whose rows stand alone."""

    def read(records: Iterable[Record]) -> Reading:
        for record in records:
            try:
                made = make(record.value)
            except Fault as fault:
                yield fault.at(record.file, record.row)
                continue
            for one in made:
                yield Located(record.file, record.row, one)

    return read
