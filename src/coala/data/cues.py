"""How much of the preference can be told without reading: length, punctuation, first words.

Alternating pairs can be told apart by place alone (a tutor asks first and praises afterwards), so this is looked at
before anything is learnt from them. Knows pairs and nothing of files.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from coala.values import Estimate, Pair

Float = NDArray[np.float64]
Z95 = 1.959963984540054
FOLDS = 2

_CUES: dict[str, Callable[[str], float]] = {
    "length": lambda reply: math.log1p(len(reply)),
    "question mark": lambda reply: float("?" in reply),
    "exclamation mark": lambda reply: float("!" in reply),
    "digits": lambda reply: float(any(c.isdigit() for c in reply)),
}


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
    how = "two-fold accuracy, a tie one half, clustered by group"
    result = {name: clustered_share(_told(column[:, None], fold), groups, how) for name, column in columns.items()}
    result["all together"] = clustered_share(_told(np.stack(list(columns.values()), axis=1), fold), groups, how)
    return result


def share(wins: float, n: float, method: str = "Wilson interval", effective: float | None = None) -> Estimate:
    """A share with its 95 % Wilson interval; ``effective`` is the sample size that counts when pairs are clustered."""
    if n <= 0:
        return Estimate(0.5, 0.0, 1.0, 0, method)
    p, m = wins / n, effective or n
    centre = (p + Z95**2 / (2 * m)) / (1 + Z95**2 / m)
    half = Z95 / (1 + Z95**2 / m) * math.sqrt(p * (1 - p) / m + Z95**2 / (4 * m * m))
    return Estimate(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)), int(n), method)


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
            margin = scaled[test] @ _logistic(train)
            told[test] = np.where(np.abs(margin) < 1e-9, 0.5, margin > 0)
    return told


def _logistic(x: Float, ridge: float = 1.0, steps: int = 12) -> Float:
    """argmin_w sum_i log(1 + exp(-x_i . w)) + ridge |w|^2 / 2 by Newton's method, x (n, d), w (d,)."""
    w = np.zeros(x.shape[1])
    for _ in range(steps):
        p = 1 / (1 + np.exp(np.clip(x @ w, -30, 30)))
        hessian = (x * (p * (1 - p))[:, None]).T @ x + ridge * np.eye(len(w))
        w = w + np.linalg.solve(hessian, x.T @ p - ridge * w)
    return w


def clustered_share(told: Float, groups: Sequence[str], method: str) -> Estimate:
    """The mean of ``told`` (n,) in [0, 1] with a Wilson interval at the sample size that clustering by group leaves."""
    if not len(told):
        return share(0, 0, method)
    n, p = len(told), float(told.mean())
    sums: dict[str, float] = defaultdict(float)
    for value, group in zip(told, groups, strict=True):
        sums[group] += value - p
    variance = sum(s * s for s in sums.values()) / n**2
    effective = min(float(n), p * (1 - p) / variance) if variance > 0 else float(len(sums))
    return share(n * p, n, method, max(1.0, effective))
