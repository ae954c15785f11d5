"""Measures of a text that share nothing with the house style's rules: they judge what those rules have labelled.

A grade by letters per word and sentences per word, where the rules count syllables and words, and the faults that a
grammar checker finds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec

from coala.values import CoalaError

# What the checker says of taste and of length is no fault of grammar or spelling.
_TASTE = frozenset({"Enhancement", "Formatting", "Readability", "Style", "WordChoice"})


def coleman_liau(text: str) -> float:
    """The US school grade of ``text`` by Coleman and Liau (1975): 0.0588 L - 0.296 S - 15.8.

    L letters and S sentences are per 100 words; words are what white space parts, sentences what ends in ``.``, ``!``
    or ``?``, at least one. nan for a text without letters.
    """
    words = [word for word in text.split() if re.search(r"\w", word)]
    letters = sum(c.isalpha() for c in text)
    if not words or not letters:
        return float("nan")
    ends = max(1, len(re.findall(r"[.!?]+(?:[\s\"')]|$)", text)))
    return 0.0588 * 100 * letters / len(words) - 0.296 * 100 * ends / len(words) - 15.8


def has_grammar_checker() -> bool:
    """Whether Harper (``harper-py``) is installed."""
    return find_spec("harper") is not None


def grammar_faults(texts: Sequence[str]) -> list[int]:
    """How many faults of grammar, spelling and punctuation Harper finds in each text.

    CoalaError where Harper is not installed. Its remarks on style, readability and word choice are left out.
    """
    if not has_grammar_checker():
        raise CoalaError("Found no grammar checker, expected harper-py. Fix: pip install 'coala-align[style]'.")
    from harper import Linter

    linter = Linter()
    return [sum(one.lint_kind not in _TASTE for one in linter.lint(text, language="plaintext")) for text in texts]
