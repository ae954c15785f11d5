"""Arena-Hard with style held fixed: Bradley-Terry strengths and the effect of length and markup, fitted jointly.

Columns of a style are tokens, headers, list items and bold spans. Knows nothing of tokenizers: tokens are counted by
whoever writes the file, or by words as a stand-in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from coala.evaluation.arena import ANCHOR, BASE, SCALE, Battles
from coala.evaluation.rows import FileRow, as_number, read_rows, shown
from coala.settings import Board
from coala.statistics.intervals import Float, group_numbers, percentiles, resamples
from coala.statistics.logistic import fit_logistic, sigmoid
from coala.values import CoalaError, Estimate

COLUMNS = ("tokens", "headers", "lists", "bold")
PUBLISHED_ANCHOR = 1114.0  # where the board of 2024 put gpt-4-0314 under style control
_MARKUP = (
    re.compile(r"^#{1,6}\s", re.MULTILINE),
    re.compile(r"^[ \t]*(?:\d+\.|[-*+])\s", re.MULTILINE),
    re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__"),
)
_CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)


@dataclass(frozen=True, eq=False)
class StyleControlled:
    """Scores in percent by model, and the coefficient of every style column, in nats per standard deviation.

    ``ratings`` are on the scale of 400 points with the baseline at its anchor.
    """

    baseline: str
    scores: Mapping[str, Estimate]
    ratings: Mapping[str, float]
    coefficients: Mapping[str, float]


def style_of(text: str, tokens: int | None = None) -> Float:
    """Tokens, headers, list items and bold spans of a reply in Markdown (4,); code blocks have no markup.

    Without ``tokens`` words are counted in their place.
    """
    prose = _CODE.sub("", text)
    length = len(text.split()) if tokens is None else tokens
    return np.array([length, *(len(pattern.findall(prose)) for pattern in _MARKUP)], dtype=np.float64)


def read_styles(path: Path | str) -> dict[str, Float]:
    """Style by question from an answer file.

    ``question_id``, ``uid`` or ``question``; and ``conv_metadata`` or ``metadata`` with ``token_len``,
    ``header_count``, ``list_count`` and ``bold_count`` (numbers, or objects of numbers to be summed), else the reply as
    ``output`` or as the last of ``messages``, of which words are counted in place of tokens.
    """
    found: dict[str, Float] = {}
    for row in read_rows(path):
        question = row.label("question_id", "uid", "question")
        if question in found:
            raise row.fault("question", f"{shown(question)} again", "one answer per question", "delete one of them")
        found[question] = _style(row)
    return found


def style_differences(first: Float, second: Float, version: Board = "v2.0") -> Float:
    """Relative style of two replies (n, 4) before standardisation, each column in [-1, 1].

    v2.0: (t - t')/(t + t') for tokens; (a - b)/(a + b + 1) for markup per token, count / (tokens + 1). v0.1: the second
    form for all four counts as they are.
    """
    if version == "v0.1":
        return np.asarray((first - second) / (first + second + 1))
    length = first[:, :1] + second[:, :1]
    tokens = (first[:, :1] - second[:, :1]) / np.where(length > 0, length, 1.0)
    a, b = (side[:, 1:] / (side[:, :1] + 1) for side in (first, second))
    return np.hstack([tokens, (a - b) / (a + b + 1)])


def style_controlled(
    battles: Battles,
    first: Float,
    second: Float,
    baseline: str,
    *,
    version: Board = "v2.0",
    at: Literal["mean", "equal"] = "mean",
    columns: Sequence[str] = COLUMNS,
    draws: int = 100,
    seed: int = 0,
) -> StyleControlled:
    """Scores against ``baseline`` with the styles ``first`` and ``second`` (n, 4) of both sides of every battle fixed.

    logit P(first wins) = strength_first - strength_second + coefficients . z, with z the standardised differences of
    ``columns``, all fitted together. Standardising subtracts the mean, so the published score ("mean") is read at the
    average style difference of all battles in the file; "equal" reads it where both replies have the same style.
    v2.0 has no penalty and divides by the deviation with n - 1; v0.1 has an L2 penalty of 1/2 |.|^2 over every battle
    counted twice, the deviation with n and the anchor 1114. Intervals draw questions.
    """
    n = len(battles)
    _checked(battles, baseline, first, second, columns)
    # The style of a battle is that of its first side minus its second: turn every battle so that no baseline is first.
    turn = np.where(battles.first == baseline, -1.0, 1.0)
    picked = [COLUMNS.index(name) for name in columns]
    raw = style_differences(first, second, version)[:, picked] * turn[:, None]
    spread = raw.std(axis=0, ddof=1 if version == "v2.0" and n > 1 else 0)
    # A column that does not vary explains nothing: it is left at 0 rather than divided by 0.
    spread = np.where(spread > 0, spread, np.inf)
    z, equal = (raw - raw.mean(axis=0)) / spread, -raw.mean(axis=0) / spread
    names = [name for name in battles.models if name != baseline]
    X = np.column_stack([turn * ((battles.first == name) * 1.0 - (battles.second == name)) for name in names])
    y = np.where(turn > 0, battles.outcome, 1 - battles.outcome)
    design, k = np.hstack([X, z]), len(names)
    l2, anchor = 0.0, ANCHOR
    if version == "v0.1":
        # Upstream leaves the baseline's own column in and counts every battle twice. Its strengths are in units of
        # log 10, so the columns, and with them the penalty, are scaled by that.
        design = np.hstack([X, -X.sum(axis=1, keepdims=True), z])
        design[:, : k + 1] *= math.log(BASE)
        l2, anchor = 0.5, PUBLISHED_ANCHOR

    fit = fit_logistic(design, y, l2=l2)
    start = fit.coefficients

    def nats(found: Float) -> Float:
        """Strengths over the baseline's, then the styles' coefficients, (k + columns,)."""
        if version == "v2.0":
            return found
        return np.concatenate([math.log(BASE) * (found[:k] - found[k]), found[k + 1 :]])

    whole = nats(start)

    def scores(coefficients: Float) -> Float:
        level = coefficients[:k] + (float(equal @ coefficients[k:]) if at == "equal" else 0.0)
        return 100 * sigmoid(level)

    def again(weight: NDArray[np.intp]) -> Float:
        found = fit_logistic(design, y, weight.astype(np.float64), l2=l2, start=start, tolerance=1e-8)
        return nats(found.coefficients)

    values = scores(whole)
    question = group_numbers(battles.question, n)
    groups = int(question.max()) + 1
    low, high = np.full(k, -math.inf), np.full(k, math.inf)
    about, how = f"style-controlled ({version}, at {at} style)", "no interval"
    about += ", the limit, as no finite strengths fit best" if fit.separated else ""
    if draws > 0 and groups > 1:
        drawn = np.array([scores(again(times)) for times in resamples(question, draws, seed)])
        low, high = np.transpose([percentiles(of_model) for of_model in drawn.T])
        how = f"percentile bootstrap 95 % over {groups} questions ({draws} draws, seed {seed})"
    counts = [int(((battles.first == name) | (battles.second == name)).sum()) for name in names]
    return StyleControlled(
        baseline=baseline,
        scores={
            name: Estimate(float(values[i]), float(low[i]), float(high[i]), counts[i], f"{about}, {how}")
            for i, name in enumerate(names)
        },
        ratings={baseline: anchor}
        | {name: anchor + SCALE / math.log(BASE) * float(whole[i]) for i, name in enumerate(names)},
        coefficients=dict(zip(columns, map(float, whole[k:]), strict=True)),
    )


def _checked(battles: Battles, baseline: str, first: Float, second: Float, columns: Sequence[str]) -> None:
    for name, style in (("first", first), ("second", second)):
        if style.shape != (len(battles), len(COLUMNS)):
            raise CoalaError(
                f"The styles of the {name} side are {style.shape}; expected ({len(battles)}, {len(COLUMNS)}): "
                f"{', '.join(COLUMNS)} for every battle."
            )
        if not (np.isfinite(style).all() and (style >= 0).all()):
            raise CoalaError(
                f"The styles of the {name} side contain a value that is not a count; expected numbers from 0."
            )
    if not len(battles) or baseline not in battles.models:
        raise CoalaError(f"No battle has the baseline {shown(baseline)}. Fix: name a model in the file.")
    if unknown := [name for name in columns if name not in COLUMNS]:
        raise CoalaError(f"There is no style column {shown(unknown[0])}; expected some of {', '.join(COLUMNS)}.")


def _style(row: FileRow) -> Float:
    counts = row.get("conv_metadata", "metadata")
    if isinstance(counts, Mapping) and "token_len" in counts:
        names = ("token_len", "header_count", "list_count", "bold_count")
        return np.array([_count(row, name, counts.get(name)) for name in names])
    if row.get("messages") is None:
        return style_of(row.text("output"))
    said = row.fields["messages"]
    reply = said[-1].get("content") if isinstance(said, list) and said and isinstance(said[-1], dict) else None
    if isinstance(reply, dict):
        reply = reply.get("answer")
    if not isinstance(reply, str):
        raise row.fault("messages", shown(said), "a list that ends in the reply", "correct or delete the row")
    return style_of(reply)


def _count(row: FileRow, name: str, value: Any) -> float:
    parts = list(value.values()) if isinstance(value, Mapping) else [value]
    numbers = [as_number(part) for part in parts]
    if any(number is None or not 0 <= number <= 1e9 for number in numbers):
        raise row.fault(name, shown(value), "a count, or an object of counts", "correct or delete the row")
    return sum(number for number in numbers if number is not None)
