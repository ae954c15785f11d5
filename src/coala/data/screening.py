"""What makes an utterance unfit: refusals, agents out of their role, empty, cut or repeated words.

Knows one utterance and those before it. English patterns; other languages pass but for labels, cuts and repeats.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from coala.data.agents import Speaker
from coala.data.turns import INVISIBLE

_LABEL = re.compile(r"^[*_#\s]*(student|tutor|teacher|learner|user|assistant|human|ai)[*_]*\s*:[*_]*\s*", re.IGNORECASE)
_OWN = {"student": ("student", "learner", "user", "human"), "tutor": ("tutor", "teacher", "assistant", "ai")}
_REFUSAL = re.compile(
    r"\bas an? (ai|artificial intelligence|(large )?language model)\b"
    r"|\bi('?m| am) an? (ai|large language model|language model)\b"
    r"|\bi('?m| am) (sorry|afraid),? but i (can('?t|not)|am (unable|not able) to|won'?t)\b"
    r"|\bi (can('?t|not)|am (unable|not able) to|won'?t|will not) "
    r"(assist|comply|engage|fulfil+|(help|continue) (you )?with (that|this|your)|(discuss|provide) (that|this|you))\b"
    r"|\bagainst my (guidelines|programming|policy)\b",
    re.IGNORECASE,
)
_BROKEN = re.compile(
    r"\b(my|these|the|your) (system prompt|instructions say)\b|\brole-?play|\[insert\b|\bstay(ing)? in character\b"
    r"|\bsimulat(e|ed|ing) (a|the) (conversation|student|tutor)\b",
    re.IGNORECASE,
)
_OF_THE_OTHER = {
    "student": re.compile(
        r"\bhow (can|may) i (help|assist) you\b|\bas your tutor\b|\bwhat would you like (help|to (learn|know|study))\b",
        re.IGNORECASE,
    ),
    "tutor": re.compile(
        r"\bas (a|your) student,? i\b|\bi have (a|an) (quiz|exam|test) (tomorrow|coming|next|on|in)\b", re.IGNORECASE
    ),
}


def cleaned(text: str, speaker: Speaker) -> str:
    """The words alone: white space and a label with the speaker's own name taken off the beginning."""
    text = text.strip(INVISIBLE)
    found = _LABEL.match(text)
    return text[found.end() :].strip(INVISIBLE) if found and found[1].lower() in _OWN[speaker] else text


def fault(text: str, finish: str, speaker: Speaker, said: Sequence[str]) -> str | None:
    """Why ``text`` cannot be ``speaker``'s next utterance after ``said``, or ``None``.

    ``filtered``, ``cut`` (the limit on tokens), ``empty``, ``unwritable``, ``refusal``, ``role`` (speaks for the
    other, as the other, or of its instructions) or ``repeat`` (says again what it said before).
    """
    if finish == "content_filter":
        return "filtered"
    if not any(c.isalnum() for c in text):
        return "empty"
    if finish == "length":
        return "cut"
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        return "unwritable"
    plain = text.replace("\u2019", "'")
    if _REFUSAL.search(plain):
        return "refusal"
    labels = [found[1].lower() for row in plain.splitlines() if (found := _LABEL.match(row))]
    if (
        any(label not in _OWN[speaker] for label in labels)
        or _BROKEN.search(plain)
        or _OF_THE_OTHER[speaker].search(plain)
    ):
        return "role"
    own = said[len(said) % 2 :: 2]
    key = " ".join(text.casefold().split())
    if any(" ".join(before.casefold().split()) == key for before in own):
        return "repeat"
    return None
