"""How a head steers decoding: the settings, and the rule that turns head scores into a reweighted distribution.

Knows nothing of models or text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from coala.values import CoalaError

Mode = Literal["token", "block", "prefix", "none"]
Rule = Literal["min-max", "raw"]
Float64 = NDArray[np.float64]

PAPER_EVERY = 5


@dataclass(frozen=True)
class Guidance:
    """How the head guides decoding, and the restricted base distribution that guided and unguided text share.

    ``mode``: ``token`` scores candidates at every ``every``-th token (1); ``prefix`` is the same at every fifth token,
    the paper's setting (App. H.3); ``block`` samples ``candidates`` blocks of ``block_tokens`` tokens and keeps the one
    with the best score; ``none`` is plain sampling. ``strength`` multiplies the candidates' scores, min-max normalised
    to [0, 1] (``rule="min-max"``) or as they are (``"raw"``), before they are added to the log-probabilities. Strength
    0 is unguided in every mode; in block mode any other strength means the same, for the best block simply wins.
    ``top_k`` (0: off) and then ``top_p`` (1: off) restrict the base distribution.
    """

    mode: Mode = "token"
    strength: float = 2.0
    every: int | None = None
    candidates: int = 5
    top_k: int = 50
    top_p: float = 0.9
    block_tokens: int = 10
    rule: Rule = "min-max"

    def __post_init__(self) -> None:
        _one_of("mode", self.mode, get_args(Mode))
        _one_of("rule", self.rule, get_args(Rule))
        _number("strength", self.strength, "a finite number of at least 0", lambda x: math.isfinite(x) and x >= 0)
        if self.every is not None:
            _count("every", self.every, 1)
        _count("candidates", self.candidates, 1)
        _count("top_k", self.top_k, 0)
        _count("block_tokens", self.block_tokens, 1)
        _number("top_p", self.top_p, "a number in (0, 1]", lambda x: 0 < x <= 1)

    @classmethod
    def paper(cls, strength: float = 2.0) -> Guidance:
        """App. H.3: top-p 0.9, top-k 50, five candidates, min-max, every fifth token. It does not give a strength."""
        return cls("prefix", strength, every=PAPER_EVERY, candidates=5, top_k=50, top_p=0.9, rule="min-max")

    @classmethod
    def unguided(cls, *, top_k: int = 50, top_p: float = 0.9) -> Guidance:
        """Plain sampling from the restricted base distribution."""
        return cls("none", top_k=top_k, top_p=top_p)

    @property
    def interval(self) -> int:
        """Every how many tokens the head is asked, the first token among them."""
        return self.every or (PAPER_EVERY if self.mode == "prefix" else 1)

    @property
    def active(self) -> bool:
        """Whether a head could change anything."""
        return self.mode != "none" and self.strength > 0 and self.candidates > 1

    def __str__(self) -> str:
        if not self.active:
            return "unguided"
        if self.mode == "block":
            return f"block, {self.candidates} x {self.block_tokens} tokens"
        return f"{self.mode}, {self.rule} {self.strength:g}, every {self.interval}, {self.candidates} candidates"


def _one_of(name: str, found: object, expected: tuple[str, ...]) -> None:
    if found not in expected:
        raise CoalaError(f"Guidance {name} is {found!r}; expected one of {', '.join(expected)}.")


def _number(name: str, found: Any, expected: str, fits: Callable[[float], bool]) -> None:
    if isinstance(found, bool) or not isinstance(found, int | float | np.number) or not fits(float(found)):
        raise CoalaError(f"Guidance {name} is {found!r}; expected {expected}.")


def _count(name: str, found: Any, least: int) -> None:
    if isinstance(found, bool) or not isinstance(found, int | np.integer) or found < least:
        raise CoalaError(f"Guidance {name} is {found!r}; expected a whole number of at least {least}.")


def _min_max(scores: Float64, valid: NDArray[np.bool_]) -> Float64:
    low = np.where(valid, scores, np.inf).min(-1, keepdims=True)
    high = np.where(valid, scores, -np.inf).max(-1, keepdims=True)
    # Scores equal up to float32 rounding would otherwise be blown up to 0 and 1.
    floor = 4 * np.finfo(np.float32).eps * np.maximum(np.abs(low), np.abs(high))
    apart = high - low > floor
    return np.where(apart, (scores - low) / np.where(apart, high - low, 1.0), 0.0)


def _raw(scores: Float64, valid: NDArray[np.bool_]) -> Float64:
    return scores


RULES: Mapping[Rule, Callable[[Float64, NDArray[np.bool_]], Float64]] = {"min-max": _min_max, "raw": _raw}


def reweight(log_probs: Float64, scores: NDArray[Any], strength: float, rule: Rule = "min-max") -> Float64:
    """Log-probabilities proportional to ``p * exp(strength * score)`` over the last axis (candidates), in float64.

    ``log_probs`` and ``scores`` (..., k); a candidate of log-probability -inf does not take part. Strength 0 gives the
    normalised base distribution back.
    """
    valid = np.isfinite(log_probs)
    tilt = RULES[rule](np.asarray(scores, dtype=np.float64), valid)
    weights = np.where(valid, log_probs + strength * np.where(valid, tilt, 0.0), -np.inf)
    top = weights.max(-1, keepdims=True)
    total: Float64 = weights - top - np.log(np.exp(weights - top).sum(-1, keepdims=True))
    return total
