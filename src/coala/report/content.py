"""The content of a report as plain JSON values, and how single numbers are worded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coala.values import CoalaError

UNKNOWN = "\N{EN DASH}"
KEYS = (
    *(
        "title",
        "command",
        "created",
        "settings",
        "summary",
        "data_findings",
        "reads",
        "head",
        "curves",
        "layers",
        "path",
        "scores",
    ),
    *("reliability", "by_length", "length_unit", "costs", "win_rates", "perplexity", "samples", "evaluations"),
)


def plain(content: Mapping[str, Any]) -> dict[str, Any]:
    """``content`` as JSON can hold it: dataclasses and arrays unfolded, numbers that are not finite as ``None``."""
    unknown = sorted(set(content) - set(KEYS))
    if unknown:
        raise CoalaError(f"A report has no part {', '.join(map(repr, unknown))}; its parts are {', '.join(KEYS)}.")
    return {key: _plain(value) for key, value in content.items() if value is not None}


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Sequence | set | frozenset):
        return [_plain(inner) for inner in (value if isinstance(value, Sequence) else sorted(value, key=str))]
    raise CoalaError(f"A report cannot hold a {type(value).__name__}; expected numbers, text, lists and mappings.")


class Interval:
    """An ESTIMATE of the content, with its ends at infinity when unknown; false when there is no value."""

    def __init__(self, estimate: Any) -> None:
        given: Mapping[str, Any] = estimate if isinstance(estimate, Mapping) else {}
        value = given.get("value")
        self.known = value is not None
        self.value = float(value) if value is not None else math.nan
        low, high = given.get("low"), given.get("high")
        self.low = float(low) if low is not None else -math.inf
        self.high = float(high) if high is not None else math.inf
        self.n = int(given.get("n") or 0)
        self.method = str(given.get("method") or "")

    def __bool__(self) -> bool:
        return self.known

    def above(self, level: float) -> bool:
        return self.known and self.low > level

    def below(self, level: float) -> bool:
        return self.known and self.high < level

    @property
    def bounded(self) -> bool:
        return self.known and math.isfinite(self.low) and math.isfinite(self.high)

    def percent(self, *, points: bool = False) -> str:
        """``72.5 % (64.1 to 79.6 %)``, or signed percentage points."""
        if not self.known:
            return "unknown"
        form, unit, last = ("+.1f", "points", "") if points else (".1f", "%", " %")
        ends = f"({100 * self.low:{form}} to {100 * self.high:{form}}{last})" if self.bounded else "(no interval)"
        return f"{100 * self.value:{form}} {unit} {ends}"

    def plain(self) -> str:
        """``10.31 (9.80 to 10.9)``."""
        if not self.known:
            return "unknown"
        ends = f"({number(self.low)} to {number(self.high)})" if self.bounded else "(no interval)"
        return f"{number(self.value)} {ends}"


def number(value: Any) -> str:
    """Four significant digits; a dash for what is unknown; anything else as text."""
    if value is None:
        return UNKNOWN
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}"


def seconds(value: Any) -> str:
    """Seconds as people say them: ``0.42 s``, ``38 s``, ``3 min 5 s``, ``2 h 10 min``."""
    if not isinstance(value, int | float):
        return UNKNOWN
    if value < 9.995:
        return f"{value:.2g} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(value / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def flops(value: Any) -> str:
    """FLOPs with a decimal prefix: ``1.57 TFLOP``."""
    return _scaled(value, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"))


def size(value: Any) -> str:
    """Bytes with a decimal prefix: ``1.93 GB``; of ``{host, device}`` each."""
    units = ("B", "kB", "MB", "GB", "TB")
    if isinstance(value, Mapping):
        return (
            ", ".join(f"{_scaled(v, units)} {'GPU' if k == 'device' else k}" for k, v in sorted(value.items()))
            or UNKNOWN
        )
    return _scaled(value, units)


def _scaled(value: Any, units: Sequence[str]) -> str:
    if not isinstance(value, int | float):
        return UNKNOWN
    step = 0
    # 999.5 would be worded 1000 (or 1e+03) of the smaller unit.
    while abs(value) >= 999.5 and step < len(units) - 1:
        value, step = value / 1000, step + 1
    return f"{value:.3g} {units[step]}" if abs(value) < 999.5 else f"{value:,.0f} {units[step]}"
