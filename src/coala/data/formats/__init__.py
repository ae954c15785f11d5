"""The formats preference data come in: how each is recognised, and how its rows become pairs.

A format is one :class:`Reader` in :data:`READERS`; adding one takes a function from a row to pairs and a line there.
Knows nothing of files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain, islice
from math import inf
from pathlib import Path

from coala.data.conversations import (
    SHAPES_LEFT,
    Context,
    alternate,
    conversation,
    is_conversation,
    shape_columns,
    whole,
)
from coala.data.files import Source, parted, records, sources
from coala.data.findings import DataError, Fault, Finding, listed
from coala.data.formats.battles import (
    alternative,
    battle,
    battle_columns,
    is_alternative,
    is_battle,
    is_ranked,
    ranked,
)
from coala.data.formats.intake import Intake
from coala.data.formats.labelled import (
    BRIDGE_LEFT,
    HELPSTEER_COLUMNS,
    ULTRAFEEDBACK_LEFT,
    autoj,
    bridge,
    llmbar,
    read_helpsteer,
    shp,
    ultrafeedback,
    ultrafeedback_columns,
)
from coala.data.formats.reader import Located, Reader, RowReading, by_row, only
from coala.data.formats.replies import (
    CHOSEN,
    PREFERENCE,
    PROMPTS,
    REJECTED,
    alpaca,
    alpaca_columns,
    conversation_field,
    hh_columns,
    hh_rlhf,
    is_columns,
    is_hh,
    is_preference,
    is_texts,
    mapped,
    read_columns,
    read_preference,
    rewardbench,
    sharegpt,
    strings,
)
from coala.data.formats.reviews import read_imdb
from coala.data.records import RowRecord
from coala.data.turns import is_messages
from coala.values import Role, Turn

__all__ = ["READERS", "Located", "Reader", "read"]

LOOKED_AT = 50  # rows that decide which format a file has


def read_alternating(
    records: Iterable[RowRecord],
    speaker: Role = "assistant",
    context: Context = "all",
    again: Callable[[], Iterable[RowRecord]] | None = None,
) -> RowReading:
    """Conversations as alternating pairs (see :func:`~coala.data.conversations.alternate`), snapshots left out.

    Whether a conversation is a snapshot of another is known only at the end. ``again`` reads the records once more for
    that, and then none is held; without it all of them are.
    """
    if again is None:
        records = list(records)
    first: Iterable[RowRecord] = records if again is None else again()
    stay = iter(whole(said for _, _, said in _conversations(first, [])))
    wanted = next(stay, None)
    faults: list[Finding] = []
    for place, (record, group, said) in enumerate(_conversations(records, faults)):
        yield from faults
        faults.clear()
        if place == wanted:
            wanted = next(stay, None)
            for pair in alternate(said, group, role=speaker, context=context):
                yield Located(record.file, record.row, pair)
    yield from faults


def _conversations(records: Iterable[RowRecord], faults: list[Finding]) -> Iterator[tuple[RowRecord, str, list[Turn]]]:
    """The conversations among the records; what is wrong with the others goes to ``faults``."""
    for record in records:
        try:
            yield (record, *conversation(record.value))
        except Fault as fault:
            faults.append(fault.at(record.file, record.row))


_ALL = (
    Reader(
        "sharegpt",
        "conversations (or messages): [{from, value}], chosen: {from, value}, rejected: {from, value}",
        lambda row: is_messages(row.get(conversation_field(row))) and "chosen" in row and "rejected" in row,
        by_row(sharegpt, lambda row: {conversation_field(row), "chosen", "rejected"}),
        lambda row: {conversation_field(row), "chosen", "rejected"},
    ),
    Reader(
        "swift",
        "messages that end with the chosen reply, and rejected_response or rejected_messages",
        is_alternative,
        by_row(alternative, only("messages", "rejected_response", "rejected_messages")),
        only("messages", "rejected_response", "rejected_messages"),
    ),
    Reader(
        "bridge",
        "c_h: chat, c_r: the tutor's reply, c_r_: an expert's better one",
        lambda row: {"c_h", "c_r", "c_r_"} <= set(row),
        by_row(bridge, only("c_h", "c_r", "c_r_")),
        only("c_h", "c_r", "c_r_"),
        left=BRIDGE_LEFT,
    ),
    Reader(
        "hh-rlhf",
        r"chosen, rejected: transcripts '\n\nHuman: ...\n\nAssistant: ...'; or prompt (a transcript) and two replies",
        is_hh,
        by_row(hh_rlhf, hh_columns),
        hh_columns,
    ),
    Reader(
        "rewardbench",
        "prompt, chosen: [texts], rejected: [texts] (version 2; version 1 is `preference`)",
        lambda row: "prompt" in row and (is_texts(row.get("chosen")) or is_texts(row.get("rejected"))),
        by_row(rewardbench, only(*PREFERENCE)),
        only(*PREFERENCE),
    ),
    Reader(
        "alpaca",
        "instruction, input, output: [good, bad]; or instruction, input, chosen, rejected",
        lambda row: (
            "instruction" in row
            and (isinstance(row.get("output"), list) or ("input" in row and strings(row, "chosen", "rejected")))
        ),
        by_row(alpaca, alpaca_columns),
        alpaca_columns,
    ),
    Reader(
        "ultrafeedback",
        "instruction, completions: [{response, overall_score}]; the best against each lower one",
        lambda row: isinstance(row.get("completions"), list) and ("instruction" in row or "prompt" in row),
        by_row(ultrafeedback, ultrafeedback_columns),
        ultrafeedback_columns,
        left=ULTRAFEEDBACK_LEFT,
    ),
    Reader(
        "ranked",
        "prompt, answers: [{answer, rank}]; the first in rank against each other one",
        is_ranked,
        by_row(ranked, only("prompt", "answers")),
        only("prompt", "answers"),
    ),
    Reader(
        "helpsteer",
        "prompt, response, helpfulness, ...; the most helpful reply to a prompt against each less helpful one",
        lambda row: {"prompt", "response", "helpfulness"} <= set(row),
        read_helpsteer,
        HELPSTEER_COLUMNS,
    ),
    Reader(
        "shp",
        "history, human_ref_A, human_ref_B, labels (1: A is better, 0: B)",
        lambda row: {"history", "human_ref_A", "human_ref_B", "labels"} <= set(row),
        by_row(shp, only("history", "human_ref_A", "human_ref_B", "labels")),
        only("history", "human_ref_A", "human_ref_B", "labels"),
    ),
    Reader(
        "llmbar",
        "input, output_1, output_2, label (1 or 2: the better one)",
        lambda row: {"input", "output_1", "output_2", "label"} <= set(row),
        by_row(llmbar, only("input", "output_1", "output_2", "label")),
        only("input", "output_1", "output_2", "label"),
    ),
    Reader(
        "autoj",
        "prompt, response 1, response 2, label (0: the first is better, 1: the second, 2: a tie)",
        lambda row: {"prompt", "response 1", "response 2", "label"} <= set(row),
        by_row(autoj, only("prompt", "response 1", "response 2", "label")),
        only("prompt", "response 1", "response 2", "label"),
    ),
    Reader(
        "battles",
        "conversation_a, conversation_b (or response_a, answer_1, ...) and winner: model_a, b, A>B, tie, ...",
        is_battle,
        by_row(battle, battle_columns),
        battle_columns,
    ),
    Reader(
        "imdb",
        "text, label (1 or pos, 0 or neg), movie; a positive review against a negative one",
        lambda row: {"text", "label"} <= set(row) and not {"chosen", "rejected"} & set(row),
        read_imdb,
        only("text", "label", "movie"),
        around=(),
    ),
    Reader(
        "preference",
        "prompt, chosen, rejected: texts or lists of {role, content}; the prompt may be what both begin with",
        is_preference,
        read_preference,
        only(*PREFERENCE),
    ),
    Reader(
        "columns",
        f"other names: {listed(PROMPTS, 5)}; {listed(CHOSEN, 5)}; {listed(REJECTED, 5)}",
        is_columns,
        read_columns,
        mapped,
    ),
    Reader(
        "conversations",
        "messages, conversations, turns, ...: each reply against the same speaker's next one; only when asked for",
        is_conversation,
        read_alternating,
        shape_columns,
        around=("system",),
        left=SHAPES_LEFT,
    ),
)

READERS: Mapping[str, Reader] = {reader.name: reader for reader in _ALL}


def read(
    source: Source, format: str = "auto", role: Role = "assistant", context: Context = "all"
) -> Iterator[Located | Finding]:
    """Located pairs and findings of one or several sources, in order; each source is recognised by itself.

    Raises :class:`DataError` only for a ``format`` that is not in :data:`READERS`.
    """
    if format != "auto" and format not in READERS:
        fix = "give --format one of these"
        raise DataError([Finding("format", None, "", repr(format), f"auto or one of {', '.join(READERS)}", fix)])
    for name in sources(source):
        faults: list[Finding] = []
        intake = Intake(name, faults)
        rows = intake.opened(records(name))
        if format == "auto":
            head = list(islice(rows, LOOKED_AT))
            rows = chain(head, rows)
            reader = _recognise(name, head)
            if isinstance(reader, Finding):
                yield from faults
                if head:
                    yield reader
                continue
        else:
            reader = READERS[format]
        yield Finding(name, None, "", f"read as {reader.name}", "", "", severity="note")
        make = reader.pairs
        if reader.name == "conversations":
            # A hub data set is not fetched twice, and a pipe flows once: they are held instead.
            again = partial(_again, name) if Path(parted(name)[0]).is_file() else None
            make = partial(read_alternating, speaker=role, context=context, again=again)
        for event in make(intake.checked(rows, reader)):
            # Rows were read ahead: what is wrong with a later row waits for its turn.
            while faults and _order(faults[0]) < _order(event):
                yield faults.pop(0)
            yield event
        yield from faults
        yield from intake.remarks()


def _again(name: str) -> Iterator[RowRecord]:
    """The records that :func:`read` makes pairs of, once more."""
    intake = Intake(name, [])
    return intake.checked(intake.opened(records(name)), READERS["conversations"])


def _order(event: Located | Finding) -> float:
    """Where an event stands in its file: notes on the whole file first, errors of the whole file last."""
    if event.row is None:
        return 0 if isinstance(event, Finding) and event.severity == "note" else inf
    return event.row


def _recognise(name: str, head: list[RowRecord]) -> Reader | Finding:
    """The format most of the first rows have; of equals, the one that stands first in :data:`READERS`."""
    votes = Counter(next((reader.name for reader in _ALL if reader.matches(record.value)), "") for record in head)
    votes.pop("", None)
    if votes:
        most = max(votes.values())
        reader = next(reader for reader in _ALL if votes[reader.name] == most)
        if reader.name != "conversations":
            return reader
        found = "conversations, not pairs"
        mend = "make pairs of them with `coala data alternate`, or say --format conversations"
        return Finding(name, None, "", found, "a chosen and a rejected reply per row", mend)
    if not head:
        return Finding(name, None, "", "no rows", "at least one", "check the file")
    keys = list(dict.fromkeys(str(key) for record in head for key in record.value))
    sides = [
        side
        for side, names in (("chosen", CHOSEN), ("rejected", REJECTED))
        if {k.strip().lower() for k in keys} & set(names)
    ]
    if len(sides) == 1:
        missing = "rejected" if sides == ["chosen"] else "chosen"
        found = f"no such field in any row (there are {listed(keys)})"
        return Finding(name, None, missing, found, "both replies", "add it or rename its column")
    mend = "rename the columns, or name the format (`coala data formats` lists them)"
    return Finding(
        name, None, "", f"the columns {listed(keys) or '(none)'}", "prompt, chosen, rejected, or a known format", mend
    )
