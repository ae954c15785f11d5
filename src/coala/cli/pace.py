"""How long a stage has taken and how long it will: an estimate only where there is something to go by.

Knows numbers and a clock; nothing of terminals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

# No estimate before so many seconds and so large a share of what was left to do.
LEAST_SECONDS, LEAST_SHARE = 2.0, 0.01


@dataclass
class _Stage:
    began: float
    measured_from: float
    at_start: float
    done: float
    total: float | None


class Pace:
    """The pace of stages. A stage's clock starts with its first report, which comes before the first work.

    What is done at the first report was done before, by a run that is resumed: it tells nothing of the pace. Neither
    does what comes before the total is known: loading a model, compiling.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._stages: dict[str, _Stage] = {}

    def report(self, stage: str, done: float, total: float | None) -> None:
        """``done`` of ``total`` units (None: nobody knows)."""
        now = self._clock()
        found = self._stages.get(stage)
        if found is None or done < found.done or (total != found.total and found.total is not None):
            # Another total is another work under the same name; one that was not known is not.
            self._stages[stage] = _Stage(now, now, done, done, total)
            return
        if found.total is None and total is not None:
            found.measured_from, found.at_start = now, done
        found.done, found.total = done, total

    def spent(self, stage: str) -> float:
        """Seconds since the stage's first report."""
        return self._clock() - self._stages[stage].began

    def left(self, stage: str) -> float | None:
        """Seconds that are left at the pace so far; None if that is not known yet."""
        found = self._stages[stage]
        if found.total is None or found.total <= 0:
            return None
        to_do, made = found.total - found.at_start, found.done - found.at_start
        if found.done >= found.total:
            return 0.0
        spent = self._clock() - found.measured_from
        if made <= 0 or spent < LEAST_SECONDS or made < LEAST_SHARE * to_do:
            return None
        return spent * (found.total - found.done) / made

    def told(self, stage: str) -> str:
        """``12 s``, and ``, about 40 s left`` once that is known."""
        left, found = self.left(stage), self._stages[stage]
        if found.total is not None and found.done >= found.total:
            return lasting(self.spent(stage))
        return f"{lasting(self.spent(stage))}" + ("" if left is None else f", about {lasting(left)} left")


def lasting(seconds: float) -> str:
    """Seconds for people, never fewer than are left: ``1 s``, ``2 min``, ``2 min 5 s``, ``3 h 10 min``."""
    whole = max(0, -int(-seconds // 1))
    if whole < 60:
        return f"{whole} s"
    large, small, unit = (whole // 60, whole % 60, "s") if whole < 3600 else (whole // 3600, whole % 3600 // 60, "min")
    return f"{large} {'min' if unit == 's' else 'h'}" + (f" {small} {unit}" if small else "")
