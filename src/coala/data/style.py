"""Columns that describe a reply without judging it: length, place words, punctuation, overlap with what was said.

A cue is a named set of such columns. Texts in, arrays out; knows nothing of labels.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coala.values import Turn

Float = NDArray[np.float64]
WORD = re.compile(r"\w+(?:['\u2019]\w+)*")


def words_of(text: str) -> list[str]:
    return WORD.findall(text.casefold())


def _any(*phrases: str) -> Callable[[str], float]:
    found = re.compile(r"\b(?:" + "|".join(phrases) + r")\b", re.IGNORECASE)
    return lambda text: float(bool(found.search(text)))


_LENGTH: Mapping[str, Callable[[str], float]] = {
    "characters": lambda text: math.log1p(len(text)),
    "words": lambda text: math.log1p(len(text.split())),
}
# Words that tell where in a dialogue one stands, whatever is talked about.
_POSITION: Mapping[str, Callable[[str], float]] = {
    "greeting": _any("hi", "hello", "hey", "welcome", "good (?:morning|afternoon|evening)", "nice to meet"),
    "beginning": _any(
        "first(?:ly)?", "let['\u2019]?s (?:start|begin)", "to (?:start|begin)", "can you (?:tell|explain)"
    ),
    "going on": _any("now", "next", "then", "also", "so", "again", "remember", "as (?:i|we) said", "another"),
    "praise": _any(
        "(?:good|great|nice|excellent|amazing|awesome|fantastic) (?:job|work|try|question|thinking|point|effort)",
        "well done|exactly|perfect(?:ly)?|correct|yes|right|bravo|you['\u2019]?(?:ve| have)? got it",
    ),
    "correction": _any("not quite", "close", "almost", "actually", "however", "incorrect", "wrong", "instead"),
    "closing": _any("finally", "bye", "good luck", "you['\u2019]?re welcome", "have a (?:great|good|nice)", "see you"),
}
_SURFACE: Mapping[str, Callable[[str], float]] = {
    "question mark": lambda text: float("?" in text),
    "exclamation mark": lambda text: float("!" in text),
    "digits": lambda text: float(any(c.isdigit() for c in text)),
    "sentences": lambda text: math.log1p(len(re.findall(r"[.!?]+(?:\s|$)", text))),
    "lines": lambda text: math.log1p(text.count("\n")),
    "list": lambda text: float(bool(re.search(r"^\s*(?:[-*\u2022]|\d+[.)])\s", text, re.MULTILINE))),
    "quotation": lambda text: float(any(c in text for c in '"\u201c\u201d`')),
    "capital first": lambda text: float(text.lstrip()[:1].isupper()),
    "ends in a stop": lambda text: float(text.rstrip()[-1:] in (".", "!", "?")),
    "of oneself": _any("i", "i['\u2019]?m", "my", "me"),
    "to the other": _any("you", "your"),
    "try": _any("try", "attempt"),
    "ok": _any("ok(?:ay)?", "alright"),
    "please": _any("please"),
    "sorry": _any("sorry", "afraid", "unfortunately"),
}


def _count(pattern: str) -> Callable[[str], float]:
    found = re.compile(pattern, re.MULTILINE)
    return lambda text: float(len(found.findall(text)))


def _log(count: Callable[[str], float]) -> Callable[[str], float]:
    return lambda text: math.log1p(count(text))


# What is counted of a reply; a column is log(1 + n), so that one long reply does not outweigh all others.
_MARKS: Mapping[str, Callable[[str], float]] = {
    "headings": _count(r"^#{1,6}\s"),
    "bold": _count(r"\*\*[^*\n]+\*\*|__[^_\n]+__"),
    "code": _count(r"```|`[^`\n]+`"),
    "table rows": _count(r"^\s*\|.*\|\s*$"),
}
list_items = _count(r"^\s*(?:[-*+\u2022]|\d+[.)])\s")
_PUNCTUATION: Mapping[str, Callable[[str], float]] = {
    "commas": _count(r","),
    "stops": _count(r"[.!?]"),
    "colons": _count(r"[:;]"),
    "dashes": _count(r"[\u2013\u2014]| - "),
    "brackets": _count(r"[()\[\]]"),
}
REFUSED_IN = 300  # characters from the start in which a refusal is looked for
_REFUSAL = re.compile(
    r"\bi(?: a|['\u2019])m (?:\w+ )?(?:sorry|afraid|unable|not able|not comfortable)\b"
    r"|\bi (?:can ?not|can['\u2019]t|won['\u2019]t|will not|must (?:decline|refuse)|do not feel comfortable)\b"
    r"|\bas an ai\b|\b(?:unable|not able) to (?:assist|help|provide|fulfil|comply|answer)"
    r"|\b(?:beyond my capabilities|against my (?:guidelines|programming|principles))\b",
    re.IGNORECASE,
)


def refuses(text: str) -> float:
    """1 if a phrase of refusal, in English, stands near the start, else 0."""
    return float(bool(_REFUSAL.search(text[:REFUSED_IN])))


def marks(text: str) -> float:
    """Headings, bold spans, pieces of code and rows of tables in Markdown."""
    return sum(count(text) for count in _MARKS.values())


def punctuation(text: str) -> float:
    """Signs of punctuation per character."""
    return sum(count(text) for count in _PUNCTUATION.values()) / max(1, len(text))


_SHAPE: Mapping[str, Callable[[str], float]] = {
    **{name: _log(count) for name, count in _MARKS.items()},
    "list items": _log(list_items),
    **{name: _log(count) for name, count in _PUNCTUATION.items()},
    "punctuation per character": punctuation,
    "refusal": refuses,
}
REPLY: Mapping[str, Callable[[str], float]] = {**_LENGTH, **_POSITION, **_SURFACE, **_SHAPE}
OVERLAP = (
    *("words of the last turn taken up", "own words from the last turn"),
    *("words of the prompt taken up", "own words from the prompt"),
)
COLUMNS = (*REPLY, *OVERLAP)

# Cue to the columns it may look at; "first words" and "bag of words" have columns of their own.
CUES: Mapping[str, tuple[str, ...]] = {
    "length": tuple(_LENGTH),
    "markdown": tuple(_MARKS),
    "lists": ("list", "list items"),
    "refusal": ("refusal",),
    "punctuation": ("question mark", "exclamation mark", "ends in a stop", *_PUNCTUATION, "punctuation per character"),
    "position words": tuple(_POSITION),
    "surface": tuple(REPLY),
    "overlap with the last turn": OVERLAP[:2],
    "overlap with the prompt": OVERLAP,
}
OPENINGS = 50  # first words that have a column each


def reply_columns(texts: Sequence[str]) -> Float:
    """(n, columns of :data:`REPLY`), each text described once however often it comes."""
    known: dict[str, list[float]] = {}
    for text in texts:
        if text not in known:
            known[text] = [cue(text) for cue in REPLY.values()]
    return np.array([known[text] for text in texts], dtype=np.float64).reshape(len(texts), len(REPLY))


def overlaps(texts: Sequence[str], prompts: Sequence[tuple[Turn, ...]]) -> Float:
    """(n, 4): shares of words in common with the last turn and with the whole prompt, both ways."""
    said: dict[tuple[Turn, ...], tuple[set[str], set[str]]] = {}
    held: dict[str, set[str]] = {}
    rows = np.zeros((len(texts), len(OVERLAP)))
    for k, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        if prompt not in said:
            said[prompt] = set(words_of(prompt[-1].text)), {w for turn in prompt for w in words_of(turn.text)}
        own = held[text] if text in held else held.setdefault(text, set(words_of(text)))
        for place, there in enumerate(said[prompt]):
            common = len(own & there)
            rows[k, 2 * place] = common / max(1, len(there))
            rows[k, 2 * place + 1] = common / max(1, len(own))
    return rows


def described(texts: Sequence[str], prompts: Sequence[tuple[Turn, ...]]) -> Float:
    """Every column of :data:`COLUMNS` of replies to prompts, (n, columns)."""
    return np.hstack([reply_columns(texts), overlaps(texts, prompts)])


def columns_of(cue: str, table: Float) -> Float:
    """The columns of ``table`` (n, columns of :data:`COLUMNS`) that ``cue`` looks at."""
    return table[:, [COLUMNS.index(name) for name in CUES[cue]]]


def first_word(text: str) -> str:
    words = text.split(maxsplit=1)
    return words[0].casefold().strip(".,!?:;\"'*#") if words else ""


def openings(texts: Sequence[str]) -> Float:
    """Which of the :data:`OPENINGS` commonest first words a reply begins with, (n, at most OPENINGS) of 0 and 1."""
    first = [first_word(text) for text in texts]
    common = [word for word, n in sorted(Counter(first).items(), key=lambda one: (-one[1], one[0])) if n > 1]
    place = {word: k for k, word in enumerate(common[:OPENINGS])}
    table = np.zeros((len(texts), max(1, len(place))))
    for row, word in enumerate(first):
        if word in place:
            table[row, place[word]] = 1.0
    return table


def bag_of_words(chosen: Sequence[str], rejected: Sequence[str], at_least: int = 3) -> Any:
    """Chosen minus rejected presence of each word in at least ``at_least`` replies: SciPy CSR (n, words)."""
    from scipy.sparse import csr_array

    words = {text: set(words_of(text)) for text in dict.fromkeys((*chosen, *rejected))}
    held = [(words[good], words[bad]) for good, bad in zip(chosen, rejected, strict=True)]
    counts = Counter(word for both in held for one in both for word in one)
    place = {word: k for k, word in enumerate(sorted(word for word, n in counts.items() if n >= at_least))}
    values: list[float] = []
    indices: list[int] = []
    starts = [0]
    for good, bad in held:
        # Sorted, for the sums of the products to be the same in every process.
        for word in sorted(good ^ bad):
            if word in place:
                indices.append(place[word])
                values.append(1.0 if word in good else -1.0)
        starts.append(len(indices))
    return csr_array((values, indices, starts), shape=(len(held), max(1, len(place))))
