"""One row of TRL's preference format and the pair it stands for, in memory; files are read by ``read_pairs``.

Knows nothing of TRL itself: rows are plain mappings, as ``datasets.Dataset`` gives and takes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from coala.data.findings import DataError, Finding
from coala.data.formats import READERS, Located
from coala.data.formats.intake import Intake
from coala.data.formats.replies import is_hh
from coala.data.records import RowRecord
from coala.data.unread import is_empty
from coala.values import CoalaError, Pair, Turn

_PLACE = "a row of TRL's format"
_FOR_TEMPLATES = ("tools", "chat_template_kwargs")  # TRL hands both to the chat template


def pair_from_trl(row: Mapping[str, Any]) -> Pair:
    """The pair of a row, read as the same row of a file would be; DataError with the field, what was found and the fix.

    The prompt is explicit or what both replies begin with, texts or messages. ``group`` and ``rater`` are read where
    the row has them; other columns are left, as TRL leaves them, but not those that would change what is rendered.
    """
    for name in _FOR_TEMPLATES:
        if isinstance(row, Mapping) and not is_empty(row.get(name)):
            mend = "write what it says into the prompt, and drop the column"
            raise DataError([Finding(_PLACE, None, name, "a column that only TRL reads", "text and messages", mend)])
    faults: list[Finding] = []
    intake = Intake(_PLACE, faults)
    rows = list(intake.opened([RowRecord(_PLACE, 1, row)]))
    reader = READERS["hh-rlhf" if rows and is_hh(rows[0].value) else "preference"]
    for event in reader.pairs(intake.checked(rows, reader)):
        if isinstance(event, Located):
            return event.pair
        faults.append(event)
    raise DataError([replace(fault, row=None) for fault in faults])


def pair_to_trl(pair: Pair, *, conversational: bool = True, implicit_prompt: bool = False) -> dict[str, Any]:
    """The row of a pair: ``prompt``, ``chosen``, ``rejected``, its ``group``, and its ``rater`` if it names one.

    Raises CoalaError where the row would not read back as this very pair.
    """
    if conversational:
        prompt: Any = [_message(turn) for turn in pair.prompt]
        chosen, rejected = ([_message(Turn("assistant", said))] for said in (pair.chosen, pair.rejected))
    elif [turn.role for turn in pair.prompt] == ["user"]:
        prompt, chosen, rejected = pair.prompt[0].text, pair.chosen, pair.rejected  # type: ignore[assignment]
    else:
        found = f"a conversation of {len(pair.prompt)} turns" if len(pair.prompt) != 1 else f"a {pair.prompt[0].role}'s"
        raise CoalaError(f"Found {found} as the prompt; expected one user turn, as texts hold no others. {_MESSAGES}")
    row = {"chosen": prompt + chosen, "rejected": prompt + rejected} if implicit_prompt else {}
    row = row or {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    row |= {"group": pair.group} | ({"rater": pair.rater} if pair.rater else {})
    if pair_from_trl(row) != pair:
        mend = "Fix: implicit_prompt=False." if implicit_prompt else _MESSAGES if not conversational else _PLAIN
        raise CoalaError(f"Found a pair that its row would not give back, expected one that it does. {mend}")
    return row


_MESSAGES = "Fix: conversational=True."
_PLAIN = "Fix: give the pair a group that is a name, and turns that are not empty."


def _message(turn: Turn) -> dict[str, str]:
    return {"role": turn.role, "content": turn.text}
