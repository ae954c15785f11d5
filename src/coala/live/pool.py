"""Prompts, the replies drawn for them, their features; which pairs are ready; and which of them is asked next.

Knows nothing of models, files or pages.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coala.convex.questions import Gain
from coala.live.journal import Asked, How, LivePrompt, Reply
from coala.live.learner import Learner
from coala.live.settings import LiveSettings, Selection

Float32 = NDArray[np.float32]
SHARE_ACTIVE: Mapping[Selection, float] = {"active": 0.9, "mixed": 0.5, "random": 0.0}
CONSIDERED = 400  # pairs whose worth is computed for a question
TO_COME = 200  # pairs of the pool that stand for those to come
GAIN: Gain = "variance"


@dataclass(frozen=True)
class Drawn:
    """A reply of the pool with its feature vector (d,)."""

    reply: Reply
    prompt: str
    feature: Float32


@dataclass
class Pool:
    """Replies by prompt. ``written`` counts those drawn for each, empty and repeated ones too, which make no pair."""

    replies: dict[str, Drawn] = field(default_factory=dict)
    by_prompt: dict[str, list[Drawn]] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)
    features: dict[tuple[str, str], Float32] = field(default_factory=dict)

    def apply(self, event: Mapping[str, Any]) -> None:
        """Take in a line of the file of replies."""
        feature = None
        if event.get("feature"):
            feature = np.frombuffer(base64.b64decode(event["feature"]), "<f4")
            self.features[event["prompt"], event["text"]] = feature
        if event["kind"] != "reply" or event["id"] in self.replies:
            return
        self.written[event["prompt"]] = self.written.get(event["prompt"], 0) + 1
        if feature is None:
            return
        drawn = Drawn(Reply(event["id"], event["text"], event["policy"]), event["prompt"], feature)
        self.replies[event["id"]] = drawn
        others = self.by_prompt.setdefault(event["prompt"], [])
        if all(other.reply.text != event["text"] for other in others):
            others.append(drawn)

    def ready(self, prompts: Iterable[LivePrompt], asked: Iterable[Asked], *, aside: bool) -> list[tuple[Drawn, Drawn]]:
        """Pairs of different replies to one prompt that nobody was asked about."""
        known = {frozenset((one.first.id, one.second.id)) for one in asked}
        return [
            both
            for prompt in prompts
            if prompt.aside == aside
            for both in combinations(self.by_prompt.get(prompt.id, ()), 2)
            if frozenset((both[0].reply.id, both[1].reply.id)) not in known
        ]


def reply_event(prompt: str, number: int, text: str, policy: str, feature: Float32 | None) -> dict[str, Any]:
    """A reply as a line of the file of replies; without a feature it is of no use, and counts."""
    held = None if feature is None else base64.b64encode(np.ascontiguousarray(feature, "<f4").tobytes()).decode()
    named = f"{prompt}-{number}"
    return {"kind": "reply", "id": named, "prompt": prompt, "text": text, "policy": policy, "feature": held}


def text_event(prompt: str, text: str, feature: Float32) -> dict[str, Any]:
    """The feature of a text that is no reply of the pool: one that a rater edited."""
    held = base64.b64encode(np.ascontiguousarray(feature, "<f4").tobytes()).decode()
    return {"kind": "text", "prompt": prompt, "text": text, "feature": held}


def set_aside(place: int, share: float, seed: int) -> bool:
    """Whether the prompt that came as number ``place`` is set aside: one of each block of 1/share, drawn in it.

    Never the very first, without which there would be nothing to fit.
    """
    size = max(2, round(1 / share))
    block, inside = divmod(place, size)
    return bool(np.random.default_rng([seed, 1, block]).integers(0 if block else 1, size) == inside)


def choose(
    pool: Pool,
    prompts: Sequence[LivePrompt],
    asked: Sequence[Asked],
    learner: Learner | None,
    settings: LiveSettings,
    rater: str,
) -> Asked | None:
    """The next question; None while no pair of the kind whose turn it is is ready.

    Whether it is held out is drawn by its number alone, so that asking again while one waits changes nothing. A pair
    that is held out is drawn evenly among those of the prompts set aside. Where it is the turn of one but no prompt set
    aside has replies yet, another is asked.
    """
    rng = np.random.default_rng([settings.seed, 2, len(asked)])
    coin, way = rng.random(2)
    candidates = pool.ready(prompts, asked, aside=True) if coin < settings.held_out else []
    held_out = bool(candidates)
    if not held_out:
        candidates = pool.ready(prompts, asked, aside=False)
    if not candidates:
        return None
    how: How = "random"
    if learner is not None and not held_out and way < SHARE_ACTIVE[settings.ask]:
        how = "active"
        some = [candidates[i] for i in rng.permutation(len(candidates))[:CONSIDERED]]
        rows = _rows(learner, some)
        first, second = some[int(np.argmax(learner.worth(rows, rows[:TO_COME], by=GAIN)))]
    else:
        first, second = candidates[int(rng.integers(len(candidates)))]
    if rng.random() < 0.5:
        first, second = second, first
    margin, n_taught = 0.0, 0
    if learner is not None:
        margin, n_taught = learner.margin(first.feature, second.feature), len(learner)
    name = f"q{len(asked) + 1}"
    return Asked(name, first.prompt, first.reply, second.reply, held_out, how, rater, margin, n_taught)


def rows_to_come(pool: Pool, prompts: Sequence[LivePrompt], learner: Learner, seed: int) -> NDArray[np.float64]:
    """Rows (h, p) of pairs of the pool drawn evenly, asked about or not: they stand for pairs to come."""
    every = pool.ready(prompts, (), aside=False) + pool.ready(prompts, (), aside=True)
    rng = np.random.default_rng([seed, 3])
    return _rows(learner, [every[i] for i in rng.permutation(len(every))[:TO_COME]])


def _rows(learner: Learner, pairs: Sequence[tuple[Drawn, Drawn]]) -> NDArray[np.float64]:
    if not pairs:
        return np.zeros((0, learner.program.width))
    first, second = (np.stack([both[side].feature for both in pairs]) for side in (0, 1))
    return learner.rows(first, second)
