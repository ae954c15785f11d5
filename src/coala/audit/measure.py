"""Is it a preference or a position? What can be told of preferences without understanding them.

Rules that pick by one sign alone, cue-only classifiers by grouped cross-validation, by subset too; systems' scores
beside them; biases of length and style, near-duplicates, leaks between splits, and the items that cues give away most
plainly. Knows items and arrays, nothing of files.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coala.audit.comparisons import ALL, Comparisons
from coala.audit.repeats import leaks, repeats
from coala.audit.systems import System, systems_beside
from coala.callbacks import OnProgress, silent
from coala.data import classify, style
from coala.data.findings import DataError, Finding
from coala.evaluation.reward_benchmarks import Item
from coala.pages.words import bracketed
from coala.statistics.intervals import Z95, Float, paired_difference, share_estimate
from coala.statistics.votes import holm
from coala.values import Estimate, conversation_text

SHUFFLED, FEATURES = "all cues, context shuffled", "features"
ENOUGH_FOR_ONE = 2000  # comparisons above which one deal of the folds is precise enough


@dataclass(frozen=True)
class Cue:
    """What a rule, or a classifier of this cue alone (``fitted``), gets right; ``tied``: items it cannot decide."""

    name: str
    fitted: bool
    accuracy: Estimate
    tied: float


@dataclass(frozen=True)
class Part:
    """A set or a subset of it: how many items, what chance gets right of them, and what each cue does."""

    name: str
    n: int
    chance: float
    cues: tuple[Cue, ...]

    def cue(self, name: str) -> Cue:
        return next(cue for cue in self.cues if cue.name == name)


@dataclass(frozen=True)
class Style:
    """One column: its mean in right and in wrong replies, and how often right has more where two differ."""

    name: str
    chosen: float
    rejected: float
    chosen_has_more: Estimate


@dataclass(frozen=True)
class CueExample:
    """A comparison that the cues give away, and the columns that do most of it."""

    prompt: str
    chosen: str
    rejected: str
    margin: float
    because: tuple[str, ...]


@dataclass(frozen=True)
class Audit:
    """Everything the audit found; ``parts`` are the subsets, ``counts`` repeats and leaks.

    ``context_gain`` is what all cues lose when the prompt is another item's, ``features_gain`` what features get right
    beyond the best cue.
    """

    title: str
    n_comparisons: int
    n_groups: int
    whole: Part
    parts: tuple[Part, ...]
    systems: tuple[System, ...]
    styles: tuple[Style, ...]
    counts: Mapping[str, int]
    examples: tuple[CueExample, ...]
    verdicts: tuple[str, ...]
    remarks: tuple[str, ...]
    context_gain: Estimate
    features_gain: Estimate | None = None

    @property
    def cues(self) -> tuple[Cue, ...]:
        return self.whole.cues

    def cue(self, name: str) -> Cue:
        return self.whole.cue(name)

    def part(self, name: str) -> Part:
        return next(part for part in self.parts if part.name == name)


def audit_items(
    items: Sequence[Item],
    *,
    seed: int = 0,
    title: str = "",
    scores: Mapping[str, Float] | None = None,
    likelihood: Float | None = None,
    features: NDArray[np.floating[Any]] | None = None,
    against: Sequence[Item] | None = None,
    deals: int | None = None,
    remarks: Sequence[str] = (),
    on_progress: OnProgress = silent,
) -> Audit:
    """Look at ``items`` from every side that needs no understanding.

    ``scores`` by system, and ``likelihood`` (R, 2), are of all R replies in the order of the items' replies.
    ``features`` (m, d) are right minus wrong features of each comparison, judged beside the cues. ``against`` is the
    other side of a split. ``deals`` of the folds are averaged (three, or one above 2,000 comparisons);
    ``seed`` decides all of them. Raises :class:`DataError` for fewer than two groups, replies that never differ,
    and features of another number of comparisons.
    """
    data = Comparisons(tuple(items), likelihood)
    _check(data, features)
    m = len(data.item)
    deals = deals or (3 if m <= ENOUGH_FOR_ONE else 1)
    rules = data.rules()
    found = {name: data.credits(margin) for name, margin in rules.items()}
    tied = {name: _undecided(credit) for name, credit in found.items()}
    by_cues: list[Float] = []
    jobs = [*data.cues, *([FEATURES] if features is not None else [])]
    for number, job in enumerate(jobs):
        on_progress("audit", number, len(jobs), job)
        several = _margins(data, job, features, seed, deals)
        by_cues = several[ALL] if job == ALL else by_cues
        for name, margins in several.items():
            told = [data.credits(one, classify.TIE) for one in margins]
            found[name] = np.mean(told, axis=0)
            tied[name] = np.mean([_undecided(one) for one in told], axis=0)
    on_progress("audit", len(jobs), len(jobs), "repeats")
    whole = _part("all", data, found, tied, rules, np.ones(len(items), dtype=bool))
    subsets = np.array([item.subset for item in items])
    names = sorted(set(subsets.tolist()))
    parts = [_part(name, data, found, tied, rules, subsets == name) for name in names if len(names) > 1]
    groups = [item.group for item in items]
    best = max((one for one in whole.cues if _is_cue(one)), key=lambda one: one.accuracy.value)
    gain = None if features is None else paired_difference(found[FEATURES], found[best.name], groups)
    context = paired_difference(found[ALL], found[SHUFFLED], groups)
    systems = systems_beside(data, scores or {}, by_cues, seed=seed)
    return Audit(
        title=title,
        n_comparisons=m,
        n_groups=len(set(groups)),
        whole=whole,
        parts=tuple(parts),
        systems=systems,
        styles=_styles(data),
        counts={**repeats(items), **(leaks(items, against) if against else {})},
        examples=_examples(data, np.mean(by_cues, axis=0), seed),
        verdicts=tuple(_verdicts(whole, parts, best, context, gain, systems)),
        remarks=tuple(remarks),
        context_gain=context,
        features_gain=gain,
    )


def _check(data: Comparisons, features: NDArray[np.floating[Any]] | None) -> None:
    def refuse(field: str, found: str, expected: str, mend: str) -> DataError:
        return DataError([Finding("audit", None, field, found, expected, mend)])

    n_groups = len({item.group for item in data.items})
    if n_groups < 2:
        found = f"{len(data.items)} item{'s' * (len(data.items) != 1)} in {n_groups} group{'s' * (n_groups != 1)}"
        raise refuse("", found, "at least two groups", "give more rows, or a group column")
    if lone := [item.id for item in data.items if not item.chosen or not item.rejected]:
        found = f"{len(lone)} items without a right and a wrong reply, e.g. {lone[0][:40]!r}"
        raise refuse("", found, "both in each", "leave them out")
    if all({*item.chosen} == {*item.rejected} for item in data.items):
        found = f"the same text right and wrong in all {len(data.items)} items"
        raise refuse("", found, "replies that differ", "check that the columns are the ones you meant")
    if features is not None and (features.ndim != 2 or len(features) != len(data.item)):
        found = f"features of shape {features.shape} for {len(data.item)} pairs"
        raise refuse("features", found, "a row per pair, in their order", "extract them from this file")


def _margins(
    data: Comparisons, name: str, features: NDArray[np.floating[Any]] | None, seed: int, deals: int
) -> dict[str, list[Float]]:
    """Margins (m,) of the classifier called ``name`` by each deal of the folds; of all cues with other contexts too."""
    x, scaled = (np.asarray(features, dtype=np.float64), True) if name == FEATURES else data.columns(name)
    fits = [data.fitted(x, seed + k, scaled) for k in range(deals)]
    found = {name: [one.margins(x) for one in fits]}
    if name == ALL:
        other, _ = data.columns(ALL, data.with_prompts(_other_prompts(data.items, seed)))
        found[SHUFFLED] = [one.margins(other) for one in fits]
    return found


def _other_prompts(items: Sequence[Item], seed: int) -> list[tuple[Any, ...]]:
    """For each item the prompt of an item of another group, drawn by ``seed``."""
    order = np.random.default_rng(seed).permutation(len(items))
    place = np.empty(len(items), dtype=np.int64)
    place[order] = np.arange(len(items))
    prompts = []
    for k, item in enumerate(items):
        # Round the shuffled circle to the next of another group; there is one, for there are two groups.
        step = 1
        while items[order[(place[k] + step) % len(items)]].group == item.group:
            step += 1
        prompts.append(items[order[(place[k] + step) % len(items)]].prompt)
    return prompts


def _undecided(credit: Float) -> Float:
    """1 for each item of which right and wrong replies share the top."""
    return ((credit > 0) & (credit < 1)).astype(np.float64)


def _is_cue(one: Cue) -> bool:
    return one.fitted and one.name not in (SHUFFLED, FEATURES)


def _part(
    name: str,
    data: Comparisons,
    found: Mapping[str, Float],
    tied: Mapping[str, Float],
    rules: Mapping[str, Float],
    inside: NDArray[np.bool_],
) -> Part:
    """What every cue gets right of the items ``inside`` (n,)."""
    groups = [item.group for item in itertools.compress(data.items, inside)]
    about = {True: "grouped cross-validation", False: "share of items whose right reply is picked"}
    cues = [
        Cue(
            one,
            one not in rules,
            share_estimate(credit[inside], groups, about[one not in rules]),
            float(tied[one][inside].mean()),
        )
        for one, credit in found.items()
    ]
    return Part(name or "(no subset)", int(inside.sum()), float(data.chance[inside].mean()), tuple(cues))


# --- styles, examples, verdicts ----------------------------------------------------------------------------------


def _styles(data: Comparisons) -> tuple[Style, ...]:
    right = np.array([k < len(item.chosen) for item in data.items for k in range(len(item.replies))])
    differences = data.difference(data.table)
    found = []
    for k, name in enumerate(style.COLUMNS):
        differ = np.flatnonzero(differences[:, k])
        # A column in which no two replies differ says nothing.
        if len(differ):
            more = share_estimate(
                (differences[differ, k] > 0).astype(np.float64),
                [data.groups[int(i)] for i in differ],
                "share of the comparisons that differ",
            )
            column = data.table[:, k]
            found.append(Style(name, float(column[right].mean()), float(column[~right].mean()), more))
    return tuple(found)


def _examples(data: Comparisons, margins: Float, seed: int, most: int = 6) -> tuple[CueExample, ...]:
    """The comparisons with the largest out-of-fold margins, one per group."""
    table = data.difference(data.table)
    scaled = table / classify.scale_of(table)
    w = classify.fit(scaled, classify.best_ridge(scaled, data.groups, seed, data.weight), weight=data.weight)
    found: dict[str, CueExample] = {}
    right, wrong = data.pairs_of_texts()
    for k in np.argsort(-margins, kind="stable"):
        item = data.items[data.item[k]]
        if margins[k] <= classify.TIE or len(found) == most:
            break
        parts = scaled[k] * w
        because = tuple(style.COLUMNS[c] for c in np.argsort(-parts)[:3] if parts[c] > 0)
        shown = CueExample(conversation_text(item.prompt), right[k], wrong[k], float(margins[k]), because)
        found.setdefault(item.group, shown)
    return tuple(found.values())


def _percent(one: Estimate) -> str:
    return f"{100 * one.value:.1f} % [{100 * one.low:.1f}, {100 * one.high:.1f}]"


def _points(one: Estimate) -> str:
    return f"{100 * one.value:+.1f} points [{100 * one.low:+.1f}, {100 * one.high:+.1f}]"


def _verdicts(
    whole: Part,
    parts: Sequence[Part],
    best: Cue,
    context: Estimate,
    gain: Estimate | None,
    systems: Sequence[System],
) -> list[str]:
    rate, chance = best.accuracy, whole.chance
    n_cues = sum(_is_cue(one) for one in whole.cues)
    luck = min(1.0, n_cues * _by_luck(rate, chance))  # the best of several is above chance by luck more often than one
    said = [
        f"A classifier that sees only {best.name!r} (the best of {n_cues} cues) ranks {_percent(rate)} of {rate.n:,} "
        f"items right; chance is {100 * chance:.1f} %."
    ]
    if rate.low >= chance + 0.8 * (1 - chance):
        said.append(
            "What a head learns from these pairs cannot be distinguished from that cue, whatever the pairs were "
            "meant for."
        )
    elif rate.low >= chance + 0.1:
        said.append("Compare a head or a judge with that figure, not with chance.")
    elif rate.low > chance and luck < 0.05:
        said.append("Cues say a little; most of the preference is not in them.")
    elif rate.low > chance:
        said.append(f"With {n_cues} cues tried, one that good may be luck (p = {luck:.2f}, Bonferroni).")
    else:
        said.append("No cue tried here gives the preference away.")
    said.append(_strongest(whole, parts))
    if context.low > 0:
        said.append(f"Part of it depends on what was said before: the true context is worth {_points(context)}.")
    else:
        said.append(f"The true context is worth {_points(context)}: what cues see does not depend on it.")
    if gain is not None:
        more = "see more than" if gain.low > 0 else "see less than" if gain.high < 0 else "do not differ clearly from"
        said.append(f"The model's features {more} the best cue: {_points(gain)}.")
    return [*said, *(f"{one.name}: {_percent(one.accuracy)}; {_left(one)}." for one in systems)]


def _left(one: System) -> str:
    """What is left of a system's lead, in words."""
    if math.isnan(one.survives.value):
        return one.survives.method.partition("; void: ")[2]
    return (
        f"{_percent(one.against)} of the {one.against.n:,} where cues point the wrong way, so that "
        f"{bracketed(one.survives, '.0f')} % of its lead survives at even cues"
    )


def _strongest(whole: Part, parts: Sequence[Part]) -> str:
    """How many rules are above chance in the set and its subsets, the number of them minded, and the furthest one."""
    tried = [(part, one) for part in (whole, *parts) for one in part.cues if not one.fitted]
    level = holm([_by_luck(one.accuracy, part.chance) for part, one in tried])
    sure = [two for two, p in zip(tried, level, strict=True) if p < 0.05]
    many = f"{len(tried)} rules{' and subsets' if parts else ''}"
    if not sure:
        return f"None of {many} is above chance, corrected for their number (Holm, 5 %)."
    part, one = max(sure, key=lambda two: two[1].accuracy.value - two[0].chance)
    where = f" in {part.name}" if part is not whole else ""
    number = f"{len(sure)} of {many} {'is' if len(sure) == 1 else 'are'}"
    return (
        f"{number} above chance, corrected for their number (Holm, 5 %); furthest "
        f"{one.name!r}{where}: {_percent(one.accuracy)} of {part.n:,} right, chance {100 * part.chance:.1f} %."
    )


def _by_luck(rate: Estimate, chance: float) -> float:
    """One-sided p of a rate at least as far above ``chance``, by the lower half of its interval."""
    spread = (rate.value - rate.low) / Z95
    above = rate.value - chance
    return 0.5 * math.erfc(above / spread / math.sqrt(2)) if above > 0 and spread > 0 else 1.0
