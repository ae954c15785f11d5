"""What the benchmarks of reward models have in common: items, their scores, the ranking that comes of them.

Pure values; knows no file and no formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from coala.statistics.intervals import Float, vector
from coala.statistics.scores import accuracy_of_margins
from coala.values import CoalaError, Estimate, Pair, Turn


@dataclass(frozen=True)
class Item:
    """One prompt with its right replies, ``chosen``, and its wrong ones, ``rejected``; what it counts in: ``subset``.

    Where a benchmark orders replies by style (RM-Bench), the order here is that one. Items of one ``group`` are not
    independent: those of one prompt where none is given. ``places`` says at which place, from 0, the file shows each
    of (*chosen, *rejected); it is empty where the file's order follows from the label.
    """

    id: str
    subset: str
    prompt: tuple[Turn, ...]
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    group: str = ""
    places: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.group:
            object.__setattr__(self, "group", "\n".join(f"{turn.role}: {turn.text}" for turn in self.prompt))

    @property
    def replies(self) -> tuple[str, ...]:
        """The right ones, then the wrong ones."""
        return (*self.chosen, *self.rejected)

    @classmethod
    def of_two(cls, id: str, subset: str, asked: str, replies: tuple[str, str], first: bool, group: str = "") -> Item:
        """Two replies in the order they are shown in, and whether the ``first`` is the right one."""
        right, wrong = replies if first else replies[::-1]
        return cls(id, subset, (Turn("user", asked),), (right,), (wrong,), group, (0, 1) if first else (1, 0))


@dataclass(frozen=True, eq=False)
class Scored:
    """Scores of n items, by columns: of the right replies (c_i,) and the wrong ones (r_i,), and what each item is."""

    chosen: tuple[Float, ...]
    rejected: tuple[Float, ...]
    subset: tuple[str, ...]
    group: tuple[str, ...]
    id: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.chosen)

    @cached_property
    def margins(self) -> tuple[Float, ...]:
        """score(chosen a) - score(rejected b) of each item, (c_i, r_i)."""
        return tuple(good[:, None] - bad[None, :] for good, bad in zip(self.chosen, self.rejected, strict=True))

    def of(self, places: Sequence[int]) -> Scored:
        """The items at ``places``."""
        return Scored(
            tuple(self.chosen[i] for i in places),
            tuple(self.rejected[i] for i in places),
            tuple(self.subset[i] for i in places),
            tuple(self.group[i] for i in places),
            tuple(self.id[i] for i in places),
        )

    def by_subset(self) -> dict[str, Scored]:
        """The items of each subset, subsets in alphabetical order."""
        places: dict[str, list[int]] = {}
        for i, name in enumerate(self.subset):
            places.setdefault(name, []).append(i)
        return {name: self.of(places[name]) for name in sorted(places)}

    def accuracy(self) -> Estimate:
        """Share of (right, wrong) comparisons that are ranked right, a tie wrong; comparisons of a prompt cluster."""
        flat, groups = self._flat()
        return accuracy_of_margins(flat, groups, ties="wrong")

    def ties(self) -> float:
        """Share of comparisons with equal scores."""
        flat, _ = self._flat()
        return float((flat == 0).mean()) if len(flat) else math.nan

    def _flat(self) -> tuple[Float, list[str]]:
        flat = np.concatenate([margin.ravel() for margin in self.margins]) if self.margins else np.zeros(0)
        return flat, [name for name, margin in zip(self.group, self.margins, strict=True) for _ in range(margin.size)]


@dataclass(frozen=True)
class Ranking:
    """What scores are worth on a benchmark: shares in [0, 1] with intervals.

    ``subsets`` as the file has them, ``sections`` as the benchmark sums them up, ``overall`` its headline: void unless
    every part of it is there. ``rows`` is the share of all comparisons that are ranked right and ``ties`` that of equal
    scores, which count as wrong: a constant scorer has accuracy 0 and ties 1. ``matrix`` (RM-Bench) is accuracy by
    style of the chosen reply (rows) and of the rejected one (columns).
    """

    subsets: Mapping[str, Estimate]
    sections: Mapping[str, Estimate]
    overall: Estimate
    rows: Estimate
    ties: float
    remarks: tuple[str, ...] = ()
    matrix: tuple[tuple[Estimate, ...], ...] = ()


# A scorer that reads nothing: from a reply and its place among the replies of its side to a score.
RULES: Mapping[str, Callable[[str, int], float]] = {
    "longer": lambda text, place: float(len(text)),
    "shorter": lambda text, place: -float(len(text)),
    # RM-Bench orders replies by style: concise, long plain text, long markdown.
    "style": lambda text, place: float(place),
}


@dataclass(frozen=True)
class RewardBenchmark:
    """Items of one benchmark, ``rank``, its formula from scores to figures, and what the reader left out."""

    items: tuple[Item, ...]
    rank: Callable[[Scored], Ranking]
    remarks: tuple[str, ...] = ()

    @cached_property
    def _place(self) -> dict[tuple[tuple[Turn, ...], str], int]:
        places: dict[tuple[tuple[Turn, ...], str], int] = {}
        for item in self.items:
            for text in (*item.chosen, *item.rejected):
                places.setdefault((item.prompt, text), len(places))
        return places

    @property
    def replies(self) -> tuple[tuple[tuple[Turn, ...], str], ...]:
        """The m distinct (prompt, reply) that are to be scored, each once."""
        return tuple(self._place)

    @property
    def pairs(self) -> list[Pair]:
        """The same as m pairs that hold a reply on both sides, for ``coala.features.extract``, which reads it once."""
        groups = {item.prompt: item.group for item in self.items}
        return [Pair(prompt, text, text, groups[prompt]) for prompt, text in self.replies]

    def scored(self, scores: ArrayLike) -> Scored:
        """Items with the ``scores`` (m,) of :attr:`replies`; CoalaError for another number, or one not finite."""
        given = vector(scores, "scores")
        if len(given) != len(self._place):
            raise CoalaError(
                f"Found {len(given)} scores, expected {len(self._place)}, one for each distinct reply. "
                "Fix: score `benchmark.replies` in their order."
            )
        return self._filled(lambda item, text, place: float(given[self._place[item.prompt, text]]))

    def ranking(self, scores: ArrayLike) -> Ranking:
        """The benchmark's figures for ``scores`` (m,) of :attr:`replies`, in their order."""
        return self.rank(self.scored(scores))

    def by_rule(self, rule: str) -> Scored:
        """Items scored by one of :data:`RULES`: what the benchmark gives to who does not read."""
        if rule not in RULES:
            raise CoalaError(f"Found the rule {rule!r}, expected one of {', '.join(RULES)}. Fix: name one of them.")
        if rule == "style" and any(len(item.chosen) != 3 or len(item.rejected) != 3 for item in self.items):
            raise CoalaError("Found replies without styles, expected RM-Bench's three. Fix: use the rule longer.")
        return self._filled(lambda item, text, place: RULES[rule](text, place))

    def _filled(self, score: Callable[[Item, str, int], float]) -> Scored:
        def side(item: Item, texts: Sequence[str]) -> Float:
            return np.array([score(item, text, place) for place, text in enumerate(texts)], dtype=np.float64)

        return Scored(
            tuple(side(item, item.chosen) for item in self.items),
            tuple(side(item, item.rejected) for item in self.items),
            tuple(item.subset for item in self.items),
            tuple(item.group for item in self.items),
            tuple(item.id for item in self.items),
        )


def absent(name: str, n: int, missing: Sequence[str]) -> Estimate:
    """An overall figure of which parts are missing."""
    return Estimate(math.nan, 0.0, 1.0, n, f"{name}; void: without {', '.join(missing[:6])}")


def require_some(scored: Scored) -> None:
    """CoalaError where there is nothing to rank."""
    if not len(scored):
        raise CoalaError("There are no scored pairs; expected at least one.")
