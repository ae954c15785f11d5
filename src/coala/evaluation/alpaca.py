"""AlpacaEval 2 from saved annotations: preferences, raw win rates and lengths. Length control is in `length_control`.

Output 1 is the baseline's and output 2 the model's; a preference lies in [1, 2] and 2 says that the model is surely
better. Percentages are in [0, 100], as the leaderboard prints them. Knows nothing of judges or of models.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coala.evaluation.rows import FileRow, as_number, read_rows, shown
from coala.evaluation.win_rates import place_alone, place_alone_once
from coala.statistics.intervals import Float, bounded_mean, share_estimate, void
from coala.values import CoalaError, Estimate

TIE = 1.5
FEW_ROWS = 100  # below this the calibration rows outweigh the model's own in the length-controlled fit


@dataclass(frozen=True, eq=False)
class Annotations:
    """One model against one baseline, rows in the order of the file, which length control depends on.

    ``preference`` (n,) is in [1, 2], nan where the judge gave none; ``model_length`` and ``baseline_length`` (n,) count
    characters; ``instruction`` (n,) names the instruction, "" where the file has none. ``nothing_said`` tells why the
    preferences say nothing of the outputs, where the rows show that (:mod:`coala.evaluation.win_rates`).
    """

    model: str
    baseline: str
    preference: Float
    model_length: Float
    baseline_length: Float
    instruction: tuple[str, ...]
    nothing_said: str = ""

    def __post_init__(self) -> None:
        lengths = {len(self.preference), len(self.model_length), len(self.baseline_length), len(self.instruction)}
        if len(lengths) > 1:
            raise CoalaError(f"Annotations need columns of one length; found {sorted(lengths)}.")

    def __len__(self) -> int:
        return len(self.preference)

    @property
    def repeated(self) -> int:
        """Rows whose instruction was there before."""
        return sum(count - 1 for name, count in Counter(self.instruction).items() if name)

    @property
    def groups(self) -> list[str]:
        """A name per instruction, for intervals; rows without an instruction stand alone."""
        return [name or f"row {i}" for i, name in enumerate(self.instruction)]


@dataclass(frozen=True)
class WinRate:
    """The raw figures of the leaderboard. Estimates, ``standard_error`` and ``discrete`` are in percent.

    ``n_total`` counts rows with a preference, ``n_missing`` rows without. ``average_length`` is truncated.
    """

    model: str
    baseline: str
    win_rate: Estimate
    standard_error: float
    discrete: float
    excluding_ties: Estimate
    n_wins: int
    n_wins_base: int
    n_draws: int
    n_total: int
    n_missing: int
    average_length: int
    baseline_length: float
    remarks: tuple[str, ...]


def preference_from_logprobs(
    top_logprobs: Sequence[tuple[str, float]] | None, swapped: bool, tokens: tuple[str, str] = ("m", "M")
) -> float | None:
    """The preference in [1, 2] of a one-token verdict with its most likely tokens and their log-probabilities (nats).

    p(m) = exp(l_m) / (exp(l_m) + exp(l_M)) is the judge's belief in the output it saw first; a token that is not among
    them has probability 0. Shown in order, output 1 first, the preference is 2 - p(m); ``swapped``, it is 1 + p(m).
    None when neither token is there; 1.5, a tie, when the judge gave nothing at all, which is how such rows are stored.
    """
    if not top_logprobs:
        return TIE
    # A token that is listed twice (differing in bytes only) has the sum of the two.
    found = [[value for token, value in top_logprobs if token == wanted] for wanted in tokens]
    first, second = (float(np.logaddexp.reduce(values)) if values else -math.inf for values in found)
    if not math.isfinite(max(first, second)):
        return None
    p = math.exp(-float(np.logaddexp(0.0, second - first)))
    return 1 + p if swapped else 2 - p


def read_annotations(path: Path | str) -> Annotations:
    """Annotations in the published form, JSON Lines or one list, plain or gzipped.

    A row has ``preference`` (null for none; or ``top_logprobs`` with ``judge_saw_swapped_order``), the outputs as
    ``output_1``, ``output_2`` or their lengths as ``len_1``, ``len_2``, ``generator_1``, ``generator_2`` and
    ``instruction``; rows judged twice may have ``preference_by_order``, with the model's output shown second and first.
    CoalaError for anything else, or for more than one model or baseline.
    """
    rows = read_rows(path)
    names: list[str] = []
    for field in ("generator_2", "generator_1"):
        names.append(rows[0].label(field))
        for row in rows:
            if row.label(field) != names[-1]:
                mend = "give one model and one baseline per file"
                raise row.fault(field, shown(row.get(field)), f"{shown(names[-1])} as in the first row", mend)
    return Annotations(
        model=names[0],
        baseline=names[1],
        preference=np.array([_preference(row) for row in rows]),
        model_length=np.array([_length(row, "2") for row in rows]),
        baseline_length=np.array([_length(row, "1") for row in rows]),
        instruction=tuple(row.text("instruction") if row.get("instruction") is not None else "" for row in rows),
        nothing_said=_nothing_said(rows),
    )


def read_output_lengths(path: Path | str) -> Float:
    """Characters of every ``output`` of a model's output file (n,); published average lengths are over all of them."""
    return np.array([len(row.text("output")) for row in read_rows(path)], dtype=np.float64)


def win_rate(annotations: Annotations, output_lengths: Float | None = None) -> WinRate:
    """Raw win rate 100 mean(preference - 1), its standard error 100 sd / sqrt(n), and the counts behind it.

    The discrete rate rounds preferences first, a tie one half. Preferences that say nothing of the outputs have no
    rates. Without ``output_lengths``, the model's lengths over its
    whole output file, the average is over the annotated rows.
    """
    known = np.isfinite(annotations.preference)
    y = annotations.preference[known] - 1
    groups = [name for name, there in zip(annotations.groups, known, strict=True) if there]
    n = len(y)
    wins, losses = int((y > 0.5).sum()), int((y < 0.5).sum())
    decided = y != 0.5
    excluding = share_estimate(
        y[decided] > 0.5, [g for g, kept in zip(groups, decided, strict=True) if kept], "wins among decided rows"
    )
    remarks = _remarks(annotations, n, output_lengths)
    lengths = annotations.model_length if output_lengths is None else output_lengths
    value = bounded_mean(100 * y, groups, of=100.0)
    if why := annotations.nothing_said:
        value, excluding = in_percent(void("win rate", n, why)), void("wins among decided rows", n, why)
    return WinRate(
        model=annotations.model,
        baseline=annotations.baseline,
        win_rate=value,
        standard_error=math.nan if why else standard_error(y),
        discrete=100 * (wins + (n - wins - losses) / 2) / n if n and not why else math.nan,
        excluding_ties=in_percent(excluding),
        n_wins=wins,
        n_wins_base=losses,
        n_draws=n - wins - losses,
        n_total=n,
        n_missing=len(annotations) - n,
        average_length=int(lengths.mean()) if len(lengths) else 0,
        baseline_length=float(annotations.baseline_length.mean()) if len(annotations) else math.nan,
        remarks=remarks,
    )


def standard_error(shares: Float) -> float:
    """100 sd(shares) / sqrt(n) with n - 1 below the sum: the published standard error. nan for fewer than two."""
    n = len(shares)
    return 100 * float(shares.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan


def in_percent(share: Estimate) -> Estimate:
    """An estimate in [0, 1] as a percentage."""
    return Estimate(100 * share.value, 100 * share.low, 100 * share.high, share.n, share.method)


def instruction_key(instruction: str) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of an instruction, by which difficulty files name it."""
    return hashlib.sha256(instruction.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _remarks(annotations: Annotations, n: int, output_lengths: Float | None) -> tuple[str, ...]:
    remarks = []
    if annotations.nothing_said:
        remarks.append(f"{annotations.nothing_said}; the win rate says nothing")
    if missing := len(annotations) - n:
        remarks.append(f"{missing} rows have no preference and are left out of the win rate")
    if annotations.repeated:
        remarks.append(f"{annotations.repeated} rows repeat an instruction: all are kept, as one group of the interval")
    if empty := int((annotations.model_length == 0).sum()):
        remarks.append(f"{empty} outputs of the model are empty")
    if output_lengths is not None and len(output_lengths) < len(annotations):
        remarks.append(f"{len(output_lengths)} outputs for {len(annotations)} annotated rows: is it the whole file?")
    return tuple(remarks)


def _preference(row: FileRow) -> float:
    if row.get("preference") is not None:
        value = row.value("preference", low=0, high=2)
        if 0 < value < 1:
            raise row.fault("preference", f"{value:g}", "a number from 1 to 2, or 0 for a tie", "correct the row")
        return TIE if value == 0 else value
    if "top_logprobs" not in row.fields:
        if "preference" not in row.fields:
            row.value("preference")  # raises: neither is there
        return math.nan
    top = row.fields["top_logprobs"]
    if not top and isinstance(top, list | None):
        return TIE
    found = preference_from_logprobs(_logprobs(row, top), row.flag("judge_saw_swapped_order"))
    return math.nan if found is None else found


def _nothing_said(rows: Sequence[FileRow]) -> str:
    """Why the preferences of all rows follow the place alone, if they do."""
    twice: list[tuple[float, float]] = []
    once: tuple[list[float], list[float]] = ([], [])
    for row in rows:
        value = _preference(row)
        if math.isnan(value):
            continue
        both = row.get("preference_by_order")
        if isinstance(both, list) and len(both) == 2 and None not in map(as_number, both):
            twice.append((2 - float(both[0]), float(both[1]) - 1))
        elif isinstance(row.get("judge_saw_swapped_order"), bool):
            swapped = row.flag("judge_saw_swapped_order")
            once[swapped].append(value - 1 if swapped else 2 - value)
    if twice:
        return place_alone(*zip(*twice, strict=True)) if not any(once) else ""
    return place_alone_once(*once)


def _logprobs(row: FileRow, top: Any) -> list[tuple[str, float]]:
    pairs = []
    for entry in top if isinstance(top, list) else (top,):
        parts = [entry.get("token"), entry.get("logprob")] if isinstance(entry, dict) else entry
        value = as_number(parts[1]) if isinstance(parts, list) and len(parts) == 2 else None
        if value is None or not isinstance(parts[0], str):
            raise row.fault("top_logprobs", shown(entry), "a list of [token, log-probability]", "correct the row")
        pairs.append((parts[0], value))
    return pairs


def _length(row: FileRow, side: str) -> float:
    if row.get(f"output_{side}") is not None or (row.get(f"len_{side}") is None and f"output_{side}" in row.fields):
        return float(len(row.text(f"output_{side}")))
    return row.value(f"len_{side}", f"output_{side}", low=0, high=1e9)
