"""Counts and times in Prometheus's text format (version 0.0.4); knows nothing of what is counted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

Labels = tuple[tuple[str, str], ...]
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Counter:
    """A sum that only grows, by labels."""

    kind = "counter"

    def __init__(self, name: str, about: str) -> None:
        self.name, self.about = name, about
        self._values: dict[Labels, float] = defaultdict(float)

    def add(self, amount: float = 1.0, **labels: str) -> None:
        self._values[tuple(sorted(labels.items()))] += amount

    @property
    def total(self) -> float:
        return sum(self._values.values())

    def lines(self) -> list[str]:
        return [_line(self.name, labels, value) for labels, value in sorted(self._values.items())]


class Gauge:
    """A number as it is when it is asked for."""

    kind = "gauge"

    def __init__(self, name: str, about: str, read: Callable[[], float]) -> None:
        self.name, self.about, self._read = name, about, read

    def lines(self) -> list[str]:
        return [_line(self.name, (), self._read())]


class Histogram:
    """How many observations were at most each of ``bounds``, their number and sum, by labels."""

    kind = "histogram"

    def __init__(self, name: str, about: str, bounds: Sequence[float] = SECONDS) -> None:
        self.name, self.about, self.bounds = name, about, tuple(bounds)
        self._counts: dict[Labels, list[int]] = {}
        self._sums: dict[Labels, float] = defaultdict(float)

    def observe(self, value: float, **labels: str) -> None:
        key = tuple(sorted(labels.items()))
        counts = self._counts.setdefault(key, [0] * (len(self.bounds) + 1))
        for place, bound in enumerate(self.bounds):
            counts[place] += value <= bound
        counts[-1] += 1
        self._sums[key] += value

    def lines(self) -> list[str]:
        found = []
        for labels, counts in sorted(self._counts.items()):
            for bound, count in zip((*map(_number, self.bounds), "+Inf"), counts, strict=True):
                found.append(_line(f"{self.name}_bucket", (*labels, ("le", bound)), count))
            found.append(_line(f"{self.name}_sum", labels, self._sums[labels]))
            found.append(_line(f"{self.name}_count", labels, counts[-1]))
        return found


Metric = Counter | Gauge | Histogram


def exposition(metrics: Sequence[Metric]) -> str:
    """All metrics as Prometheus reads them."""
    lines: list[str] = []
    for metric in metrics:
        lines += [f"# HELP {metric.name} {metric.about}", f"# TYPE {metric.name} {metric.kind}", *metric.lines()]
    return "\n".join(lines) + "\n"


def _line(name: str, labels: Labels, value: float) -> str:
    inside = ",".join(f'{key}="{text.translate(ESCAPES)}"' for key, text in labels)
    return f"{name}{{{inside}}} {_number(value)}" if inside else f"{name} {_number(value)}"


ESCAPES: Mapping[int, str] = {ord("\\"): r"\\", ord('"'): r"\"", ord("\n"): r"\n"}


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))
