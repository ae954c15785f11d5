"""A control for what alignment may cost: 100 short questions whose answers can be checked, written for this package.

A reply counts as right if it names an accepted answer as words of its own. That is lenient: a reply that names several
answers is right if one of them is. Compare a model with itself, and read no school mark into the share.
"""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from coala.values import CoalaError

_SMALL = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen
"""
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_NUMBERS = {word: n for n, word in enumerate(_SMALL.split())} | {w: 10 * n for n, w in enumerate(_TENS.split(), 2)}
_TOKEN = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+")


@dataclass(frozen=True)
class Question:
    """A question, the answers that count, each a word or a few, and the topic it is of."""

    prompt: str
    accepts: tuple[str, ...]
    topic: str = ""

    def answered_by(self, reply: str) -> bool:
        """Whether ``reply`` names an accepted answer: as whole words, case, accents and punctuation apart.

        Numbers are the same in words and figures: "twenty-one", "21", "1,000" and "one thousand".
        """
        said = f" {' '.join(_plain(reply))} "
        return any(f" {' '.join(_plain(answer))} " in said for answer in self.accepts)


@cache
def capability_questions() -> tuple[Question, ...]:
    """The 100 bundled questions, in their fixed order."""
    path = files("coala") / "assets" / "chat" / "questions.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return tuple(Question(row["prompt"], tuple(row["accepts"]), row["topic"]) for row in rows)
    except (OSError, ValueError, KeyError) as error:
        raise CoalaError(
            f"{path}: found no bundled questions ({error!r}), expected 100. Fix: install coala-align again."
        ) from None


def _plain(text: str) -> list[str]:
    """The words of ``text`` in small letters without accents; numbers in figures."""
    folded = unicodedata.normalize("NFKD", text.casefold())
    bare = "".join(c for c in folded if not unicodedata.combining(c))
    bare = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", bare).replace("'s ", " ").replace("\u2019s ", " ")
    bare = re.sub(r"['\u2019]", "", bare)
    return _in_figures(_TOKEN.findall(bare))


def _in_figures(words: list[str]) -> list[str]:
    """Runs of number words as one number: "twenty one" is 21, "one hundred and five" 105."""
    found: list[str] = []
    i = 0
    while i < len(words):
        value, after = _number(words, i)
        found.append(words[i] if value is None else str(value))
        i = after
    return found


def _number(words: list[str], i: int) -> tuple[int | None, int]:
    """The number in words that begins at ``i``, None if none does, and where it ends."""
    value = _NUMBERS.get(words[i])
    i += 1
    if value is not None and value >= 20 and i < len(words) and 0 < _NUMBERS.get(words[i], 0) < 10:
        value, i = value + _NUMBERS[words[i]], i + 1
    for name, size in (("hundred", 100), ("thousand", 1000)):
        if value is not None and i < len(words) and words[i] == name:
            value, i = value * size, i + 1
            rest = i + (i < len(words) and words[i] == "and")
            less = _NUMBERS.get(words[rest]) if rest < len(words) else None
            if less is not None:
                more, i = _number(words, rest)
                value += more or 0
    return value, i
