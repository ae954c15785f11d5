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
from coala.serve.detokenize import PieceReader
from coala.serve.prompts import require_room, too_long
from coala.values import ConvexHead, Float32, Turn

if TYPE_CHECKING:
    from coala.backbone import LanguageModel, RenderedRow

# Tokens of one forward pass, and states pooled at once: how long others wait for a piece.
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class ScoredReply:
    """A reply's ``score`` as the head gives it to extracted features; ``n_tokens`` of prompt and reply were read.

    ``dropped`` tokens were cut off, for the head reads no more than it was fitted on. With positions, ``pieces`` of
    text add up to the reply that was read, and ``scores`` are those of the reply as it stands after each.
    """

    score: float
    n_tokens: int
    dropped: int
    pieces: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()


@dataclass(frozen=True)
class Texts:
    """Replies as the head reads them behind their prompts, the prompts alone where its gates act on them, and each
    reply's pieces of text where scores after every token are wanted."""

    rows: list[RenderedRow]
    alone: list[RenderedRow] | None
    pieces: list[tuple[str, ...]] | None


def read(
    prompts: Sequence[Sequence[Turn]],
    replies: Sequence[str],
    head: ConvexHead,
    backbone: LanguageModel,
    *,
    positions: bool = False,
    cut: bool = True,
) -> Generator[None, None, Texts]:
    """Tokens of ``replies`` to ``prompts``, one each; yields between any two. No model is asked.

    Unless ``cut``, :class:`TooLong` is raised at the first text that is longer than the model's context.
    """
    spec = head.spec
    reader = PieceReader(backbone)
    known: dict[Sequence[Turn], RenderedRow] = {}
    rows, alone, pieces = [], [], []
    for number, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        turns = tuple(prompt)
        if turns not in known:
            if not cut:
                require_room(turns, backbone)
            known[turns] = backbone.render(turns, max_tokens=spec.max_tokens)
            if not cut and (length := len(known[turns].tokens) + known[turns].dropped) >= backbone.max_tokens:
                raise too_long(f"has {length}", backbone)
            yield
        if not cut:
            require_room(reply, backbone, f"Reply {number}")
        row = backbone.render(turns, reply, max_tokens=spec.max_tokens, ends_with_eos=spec.ends_with_eos)
        rows.append(row)
        alone.append(known[turns])
        if positions:
            pieces.append(tuple(reader.pieces(row.tokens[row.start : _end(row, head, backbone)])))
        yield
    return Texts(rows, alone if head.needs_prompt else None, pieces if positions else None)


def weigh(texts: Texts, head: ConvexHead, backbone: LanguageModel) -> Generator[None, None, list[ScoredReply]]:
    """The scores of ``texts``; yields between pieces of the model's work."""
    rows, alone = texts.rows, texts.alone
    gates: dict[tuple[int, ...], Float32] = {}
    if alone is not None:
        distinct = list({tuple(row.tokens): row for row in alone}.values())
        for some in batches(distinct):
            spans = [(0, distinct[at].stop) for at in some]
            features = _pooled(backbone, head, [distinct[at] for at in some], spans)
            gates |= {tuple(distinct[at].tokens): feature for at, feature in zip(some, features, strict=True)}
            yield
    found: list[ScoredReply | None] = [None] * len(rows)
    for some in batches(rows):
        features = _pooled(backbone, head, [rows[at] for at in some], [(rows[at].start, rows[at].stop) for at in some])
        for at, feature in zip(some, features, strict=True):
            row = rows[at]
            gate = None if alone is None else gates[tuple(alone[at].tokens)]
            scores: list[float] = []
            if texts.pieces is not None:
                for part in _prefixes(backbone, head, row, _end(row, head, backbone)):
                    scores += _scores(head, part, gate)
                    yield
            whole = _scores(head, feature[None], gate)[0]
            pieces = () if texts.pieces is None else texts.pieces[at]
            found[at] = ScoredReply(whole, len(row.tokens), row.dropped, pieces, tuple(scores))
        yield
    return [one for one in found if one is not None]


def score(
    prompts: Sequence[Sequence[Turn]],
    replies: Sequence[str],
    head: ConvexHead,
    backbone: LanguageModel,
    *,
    positions: bool = False,
) -> Generator[None, None, list[ScoredReply]]:
    """Scores of ``replies`` to ``prompts``, one each; yields between pieces of work and returns the scores.

    The head must have been fitted on features of ``backbone``.
    """
    texts = yield from read(prompts, replies, head, backbone, positions=positions)
    return (yield from weigh(texts, head, backbone))


def _end(row: RenderedRow, head: ConvexHead, backbone: LanguageModel) -> int:
    """Index behind the reply's text: the closing token that some heads read is not part of it."""
    closed = head.spec.ends_with_eos and row.stop > row.start and row.tokens[row.stop - 1] in backbone.stop_tokens
    return row.stop - closed


def _scores(head: ConvexHead, features: Float32, prompt: Float32 | None) -> list[float]:
    gates = None if prompt is None else np.broadcast_to(prompt, features.shape)
    scores = [float(one) for one in head.score(features, gates)]
    if not np.isfinite(scores).all():
        raise FloatingPointError("the head's scores are not finite: the model's hidden states overflow")
    return scores


def batches(rows: Sequence[RenderedRow]) -> list[list[int]]:
    """Places of ``rows`` by length, as many together as ``BATCH_TOKENS`` hold, padding counted."""
    order = sorted(range(len(rows)), key=lambda at: -len(rows[at].tokens))
    found: list[list[int]] = []
    while order:
        size = max(1, BATCH_TOKENS // len(rows[order[0]].tokens))
        found.append(order[:size])
        order = order[size:]
    return found


def _pooled(
    backbone: LanguageModel, head: ConvexHead, rows: Sequence[RenderedRow], spans: Sequence[tuple[int, int]]
) -> Float32:
    """Features (B, d) of the tokens start <= t < stop of each row."""
    pooling = POOLINGS[head.spec.pooling]
    hidden = backbone.hidden([row.tokens for row in rows], head.spec.layer, scored=pooling.scored)
    start, stop = (torch.tensor([span[i] for span in spans], device=hidden.device) for i in (0, 1))
    return np.asarray(pooling.pool(hidden, start, stop).cpu().numpy(), dtype=np.float32)


def _prefixes(backbone: LanguageModel, head: ConvexHead, row: RenderedRow, end: int) -> Generator[Float32, None, None]:
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
