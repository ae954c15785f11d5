"""How single numbers are worded: estimates with their intervals, seconds, FLOPs and bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from coala.values import Estimate

UNKNOWN = "\N{EN DASH}"


class Interval:
    """An estimate, or its fields as JSON holds them, with its ends at infinity when unknown; false without a value."""

    def __init__(self, estimate: Estimate | Any) -> None:
        fields = vars(estimate) if isinstance(estimate, Estimate) else estimate
        given: Mapping[str, Any] = fields if isinstance(fields, Mapping) else {}
        value = given.get("value")
        self.known = value is not None and not math.isnan(value)
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

    @property
    def how(self) -> str:
        """``n = 240; Wilson 95 %``."""
        return f"n = {self.n:,}{'; ' if self.method else ''}{self.method}"

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


def bracketed(estimate: Estimate | Any, form: str = ".1f", scale: float = 100) -> str:
    """``72.5 [64.1, 79.6]`` for a table; the value alone if there is no interval, a dash if there is no value."""
    found = Interval(estimate)
    ends = f" [{scale * found.low:{form}}, {scale * found.high:{form}}]" if found.bounded else ""
    return f"{scale * found.value:{form}}{ends}" if found else UNKNOWN


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
