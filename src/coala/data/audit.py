"""Is it a preference or a position? What can be told of preference pairs without understanding them.

Cue-only classifiers by grouped cross-validation, biases of length and style, near-duplicates, leaks between splits, and
the pairs that cues give away most plainly; :func:`balance` takes a cue out. Knows pairs and arrays, nothing of files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coala.data import classify, style
from coala.data.classify import clustered_share
from coala.data.duplicates import near_duplicates
from coala.data.findings import DataError, Finding, listed
from coala.data.turns import digest
from coala.statistics.intervals import Z95, Float, clustered
from coala.values import Estimate, Pair, conversation_text

SHUFFLED = "all cues, context shuffled"
FEATURES = "features"
ENOUGH_FOR_ONE = 2000  # pairs above which one deal of the folds is precise enough
CUE_NAMES = (*style.CUES, style.BAG)
METHOD = "grouped cross-validation, a tie one half, clustered by group"


@dataclass(frozen=True)
class Cue:
    """What a classifier that sees only this cue gets right; ``tied`` is the share of pairs it cannot part."""

    name: str
    accuracy: Estimate
    tied: float


@dataclass(frozen=True)
class Style:
    """One column: its mean in chosen and in rejected replies, and how often chosen has more where they differ."""

    name: str
    chosen: float
    rejected: float
    chosen_has_more: Estimate


@dataclass(frozen=True)
class CueExample:
    """A pair that the cues give away, and the columns that do most of it."""

    prompt: str
    chosen: str
    rejected: str
    margin: float
    because: tuple[str, ...]


@dataclass(frozen=True)
class Audit:
    """Everything :func:`audit` found. ``counts`` holds repeats and leaks; ``against_context`` the loss by shuffling."""

    n_pairs: int
    n_groups: int
    cues: tuple[Cue, ...]
    styles: tuple[Style, ...]
    counts: Mapping[str, int]
    examples: tuple[CueExample, ...]
    verdicts: tuple[str, ...]
    context_gain: Estimate
    features_gain: Estimate | None = None

    def cue(self, name: str) -> Cue:
        return next(cue for cue in self.cues if cue.name == name)


def audit(
    pairs: Sequence[Pair],
    *,
    seed: int,
    features: NDArray[np.floating[Any]] | None = None,
    against: Sequence[Pair] | None = None,
    repeats: int | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Audit:
    """Look at ``pairs`` from every side that needs no understanding.

    ``features`` (n, d) are chosen minus rejected features of a model, judged beside the cues. ``against`` is the other
    side of a split. ``repeats`` deals of the folds are averaged (three, or one above 2,000 pairs); ``seed`` decides
    all of them. Raises :class:`DataError` for no pairs, a single group, or features of another number of pairs.
    """
    _check(pairs, features)
    groups = [pair.group for pair in pairs]
    n_repeats = repeats or (3 if len(pairs) <= ENOUGH_FOR_ONE else 1)
    chosen, rejected = style.sides(pairs)
    table = chosen - rejected
    shuffled = style.with_prompts(table, pairs, _other_prompts(pairs, seed))
    jobs: dict[str, tuple[Any, Any]] = {
        name: (style.columns_of(name, table), None) for name in style.CUES
    } | {
        SHUFFLED: (table, shuffled),
        style.BAG: (style.bag_of_words(pairs), None),
    }  # fmt: skip
    if features is not None:
        jobs[FEATURES] = (np.asarray(features, dtype=np.float64), None)
    margins: dict[str, list[Float]] = {}
    for number, (name, (x, x_test)) in enumerate(jobs.items()):
        if on_progress:
            on_progress(name, number, len(jobs))
        scaled = name != style.BAG  # words are all of one scale; a rare one must not be blown up
        margins[name] = [
            classify.out_of_fold(x, groups, seed + k, x_test, scaled) for k in range(n_repeats)
        ]  # fmt: skip
    if on_progress:
        on_progress("duplicates", len(jobs), len(jobs))
    told = {name: np.mean([classify.told(one) for one in several], axis=0) for name, several in margins.items()}
    cues = tuple(
        Cue(
            name,
            clustered_share(told[name], groups, METHOD),
            float(np.mean([np.abs(one) <= classify.TIE for one in margins[name]])),
        )
        for name in jobs
    )
    best = max((cue for cue in cues if cue.name not in (SHUFFLED, FEATURES)), key=lambda cue: cue.accuracy.value)
    gain = None if features is None else _difference(told[FEATURES] - told[best.name], groups)
    context = _difference(told["all cues"] - told[SHUFFLED], groups)
    return Audit(
        n_pairs=len(pairs),
        n_groups=len(set(groups)),
        cues=cues,
        styles=_styles(chosen, rejected, groups),
        counts={**_repeats(pairs), **(_leaks(pairs, against) if against else {})},
        examples=_examples(pairs, table, np.mean(margins["all cues"], axis=0), groups, seed),
        verdicts=tuple(_verdicts(best, context, gain)),
        context_gain=context,
        features_gain=gain,
    )


def _check(pairs: Sequence[Pair], features: NDArray[np.floating[Any]] | None = None) -> None:
    n_groups = len({pair.group for pair in pairs})
    if n_groups < 2:
        found = f"{len(pairs)} pairs in {n_groups} group{'' if n_groups == 1 else 's'}"
        raise DataError(
            [Finding("audit", None, "", found, "at least two groups", "give more pairs, or a group column")]
        )
    if features is not None and (features.ndim != 2 or len(features) != len(pairs)):
        found = f"features of shape {features.shape} for {len(pairs)} pairs"
        raise DataError(
            [Finding("audit", None, "features", found, "a row per pair, in their order", "extract them from this file")]
        )


def _other_prompts(pairs: Sequence[Pair], seed: int) -> list[tuple[Any, ...]]:
    """For each pair the prompt of a pair of another group, drawn by ``seed``."""
    order = np.random.default_rng(seed).permutation(len(pairs))
    place = np.empty(len(pairs), dtype=np.int64)
    place[order] = np.arange(len(pairs))
    prompts = []
    for k, pair in enumerate(pairs):
        # Round the shuffled circle to the next of another group; there is one, for there are two groups.
        step = 1
        while pairs[order[(place[k] + step) % len(pairs)]].group == pair.group:
            step += 1
        prompts.append(pairs[order[(place[k] + step) % len(pairs)]].prompt)
    return prompts


def _difference(values: Float, groups: Sequence[str]) -> Estimate:
    """Mean of paired differences with a cluster-robust normal interval."""
    mean, error, _ = clustered(values, list(groups))
    half = Z95 * error
    return Estimate(mean, mean - half, mean + half, len(values), "paired difference, clustered by group")


# --- styles, examples, verdicts ----------------------------------------------------------------------------------


def _styles(chosen: Float, rejected: Float, groups: Sequence[str]) -> tuple[Style, ...]:
    found = []
    for k, name in enumerate(style.COLUMNS):
        table = chosen[:, k] - rejected[:, k]
        differ = np.flatnonzero(table)
        more = clustered_share(
            (table[differ] > 0).astype(np.float64),
            [groups[int(i)] for i in differ],
            "share of the pairs that differ, clustered by group",
        )
        found.append(Style(name, float(chosen[:, k].mean()), float(rejected[:, k].mean()), more))
    return tuple(found)


def _examples(
    pairs: Sequence[Pair], table: Float, margins: Float, groups: Sequence[str], seed: int, most: int = 6
) -> tuple[CueExample, ...]:
    """The pairs with the largest out-of-fold margins, one per group."""
    scaled = table / classify.scale_of(table)
    w = classify.fit(scaled, classify.best_ridge(scaled, groups, seed))
    found: dict[str, CueExample] = {}
    for k in np.argsort(-margins, kind="stable"):
        pair = pairs[k]
        if margins[k] <= classify.TIE or len(found) == most:
            break
        parts = scaled[k] * w
        because = [style.COLUMNS[c] for c in np.argsort(-parts)[:3] if parts[c] > 0]
        shown = CueExample(
            conversation_text(pair.prompt), pair.chosen, pair.rejected, float(margins[k]), tuple(because)
        )
        found.setdefault(pair.group, shown)
    return tuple(found.values())


def _verdicts(best: Cue, context: Estimate, gain: Estimate | None) -> list[str]:
    rate = best.accuracy
    percent = f"{100 * rate.value:.1f} % [{100 * rate.low:.1f}, {100 * rate.high:.1f}] of {rate.n:,} pairs"
    said = [f"A classifier that sees only {best.name} (the best of {len(CUE_NAMES)} cues) ranks {percent} right."]
    if rate.low >= 0.9:
        said.append(
            "What a head learns from these pairs cannot be told from that cue, whatever the pairs were meant for."
        )
    elif rate.low >= 0.6:
        said.append("A head trained on them has to be measured against that figure, not against one half.")
    elif rate.low > 0.5:
        said.append("Cues say a little; most of the preference is not in them.")
    else:
        said.append("No cue tried here gives the preference away.")
    moved = f"{100 * context.value:+.1f} points [{100 * context.low:+.1f}, {100 * context.high:+.1f}]"
    if context.low > 0:
        said.append(f"Part of it depends on what was said before: the true context is worth {moved} to the cues.")
    else:
        said.append(f"The true context is worth {moved} to the cues: what they see does not depend on it.")
    if gain is not None:
        moved = f"{100 * gain.value:+.1f} points [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"
        more = "see more than" if gain.low > 0 else "see less than" if gain.high < 0 else "are not told apart from"
        said.append(f"The model's features {more} the best cue: {moved}.")
    return said


# --- repeats and leaks -------------------------------------------------------------------------------------------


def _text(pair: Pair) -> str:
    return "\n".join((*(turn.text for turn in pair.prompt), pair.chosen, pair.rejected))


def _asked(pair: Pair) -> str:
    return "\n".join(turn.text for turn in pair.prompt)


def _repeats(pairs: Sequence[Pair]) -> dict[str, int]:
    groups = [pair.group for pair in pairs]
    whole = [(digest(_asked(pair)), digest(pair.chosen), digest(pair.rejected)) for pair in pairs]
    seen = set(whole)
    chosen, rejected = {good for _, good, _ in whole}, {bad for _, _, bad in whole}
    same_group = {(group, good) for group, (_, good, _) in zip(groups, whole, strict=True)}
    return {
        "duplicate pairs": len(whole) - len(seen),
        "contradicting pairs": sum((prompt, bad, good) in seen for prompt, good, bad in whole),
        "replies chosen in one pair and rejected in another of its group": sum(
            (group, bad) in same_group for group, (_, _, bad) in zip(groups, whole, strict=True)
        ),
        "texts on both sides": len(chosen & rejected),
        "pairs nearly the same as one of another group": len(near_duplicates([_text(p) for p in pairs], groups)),
        "prompts nearly the same as one of another group": len(near_duplicates([_asked(p) for p in pairs], groups)),
    }


def _leaks(pairs: Sequence[Pair], against: Sequence[Pair]) -> dict[str, int]:
    """Pairs of ``against`` that share something with ``pairs``."""
    both = [*pairs, *against]
    groups = {pair.group for pair in pairs}
    prompts = {digest(_asked(pair)) for pair in pairs}
    replies = {digest(text) for pair in pairs for text in (pair.chosen, pair.rejected)}
    near = near_duplicates([_text(pair) for pair in both], [pair.group for pair in both], others=len(pairs))
    asked = near_duplicates([_asked(pair) for pair in both], [pair.group for pair in both], others=len(pairs))
    return {
        "leaks: pairs of the other split": len(against),
        "leaks: with a group that is here": sum(pair.group in groups for pair in against),
        "leaks: with a prompt that is here": sum(digest(_asked(pair)) in prompts for pair in against),
        "leaks: with a prompt nearly here": len(asked),
        "leaks: with a reply that is here": sum(
            bool({digest(pair.chosen), digest(pair.rejected)} & replies) for pair in against
        ),
        "leaks: nearly the same pair": len(near),
    }


# --- balancing ---------------------------------------------------------------------------------------------------

ROUNDS = 16
STRATA = 20


@dataclass(frozen=True)
class Balanced:
    """The pairs that are left, in their order, and what the cue alone gets right before and after."""

    pairs: tuple[Pair, ...]
    cue: str
    before: Estimate
    after: Estimate


def balance(pairs: Sequence[Pair], cue: str, *, seed: int) -> Balanced:
    """A part of ``pairs`` on which ``cue`` says nothing: as many of them speak for it as against, at every strength.

    A cue-only classifier is cross-validated by group; within strata of equal strength |margin| the pairs it gets right
    are thinned at random towards as many as it gets wrong. Repeated until what a new classifier gets right cannot be
    told from one half. Ties stay. Raises :class:`DataError` for an unknown cue, and if too little is left to be used.
    """
    _check(pairs)
    if cue not in CUE_NAMES:
        raise DataError([Finding("balance", None, "", repr(cue), f"one of {listed(CUE_NAMES)}", "name a cue")])
    left = list(range(len(pairs)))
    draw = np.random.default_rng(seed)
    before: Estimate | None = None
    for turn in range(ROUNDS + 1):
        some = [pairs[k] for k in left]
        groups = [pair.group for pair in some]
        if len(set(groups)) < classify.FOLDS:
            found = f"{len(some)} of {len(pairs)} pairs are left once {cue} is taken out"
            mend = "these pairs say little beyond that cue: collect others"
            raise DataError([Finding("balance", None, "", found, "pairs of five groups at least", mend)])
        bag = cue == style.BAG
        x = style.bag_of_words(some) if bag else style.columns_of(cue, style.differences(some))
        margins = classify.out_of_fold(x, groups, seed + turn, scaled=not bag)
        rate = clustered_share(classify.told(margins), groups, METHOD)
        before = before or rate
        kept = _thinned(margins, draw)
        if rate.low <= 0.5 or turn == ROUNDS or len(kept) == len(left):
            return Balanced(tuple(some), cue, before, rate)
        left = [left[k] for k in kept]
    raise AssertionError("the last round returns")


def _thinned(margins: Float, draw: np.random.Generator) -> list[int]:
    """Places that stay: in each stratum of |margin| half of what the right ones are too many goes; all ties stay."""
    strength = np.abs(margins)
    parted = np.flatnonzero(strength > classify.TIE)
    kept = list(np.flatnonzero(strength <= classify.TIE))
    for stratum in np.array_split(parted[np.argsort(strength[parted], kind="stable")], STRATA):
        right, wrong = stratum[margins[stratum] > 0], stratum[margins[stratum] < 0]
        if len(right) > len(wrong):
            # Half of the surplus a round: a classifier of what is left is another one, and all at once overshoots.
            right = draw.permutation(right)[: (len(right) + len(wrong)) // 2]
        kept += [*right, *wrong]
    return sorted(int(k) for k in kept)
