"""Texts that come again: within a set, and between the two sides of a split."""

from __future__ import annotations

from collections.abc import Sequence

from coala.data.duplicates import near_duplicates
from coala.data.turns import digest
from coala.evaluation.reward_benchmarks import Item


def repeats(items: Sequence[Item]) -> dict[str, int]:
    """How many items, replies and prompts come again, exactly or nearly; empty replies and sides that agree."""
    groups = [item.group for item in items]
    asked = [digest(_asked(item)) for item in items]
    sides = [(frozenset(map(digest, item.chosen)), frozenset(map(digest, item.rejected))) for item in items]
    whole = [(prompt, *both) for prompt, both in zip(asked, sides, strict=True)]
    seen = set(whole)
    right = {text for good, _ in sides for text in good}
    wrong = {text for _, bad in sides for text in bad}
    same_group = {(group, text) for group, (good, _) in zip(groups, sides, strict=True) for text in good}
    return {
        "duplicate items": len(whole) - len(seen),
        "contradicting items": sum((prompt, bad, good) in seen for prompt, good, bad in whole),
        "replies right in one item and wrong in another of its group": sum(
            (group, text) in same_group for group, (_, bad) in zip(groups, sides, strict=True) for text in bad
        ),
        "texts on both sides": len(right & wrong),
        "items with the same text right and wrong": sum(bool(good & bad) for good, bad in sides),
        "empty replies": sum(not text.strip() for item in items for text in item.replies),
        "items nearly the same as one of another group": len(near_duplicates([_text(one) for one in items], groups)),
        "prompts nearly the same as one of another group": len(near_duplicates([_asked(one) for one in items], groups)),
    }


def leaks(items: Sequence[Item], against: Sequence[Item]) -> dict[str, int]:
    """Items of ``against`` that share something with ``items``."""
    both = [*items, *against]
    groups = {item.group for item in items}
    prompts = {digest(_asked(item)) for item in items}
    replies = {digest(text) for item in items for text in item.replies}
    near = near_duplicates([_text(one) for one in both], [one.group for one in both], others=len(items))
    asked = near_duplicates([_asked(one) for one in both], [one.group for one in both], others=len(items))
    return {
        "leaks: items of the other split": len(against),
        "leaks: with a group that is here": sum(item.group in groups for item in against),
        "leaks: with a prompt that is here": sum(digest(_asked(item)) in prompts for item in against),
        "leaks: with a prompt nearly here": len(asked),
        "leaks: with a reply that is here": sum(
            any(digest(text) in replies for text in one.replies) for one in against
        ),
        "leaks: nearly the same item": len(near),
    }


def _text(item: Item) -> str:
    return "\n".join((*(turn.text for turn in item.prompt), *item.replies))


def _asked(item: Item) -> str:
    return "\n".join(turn.text for turn in item.prompt)
