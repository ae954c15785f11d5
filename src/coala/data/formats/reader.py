"""What a format is: a :class:`Reader`, and the located pairs it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass

from coala.data.context import PARTS, Around, in_context
from coala.data.findings import Fault, Finding
from coala.data.records import RowRecord
from coala.data.turns import Row, group_of, rater_of, source_field
from coala.values import Pair


@dataclass(frozen=True)
class Located:
    """A pair and where it came from."""

    file: str
    row: int
    pair: Pair


RowReading = Iterator[Located | Finding]


@dataclass(frozen=True)
class Reader:
    """One format. ``about`` says in a line what its rows look like.

    ``matches`` tells from one row whether this is the format, and never raises. ``pairs`` turns the records of one
    file into located pairs, with a :class:`~coala.data.findings.Finding` for each row that gives none. ``columns``
    are those of a row whose words it takes; ``around`` the parts of the prompt that it finds beside them (see
    :mod:`coala.data.context`); ``left`` what rows of this format are known to have and pairs do not need. Any
    other column is named.
    """

    name: str
    about: str
    matches: Callable[[Row], bool]
    pairs: Callable[[Iterable[RowRecord]], RowReading]
    columns: Callable[[Row], Set[str]]
    around: Around = PARTS
    left: frozenset[str] = frozenset()


def only(*names: str) -> Callable[[Row], Set[str]]:
    """``columns`` that are the same for every row."""
    taken = frozenset(names)
    return lambda row: taken


def placed(row: Row, one: Pair, used: Set[str]) -> Pair:
    """The pair with its rater and source, and with what stands around its prompt in other columns."""
    prompt, field = tuple(in_context(row, one.prompt, used)), source_field(row)
    group = one.group if prompt == one.prompt else group_of(row, prompt)
    source = str(row[field]) if field is not None and field not in used else ""
    return Pair(prompt, one.chosen, one.rejected, group, rater_of(row), source)


def by_row(
    make: Callable[[Row], list[Pair]], columns: Callable[[Row], Set[str]]
) -> Callable[[Iterable[RowRecord]], RowReading]:
    """The ``pairs`` of a format whose rows stand alone, their prompts completed by what stands around them."""

    def read(records: Iterable[RowRecord]) -> RowReading:
        for record in records:
            try:
                made = [placed(record.value, one, columns(record.value)) for one in make(record.value)]
            except Fault as fault:
                yield fault.at(record.file, record.row)
                continue
            for one in made:
                yield Located(record.file, record.row, one)

    return read
