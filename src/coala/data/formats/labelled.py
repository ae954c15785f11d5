"""Formats that say which reply is better by a label or by scores."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Set
from functools import partial
from typing import Any

from coala.data.context import in_context
from coala.data.conversations import bridge_session
from coala.data.findings import Fault, NoPreference, describe
from coala.data.formats.reader import RowReading, by_row, only
from coala.data.formats.replies import last_reply
from coala.data.records import RowRecord, names
from coala.data.turns import (
    Row,
    best_against_lower,
    label,
    merged,
    number,
    pair,
    role,
    sound_text,
    text,
    turns,
)
from coala.values import Pair, Turn, user


def two_answers(
    row: Row, prompt: str, first: str, second: str, field: str, meanings: Mapping[str, bool | None]
) -> list[Pair]:
    """``meanings`` of the label: True when the first answer is the better, False the second, None a tie (left out)."""
    asked, replies, first_wins = text(row, prompt), (text(row, first), text(row, second)), label(row, field, meanings)
    if first_wins is None:
        raise NoPreference(field, "left out: a tie")
    chosen, rejected = replies if first_wins else replies[::-1]
    return [pair(row, user(asked), chosen, rejected)]


shp = partial(
    two_answers,
    prompt="history",
    first="human_ref_A",
    second="human_ref_B",
    field="labels",
    meanings={"1": True, "0": False},
)
llmbar = partial(
    two_answers, prompt="input", first="output_1", second="output_2", field="label", meanings={"1": True, "2": False}
)
autoj = partial(
    two_answers,
    prompt="prompt",
    first="response 1",
    second="response 2",
    field="label",
    meanings={"0": True, "1": False, "2": None},
)


def bridge(row: Row) -> list[Pair]:
    """The expert's rewrite ``c_r_`` against the tutor's own reply ``c_r`` after the chat ``c_h``."""
    own, better = (merged(turns(row.get(field), field, skip_empty=True), "\n") for field in ("c_r", "c_r_"))
    prompt = merged(turns(row.get("c_h"), "c_h", skip_empty=True), "\n")
    return [pair(row, prompt, last_reply(better, "c_r_", 0), last_reply(own, "c_r", 0), bridge_session(row))]


# --- scored replies ----------------------------------------------------------------------------------------------


BRIDGE_LEFT = names("c_revision e z_what z_why")  # how and why the expert rewrote the reply
# Critiques by another model, the principle a reply was asked to follow, and reference answers.
ULTRAFEEDBACK_LEFT = names(
    "correct_answers incorrect_answers completions[].annotations completions[].critique completions[].principle "
    "completions[].custom_system_prompt completions[].model"
)


def ultrafeedback_columns(row: Row) -> Set[str]:
    return {"instruction" if "instruction" in row else "prompt", "completions"}


def ultrafeedback(row: Row) -> list[Pair]:
    """``completions: [{response, overall_score, ...}]``: the best against every strictly lower one.

    Where a completion has a ``fine-grained_score`` it counts instead: some ``overall_score`` of UltraFeedback read 10
    for replies its own critique calls a 1.
    """
    field = "instruction" if "instruction" in row else "prompt"
    prompt, completions = user(text(row, field)), row.get("completions")
    if not isinstance(completions, list) or not completions:
        raise Fault("completions", describe(completions), "a list of {response, overall_score}", "fill it in")
    replies = []
    for k, one in enumerate(completions):
        place = f"completions[{k}]"
        if not isinstance(one, Mapping):
            raise Fault(place, describe(one), "an object {response, overall_score}", "write it so")
        scored = next(
            (n for n in ("fine-grained_score", "overall_score", "score") if one.get(n) is not None), "overall_score"
        )
        said = sound_text(one.get("response"), f"{place}.response")
        replies.append(((number(one.get(scored), f"{place}.{scored}"),), said))
    return best_against_lower(row, prompt, replies)


_HELPSTEER_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")
_HELPSTEER_SCORES = ("helpfulness", "correctness", "coherence")
HELPSTEER_COLUMNS = only("prompt", "response", *_HELPSTEER_SCORES)


def _helpsteer_prompt(said: str) -> list[Turn]:
    """HelpSteer2 writes earlier turns into the prompt behind ``<extra_id_1>User`` and ``<extra_id_1>Assistant``."""
    first, *rest = _HELPSTEER_TURN.split(said)
    made = [("user", first), *((role(who, "prompt"), words) for who, words in zip(rest[::2], rest[1::2], strict=True))]
    return [Turn(who, sound_text(words, "prompt")) for who, words in made if words]


def read_helpsteer(records: Iterable[RowRecord]) -> RowReading:
    """Rows ``prompt, response, helpfulness, ...`` that share a prompt: the most helpful against each less helpful.

    Correctness, then coherence, break ties of helpfulness. A pair stands at the first row of its prompt.
    """
    asked: dict[tuple[str, tuple[Turn, ...]], list[tuple[RowRecord, tuple[float, ...], str]]] = {}
    for record in records:
        row = record.value
        try:
            given = [name for name in _HELPSTEER_SCORES if name == "helpfulness" or row.get(name) is not None]
            scores = tuple(number(row.get(name), name) for name in given)
            # Rows of one prompt and different surroundings answer different things.
            key = (text(row, "prompt"), tuple(in_context(row, user("?"), HELPSTEER_COLUMNS(row))))
            asked.setdefault(key, []).append((record, scores, text(row, "response")))
        except Fault as fault:
            yield fault.at(record.file, record.row)
    for (prompt, _), replies in asked.items():
        first = replies[0][0]
        scored = [(scores, said) for _, scores, said in replies]

        def make(row: Row, prompt: str = prompt, scored: list[Any] = scored) -> list[Pair]:
            return best_against_lower(row, _helpsteer_prompt(prompt), scored)

        yield from by_row(make, HELPSTEER_COLUMNS)([first])
