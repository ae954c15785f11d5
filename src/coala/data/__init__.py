"""Outside text to pairs: reading, checking, making them from conversations, splitting.

    read_pairs(source)          pairs of any known format; stops at the first bad row
    check(source)               the data doctor: reads everything and lists what is wrong
    read_conversations(source), alternate(turns, group)     the Alternating Population Strategy
    position_cues(pairs)        how far length, punctuation and first words alone give the preference away
    split(pairs, seed=...)      training and evaluation by whole groups

and in a module of its own, for what it imports:

    synthesis.synthesize(recipe, journal, record)           conversations of two agents over a chat endpoint

Knows nothing of models, features or stores. The canonical file is what ``coala.store.save_pairs`` writes.
"""

from __future__ import annotations

from collections.abc import Iterator

from coala.data.conversations import Context, alternate, read_conversations
from coala.data.cues import position_cues
from coala.data.doctor import check
from coala.data.files import Source, source_digest
from coala.data.findings import DataError, Finding, Findings
from coala.data.formats import READERS, Located, Reader, read
from coala.data.formats.trl import pair_from_trl, pair_to_trl
from coala.data.splits import split
from coala.values import Pair, Role

__all__ = [
    "READERS",
    "DataError",
    "Finding",
    "Findings",
    "Reader",
    "alternate",
    "check",
    "pair_from_trl",
    "pair_to_trl",
    "position_cues",
    "read_conversations",
    "read_pairs",
    "source_digest",
    "split",
]


def read_pairs(
    source: Source, format: str = "auto", *, role: Role = "assistant", context: Context = "all"
) -> Iterator[Pair]:
    """Pairs of a file, several files, or a hub data set (``owner/name`` or ``owner/name:split``), in reading order.

    jsonl, json, csv, tsv and parquet, plain or gzipped. ``format`` is a name in :data:`READERS`, or ``auto``: each
    source is recognised by its first rows. Where the rows are conversations (``format="conversations"``), ``role``
    says whose replies are compared and ``context`` how much of what came before is the prompt (see :func:`alternate`);
    they are read twice, and never held. Raises :class:`DataError` at the first bad row; :func:`check` lists them all.
    """
    for event in read(source, format, role, context):
        if isinstance(event, Located):
            yield event.pair
        elif event.severity == "error":
            raise DataError([event])
