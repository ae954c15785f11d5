"""How whole replies come about: token after token, by one of several sampled blocks, or by a beam.

Each way is a generator over a decoder and a batch of empty replies. It yields after every forward pass, so that several
can take turns with one model, and is exhausted when the replies are complete. Where rows come and go, new ones are
fetched from ``arrivals`` whenever they can enter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from coala.decoding.decoder import Batch, Decoder
from coala.decoding.guidance import Float64, scaled
from coala.decoding.replies import Reply
from coala.decoding.sampling import stream_key, uniform
from coala.settings import Mode

Arrivals = Callable[[], Sequence[Batch]]
# Names the noise by which one of several blocks is kept, among the branches that name the noise of tokens.
CHOICE = -1


def nobody() -> Sequence[Batch]:
    """No arrivals."""
    return ()


def by_tokens(decoder: Decoder, batch: Batch, arrivals: Arrivals = nobody) -> Iterator[None]:
    """One token of every row after the other; new rows may enter at any token."""
    while (batch := batch.join(arrivals())).replies:
        batch = decoder.step(batch)
        yield


# --- blocks ---------------------------------------------------------------------------------------------------------


def by_blocks(decoder: Decoder, batch: Batch, arrivals: Arrivals = nobody) -> Iterator[None]:
    """One of several sampled blocks after the other; new rows may enter where blocks end.

    A block without an end is best-of-n.
    """
    length = decoder.guidance.block_tokens if decoder.guidance.mode == "block" else math.inf
    while (batch := batch.join(arrivals())).replies:
        batch = yield from _one_block(decoder, batch, length)


def _one_block(decoder: Decoder, batch: Batch, length: float) -> Generator[None, None, Batch]:
    """Let every row grow by one of several blocks, the first of which is the unguided one."""
    assert decoder.score is not None
    assert batch.linear is not None
    n = decoder.guidance.candidates
    branches = [reply.branched(branch) for reply in batch.replies for branch in range(n)]
    wide = batch.select([row for row in range(len(batch.replies)) for _ in range(n)], branches)
    grown = 0
    while wide.replies and grown < length:
        wide = decoder.step(wide)
        grown += 1
        yield
    features = torch.stack([branch.features[-1] for branch in branches])
    scores = decoder.score(features.reshape(-1, n, features.shape[-1]), batch.linear)
    if decoder.guidance.weighs:
        keys = [stream_key(r.seed, r.prompt_id, CHOICE, len(r.tokens)) for r in batch.replies]
        winners = kept(decoder.guidance.strength * scores, uniform(keys))
    else:
        winners = scores.argmax(1)
    place = {id(branch): row for row, branch in enumerate(wide.replies)}
    going, replies = [], []
    for row, reply in enumerate(batch.replies):
        winner = branches[row * n + int(winners[row])]
        reply.become(winner)
        if id(winner) in place:
            going.append(place[id(winner)])
            replies.append(reply)
        reply.send()
    return wide.select(going, replies)


def kept(log_weights: Float64, chance: Float64) -> NDArray[np.intp]:
    """Which of k candidates (B,) is kept, each with probability proportional to exp ``log_weights`` (B, k).

    The first is kept wherever that is possible. Candidates are drawn alike, so each is the first with probability 1/k:
    if the first keeps min(1, k w) of its turns for its share w, and the others take what is left in proportion to the
    excess of their shares over 1/k, each ends up with its share. Equal weights keep the first always, and no other way
    of drawing keeps it more often. ``chance`` (B,) are uniform numbers in (0, 1).
    """
    shares = np.exp(log_weights - log_weights.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    k = shares.shape[1]
    stays = np.minimum(1.0, k * shares[:, 0])
    excess = np.cumsum(np.maximum(shares - 1 / k, 0.0), axis=1)
    left = (chance - stays) / np.where(stays < 1, 1 - stays, 1.0)
    other = (excess <= left[:, None] * excess[:, -1:]).sum(1)
    return np.where((chance < stays) | (excess[:, -1] == 0), 0, np.minimum(other, k - 1))


# --- beam -----------------------------------------------------------------------------------------------------------


@dataclass
class _Ended:
    """A reply that has ended, with ``log_prob`` over ``n_tokens``, the stop token among them, and its score."""

    reply: Reply
    log_prob: float
    n_tokens: int
    score: float


@dataclass
class _Option:
    """A place in the next beam: an ended reply, or a row that goes on by a token (``ended`` is ``None``)."""

    log_prob: float
    n_tokens: int
    score: float
    ended: _Ended | None = None
    row: int = 0
    token: int = 0
    step: float = 0.0


def by_beam(decoder: Decoder, batch: Batch, arrivals: Arrivals = nobody) -> Iterator[None]:
    """Beam search for the reply with the largest mean log-probability plus strength times score.

    Means are over the reply's tokens, its stop token included, so that length by itself is neither gain nor loss.
    Log-odds enter the mean, for it is log-probability + strength x log-odds that is to be large. Other rules scale the
    scores over all that compete for the places of one beam: each unended reply extended by each of its likeliest
    tokens, and the ended ones as they stand. A search is over when only ended ones hold places; nobody enters before
    all are.
    """
    targets = batch.replies
    batch = batch.select(range(len(targets)), [reply.branched(0) for reply in targets])
    owner = list(range(len(targets)))
    ended: list[list[_Ended]] = [[] for _ in targets]
    while batch.replies:
        options: list[list[_Option]] = [
            [_Option(one.log_prob, one.n_tokens, one.score, one) for one in done] for done in ended
        ]
        for row, option in _extensions(decoder, batch):
            options[owner[row]].append(option)
        kept = [_best(decoder, some, decoder.guidance.width) for some in options]
        for which in set(owner):
            ended[which] = [option.ended for option in kept[which] if option.ended is not None]
        chosen = [(which, option) for which in sorted(set(owner)) for option in kept[which] if option.ended is None]
        batch, owner = _grow(decoder, batch, chosen, ended)
        yield
    for target, done in zip(targets, ended, strict=True):
        finals = [_Option(one.log_prob, one.n_tokens, one.score, one) for one in done]
        winner = _best(decoder, finals, 1)[0].ended
        assert winner is not None
        target.become(winner.reply)
        target.send()


def _extensions(decoder: Decoder, batch: Batch) -> list[tuple[int, _Option]]:
    """Every row with each of its likeliest tokens."""
    nucleus = decoder.nucleus(batch)
    k = min(decoder.guidance.candidates, int(np.isfinite(nucleus.log_probs).sum(1).max()))
    inside = np.isfinite(nucleus.log_probs[:, :k])
    tokens = np.where(inside, nucleus.tokens[:, :k], nucleus.tokens[:, :1])
    scores = np.zeros(tokens.shape)
    if decoder.guidance.strength > 0 and decoder.head is not None:
        scores = decoder.preview(batch, tokens).astype(np.float64)
    before = [sum(reply.log_probs) for reply in batch.replies]
    n_tokens = len(batch.replies[0].tokens) + 1
    return [
        (
            row,
            _Option(
                before[row] + nucleus.base[row, j],
                n_tokens,
                float(scores[row, j]),
                row=row,
                token=int(tokens[row, j]),
                step=float(nucleus.base[row, j]),
            ),
        )
        for row, j in np.argwhere(inside).tolist()
    ]


def _best(decoder: Decoder, options: list[_Option], places: int) -> list[_Option]:
    """The best options, best first; of equals the earlier."""
    scores = np.array([option.score for option in options])
    gain = decoder.guidance.strength * scaled(scores, np.ones(len(scores), dtype=bool), decoder.guidance.rule)
    mean = np.array([option.log_prob / option.n_tokens for option in options])
    if decoder.guidance.weighs:
        gain = gain / np.array([option.n_tokens for option in options])
    return [options[at] for at in np.argsort(-(mean + gain), kind="stable")[:places]]


def _grow(
    decoder: Decoder, batch: Batch, chosen: list[tuple[int, _Option]], ended: list[list[_Ended]]
) -> tuple[Batch, list[int]]:
    """The rows of the next beam and whose they are; replies that their token ends go to ``ended``."""
    if not chosen:
        return batch.select([], []), []
    replies = [batch.replies[option.row].branched(0) for _, option in chosen]
    batch = batch.select([option.row for _, option in chosen], replies)
    stops = [option.token in decoder.backbone.stop_tokens for _, option in chosen]
    if not all(stops) or decoder.counts_stop:
        decoder.push(batch, [option.token for _, option in chosen])
    going = []
    for row, ((which, option), reply) in enumerate(zip(chosen, replies, strict=True)):
        if not decoder.grow(batch, row, reply, option.token, option.step):
            going.append(row)
        elif reply.cut is None:
            ended[which].append(_Ended(reply, option.log_prob, option.n_tokens, option.score))
        else:
            ended[which].append(_cut(decoder, batch, row, reply))
    return batch.select(going, [replies[row] for row in going]), [chosen[row][0] for row in going]


def _cut(decoder: Decoder, batch: Batch, row: int, reply: Reply) -> _Ended:
    """A reply that a stop string has cut is worth what is left of it."""
    score = 0.0
    if decoder.score is not None and batch.linear is not None:
        score = float(decoder.score(reply.features[-1][None, None], batch.linear[row : row + 1])[0, 0])
    return _Ended(reply, sum(reply.log_probs), max(len(reply.tokens), 1), score)


WAYS: Mapping[Mode, Callable[[Decoder, Batch, Arrivals], Iterator[None]]] = {
    "token": by_tokens,
    "prefix": by_tokens,
    "shift": by_tokens,
    "none": by_tokens,
    "distilled": by_tokens,
    "block": by_blocks,
    "best_of": by_blocks,
    "beam": by_beam,
}
