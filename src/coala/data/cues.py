"""How much of the preference can be told without reading: length, punctuation, first words.

Alternating pairs can be told apart by place alone (a tutor asks first and praises afterwards), so this is looked at
before anything is learnt from them. Knows pairs and nothing of files.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coala.statistics.intervals import Float, share_estimate
from coala.statistics.logistic import fit_logistic
from coala.values import Estimate, Pair

FOLDS = 2

_CUES: dict[str, Callable[[str], float]] = {
    "length": lambda reply: math.log1p(len(reply)),
    "question mark": lambda reply: float("?" in reply),
    "exclamation mark": lambda reply: float("!" in reply),
    "digits": lambda reply: float(any(c.isdigit() for c in reply)),
}

# Those, and markup: what a classifier that does not read may look at in a reply by itself.
SURFACE: dict[str, Callable[[str], float]] = {
    **_CUES,
    "words": lambda reply: math.log1p(len(reply.split())),
    "lines": lambda reply: math.log1p(reply.count("\n")),
    "list items": lambda reply: math.log1p(len(re.findall(r"(?m)^\s*(?:[-*+]|\d+[.)])\s", reply))),
    "headings": lambda reply: math.log1p(len(re.findall(r"(?m)^#{1,6}\s", reply))),
    "bold": lambda reply: math.log1p(len(re.findall(r"\*\*[^*\n]+\*\*", reply))),
    "code": lambda reply: float("`" in reply),
    "capitals": lambda reply: sum(c.isupper() for c in reply) / max(1, len(reply)),
}


@dataclass(frozen=True)
class CueRule:
    """score(reply) = sum of ``weights`` times the cues of :data:`SURFACE` by name; made by :func:`fit_cues`."""

    weights: Mapping[str, float]

    def score(self, reply: str) -> float:
        return sum(weight * SURFACE[name](reply) for name, weight in self.weights.items())

    def margins(self, pairs: Sequence[Pair]) -> Float:
        """Score differences chosen - rejected (n,)."""
        return np.array([self.score(pair.chosen) - self.score(pair.rejected) for pair in pairs])


def fit_cues(pairs: Sequence[Pair], *, l2: float = 1.0) -> CueRule:
    """The logistic rule on differences of the cues of ``pairs``, each in units of its own deviation.

    ``l2`` penalises the weights in those units; a cue on which no pair differs has none.
    """
    columns = np.array([[cue(p.chosen) - cue(p.rejected) for cue in SURFACE.values()] for p in pairs]).reshape(
        len(pairs), len(SURFACE)
    )
    scale = np.sqrt((columns**2).mean(axis=0)) if len(pairs) else np.zeros(len(SURFACE))
    used = scale > 0
    found = fit_logistic(columns[:, used] / scale[used], l2=l2).coefficients / scale[used]
    return CueRule(dict(zip(np.array(list(SURFACE))[used].tolist(), found.tolist(), strict=True)))


def position_cues(pairs: Sequence[Pair]) -> dict[str, Estimate]:
    """Accuracy with which a cue alone tells chosen from rejected, by cue; ``all together`` joins them.

    Two-fold by group: which way a cue points (and, for the first word, how much each word says) is learnt on one half
    of the groups and counted on the other; pairs a cue cannot tell apart count one half. 0.5 is chance, and an honest
    preference is still well above what the cues give. Empty for no pairs; chance for a single group.
    """
    if not pairs:
        return {}
    fold = np.array([hashlib.sha256(pair.group.encode("utf-8", "replace")).digest()[0] % FOLDS for pair in pairs])
    columns = {name: np.array([cue(pair.chosen) - cue(pair.rejected) for pair in pairs]) for name, cue in _CUES.items()}
    columns["first word"] = _first_words(pairs, fold)
    groups = [pair.group for pair in pairs]
    how = "two-fold accuracy, a tie one half"
    result = {name: share_estimate(_told(column[:, None], fold), groups, how) for name, column in columns.items()}
    result["all together"] = share_estimate(_told(np.stack(list(columns.values()), axis=1), fold), groups, how)
    return result


def _first_words(pairs: Sequence[Pair], fold: NDArray[np.int64]) -> Float:
    """Log-odds of the first words, learnt on the other fold, chosen minus rejected, (n,)."""
    words = [(_first(pair.chosen), _first(pair.rejected)) for pair in pairs]
    column = np.zeros(len(pairs))
    for held_out in range(FOLDS):
        counts: dict[str, list[float]] = defaultdict(lambda: [1.0, 1.0])
        for (good, bad), where in zip(words, fold, strict=True):
            if where != held_out:
                counts[good][0] += 1
                counts[bad][1] += 1
        odds = {word: math.log(a / b) for word, (a, b) in counts.items()}
        for k in np.flatnonzero(fold == held_out):
            column[k] = odds.get(words[k][0], 0.0) - odds.get(words[k][1], 0.0)
    return column


def _first(reply: str) -> str:
    words = reply.split(maxsplit=1)
    return words[0].lower().strip(".,!?:;\"'") if words else ""


def _told(columns: Float, fold: NDArray[np.int64]) -> Float:
    """1, 1/2 or 0 per pair: a logistic rule on the differences ``columns`` (n, d), fitted on the other fold."""
    told = np.full(len(columns), 0.5)
    scale = columns.std(axis=0)
    scaled = columns / np.where(scale > 0, scale, 1.0)
    for held_out in range(FOLDS):
        train, test = scaled[fold != held_out], fold == held_out
        if len(train):
            margin = scaled[test] @ fit_logistic(train, l2=1.0).coefficients
            told[test] = np.where(np.abs(margin) < 1e-9, 0.5, margin > 0)
    return told
