"""How likely a frozen model finds each reply: the cue of whoever knows language but no preference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from coala.callbacks import OnProgress
from coala.evaluation.reward_benchmarks import Item
from coala.statistics.intervals import Float
from coala.values import Pair, Turn

if TYPE_CHECKING:
    from coala.backbone import LanguageModel

PORTION = 32  # pairs between two lines of progress


def reply_likelihoods(
    items: Sequence[Item], model: LanguageModel, on_progress: OnProgress, *, batch_tokens: int = 4096
) -> Float:
    """log p(reply, its end | prompt) in nats, and the same per token, of all R replies of ``items``, (R, 2).

    Each distinct reply to a prompt is read once, two of them on what they share. Prompt and reply are cut to the
    model's context as features are.
    """
    from coala.baselines import TrainSettings
    from coala.baselines.likelihoods import log_likelihoods

    asked: dict[tuple[Turn, ...], dict[str, None]] = {}
    for item in items:
        asked.setdefault(item.prompt, {}).update(dict.fromkeys(item.replies))
    # Replies to one prompt in twos; the last of an odd number stands on both sides.
    pairs = [
        Pair(prompt, two[0], two[-1], "")
        for prompt, texts in asked.items()
        for two in (list(texts)[k : k + 2] for k in range(0, len(texts), 2))
    ]
    found: dict[tuple[tuple[Turn, ...], str], tuple[float, float]] = {}
    settings = TrainSettings(max_length=None)
    for start in range(0, len(pairs), PORTION):
        on_progress("likelihoods", start, len(pairs))
        some = pairs[start : start + PORTION]
        read = log_likelihoods(model, some, settings, batch_tokens=batch_tokens)
        for k, pair in enumerate(some):
            found[pair.prompt, pair.chosen] = read.chosen[k], read.chosen[k] / read.chosen_tokens[k]
            found[pair.prompt, pair.rejected] = read.rejected[k], read.rejected[k] / read.rejected_tokens[k]
    on_progress("likelihoods", len(pairs), len(pairs))
    return np.array([found[item.prompt, text] for item in items for text in item.replies]).reshape(-1, 2)
