"""Judges: which of two replies is better. A judge sees texts; it knows nothing of how they were made.

A judge is any object with a ``name`` and ``compare``. Failing is allowed: raise, or return a preference of ``None``;
a failure is counted (:func:`coala.evaluation.win_rate`), never replaced by a coin.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from coala.values import CoalaError, Generation, Judgement, Turn


class Judge(Protocol):
    """Compares two replies to one prompt."""

    @property
    def name(self) -> str: ...

    def compare(self, prompt: Sequence[Turn], first: Generation, second: Generation) -> Judgement:
        """P(``first`` is the better reply). ``prompt`` is empty when the caller does not know it."""
        ...


def preference(first: float, second: float) -> float | None:
    """1, 0 or (for equal scores) 1/2, so that a win rate is a share of wins; None when a score is nan."""
    if math.isnan(first) or math.isnan(second):
        return None
    return 1.0 if first > second else 0.0 if first < second else 0.5


@dataclass(frozen=True)
class WordJudge:
    """Logistic regression on word shares: score = bias + mean over the text's words of their weights (0 if unknown).

    Words are the matches of ``pattern`` in the lower-cased text; sigmoid(score) is the probability that the text has
    the quality the weights were fitted to. The reply alone is read, never the prompt.
    """

    name: str
    weights: Mapping[str, float] = field(repr=False)
    bias: float = 0.0
    pattern: str = r"[a-z]+(?:'[a-z]+)?"
    about: str = ""

    @classmethod
    def load(cls, path: Path | str) -> WordJudge:
        """Read ``{"name", "about", "pattern", "bias", "weights": {word: float}}``; CoalaError when it is not that."""
        try:
            document: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise CoalaError(
                f"{path}: the judge's file could not be read ({error.strerror}). Check the path."
            ) from None
        except ValueError as error:
            raise CoalaError(f"{path}: is not JSON ({error}). A word judge is one JSON object.") from None
        if not isinstance(document, dict):
            raise CoalaError(f"{path}: holds a {type(document).__name__}; a word judge is one JSON object.")
        weights = document.get("weights")
        numbers = (int, float)
        if not isinstance(weights, dict) or not weights or not all(isinstance(w, numbers) for w in weights.values()):
            raise CoalaError(f'{path}: needs "weights", an object of numbers by word. Add it.')
        bias, pattern = document.get("bias", 0.0), document.get("pattern", cls.pattern)
        if not isinstance(bias, numbers):
            raise CoalaError(f'{path}: "bias" is {bias!r}; expected a number.')
        try:
            re.compile(pattern)
        except (TypeError, re.error) as error:
            raise CoalaError(f'{path}: "pattern" is {pattern!r}; expected a regular expression ({error}).') from None
        return cls(
            name=str(document.get("name") or Path(path).stem),
            weights={str(word): float(weight) for word, weight in weights.items()},
            bias=float(bias),
            pattern=pattern,
            about=str(document.get("about", "")),
        )

    def score(self, text: str) -> float:
        """The logit; ``bias`` for a text without words."""
        words = [match.group() for match in re.finditer(self.pattern, text.lower())]
        return self.bias + (sum(self.weights.get(word, 0.0) for word in words) / len(words) if words else 0.0)

    def compare(self, prompt: Sequence[Turn], first: Generation, second: Generation) -> Judgement:
        value = preference(self.score(first.text), self.score(second.text))
        return Judgement(first.prompt_id, first.method, second.method, value, self.name)


@dataclass(frozen=True)
class HeadJudge:
    """A judge that prefers the higher ``scorer(prompt, reply)``: a convex head, or any reward model.

    ``lambda prompt, reply: reply.score`` judges by the scores that the guiding head left, without any model.

    As the head that guided the text it tells whether guidance reached its goal, not whether the text is better.
    """

    name: str
    scorer: Callable[[Sequence[Turn], Generation], float]

    def compare(self, prompt: Sequence[Turn], first: Generation, second: Generation) -> Judgement:
        value = preference(float(self.scorer(prompt, first)), float(self.scorer(prompt, second)))
        return Judgement(first.prompt_id, first.method, second.method, value, self.name)
