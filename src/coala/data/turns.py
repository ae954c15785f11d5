"""The words of a row: checked texts, messages, transcripts, labels, groups, and the pair they make.

Whatever is not as it should be raises :class:`~coala.data.findings.Fault` with the field, what was found and the mend.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from coala.data.findings import Fault, NoPreference, describe, listed
from coala.data.unread import alike, is_empty, refuse, tokens_of
from coala.values import Pair, Role, Turn

Row = Mapping[str, Any]

ROLE_NAMES: Mapping[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "student"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatbot", "ai", "chatgpt", "tutor", "teacher"), "assistant"),
}
_TOOL_ROLES = (
    "tool",
    "function",
    "observation",
    "function_call",
    "tool_call",
    "function_response",
    "tool_response",
    "ipython",
)
GROUP_FIELDS = ("group", "conversation_id", "prompt_id", "post_id", "movie")
RATER_FIELDS = ("rater", "rater_id", "annotator", "annotator_id", "worker_id")
SOURCE_FIELDS = ("dataset", "domain", "source", "subset")
SOURCE_WORDS = 12  # a longer text under such a name is a text, not a name
# Nothing a reader would see: white space proper, zero-width characters, a stray byte-order mark.
INVISIBLE = "".join(map(chr, (*range(0x1C, 0x21), 0x85, 0xA0, *range(0x2000, 0x2010), 0x2028, 0x2029))) + (
    "\t\n\x0b\x0c\r\u1680\u202f\u205f\u2060\u3000\ufeff"
)
_SPEAKER = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


def text(row: Row, field: str) -> str:
    """The text of a field: present, a string, with something to see in it, and writable as UTF-8."""
    if field not in row:
        raise Fault(field, f"no such field (there are {listed(row) or 'none'})", "text", "add or rename the field")
    return sound_text(row[field], field)


def sound_text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        mend = "fill it in or delete the row" if value is None else "write it as one string"
        raise Fault(field, describe(value), "text", mend)
    if not value.strip(INVISIBLE):
        found = "only white space" if value else "empty text"
        raise Fault(field, found, "text", "fill it in or delete the row")
    unwritable(value, field)
    return value


def unwritable(value: str, field: str) -> None:
    """Raise for what cannot be written as UTF-8 text again."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        found = f"a lone surrogate \\u{ord(value[error.start]):04x} at character {error.start + 1}"
        raise Fault(field, found, "text that UTF-8 can hold", "write the character whole, or delete it") from None
    if "\0" in value:
        raise Fault(field, f"a NUL character at {value.index(chr(0)) + 1}", "text", "delete the character")


def optional_text(row: Row, field: str) -> str:
    """As :func:`text`, but a field that is absent, null or empty is the empty string."""
    return "" if row.get(field) in (None, "") else text(row, field)


def role(value: Any, field: str) -> Role:
    """``assistant`` for gpt, tutor, teacher and the like; ``user`` for human, student and the like."""
    if isinstance(value, str) and (found := ROLE_NAMES.get(value.strip().lower())):
        return found
    if isinstance(value, str) and value.strip().lower() in _TOOL_ROLES:
        mend = "leave the row out (tool turns are not read), or write what the tool said into another turn"
        raise Fault(field, f"a tool's turn ({value})", "a user, an assistant or a system", mend)
    raise Fault(field, f"a speaker that is {describe(value)}", f"one of {', '.join(ROLE_NAMES)}", "rename the speaker")


def turns(value: Any, field: str, *, skip_empty: bool = False) -> list[Turn]:
    """Messages ``{role, content}``, ShareGPT's ``{from, value}`` or ``{role or user, text}``, in order; or one such.

    An empty system message says nothing and is left out; any other empty turn is an error unless ``skip_empty``. Tool
    calls and images in a message are errors; other fields are for :mod:`coala.data.unread` to name.
    """
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise Fault(field, describe(value), "a list of messages {role, content}", "write it as such a list")
    if not value:
        raise Fault(field, "an empty list", "at least one message", "fill it in or delete the row")
    made = []
    for number, message in enumerate(value):
        place = f"{field}[{number}]"
        if not isinstance(message, Mapping):
            raise Fault(place, describe(message), "a message {role, content}", "write it as such an object")
        for key, held in message.items():
            if key not in ("role", "from", "user", "content", "value", "text"):
                refuse(str(key), held, f"{place}.{key}")
        who = next((key for key in ("role", "from", "user") if key in message), None)
        what = next((key for key in ("content", "value", "text") if key in message), None)
        if who is None or what is None:
            raise Fault(place, describe(message), "a message {role, content} or {from, value}", "rename its fields")
        speaker, said = role(message[who], f"{place}.{who}"), message[what]
        if isinstance(said, list):
            said = _parts(said, f"{place}.{what}")
        if said in (None, "") and (skip_empty or speaker == "system"):
            continue
        if said in (None, "") and not is_empty(message.get("refusal")):
            mend = "move the words of refusal to content"
            raise Fault(f"{place}.refusal", "a reply that stands outside content", "a reply in content", mend)
        made.append(Turn(speaker, sound_text(said, f"{place}.{what}")))
    return made


def _parts(parts: list[Any], field: str) -> str:
    """The text of a message written in parts, which must all be text."""
    if parts and all(isinstance(part, str) for part in parts):
        return "".join(parts)
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise Fault(field, f"a part that is {describe(part)}", "parts of text", "leave out images and tools")
    return "".join(part["text"] for part in parts)


def is_messages(value: Any) -> bool:
    """Whether a value looks like a list of messages; says nothing of their soundness."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(one, Mapping) and ("content" in one or "value" in one or "text" in one) for one in value)
    )


def is_transcript(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("Human:") and "\n\nAssistant:" in value


def transcript(value: Any, field: str) -> list[Turn]:
    r"""The turns of ``"\n\nHuman: ...\n\nAssistant: ..."``, white space around each cut off, neighbours merged.

    A reply that is empty at the very end is left out: prompts are written so.
    """
    said = sound_text(value, field).lstrip("\n ")
    pieces = _SPEAKER.split(said)
    if pieces[0].strip() or len(pieces) < 3:
        raise Fault(field, describe(value), r'a transcript "\n\nHuman: ...\n\nAssistant: ..."', "name another format")
    spoken = [(role(who, field), words.strip()) for who, words in zip(pieces[1::2], pieces[2::2], strict=True)]
    if spoken[-1] == ("assistant", ""):
        spoken.pop()
    for number, (speaker, words) in enumerate(spoken):
        if not words.strip(INVISIBLE):
            raise Fault(field, f"an empty turn {number + 1} ({speaker})", "text", "fill it in or delete the row")
    return merged(Turn(speaker, words) for speaker, words in spoken)


def merged(conversation: Iterable[Turn], joint: str = "\n\n") -> list[Turn]:
    """Consecutive turns of one speaker as one turn."""
    made: list[Turn] = []
    for turn in conversation:
        if made and made[-1].role == turn.role:
            made[-1] = Turn(turn.role, made[-1].text + joint + turn.text)
        else:
            made.append(turn)
    return made


def shared_turns(first: Sequence[Turn], second: Sequence[Turn]) -> int:
    """How many turns two conversations share from their beginning."""
    return next(
        (k for k, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def shared_text(first: str, second: str) -> int:
    """Length of the longest common beginning that ends before white space and leaves both something to say."""
    end = next((k for k, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
    for cut in range(end, 0, -1):
        if all(len(s) > cut and s[cut].isspace() and s[cut:].strip(INVISIBLE) for s in (first, second)) and (
            not first[cut - 1].isspace()
        ):
            return cut
    return 0


# --- labels, groups, pairs ---------------------------------------------------------------------------------------


def label(row: Row, field: str, meanings: Mapping[str, Any]) -> Any:
    """What a label means; numbers may be written as text or as a float without fraction."""
    if field not in row:
        raise Fault(field, "no such field", f"one of {', '.join(meanings)}", "add or rename it")
    value = row[field]
    name = str(int(value)) if isinstance(value, float) and value.is_integer() else value
    if isinstance(name, int) and not isinstance(name, bool) and abs(name) < 1000:
        name = str(name)
    if isinstance(name, str) and name.strip().lower() in meanings:
        return meanings[name.strip().lower()]
    raise Fault(field, describe(value), f"one of {', '.join(meanings)}", "correct the label or delete the row")


def number(value: Any, field: str) -> float:
    """A finite number, perhaps written as text."""
    try:
        if (
            isinstance(value, int | float | str)
            and not isinstance(value, bool)
            and math.isfinite(found := float(value))
        ):
            return found
    except (ValueError, OverflowError):
        pass
    raise Fault(field, describe(value), "a finite number", "correct the score or delete the row")


def digest(said: str) -> str:
    """A short name for a text, equal for texts that differ in white space, case or Unicode form only."""
    plain = " ".join(unicodedata.normalize("NFKC", said).casefold().split())
    return hashlib.sha256(plain.encode()).hexdigest()[:16]


def named_group(row: Row, names: Iterable[str] = GROUP_FIELDS) -> str | None:
    """The group a row names itself, in the first of ``names`` that says something."""
    for name in names:
        found = _name_in(row, name)
        if found is not None:
            return found
        if row.get(name) not in (None, "") and name == "group":
            raise Fault(name, describe(row[name]), "a name or a number", "write it as text, or drop the field")
    return None


def _name_in(row: Row, name: str) -> str | None:
    """A field that says who or what: a number, or a text that is not blank."""
    value = row.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value.strip():
        unwritable(value, name)
        return value
    return None


def rater_of(row: Row) -> str:
    """Who preferred the chosen reply, as the row names them; empty if it does not."""
    return next((found for name in RATER_FIELDS if (found := _name_in(row, name)) is not None), "")


def source_field(row: Row) -> str | None:
    """The column that names the data set or domain of a row, if one of ``SOURCE_FIELDS`` holds a short name."""
    for name in SOURCE_FIELDS:
        found = _name_in(row, name)
        if found is not None and "\n" not in found and len(found.split()) <= SOURCE_WORDS:
            return name
    return None


def group_of(row: Row, prompt: Sequence[Turn]) -> str:
    """What must not straddle a split: the row's own group, or a digest of the first thing the user said.

    Looked for in ``group``, ``conversation_id``, ``prompt_id``, ``post_id``, ``movie``. A dialogue cut at several
    depths thus stays in one group.
    """
    named = named_group(row)
    return named if named is not None else digest(next((t.text for t in prompt if t.role == "user"), prompt[0].text))


def pair(row: Row, prompt: Sequence[Turn], chosen: str, rejected: str, group: str | None = None) -> Pair:
    """The pair, unless its prompt is empty, or its replies are the same or names of columns or models."""
    if not prompt:
        raise Fault(
            "prompt", "no prompt", "what the replies answer", "add a prompt column, or begin both replies with it"
        )
    if same_reply(chosen, rejected):
        raise alike(row)
    if are_names(row, chosen, rejected):
        found = f"names of columns or models ({describe(chosen)}, {describe(rejected)}) in place of replies"
        mend = "put the replies' own texts there (two replies and a `winner` that names one of them are read, too)"
        raise Fault("chosen", found, "the text of a reply", mend)
    return Pair(tuple(prompt), chosen, rejected, group if group is not None else group_of(row, prompt))


_NAME = re.compile(
    r"(model|response|answer|output|assistant|completion|reply|option|candidate|conversation)[ _-]?([ab]|[0-2])"
    r"|(gpt|claude|gemini|palm|bard|llama|vicuna|alpaca|koala|mistral|mixtral|qwen|gemma|phi|falcon|zephyr|tulu|yi|"
    r"dolly|mpt|deepseek|wizardlm|command|chatglm|pythia|starchat|ultralm|text-davinci|o1|o3|grok|nova|smollm)"
    r"[-_.]?v?\d[\w.:-]*|(meta-)?(llama|mistral|mixtral|qwen|gemma|vicuna|claude|gpt|gemini|falcon)-[\w.:-]+",
    re.IGNORECASE,
)


def is_name(said: str) -> bool:
    """Whether a text is no more than the name of a model (``gpt-4``) or of one of two sides (``response_a``)."""
    return bool(_NAME.fullmatch(said.strip()))


def are_names(row: Row, *said: str) -> bool:
    """Whether all texts are names of columns of the row, or values of its columns of models."""
    known = {str(key).strip().lower() for key in row}
    known |= {v.strip().lower() for k, v in row.items() if isinstance(v, str) and "model" in tokens_of(str(k))}
    return all(one.strip().lower() in known for one in said)


def same_reply(first: str, second: str) -> bool:
    """Equal up to white space at the ends: nothing there to prefer."""
    return first.strip() == second.strip()


def best_against_lower(
    row: Row, prompt: Sequence[Turn], replies: Sequence[tuple[tuple[float, ...], str]]
) -> list[Pair]:
    """The best-scored reply against every one that scores strictly lower, in the order given.

    All pairs hold the same preferred text, so each comparison is as clear as the scores allow; they share a group.
    Scores are compared from left to right; of equal best the first is taken. The same text twice makes no pair.
    """
    if len(replies) < 2:
        raise NoPreference("", "left out: one reply alone prefers nothing")
    top, best = max(replies, key=lambda one: one[0])
    made = [pair(row, prompt, best, said) for s, said in replies if s < top and not same_reply(best, said)]
    if not made:
        raise NoPreference("", "left out: all replies score the same")
    return made
