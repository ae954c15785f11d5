"""Remaining time: estimated from work done since the start, by a clock of the test's own; none where none is known."""

from __future__ import annotations

import gc
import re
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coala.cli.output import EVERY, insistent, progress_lines
from coala.cli.pace import LEAST_SECONDS, LEAST_SHARE, Pace, lasting


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@given(
    st.floats(0, 0.9),
    st.lists(st.tuples(st.floats(0.001, 500), st.floats(0.0001, 0.4)), min_size=1, max_size=20),
)
def test_what_is_left_follows_from_what_was_done_since_the_start(
    before: float, steps: list[tuple[float, float]]
) -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.report("s", before, 1.0)
    assert pace.left("s") is None
    done = before
    for seconds, part in steps:
        clock.now += seconds
        done = min(1.0, done + part)
        pace.report("s", done, 1.0)
        left, spent = pace.left("s"), clock.now - 1000.0
        if done >= 1.0:
            assert left == 0.0
        elif spent < LEAST_SECONDS or done - before < LEAST_SHARE * (1 - before):
            assert left is None
        else:
            assert left == pytest.approx(spent * (1 - done) / (done - before))
            assert left > 0
            assert not re.search(r"\b0 s left", pace.told("s"))


def test_resumed_work_tells_nothing_of_the_pace() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.report("features", 800, 1000)
    clock.now += 100
    pace.report("features", 850, 1000)
    assert pace.left("features") == pytest.approx(300)


def test_what_comes_before_the_total_is_known_tells_nothing_of_the_pace() -> None:
    """Loading and compiling: a fit whose first of twelve steps took 80 seconds is not 15 minutes from its end."""
    clock = Clock()
    pace = Pace(clock)
    pace.report("head", 0, None)
    clock.now += 80
    pace.report("head", 1, 12)
    assert pace.left("head") is None
    clock.now += 3
    pace.report("head", 2, 12)
    assert pace.left("head") == pytest.approx(30)
    assert pace.spent("head") == pytest.approx(83)


def test_another_total_is_another_work() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.report("s", 0, 10)
    clock.now += 50
    pace.report("s", 5, 10)
    pace.report("s", 0, 99)
    assert (pace.left("s"), pace.spent("s")) == (None, 0.0)


@pytest.mark.parametrize("total", [None, 0])
def test_without_a_total_nothing_is_foretold(total: float | None) -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.report("s", 0, total)
    clock.now += 60
    pace.report("s", 0, total)
    assert "left" not in pace.told("s")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.0, "0 s"), (0.2, "1 s"), (59.1, "1 min"), (125.0, "2 min 5 s"), (11400.0, "3 h 10 min")],
)
def test_durations_are_rounded_up(seconds: float, said: str) -> None:
    assert lasting(seconds) == said


def test_lines_come_at_the_start_at_the_end_and_now_and_then() -> None:
    clock, lines = Clock(), []
    show = progress_lines(lines.append, clock)
    for step in range(101):
        show("stage", step, 100, f"{step} of 100")
        clock.now += 1.0
    show("stage", 100, 100)
    assert len(lines) == 2 + 99 // round(EVERY)
    assert lines[0].split() == ["stage", "0%", "0", "s", "0", "of", "100"]
    assert "left" not in lines[0]
    assert "about 1 min 35 s left" in lines[1]
    assert lines[-1].split()[:2] == ["stage", "100%"]
    assert not any(re.search(r"\b0 s left", line) for line in lines)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_ctrl_c_that_a_finaliser_swallows_comes_at_the_next_report() -> None:
    class Finalised:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    told: list[float] = []
    before = signal.getsignal(signal.SIGINT)
    assert before is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt), insistent(lambda _, done, *rest: told.append(done)) as show:  # noqa: PT012
        show("stage", 0, 9)
        Finalised()
        gc.collect()
        told.append(1)  # nobody was interrupted
        show("stage", 2, 9)
    assert told == [0, 1]
    assert signal.getsignal(signal.SIGINT) is before
