"""Formats that name a chosen and a rejected reply: TRL's, transcripts, Alpaca, ShareGPT, RewardBench, other columns."""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import Any

from coala.data.findings import Fault, Finding, describe
from coala.data.formats.reader import RowReading, by_row
from coala.data.records import RowRecord
from coala.data.turns import (
    Row,
    is_transcript,
    optional_text,
    pair,
    same_reply,
    shared_text,
    shared_turns,
    sound_text,
    text,
    transcript,
    turns,
)
from coala.data.unread import alike
from coala.values import Pair, Turn, user

PROMPTS = ("prompt", "question", "instruction", "query", "input", "context", "history", "post", "problem")
CHOSEN = (
    "chosen",
    "better",
    "preferred",
    "accepted",
    "winner",
    "good",
    "chosen_response",
    "response_chosen",
    "response",
)
REJECTED = ("rejected", "worse", "dispreferred", "declined", "loser", "bad", "rejected_response", "response_rejected")


PREFERENCE = frozenset(("prompt", "chosen", "rejected"))


def last_reply(said: list[Turn], field: str, shared: int) -> str:
    """The one assistant turn after the ``shared`` ones."""
    rest = said[shared:]
    if len(rest) != 1 or rest[0].role != "assistant":
        found = (
            f"{len(rest)} turns after those both sides share" if len(rest) != 1 else f"a {rest[0].role} turn at the end"
        )
        raise Fault(field, found, "one assistant turn", "end both sides with one reply to the same prompt")
    return rest[0].text


def preference(row: Row) -> list[Pair]:
    """TRL's preference format: strings or messages, the prompt given or what chosen and rejected share.

    Messages on both sides may repeat the prompt (as UltraFeedback's do); then its turns are taken from there, and
    ``prompt`` must be among them. Texts stay as written, so prompt + reply is the text that was given.
    """
    for field in ("chosen", "rejected"):
        if field not in row:
            text(row, field)
    given = row.get("prompt")
    if not isinstance(row["chosen"], list) and not isinstance(row["rejected"], list):
        chosen, rejected = text(row, "chosen"), text(row, "rejected")
        if "prompt" not in row:
            if same_reply(chosen, rejected):
                raise alike(row)
            cut = shared_text(chosen, rejected)
            if not chosen[:cut].strip():
                raise Fault(
                    "prompt",
                    "no prompt, and no beginning that chosen and rejected share",
                    "a prompt",
                    "add a prompt column",
                )
            return [pair(row, user(chosen[:cut]), chosen[cut:], rejected[cut:])]
        prompt = turns(given, "prompt") if isinstance(given, list) else list(user(text(row, "prompt")))
        return [pair(row, prompt, chosen, rejected)]
    better, worse = (turns(row[field], field) for field in ("chosen", "rejected"))
    # A reply standing alone answers the prompt that was given; longer ones repeat it.
    if "prompt" in row and len(better) == len(worse) == 1:
        prompt = turns(given, "prompt") if isinstance(given, list) else list(user(text(row, "prompt")))
        return [pair(row, prompt, last_reply(better, "chosen", 0), last_reply(worse, "rejected", 0))]
    if better == worse:
        raise alike(row)
    shared = shared_turns(better, worse)
    if not shared:
        found = "no first turn that chosen and rejected share"
        raise Fault("prompt", found, "the same prompt on both sides", "add a prompt column")
    prompt = better[:shared]
    if given is not None:
        named = turns(given, "prompt") if isinstance(given, list) else list(user(text(row, "prompt")))
        if not {turn.text.strip() for turn in named} <= {turn.text.strip() for turn in prompt}:
            found = "a prompt that is not among the turns that chosen and rejected begin with"
            raise Fault("prompt", found, "one prompt", "drop the prompt column, or the turns that contradict it")
    return [pair(row, prompt, last_reply(better, "chosen", shared), last_reply(worse, "rejected", shared))]


read_preference = by_row(preference, lambda row: PREFERENCE)


def alias(row: Row, names: tuple[str, ...]) -> str | None:
    known = {str(key).strip().lower(): key for key in reversed(list(row))}
    return next((known[name] for name in names if name in known), None)


def is_columns(row: Row) -> bool:
    found = [alias(row, names) for names in (PROMPTS, CHOSEN, REJECTED)]
    return None not in found and found != ["prompt", "chosen", "rejected"]


def mapping(row: Row) -> dict[str, str | None]:
    """The row's own names of prompt, chosen and rejected."""
    return {"prompt": alias(row, PROMPTS), "chosen": alias(row, CHOSEN), "rejected": alias(row, REJECTED)}


def mapped(row: Row) -> Set[str]:
    return {one for one in mapping(row).values() if one is not None}


def read_columns(records: Iterable[RowRecord]) -> RowReading:
    """Columns under other names, as ``question, better, worse``; the mapping comes out as a note."""
    named = False

    def make(row: Row) -> list[Pair]:
        new = mapping(row)
        for name, old in new.items():
            if old is None:
                text(row, name)
        plain = {name: row[old] for name, old in new.items() if old is not None}
        return preference({**{key: value for key, value in row.items() if key not in new.values()}, **plain})

    for record in records:
        new = mapping(record.value)
        if not named and None not in new.values():
            named = True
            said = ", ".join(f"{old} as {name}" for name, old in new.items() if old != name)
            yield Finding(record.file, record.row, "", f"read {said}", "", "", severity="note")
        yield from by_row(make, mapped)([record])


def hh_rlhf(row: Row) -> list[Pair]:
    r"""Transcripts ``\n\nHuman: ...\n\nAssistant: ...`` in chosen and rejected, or as the prompt of two replies."""
    if is_transcript(row.get("chosen")) or is_transcript(row.get("rejected")):
        better, worse = transcript(row.get("chosen"), "chosen"), transcript(row.get("rejected"), "rejected")
        if better == worse:
            raise alike(row)
        # An empty last reply was left out by transcript(): say so rather than call the turns different.
        for field, said in (("chosen", better), ("rejected", worse)):
            if said[-1].role != "assistant":
                raise Fault(field, "an empty last Assistant turn", "a reply", "fill it in or delete the row")
        shared = shared_turns(better, worse)
        return [pair(row, better[:shared], last_reply(better, "chosen", shared), last_reply(worse, "rejected", shared))]
    prompt = transcript(row.get("prompt"), "prompt")
    chosen, rejected = ("chosen_response", "rejected_response") if "chosen_response" in row else ("chosen", "rejected")
    return [pair(row, prompt, text(row, chosen).strip(), text(row, rejected).strip())]


def is_hh(row: Row) -> bool:
    if is_transcript(row.get("chosen")) and is_transcript(row.get("rejected")):
        return True
    replies = strings(row, "chosen_response", "rejected_response") or strings(row, "chosen", "rejected")
    return is_transcript(row.get("prompt")) and replies


def alpaca_columns(row: Row) -> Set[str]:
    return {"instruction", "input", *(("output",) if "output" in row else ("chosen", "rejected"))}


def alpaca(row: Row) -> list[Pair]:
    """``instruction, input, output: [good, bad]`` (or chosen, rejected)."""
    asked, more = text(row, "instruction"), optional_text(row, "input")
    prompt = user(f"{asked}\n\n{more}" if more else asked)
    if "output" not in row:
        return [pair(row, prompt, text(row, "chosen"), text(row, "rejected"))]
    replies = row["output"]
    if not isinstance(replies, list) or len(replies) != 2:
        raise Fault("output", describe(replies), "a list [good, bad]", "write the preferred reply, then the other")
    return [pair(row, prompt, sound_text(replies[0], "output[0]"), sound_text(replies[1], "output[1]"))]


def hh_columns(row: Row) -> Set[str]:
    if is_transcript(row.get("chosen")) or is_transcript(row.get("rejected")):
        return {"chosen", "rejected"}
    return {
        "prompt",
        *(("chosen_response", "rejected_response") if "chosen_response" in row else ("chosen", "rejected")),
    }


def conversation_field(row: Row) -> str:
    return "conversations" if "conversations" in row else "messages"


def sharegpt(row: Row) -> list[Pair]:
    """``conversations`` (or ``messages``) with ``chosen`` and ``rejected`` as a message, a list of one, or text."""
    field = conversation_field(row)
    prompt = turns(row.get(field), field)

    def reply(field: str) -> str:
        value = row.get(field)
        if isinstance(value, str) or value is None:
            return text(row, field)
        return last_reply(turns(value if isinstance(value, list) else [value], field), field, 0)

    chosen, rejected = reply("chosen"), reply("rejected")
    if len(prompt) > 1 and prompt[-1] == Turn("assistant", chosen):  # the whole conversation, its last reply included
        prompt.pop()
    return [pair(row, prompt, chosen, rejected)]


def rewardbench(row: Row) -> list[Pair]:
    """RewardBench v2: lists of chosen and rejected texts; every chosen one against every rejected one."""
    prompt = turns(row["prompt"], "prompt") if isinstance(row.get("prompt"), list) else list(user(text(row, "prompt")))
    sides = []
    for field in ("chosen", "rejected"):
        value = row.get(field)
        if isinstance(value, str) or value is None:
            value = [text(row, field)]
        if not isinstance(value, list) or not value:
            raise Fault(field, describe(value), "a list of texts", "fill it in or delete the row")
        sides.append([sound_text(one, f"{field}[{k}]") for k, one in enumerate(value)])
    return [pair(row, prompt, good, bad) for good in sides[0] for bad in sides[1]]


def strings(row: Row, *names: str) -> bool:
    return all(isinstance(row.get(name), str) for name in names)


def is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def is_preference(row: Row) -> bool:
    return "chosen" in row and "rejected" in row and ("prompt" in row or alias(row, PROMPTS) is None)
