"""What a judge is: an object that compares two replies, how it may fail, and what its verdicts cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import add, sub
from typing import Protocol, runtime_checkable

from coala.values import CoalaError, Generation, Judgement, Turn


class Judge(Protocol):
    """Compares two replies to one prompt."""

    @property
    def name(self) -> str: ...

    def compare(self, prompt: Sequence[Turn], first: Generation, second: Generation) -> Judgement:
        """P(``first`` is the better reply). ``prompt`` is empty when the caller does not know it."""
        ...


class JudgeFailure(CoalaError):
    """One verdict could not be had; ``kind`` is what failures are counted by. The others go on."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class JudgeStopped(CoalaError):
    """No further verdict can be had: the budget is spent, the key is refused, the endpoint is gone. What was bought
    is kept."""


@dataclass(frozen=True)
class Cost:
    """What verdicts cost: ``calls`` requests sent (those that failed and were repeated too), ``answers`` that came
    back, ``kept`` verdicts taken from earlier answers, and tokens as the endpoint counted them.

    ``unmetered`` answers came without a count; for them a token is taken as three characters.
    """

    calls: int = 0
    answers: int = 0
    kept: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    unmetered: int = 0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def __sub__(self, other: Cost) -> Cost:
        return Cost(*map(sub, vars(self).values(), vars(other).values()))

    def __add__(self, other: Cost) -> Cost:
        return Cost(*map(add, vars(self).values(), vars(other).values()))


@runtime_checkable
class Paid(Protocol):
    """A judge whose verdicts cost something and whose waiting can be cut short."""

    @property
    def cost(self) -> Cost: ...

    def begin(self) -> None:
        """Allow calls again after :meth:`interrupt`."""

    def interrupt(self) -> None:
        """End waits and allow no further call; calls in flight are let finish."""


def preference(first: float, second: float) -> float | None:
    """1, 0 or (for equal scores) 1/2, so that a win rate is a share of wins; None when a score is nan."""
    if math.isnan(first) or math.isnan(second):
        return None
    return 1.0 if first > second else 0.0 if first < second else 0.5
