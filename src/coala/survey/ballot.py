"""What one rater sees: which questions in which order, and each question's answers in which order.

Answers are balanced as well as random. Raters come in blocks of M, the number of methods. For each question, each block
has its own Williams square of answer orders with the methods in random places, dealt to the raters at random, one row
each. So, exactly:

- over a block of raters, each method is once in each position of every question;
- for even M, over a block of raters, each method directly follows each other one equally often; for odd M over two
  blocks;
- for one rater, the orders of different questions are independent: who recognises a method on one page knows nothing
  of where it is on the next. (Balance within a rater would break this: a place that was had becomes less likely.)

Questions are shuffled for each rater.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from coala.survey.form import Survey

PageKind = Literal["question", "repeat", "check"]


@dataclass(frozen=True)
class Item:
    """One page: number ``index`` of the questions or checks, its answers in the order of their numbers ``order``."""

    kind: PageKind
    index: int
    order: tuple[int, ...]


def ballot(survey: Survey, place: int) -> tuple[Item, ...]:
    """The pages of the rater who came as number ``place`` (from 0), always the same for the same survey.

    Categories follow one another, rotated by place. A repeat comes at least half a category after its question, with
    every answer in another position. Checks are spread evenly, at random within their stretch, never on the first page.
    """
    rng = _rng(survey, "rater", place)
    n_categories = len(survey.categories)
    turned = [survey.categories[(i + place) % n_categories] for i in range(n_categories)]
    items = [item for category in turned for item in _category(survey, category, place, rng)]
    stretch = len(items) / max(1, len(survey.checks))
    checks = [int(i) for i in rng.permutation(len(survey.checks))]
    # From the last stretch to the first, so that places found earlier stay right.
    for number in reversed(range(len(checks))):
        low = max(1, int(number * stretch))
        high = max(low + 1, int((number + 1) * stretch))
        order = rng.permutation(len(survey.checks[checks[number]].answers))
        check = Item("check", checks[number], tuple(order.tolist()))
        items.insert(int(rng.integers(low, high)), check)
    return tuple(items)


def answer_order(survey: Survey, question: int, place: int) -> tuple[int, ...]:
    """Numbers of the methods in the order in which the rater at ``place`` sees their answers to ``question``."""
    m = len(survey.methods)
    block, rater = divmod(place, m)
    rows = _rng(survey, "rows", question, block).permutation(m)
    first = _williams(m)
    if m % 2:
        # The mirrored square completes the balance of neighbours; methods keep their places in the pair of squares.
        block, mirrored = divmod(block, 2)
        first = first[::-1].copy() if mirrored else first
    methods = _rng(survey, "methods", question, block).permutation(m)
    return tuple(int(methods[(position + rows[rater]) % m]) for position in first)


def _category(survey: Survey, category: str, place: int, rng: np.random.Generator) -> list[Item]:
    members = survey.of_category(category)
    shuffled = [members[i] for i in rng.permutation(len(members))]
    items = [Item("question", i, answer_order(survey, i, place)) for i in shuffled]
    half = len(items) // 2
    again = sorted((int(i) for i in rng.permutation(half)[: survey.repeats]), reverse=True)
    for seat in again:
        order = items[seat].order
        shift = int(rng.integers(1, len(order)))
        repeat = Item("repeat", items[seat].index, order[shift:] + order[:shift])
        # Later seats were filled first, so nothing before `seat` has moved.
        items.insert(int(rng.integers(seat + half + 1, len(items) + 1)), repeat)
    return items


def _williams(m: int) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
    """First row 0, 1, m-1, 2, m-2, ... whose cyclic shifts balance neighbours (Williams 1949)."""
    row = [0] + [step for pair in zip(range(1, m), range(m - 1, 0, -1), strict=True) for step in pair]
    return np.array(row[:m], dtype=np.intp)


def _rng(survey: Survey, *name: object) -> np.random.Generator:
    # The digest covers every text of the survey: knowing this program and the seed is not enough to undo an order.
    key = hashlib.sha256(repr((survey.digest, *name)).encode()).digest()
    return np.random.default_rng(int.from_bytes(key[:16]))
