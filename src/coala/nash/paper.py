"""The synthetic experiment of the COMAL paper: every method on one intransitive game, noiseless and sampled.

Three answers, b beats a and c beats b with 0.9, a beats c with 0.8; Nash policy (4, 3, 4)/11; all methods start at
(0.2, 0.5, 0.3) with eta = 0.3 and tau = 0.1 and make 5000 proximal steps (Figures 1 and 2, Appendix G).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float64

from coala.nash.game import PreferenceGame
from coala.nash.selection import FixedPoint, selection_fixed_point
from coala.nash.solvers import Result, solve
from coala.statistics.intervals import mean_estimate
from coala.values import Estimate

PAPER_GAME = PreferenceGame([[0.5, 0.1, 0.8], [0.9, 0.5, 0.1], [0.2, 0.9, 0.5]], labels=("a", "b", "c"))
PAPER_START = (0.2, 0.5, 0.3)
STEPS = 5000
INNER_STEPS = 25
TAIL = 0.2  # share of the updates over which the last gaps of a noisy run are averaged


@dataclass(frozen=True)
class Entry:
    """A method of the study: its name and what ``solve`` is told; ``also`` the names of methods equal to it."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    also: str = ""
    can_sample: bool = True
    steps: int = 1  # proximal steps of an update


ENTRIES = (
    Entry("Iterative DPO", {"method": "dpo"}),
    Entry("Iterative IPO", {"method": "ipo"}, also="MWU, DRO, REBEL without noise"),
    Entry("SPPO", {"method": "sppo"}),
    Entry("INPO", {"method": "inpo"}),
    Entry("COMAL with INPO", {"inner": "inpo", "inner_steps": INNER_STEPS}, steps=INNER_STEPS),
    Entry("COMAL with Reg-SPPO", {"inner": "sppo", "inner_steps": INNER_STEPS}, steps=INNER_STEPS),
    Entry("COMAL with Reg-DRO", {"inner": "dro", "inner_steps": INNER_STEPS}, also="Reg-REBEL", steps=INNER_STEPS),
    Entry("COMAL, inner games exact", {"inner": "exact"}, can_sample=False, steps=INNER_STEPS),
    Entry("Mirror-Prox, eta 1", {"method": "mirror_prox", "eta": 1.0}, steps=2),
    Entry("OMWU, eta 1", {"method": "omwu", "eta": 1.0}, steps=2),
)


@dataclass(frozen=True, eq=False)
class StudyRow:
    """One method: its run or its runs over seeds, and for sampled ones the mean gap over the last fifth of updates."""

    entry: Entry
    runs: tuple[Result, ...]
    tail_gap: Estimate | None = None

    @property
    def first(self) -> Result:
        return self.runs[0]


@dataclass(frozen=True, eq=False)
class PaperStudy:
    """``noiseless`` and ``sampled`` rows; the sampled ones drew ``pairs`` pairs at each proximal step."""

    noiseless: tuple[StudyRow, ...]
    sampled: tuple[StudyRow, ...]
    pairs: int
    seeds: int


def run_study(
    *, pairs: int = 10_000, seeds: int = 5, on_run: Callable[[int, int, str], None] | None = None
) -> PaperStudy:
    """Run every method without noise and with ``pairs`` labelled pairs per step from each of ``seeds`` seeds."""
    sampled = [entry for entry in ENTRIES if entry.can_sample]
    total = len(ENTRIES) + seeds * len(sampled)
    done = 0

    def run(entry: Entry, **more: Any) -> Result:
        nonlocal done
        result = solve(PAPER_GAME, PAPER_START, outer=STEPS // entry.steps, **entry.settings, **more)
        done += 1
        if on_run is not None:
            on_run(done, total, entry.name)
        return result

    noiseless = tuple(StudyRow(entry, (run(entry),)) for entry in ENTRIES)
    noisy = []
    for entry in sampled:
        runs = tuple(run(entry, pairs_per_step=pairs, seed=seed) for seed in range(seeds))
        noisy.append(StudyRow(entry, runs, tail_estimate(np.array([tail_gap(result) for result in runs]))))
    return PaperStudy(noiseless, tuple(noisy), pairs, seeds)


def tail_gap(result: Result) -> float:
    """Mean gap over the last fifth of the updates: what a noisy method hovers at."""
    gaps = result.history.gap
    return float(gaps[-max(1, round(TAIL * (len(gaps) - 1))) :].mean())


def tail_estimate(values: Float64[np.ndarray, "seeds"]) -> Estimate:
    """Mean over seeds with Student's t interval; the whole range [0, 1] of a gap for a single seed."""
    found = mean_estimate(values)
    how = ", t interval 95 % over seeds" if found.n > 1 else "; one seed, so no interval"
    about = f"gap, mean of the last fifth of updates{how}"
    return Estimate(found.value, max(0.0, found.low), min(1.0, found.high), found.n, about)


def first_below(result: Result, gap: float) -> int | None:
    """The first update from which the gap stays at most ``gap``; None if it does not."""
    above = np.flatnonzero(result.history.gap > gap)
    first = int(above[-1]) + 1 if len(above) else 0
    return first if first < len(result.history) else None


FIVE_ANSWERS = PreferenceGame(
    [
        [0.5, 0.1, 0.498661, 0.688482, 0.510017],
        [0.9, 0.5, 0.23202, 0.118171, 0.886251],
        [0.501339, 0.76798, 0.5, 0.673177, 0.253998],
        [0.311518, 0.881829, 0.326823, 0.5, 0.488872],
        [0.489983, 0.113749, 0.746002, 0.511128, 0.5],
    ]
)  # Nash policy (1, 2, 3, 4, 5)/15, to 1e-5


def run_selections() -> dict[tuple[str, int, bool], FixedPoint]:
    """Where best-versus-worst pairs lead on two games: by game, number of candidates and whether the judge is hard."""
    cases = (("three answers (the paper's)", PAPER_GAME, (2, 3, 5)), ("five answers", FIVE_ANSWERS, (2, 3, 4, 5)))
    return {
        (name, candidates, hard): selection_fixed_point(
            game, PAPER_START if game is PAPER_GAME else None, candidates=candidates, hard=hard
        )
        for name, game, numbers in cases
        for candidates in numbers
        for hard in (False, True)
    }
