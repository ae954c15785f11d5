"""Items as numbers: which comparisons there are, and what each cue sees of the replies.

An item has c right and r wrong replies. Fits see its c r comparisons, right minus wrong, each of weight 1/(c r); a cue
is right where it puts a right reply on top: of replies that share the top, the share that is right. So a pair counts 1,
1/2 or 0, the best of four 1, 1/2, 1/3, 1/4 or 0, and chance is c/(c + r). Knows nothing of files and models.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coala.data import classify, style
from coala.evaluation.reward_benchmarks import Item
from coala.statistics.intervals import Float
from coala.values import CoalaError, Turn

ORDER, OPENING, LIKELIHOOD = "order", "first words", "base likelihood"
ALL, BAG = "all cues", "bag of words"

# A rule picks the reply that has most of something, or least: nothing is fitted. Value of a reply's text.
_OF_TEXT: Mapping[str, Callable[[str], float]] = {
    "characters": len,
    "markdown": style.marks,
    "list items": style.list_items,
    "refusal": style.refuses,
    "punctuation": style.punctuation,
}
RULES: Mapping[str, tuple[str, int]] = {
    "longer": ("characters", 1),
    "shorter": ("characters", -1),
    "more markdown": ("markdown", 1),
    "less markdown": ("markdown", -1),
    "more list items": ("list items", 1),
    "fewer list items": ("list items", -1),
    "refuses": ("refusal", 1),
    "does not refuse": ("refusal", -1),
    "more punctuation": ("punctuation", 1),
    "less punctuation": ("punctuation", -1),
    "shown first": ("place", -1),
    "shown last": ("place", 1),
    "likelier": ("log-probability", 1),
    "less likely": ("log-probability", -1),
    "likelier per token": ("log-probability per token", 1),
    "less likely per token": ("log-probability per token", -1),
}


@dataclass(frozen=True, eq=False)
class Comparisons:
    """n items with R replies in all, and their m comparisons.

    ``likelihood`` (R, 2), if there is one, holds each reply's log-probability under a model, total and per token, in
    the order of the items' replies.
    """

    items: tuple[Item, ...]
    likelihood: Float | None = None

    def __post_init__(self) -> None:
        if self.likelihood is not None and self.likelihood.shape != (len(self.texts), 2):
            raise CoalaError(
                f"Found log-probabilities of shape {self.likelihood.shape}, expected {(len(self.texts), 2)}: total and "
                "per token of every reply. Fix: measure the replies of these items."
            )

    @cached_property
    def texts(self) -> list[str]:
        """The R replies: of each item the right ones, then the wrong ones."""
        return [text for item in self.items for text in item.replies]

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """Where the replies of each item begin among the R, and their end, (n + 1,)."""
        return np.cumsum([0, *(len(item.replies) for item in self.items)])

    @cached_property
    def _index(self) -> NDArray[np.int64]:
        """(m, 3): of each comparison its item, its right reply and its wrong one."""
        rows = [
            (k, start + a, start + len(item.chosen) + b)
            for k, (item, start) in enumerate(zip(self.items, self._starts[:-1], strict=True))
            for a in range(len(item.chosen))
            for b in range(len(item.rejected))
        ]
        return np.array(rows, dtype=np.int64).reshape(len(rows), 3)

    @property
    def item(self) -> NDArray[np.int64]:
        """The item of each comparison (m,)."""
        return np.asarray(self._index[:, 0])

    @cached_property
    def weight(self) -> Float:
        """What a comparison counts in a fit (m,); those of an item count 1 together."""
        return np.asarray(1.0 / np.bincount(self.item, minlength=len(self.items))[self.item])

    @cached_property
    def groups(self) -> list[str]:
        """The group of each comparison."""
        return [self.items[k].group for k in self.item]

    @cached_property
    def chance(self) -> Float:
        """What a coin gets of each item (n,): the share of its replies that is right."""
        return np.array([len(item.chosen) / len(item.replies) for item in self.items])

    def difference(self, values: Any) -> Any:
        """Right minus wrong of what replies have, (R, ...) to (m, ...)."""
        return values[self._index[:, 1]] - values[self._index[:, 2]]

    def pairs_of_texts(self) -> tuple[list[str], list[str]]:
        """The right and the wrong text of each comparison."""
        right, wrong = ([self.texts[k] for k in self._index[:, side]] for side in (1, 2))
        return right, wrong

    def credits(self, margins: Float, tie: float = 0.0) -> Float:
        """What each item counts (n,) by the ``margins`` of its comparisons (m,); margins up to ``tie`` are ties."""
        found = np.empty(len(self.items))
        lone = np.bincount(self.item, minlength=len(self.items)) == 1
        of_pairs = lone[self.item]
        found[lone] = np.where(np.abs(margins) <= tie, 0.5, (margins > 0).astype(np.float64))[of_pairs]
        begins = np.searchsorted(self.item, np.arange(len(self.items)))
        for k in np.flatnonzero(~lone):
            item = self.items[k]
            c, r = len(item.chosen), len(item.rejected)
            table = margins[begins[k] : begins[k] + c * r].reshape(c, r)
            # Up to a constant, which is the first wrong reply's score.
            right, wrong = table[:, 0], table[0, 0] - table[0]
            top = max(right.max(), wrong.max()) - tie
            n_right, n_wrong = int((right >= top).sum()), int((wrong >= top).sum())
            found[k] = n_right / (n_right + n_wrong)
        return found

    # --- what cues see -----------------------------------------------------------------------------------------------

    @cached_property
    def places(self) -> Float | None:
        """At which place each reply is shown (R,), 0 for replies of an item that does not say; None if none does."""
        if not any(item.places for item in self.items):
            return None
        return np.array([p for item in self.items for p in (item.places or (0,) * len(item.replies))], dtype=np.float64)

    @cached_property
    def _values(self) -> dict[str, Float]:
        """What rules compare, of each reply (R,)."""
        values = {name: np.array([value(text) for text in self.texts], np.float64) for name, value in _OF_TEXT.items()}
        if self.places is not None:
            values["place"] = self.places
        if self.likelihood is not None:
            values |= {"log-probability": self.likelihood[:, 0], "log-probability per token": self.likelihood[:, 1]}
        return values

    def rules(self) -> dict[str, Float]:
        """Margins (m,) of every rule that can be asked."""
        asked = ((name, sign, self._values.get(value)) for name, (value, sign) in RULES.items())
        return {name: sign * self.difference(values) for name, sign, values in asked if values is not None}

    def ranks(self, values: Float) -> Float:
        """The rank of each reply in its item by ``values`` (R,), from 0 to 1, means where it is shared.

        Of a pair the difference is the sign of the values' difference.
        """
        found = np.empty(len(values))
        for start, end in itertools.pairwise(self._starts):
            own = values[start:end]
            below, level = (own[:, None] > own).sum(axis=1), (own[:, None] == own).sum(axis=1)
            found[start:end] = (below + (level - 1) / 2) / max(1, len(own) - 1)
        return found

    @cached_property
    def table(self) -> Float:
        """Every column of :data:`coala.data.style.COLUMNS` of each reply, (R, columns)."""
        return style.described(self.texts, [item.prompt for item in self.items for _ in item.replies])

    @cached_property
    def _ranked(self) -> Float:
        """Ranks by what the rules compare, (R, rules / 2): so that a model of all cues can be each of them."""
        return np.stack([self.ranks(values) for values in self._values.values()], axis=1)

    @cached_property
    def _openings(self) -> Float:
        return style.openings(self.texts)

    @property
    def cues(self) -> tuple[str, ...]:
        """Names of the cues that are fitted, the bag of words last."""
        more = [*([ORDER] if self.places is not None else []), *([LIKELIHOOD] if self.likelihood is not None else [])]
        return (*style.CUES, OPENING, *more, ALL, BAG)

    def columns(self, cue: str, table: Float | None = None) -> tuple[Any, bool | NDArray[np.bool_]]:
        """What ``cue`` sees of each comparison (m, d), and which columns are to be brought to one scale.

        ``table`` (R, columns) stands in for :attr:`table`. Words are all of one scale: a rare one is not blown up.
        """
        if cue == BAG:
            return style.bag_of_words(*self.pairs_of_texts()), False
        if cue == OPENING:
            return self.difference(self._openings), False
        table = self.table if table is None else table
        order = [] if self.places is None else [-self.places[:, None]]
        likelihood = [] if self.likelihood is None else [self.likelihood]
        if cue == ALL:
            blocks = [table, *order, *likelihood, self._ranked]
            scaled = np.repeat([True, False], [sum(one.shape[1] for one in blocks), self._openings.shape[1]])
            return self.difference(np.hstack([*blocks, self._openings])), scaled
        own = {ORDER: order, LIKELIHOOD: likelihood}.get(cue)
        return self.difference(np.hstack(own) if own else style.columns_of(cue, table)), True

    def with_prompts(self, prompts: Sequence[tuple[Turn, ...]]) -> Float:
        """:attr:`table` as it would be if the items had these ``prompts``: a control."""
        asked = [prompt for item, prompt in zip(self.items, prompts, strict=True) for _ in item.replies]
        return np.hstack([self.table[:, : len(style.REPLY)], style.overlaps(self.texts, asked)])

    def fitted(self, x: Any, seed: int, scaled: bool | NDArray[np.bool_] = True) -> classify.FoldFits:
        """Fits on columns ``x`` (m, d), whole groups held out."""
        return classify.fit_folds(x, self.groups, seed, scaled, self.weight)

    def out_of_fold(self, x: Any, seed: int, scaled: bool | NDArray[np.bool_] = True) -> Float:
        """Margins (m,) by :meth:`fitted`, each by the fit that did not see it."""
        return self.fitted(x, seed, scaled).margins(x)
