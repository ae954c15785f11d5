"""The formats preference data come in: how each is recognised, and how its rows become pairs.

A format is one :class:`Reader` in :data:`READERS`; adding one takes a function from a row to pairs and a line there.
Knows nothing of files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import Any

from coala.data.conversations import alternate, conversation, is_conversation
from coala.data.files import Record
from coala.data.findings import Fault, Finding, NoPreference, describe, listed
from coala.data.turns import (
    Row,
    best_against_lower,
    digest,
    group_of,
    is_messages,
    is_transcript,
    label,
    merged,
    number,
    optional_text,
    pair,
    role,
    same_reply,
    shared_text,
    shared_turns,
    sound_text,
    text,
    transcript,
    turns,
)
from coala.values import Pair, Role, Turn, user


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


def _strings(row: Row, *names: str) -> bool:
    return all(isinstance(row.get(name), str) for name in names)


# --- prompt, chosen, rejected ------------------------------------------------------------------------------------

_PROMPTS = ("prompt", "question", "instruction", "query", "input", "context", "history", "post", "problem")
_CHOSEN = ("chosen", "better", "preferred", "accepted", "winner", "good", "chosen_response", "response_chosen")
_REJECTED = ("rejected", "worse", "dispreferred", "declined", "loser", "bad", "rejected_response", "response_rejected")
_SCORES = (("chosen_score", "rejected_score"), ("score_chosen", "score_rejected"))


def _last_reply(said: list[Turn], field: str, shared: int) -> str:
    """The one assistant turn after the ``shared`` ones."""
    rest = said[shared:]
    if len(rest) != 1 or rest[0].role != "assistant":
        found = f"{len(rest)} turns after those both sides share" if len(rest) != 1 else f"a {rest[0].role} turn at the end"
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
    if isinstance(row["chosen"], str) and isinstance(row["rejected"], str):
        chosen, rejected = text(row, "chosen"), text(row, "rejected")
        if "prompt" not in row:
            if same_reply(chosen, rejected):
                raise Fault("rejected", "the same text as chosen", "two different replies", "delete the row")
            cut = shared_text(chosen, rejected)
            if not chosen[:cut].strip():
                raise Fault("prompt", "none, and chosen and rejected share no beginning", "a prompt", "add a prompt column")
            return [pair(row, user(chosen[:cut]), chosen[cut:], rejected[cut:])]
        prompt = turns(given, "prompt") if isinstance(given, list) else list(user(text(row, "prompt")))
        return [pair(row, prompt, chosen, rejected)]
    better, worse = (turns(row[field], field) for field in ("chosen", "rejected"))
    # A reply standing alone answers the prompt that was given; longer ones repeat it.
    if "prompt" in row and len(better) == len(worse) == 1:
        prompt = turns(given, "prompt") if isinstance(given, list) else list(user(text(row, "prompt")))
        return [pair(row, prompt, _last_reply(better, "chosen", 0), _last_reply(worse, "rejected", 0))]
    if better == worse:
        raise Fault("rejected", "the same text as chosen", "two different replies", "delete the row")
    shared = shared_turns(better, worse)
    if not shared:
        found = "chosen and rejected share no first turn"
        raise Fault("prompt", found, "the same prompt on both sides", "add a prompt column")
    prompt = better[:shared]
    if given is not None:
        named = turns(given, "prompt") if isinstance(given, list) else list(user(text(row, "prompt")))
        if not {turn.text.strip() for turn in named} <= {turn.text.strip() for turn in prompt}:
            found = "not among the turns that chosen and rejected begin with"
            raise Fault("prompt", found, "one prompt", "drop the prompt column, or the turns that contradict it")
    return [pair(row, prompt, _last_reply(better, "chosen", shared), _last_reply(worse, "rejected", shared))]


def _read_preference(records: Iterable[Record]) -> Reading:
    rows = by_row(preference)
    for record in records:
        yield from rows([record])
        yield from _scores(record)


def _scores(record: Record) -> Iterator[Finding]:
    """Scores that contradict the columns: the strongest sign of swapped labels a file can give."""
    row = record.value
    about = row.get("metadata")
    for better, worse in _SCORES:
        for place in (row, about if isinstance(about, Mapping) else {}):
            try:
                difference = number(place.get(better), better) - number(place.get(worse), worse)
            except Fault:
                continue
            if difference < 0:
                found, mend = f"{worse} is the higher", "are the columns swapped?"
            elif difference == 0:
                found, mend = "chosen and rejected score the same", "such pairs carry no preference: leave them out?"
            else:
                continue
            yield Finding(record.file, record.row, better, found, f"{better} above {worse}", mend, severity="warning")
            return


def _alias(row: Row, names: tuple[str, ...]) -> str | None:
    known = {str(key).strip().lower(): key for key in reversed(list(row))}
    return next((known[name] for name in names if name in known), None)


def _is_columns(row: Row) -> bool:
    found = [_alias(row, names) for names in (_PROMPTS, _CHOSEN, _REJECTED)]
    return None not in found and found != ["prompt", "chosen", "rejected"]


def _read_columns(records: Iterable[Record]) -> Reading:
    """Columns under other names, as ``question, better, worse``; the mapping comes out as a note. ``system`` is kept."""
    named = False
    for record in records:
        row = record.value
        new = {"prompt": _alias(row, _PROMPTS), "chosen": _alias(row, _CHOSEN), "rejected": _alias(row, _REJECTED)}
        if not named and None not in new.values():
            named = True
            said = ", ".join(f"{old} as {name}" for name, old in new.items() if old != name)
            yield Finding(record.file, record.row, "", f"read {said}", "", "", severity="note")

        def make(row: Row, new: dict[str, str | None] = new) -> list[Pair]:
            for name, old in new.items():
                if old is None:
                    text(row, name)
            plain = {name: row[old] for name, old in new.items() if old is not None}
            rest = {key: value for key, value in row.items() if key not in new.values()}
            system = optional_text(row, "system")
            made = preference({**rest, **plain})
            if not system or made[0].prompt[0].role == "system":
                return made
            return [replace(one, prompt=(Turn("system", system), *one.prompt)) for one in made]

        yield from by_row(make)([record])


def hh_rlhf(row: Row) -> list[Pair]:
    r"""Transcripts ``"\n\nHuman: ...\n\nAssistant: ..."`` in chosen and rejected, or a transcript prompt and replies."""
    if is_transcript(row.get("chosen")) or is_transcript(row.get("rejected")):
        better, worse = transcript(row.get("chosen"), "chosen"), transcript(row.get("rejected"), "rejected")
        if better == worse:
            raise Fault("rejected", "the same text as chosen", "two different replies", "delete the row")
        # An empty last reply was left out by transcript(): say so rather than call the turns different.
        for field, said in (("chosen", better), ("rejected", worse)):
            if said[-1].role != "assistant":
                raise Fault(field, "the last Assistant turn is empty", "a reply", "fill it in or delete the row")
        shared = shared_turns(better, worse)
        return [
            pair(row, better[:shared], _last_reply(better, "chosen", shared), _last_reply(worse, "rejected", shared))
        ]
    prompt = transcript(row.get("prompt"), "prompt")
    chosen, rejected = ("chosen_response", "rejected_response") if "chosen_response" in row else ("chosen", "rejected")
    return [pair(row, prompt, text(row, chosen).strip(), text(row, rejected).strip())]


def _is_hh(row: Row) -> bool:
    if is_transcript(row.get("chosen")) and is_transcript(row.get("rejected")):
        return True
    replies = _strings(row, "chosen_response", "rejected_response") or _strings(row, "chosen", "rejected")
    return is_transcript(row.get("prompt")) and replies


def alpaca(row: Row) -> list[Pair]:
    """``instruction``, ``input`` and ``output: [good, bad]`` (or chosen, rejected); ``system``, ``history`` as LLaMA-Factory."""
    asked, more = text(row, "instruction"), optional_text(row, "input")
    prompt = [Turn("system", said)] if (said := optional_text(row, "system")) else []
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(one, list) and len(one) == 2 for one in history):
        raise Fault("history", describe(history), "a list of [question, answer]", "write it so, or drop the field")
    for k, (question, answer) in enumerate(history):
        prompt.append(Turn("user", sound_text(question, f"history[{k}][0]")))
        prompt.append(Turn("assistant", sound_text(answer, f"history[{k}][1]")))
    prompt.append(Turn("user", f"{asked}\n\n{more}" if more else asked))
    if "output" not in row:
        return [pair(row, prompt, text(row, "chosen"), text(row, "rejected"))]
    replies = row["output"]
    if not isinstance(replies, list) or len(replies) != 2:
        raise Fault("output", describe(replies), "a list [good, bad]", "write the preferred reply, then the other")
    return [pair(row, prompt, sound_text(replies[0], "output[0]"), sound_text(replies[1], "output[1]"))]


def sharegpt(row: Row) -> list[Pair]:
    """``conversations: [{from, value}]`` with ``chosen`` and ``rejected`` as {from, value}, a list of one, or text."""
    prompt = turns(row.get("conversations"), "conversations")
    if system := optional_text(row, "system"):
        prompt.insert(0, Turn("system", system))

    def reply(field: str) -> str:
        value = row.get(field)
        if isinstance(value, str) or value is None:
            return text(row, field)
        return _last_reply(turns(value if isinstance(value, list) else [value], field), field, 0)

    return [pair(row, prompt, reply("chosen"), reply("rejected"))]


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


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


# --- two answers and a label -------------------------------------------------------------------------------------


def two_answers(row: Row, prompt: str, first: str, second: str, field: str, meanings: Mapping[str, bool | None]) -> list[Pair]:
    """``meanings`` of the label: True when the first answer is the better, False the second, None a tie (left out)."""
    asked, replies, first_wins = text(row, prompt), (text(row, first), text(row, second)), label(row, field, meanings)
    if first_wins is None:
        raise NoPreference(field, "a tie", "a preference", "it was left out")
    chosen, rejected = replies if first_wins else replies[::-1]
    return [pair(row, user(asked), chosen, rejected)]


_SHP = partial(
    two_answers, prompt="history", first="human_ref_A", second="human_ref_B", field="labels", meanings={"1": True, "0": False}
)
_LLMBAR = partial(
    two_answers, prompt="input", first="output_1", second="output_2", field="label", meanings={"1": True, "2": False}
)
_AUTOJ = partial(
    two_answers,
    prompt="prompt",
    first="response 1",
    second="response 2",
    field="label",
    meanings={"0": True, "1": False, "2": None},
)


def bridge(row: Row) -> list[Pair]:
    """The expert's rewrite ``c_r_`` against the tutor's own reply ``c_r`` after the chat ``c_h``."""
    own, better = (merged(turns(row.get(field), field), "\n") for field in ("c_r", "c_r_"))
    return [
        pair(row, merged(turns(row.get("c_h"), "c_h"), "\n"), _last_reply(better, "c_r_", 0), _last_reply(own, "c_r", 0))
    ]


# --- scored replies ----------------------------------------------------------------------------------------------


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
        scored = next((n for n in ("fine-grained_score", "overall_score", "score") if one.get(n) is not None), "overall_score")
        said = sound_text(one.get("response"), f"{place}.response")
        replies.append(((number(one.get(scored), f"{place}.{scored}"),), said))
    return best_against_lower(row, prompt, replies)


_HELPSTEER_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")
_HELPSTEER_SCORES = ("helpfulness", "correctness", "coherence")


def _helpsteer_prompt(said: str) -> list[Turn]:
    """HelpSteer2 writes earlier turns into the prompt behind ``<extra_id_1>User`` and ``<extra_id_1>Assistant``."""
    first, *rest = _HELPSTEER_TURN.split(said)
    made = [("user", first), *((role(who, "prompt"), words) for who, words in zip(rest[::2], rest[1::2], strict=True))]
    return [Turn(who, sound_text(words, "prompt")) for who, words in made if words]  # type: ignore[arg-type]


def _read_helpsteer(records: Iterable[Record]) -> Reading:
    """Rows ``prompt, response, helpfulness, ...`` that share a prompt: the most helpful against each less helpful.

    Correctness, then coherence, break ties of helpfulness. A pair stands at the first row of its prompt.
    """
    asked: dict[str, list[tuple[Record, tuple[float, ...], str]]] = {}
    for record in records:
        row = record.value
        try:
            scores = (number(row.get("helpfulness"), "helpfulness"),) + tuple(
                number(row[name], name) for name in _HELPSTEER_SCORES[1:] if row.get(name) is not None
            )
            asked.setdefault(text(row, "prompt"), []).append((record, scores, text(row, "response")))
        except Fault as fault:
            yield fault.at(record.file, record.row)
    for prompt, replies in asked.items():
        first = replies[0][0]
        scored = [(scores, said) for _, scores, said in replies]

        def make(row: Row, prompt: str = prompt, scored: list[Any] = scored) -> list[Pair]:
            return best_against_lower(row, _helpsteer_prompt(prompt), scored)

        yield from by_row(make)([first])


# --- reviews with a sentiment ------------------------------------------------------------------------------------

REVIEW_PROMPT = "Write a review of a film you have seen."
_BREAK = re.compile(r"<br\s*/?>")
_SENTIMENT = {"1": True, "pos": True, "positive": True, "0": False, "neg": False, "negative": False}


def _read_imdb(records: Iterable[Record]) -> Reading:
    """Reviews ``text, label, movie``: a positive one chosen, a negative one rejected, under one fixed prompt.

    Each review is used at most once. Reviews of one film are paired first, in file order; what a film has left over
    goes to films with the opposite left over, such that every film belongs to one family of films. The family is the
    group, so no film straddles a split. Without ``movie`` the k-th positive review meets the k-th negative one.
    """
    films: dict[str, tuple[list[tuple[Record, str]], list[tuple[Record, str]]]] = {}
    for record in records:
        row = record.value
        try:
            said = sound_text(_BREAK.sub("\n", text(row, "text")), "text")
            positive = label(row, "label", _SENTIMENT)
            film = group_of({"movie": row.get("movie")}, user("?")) if row.get("movie") else ""
        except Fault as fault:
            yield fault.at(record.file, record.row)
            continue
        films.setdefault(film, ([], []))[0 if positive else 1].append((record, said))
    made: list[tuple[tuple[Record, str], tuple[Record, str], str]] = []
    family = _families({film: len(good) - len(bad) for film, (good, bad) in films.items()})
    left: dict[str, tuple[list[tuple[Record, str]], list[tuple[Record, str]]]] = {}
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
        found = f"{unused} reviews found no partner of the other sentiment"
        yield Finding(example[0].file, None, "label", found, "as many of each", "they were left out", severity="warning")


def _families(surplus: Mapping[str, int]) -> dict[str, str]:
    """Films to the name of their family: first fit of the other sign's films into the larger surplus, largest first."""
    family = {film: film for film in surplus}
    order = {film: k for k, film in enumerate(surplus)}
    signs = [sorted((f for f in surplus if s * surplus[f] > 0), key=lambda f: (-abs(surplus[f]), order[f])) for s in (1, -1)]
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


# --- the table ---------------------------------------------------------------------------------------------------


def read_alternating(records: Iterable[Record], speaker: Role = "assistant") -> Reading:
    """Conversations as alternating pairs (see :func:`~coala.data.conversations.alternate`)."""

    def make(row: Row) -> list[Pair]:
        group, said = conversation(row)
        return alternate(said, group, role=speaker)

    yield from by_row(make)(records)


def _is_preference(row: Row) -> bool:
    return "chosen" in row and "rejected" in row and ("prompt" in row or _alias(row, _PROMPTS) is None)


_ALL = (
    Reader(
        "sharegpt",
        "conversations: [{from, value}], chosen: {from, value}, rejected: {from, value}",
        lambda row: is_messages(row.get("conversations")) and "chosen" in row and "rejected" in row,
        by_row(sharegpt),
    ),
    Reader(
        "bridge",
        "c_h: chat, c_r: the tutor's reply, c_r_: an expert's better one",
        lambda row: {"c_h", "c_r", "c_r_"} <= set(row),
        by_row(bridge),
    ),
    Reader(
        "hh-rlhf",
        r"chosen, rejected: transcripts '\n\nHuman: ...\n\nAssistant: ...'; or prompt (a transcript) and two replies",
        _is_hh,
        by_row(hh_rlhf),
    ),
    Reader(
        "rewardbench",
        "prompt, chosen: [texts], rejected: [texts] (version 2; version 1 is `preference`)",
        lambda row: "prompt" in row and (_is_texts(row.get("chosen")) or _is_texts(row.get("rejected"))),
        by_row(rewardbench),
    ),
    Reader(
        "alpaca",
        "instruction, input, output: [good, bad]; or instruction, input, chosen, rejected",
        lambda row: "instruction" in row
        and (isinstance(row.get("output"), list) or ("input" in row and _strings(row, "chosen", "rejected"))),
        by_row(alpaca),
    ),
    Reader(
        "ultrafeedback",
        "instruction, completions: [{response, overall_score}]; the best against each lower one",
        lambda row: isinstance(row.get("completions"), list) and ("instruction" in row or "prompt" in row),
        by_row(ultrafeedback),
    ),
    Reader(
        "helpsteer",
        "prompt, response, helpfulness, ...; the most helpful reply to a prompt against each less helpful one",
        lambda row: {"prompt", "response", "helpfulness"} <= set(row),
        _read_helpsteer,
    ),
    Reader(
        "shp",
        "history, human_ref_A, human_ref_B, labels (1: A is better, 0: B)",
        lambda row: {"history", "human_ref_A", "human_ref_B", "labels"} <= set(row),
        by_row(_SHP),
    ),
    Reader(
        "llmbar",
        "input, output_1, output_2, label (1 or 2: the better one)",
        lambda row: {"input", "output_1", "output_2", "label"} <= set(row),
        by_row(_LLMBAR),
    ),
    Reader(
        "autoj",
        "prompt, response 1, response 2, label (0: the first is better, 1: the second, 2: a tie)",
        lambda row: {"prompt", "response 1", "response 2", "label"} <= set(row),
        by_row(_AUTOJ),
    ),
    Reader(
        "imdb",
        "text, label (1 or pos, 0 or neg), movie; a positive review against a negative one",
        lambda row: {"text", "label"} <= set(row) and not {"chosen", "rejected"} & set(row),
        _read_imdb,
    ),
    Reader(
        "preference",
        "prompt, chosen, rejected: texts or lists of {role, content}; the prompt may be what both begin with",
        _is_preference,
        _read_preference,
    ),
    Reader(
        "columns",
        f"other names: {listed(_PROMPTS, 5)}; {listed(_CHOSEN, 5)}; {listed(_REJECTED, 5)}",
        _is_columns,
        _read_columns,
    ),
    Reader(
        "conversations",
        "messages, conversations, turns, ...: each reply against the same speaker's next one; only when asked for",
        is_conversation,
        read_alternating,
    ),
)

READERS: Mapping[str, Reader] = {reader.name: reader for reader in _ALL}
