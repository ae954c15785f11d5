"""A finished run as receipts read it: its pairs, their features and its head, checked against one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coala.recipe import Recipe, recipe_of
from coala.store import RunFolder, StoreError, load_features, load_head, load_pairs, pair_digest
from coala.values import CoalaError, ConvexHead, FeatureSet, Pair, conversation_text

LONGEST = 160  # characters of a text that a receipt quotes


@dataclass(frozen=True)
class Side:
    """The pairs of one side, to fit or held out, with their features: ``prefixes`` rows for each pair."""

    name: str
    pairs: Sequence[Pair]
    features: FeatureSet
    prefixes: int

    def rows(self, pairs: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which rows are of those pairs."""
        return np.repeat(pairs, self.prefixes)


@dataclass(frozen=True)
class Opened:
    run: RunFolder
    recipe: Recipe
    head: ConvexHead
    train: Side
    held_out: Side


def opened(path: Path | str) -> Opened:
    """The run at ``path``.

    Raises:
        CoalaError: for a folder that is no run, a run without a head, or one whose features are gone.
    """
    run = RunFolder.open(path)
    recipe = recipe_of(run.settings, run.path / "run.json")
    if not (run.path / "head" / "head.json").is_file():
        raise StoreError(
            f"{run.path}: found no head, expected that of a finished run, fix: finish it with `coala align`"
        )
    sides = {}
    for name, prefixes in (("train", recipe.model.prefixes), ("eval", 1)):
        folder = run.path / "features" / name
        if not (folder / "features.safetensors").is_file():
            raise StoreError(
                f"{folder}: found no features, expected those the head was fitted on, fix: make them again with "
                f"`coala align --recipe {run.path / 'run.json'} --out {run.path}`"
            )
        pairs, features = load_pairs(run.path / f"pairs-{name}.jsonl"), load_features(folder, mmap=True)
        if len(features) != prefixes * len(pairs):
            raise StoreError(
                f"{folder}: found {len(features)} rows, expected {prefixes} for each of {len(pairs)} pairs, fix: align "
                "again"
            )
        sides[name] = Side(name, pairs, features, prefixes)
    return Opened(run, recipe, load_head(run.path / "head"), sides["train"], sides["eval"])


def quoted(pair: Pair) -> dict[str, str]:
    """The beginning of each text of a pair; the end of its prompt, where the question is."""

    def short(text: str, end: bool = False) -> str:
        text = " ".join(text.split())
        if len(text) <= LONGEST:
            return text
        return "... " + text[-LONGEST:] if end else text[:LONGEST] + " ..."

    return {
        "prompt": short(conversation_text(pair.prompt), end=True),
        "chosen": short(pair.chosen),
        "rejected": short(pair.rejected),
    }


def chosen_pairs(
    side: Side, groups: Sequence[str] = (), raters: Sequence[str] = (), pairs: Sequence[Pair] = ()
) -> NDArray[np.bool_]:
    """Which pairs of a side belong to one of ``groups`` or ``raters``, or are among ``pairs``."""
    wanted = {pair_digest(pair) for pair in pairs}
    return np.array(
        [
            pair.group in groups or (bool(pair.rater) and pair.rater in raters) or pair_digest(pair) in wanted
            for pair in side.pairs
        ],
        dtype=bool,
    )


def require_known(run: Opened, groups: Sequence[str], raters: Sequence[str], pairs: Sequence[Pair]) -> None:
    """Raise :class:`CoalaError` for a group, a rater or a pair that the run does not have."""
    everyone = [*run.train.pairs, *run.held_out.pairs]
    for kind, asked, there in (
        ("group", groups, sorted({pair.group for pair in everyone})),
        ("rater", raters, sorted({pair.rater for pair in everyone if pair.rater})),
    ):
        if unknown := sorted(set(asked) - set(there)):
            known = ", ".join(map(repr, there[:3])) + (f" and {len(there) - 3} more" if len(there) > 3 else "")
            raise CoalaError(
                f"found {kind} {unknown[0]!r}, expected one of {run.run.path}: {known or 'none, no pair names one'}, "
                f"fix: take a {kind} as pairs-train.jsonl spells it"
            )
    held = {pair_digest(pair) for pair in everyone}
    missing = [pair for pair in pairs if pair_digest(pair) not in held]
    if missing:
        raise CoalaError(
            f"found {len(missing)} of {len(pairs)} pairs that {run.run.path} does not have (the first: "
            f"{quoted(missing[0])['prompt'][:60]!r}), expected pairs it was made of, fix: leave them out of the file"
        )
