"""A written house style, five rules that a reply keeps or breaks.

The style: short sentences in plain words, no lists or markup, at most 60 words, and it ends by asking the reader
something back. The rules read the reply's text alone; a reply without a word keeps none of them. What judges the style
by other means (another readability formula, a grammar checker) is apart from them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

LONGEST_SENTENCE = 20  # words
LONGEST_REPLY = 60  # words
LONG_WORDS = 1 / 8  # share of words that may have three syllables or more: Gunning's "hard words"

# A number with its decimals, its commas or its share sign is one word; so are "don't" and "well-known".
WORD = re.compile(r"\d+(?:[.,:/]\d+)*|[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")
# Full stops that end no sentence: after these, after a lone letter (an initial, "e.g."), inside a number.
_ABBREVIATION = re.compile(
    r"\b(?:mr|mrs|ms|dr|prof|st|vs|etc|approx|no|fig|jr|sr|inc|cf|ca|[^\W\d_])\.$", re.IGNORECASE
)
_STOP = re.compile(r"[.!?\u2026]+[\"'\u201d\u2019)\]*_]*(?=\s|$)|\n+")
_MARKUP = re.compile(
    r"^[ \t]*(?:[-*+\u2022\u2013\u2014][ \t]|\(?\d{1,2}[.)][ \t]|\(?[a-z]\)[ \t]|\#{1,6}[ \t]|>[ \t]|\|)"  # line starts
    r"|\*\*|__|```|`[^`\n]+`|(?<![\w*])\*[^\s*][^*\n]*\*|\[[^\]\n]+\]\([^)\n]+\)"
    r"|\\[\[(]|\$\$|</?[a-z]+[^>\n]*>"  # LaTeX, HTML
    r"|^[ \t]*[-=_*]{3,}[ \t]*$",
    re.IGNORECASE | re.MULTILINE,
)
# Vowels side by side that belong to two syllables, and endings whose vowel is silent: "make", "played", "times".
_HIATUS = re.compile(
    r"i(?:a(?!ge|l\b|n\b)|o(?!us|n)|u)|ie(?=n[ct]|ty)|[^gq]ua(?=l|t)|[aeouy]ing|rea(?=t[eio])|oe(?=[mt])"
)
_SILENT = re.compile(r"[^aeiouyl]e$|[aeiouy]le$|[^aeioudty]ed$|[^aeiouycsgxzh]es$|[^aeiouy][aeiouy]les$")
# What may follow the question mark of a closing question: quotes, brackets, emoji, white space.
_AFTER = re.compile(r"[^\w?.!\u2026]*$")


def words_of(text: str) -> list[str]:
    """The words of a text; a number is one, and a hyphen or an apostrophe parts none."""
    return WORD.findall(text)


def sentences(text: str) -> list[str]:
    """The text in sentences that hold a word each; a line break ends one, an abbreviation or a decimal point none."""
    found, start = [], 0
    for stop in _STOP.finditer(text):
        so_far = text[start : stop.end()].rstrip()
        goes_on = text[stop.end() :].lstrip()[:1]
        if stop.group() == "." and goes_on and _ABBREVIATION.search(so_far):
            continue
        found.append(so_far)
        start = stop.end()
    return [one.strip() for one in (*found, text[start:]) if WORD.search(one)]


def syllables(word: str) -> int:
    """About how many syllables an English word has, by its groups of vowels; 1 for a number."""
    letters = re.sub(r"[^a-z]", "", word.casefold())
    groups = len(re.findall(r"[aeiouy]+", letters)) + len(_HIATUS.findall(letters))
    return max(1, groups - bool(_SILENT.search(letters)))


# By how much a text misses each rule: 0 where it keeps it. None is asked of a text without words.


def _over_long_sentences(text: str) -> float:
    longest = max(len(words_of(one)) for one in sentences(text))
    return max(0.0, longest / LONGEST_SENTENCE - 1)


def _hard_words(text: str) -> float:
    words = words_of(text)
    share = sum(syllables(word) >= 3 for word in words) / len(words)
    return max(0.0, share / LONG_WORDS - 1)


def _markup(text: str) -> float:
    return float(len(_MARKUP.findall(text)))


def _over_long(text: str) -> float:
    return max(0.0, len(words_of(text)) / LONGEST_REPLY - 1)


def _asks_nothing(text: str) -> float:
    said = sentences(text)
    last = _AFTER.sub("", said[-1])
    if len(said) > 1 and last.endswith("?") and len(words_of(last)) > 1:
        return 0.0
    return 0.5 if "?" in text else 1.0


_MISSES: Mapping[str, Callable[[str], float]] = {
    "short-sentences": _over_long_sentences,
    "plain-words": _hard_words,
    "no-markup": _markup,
    "at-most-60-words": _over_long,
    "asks-back": _asks_nothing,
}


def _rule(name: str) -> Callable[[str], bool]:
    return lambda text: bool(WORD.search(text)) and _MISSES[name](text) == 0


# Whether a text keeps each rule of the style, by the rule's name.
RULES: Mapping[str, Callable[[str], bool]] = {name: _rule(name) for name in _MISSES}
ABOUT: Mapping[str, str] = {
    "short-sentences": f"no sentence of more than {LONGEST_SENTENCE} words",
    "plain-words": "at most one word in eight with three syllables or more",
    "no-markup": "no list, heading, bold, code, link, table or formula",
    "at-most-60-words": f"at most {LONGEST_REPLY} words",
    "asks-back": "says something, and ends with a question",
}


def rules_kept(text: str) -> dict[str, bool]:
    """For each rule of :data:`RULES`, whether ``text`` keeps it."""
    return {name: keeps(text) for name, keeps in RULES.items()}


def style_score(text: str) -> float:
    """How many rules ``text`` keeps, 0 to 5, and below 1 more for how nearly it keeps the others.

    The whole part is the count of rules. What breaks a rule by a share m of its bound counts 1/(1 + m) toward the rest;
    the rest never makes up for a rule. A text without words scores 0.
    """
    if not WORD.search(text):
        return 0.0
    misses = [miss(text) for miss in _MISSES.values()]
    broken = [miss for miss in misses if miss > 0]
    near = sum(1 / (1 + miss) for miss in broken) / (1 + len(broken))
    return len(misses) - len(broken) + near
