"""Columns that describe a reply without judging it: length, place words, punctuation, overlap with what was said.

A cue is a named set of such columns. Texts in, arrays out; knows nothing of labels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coala.values import Pair, Turn

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
REPLY: Mapping[str, Callable[[str], float]] = {**_LENGTH, **_POSITION, **_SURFACE}
OVERLAP = (
    *("words of the last turn taken up", "own words from the last turn"),
    *("words of the prompt taken up", "own words from the prompt"),
)
COLUMNS = (*REPLY, *OVERLAP)

# Cue to the columns it may look at; "bag of words" has columns of its own.
CUES: Mapping[str, tuple[str, ...]] = {
    "length": tuple(_LENGTH),
    "position words": tuple(_POSITION),
    "surface": (*_LENGTH, *_POSITION, *_SURFACE),
    "overlap with the last turn": OVERLAP[:2],
    "overlap with the prompt": OVERLAP,
    "all cues": COLUMNS,
}
BAG = "bag of words"


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
    rows = np.zeros((len(texts), len(OVERLAP)))
    for k, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        if prompt not in said:
            said[prompt] = set(words_of(prompt[-1].text)), {w for turn in prompt for w in words_of(turn.text)}
        own = set(words_of(text))
        for place, there in enumerate(said[prompt]):
            common = len(own & there)
            rows[k, 2 * place] = common / max(1, len(there))
            rows[k, 2 * place + 1] = common / max(1, len(own))
    return rows


def sides(pairs: Sequence[Pair]) -> tuple[Float, Float]:
    """Every column of :data:`COLUMNS` for the chosen and for the rejected replies, each (n, columns)."""
    prompts = [pair.prompt for pair in pairs]
    chosen, rejected = [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
    both = reply_columns([*chosen, *rejected])
    n = len(pairs)
    return (
        np.hstack([both[:n], overlaps(chosen, prompts)]),
        np.hstack([both[n:], overlaps(rejected, prompts)]),
    )


def differences(pairs: Sequence[Pair]) -> Float:
    """Chosen minus rejected in every column of :data:`COLUMNS`, (n, columns)."""
    chosen, rejected = sides(pairs)
    return chosen - rejected


def with_prompts(table: Float, pairs: Sequence[Pair], prompts: Sequence[tuple[Turn, ...]]) -> Float:
    """``table`` (n, columns) of differences as it would be if the pairs had these ``prompts``: a control."""
    chosen, rejected = [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
    return np.hstack([table[:, : len(REPLY)], overlaps(chosen, prompts) - overlaps(rejected, prompts)])


def columns_of(cue: str, table: Float) -> Float:
    """The columns of ``table`` (n, columns of :data:`COLUMNS`) that ``cue`` looks at."""
    return table[:, [COLUMNS.index(name) for name in CUES[cue]]]


def bag_of_words(pairs: Sequence[Pair], at_least: int = 3) -> Any:
    """Chosen minus rejected presence of each word in at least ``at_least`` replies: SciPy CSR (n, words)."""
    from scipy.sparse import csr_array

    held = [(set(words_of(pair.chosen)), set(words_of(pair.rejected))) for pair in pairs]
    counts: dict[str, int] = {}
    for both in held:
        for one in both:
            for word in one:
                counts[word] = counts.get(word, 0) + 1
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
    return csr_array((values, indices, starts), shape=(len(pairs), max(1, len(place))))
