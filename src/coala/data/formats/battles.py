"""Two replies under neutral names and a verdict (arena battles), replies with ranks, and a reply to a conversation."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Set
from typing import Any

from coala.data.findings import Fault, NoPreference, describe
from coala.data.formats.replies import PROMPTS, alias, preference
from coala.data.turns import (
    Row,
    best_against_lower,
    is_messages,
    is_transcript,
    number,
    sound_text,
    text,
    transcript,
    turns,
)
from coala.data.unread import is_empty
from coala.values import Pair, user

_SIDE = re.compile(
    r"(conversation|response|answer|output|completion|reply|text|generation|candidate|assistant|model_output)s?"
    r"[ _-]?(a|b|[012]|left|right)",
    re.IGNORECASE,
)
_SUFFIXES = (("a", "b"), ("1", "2"), ("0", "1"), ("left", "right"))
VERDICTS = (
    *("winner", "preference", "preferred", "label", "choice", "vote", "verdict", "better", "human_preference"),
    *("better_response_id", "winner_id", "better_response", "preferred_response", "chosen"),
)
_TIES = frozenset(
    ("tie", "both", "both_bad", "bothbad", "both bad", "neither", "draw", "equal", "same", "none", "a=b", "b=a")
)


def sides(row: Row) -> tuple[str, str, tuple[str, str]] | None:
    """The columns of the two replies and how their names end."""
    found = {}
    for key in row:
        if isinstance(key, str) and (match := _SIDE.fullmatch(key.strip())):
            found[(match[1].lower(), match[2].lower())] = key
    for ends in _SUFFIXES:
        for stem, end in found:
            if end == ends[0] and (stem, ends[1]) in found:
                return found[(stem, end)], found[(stem, ends[1])], ends
    return None


def verdict(row: Row) -> str | None:
    """The column that says who won; ``winner_model_a`` stands for three of them."""
    known = {str(key).strip().lower(): key for key in row}
    return next((known[name] for name in (*VERDICTS, "winner_model_a", "winner_a") if name in known), None)


def is_battle(row: Row) -> bool:
    return sides(row) is not None and verdict(row) is not None and not {"chosen", "rejected"} <= set(row)


def battle_columns(row: Row) -> Set[str]:
    both, won = sides(row), verdict(row)
    asked = alias(row, PROMPTS)
    return {one for one in (*(both[:2] if both else ()), won, asked, "loser", *_one_hot(row)) if one}


def _one_hot(row: Row) -> dict[str, Any]:
    return {key: row[key] for key in row if re.fullmatch(r"winner_(model_)?(a|b|tie)", str(key))}


def battle(row: Row) -> list[Pair]:
    """The better of two replies or conversations; ties are left out.

    The verdict names a side (``model_a``, ``B``, ``A>B``), a column, a model, or a number where the names end in one.
    """
    both, field = sides(row), verdict(row)
    if both is None or field is None:
        raise Fault("winner", "no two replies with a verdict", "e.g. response_a, response_b, winner", "add what lacks")
    first_wins = _first_wins(row, field, both)
    if first_wins is None:
        raise NoPreference(field, "left out: a tie")
    said = [_lone(row, one) for one in both[:2]]
    chosen, rejected = said if first_wins else said[::-1]
    asked = alias({key: value for key, value in row.items() if key not in both[:2]}, PROMPTS)
    rest = {key: value for key, value in row.items() if key not in battle_columns(row) and key not in PROMPTS}
    prompt = {} if asked is None else {"prompt": _lone(row, asked)}
    return preference({**rest, **prompt, "chosen": chosen, "rejected": rejected})


def _first_wins(row: Row, field: str, both: tuple[str, str, tuple[str, str]]) -> bool | None:
    hot = _one_hot(row)
    if len(hot) >= 2:
        ahead = [key for key, value in hot.items() if str(value).strip().lower() in ("1", "1.0", "true")]
        if len(ahead) != 1:
            raise Fault(
                field, f"{len(ahead)} winners", "one of the columns set", "correct the verdict or delete the row"
            )
        return None if ahead[0].endswith("tie") else ahead[0].endswith("a")
    value, ends = row[field], both[2]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    said = str(value).strip().lower() if isinstance(value, str | int) and not isinstance(value, bool) else ""
    plain = re.sub(r"[>\s]*>[>\s]*", ">", said)
    if said in _TIES or said.startswith("tie"):
        return None
    won = []
    for column, end, other in ((both[0], *ends), (both[1], *ends[::-1])):
        names = {column.strip().lower(), end, f"{end}>{other}", f"{other}<{end}"}
        names |= {
            f"{stem}{mark}{end}" for stem in ("model", "response", "assistant", "answer") for mark in ("_", " ", "")
        }
        names |= {str(row.get(f"model_{end}", "")).strip().lower()} - {""}
        if end == "a":
            names.add("left")
        won.append(bool({said, plain} & names) or (end == "b" and said == "right"))
    if won[0] == won[1]:
        expected = f"{both[0]}, {both[1]} or a tie"
        raise Fault(field, describe(row[field]), expected, "name the better reply's column, or delete the row")
    return won[0]


def _lone(row: Row, field: str) -> Any:
    """A column's value; a JSON list of one text, as some tables of battles have, as that text."""
    value = row[field]
    if isinstance(value, str) and value.startswith("[") and value.rstrip().endswith("]"):
        try:
            held = json.loads(value)
        except (ValueError, RecursionError):
            return value
        value = held if isinstance(held, list) and held and all(isinstance(one, str | None) for one in held) else value
    if isinstance(value, list) and value and all(one is None or isinstance(one, str) for one in value):
        if len(value) > 1:
            found = f"{len(value)} rounds, between which the two conversations part"
            raise Fault(field, found, "one round", "leave the row out, or write its rounds as messages")
        return sound_text(value[0], f"{field}[0]")
    return value


# --- ranks and alternatives --------------------------------------------------------------------------------------


def is_ranked(row: Row) -> bool:
    """``prompt, answers: [{answer, rank}]``, as Nectar has them."""
    held = row.get("answers")
    return (
        "prompt" in row
        and isinstance(held, list)
        and bool(held)
        and all(isinstance(one, Mapping) and "answer" in one and "rank" in one for one in held)
    )


def ranked(row: Row) -> list[Pair]:
    """The answer of the lowest rank against every one that ranks behind it."""
    asked = row.get("prompt")
    prompt = transcript(asked, "prompt") if is_transcript(asked) else list(user(text(row, "prompt")))
    replies = []
    for k, one in enumerate(row.get("answers") or []):
        place = f"answers[{k}]"
        if not isinstance(one, Mapping):
            raise Fault(place, describe(one), "an object {answer, rank}", "write it so")
        said = sound_text(one.get("answer"), f"{place}.answer")
        replies.append(((-number(one.get("rank"), f"{place}.rank"),), said))
    return best_against_lower(row, prompt, replies)


_ALTERNATIVES = ("rejected_response", "rejected_messages")


def is_alternative(row: Row) -> bool:
    """``messages, rejected_response``, as ms-swift has them."""
    return (
        is_messages(row.get("messages"))
        and "chosen" not in row
        and any(not is_empty(row.get(one)) for one in _ALTERNATIVES)
    )


def alternative(row: Row) -> list[Pair]:
    """The reply that ends ``messages`` against ``rejected_response``, or that of ``rejected_messages``."""
    said = turns(row.get("messages"), "messages")
    if said[-1].role != "assistant" or len(said) < 2:
        found = f"a {said[-1].role} turn at the end" if len(said) > 1 else "a single turn"
        raise Fault("messages", found, "a prompt and the chosen reply", "end it with the chosen reply")
    field = next((one for one in _ALTERNATIVES if not is_empty(row.get(one))), "rejected_response")
    other = row.get(field)
    if isinstance(other, list) and not is_messages(other):
        if len(other) != 1:
            raise Fault(field, describe(other), "one text", "write a row for each of them")
        other = other[0]
    rest = {key: value for key, value in row.items() if key not in ("messages", *_ALTERNATIVES)}
    if isinstance(other, list) and len(other) > 1:
        return preference({**rest, "chosen": row["messages"], "rejected": other})
    reply = turns(other, field)[-1].text if isinstance(other, list) else sound_text(other, field)
    prompt = row["messages"][:-1]
    return preference({**rest, "prompt": prompt, "chosen": said[-1].text, "rejected": reply})
