"""The head's scores of given replies, whole and after every token; done in pieces, so that others need not wait.

Knows nothing of HTTP or of who asks.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from coala.backbone import POOLINGS
from coala.serve.pieces import Reader
from coala.values import ConvexHead, Float32, Turn

if TYPE_CHECKING:
    from coala.backbone import LanguageModel, Row

# Tokens of one forward pass, and states pooled at once: how long others wait for a piece.
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Scored:
    """A reply's ``score`` as the head gives it to extracted features; ``n_tokens`` of prompt and reply were read.

    ``dropped`` tokens were cut off, for the head reads no more than it was fitted on. With positions, ``pieces`` of
    text add up to the reply that was read, and ``scores`` are those of the reply as it stands after each.
    """

    score: float
    n_tokens: int
    dropped: int
    pieces: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()


def score(
    prompts: Sequence[Sequence[Turn]],
    replies: Sequence[str],
    head: ConvexHead,
    backbone: LanguageModel,
    *,
    positions: bool = False,
) -> Generator[None, None, list[Scored]]:
    """Scores of ``replies`` to ``prompts``, one each; yields between pieces of work and returns the scores.

    The head must have been fitted on features of ``backbone``.
    """
    spec = head.spec
    rows = [
        backbone.render(prompt, reply, max_tokens=spec.max_tokens, ends_with_eos=spec.ends_with_eos)
        for prompt, reply in zip(prompts, replies, strict=True)
    ]
    reader = Reader(backbone)
    gates: dict[tuple[int, ...], Float32] = {}
    if head.needs_prompt:
        alone = [backbone.render(prompt, max_tokens=spec.max_tokens) for prompt in prompts]
        for some in batches(alone):
            features = _pooled(backbone, head, [alone[at] for at in some], [(0, alone[at].stop) for at in some])
            gates |= {tuple(alone[at].tokens): feature for at, feature in zip(some, features, strict=True)}
            yield
    found: list[Scored | None] = [None] * len(rows)
    for some in batches(rows):
        features = _pooled(backbone, head, [rows[at] for at in some], [(rows[at].start, rows[at].stop) for at in some])
        for at, feature in zip(some, features, strict=True):
            row = rows[at]
            gate = gates[tuple(alone[at].tokens)] if head.needs_prompt else None
            pieces: list[str] = []
            scores: list[float] = []
            if positions:
                # The closing token that some heads read is not part of the text.
                closed = (
                    spec.ends_with_eos and row.stop > row.start and row.tokens[row.stop - 1] in backbone.stop_tokens
                )
                stop = row.stop - closed
                pieces = reader.pieces(row.tokens[row.start : stop])
                for part in _prefixes(backbone, head, row, stop):
                    scores += _scores(head, part, gate)
                    yield
            whole = _scores(head, feature[None], gate)[0]
            found[at] = Scored(whole, len(row.tokens), row.dropped, tuple(pieces), tuple(scores))
        yield
    return [one for one in found if one is not None]


def _scores(head: ConvexHead, features: Float32, prompt: Float32 | None) -> list[float]:
    gates = None if prompt is None else np.broadcast_to(prompt, features.shape)
    scores = [float(one) for one in head.score(features, gates)]
    if not np.isfinite(scores).all():
        raise FloatingPointError("the head's scores are not finite: the model's hidden states overflow")
    return scores


def batches(rows: Sequence[Row]) -> list[list[int]]:
    """Places of ``rows`` by length, as many together as ``BATCH_TOKENS`` hold, padding counted."""
    order = sorted(range(len(rows)), key=lambda at: -len(rows[at].tokens))
    found: list[list[int]] = []
    while order:
        size = max(1, BATCH_TOKENS // len(rows[order[0]].tokens))
        found.append(order[:size])
        order = order[size:]
    return found


def _pooled(
    backbone: LanguageModel, head: ConvexHead, rows: Sequence[Row], spans: Sequence[tuple[int, int]]
) -> Float32:
    """Features (B, d) of the tokens start <= t < stop of each row."""
    pooling = POOLINGS[head.spec.pooling]
    hidden = backbone.hidden([row.tokens for row in rows], head.spec.layer, scored=pooling.scored)
    start, stop = (torch.tensor([span[i] for span in spans], device=hidden.device) for i in (0, 1))
    return np.asarray(pooling.pool(hidden, start, stop).cpu().numpy(), dtype=np.float32)


def _prefixes(backbone: LanguageModel, head: ConvexHead, row: Row, end: int) -> Generator[Float32, None, None]:
    """Features (k, d) of the reply cut after each of its tokens, in order; some at a time."""
    pooling = POOLINGS[head.spec.pooling]
    hidden = backbone.hidden([row.tokens], head.spec.layer, scored=pooling.scored)
    size = max(1, BATCH_TOKENS // len(row.tokens))
    for first in range(row.start + 1, end + 1, size):
        stop = torch.arange(first, min(first + size, end + 1), device=hidden.device)
        start = torch.full_like(stop, row.start)
        # A token's state does not depend on what follows, so that the reply cut short needs no pass of its own.
        pooled = pooling.pool(hidden.expand(len(stop), -1, -1), start, stop)
        yield np.asarray(pooled.cpu().numpy(), dtype=np.float32)
