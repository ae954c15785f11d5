"""Judges that score each reply by itself and prefer the higher score: fitted word weights, a head, a plain rule."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coala.evaluation import house_style
from coala.evaluation.judges.protocol import preference
from coala.values import CoalaError, Generation, Judgement, Turn


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


def _is_json(text: str) -> bool:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _repetition(text: str) -> float:
    """Share of three-word runs that were there before; 0 for a text of fewer than four words."""
    words = text.lower().split()
    runs = Counter(zip(words, words[1:], words[2:], strict=False))
    total = sum(runs.values())
    return 1 - len(runs) / total if total > 1 else 0.0


# What each rule prefers more of, from a reply's text and the rule's argument.
RULES: Mapping[str, Callable[[str, str], float]] = {
    "longer": lambda text, _: float(len(text)),
    "shorter": lambda text, _: -float(len(text)),
    "contains": lambda text, wanted: float(wanted.lower() in text.lower()),
    "regex": lambda text, pattern: float(re.search(pattern, text) is not None),
    "json": lambda text, _: float(_is_json(text)),
    "varied": lambda text, _: -_repetition(text),
    "house-style": lambda text, _: float(sum(house_style.rules_kept(text).values())),
}
_WITH_ARGUMENT = ("contains", "regex")


@dataclass(frozen=True)
class RuleJudge:
    """Prefers the reply of which ``rule`` has more; replies alike are a tie.

    ``longer`` and ``shorter`` count characters; ``contains`` (any case) and ``regex`` look for ``argument``; ``json``
    wants a text that is one JSON value; ``varied`` wants the smaller share of three-word runs that repeat;
    ``house-style`` counts the rules of :mod:`coala.evaluation.house_style` that a reply keeps.
    """

    rule: str
    argument: str = ""

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise CoalaError(f"There is no rule {self.rule!r}; expected one of {', '.join(RULES)}.")
        if bool(self.argument) != (self.rule in _WITH_ARGUMENT):
            wants = "needs an argument, as in contains:please" if not self.argument else "takes no argument"
            raise CoalaError(f"The rule {self.rule!r} {wants}; found {self.argument!r}.")
        if self.rule == "regex":
            try:
                re.compile(self.argument)
            except re.error as error:
                raise CoalaError(f"{self.argument!r} is not a regular expression ({error}). Fix it.") from None

    @classmethod
    def parse(cls, text: str) -> RuleJudge:
        """``longer``, or ``contains:ARGUMENT``."""
        rule, _, argument = text.partition(":")
        return cls(rule, argument)

    @property
    def name(self) -> str:
        return f"rule {self.rule}" + (f" {self.argument}" if self.argument else "")

    @property
    def parts(self) -> Mapping[str, Callable[[str], bool]]:
        """Where the rule counts rules of its own: whether a text keeps each of them, by name."""
        return house_style.RULES if self.rule == "house-style" else {}

    def score(self, text: str) -> float:
        return RULES[self.rule](text, self.argument)

    def compare(self, prompt: Sequence[Turn], first: Generation, second: Generation) -> Judgement:
        value = preference(self.score(first.text), self.score(second.text))
        return Judgement(first.prompt_id, first.method, second.method, value, self.name)
